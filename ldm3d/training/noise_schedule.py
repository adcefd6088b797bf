"""The noise schedule that a variational diffusion model learns beside its network (Kingma et al. 2021)."""

from accelerate import Accelerator
from torch import Tensor
from torch.optim import Adam

from ldm3d.diffusion.vdm import VDMSchedule

LEARNING_RATE = 0.01


def schedule_optimizer(schedule: VDMSchedule, rate: float | None) -> Adam:
    """Of its 64 numbers; None takes `LEARNING_RATE`."""
    return Adam(schedule.parameters(), LEARNING_RATE if rate is None else rate, fused=True)


def learn(schedule: VDMSchedule, optimizer: Adam, loss: Tensor, accelerator: Accelerator) -> None:
    """One step of a schedule towards less variance of the batch's loss, alike on every process; none if it is not finite.

    The gradient of a squared loss is a product of the loss and its gradient. Both have to be of the full batch, so they are
    averaged over accumulated parts and processes before they are multiplied: a part has only its own stretch of the
    low-discrepancy times, and the square of its loss would mostly tell where that stretch lies.

    Args:
        loss: mean over this process's parts of the batch, whose gradient is in `schedule.logits.grad`.
    """
    schedule.logits.grad = accelerator.reduce(schedule.logits.grad, "mean")
    schedule.learn_variance(accelerator.reduce(loss, "mean"))
    optimizer.found_inf = (~schedule.logits.grad.isfinite().all()).float()  # where it is 1, a fused optimiser does nothing
    optimizer.step()
    optimizer.zero_grad()
