"""One hostile input, and what all of them start from: a valid scan, table and config; and mutations of any bytes or values."""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
OUTSIDE = "outside"  # the folder beside the input's own that nobody may read from

GRID = {"shape": [8, 8, 8], "spacing_mm": 3}
COVARIATES = [
    {"name": "age", "kind": "continuous", "unit": "years", "range": [0, 120]},
    {"name": "sex", "kind": "categorical", "categories": ["F", "M"]},
]
CONFIG = {
    "name": "fuzzing",
    "output": "run",
    "data": {"table": "scans.csv", "grid": GRID},
    "covariates": COVARIATES,
    "autoencoder": {
        "network": {"latent_channels": 4, "downsampling": 4, "channels": [32, 64]},
        "training": {"steps": 3, "batch_size": 8, "learning_rate": "2e-3"},
    },
    "diffusion": {
        "network": {"channels": [32, 64], "attention": [False, True]},
        "training": {"steps": 3, "batch_size": 8, "learning_rate": 0.004},
    },
}
TABLE = """participant_id,session_id,path,age,sex
01,a,01a.nii.gz,50.5,F
01,b,01b.nii.gz,52,F
02,a,02a.nii,n/a,M
03,a,03a.nii,70,
"""
TABLE_OF_PARTICIPANTS = "participant_id\tage\tsex\nsub-01\t50.5\tF\nsub-02\tn/a\tM\n"
TABLE_OF_ONE = "participant_id,path,age,sex\n01,{scan},50,F\n"


@dataclass(frozen=True)
class Link:
    """A symbolic link, where an input could have a file."""

    target: str


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        reader: who reads it, of READERS.
        mutations: what was done to it.
        files: by their paths below the input's folder.
        scan: the file that is read first.
    """

    reader: str
    mutations: tuple[str, ...]
    files: dict[str, bytes | Link]
    scan: str = ""

    def write(self, folder: Path) -> None:
        """The files below `folder`/input, and a valid scan and a table beside it that are nobody's to read."""
        secrets = {
            f"../{OUTSIDE}/secret.nii.gz": gzip.compress(nifti("single")[0]),
            f"../{OUTSIDE}/secret.tsv": TABLE.encode(),
        }
        for name, content in {**secrets, **self.files}.items():
            path = folder / "input" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target)
            else:
                path.write_bytes(content)


def nifti(
    kind: str, dtype: str = "f4", order: str = "<", fields: dict | None = None, extension: bytes = b""
) -> tuple[bytes, bytes]:
    """(header with what follows it, voxels if they stand apart) of a small scan; `fields` are written as they are."""
    array = np.random.default_rng(0).uniform(1, 250, (8, 9, 10))
    array[0], array[-1] = 0, 0
    array = array.astype(np.dtype(dtype).newbyteorder(order))
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(np.diag([2.0, 2, 2, 1]), 1)
    header.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    single = kind == "single"
    header["magic"], header["vox_offset"] = (b"n+1", 352 + len(extension)) if single else (b"ni1", 0)
    with np.errstate(all="ignore"):
        for name, value in (fields or {}).items():
            header[name] = value if np.ndim(value) == 0 else [*value, *header[name][len(value) :]]
    head = header.binaryblock + (b"\1\0\0\0" if extension else b"\0\0\0\0") + extension
    return (head + array.tobytes("F"), b"") if single else (head, array.tobytes("F"))


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes with one to three places flipped, cut, filled or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, max(len(content) - 1, 0))), draw(st.sampled_from((1, 2, 4, 8, 64, 1000)))
        piece = content[at : at + length]
        content = draw(
            st.sampled_from(
                (
                    content[:at] + bytes(255 - byte for byte in piece) + content[at + length :],
                    content[:at],
                    content[:at] + content[at + length :],
                    content[:at] + bytes([draw(st.integers(0, 255))]) * length + content[at:],
                    content[:at] + piece * 3 + content[at + length :],
                )
            )
        )
    return content


@st.composite
def with_bytes_damaged(draw, case: Case, often: int = 3) -> Case:
    """The case, in one of `often` with the bytes of one of its files damaged."""
    names = sorted(name for name, content in case.files.items() if isinstance(content, bytes) and name != "config.yaml")
    if not names or draw(st.integers(1, often)) > 1:
        return case
    name = draw(st.sampled_from(names))
    files = {**case.files, name: draw(damaged(case.files[name]))}
    return replace(case, files=files, mutations=(*case.mutations, f"bytes of {name}"))


@st.composite
def changed(draw, values: dict, hostile: tuple) -> tuple[dict, str]:
    """A copy of nested values with one of them replaced, renamed or gone; and what was done."""
    values = json.loads(json.dumps(values))
    keys, place = [], values
    while isinstance(place, dict | list) and place and (not keys or draw(st.integers(0, 3))):
        keys.append(draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        above, place = place, place[keys[-1]]
    if not keys:
        return values, "nothing left to change"
    what = draw(st.sampled_from(("value", "value", "value", "gone", "renamed", "wrapped")))
    key, name = keys[-1], ".".join(map(str, keys))
    if what == "gone":
        del above[key]
    elif what == "renamed" and isinstance(above, dict):
        above[draw(st.sampled_from((f"{key}s", "", key.upper(), "x" * 500)))] = above.pop(key)
    elif what == "wrapped":
        above[key] = [place]
    else:
        above[key] = draw(st.sampled_from(hostile))
    return values, f"{what} of {name}"
