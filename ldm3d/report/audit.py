"""The output of an audit: audit.json, report.html, pictures of the most suspicious pairs, and the guard.

All of it is to be protected like the training data; the pages and pictures show and name training subjects.
"""

from pathlib import Path

from ldm3d.description import Sampling
from ldm3d.evaluation.subgroups import gaps, groupings
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.findings import Audit
from ldm3d.privacy.guard import FOLDER, Guard
from ldm3d.report.page import save_pictures, write_json, write_page
from ldm3d.report.sections.audit import draw, lights, sections
from ldm3d.report.sections.subgroups import subgroup_sections
from ldm3d.report.write import provenance

AUDIT = "audit.json"


def write_audit(folder: Path, title: str, pipeline: Pipeline, found: Audit, guard: Guard, sampling: Sampling) -> Path:
    """Write audit.json, report.html, pictures as PNG, and the folder `guard`; `sampling`: of the volumes. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(folder, draw(pipeline, found))
    guard.save(folder / FOLDER)
    made = provenance(pipeline, sampling)
    bands = groupings(pipeline.schema, found.scores[-1].rows)  # ages of the training subjects, who are in the last scores
    by_group, goals = gaps(pipeline.schema, bands, found.scores), lights(found)
    values = found.to_dict() | {"fairness": [gap.to_dict() for gap in by_group]}
    write_json(folder / AUDIT, values | {"goals": [goal.to_dict() for goal in goals], "provenance": made})
    return write_page(folder, title, [*sections(found, pictures), *subgroup_sections(by_group)], made, goals)
