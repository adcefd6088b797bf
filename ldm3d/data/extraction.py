"""Brain extraction by a command that the user has: a scan's file in, the mask of its brain out.

The command runs without a shell, in a folder of its own, once for each scan and with one thread, as scans go through in
parallel. What it prints is shown only where it fails.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm3d.config.data import BRAIN_TOOLS, BrainExtractionConfig
from ldm3d.data.nifti import pack_volume, read_volume
from ldm3d.errors import InputError, shown
from ldm3d.files import write_atomic

TIMEOUT_S = 3600  # of one scan; a tool that takes longer is taken to hang
_VERSION_S = 120  # a program that loads a network says its version late
_FSL, _FREESURFER = ("FSLDIR", "etc/fslversion"), ("FREESURFER_HOME", "build-stamp.txt")
# Of a tool without --version: an environment variable, and the file below its folder that says the version
_VERSION_FILES = {"bet": _FSL, "mri_synthstrip": _FREESURFER}
_PACKAGES = {"hd-bet": "hd-bet", "deepbet-cli": "deepbet"}  # of a tool without --version that pip installs


@dataclass(frozen=True)
class Tool:
    """A command that was found.

    Attributes:
        words: of the command; {scan}, {mask}, {brain} and {folder} stand in them.
        program: the file that is run.
        version: what it says of itself; else the hash of its file.
    """

    words: tuple[str, ...]
    program: str
    version: str

    def told(self) -> dict[str, Any]:
        """What the sidecar of a prepared scan says of it, and what its mask depends on."""
        return {"command": " ".join(self.words), "version": self.version}


def find_tool(config: BrainExtractionConfig) -> Tool:
    """The tool of a config.

    Raises:
        InputError: its program is not there.
    """
    words = shlex.split(config.command)
    program = shutil.which(words[0])
    if program is None:
        there = [name for name in BRAIN_TOOLS if shutil.which(name)]
        instead = f" {' and '.join(there)} {'is' if len(there) == 1 else 'are'} there." if there else ""
        raise InputError(
            f"data.brain_extraction: there is no program {shown(words[0])} on PATH.{instead} Three ways out: install it (or "
            "put its folder on PATH, or write its full path); make masks on another machine and name them in data.mask; or "
            "drop data.brain_extraction and train on the scans as they are"
        )
    if not any("{scan}" in word for word in words):
        # The user's options come last: BET takes its first two words as the files, whatever they are
        words = [words[0], *shlex.split(BRAIN_TOOLS[words[0]]), *words[1:]]
    return Tool(tuple(words), os.path.abspath(program), _version(words[0], program))


def tool_of_model(config: BrainExtractionConfig | None) -> Tool | None:
    """The program that extracts brains as those of a model's training were; None where none were.

    Raises:
        InputError: it is not there.
    """
    if config is None:
        return None
    try:
        return find_tool(config)
    except InputError:
        raise InputError(
            f"the brains of the model's scans were extracted by {shown(config.command)}, and there is no such program on "
            "PATH; install it, or extract the scan's brain otherwise and say that it is done (stripped=True, --stripped)"
        ) from None


def extract(tool: Tool, path: Path, volume: NDArray, affine: NDArray) -> tuple[NDArray, NDArray]:
    """The mask of a scan's brain, (1, X, Y, Z), more than 0.5 inside; and its affine.

    Args:
        tool: that finds it.
        path: of the scan. The tool reads this file if it is NIfTI, else a copy in that format.
        volume, affine: of the scan, as they were read.

    Raises:
        InputError: the tool failed, hung or wrote no mask.
    """
    with tempfile.TemporaryDirectory(prefix="ldm3d-brain-") as name:
        folder = Path(name)
        scan = path.absolute()
        readable = (".nii.gz",) if tool.words[0] == "hd-bet" else (".nii", ".nii.gz")
        if not scan.name.endswith(readable):
            scan = folder / "scan.nii.gz"
            write_atomic(scan, pack_volume(volume, affine))
        places = {"{scan}": scan, "{mask}": folder / "mask.nii.gz", "{brain}": folder / "brain.nii.gz", "{folder}": folder}
        words = [_filled(word, places) for word in tool.words]
        _run(tool, words, folder)
        for file in ("mask.nii.gz", "out_bet.nii.gz", "out_mask.nii.gz", "brain.nii.gz"):
            if (folder / file).is_file():
                try:
                    mask, own = read_volume(folder / file)
                except InputError as error:
                    reason = str(error).removeprefix(f"{folder / file}: ")
                    raise InputError(f"{tool.words[0]} wrote no usable mask: {reason}") from None
                return (mask != 0 if file == "brain.nii.gz" else mask), own
        written = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        raise InputError(
            f"{tool.words[0]} wrote no mask where it should (in its folder is: {written}); write {{mask}} or {{brain}} in "
            "data.brain_extraction.command where the path of its result belongs"
        )


def _run(tool: Tool, words: list[str], folder: Path) -> None:
    """Run the command; an InputError with its last words if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "FSLOUTPUTTYPE": "NIFTI_GZ"}  # in which its mask is looked for
    options: dict[str, Any] = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": TIMEOUT_S}
    try:
        done = subprocess.run([tool.program, *words[1:]], capture_output=True, check=False, **options)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{tool.words[0]} did not end within {TIMEOUT_S / 60:.0f} minutes; try it on this scan alone"
        ) from None
    except OSError as error:
        raise InputError(f"{tool.program} cannot be run ({error.strerror}); try it on this scan alone") from None
    if done.returncode:
        lines = [line for line in (done.stderr + b"\n" + done.stdout).decode(errors="replace").splitlines() if line.strip()]
        said = f": {shown(lines[-1].strip())}" if lines else " and said nothing"
        raise InputError(f"{tool.words[0]} failed with exit code {done.returncode}{said}; try it on this scan alone")


def _filled(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(name, str(path))
    return word


def _version(name: str, program: str) -> str:
    """What the program says of itself, a line; else the hash of its file, which changes with it."""
    if (variable := _VERSION_FILES.get(name)) and variable[0] in os.environ:
        file = Path(os.environ[variable[0]], variable[1])
        if file.is_file() and (text := file.read_text(errors="replace").strip()):
            return text.splitlines()[0][:100]
    content = Path(program).read_bytes()
    questions = [[program, "--version"]]
    if name in _PACKAGES and content[:2] == b"#!":  # a script of a few lines, the same in every version: its Python knows
        python = shlex.split(content.splitlines()[0][2:].decode(errors="replace"))
        ask = f"import importlib.metadata as m; print({name!r}, m.version({_PACKAGES[name]!r}))"
        questions.insert(0, [*python, "-c", ask])
    for question in questions:
        try:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "timeout": _VERSION_S, "check": False}
            done = subprocess.run(question, capture_output=True, **options)
            if done.returncode == 0 and (text := done.stdout.decode(errors="replace").strip()):
                return text.splitlines()[0][:100]
        except (OSError, subprocess.TimeoutExpired):
            pass
    return f"unknown, file {hashlib.sha256(content).hexdigest()[:12]}"
