"""Can a network tell two sets of volumes apart? The classifier two-sample test (Lopez-Paz & Oquab 2017)."""

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm3d.errors import InputError
from ldm3d.randomness import generator

WIDTHS = (16, 32, 64)
FOLDS, STEPS, BATCH, LEARNING_RATE = 5, 200, 16, 2e-3
DETAIL = 10.0  # what fine detail is multiplied by, to be of the size of the intensities
FEWEST = 10  # volumes of each set, two a fold


class Classifier(nn.Module):
    """Volumes (N, C, X, Y, Z) -> logits (N,): strided convolutions, averaged over positions.

    It is given the volume and, enlarged, its fine detail (each voxel less the mean of the 3 x 3 x 3 around it), which is
    small beside anatomy and would be found late.
    """

    def __init__(self, channels: int = 1):
        super().__init__()
        layers: list[nn.Module] = []
        width = 2 * channels
        for wider in WIDTHS:
            layers += [nn.Conv3d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, 1), nn.Flatten(0))

    def forward(self, volumes: Tensor) -> Tensor:
        smooth = F.avg_pool3d(F.pad(volumes, (1,) * 6, mode="replicate"), 3, stride=1)
        return self.layers(torch.cat([volumes, DETAIL * (volumes - smooth)], dim=1))


def classifier_auc(
    one: Tensor, other: Tensor, folds: int = FOLDS, steps: int = STEPS, seed: int = 0, device: torch.device | str = "cpu"
) -> float:
    """Area under the ROC curve of a classifier, for volumes that it was not trained on.

    Args:
        one, other: (N, C, X, Y, Z) and (M, C, X, Y, Z) in [0, 1]; different people in each, or one volume a person.
        folds: of the cross-validation; volume n of each set is in fold n mod folds.
        steps: of training in each fold.
        seed: of weights, order and flips.
        device: where to train.

    Returns:
        0.5 where the sets cannot be told apart, 1 where they always can. Below 0.5 is chance: scores of all folds are pooled.

    Raises:
        InputError: fewer than `FEWEST` volumes in a set.
    """
    if min(len(one), len(other)) < FEWEST:
        raise InputError(f"a classifier needs {FEWEST} volumes of each kind or more; there are {len(one)} and {len(other)}")
    volumes = torch.cat([one, other])
    labels = torch.cat([torch.zeros(len(one)), torch.ones(len(other))])
    fold = torch.cat([torch.arange(len(one)), torch.arange(len(other))]) % folds
    scores = torch.empty(len(volumes))
    for f in tqdm(range(folds), desc="classifier", unit="fold", leave=False):
        network = _train(volumes[fold != f], labels[fold != f], steps, (seed, f), device)
        with torch.inference_mode():
            parts = volumes[fold == f].split(BATCH)
            scores[fold == f] = torch.cat([network(part.float().to(device)).float().cpu() for part in parts])
    u = mannwhitneyu(scores[labels == 1].numpy(), scores[labels == 0].numpy()).statistic
    return float(u) / (len(one) * len(other))


def _train(volumes: Tensor, labels: Tensor, steps: int, position: tuple[int, int], device: torch.device | str) -> Classifier:
    """Half of each batch from either set, mirrored left to right at random."""
    random = generator("classifier", *position)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
        network = Classifier(volumes.shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    sets = [(labels == label).nonzero().flatten() for label in (0, 1)]
    for _ in range(steps):
        chosen = torch.cat([rows[torch.randint(len(rows), (BATCH // 2,), generator=random)] for rows in sets])
        batch, mirrored = volumes[chosen].float().to(device), torch.rand(len(chosen), generator=random) < 0.5
        batch = torch.where(mirrored.to(device).view(-1, 1, 1, 1, 1), batch.flip(2), batch)
        loss = F.binary_cross_entropy_with_logits(network(batch), labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
