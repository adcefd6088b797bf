"""Reads hostile inputs as the commands do, in a process of its own that has SECONDS and BYTES, and says what went wrong."""

import contextlib
import io
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torture.hostile.case import COVARIATES, GRID, OUTSIDE, TABLE_OF_PARTICIPANTS, Case
from torture.hostile.models import model
from torture.hostile.tables import bids_files

from ldm3d.cli.generation import read_requests
from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.config.read import load_config
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.bids import read_scans, read_table
from ldm3d.data.labels import LabelMaps
from ldm3d.data.nifti import read_volume
from ldm3d.data.preparing import load_prepared, prepare
from ldm3d.errors import exit_on_input_error
from ldm3d.evaluation.explanation import explain
from ldm3d.pipeline import Pipeline
from ldm3d.report.explanation import write_explanation
from ldm3d.report.external import compare_written, count_labels, read_participants

SECONDS, BYTES = 10, 2 * 2**30  # that reading one input may take; the bytes on top of what the libraries hold
MOST_LINES, MOST_LETTERS = 30, 6000  # of a message
PATIENCE = 6  # times SECONDS by the clock until a process counts as hung: others may be busy on the machine


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
    for row in read_requests(Path("scans.csv")):
        schema.parse(row)


def _read_model(case: Case) -> None:
    volume = Pipeline.from_pretrained("model", "cpu")(steps=1).images[0].get_fdata()
    assert np.isfinite(volume).all(), "a volume of NaN was made"


def _explain(case: Case) -> None:
    pipeline = Pipeline.from_pretrained("model", "cpu")
    sampling = pipeline.sampling.replace(steps=1)
    found = explain(pipeline, {"age": 40}, {"age": 60}, sampling, seeds=6)
    write_explanation(Path("out/explanation"), "", pipeline, found, sampling)


def _find_label_maps(case: Case) -> None:
    """As `ldm3d segmenter` does for the subjects of a table, and `ldm3d compare` for participants."""
    scans = read_scans(DataConfig(table="scans.csv", grid=GRID), [])
    for row in scans.itertuples():
        LabelMaps(Path("labels")).one(row.subject, row.session)


def _compare(case: Case) -> None:
    compare_written(Path(), count_labels(LabelMaps(Path("labels")), list(read_participants(Path())[1]), {"age": [1]}))


def _load_prepared(case: Case) -> None:
    config = load_config("config.yaml")
    for key in read_table(config.prepared_folder / "scans.tsv")["key"]:
        load_prepared(config, key)


READERS: dict[str, Callable[[Case], None]] = {
    "read_volume": _read_volume,
    "prepare": _prepare,
    "table": _read_table,
    "BIDS": _read_bids,
    "requests": _read_requests,
    "config": _read_config,
    "model": _read_model,
    "explain": _explain,
    "labels": _find_label_maps,
    "compare": _compare,
    "key": _load_prepared,
}


def problem_of(case: Case, readers: dict[str, Callable[[Case], None]] = READERS) -> str | None:
    """What is wrong with how an input is read; None if nothing is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        case.write(folder)
        there = set(folder.rglob("*"))
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
        if written := {path for path in folder.rglob("*") if path not in there and not _may_be_written(path, folder)}:
            return f"wrote {min(written)}, where nothing was to be written"
        if time.process_time() - started > SECONDS:
            return f"took {time.process_time() - started:.0f} s"
        return None if message is None else _problem_of_message(message.getvalue(), case)


def _may_be_written(path: Path, folder: Path) -> bool:
    return any(path.is_relative_to(folder / "input" / name) for name in ("out", "run"))


def _problem_of_message(text: str, case: Case) -> str | None:
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if not lines or len(lines[0]) < 20:
        return f"no message: {text[:200]!r}"
    if len(text.splitlines()) > MOST_LINES or len(text) > MOST_LETTERS:
        return f"a message of {len(text)} letters: {text[:200]!r}"
    if "Traceback" in text or re.search(r"unexpected \w+(Error|Exception)", text):
        return f"no message for a user: {text[:300]!r}"
    named = (
        {"subject", "session", "participant", "key", "measured"}
        | {part for name in case.files for part in (name, *Path(name).parts)}
        | {"covariate"}
        | {c["name"] for c in COVARIATES}
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
    problem_of(Case("model", (), model()))  # whatever is loaded late counts as the libraries'
    problem_of(Case("BIDS", (), bids_files(TABLE_OF_PARTICIPANTS)))
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
