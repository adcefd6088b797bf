"""A model folder for others: weights in half precision, a segmenter beside them if there is one, and a model card."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ldm3d import hub
from ldm3d.account import read_account, write_account
from ldm3d.card import card
from ldm3d.description import DESCRIPTION, ROUNDED_FROM
from ldm3d.errors import InputError, choose
from ldm3d.files import write_atomic
from ldm3d.methods import methods_text, write_methods
from ldm3d.models.pretrained import read_json
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.pipeline import Pipeline
from ldm3d.shipped import SEGMENTER, model_folder, segmenter_folder

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
CARD = "README.md"
METRICS = "metrics.json"  # of an evaluation


def export(
    model: Path | str,
    out: Path | str,
    precision: str = "float16",
    about: Path | str | None = None,
    segmenter: Path | str | None = None,
    licence: str = "apache-2.0",
    called: str | None = None,
    evaluation: Path | str | None = None,
) -> int:
    """Write a copy of a model that can be given away; returns its size in bytes.

    Args:
        model: pipeline folder, or the name of a shipped model.
        out: folder to write, whose name becomes the model's; must be empty or absent.
        precision: of the weights in the files, see `PRECISIONS`.
        about: Markdown text for the card, after what is known of data, training and figures: whose data, approval, limits.
        segmenter: folder of one that measures the model's volumes; None for the one beside the model's networks, if any.
        licence: of the weights, an identifier of Hugging Face's list.
        called: what the card calls the model; None for the name of `out`.
        evaluation: folder that `ldm3d evaluate` wrote about this model; its figures go into the card and the methods.

    Raises:
        InputError: no such model, segmenter, text or evaluation, one of another model, `out` is not empty, or weights beyond
            the range of the precision.
    """
    model, out = model_folder(model), Path(out)
    kind = PRECISIONS[choose("precision", precision, PRECISIONS)]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder")
    if about is not None and not Path(about).is_file():
        raise InputError(f"no file {about}; give a Markdown text about data, training, figures and limits")
    text = Path(about).read_text(encoding="utf-8").strip() if about is not None else ""
    pipeline = Pipeline.from_pretrained(model, "cpu", torch.float32)
    account, metrics = (
        read_account(model),
        _metrics(evaluation, model, pipeline.model_hash) if evaluation is not None else None,
    )
    beside = segmenter_folder(segmenter or model)
    measured = None
    if segmenter is not None or beside.is_dir():
        measured = SegmentationUNet.from_pretrained(beside, "cpu", torch.float32)

    pipeline.save_pretrained(out, kind, read_json(model / DESCRIPTION).get(ROUNDED_FROM))
    if measured is not None:
        measured.save_pretrained(out / SEGMENTER, kind)
    exported = Pipeline.from_pretrained(out, "cpu", torch.float32)
    structures = list(measured.groups) if measured is not None else []
    if account:
        write_account(account, out)
    write_methods(out, methods_text(account, exported.sampling, metrics), account)
    name = called or out.resolve().name
    known = card(
        name, exported, precision, account=account, metrics=metrics, about=text, structures=structures, licence=licence
    )
    write_atomic(out / CARD, known)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def push(
    model: Path | str,
    name: str,
    precision: str = "float16",
    about: Path | str | None = None,
    licence: str = "apache-2.0",
    private: bool = False,
) -> str:
    """Push a model to a hub, see `ldm3d.hub`; returns the address of the commit.

    Args:
        model: pipeline folder, or the name of a shipped model. One with a card (README.md), which `export` wrote, is pushed as
            it is, unless `about` is given; of others a copy is exported first.
        name: "user/name".
        precision, about, licence: see `export`.
        private: whether a new model is for its owner alone.

    Raises:
        InputError: as `export`, or the hub does not take it.
    """
    folder = model_folder(model)
    with tempfile.TemporaryDirectory() as temporary:
        if about is not None or not (folder / CARD).is_file():
            copy = Path(temporary) / name.rpartition("/")[2]
            export(folder, copy, precision, about, licence=licence, called=name)
            folder = copy
        return hub.push(folder, name, private)


def _metrics(folder: Path | str, model: Path, model_hash: str) -> dict[str, Any]:
    """The figures of an evaluation of this model."""
    path = Path(folder) / METRICS
    if not path.is_file():
        raise InputError(f"no {path}; give the folder that `ldm3d evaluate --out FOLDER` wrote")
    values = read_json(path)
    known = (model_hash, read_json(model / DESCRIPTION).get(ROUNDED_FROM))
    if (found := values.get("provenance", {}).get("model")) not in known:
        raise InputError(f"{path} is of model {found}, and this is {model_hash}; give the evaluation of this model")
    return values
