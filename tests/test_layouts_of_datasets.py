"""Kinds of BIDS datasets that are met in public: each ends in a table, or in one message that says what to add.

Layouts are made here, with volumes of a few voxels; what they have in common with published ones is file names and tables.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.masks import find_masks
from ldm3d.errors import InputError

AGE = CovariateConfig(name="age", kind="continuous", unit="years", range=(0, 120))
SEX = CovariateConfig(name="sex", kind="categorical", categories={"F": (), "M": ()})


def scan(folder: Path, name: str) -> Path:
    """A tiny volume at FOLDER/NAME."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(abs(hash(name)) % 1000).uniform(0, 100, (8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def table(folder: Path, *rows: str, name: str = "participants.tsv") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(row.replace(" ", "\t") for row in rows) + "\n")


def read(folder: Path, *covariates: CovariateConfig, **data):
    grid = {"shape": (8, 8, 8), "spacing_mm": 20}
    return read_scans(DataConfig(bids=folder, grid=grid, **data), covariates or (AGE, SEX))


def names(frame) -> list[str]:
    return [Path(path).name for path in frame["path"]]


def several_sessions(folder: Path) -> None:
    """Ages in a table for each person, sexes in participants.tsv."""
    for ses in ("baseline", "month12"):
        scan(folder, f"sub-01/ses-{ses}/anat/sub-01_ses-{ses}_T1w.nii.gz")
    scan(folder, "sub-02/ses-baseline/anat/sub-02_ses-baseline_T1w.nii.gz")
    table(folder, "participant_id sex", "sub-01 F", "sub-02 M")
    table(folder, "session_id age", "ses-baseline 70.1", "ses-month12 71.2", name="sub-01/sub-01_sessions.tsv")
    table(folder, "session_id age", "ses-baseline 64", name="sub-02/sub-02_sessions.tsv")
    found = read(folder)
    assert found["age"].tolist() == [70.1, 71.2, 64] and found["sex"].tolist() == ["F", "F", "M"]
    assert found["session"].tolist() == ["baseline", "month12", "baseline"]


def several_runs(folder: Path) -> None:
    """The first of each is taken, and a message names what was left; a filter takes both."""
    for run in (1, 2):
        scan(folder, f"sub-01/anat/sub-01_run-{run}_T1w.nii.gz")
    scan(folder, "sub-02/anat/sub-02_run-2_T1w.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    with pytest.warns(UserWarning, match="run"):
        assert names(read(folder)) == ["sub-01_run-1_T1w.nii.gz", "sub-02_run-2_T1w.nii.gz"]
    assert len(read(folder, filter={"run": [1, 2]})) == 3


def several_acquisitions(folder: Path) -> None:
    """A defaced and a bias-corrected version, a fast scan, a second contrast: one T1w for each person, of one kind."""
    for sub in ("01", "02", "03"):
        scan(folder, f"sub-{sub}/anat/sub-{sub}_acq-highres_T1w.nii.gz")
        scan(folder, f"sub-{sub}/anat/sub-{sub}_T2w.nii.gz")
    scan(folder, "sub-03/anat/sub-03_acq-fast_T1w.nii.gz")
    scan(folder, "sub-02/anat/sub-02_acq-highres_rec-norm_T1w.nii.gz")
    table(folder, "participant_id age sex", *(f"sub-0{i} {30 + i} F" for i in (1, 2, 3)))
    with pytest.warns(UserWarning):
        assert names(read(folder)) == [f"sub-0{i}_acq-highres_T1w.nii.gz" for i in (1, 2, 3)]


def ages_as_published(folder: Path) -> None:
    """Above 89 they are hidden, some are ranges, some have a comma, one is missing."""
    ages = ["89+", "35-40", "26,9", "n/a", "41"]
    for i, _ in enumerate(ages):
        scan(folder, f"sub-{i}/anat/sub-{i}_T1w.nii.gz")
    table(folder, "participant_id age sex", *(f"sub-{i} {age} F" for i, age in enumerate(ages)))
    with pytest.warns(UserWarning, match="open-ended|range"):
        found = read(folder)["age"].tolist()
    assert found[:3] == [89, 37.5, 26.9] and np.isnan(found[3]) and found[4] == 41


def no_participants(folder: Path) -> None:
    """Without covariates it is a table; with them one message names the file to add."""
    scan(folder, "sub-01/anat/sub-01_T1w.nii.gz")
    assert len(read_scans(DataConfig(bids=folder, grid={"shape": (8, 8, 8), "spacing_mm": 20}), ())) == 1
    with pytest.raises(InputError) as error:
        read(folder)
    assert "participants.tsv" in str(error.value) and "data.participants" in str(error.value)


def derivatives_with_spaces(folder: Path) -> None:
    """A pipeline's scans in two spaces, with masks; tables come from the raw dataset."""
    made = folder / "derivatives/pipe"
    for sub in ("01", "02"):
        scan(folder, f"sub-{sub}/anat/sub-{sub}_T1w.nii.gz")
        scan(made, f"sub-{sub}/anat/sub-{sub}_desc-preproc_T1w.nii.gz")
        for kind in ("desc-preproc_T1w", "desc-brain_mask"):
            scan(made, f"sub-{sub}/anat/sub-{sub}_space-MNI152NLin2009cAsym_res-2_{kind}.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    assert names(read(folder)) == ["sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz"]  # derivatives are not mixed in
    wanted = {"space": "MNI152NLin2009cAsym", "desc": "preproc"}
    data = {"derivatives": made, "filter": wanted, "mask": {"desc": "brain", "suffix": "mask"}}
    found = read(folder, **data)
    assert all("space-MNI152NLin2009cAsym" in name for name in names(found)) and found["age"].tolist() == [30, 40]
    masks = find_masks(DataConfig(bids=folder, grid={"shape": (8, 8, 8), "spacing_mm": 20}, **data), found["path"])
    assert [mask.name[:6] for mask in masks] == ["sub-01", "sub-02"]


def symbolic_links(folder: Path) -> None:
    """As DataLad has them: into a store inside of the dataset; one was never fetched, one leads outside."""
    for sub in ("01", "02", "03"):
        target = scan(folder, f".git/annex/objects/{sub}.nii.gz") if sub != "02" else folder / ".git/annex/objects/none.nii.gz"
        link = folder / f"sub-{sub}/anat/sub-{sub}_T1w.nii.gz"
        link.parent.mkdir(parents=True)
        os.symlink(os.path.relpath(target, link.parent), link)
    table(folder, "participant_id age sex", *(f"sub-0{i} 30 F" for i in (1, 2, 3)))
    assert len(read(folder)) == 3  # the one that is not there fails alone, when it is prepared


def unpadded_ids(folder: Path) -> None:
    """A spreadsheet took the zeros; two labels differ by zeros alone in the other dataset."""
    for sub in ("001", "002", "010"):
        scan(folder / "a", f"sub-{sub}/anat/sub-{sub}_T1w.nii.gz")
    table(folder / "a", "participant_id age sex", "1 30 F", "2 40 M", "10 50 F")
    assert read(folder / "a")["age"].tolist() == [30, 40, 50]
    for sub in ("1", "01"):
        scan(folder / "b", f"sub-{sub}/anat/sub-{sub}_T1w.nii.gz")
    table(folder / "b", "participant_id age sex", "sub-1 30 F", "sub-01 40 M")
    assert read(folder / "b").set_index("subject")["age"].to_dict() == {"1": 30, "01": 40}


def packed_and_unpacked(folder: Path) -> None:
    """Some scans are .nii, some .nii.gz; where both are there, they are one scan."""
    scan(folder, "sub-01/anat/sub-01_T1w.nii.gz")
    scan(folder, "sub-02/anat/sub-02_T1w.nii")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    assert names(read(folder)) == ["sub-01_T1w.nii.gz", "sub-02_T1w.nii"]
    scan(folder, "sub-02/anat/sub-02_T1w.nii.gz")
    with pytest.warns(UserWarning):
        assert len(read(folder)) == 2


def other_words_in_tables(folder: Path) -> None:
    """`Age`, and sexes as numbers: the message names the columns that are there, and that numbers need a meaning."""
    for sub in ("01", "02"):
        scan(folder, f"sub-{sub}/anat/sub-{sub}_T1w.nii.gz")
    table(folder, "participant_id Age gender", "sub-01 30 1", "sub-02 40 2")
    with pytest.raises(InputError) as error:
        read(folder)
    assert "Age" in str(error.value)
    age = AGE.model_copy(update={"column": "Age"})
    with pytest.raises(InputError) as error:
        read(folder, age, SEX.model_copy(update={"column": "gender"}))
    assert "'1'" in str(error.value) and "categories" in str(error.value)
    sex = CovariateConfig(name="sex", kind="categorical", column="gender", categories={"F": [2], "M": [1]})
    assert read(folder, age, sex)["sex"].tolist() == ["M", "F"]


def other_contrasts_only(folder: Path) -> None:
    """No T1w at all: the message says what was looked for, and with which key another is found."""
    scan(folder, "sub-01/anat/sub-01_T2w.nii.gz")
    scan(folder, "sub-01/func/sub-01_task-rest_bold.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F")
    with pytest.raises(InputError, match=r"sub-\*_T1w(.|\n)*data.suffix"):
        read(folder)
    assert names(read(folder, suffix="T2w")) == ["sub-01_T2w.nii.gz"]


def rows_without_scans_and_scans_without_rows(folder: Path) -> None:
    """A person who dropped out, and one who is not in the table: both are named, and the scan is left out."""
    scan(folder, "sub-01/anat/sub-01_T1w.nii.gz")
    scan(folder, "sub-03/anat/sub-03_T1w.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    with pytest.warns(UserWarning, match="sub-03|03"):
        found = read(folder)
    assert found["age"].tolist() == [30] and found["sex"].tolist() == ["F"]


def parts_of_one_image(folder: Path) -> None:
    """Chunks are parts of an image, phases are none, and a copy with a blank in its name is no scan."""
    for name in ("chunk-1", "chunk-2"):
        scan(folder, f"sub-01/anat/sub-01_{name}_T1w.nii.gz")
    for name in ("part-mag", "part-phase"):
        scan(folder, f"sub-02/anat/sub-02_{name}_T1w.nii.gz")
    scan(folder, "sub-02/anat/sub-02_part-mag_T1w 2.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    with pytest.warns(UserWarning, match="chunk-2: the lowest chunk is used, which is a part of the image; join"):
        assert names(read(folder)) == ["sub-01_chunk-1_T1w.nii.gz", "sub-02_part-mag_T1w.nii.gz"]


def tasks_in_the_scanner(folder: Path) -> None:
    """Scans of heads that were told to move: entities that are rare in anatomy can be asked for."""
    for task, rec in itertools.product(("nodding", "still"), ("plain", "corrected")):
        for sub in ("01", "02"):
            scan(folder, f"sub-{sub}/anat/sub-{sub}_task-{task}_acq-a_rec-{rec}_T1w.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    with pytest.warns(UserWarning, match="task-still: the task that most sessions have goes first, of equals"):
        assert len(read(folder)) == 2
    found = read(folder, filter={"task": "still", "rec": "plain"})
    assert names(found) == [f"sub-0{i}_task-still_acq-a_rec-plain_T1w.nii.gz" for i in (1, 2)]


def native_space_by_name(folder: Path) -> None:
    """A derivative that names native space: its scans there are used, not those in the template's."""
    for sub in ("01", "02"):
        scan(folder, f"sub-{sub}/anat/sub-{sub}_space-individual_desc-biascor_T1w.nii.gz")
        scan(folder, f"sub-{sub}/anat/sub-{sub}_space-IXI549Space_desc-preproc_T1w.nii.gz")
    table(folder, "participant_id age sex", "sub-01 30 F", "sub-02 40 M")
    with pytest.warns(UserWarning, match="space-IXI549Space: only scans in native space"):
        assert names(read(folder)) == [f"sub-0{i}_space-individual_desc-biascor_T1w.nii.gz" for i in (1, 2)]


def tables_of_other_names(folder: Path) -> None:
    """A table of visits beside the scans, one of questionnaires, and identifiers and sexes that are called otherwise."""
    for ses in ("1", "2"):
        scan(folder, f"sub-01/ses-{ses}/anat/sub-01_ses-{ses}_T1w.nii.gz")
    visits = "participant_id session_id age sex", "sub-01 ses-1 29 F", "sub-01 ses-2 30 F"
    table(folder, *visits, name="participant+sessions.tsv")
    table(folder, "participant_id score", "sub-01 3", name="phenotype/test.tsv")
    with pytest.raises(InputError, match=r"data.participants: PATH` \(participant\+sessions.tsv has age and sex\)"):
        read(folder)
    assert read(folder, participants=folder / "participant+sessions.tsv")["age"].tolist() == [29, 30]
    table(folder, "subject_id age gender", "sub-01 30 female")
    with pytest.raises(InputError, match=r"did you mean 'subject_id'\? name the right one with `data.subject_column: COLUMN`"):
        read(folder)
    with pytest.raises(InputError, match=r"did you mean 'gender'\? name the right one with `column: COLUMN` in the covariate"):
        read(folder, subject_column="subject_id")
    sex = SEX.model_copy(update={"column": "gender"})
    assert read(folder, AGE, sex, subject_column="subject_id")["sex"].tolist() == ["F", "F"]


def sessions_of_other_names(folder: Path) -> None:
    """Moods of each session under `session`: nothing of it is asked for, so it stops nobody, until something is."""
    for ses in ("1", "2"):
        scan(folder, f"sub-01/ses-{ses}/anat/sub-01_ses-{ses}_T1w.nii.gz")
    table(folder, "participant_id sex age_at_first_scan_years", "sub-01 F 29")
    table(folder, "session mood", "ses-1 5", "ses-2 7", name="sub-01/sub-01_sessions.tsv")
    with pytest.raises(InputError, match="did you mean 'age_at_first_scan_years'"):
        read(folder)
    age = AGE.model_copy(update={"column": "age_at_first_scan_years"})
    assert read(folder, age, SEX)["age"].tolist() == [29, 29]
    mood = CovariateConfig(name="mood", kind="continuous", unit="points")
    with pytest.raises(InputError, match=r"did you mean 'session'\? name the right one with `data.session_column: COLUMN`"):
        read(folder, SEX, mood)
    assert read(folder, SEX, mood, session_column="session")["mood"].tolist() == [5, 7]


def templates_and_people_without_brains(folder: Path) -> None:
    """An atlas has images of no subject; the empty room is a subject without one."""
    scan(folder / "a", "tpl-MNI152/anat/tpl-MNI152_res-1_T1w.nii.gz")
    scan(folder / "a", "sub-01/anat/sub-01_UNIT1.nii.gz")
    with pytest.raises(
        InputError, match=r"have the suffixes UNIT1; (.|\n)*res-1_T1w.nii.gz is of no subject(.|\n)*data.table"
    ):
        read(folder / "a")
    scan(folder / "b", "sub-0001/anat/sub-0001_T1w.nii.gz")
    table(folder / "b", "participant_id age sex hand", "sub-emptyroom n/a n/a n/a", "sub-0001 25 Male Right", "")
    with pytest.warns(UserWarning, match="1 subjects without a T1w scan .sub-emptyroom"):
        assert read(folder / "b")["sex"].tolist() == ["M"]


KINDS = (
    *(several_sessions, several_runs, several_acquisitions, ages_as_published, no_participants, derivatives_with_spaces),
    *(symbolic_links, unpadded_ids, packed_and_unpacked, other_words_in_tables, other_contrasts_only),
    *(rows_without_scans_and_scans_without_rows, parts_of_one_image, tasks_in_the_scanner, native_space_by_name),
    *(tables_of_other_names, sessions_of_other_names, templates_and_people_without_brains),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layout(tmp_path, kind: Callable[[Path], None]):
    kind(tmp_path)
