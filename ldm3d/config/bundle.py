"""The inference.json of a MONAI bundle as settings of our networks and process."""

import json
from pathlib import Path
from typing import Any

from ldm3d.errors import InputError

# Keys of a network's definition in a bundle and ours; keys that may be ignored; keys with the one value that can be imported
COMMON_KEYS = {
    "channels": "channels",
    "num_channels": "channels",
    "num_res_blocks": "blocks",
    "attention_levels": "attention",
    "norm_num_groups": "norm_num_groups",
    "norm_eps": "norm_eps",
}
AUTOENCODER_KEYS = COMMON_KEYS | {"latent_channels": "latent_channels", "with_encoder_nonlocal_attn": "middle_attention"}
UNET_KEYS = COMMON_KEYS | {
    "num_head_channels": "head_channels",
    "resblock_updown": "resblock_updown",
    "transformer_num_layers": "transformer_layers",
    "upcast_attention": "upcast_attention",
}
OTHER_KEYS = ("_target_", "include_fc", "use_flash_attention", "use_checkpoint", "use_checkpointing")
UNET_SHOWN = (*OTHER_KEYS, "in_channels", "out_channels", "with_conditioning", "cross_attention_dim")
DEMANDED = {"spatial_dims": 3, "use_combined_linear": False}
AUTOENCODER_DEMANDED = DEMANDED | {"in_channels": 1, "out_channels": 1, "use_convtranspose": False}
UNET_DEMANDED = DEMANDED | {"num_class_embeds": None, "dropout_cattn": 0.0}
# Defaults of MONAI's schedulers; and the behaviour of our samplers, which clip nothing and end at the data itself
SCHEDULER_DEFAULTS = {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0}
SCHEDULER_DEMANDED = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
SCHEDULES = {"scaled_linear": "vp-scaled-linear", "linear": "vp-linear"}


def read_bundle(path: Path) -> dict[str, dict[str, Any]]:
    """The settings `autoencoder`, `unet` and `process` that a MONAI bundle's inference.json defines."""
    try:
        bundle = json.loads(path.read_text())
        autoencoder, unet = dict(bundle["autoencoder_def"]), dict(bundle["diffusion_def"])
        scheduler = dict(bundle["scheduler"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no such bundle's: autoencoder_def, diffusion_def and scheduler are read; {error!r}"
        ) from None
    # Defaults of MONAI that differ from ours
    autoencoder = {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True, **autoencoder}
    unet = {"num_head_channels": 8, **unet}
    demanded = AUTOENCODER_DEMANDED | {"with_decoder_nonlocal_attn": autoencoder["with_encoder_nonlocal_attn"]}
    found = {
        "autoencoder": _translate(autoencoder, AUTOENCODER_KEYS, OTHER_KEYS, demanded, f"{path}: autoencoder_def"),
        "unet": _translate(unet, UNET_KEYS, UNET_SHOWN, UNET_DEMANDED, f"{path}: diffusion_def"),
    }
    found["unet"]["concatenate"] = unet.get("in_channels") != unet.get("out_channels")
    steps, target = scheduler.get("num_train_timesteps", 1000), scheduler.get("prediction_type", "epsilon")
    name = str(scheduler.get("schedule", scheduler.get("beta_schedule"))).removesuffix("_beta")
    if name not in SCHEDULES or (steps, target) != (1000, "epsilon"):
        raise InputError(f"{path}: scheduler must be linear or scaled linear, of 1000 steps, for epsilon; got {scheduler}")
    for key, wanted in SCHEDULER_DEMANDED.items():
        if (value := scheduler.get(key, SCHEDULER_DEFAULTS[key])) != wanted:
            source = "" if key in scheduler else " by default"
            raise InputError(f"{path}: scheduler.{key} is {value!r}{source}; only {wanted!r} can be imported")
    betas = {key: scheduler[key] for key in ("beta_start", "beta_end") if key in scheduler}
    found["process"] = {"kind": SCHEDULES[name], **betas}
    return found


def _translate(definition: dict, names: dict[str, str], shown: tuple[str, ...], demanded: dict, where: str) -> dict[str, Any]:
    values = {}
    for key, value in definition.items():
        if key in names:
            values[names[key]] = value
        elif key in demanded and value != demanded[key]:
            raise InputError(f"{where}.{key} is {value!r}; only {demanded[key]!r} can be imported")
        elif key not in demanded and key not in shown:
            raise InputError(f"{where}.{key} is not known; what it does to the network cannot be imported")
    blocks = values.get("blocks")
    if isinstance(blocks, list) and len(set(blocks)) == 1:
        values["blocks"] = blocks[0]
    return values
