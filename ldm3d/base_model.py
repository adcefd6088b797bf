"""What an experiment takes of a trained model: its autoencoder, and the U-Net that training starts with.

A U-Net goes on with the latents that it was trained on, so `diffusion.init_from` brings the model's autoencoder with it;
`autoencoder.shared` takes the autoencoder alone.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.description import DESCRIPTION, START, read_description
from ldm3d.errors import InputError
from ldm3d.models.pretrained import CONFIG, read_json, weights_hash
from ldm3d.models.unet import LatentUNet, UNet
from ldm3d.shipped import model_folder
from ldm3d.start import GaussianStart


def take_autoencoder(config: Config) -> bool:
    """Copy the base model's autoencoder to OUTPUT/autoencoder, unless it is there; False where the config has no base model.

    Raises:
        InputError: no such model, a config that describes another autoencoder, or another one in OUTPUT.
    """
    if config.base_model is None:
        return False
    source, own = model_folder(config.base_model) / "autoencoder", config.autoencoder_folder
    suffixes = read_description(source.parent / DESCRIPTION)["suffixes"]
    if suffixes != config.data.channels:
        made, asked = (" and ".join(names) or "one contrast" for names in (suffixes, config.data.channels))
        raise InputError(
            f"{config.base_model} makes volumes of {made}, and data.channels asks for {asked}; write the same contrasts, or "
            "train an autoencoder of these (without autoencoder.shared and diffusion.init_from)"
        )
    _check_network(config.autoencoder.network.model_dump(mode="json", exclude={"kind"}), source, "autoencoder.network")
    if not own.is_dir():
        own.parent.mkdir(parents=True, exist_ok=True)
        draft = own.with_name(f"{own.name}.unfinished")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        draft.rename(own)
    elif weights_hash(own) != weights_hash(source):
        raise InputError(
            f"{own} is not the autoencoder of {config.base_model}; delete it (and {config.latents_folder}), or name another "
            "`output`"
        )
    return True


def first_unet(config: Config, image_channels: int) -> tuple[UNet, CovariateSchema, dict[str, Any]]:
    """The U-Net of `diffusion.init_from`, grown to what the config asks for; what its model was fitted to.

    It may get more blocks, and inputs for images: they change none of its answers before they are trained.

    Returns:
        (U-Net, covariates with the model's normalisation, the model's description as `read_description` has it).

    Raises:
        InputError: no such model; covariates that it has not, another target or process, or a network that cannot grow to the
            config's.
    """
    folder = model_folder(str(config.diffusion.init_from))
    parts = read_description(folder / DESCRIPTION)
    _check_covariates(config.schema(), parts["schema"], folder)
    network = config.diffusion.network
    _check_network(network.model_dump(mode="json", exclude={"kind", "blocks"}), folder / "unet", "diffusion.network")
    if (parts["target"], parts["process"].kind) != (config.diffusion.target, config.diffusion.process.kind):
        raise InputError(
            f"diffusion.init_from {folder}: it predicts {parts['target']} of process {parts['process'].kind}; the config says "
            f"target {config.diffusion.target} and process {config.diffusion.process.kind}, which have to be the same"
        )
    unet = LatentUNet.from_pretrained(folder / "unet")
    if (unet.in_channels > unet.out_channels) != config.diffusion.learns_residual:
        raise InputError(
            f"diffusion.init_from {folder}: its network "
            + ("does not learn" if config.diffusion.learns_residual else "learns")
            + " what the Gaussian of the start leaves; set diffusion.start.residual to match, or start from another model"
        )
    if not isinstance(unet, UNet) or unet.image_channels not in (0, image_channels):
        raise InputError(
            f"diffusion.init_from {folder}: its network takes images of {unet.image_channels} channels; start from a model "
            f"without images, or with the {image_channels} channels of this config's conditions"
        )
    try:
        unet = unet.with_blocks(network.blocks)
    except InputError as error:
        raise InputError(f"diffusion.init_from {folder}: {error}") from None
    unet = unet if unet.image_channels == image_channels else unet.with_images(image_channels)
    return unet.train().requires_grad_(True), parts["schema"], parts


def first_start(config: Config) -> GaussianStart:
    """The Gaussian of `diffusion.init_from`, with the `until` of the config."""
    assert config.diffusion.start is not None
    start = GaussianStart.from_pretrained(model_folder(str(config.diffusion.init_from)) / START)
    start.until = start.arguments["until"] = config.diffusion.start.until
    return start


def first_schema(of_model: CovariateSchema, fitted: CovariateSchema, rows: Sequence[Mapping[str, Any]]) -> CovariateSchema:
    """A model's covariates, normalised as it was trained, for those of this training, which were fitted to its `rows`.

    Of those that this training has, the ranges are what it sees. What follows from others does so as its config says; as in
    the model where the config says nothing.
    """
    new = {covariate.name: covariate for covariate in fitted}
    told = [
        replace(old, seen=new[old.name].seen, follows=new[old.name].follows or old.follows) if old.name in new else old
        for old in of_model
    ]
    return CovariateSchema(tuple(told)).following_in(rows, [c.name for c in fitted if c.follows])


def _check_network(wanted: dict[str, Any], folder: Path, section: str) -> None:
    """Raise InputError unless a network's folder has the arguments that the config asks for."""
    found = read_json(folder / CONFIG).get("arguments")
    found = found if isinstance(found, dict) else {}
    other = {name: value for name, value in wanted.items() if found.get(name, value) != value}
    free = {"activation_checkpointing", "attention_backend"}  # which change no answer
    if changed := [f"{name} {found[name]}" for name in other if name not in free]:
        raise InputError(f"{section} is not that of {folder}, whose network has {', '.join(changed)}; write the same")


def _check_covariates(wanted: CovariateSchema, given: CovariateSchema, folder: Path) -> None:
    """Raise InputError unless each of the config's covariates is one of the model's, and it has one if the model has any."""
    described = [{(c.name, c.kind, c.unit, tuple(c.categories)) for c in schema} for schema in (wanted, given)]
    if not described[0] <= described[1] or len(wanted) < min(len(given), 1):
        raise InputError(
            f"diffusion.init_from {folder}: its covariates are {_listed(given)}; the config's are {_listed(wanted)}. Write "
            "those of them that your data have, with the same units and categories; the others are left open"
        )


def _listed(schema: CovariateSchema) -> str:
    words = (f"{c.name} ({c.unit or ', '.join(c.categories) or 'no unit'})" for c in schema)
    return ", ".join(words) or "none"
