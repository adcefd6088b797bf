"""Which scans a training run has seen: RUN/scans.json, from its first step on. It stays with the run, as the data does.

A run goes on only with the scans that it began with. Where others are wanted on purpose, what was seen before stays seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ldm3d.data.keys import scan_of
from ldm3d.data.splits import TRAIN, VALIDATION
from ldm3d.errors import InputError
from ldm3d.files import write_whole
from ldm3d.models.pretrained import read_json

RECORD = "scans.json"
GO_ON = "go-on"  # the value of autoencoder.changed_data that lets a run go on with other scans
_NAMED = 5  # subjects that a message names


@dataclass(frozen=True)
class Seen:
    """What a run has seen at any time.

    Attributes:
        train: scans that it was trained on, by `ldm3d.data.keys.scan_of`.
        validation: scans that chose its checkpoint.
        subjects: labels of both.
        network: `weights_hash` of the network that it exported; None before that.
    """

    train: frozenset[str]
    validation: frozenset[str]
    subjects: frozenset[str]
    network: str | None = None


def note_scans(run: Path, scans: pd.DataFrame, go_on: bool, begun: bool) -> str:
    """Write down what a run is about to see, and compare it with what it has seen. One process may call this.

    Args:
        run: its folder.
        scans: with key, subject and split; those of training and validation count.
        go_on: whether other scans than before are wanted.
        begun: whether the run has made steps already.

    Returns:
        What there is to say; "" for nothing.

    Raises:
        InputError: other scans than before, and not `go_on`; the record is damaged.
    """
    rows = scans[scans["split"].isin([TRAIN, VALIDATION])]
    now = {key: [subject, split] for key, subject, split in zip(rows["key"], rows["subject"], rows["split"])}
    record, said = _read(run), ""
    if record is None:
        record = {"before": {}}
        if begun:
            said = (
                f"{run} was begun by a version that did not note its scans: those of today are taken for those that it has "
                "seen. If data or splits changed since, delete it and train anew"
            )
    elif record["now"] != now:
        changed = _changes(record["now"], now)
        if not go_on:
            raise InputError(
                f"{run} has seen other scans: {changed}. Whoever was trained on would count as held out from now on. Take "
                "back the change; or delete the folder to train anew; or go on deliberately with --set "
                f"autoencoder.changed_data={GO_ON}: all that it has seen stays seen"
            )
        said = f"{run} goes on with other scans ({changed}); what it has seen before stays seen"
        record["before"] = _union(record["before"], record["now"])
    write_whole(run / RECORD, json.dumps({**record, "now": now}, indent=1) + "\n")
    return said


def sign(run: Path, network: str) -> None:
    """Note what the run exported, so that another network in its place is not taken for it."""
    write_whole(run / RECORD, json.dumps({**(_read(run) or {"before": {}, "now": {}}), "network": network}, indent=1) + "\n")


def seen_by(run: Path) -> Seen | None:
    """What a run has seen; None where it did not note it."""
    record = _read(run)
    if record is None:
        return None
    rows = [(scan_of(key), *row) for key, row in _union(record["before"], record["now"]).items()]
    train = frozenset(scan for scan, _, split in rows if split == TRAIN)
    subjects = frozenset(subject for _, subject, _ in rows)
    return Seen(train, frozenset(scan for scan, *_ in rows) - train, subjects, record.get("network"))


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
    """All rows; a scan that was ever trained on was trained on."""
    return {**before, **now, **{key: row for key, row in before.items() if row[1] == TRAIN}}


def _changes(before: dict, now: dict) -> str:
    """In words, by subjects."""
    old, new = ({(scan_of(key), subject): split for key, (subject, split) in rows.items()} for rows in (before, now))
    kinds = {
        "new": [who for who in new if who not in old],
        "no longer in training or validation": [who for who in old if who not in new],
        "in another split": [who for who in new if who in old and old[who] != new[who]],
    }
    found = []
    for kind, scans in kinds.items():
        subjects = sorted({subject for _, subject in scans})
        named = ", ".join(f"sub-{subject}" for subject in subjects[:_NAMED])
        named += f" and {len(subjects) - _NAMED} more" if len(subjects) > _NAMED else ""
        found += [f"{len(scans)} {kind} ({named})"] if scans else []
    return "; ".join(found) or "the same ones, prepared with other settings or placed otherwise"
