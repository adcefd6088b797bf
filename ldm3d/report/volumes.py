"""Tables of an evaluation: a row for each volume, and who was trained on and tested."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ldm3d.covariates import CovariateSchema
from ldm3d.data.splits import TEST, TRAIN
from ldm3d.data.table_one import table_1
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.samples import QUALITIES
from ldm3d.report.page import Section

HELD_OUT, SYNTHETIC = "held-out", "synthetic"


def volume_table(found: Evaluation, schema: CovariateSchema) -> pd.DataFrame:
    """A row for each held-out and each synthetic volume.

    Returns:
        Columns: volumes ("held-out" or "synthetic"); number; held_out, the number of the held-out volume whose covariates were
        requested; covariates; measured_<covariate> on the volume and reconstructed_<covariate> on its reconstruction; the
        quality of the reconstruction. It names nobody.
    """
    rows: list[dict[str, Any]] = []
    for i, subject in enumerate(found.subjects):
        measured = {f"measured_{name}": kinds["real"][i] for name, kinds in found.measured.items()}
        again = {f"reconstructed_{name}": kinds["reconstructed"][i] for name, kinds in found.measured.items()}
        quality = {name: getattr(found, name)[i] for name in QUALITIES}
        rows.append({"volumes": HELD_OUT, "number": i, "held_out": i, **subject, **measured, **again, **quality})
    for i, (request, source) in enumerate(zip(found.requests, found.sources)):
        measured = {f"measured_{name}": kinds["generated"][i] for name, kinds in found.measured.items()}
        rows.append({"volumes": SYNTHETIC, "number": i, "held_out": source, **request, **measured})
    first = ["volumes", "number", "held_out", *schema.names]
    table = pd.DataFrame(rows, columns=[*first, *(name for name in _columns(rows) if name not in first)])
    return table.map(lambda value: float(f"{value:.6g}") if isinstance(value, float | np.floating) else value)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def people_section(found: Evaluation, schema: CovariateSchema, account: Mapping[str, Any] | None = None) -> Section:
    """Table 1: the people of the training and of the test.

    Args:
        found: people of the training are there if their scans were given, maybe only some of them.
        schema: of the covariates.
        account: of the model (`ldm3d.account`), which tells of the training where not all its scans were given.
    """
    whole = found.has_training_of(account)
    parts = [(TRAIN, found.training or [], found.training_people or [])] if whole else []
    parts += [(TEST, found.subjects, found.people)]
    rows = [
        {"split": split, "subject": f"{split} {person}", **values}
        for split, all_values, people in parts
        for values, person in zip(all_values, people)
    ]
    table = pd.DataFrame(rows, columns=["split", "subject", *schema.names])
    for covariate in schema:
        if covariate.kind == "continuous":
            table[covariate.name] = table[covariate.name].astype(float)
    shown, trained = table_1(table, schema.covariates, {}), len(found.training or []) if whole else 0
    if not whole and account:
        trained, shown = account["data"]["scans"].get(TRAIN, 0), beside(account["data"]["table"], shown)
    on = (
        f"{trained} scans that the model was trained on"
        if trained
        else "what the model was trained on is described neither in its folder nor in --data"
    )
    text = (
        f"Table 1: {on}; {len(found.subjects)} held-out scans that it was tested on. Mean ± standard deviation and range, or "
        f"numbers and shares. {len(found.requests)} synthetic volumes were requested with the covariates of held-out people."
    )
    return Section("Who was trained on, and who was tested", text, shown)


def beside(trained: Mapping[str, list], tested: Mapping[str, list]) -> dict[str, list]:
    """Table 1 of the training's own account and of held-out people, as one: the columns of training and test."""
    columns = []
    for table, split in ((trained, TRAIN), (tested, TEST)):
        place = table["columns"].index(split)
        columns.append({row[0]: row[place] for row in table["rows"]})
    labels = list(dict.fromkeys(label for cells in columns for label in cells))
    return {
        "columns": ["", TRAIN, TEST],
        "rows": [[label, *(cells.get(label, "none") for cells in columns)] for label in labels],
    }
