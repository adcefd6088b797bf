"""How far training is: the U-Net's denoising errors beside those of the best Gaussian denoiser, which needs no training.

A Gaussian is fitted to the training latents in closed form (`ldm3d.diffusion.gaussian`). Where the network's error is larger,
it has not learned what means and covariances tell. Where it is smaller, it knows what no Gaussian can.
"""

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.gaussian import Gaussian, denoising_errors
from ldm3d.diffusion.gaussian_fit import fit_gaussian, most_components
from ldm3d.diffusion.process import Process, time_of_ratio
from ldm3d.randomness import generator

LEVELS = (0.05, 0.2, 0.5, 1.0, 3.0)  # sigma / alpha
COMPONENTS, FOLDS = 96, 5
FEWEST, MOST = 20, 1000  # latents that a Gaussian is fitted to
MAX_VALUES = 50_000_000  # numbers in them
HELD_OUT = 16  # latents that errors are measured on


class GaussianRuler:
    """The Gaussian of the training latents, and its errors on held-out ones.

    Args:
        training: normalised latents, (N, c, x, y, z).
        held_out: (M, c, x, y, z), of other subjects.
        process: of the diffusion.
    """

    def __init__(self, training: Tensor, held_out: Tensor, process: Process):
        self.held_out, self.process = held_out.float().cpu(), process
        self.noise = torch.stack([torch.randn(x.shape, generator=generator("ruler", i)) for i, x in enumerate(self.held_out)])
        self.times = [time_of_ratio(process, level) for level in LEVELS]
        self.variance = training.float().var(dim=(0, 2, 3, 4))
        components = min(COMPONENTS, most_components(len(training), FOLDS))
        self.gaussian: Gaussian = fit_gaussian(training, components, FOLDS)
        self.best = self._errors(self.gaussian.denoiser(process))

    def compare(self, denoise: Denoiser) -> dict[str, float]:
        """Errors relative to the variance of each channel, averaged over channels, at each of `LEVELS`.

        Args:
            denoise: (z, t) -> x of the held-out latents, on the device of its network.

        Returns:
            denoising_error_LEVEL of `denoise` and gaussian_error_LEVEL of the Gaussian; 0 is perfect, 1 knows the mean alone.
        """
        own = self._errors(denoise)
        both = {"denoising": own, "gaussian": self.best}
        return {f"{name}_error_{level:g}": value for name, values in both.items() for level, value in zip(LEVELS, values)}

    def _errors(self, denoise: Denoiser) -> list[float]:
        errors = denoising_errors(denoise, self.held_out, self.noise, self.times, self.process)  # (levels, c)
        return (errors / self.variance).mean(dim=1).tolist()


def few_enough(count: int, values: int) -> int:
    """How many of `count` latents of `values` numbers each a Gaussian is fitted to; 0 if they are too few."""
    most = min(count, MOST, MAX_VALUES // values)
    return most if most >= FEWEST else 0


def in_pairs(errors: dict[str, float]) -> dict[str, tuple[float, float]]:
    """sigma / alpha -> (error of the network, of the Gaussian), from `GaussianRuler.compare`; {} from none."""
    names = [(f"{level:g}", f"denoising_error_{level:g}", f"gaussian_error_{level:g}") for level in LEVELS]
    return {level: (errors[own], errors[best]) for level, own, best in names} if errors else {}


def in_words(errors: dict[str, float]) -> str:
    """One line for the terminal."""
    listed = ", ".join(f"{own:.3f} ({best:.3f}) at {level}" for level, (own, best) in in_pairs(errors).items())
    return f"denoising error of the network (of the best Gaussian), by sigma / alpha: {listed}"
