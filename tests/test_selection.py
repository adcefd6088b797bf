"""Which files of a BIDS dataset are its scans: one a session, the one that a neuroimager expects, and what is said then."""

import itertools
import random

import pytest

from ldm3d.config.read import load_config
from ldm3d.data.bids import read_scans
from ldm3d.data.selection import Candidate, choose_scans
from ldm3d.errors import InputError

LONG = {"acq": "acquisition", "ce": "ceagent", "rec": "reconstruction"}


def candidate(stem, extension=".nii.gz"):
    """Of a name without suffix, "sub-1_run-2", as PyBIDS reads it."""
    entities = dict(part.split("-") for part in stem.split("_"))
    named = {{"sub": "subject", "ses": "session", **LONG}.get(name, name): value for name, value in entities.items()}
    return Candidate.of(f"/{stem}_T1w{extension}", named)


def chosen(*stems, **wanted):
    found = choose_scans([*map(candidate, stems)], wanted, "T1w")
    return [scan.path.removeprefix("/").removesuffix("_T1w.nii.gz") for scan in found]


@pytest.mark.parametrize(
    "stems, expected, message",
    [
        (["sub-1_run-10", "sub-1_run-2", "sub-1_run-03"], "sub-1_run-2", r"run-10: the lowest run is used \(1 files\)"),
        (["sub-1_rec-norm", "sub-1"], "sub-1", "rec-norm: a scan without rec goes first"),
        (["sub-1_echo-2", "sub-1_echo-1"], "sub-1_echo-1", "echo-2: the first echo is used"),
        (["sub-1_part-phase", "sub-1_part-mag"], "sub-1_part-mag", "part-phase: only magnitudes are used"),
        (["sub-1_part-phase", "sub-1"], "sub-1", r"set data.filter, such as {part: phase}"),
        (["sub-1_ce-gadolinium", "sub-1_run-2"], "sub-1_run-2", "ce-gadolinium: only scans without contrast agent are used"),
        (["sub-1_acq-b", "sub-1_acq-a"], "sub-1_acq-a", "acq-b: the acq that most sessions have goes first"),
        (["sub-1_acq-fast", "sub-1"], "sub-1", "acq-fast"),
        (["sub-1_desc-brain", "sub-1_desc-preproc"], "sub-1_desc-preproc", "desc-brain: a scan without desc goes first"),
        (
            ["sub-1_desc-preproc", "sub-1_space-MNI_desc-preproc", "sub-1_space-MNI_res-2_desc-preproc"],
            "sub-1_desc-preproc",
            r"2 T1w files are left aside.*\n  space-MNI: only scans in native space are used \(2 files\)",
        ),
        (["sub-1_space-MNI_res-2", "sub-1_space-MNI"], "sub-1_space-MNI", "res-2: a scan without res goes first"),
    ],
)
def test_one_scan_a_session_whatever_the_order_of_files(stems, expected, message):
    for order in itertools.permutations(stems):
        with pytest.warns(UserWarning, match=message) as caught:
            assert chosen(*order) == [expected]
        assert len(caught) == 1


def test_one_scan_each_is_no_news(recwarn):
    stems = ["sub-1_ses-a_run-1", "sub-1_ses-b_acq-x", "sub-2_ses-a_rec-norm"]
    assert chosen(*stems) == stems and not recwarn


def test_acquisition_that_most_sessions_have_goes_first():
    mprage = [f"sub-{i}_acq-mprage" for i in range(5)]
    with pytest.warns(UserWarning, match="acq-fast: the acq that most sessions have"):
        assert chosen("sub-0_acq-fast", *mprage) == mprage


def test_session_without_a_scan_of_the_kind_is_left_out_and_named():
    with pytest.warns(UserWarning, match="1 sessions have no other scan and are left out: sub-2 ses-b"):
        assert chosen("sub-1_ses-a", "sub-2_ses-b_space-MNI") == ["sub-1_ses-a"]


def test_space_that_most_sessions_have_where_none_is_native():
    spaces = ["sub-1_space-MNI", "sub-2_space-MNI", "sub-2_space-fsl", "sub-3_space-fsl", "sub-4_space-fsl"]
    with pytest.warns(UserWarning, match="space-MNI: most sessions have space-fsl, and only that is used"):
        assert chosen(*spaces) == spaces[2:]


def test_filter_asks_for_others():
    files = ["sub-1", "sub-1_run-2", "sub-1_space-MNI", "sub-1_space-MNI_res-2", "sub-1_part-phase"]
    assert chosen(*files, part="phase") == ["sub-1_part-phase"]
    assert chosen(*files, space="MNI", res=None) == ["sub-1_space-MNI"]
    assert chosen(*files, space="MNI", res=2) == ["sub-1_space-MNI_res-2"]
    assert chosen(*files, run="02") == ["sub-1_run-2"]
    with pytest.warns(UserWarning, match="res-2: a scan without"):
        assert chosen(*files, space="MNI") == ["sub-1_space-MNI"]


def test_list_gives_a_scan_of_each_value():
    files = ["sub-1_run-1", "sub-1_run-2", "sub-1_run-3", "sub-2_run-2"]
    random.Random(0).shuffle(files)
    assert chosen(*files, run=(1, 2)) == ["sub-1_run-1", "sub-1_run-2", "sub-2_run-2"]
    assert chosen("sub-1_space-MNI", "sub-1", "sub-2", space=(None, "MNI")) == ["sub-1", "sub-1_space-MNI", "sub-2"]


def test_same_name_packed_and_not_is_one_scan():
    with pytest.warns(UserWarning, match="same entities"):
        (scan,) = choose_scans([candidate("sub-1"), candidate("sub-1", ".nii")], {}, "T1w")
    assert scan.path.endswith(".nii")


def test_filter_that_leaves_nothing_says_what_there_is():
    with pytest.raises(InputError, match=r"data.filter \(space: MNI2\) leaves none of 3 .*run: null, 2; space: MNI, null"):
        chosen("sub-1_space-MNI", "sub-2_space-MNI", "sub-2_run-2", space="MNI2")
    with pytest.raises(InputError, match=r"none of 1 T1w files is a magnitude image.*part: phase"):
        chosen("sub-1_part-phase")


CONFIG = """
name: test
output: {folder}/run
data: {{bids: {folder}, grid: {{shape: [8, 8, 8], spacing_mm: 2}}, filter: {filter}}}
covariates: []
autoencoder:
  network: {{latent_channels: 2, downsampling: 4, channels: [8, 8]}}
  training: &training {{steps: 1, batch_size: 1, learning_rate: 1}}
diffusion: {{network: {{channels: [8], attention: [false]}}, training: *training}}
"""


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("{}", "sub-01_desc-preproc_T1w.nii.gz"),
        ("{space: MNI152NLin2009cAsym, res: null}", "sub-01_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz"),
        ("{space: MNI152NLin2009cAsym, res: 2}", "sub-01_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz"),
    ],
)
@pytest.mark.filterwarnings("ignore:2 T1w files are left aside")
def test_derivatives_of_fmriprep(wanted, expected, tmp_path):
    space = "space-MNI152NLin2009cAsym"
    for rest in ("desc-preproc", f"{space}_desc-preproc", f"{space}_res-2_desc-preproc"):
        path = tmp_path / f"sub-01/anat/sub-01_{rest}_T1w.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_name(f"sub-01_{rest.replace('preproc', 'brain')}_mask.nii.gz").touch()
    description = (
        '{"Name": "fMRIPrep", "BIDSVersion": "1.4.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}'
    )
    (tmp_path / "dataset_description.json").write_text(description)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, filter=wanted))
    (path,) = read_scans(load_config(tmp_path / "config.yaml").data, [])["path"]
    assert path.endswith(expected)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("{acquisition: x}", "data.filter: 'acquisition' is no entity .*did you mean 'acq'"),
        ("{run: ../x}", "data.filter: run is '../x'; give a label"),
        ("{run: {}}", "data.filter: run is {}"),
        ("{run: []}", r"data.filter: run is \[\]"),
    ],
)
def test_filter_is_checked_where_the_config_is_read(wanted, message, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, filter=wanted))
    with pytest.raises(InputError, match=message) as caught:
        load_config(tmp_path / "config.yaml")
    assert "constrained" not in str(caught.value)
