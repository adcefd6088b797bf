"""Commands over given scans: one, those of a table, or of a dataset. What is done already is left, what fails is named."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm3d.errors import InputError

Scan = Annotated[Path | None, typer.Argument(help="A scan (NIfTI, .mgz); or give --table or --bids.", show_default=False)]
Table = Annotated[
    Path | None, typer.Option(help="CSV or TSV with a path column, and columns of covariates: all of its scans.")
]
Bids = Annotated[Path | None, typer.Option(help="BIDS dataset: all of its scans, with the covariates of its tables.")]
Source = Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The scan's own covariates.")]

Show = Callable[[int, int], None]


def each_scan(
    command: str, unit: str, scans: Sequence[Any], files_of: Callable[[Any], Any], work: Callable[[Any, Any, Show], str]
) -> None:
    """Work on scans, one after another.

    Args:
        command, unit: for the progress bars.
        scans: `AskedScan`s.
        files_of: scan -> its `Derived`.
        work: (scan, files, progress) -> what to print of it where it is the only one.

    Raises:
        InputError: at the end, where scans were left out; at once for a single one.
    """
    from tqdm import tqdm

    failed, kept, said, done = [], 0, "", None
    try:
        for each in tqdm(scans, desc=command, unit="scan", disable=None if len(scans) > 1 else True):
            try:
                files = files_of(each)
                if files.is_done:
                    kept, said, done = kept + 1, f"{each.scan.name} is there already, in {files.folder}", files
                    continue
                with progress_bar(each.scan.name.partition(".")[0], unit, leave=len(scans) == 1) as show:
                    said, done = work(each, files, show), files
            except InputError as error:
                if len(scans) == 1:
                    raise
                failed.append(f"{each.scan.name}: {error}" if each.scan.name not in str(error) else str(error))
                tqdm.write(f"left out: {failed[-1]}")
    finally:
        if done:
            print(f"page: {_page(done)}")
    if len(scans) == 1:
        print(said)
        return
    print(f"{len(scans) - len(failed)} of {len(scans)} scans done, {kept} of them were there already")
    if failed:
        raise InputError(f"{len(failed)} of {len(scans)} scans were left out; the first: {failed[0]}")


def _page(files: Any) -> Path:
    """The page of a folder, of all that is done there."""
    from ldm3d.report.derived import write_derived  # the import takes seconds

    return write_derived(files.folder, files.kind)


@contextlib.contextmanager
def progress_bar(name: str, unit: str, leave: bool = True) -> Iterator[Show]:
    """A progress bar, as a function of (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, leave=leave, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
