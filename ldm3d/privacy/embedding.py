"""An embedding in which volumes of one person are near to each other: a small network, trained on the training volumes.

It is trained by contrastive learning (SimCLR, Chen et al. 2020) to recognise two augmented volumes of one person among those
of others. Volumes are mirrored, moved, noisier, and in another contrast, so copies that differ in these ways are found.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm3d.errors import InputError
from ldm3d.randomness import generator

EMBEDDING_SIZE, WIDTH = 64, 16
TEMPERATURE = 0.1
MAX_NOISE, MAX_SHIFT, MAX_CONTRAST = 0.3, 1.0, 0.25  # deviations; coarse voxels; exponents from 1 / 1.25 to 1.25


class Embedding(nn.Module):
    """Coarse volumes to 64 features of length 1.

    Args:
        shape: (C, a, b, c) of the coarse volumes.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape, layers, (inputs, *sides) = tuple(shape), [], shape
        for level in range(3):
            width = WIDTH * 2**level
            layers += [nn.Conv3d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            sides, inputs = [-(-n // 2) for n in sides], width
        # Positions are not averaged, as they distinguish people
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * sides[0] * sides[1] * sides[2], EMBEDDING_SIZE))

    def forward(self, coarse: Tensor) -> Tensor:
        """(N, C, a, b, c), mean 0 and deviation 1 each -> (N, 64)."""
        return F.normalize(self.layers(coarse), dim=1)


def train_embedding(
    coarse: Tensor, subjects: Tensor, steps: int = 300, batch_size: int = 64, seed: int = 0, device: torch.device | str = "cpu"
) -> Embedding:
    """Train an embedding on coarse volumes of known subjects.

    Args:
        coarse: (N, C, a, b, c), mean 0 and deviation 1 each.
        subjects: number of the subject of each, (N,), from 0. A pair is two augmented scans of a subject, different scans
            if there are several.
        steps: of training, each with `batch_size` subjects, or all if they are fewer.
        seed: of all random numbers; it gives the same network on one machine.
        device: where to compute.

    Returns:
        On the CPU, in evaluation mode.

    Raises:
        InputError: fewer than two subjects.
    """
    count = int(subjects.max()) + 1
    if count < 2:
        raise InputError(f"{count} training subject: an embedding needs two or more to distinguish")
    scans = [(subjects == subject).nonzero().flatten() for subject in range(count)]
    with torch.random.fork_rng(devices=[]):  # new networks draw from the global generator
        torch.manual_seed(seed)
        network = Embedding(coarse.shape[1:]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="train the embedding", unit="step"):
        rng = generator("embedding", seed, step)
        chosen = torch.randperm(count, generator=rng)[:batch_size].tolist()
        pair = torch.stack([_two(scans[subject], rng) for subject in chosen], dim=1)  # (2, subjects)
        views = [network(augment(coarse[rows], rng).to(device)) for rows in pair]
        optimizer.zero_grad()
        contrastive_loss(*views).backward()
        optimizer.step()
        schedule.step()
    return network.cpu().eval().requires_grad_(False)


def _two(scans: Tensor, rng: torch.Generator) -> Tensor:
    """Two random scans of a subject, different ones if there are several."""
    order = torch.randperm(len(scans), generator=rng)
    return scans[order[[0, -1]]]


def contrastive_loss(one: Tensor, other: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): cross-entropy of recognising each one's partner among all 2 N - 1 others.

    Args:
        one, other: (N, D) of length 1; row i of both belongs together.
    """
    features = torch.cat([one, other])  # (2 N, D)
    logits = (features @ features.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * len(one), device=one.device).roll(len(one))
    return F.cross_entropy(logits, partner)


def augment(coarse: Tensor, rng: torch.Generator) -> Tensor:
    """Coarse volumes (N, C, a, b, c) mirrored or not, moved, in another contrast and noisier; mean 0 and deviation 1 again."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=rng) - 1  # from -1 to 1

    count = len(coarse)
    mirrored = uniform(count, 1, 1, 1, 1) > 0
    coarse = torch.where(mirrored, coarse.flip(2), coarse)
    affine = torch.eye(3, 4).repeat(count, 1, 1)
    # grid_sample counts axes from the last and from -1 to 1
    affine[:, :, 3] = 2 * MAX_SHIFT * uniform(count, 3) / torch.tensor(coarse.shape[:1:-1])
    grid = F.affine_grid(affine, list(coarse.shape), align_corners=False)
    coarse = F.grid_sample(coarse, grid, padding_mode="border", align_corners=False)
    exponent = (1 + MAX_CONTRAST) ** uniform(count, 1, 1, 1, 1)
    coarse = coarse.sign() * (coarse.abs() + 1e-6) ** exponent
    coarse = coarse + MAX_NOISE * uniform(count, 1, 1, 1, 1).abs() * torch.randn(coarse.shape, generator=rng)
    deviation, mean = torch.std_mean(coarse, dim=(2, 3, 4), keepdim=True)
    return (coarse - mean) / deviation.clamp_min(1e-6)
