"""Text for the methods section of a paper: what was done, with versions and citations, and BibTeX of what is cited.

Citations are [@key], as pandoc and Quarto read them. The text says only what the files of a model and of its evaluation say.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm3d.covariates import in_words
from ldm3d.description import Sampling
from ldm3d.files import write_atomic

METHODS, REFERENCES = "methods.md", "references.bib"
MOST_SITES = 12  # that are named
_BIB = Path(__file__).with_name(REFERENCES)
_PROCESSES = {
    "flow": "linear interpolation between data and noise, as in flow matching [@lipman2023]",
    "vp-cosine": "a variance-preserving process with the cosine schedule [@nichol2021]",
    "vp-linear": "a variance-preserving process with linear betas [@ho2020]",
    "vp-scaled-linear": "a variance-preserving process with scaled linear betas [@ho2020; @rombach2022]",
    "vdm": "a variational diffusion model with a learned schedule [@kingma2021]",
}
_SAMPLERS = {
    "ddpm": "ancestral sampling [@ho2020]",
    "ddim": "DDIM [@song2021ddim]",
    "euler": "Euler's method [@song2021sde]",
    "heun": "Heun's method [@karras2022]",
    "dpmpp-2m": "DPM-Solver++(2M) [@lu2022]",
    "unipc": "UniPC [@zhao2023]",
    "sde-euler": "the Euler-Maruyama method [@song2021sde]",
    "sde-heun": "a stochastic Heun method [@song2021sde]",
    "sde-pc": "predictor-corrector sampling [@song2021sde]",
}
_TARGETS = {
    "v": "v [@salimans2022]",
    "noise": "the noise [@ho2020]",
    "data": "the data",
    "velocity": "the velocity [@lipman2023]",
}
_OPTIMIZERS = {
    "adamw": "AdamW [@loshchilov2019]",
    "muon": "Muon [@jordan2024] for matrices and AdamW [@loshchilov2019] for the rest",
}
_TOOLS = {"mri_synthstrip": "[@hoopes2022]", "hd-bet": "[@isensee2019]", "bet": "[@smith2002]", "deepbet-cli": "[@fisch2024]"}


def methods_text(account: Mapping[str, Any] | None, sampling: Sampling, metrics: Mapping[str, Any] | None = None) -> str:
    """The text, in paragraphs of Markdown.

    Args:
        account: of `ldm3d.account`; None: nothing is said of the training.
        sampling: how volumes are generated.
        metrics: content of metrics.json of an evaluation; None: nothing is said of one.
    """
    paragraphs = [*(_made(account) if account else []), _sampling(sampling)]
    if metrics:
        paragraphs.append(_evaluated(metrics))
    return "\n\n".join(paragraphs) + "\n"


def bibtex(text: str, account: Mapping[str, Any] | None = None) -> str:
    """BibTeX of every [@key] in a text, in the order of the keys; [@dataset] is what the account says of the data."""
    entries = {match[1]: match[0] for match in re.finditer(r"@\w+\{(\w+),.*?\n\}", _BIB.read_text("utf-8"), re.DOTALL)}
    if source := _source(account):
        entries["dataset"] = _entry(source)
    cited = sorted(set(re.findall(r"@(\w+)", text)) & entries.keys())  # a version may hold an @, too
    return "\n\n".join(entries[key] for key in cited) + "\n"


def write_methods(folder: Path, text: str, account: Mapping[str, Any] | None = None) -> None:
    """Write methods.md and references.bib into a folder."""
    write_atomic(folder / METHODS, text)
    write_atomic(folder / REFERENCES, bibtex(text, account))


def _source(account: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What the dataset says of itself (`ldm3d.data.source`), if it has a name; models of older versions have nothing of it."""
    source = account["data"].get("source", {}) if account else {}
    return source if source.get("name") else {}


def _entry(source: Mapping[str, Any]) -> str:
    """The dataset in BibTeX; braces of others would end an entry early."""
    fields = {
        "title": source["name"],
        "author": " and ".join(source.get("authors", ())),
        "doi": source.get("doi", ""),
        "note": f"Licence: {source['licence']}" if "licence" in source else "",
    }
    lines = [f"  {key} = {{{re.sub('[{}]', '', value)}}}" for key, value in fields.items() if value]
    return "@misc{dataset,\n" + ",\n".join(lines) + "\n}"


def _made(account: Mapping[str, Any]) -> Iterator[str]:
    versions, data = account["versions"], account["data"]
    yield (
        f"We trained a latent diffusion model [@rombach2022; @pinaya2022] of 3D brain MRI with ldm3d {versions['ldm3d']}, "
        f"which builds on PyTorch {versions['torch']} [@paszke2019] and MONAI {versions['monai']} [@cardoso2022]."
    )
    yield " ".join((_people(data), *_prepared(account["prepared"])))
    yield _autoencoder(account)
    start = " It started with the weights of another model." if account["started_with"]["diffusion"] else ""
    yield _diffusion(account["stages"]["diffusion"]) + start


def _people(data: Mapping[str, Any]) -> str:
    scans, subjects = data["scans"], data["subjects"]
    purposes = {"train": "training", "validation": "validation", "test": "the test"}
    counts = [
        f"{subjects[split]} ({_count(scans[split], 'scan')}) for {purpose}"
        for split, purpose in purposes.items()
        if split in scans
    ]
    source = " organised in BIDS [@gorgolewski2016]" if data["bids"] else ""
    found = _source({"data": data})
    name = f' of "{found["name"]}" [@dataset]' if found else ""
    named = ", ".join(f"{site} ({count})" for site, count in list(data["sites"].items())[:MOST_SITES])
    more = ", and others" if len(data["sites"]) > MOST_SITES else ""
    sites = f" Training subjects came from {len(data['sites'])} sites: {named}{more}." if len(data["sites"]) > 1 else ""
    terms = [
        f"licence: {found['licence']}" if "licence" in found else "",
        found.get("doi") and f"https://doi.org/{found['doi']}",
    ]
    said = f" ({', '.join(each for each in terms if each)})" if any(terms) else ""
    thanks = f" The dataset asks to be acknowledged so: {found['cite']}" if "cite" in found else ""
    if links := found.get("links"):
        thanks += f" It refers to: {'; '.join(links)}" if thanks else f" References of the dataset: {'; '.join(links)}"
    rows = [f"{name.replace(chr(10), ' ')} {cells[0].replace(chr(10), ', ')}" for name, *cells in data["table"]["rows"][2:]]
    about = f" Of all: {'; '.join(rows)}." if rows else ""
    return (
        f"The data{name}{said}{source} were split by subject: {', '.join(counts)}.{about}{sites} The test subjects took no "
        f"part in any training or choice.{thanks}"
    )


def _prepared(prepared: Mapping[str, Any]) -> Iterator[str]:
    if tool := prepared.get("brain_extraction"):
        cited = _TOOLS.get(tool["command"], "")
        yield f"Brains were extracted with {tool['command']} {cited}(version {tool['version']}).".replace("](", "] (")
    elif prepared["masked"]:
        yield "Scans were masked with brain masks that were there."
    elif prepared["skull_stripped"]:
        yield "Scans were skull-stripped before."
    if tool := prepared.get("bias_correction"):
        yield f"Bias fields were corrected with N4 [@tustison2010] in SimpleITK {tool['simpleitk']} [@lowekamp2013]."
    if kind := prepared["registration"]:
        template = "the MNI152 template [@fonov2011]" if kind["to"] == "mni152" else kind["to"]
        itk = prepared.get("registered_with", {}).get("SimpleITK", "")
        yield f"Scans were registered to {template} ({kind['kind']}, correlation) with SimpleITK {itk} [@lowekamp2013]."
    grid, (low, high) = prepared["grid"], prepared["percentiles"]
    place = "in world space" if grid["place"] == "world" else "centred on the foreground"
    yield (
        f"Scans were reoriented to RAS+ and resampled once (trilinear, with smoothing where the grid is coarser) to "
        f"{' x '.join(map(str, grid['shape']))} voxels of {' x '.join(f'{mm:g}' for mm in grid['spacing_mm'])} mm {place}. "
        f"Intensities between the {low:g}th percentile of the grid and the {high:g}th of the foreground were scaled to 0 to 1."
    )


def _autoencoder(account: Mapping[str, Any]) -> str:
    stage, latents = account["stages"]["autoencoder"], account["latents"]
    if account["started_with"]["autoencoder"]:
        return (
            f"The autoencoder [@kingma2014], which maps {latents['downsampling']}^3 voxels to {latents['channels']} latent "
            "channels, was that of another model and was not trained further."
        )
    losses = [f"{name.upper()} ({stage[name]:g})" for name in ("l1", "l2") if stage[name]]
    losses += [f"{name} loss" for name in ("perceptual", "adversarial") if stage.get(name)]
    decoder = " Its decoder was then trained further." if account["sharpened"] else ""
    return (
        f"A variational autoencoder [@kingma2014] maps {latents['downsampling']}^3 voxels to {latents['channels']} latent "
        f"channels. It was trained for {_training(stage)}, with {', '.join(losses)} and a Kullback-Leibler term "
        f"({stage['kl']:g}).{decoder}"
    )


def _diffusion(stage: Mapping[str, Any]) -> str:
    times = ", at logit-normal times [@esser2024]" if stage["times"] == "logit-normal" and stage["process"] != "vdm" else ""
    weight = ", with min-SNR weights [@hang2023]" if stage["loss_weight"] == "min-snr" else ""
    start = ""
    if stage.get("start"):
        start = " At high noise a Gaussian that was fitted to the training latents and covariates denoises in its place."
    return (
        f"A U-Net with cross-attention to the covariates was trained to predict {_TARGETS[stage['target']]} under "
        f"{_PROCESSES[stage['process']]}{times}{weight}, for {_training(stage)}. Covariates were left open in "
        f"{stage['drop_covariates']:.0%} of the samples, each or all, for missing values and classifier-free guidance "
        f"[@ho2022].{start}"
    )


def _training(stage: Mapping[str, Any]) -> str:
    kept = "averages of the weights" if stage["keep"] == "last" else "the averages with the lowest validation loss"
    return (
        f"{stage['steps']:,} steps of {stage['batch_size']} with {_OPTIMIZERS[stage['optimizer']]} at a rate of "
        f"{stage['learning_rate']:g} ({stage['schedule']} schedule; {kept} were kept, decay {stage['ema']:g})"
    )


def _sampling(sampling: Sampling) -> str:
    guidance = (
        "without guidance" if sampling.guidance == 1 else f"with classifier-free guidance {sampling.guidance:g} [@ho2022]"
    )
    return f"Volumes are sampled with {_SAMPLERS[sampling.sampler]} in {sampling.steps} steps, {guidance}."


def _evaluated(metrics: Mapping[str, Any]) -> str:
    """What an evaluation found, with 95% intervals."""
    quality = metrics["reconstruction"]
    psnr = quality["psnr_foreground_db"]
    generated = _count(len(metrics["held_out"]["generated_for"]), "generated volume")
    decibels = _interval(psnr["mean"], psnr["low"], psnr["high"], ".1f")
    sentences = [
        f"The model was evaluated on {_count(quality['volumes'], 'held-out volume')} and {generated} for the same covariates; "
        f"intervals are of 95%. Reconstructions had a PSNR of {decibels} dB in the foreground."
    ]
    for each in metrics["fidelity"]:
        if each["kind"] == "generated":
            r = _interval(each["r"], each["r_low"], each["r_high"], ".3f")
            slope = _interval(each["slope"], each.get("slope_low"), each.get("slope_high"), ".2f")
            sentences.append(
                f"Requested and measured {in_words(each['covariate'])} correlated by r = {r}, with a slope of {slope}."
            )
    if likeness := metrics["likeness"]:
        found = [
            f"{each.get('title', each['name'])} {_interval(each['value'], each['low'], each['high'], '.3g')}"
            for each in likeness
        ]
        sentences.append(f"Realism, by two one-sided tests against real volumes [@schuirmann1987]: {'; '.join(found)}.")
    return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """A figure with its interval, where it has one; n/a where it could not be measured, which JSON has as null."""
    figures = [None if each is None or each != each else format(each, form) for each in (value, low, high)]
    return (figures[0] or "n/a") + (f" ({figures[1]} to {figures[2]})" if figures[1] and figures[2] else "")
