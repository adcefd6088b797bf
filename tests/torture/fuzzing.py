"""Everything that is read from outside, damaged: each input must end in success or in one clear message and exit code 2.

Every input starts from a valid one and goes through mutations of its structure, which have names, and of its bytes. It is read
as the commands read it, in a process of its own that has SECONDS and BYTES; no pickle may be loaded there and no file opened
that lies outside of the input's folder.
"""

import contextlib
import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import nibabel
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torture.generation import make_pipeline
from torture.outcome import Outcome

from ldm3d.cli import _requests
from ldm3d.config import CovariateConfig, DataConfig, load_config
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.bids import read_scans
from ldm3d.data.nifti import read_volume
from ldm3d.data.preprocess import prepare
from ldm3d.errors import exit_on_input_error
from ldm3d.pipeline import Pipeline

SECONDS, BYTES = 10, 2 * 2**30  # that reading one input may take; the bytes on top of what the libraries hold
MOST_LINES, MOST_LETTERS = 30, 6000  # of a message
PATIENCE = 6  # times SECONDS by the clock until a process counts as hung: others may be busy on the machine
OUTSIDE = "outside"  # the folder beside the input's own that nobody may read from
COMMANDS = 30  # inputs that go through the command line
LONGEST_START = 300  # seconds for a command, most of them its imports on a busy machine

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
            f"../{OUTSIDE}/secret.nii.gz": gzip.compress(_nifti("single")[0]),
            f"../{OUTSIDE}/secret.tsv": TABLE.encode(),
        }
        for name, content in {**secrets, **self.files}.items():
            path = folder / "input" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target)
            else:
                path.write_bytes(content)


# Reading, as the commands do


def _read_volume(case: Case) -> None:
    read_volume(case.scan)


def _prepare(case: Case) -> None:
    prepare(load_config("config.yaml"), workers=1)


def _read_config(case: Case) -> None:
    load_config("config.yaml")


def _read_table(case: Case) -> None:
    read_scans(DataConfig(table="scans.csv", grid=GRID), [CovariateConfig(**c) for c in COVARIATES])


def _read_bids(case: Case) -> None:
    read_scans(DataConfig(bids=".", grid=GRID), [CovariateConfig(**c) for c in COVARIATES])


def _read_requests(case: Case) -> None:
    schema = CovariateSchema(
        tuple(Covariate(**{**c, "range": None, "categories": tuple(c.get("categories", ()))}) for c in COVARIATES)
    )
    for row in _requests(Path("scans.csv")):
        schema.parse(row)


def _read_model(case: Case) -> None:
    volume = Pipeline.from_pretrained("model", "cpu")(steps=1).images[0].get_fdata()
    assert np.isfinite(volume).all(), "a volume of NaN was made"


READERS: dict[str, Callable[[Case], None]] = {
    "read_volume": _read_volume,
    "prepare": _prepare,
    "table": _read_table,
    "BIDS": _read_bids,
    "requests": _read_requests,
    "config": _read_config,
    "model": _read_model,
}


def problem_of(case: Case, readers: dict[str, Callable[[Case], None]] = READERS) -> str | None:
    """What is wrong with how an input is read; None if nothing is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        case.write(folder)
        started, message = time.process_time(), io.StringIO()
        with contextlib.chdir(folder / "input"), _watched(folder / OUTSIDE) as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
                    exit_on_input_error(readers[case.reader])(case)
            except SystemExit as done:
                if done.code != 2:
                    return f"exit code {done.code}"
            except Exception as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:
                message = None
        if seen:
            return seen[0]
        if time.process_time() - started > SECONDS:
            return f"took {time.process_time() - started:.0f} s"
        return None if message is None else _problem_of_message(message.getvalue(), case)


def _problem_of_message(text: str, case: Case) -> str | None:
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if not lines or len(lines[0]) < 20:
        return f"no message: {text[:200]!r}"
    if len(text.splitlines()) > MOST_LINES or len(text) > MOST_LETTERS:
        return f"a message of {len(text)} letters: {text[:200]!r}"
    if "Traceback" in text or re.search(r"unexpected \w+(Error|Exception)", text):
        return f"no message for a user: {text[:300]!r}"
    named = (
        {part for name in case.files for part in (name, *Path(name).parts)} | {"covariate"} | {c["name"] for c in COVARIATES}
    )
    if not any(name in text for name in named) and "input" not in text:
        return f"a message that names no file: {text[:300]!r}"
    return None


_watching: list[tuple[str, list[str]]] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    outside, seen = _watching[-1]
    if event == "pickle.find_class":
        seen.append(f"a pickle was loaded: {arguments[:2]}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        seen += [f"opened {path}, which lies outside"] if os.path.realpath(path).startswith(outside) else []


@contextlib.contextmanager
def _watched(outside: Path) -> Iterator[list[str]]:
    """A list that fills with the pickles that are loaded and the files below `outside` that are opened meanwhile."""
    seen: list[str] = []
    _watching.append((str(outside), seen))
    try:
        yield seen
    finally:
        _watching.pop()


# A process that may hang, die or run out of memory


def _serve(connection, readers: dict[str, Callable[[Case], None]]) -> None:
    torch.set_num_threads(1)
    sys.addaudithook(_audit)
    problem_of(Case("model", (), _model()))  # whatever is loaded late counts as the libraries'
    problem_of(Case("BIDS", (), _bids_files(TABLE_OF_PARTICIPANTS)))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
    connection.send("ready")
    while True:
        connection.send(problem_of(connection.recv(), readers))


class Reader:
    """A process that reads inputs; it is replaced where one ends it.

    Args:
        readers: as READERS.
    """

    def __init__(self, readers: dict[str, Callable[[Case], None]] = READERS):
        self.readers = readers
        self._start()

    def problem_of(self, case: Case) -> str | None:
        """What is wrong with how an input is read; None if nothing is."""
        self._connection.send(case)
        try:
            if self._connection.poll(PATIENCE * SECONDS):  # by the clock; the process counts its own
                return self._connection.recv()
            problem = f"not done after {PATIENCE * SECONDS} s"
        except EOFError:
            self._process.join()
            problem = f"the process died ({self._process.exitcode})"
        self.close()
        self._start()
        return problem

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.readers), daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.recv() == "ready"


# Mutations of bytes


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


# NIfTI

NAN, INF = float("nan"), float("inf")
FIELDS = {
    "dim": (
        [4, 8, 9, 10, 1, 1, 1, 1],  # one frame
        [4, 8, 9, 10, 3, 1, 1, 1],
        [3, 32767, 32767, 32767, 1, 1, 1, 1],
        [3, 900, 900, 900, 1, 1, 1, 1],
        [3, -8, 9, 10, 1, 1, 1, 1],
        [3, 0, 9, 10, 1, 1, 1, 1],
        [2, 8, 9, 1, 1, 1, 1, 1],
        [0] * 8,
        [7, 8, 9, 10, 1, 1, 1, 1],
        [-3, 8, 9, 10, 1, 1, 1, 1],
        [300, 8, 9, 10, 1, 1, 1, 1],
        [3, 720, 1, 1, 1, 1, 1, 1],
        [3, 1, 1, 720, 1, 1, 1, 1],
    ),
    "pixdim": ([1, -2, 2, 2], [1, 0, 2, 2], [1, NAN, 2, 2], [1, INF, 2, 2], [1, 1e-30, 2, 2], [NAN, 2, 2, 2], [1, 1e30, 2, 2]),
    "srow_x": (
        [0, 0, 0, 0],
        [NAN, 0, 0, 0],
        [1e38, 0, 0, 0],
        [0, 2, 0, 0],
        [2, 0, 0, INF],
        [1e-30, 0, 0, 0],
        [0.011, 0, 0, 0],
    ),
    "srow_z": ([0, 0, 0, 0], [2, 0, 0, 0], [0, 0, -INF, 0], [0, 1e-3, 99, 0]),
    "quatern_b": (2.0, NAN, INF, -1.0, 0.7),
    "sform_code": (0, -1, 1, 99),
    "qform_code": (0, 1, -1, 99),
    "scl_slope": (0.0, NAN, INF, -1.0, 1e38, 1e-45),
    "scl_inter": (NAN, INF, -1e38, 7.0),
    "datatype": (0, 1, 2, 4, 8, 16, 32, 64, 77, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1),
    "bitpix": (0, -8, 1, 32767),
    "vox_offset": (0.0, -1.0, NAN, INF, 1e12, 348.0, 353.0, 351.5, 6e7),
    "magic": (b"ni1", b"n+2", b"", b"\xff\xff\xff\xff"),
    "sizeof_hdr": (0, 540, 349, -1),
    "xyzt_units": (0, 1, 3, 255, 7),
    "intent_code": (3007, -1, 1011),
    "cal_max": (NAN, INF),
}
EXTENSIONS = (
    np.array([16, 6], "<i4").tobytes() + b"comment\0",
    np.array([0, 6], "<i4").tobytes(),
    np.array([-16, 6], "<i4").tobytes(),
    np.array([2**31 - 16, 2], "<i4").tobytes(),
    np.array([7, 32], "<i4").tobytes() + b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><CIFTI>&a;</CIFTI>",
)


def _nifti(
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


@functools.cache
def _bomb() -> bytes:
    """200 kB that unpack to a scan and 200 MB of zeros."""
    return gzip.compress(_nifti("single")[0] + bytes(200 * 2**20), 9)


TABLE_OF_ONE = "participant_id,path,age,sex\n01,{scan},50,F\n"


@st.composite
def scans(draw) -> Case:
    kind, dtype = (
        draw(st.sampled_from(("single", "pair"))),
        draw(st.sampled_from(("u1", "i2", "i4", "u2", "f4", "f8", "c8", "i8"))),
    )
    order, mutations, fields = draw(st.sampled_from("<>")), [], {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True)):
        fields[name] = draw(st.sampled_from(FIELDS[name]))
        mutations.append(f"{name} {fields[name]}")
    extension = draw(st.sampled_from((b"", b"", *EXTENSIONS)))
    header, voxels = _nifti(kind, dtype, order, fields, extension)
    packed = draw(st.booleans())
    end = ".gz" if packed else ""
    names = (f"scan.nii{end}",) if kind == "single" else (f"scan.hdr{end}", f"scan.img{end}")
    files = {name: gzip.compress(content, 1) if packed else content for name, content in zip(names, (header, voxels))}
    scan = draw(st.sampled_from(names))
    what = draw(st.sampled_from(("", "", "", "bomb", "truncated", "lone", "link out", "twice packed", "text", "wrong name")))
    if what == "bomb":
        files, scan = {"scan.nii.gz": _bomb()}, "scan.nii.gz"
    elif what == "truncated":
        files[scan] = files[scan][: draw(st.integers(0, len(files[scan])))]
    elif what == "lone":
        files = {scan: files[scan]}
    elif what == "link out":
        files, scan = {"scan.nii.gz": Link(f"../{OUTSIDE}/secret.nii.gz")}, "scan.nii.gz"
    elif what == "twice packed":
        files = {name: gzip.compress(content) for name, content in files.items()}
    elif what == "text":
        files[scan] = b"participant_id\tage\n" * draw(st.integers(0, 40))
    elif what == "wrong name":
        other = draw(st.sampled_from(("scan.mgz", "scan.nii.bz2", "scan.NII", "scan", "scan.dcm", "scan.img")))
        files, scan = {other: files[scan]}, other
    case = Case("read_volume", (dtype + order, *mutations, *[what][: bool(what)]), files, scan)
    case = draw(with_bytes_damaged(case))
    if what == "link out" or draw(st.integers(0, 9)) == 0:
        settings = {"config.yaml": yaml.safe_dump(CONFIG).encode(), "scans.csv": TABLE_OF_ONE.format(scan=scan).encode()}
        case = replace(case, reader="prepare", files={**case.files, **settings})
    return case


# Tables

TABLE = """participant_id,session_id,path,age,sex
01,a,01a.nii.gz,50.5,F
01,b,01b.nii.gz,52,F
02,a,02a.nii,n/a,M
03,a,03a.nii,70,
"""
TABLE_OF_PARTICIPANTS = "participant_id\tage\tsex\nsub-01\t50.5\tF\nsub-02\tn/a\tM\n"
CELLS = (
    *(
        "=1+1",
        "@SUM(A1)",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "'=1",
        "\t=1",
        "n/a",
        "",
        " ",
        "1e999",
        "nan",
        "-inf",
        "1_000",
        "0x10",
    ),
    *(
        "١٢",
        "½",
        "F",
        "f",
        "X",
        "1;2",
        '"',
        '""',
        "'",
        "a\nb",
        "a\rb",
        "\0",
        "\x1b[31m",
        "\ud7ff",
        "\u202e",
        "é" * 300,
        "x" * 10**5,
    ),
    *("sub-", "sub-sub-01", "../01", "a/b", "-1", "1,5", "1.0", "True", "%s%n", "{0}", "${HOME}", "~"),
)
PATHS = (
    *(
        "../outside/secret.nii.gz",
        "/etc/passwd",
        "x/../../outside/secret.nii.gz",
        "link/secret.nii.gz",
        "secret.nii.gz",
        "~/x.nii",
    ),
    *(
        "./01a.nii.gz",
        "a//b.nii",
        ".",
        "..",
        "/",
        "file:///etc/passwd",
        "https://example.org/x.nii",
        "//host/share",
        "a\\b.nii",
    ),
    *("x" * 5000, "a/" * 3000 + "b.nii", "pair.hdr", "con.nii", "01a.nii.gz\0.txt", "loop/x.nii"),
)
LINKS = {
    "link": Link(f"../{OUTSIDE}"),
    "secret.nii.gz": Link(f"../{OUTSIDE}/secret.nii.gz"),
    "pair.img": Link(f"../{OUTSIDE}/secret.nii.gz"),
    "pair.hdr": b"",
    "loop": Link("."),
}


@st.composite
def tables(draw, text: str = TABLE, separator: str = ",") -> tuple[bytes, tuple[str, ...]]:
    """A table and what was done to it."""
    rows, mutations = [line.split(separator) for line in text.splitlines()], []
    for _ in range(draw(st.integers(0, 3))):
        i, j = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
        what = draw(
            st.sampled_from(("cell", "cell", "path", "header", "row twice", "row gone", "cell more", "cell less", "column"))
        )
        if what == "cell":
            rows[i][j : j + 1] = [draw(st.sampled_from(CELLS))]
        elif what == "path" and "path" in rows[0]:
            rows[max(i, 1) % len(rows)][2:3] = [draw(st.sampled_from(PATHS))]
        elif what == "header":
            rows[0][j : j + 1] = [
                draw(st.sampled_from(("", "age", "Age", "participant_id", "path", "AGE ", "x" * 10**5, "=1")))
            ]
        elif what == "row twice":
            rows.insert(i, list(rows[i]))
        elif what == "row gone" and len(rows) > 1:
            del rows[i]
        elif what == "cell more":
            rows[i].append(draw(st.sampled_from(CELLS)))
        elif what == "cell less":
            rows[i] = rows[i][:-1]
        elif what == "column":
            rows = [[*row, "x" * k] for k, row in enumerate(rows)]
        mutations.append(what)
    form = draw(
        st.sampled_from(
            ("", "", "quoted", "semicolons", "BOM", "CRLF", "CR", "UTF-16", "Latin-1", "unclosed", "wide", "long", "empty")
        )
    )
    if form == "quoted":
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    elif form == "wide":
        rows = [[*row, *(f"{i}" for i in range(5000))] for row in rows]
    elif form == "long":
        rows += [[f"s{i}", *row[1:2], f"{i}.nii", *row[3:]] for i in range(3000) for row in rows[1:2]]
    text = "\n".join((";" if form == "semicolons" else separator).join(row) for row in rows) + "\n"
    if form in ("CRLF", "CR"):
        text = text.replace("\n", "\r\n" if form == "CRLF" else "\r")
    elif form == "unclosed":
        text = text[: len(text) // 2] + '"' + text[len(text) // 2 :]
    elif form == "empty":
        text = draw(st.sampled_from(("", "\n", "\n\n\n", ",", "participant_id", "\ufeff", "\0")))
    encoding = {"BOM": "utf-8-sig", "UTF-16": "utf-16", "Latin-1": "latin-1"}.get(form, "utf-8")
    content = text.encode(encoding, "replace")
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
        mutations.append("bytes")
    return content, (*mutations, *[form][: bool(form)])


def _bids_files(participants: bytes | str | Link) -> dict[str, bytes | Link]:
    empty = {f"sub-{s}/ses-{v}/anat/sub-{s}_ses-{v}_T1w.nii.gz": b"" for s, v in (("01", "a"), ("01", "b"), ("02", "a"))}
    description = {"Name": "test", "BIDSVersion": "1.10.0"}
    participants = participants.encode() if isinstance(participants, str) else participants
    return {"dataset_description.json": json.dumps(description).encode(), "participants.tsv": participants, **empty}


@st.composite
def tabular(draw) -> Case:
    reader = draw(st.sampled_from(("table", "table", "table", "requests", "BIDS")))
    if reader == "table":
        content, mutations = draw(tables())
        return Case(reader, mutations, {"scans.csv": content, **LINKS})
    if reader == "requests":
        content, mutations = draw(tables("age,sex\n50,F\n60.5,M\n,\n"))
        return Case(reader, mutations, {"scans.csv": content})
    content, mutations = draw(tables(TABLE_OF_PARTICIPANTS, "\t"))
    files = _bids_files(content)
    what = draw(st.sampled_from(BIDS_TRICKS))
    if what == "sessions":
        content, more = draw(tables("session_id\tage\nses-a\t61\nses-b\t64\n", "\t"))
        files["sub-01/sub-01_sessions.tsv"], mutations = content, (*mutations, *more)
    elif what == "description":
        files["dataset_description.json"] = draw(st.sampled_from((b"", b"{", b"[]", b"[" * 10**5, b'{"Name": NaN}', b"\xff")))
    elif what == "layout":
        files["layout_config.json"] = b'{"name": "x", "entities": [{"name": "subject", "pattern": "(a+)+$"}]}'
    elif what:
        files |= BIDS_LINKS[what]
    return Case(reader, (*mutations, *[what][: bool(what)]), files)


BIDS_LINKS = {
    "participants out": {"participants.tsv": Link(f"../{OUTSIDE}/secret.tsv")},
    "sessions out": {"sub-01/sub-01_sessions.tsv": Link(f"../../{OUTSIDE}/secret.tsv")},
    "description out": {"dataset_description.json": Link(f"../{OUTSIDE}/secret.tsv")},
    "folder out": {"sub-03": Link(f"../{OUTSIDE}")},
    "loops": {"sub-01/up": Link(".."), "sub-02/up": Link("..")},
    "link to nothing": {"sub-03/anat/sub-03_T1w.nii.gz": Link("nowhere")},
    "annexed": {
        "sub-03/anat/sub-03_T1w.nii.gz": Link("../../.git/annex/objects/x.nii.gz"),
        ".git/annex/objects/x.nii.gz": b"",
    },
}
BIDS_TRICKS = ("", "", "sessions", "sessions", "description", "layout", *sorted(BIDS_LINKS))

# YAML

VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        2.5,
        10**30,
        -(10**30),
        NAN,
        INF,
        1e300,
        "",
        "x",
        "1",
        "1e3",
        "yes",
        "../..",
        "\0",
        "\x1b[2J",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        ["x"] * 3,
        [1, 2],
        [1, 2, 3],
        [0, 0, 0],
        [2**20] * 3,
        [True] * 3,
        {"kind": "monai"},
        {1: 2},
    ),
    *("x" * 10**4, list(range(3000)), [{"name": "age", "kind": "continuous"}] * 2),
)


def _laughs(width: int = 10, depth: int = 10) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def _merges(depth: int = 25) -> str:
    return "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, depth))


SNIPPETS = (
    *(
        _laughs(),
        _merges(),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "seed: 1\nseed: 2\n",
        "[" * 5000,
        "{" * 5000,
        "a: " + "[" * 3000 + "]" * 3000,
    ),
    *(
        "- " * 3000,
        "a: !!python/object/apply:os.system ['touch executed']\n",
        "a: !!bool 7\n",
        "a: !!int x\n",
        "a: !!timestamp x\n",
    ),
    *(
        "a: 2024-99-99\n",
        "a: " + "9" * 5000 + "\n",
        "a: 0b\n",
        "a: 0x" + "f" * 5000 + "\n",
        "a: =\n",
        "? [a]\n: b\n",
        "? {a: b}\n: c\n",
    ),
    *(
        "a: !!binary x\n",
        "a: !!set {x, y}\n",
        "a: !!omap [x]\n",
        "---\na: 1\n---\nb: 2\n",
        "%YAML 9.9\n---\na: 1\n",
        "a: \x07\n",
        "x" * 70_000,
    ),
    *(
        "a: *nobody\n",
        'a: "\\0"\n',
        'a: "\\ud800"\n',
        "1: 2\n",
        "null: 1\n",
        "[a, b]: 1\n",
        "\ttab: 1\n",
        "a: 1:99:99\n",
        "a: |\n  x\n b\n",
    ),
)


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


@st.composite
def configs(draw) -> Case:
    values, mutations = CONFIG, []
    for _ in range(draw(st.integers(0, 2))):
        values, what = draw(changed(values, VALUES))
        mutations.append(what)
    text = yaml.safe_dump(values, default_flow_style=draw(st.sampled_from((None, False, True))))
    if draw(st.booleans()):
        snippet = draw(st.sampled_from(SNIPPETS))
        text = draw(st.sampled_from((snippet, text + snippet, snippet + text)))
        mutations.append(snippet[:30])
    content = text.encode("utf-8", "replace")
    if draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
        mutations.append("bytes")
    return Case("config", tuple(mutations), {"config.yaml": content})


# Models


class _Runs:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@functools.cache
def _model() -> dict[str, bytes]:
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
    files, mutations = dict(_model()), []
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(files)))
        if name.endswith(".json"):
            if draw(st.integers(0, 5)) == 0:
                files[name], what = draw(st.sampled_from(JSONS)), "other JSON"
            else:
                try:
                    values, what = draw(changed(json.loads(files[name]), HOSTILE))
                except ValueError:
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


FAMILIES = {"NIfTI": scans(), "tables": tabular(), "configs": configs(), "models": models()}
SHARES = {"NIfTI": 0.35, "tables": 0.3, "configs": 0.2, "models": 0.15}


def cases_of(family: str, examples: int, seed: int, do: Callable[[Case], None]) -> None:
    """Call `do` with so many inputs of a family, the same ones for the same seed."""
    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    hypothesis.seed(seed)(settings(hypothesis.given(FAMILIES[family])(do)))()


def try_family(family: str, examples: int, seed: int, reader: Reader) -> Outcome:
    """Read so many inputs of a family; those that break the rule are kept in a folder that the outcome names."""
    started, tried, lost = time.monotonic(), [], []

    def do(case: Case) -> None:
        problem = reader.problem_of(case)
        tried.append(case.mutations)
        if problem:
            lost.append(f"{case.reader} of {', '.join(case.mutations)}: {problem}; kept in {_keep(case)}")

    cases_of(family, examples, seed, do)
    return Outcome(f"hostile {family}", len(tried), len(lost), time.monotonic() - started, "; ".join(lost[:5]))


def try_commands(examples: int, seed: int) -> Outcome:
    """The same through the command line, each in a fresh process: exit code 0 or 2."""
    started, tried, lost = time.monotonic(), [], []

    def do(case: Case) -> None:
        settings = {"config.yaml": yaml.safe_dump(CONFIG).encode(), "scans.csv": TABLE_OF_ONE.format(scan=case.scan).encode()}
        if case.reader == "BIDS":
            values = {**CONFIG, "data": {"bids": ".", "grid": GRID}}
            settings = {"config.yaml": yaml.safe_dump(values).encode()}
        arguments = (
            ["generate", "model", "--out", "out", "--steps", "1"] if case.reader == "model" else ["prepare", "config.yaml"]
        )
        case = replace(case, files={**settings, **case.files})
        with tempfile.TemporaryDirectory() as name:
            case.write(Path(name))
            command = [sys.executable, "-m", "ldm3d.cli", *arguments]
            limits = {"timeout": LONGEST_START, "capture_output": True, "text": True, "errors": "replace"}
            try:
                done = subprocess.run(command, cwd=Path(name) / "input", env={**os.environ, "OMP_NUM_THREADS": "1"}, **limits)
            except subprocess.TimeoutExpired as late:
                done = subprocess.CompletedProcess(command, "no end", stderr=str(late))
        tried.append(case.mutations)
        if done.returncode not in (0, 2) or "Traceback" in done.stderr:
            lost.append(
                f"{' '.join(arguments)} of {case.mutations}: {done.returncode}, {done.stderr[-300:]}; kept in {_keep(case)}"
            )

    for family in FAMILIES:
        cases_of(family, -(-examples // len(FAMILIES)), seed + 1, do)
    return Outcome("the same by commands", len(tried), len(lost), time.monotonic() - started, "; ".join(lost[:5]))


def run(examples: int = 2000, seed: int = 0) -> list[Outcome]:
    """Read `examples` inputs of all families in-process, and COMMANDS by the command line."""
    reader = Reader()
    try:
        found = [try_family(family, round(share * examples), seed, reader) for family, share in SHARES.items()]
    finally:
        reader.close()
    return [*found, try_commands(COMMANDS, seed)]


def _keep(case: Case) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
    case.write(folder)
    return folder


if __name__ == "__main__":
    for outcome in run(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        print(f"{outcome.what}: {outcome.tried} tried, {outcome.lost} lost, {outcome.seconds:.0f} s\n{outcome.detail}")
