"""Optimisers and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ldm3d.config.training import TrainingConfig
from ldm3d.training.sharding import from_local, gather, local_shard, shard_like


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al. 2024), with AdamW for all other parameters.

    A convolution's weight is a matrix of (out channels, in channels times kernel). The update is scaled by
    0.2 sqrt(max(rows, columns)) so that its size is AdamW's (Liu et al. 2025, "Muon is scalable", eq. 4): one learning rate
    then fits both. PyTorch's own Muon takes two-dimensional weights only.

    As in PyTorch's fused optimisers, a step changes nothing where the attribute `found_inf` (a scalar tensor) is 1; the host
    does not wait for it.

    Args:
        groups: of parameters; `orthogonal` in each says whether they are matrices.
        lr: learning rate.
        weight_decay: decoupled, for matrices only.
        momentum: of the matrices, with Nesterov's correction.
        betas, eps: AdamW's, for the others.
    """

    def __init__(self, groups, lr, weight_decay=0.0, momentum=0.95, betas=(0.9, 0.99), eps=1e-8):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        skip = getattr(self, "found_inf", None)
        taken, bad = (1.0, None) if skip is None else (1.0 - skip, skip > 0)
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            gradients = [local_shard(p.grad) for p in moved]
            if bad is not None:  # 0 * NaN is NaN
                gradients = [torch.where(bad, 0.0, gradient) for gradient in gradients]
            updates = (self._orthogonal_updates if group["orthogonal"] else self._adam_updates)(moved, gradients, taken, group)
            torch._foreach_mul_(updates, taken)
            torch._foreach_add_([local_shard(p) for p in moved], updates, alpha=-group["lr"])
        return loss

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """This process's shards of a state of each parameter, which begins at zero."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [local_shard(self.state[parameter][name]) for parameter in parameters]

    def _orthogonal_updates(self, parameters: list[Tensor], gradients: list[Tensor], taken, group: dict) -> list[Tensor]:
        """Matrices of one shape are orthogonalised together."""
        momenta = self._states(parameters, "momentum")
        follow(momenta, gradients, taken * (1 - group["momentum"]))
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        together: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for i, (parameter, local) in enumerate(zip(parameters, ahead)):
            matrix = gather(from_local(local, parameter)).flatten(1)
            together.setdefault(matrix.shape, {})[i] = matrix
        updates: dict[int, Tensor] = {}
        for shape, matrices in together.items():
            size = 0.2 * math.sqrt(max(shape))
            orthogonal = size * orthogonalise(torch.stack(list(matrices.values())))  # (matrices, rows, columns)
            updates |= dict(zip(matrices, orthogonal))
        found = [local_shard(shard_like(updates[i].view(p.shape), p)) for i, p in enumerate(parameters)]
        return torch._foreach_add(found, torch._foreach_mul([local_shard(p) for p in parameters], group["weight_decay"]))

    def _adam_updates(self, parameters: list[Tensor], gradients: list[Tensor], taken, group: dict) -> list[Tensor]:
        """Kingma & Ba 2015, algorithm 1; each operation on all parameters at once, as launching kernels takes most time."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        steps, (beta1, beta2) = [self.state[parameter]["step"] for parameter in parameters], group["betas"]
        means, squares = self._states(parameters, "mean"), self._states(parameters, "square")
        torch._foreach_add_(steps, [taken] * len(steps) if isinstance(taken, Tensor) else taken)
        follow(means, gradients, taken * (1 - beta1))
        follow(squares, torch._foreach_mul(gradients, gradients), taken * (1 - beta2))
        # A run's first step may be one that is skipped: not 0 / 0
        counted = torch._foreach_clamp_min(steps, 1)
        # 1 - beta^step without the cancellation of float32
        corrections = [
            torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(counted, math.log(beta)))) for beta in (beta1, beta2)
        ]
        deviations = torch._foreach_sqrt(torch._foreach_div(squares, corrections[1]))
        torch._foreach_add_(deviations, group["eps"])
        return torch._foreach_div(torch._foreach_div(means, corrections[0]), deviations)


def follow(averages: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """Move each average to its value, by a part of the way."""
    changes = torch._foreach_sub(values, averages)
    torch._foreach_mul_(changes, weight)
    torch._foreach_add_(averages, changes)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T and Jordan's coefficients. In float32, where theirs is
    in bfloat16, which would turn the rounding of another number of processes into a visibly different step.

    Args:
        matrix: (..., rows, columns); each matrix by itself.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


def make_optimizer(network: nn.Module, training: TrainingConfig) -> Optimizer:
    """The optimiser of the config over a network's parameters; norms, biases and tokens are not decayed.

    A module of the network may have a `learning_rate_factor`, by which its own parameters' rate is multiplied.
    """
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    factors = {id(p): getattr(m, "learning_rate_factor", 1.0) for m in network.modules() for p in m.parameters(recurse=False)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = (
            parameter.ndim >= 2
            and min(parameter.flatten(1).shape) > 1
            and not name.endswith("null")
            and id(parameter) not in embeddings
        )
        groups.setdefault((is_matrix, factors[id(parameter)]), []).append(parameter)
    settings = [{"params": ps, "orthogonal": is_matrix, "factor": factor} for (is_matrix, factor), ps in groups.items()]
    if training.optimizer == "muon":
        return Muon(settings, training.learning_rate, training.weight_decay)
    for group in settings:
        group["weight_decay"] = training.weight_decay if group["orthogonal"] else 0.0
    return AdamW(settings, training.learning_rate, (0.9, 0.99), fused=True)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group of `make_optimizer`'s its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a cosine to 1% at the end."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
