"""What is known of a model's training."""

from collections.abc import Mapping

from ldm3d.report.page import Section, picture


def denoising_section(errors: Mapping[str, tuple[float, float]], pictures: Mapping[str, str]) -> Section:
    """Errors by noise level, sigma / alpha -> (of the model, of the best Gaussian)."""
    rows = [[level, f"{own:.3f}", f"{best:.3f}", "yes" if own < best else "no"] for level, (own, best) in errors.items()]
    behind = [level for level, (own, best) in errors.items() if own > best]
    verdict = (
        f"At {', '.join(behind)} it is worse than the Gaussian: longer training would help."
        if behind
        else "It is better than the Gaussian at every level."
    )
    return Section(
        "Was the network trained long enough?",
        "Mean squared error of the denoised latent on the validation scans of the training, relative to the variance of each "
        "channel: 0 is perfect, 1 knows the mean alone. The best Gaussian denoiser is computed from the training latents "
        f"without any training. {verdict}",
        {"columns": ["noise level (sigma / alpha)", "this model", "best Gaussian", "model is better"], "rows": rows},
        labels=1,
        plots=[picture(pictures, "denoising", "Denoising error by noise level.")],
    )
