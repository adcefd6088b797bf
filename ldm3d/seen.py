"""Which scans a training run has seen: RUN/scans.json, from its first step on. It stays with the run, as the data does.

A run goes on only with the scans that it began with. If the user allows others, what was seen before stays seen.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.data.keys import scan_of
from ldm3d.data.splits import TRAIN, VALIDATION
from ldm3d.errors import InputError, some
from ldm3d.files import write_atomic
from ldm3d.models.pretrained import read_json

RECORD = "scans.json"
GO_ON = "go-on"  # the value of autoencoder.changed_data that lets a run go on with other scans


@dataclass(frozen=True)
class Seen:
    """What a run has seen at any time.

    Attributes:
        train: scans that it was trained on, by `ldm3d.data.keys.scan_of`.
        validation: scans that chose its checkpoint.
        subjects: labels of both.
        network: `weights_hash` of the network that it exported; None before that.
        stage: settings that it was exported with, as `ldm3d.account.stage_of` has them; None where the record has none.
    """

    train: frozenset[str]
    validation: frozenset[str]
    subjects: frozenset[str]
    network: str | None = None
    stage: Mapping[str, Any] | None = None


def record_scans(run: Path, scans: pd.DataFrame, go_on: bool, begun: bool) -> str:
    """Record what a run is about to see, after a comparison with what it has seen. One process may call this.

    Args:
        run: its folder.
        scans: with key, subject and split; those of training and validation count.
        go_on: whether the run may go on with other scans than before.
        begun: whether the run has made steps already.

    Returns:
        A message for the user; "" for none.

    Raises:
        InputError: other scans than before, and not `go_on`; the record is damaged.
    """
    rows = scans[scans["split"].isin([TRAIN, VALIDATION])]
    now = {key: [subject, split] for key, subject, split in zip(rows["key"], rows["subject"], rows["split"])}
    record, message = _read(run), ""
    if record is None:
        record = {"before": {}}
        if begun:
            message = (
                f"{run} was begun by a version that did not record its scans: today's are taken for those that it has "
                "seen. If data or splits changed since, delete it and train anew"
            )
    elif record["now"] != now:
        changed = _changes(record["now"], now)
        if not go_on:
            raise InputError(
                f"{run} has seen other scans: {changed}. Subjects that it was trained on would count as held out from now on. "
                "Take back the change; or delete the folder to train anew; or go on deliberately with --set "
                f"autoencoder.changed_data={GO_ON}: all that it has seen stays seen"
            )
        message = f"{run} goes on with other scans ({changed}); what it has seen before stays seen"
        record["before"] = _union(record["before"], record["now"])
    write_atomic(run / RECORD, json.dumps({**record, "now": now}, indent=1) + "\n")
    return message


def record_export(run: Path, network: str, stage: Mapping[str, Any] | None = None) -> None:
    """Record the hash of the exported network, so that another one is not taken for it, and the settings of its training."""
    record = {**(_read(run) or {"before": {}, "now": {}}), "network": network, **({"stage": stage} if stage else {})}
    write_atomic(run / RECORD, json.dumps(record, indent=1) + "\n")


def seen_by(run: Path) -> Seen | None:
    """What a run has seen; None if it has no record."""
    record = _read(run)
    if record is None:
        return None
    rows = [(scan_of(key), *row) for key, row in _union(record["before"], record["now"]).items()]
    train = frozenset(scan for scan, _, split in rows if split == TRAIN)
    subjects = frozenset(subject for _, subject, _ in rows)
    return Seen(train, frozenset(scan for scan, *_ in rows) - train, subjects, record.get("network"), record.get("stage"))


def _read(run: Path) -> dict | None:
    if not (run / RECORD).is_file():
        return None
    record = read_json(run / RECORD)
    try:
        rows = [*record["before"].values(), *record["now"].values()]
        sound = all(isinstance(subject, str) and split in (TRAIN, VALIDATION) for subject, split in rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{run / RECORD} is damaged; restore it, or delete {run} to train anew")
    return record


def _union(before: dict, now: dict) -> dict:
    """All rows; a scan that was in training once stays there."""
    return {**before, **now, **{key: row for key, row in before.items() if row[1] == TRAIN}}


def _changes(before: dict, now: dict) -> str:
    """In words, by subjects."""
    old, new = ({(scan_of(key), subject): split for key, (subject, split) in rows.items()} for rows in (before, now))
    kinds = {
        "new": [scan for scan in new if scan not in old],
        "no longer in training or validation": [scan for scan in old if scan not in new],
        "in another split": [scan for scan in new if scan in old and old[scan] != new[scan]],
    }
    found = []
    for kind, scans in kinds.items():
        subjects = some(f"sub-{subject}" for subject in sorted({subject for _, subject in scans}))
        found += [f"{len(scans)} {kind} ({subjects})"] if scans else []
    return "; ".join(found) or "the same ones, prepared with other settings or placed otherwise"
