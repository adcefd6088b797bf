"""What goes with volumes of several channels: label maps, and several contrasts (`data.channels`)."""

from collections.abc import Sequence
from typing import Any

from ldm3d.config.conditions import LabelsCondition


def check_label_maps(labels: LabelsCondition | None, coder: Any) -> None:
    """Raise ValueError unless an autoencoder (its section) can be of the label maps that are made; None: there are none."""
    if labels and (coder.network.kind != "ldm3d" or coder.perceptual or coder.adversarial):
        raise ValueError(
            "diffusion.makes: an autoencoder of label maps is ldm3d's own, without perceptual and adversarial losses"
        )


def check_channels(channels: Sequence[str], config: Any) -> None:
    """Raise ValueError where sections of a config do not go with several contrasts; none: there is one."""
    coder, diffusion = config.autoencoder, config.diffusion
    beside = [each for each in diffusion.conditions if not isinstance(each, LabelsCondition) or each.name in channels]
    whole = [each for each in (coder, config.decoder) if each and (each.perceptual or each.adversarial)]
    conflicts = {
        f"autoencoder.network.kind {coder.network.kind}: use ldm3d": coder.network.kind != "ldm3d",
        f"diffusion.process.kind {diffusion.process.kind}: use another": diffusion.process.kind == "vdm",
        f"diffusion.makes {diffusion.makes}: leave it out": diffusion.makes is not None,
        "diffusion.conditions: keep label maps alone, by other names": beside,
        "perceptual and adversarial losses: leave them out": whole,
    }
    if channels and (found := [conflict for conflict, there in conflicts.items() if there]):
        raise ValueError(f"data.channels does not go with {'; nor with '.join(found)}")
