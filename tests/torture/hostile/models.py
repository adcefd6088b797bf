"""Hostile model folders: weights, JSON and pickles where tensors should be."""

import functools
import io
import json
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torture.generation import make_pipeline
from torture.hostile.case import INF, NAN, Case, changed, with_bytes_damaged
from torture.hostile.configs import VALUES


class _Runs:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@functools.cache
def model() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        make_pipeline().save_pretrained(Path(name) / "model")
        return {str(path.relative_to(name)): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}


HOSTILE = (
    *VALUES,
    64,
    2**31,
    2**63,
    [10**9] * 2,
    [4] * 10**4,
    [[0, 10**6]] * 3,
    "UNet",
    "ddpm",
    "monai",
    "vp-linear",
    [0, -1],
    {},
)


def _damage_weights(content: bytes, what: str, i: int) -> bytes:
    tensors = load(content)
    name = sorted(tensors)[i % len(tensors)]
    tensor = tensors[name].copy()
    if what == "missing":
        del tensors[name]
    elif what == "none":
        tensors = {}
    elif what == "extra":
        tensors["x" * 300] = tensor
    elif what == "shape":
        tensors[name] = tensor[None]
    elif what in ("nan", "inf", "huge"):
        tensor.flat[i % tensor.size] = {"nan": NAN, "inf": -INF, "huge": 3e38}[what]
        tensors[name] = tensor
    elif what == "all huge":
        tensors = {key: np.full_like(value, 3e38) for key, value in tensors.items()}
    elif what == "integers":
        tensors[name] = tensor.astype(np.int32)
    elif what == "halves":
        tensors = {key: value.astype(np.float16) for key, value in tensors.items()}
    elif what == "pickle":
        return pickle.dumps(_Runs())
    elif what == "checkpoint":
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(tensor)}, buffer)
        return buffer.getvalue()
    elif what == "long header":
        return (2**40).to_bytes(8, "little") + content[8:]
    return save(tensors)


WEIGHTS = (
    "missing",
    "none",
    "extra",
    "shape",
    "nan",
    "inf",
    "huge",
    "all huge",
    "integers",
    "halves",
    "pickle",
    "checkpoint",
    "long header",
)
JSONS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"[" * 10**5,
    b'{"a": ' * 10**4,
    b'{"class": NaN}',
    b"\xff\xfe",
    b"1" * 5000,
    b'{"class": "UNet"}',
)


@st.composite
def models(draw) -> Case:
    files, mutations = dict(model()), []
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(files)))
        if name.endswith(".json"):
            if draw(st.integers(0, 5)) == 0:
                files[name], what = draw(st.sampled_from(JSONS)), "other JSON"
            else:
                try:
                    values, what = draw(changed(json.loads(files[name]), HOSTILE))
                except (ValueError, RecursionError):  # the other JSON of the turn before
                    continue
                files[name] = json.dumps(values).encode()
        else:
            what = draw(st.sampled_from(WEIGHTS))
            try:
                files[name] = _damage_weights(files[name], what, draw(st.integers(0, 10**4)))
            except (SafetensorError, ZeroDivisionError):  # damaged already; no tensor is left
                continue
        mutations.append(f"{name.removeprefix('model/')}: {what}")
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(sorted(files)))
        files[name if draw(st.booleans()) else "model/pytorch_model.bin"] = pickle.dumps(_Runs())
        mutations.append("pickle")
    elif draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(sorted(files)))
        del files[name]
        mutations.append(f"{name} gone")
    return draw(with_bytes_damaged(Case("model", tuple(mutations), files)))
