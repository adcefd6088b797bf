"""Optimisers and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ldm3d.config.sections import TrainingConfig
from ldm3d.training.sharding import gather, shard_like


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
        taken = 1.0 if skip is None else 1.0 - skip
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [p.grad if skip is None else torch.where(skip > 0, 0.0, p.grad) for p in moved]  # 0 * NaN is NaN
            updates = self._orthogonal_updates if group["orthogonal"] else self._adam_updates
            for parameter, update in zip(moved, updates(moved, gradients, taken, group)):
                parameter.add_(update * taken, alpha=-group["lr"])
        return loss

    def _orthogonal_updates(self, parameters: list[Tensor], gradients: list[Tensor], taken, group: dict) -> list[Tensor]:
        """Matrices of one shape are orthogonalised together."""
        together: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].add_(taken * (1 - group["momentum"]) * (gradient - state["momentum"]))
            matrix = gather(gradient.lerp(state["momentum"], group["momentum"])).flatten(1)
            together.setdefault(matrix.shape, {})[i] = matrix
        updates = {}
        for shape, matrices in together.items():
            size = 0.2 * math.sqrt(max(shape))
            orthogonal = size * orthogonalise(torch.stack(list(matrices.values())))  # (matrices, rows, columns)
            updates |= dict(zip(matrices, orthogonal))
        decay = group["weight_decay"]
        return [shard_like(updates[i].view(p.shape), p) + decay * p for i, p in enumerate(parameters)]

    def _adam_updates(self, parameters: list[Tensor], gradients: list[Tensor], taken, group: dict) -> list[Tensor]:
        """Kingma & Ba 2015, algorithm 1."""
        return [self._adam_update(p, gradient, taken, group) for p, gradient in zip(parameters, gradients)]

    def _adam_update(self, parameter: Tensor, gradient: Tensor, taken, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += taken
        state["mean"].add_(taken * (1 - beta1) * (gradient - state["mean"]))
        state["square"].add_(taken * (1 - beta2) * (gradient.square() - state["square"]))
        # 1 - beta^step without the cancellation of float32; a run's first step may be one that is skipped: not 0 / 0
        correction1, correction2 = (-torch.expm1(state["step"].clamp_min(1) * math.log(beta)) for beta in (beta1, beta2))
        return state["mean"] / correction1 / ((state["square"] / correction2).sqrt() + group["eps"])


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
