"""Further tables: joined on subject and session, other programs' layouts recognised, mm3 read as ml, loose rows counted."""

import warnings

import numpy as np
import pandas as pd
import pytest

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.joined import in_unit
from ldm3d.data.layouts import recognise
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError

GRID = {"shape": (8, 8, 8), "spacing_mm": 2}
AGE = CovariateConfig(name="age", kind="continuous", unit="years")
SEX = CovariateConfig(name="sex", kind="categorical", categories=("F", "M"))
VENTRICLES = CovariateConfig(name="ventricular_volume_ml", kind="continuous", unit="ml")
BRAIN = CovariateConfig(name="brain_volume_ml", kind="continuous", unit="ml")


def volume(name, column, unit="ml"):
    return CovariateConfig(name=name, column=column, kind="continuous", unit=unit)


@pytest.fixture
def scans(tmp_path):
    """(subjects or (subject, session) ..., tables) -> the config of a table of scans with ages, and further tables."""

    def make(who, tables, **settings):
        names = []
        for name, text in tables.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text)
            names.append(str(tmp_path / name))
        pairs = [each if isinstance(each, tuple) else (each, "") for each in who]
        rows = [f"{s},{v},{s}{v}.nii" for s, v in pairs]
        (tmp_path / "scans.csv").write_text("\n".join(["participant_id,session_id,path", *rows]) + "\n")
        given = {"covariates_tables": names, **settings}
        return DataConfig(table=tmp_path / "scans.csv", grid=GRID, **given)

    return make


def quiet(data, covariates):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = read_scans(data, covariates)
    return frame, [str(each.message) for each in caught]


def test_tables_are_joined_on_subject_and_session(scans):
    data = scans(
        [("01", "a"), ("01", "b"), ("02", "a"), ("03", "a")],
        {
            "sex.csv": "participant_id,sex\nsub-01,F\n2,M\nsub-03,M\nsub-99,F\n",  # a spreadsheet took the zero of 02
            "age.tsv": "participant_id\tsession_id\tage\nsub-01\tses-b\t71.5\nsub-01\tses-a\t70\n02\ta\t33\n02\tz\t34\n",
        },
    )
    frame, said = quiet(data, [AGE, SEX])
    np.testing.assert_array_equal(frame["age"], [70, 71.5, 33, np.nan])
    assert list(frame["sex"]) == ["F", "F", "M", "M"]
    assert any("sex.csv has 1 of 4 rows that match no scan (sub-99)" in text for text in said)
    loose = next(text for text in said if "age.tsv has" in text)
    assert "no row for 1 of 3 subjects (sub-03) and 1 of 4 rows that match no scan (sub-02 ses-z)" in loose
    assert any("age counts as missing for 1 scans" in text and "sub-03" in text for text in said)


def test_another_visit_s_volume_is_never_taken(scans):
    data = scans(
        [("01", "a"), ("02", "b")], {"t.tsv": "participant_id\tsession_id\tage\nsub-01\tses-a\t70\nsub-02\tses-a\t60\n"}
    )
    np.testing.assert_array_equal(quiet(data, [AGE])[0]["age"], [70, np.nan])


ASEG = (
    "Measure:volume\tLeft-Lateral-Ventricle\tLeft-Inf-Lat-Vent\tRight-Lateral-Ventricle\tRight-Inf-Lat-Vent\t"
    "Left-Hippocampus\tBrainSegVolNotVent\tBrainSegVol-to-eTIV\tlhSurfaceHoles\tEstimatedTotalIntraCranialVol\n"
    "sub-01_ses-a\t10000\t500\t11000\t500.5\t4000.5\t1100000\t0.7\t21\t1500000\n"
    "sub-02_ses-a.long.sub-02\t20000\t600\t21000\t600\t3500\t1000000\t0.69\t30\t1450000.25\n"
)


def test_asegstats2table(scans):
    data = scans([("01", "a"), ("02", "a")], {"aseg.tsv": ASEG})
    asked = [
        VENTRICLES,
        BRAIN,
        volume("hippocampus_ml", "Left-Hippocampus"),
        volume("etiv", "EstimatedTotalIntraCranialVol", ""),
    ]
    holes = CovariateConfig(name="holes", column="lhSurfaceHoles", kind="continuous", unit="ml")
    frame, said = quiet(data, [*asked, holes])
    np.testing.assert_allclose(frame["ventricular_volume_ml"], [22.0005, 42.2])
    np.testing.assert_allclose(frame["brain_volume_ml"], [1100, 1000])
    np.testing.assert_allclose(frame["hippocampus_ml"], [4.0005, 3.5])
    np.testing.assert_allclose(frame["etiv"], [1500000, 1450000.25])  # no unit asked, so as it is, and said
    np.testing.assert_allclose(frame["holes"], [21, 30])  # no volume
    (divided,) = [text for text in said if "divided by 1000, as" in text]
    assert "ventricular_volume_ml from" in divided and "hippocampus_ml from 'Left-Hippocampus' of aseg.tsv" in divided
    assert "etiv" not in divided and any("stay in mm3: etiv from" in text for text in said)


STATS = """# Title Segmentation Statistics
# subjectname {name}
# Measure BrainSeg, BrainSegVol, Brain Segmentation Volume, 1200000.0, mm^3
# Measure BrainSegNotVent, BrainSegVolNotVent, Brain Segmentation Volume Without Ventricles, {brain}, mm^3
# Measure BrainSegVol-to-eTIV, BrainSegVol-to-eTIV, Ratio of BrainSegVol to eTIV, 0.7, unitless
# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange
  1   4     9000    9000.5  Left-Lateral-Ventricle           22.9  12.1  1.0  80.0  79.0
  2  43     8000    8000.5  Right-Lateral-Ventricle          22.9  12.1  1.0  80.0  79.0
"""


def test_aseg_stats_of_every_subject(scans, tmp_path):
    for name, brain in (("sub-01", 1.1e6), ("sub-02", 1.0e6)):
        (tmp_path / "fs" / name / "stats").mkdir(parents=True)
        (tmp_path / "fs" / name / "stats/aseg.stats").write_text(STATS.format(name=name, brain=brain))
    data = scans(["01", "02"], {"fs/sub-*/stats/aseg.stats": None})
    frame, _ = quiet(data, [VENTRICLES, BRAIN])
    np.testing.assert_allclose(frame["ventricular_volume_ml"], [17.001, 17.001])
    np.testing.assert_allclose(frame["brain_volume_ml"], [1100, 1000])


SYNTHSEG = (
    "subject,total intracranial,left cerebral white matter,left cerebral cortex,left lateral ventricle,"
    "left inferior lateral ventricle,right lateral ventricle,right inferior lateral ventricle,3rd ventricle,csf\n"
    "sub-01_ses-a_T1w,1500000,200000,250000,9000,400,8000,300,1000,300000\n"
)


def test_synthseg(scans):
    frame, _ = quiet(scans([("01", "a")], {"vol.csv": SYNTHSEG}), [VENTRICLES, BRAIN, volume("icv_ml", "total intracranial")])
    assert list(frame.iloc[0][["ventricular_volume_ml", "brain_volume_ml", "icv_ml"]]) == [17.7, 450, 1500]


@pytest.mark.parametrize(
    "who", [[("ADNI011S0002", "M000"), ("ADNI011S0002", "M012")], [("011S0002", "bl"), ("011S0002", "m12")]]
)
def test_adnimerge(who, scans):
    text = (
        "RID,PTID,VISCODE,EXAMDATE,AGE,PTGENDER,Years_bl,Ventricles,Hippocampus\n"
        "2,011_S_0002,bl,2005-09-08,74.3,Male,0,118233,8336\n2,011_S_0002,m12,2006-09-12,74.3,Male,1.01,120000,\n"
        "3,011_S_0003,bl,2005-09-12,81.3,Female,0,84599,5319\n"
    )
    frame, said = quiet(scans(who, {"ADNIMERGE.csv": text}), [AGE, SEX, volume("ventricles_ml", "Ventricles")])
    np.testing.assert_allclose(frame["age"], [74.3, 75.31])
    assert list(frame["sex"]) == ["M", "M"] and list(frame["ventricles_ml"]) == [118.233, 120]
    assert any("a table of ADNIMERGE) has 1 of 3 rows that match no scan (sub-ADNI011S0003 ses-M000)" in text for text in said)


@pytest.mark.parametrize(
    "who, text, ages",
    [
        (
            ["OAS10001", "OAS10002"],
            "ID,M/F,Hand,Age,eTIV,nWBV\nOAS1_0001_MR1,F,R,74,1344,0.743\nOAS1_0002_MR1,M,R,55,1147,0.81\n",
            [74, 55],
        ),
        (
            [("OAS20001", "MR1"), ("OAS20001", "MR2")],
            "Subject ID,MRI ID,Visit,M/F,Age,eTIV\nOAS2_0001,OAS2_0001_MR1,1,F,87,1987\nOAS2_0001,OAS2_0001_MR2,2,F,88,2004\n",
            [87, 88],
        ),
        (
            [("OAS30001", "d0129"), ("OAS30001", "d2430")],
            "OASISID,OASIS_session_label,days_to_visit,age at visit\nOAS30001,OAS30001_UDSb4_d0129,129,65.5\n"
            "OAS30001,OAS30001_UDSb4_d2430,2430,71.8\n",
            [65.5, 71.8],
        ),
    ],
)
def test_oasis(who, text, ages, scans):
    frame, _ = quiet(scans(who, {"oasis.csv": text}), [AGE])
    assert list(frame["age"]) == ages


def test_workbooks_are_tables(tmp_path):
    frame = pd.DataFrame(
        {"participant_id": ["sub-01", "02"], "age": [70, 71.5], "note": ["0012", None], "on": pd.Timestamp("2024-05-31")}
    )
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    read = read_table(tmp_path / "t.xlsx")
    assert read.to_dict("list") == {
        "participant_id": ["sub-01", "02"],
        "age": ["70", "71.5"],
        "note": ["0012", ""],
        "on": ["2024-05-31"] * 2,
    }
    assert list(read.index) == [2, 3]


def test_broken_workbooks_are_one_message(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"not a workbook")
    with pytest.raises(InputError, match="cannot be read as a workbook"):
        read_table(tmp_path / "t.xlsx")
    pd.DataFrame({"a": [1]}).to_excel(tmp_path / "u.xlsx")
    (tmp_path / "u.xlsx").write_bytes((tmp_path / "u.xlsx").read_bytes()[:-700])
    with pytest.raises(InputError, match="cannot be read as a workbook"):
        read_table(tmp_path / "u.xlsx")


def test_units_in_names_of_columns():
    layout = recognise(pd.DataFrame({"id": ["01"], "gm (mm^3)": ["1"], "wm_ml": ["2"], "html": ["3"]}), "id", "ses")
    assert layout.units == {"gm (mm^3)": "mm3", "wm_ml": "ml"}
    assert [in_unit("1500", "mm3", unit) for unit in ("ml", "mL", "cm3", "mm3", "")] == ["1.5", "1.5", "1.5", "1500", "1500"]
    assert in_unit("n/a", "mm3", "ml") == "n/a" and in_unit("7", "ml", "ml") == "7"


@pytest.mark.parametrize(
    "tables, message",
    [
        ({"t.csv": "participant_id,age\n77,5\n"}, "row for none of the 2 subjects: it has sub-77, the scans are of sub-01"),
        ({"t.csv": "subject,age\n01,5\n"}, "whose rows are they"),
        ({"t.csv": "participant_id,age\n01,5\nsub-01,6\n"}, "duplicates: sub-01 on lines 2, 3"),
        ({"t.csv": "participant_id,Age\n01,5\n"}, "no column 'age' .*covariate age; nor has t.csv"),
        ({"t.csv": None}, "no table"),
        ({"fs/*/aseg.stats": None}, "no file is called"),
        ({"fs/sub-01/stats/aseg.stats": "# nothing\n"}, "holds no volumes"),
    ],
)
def test_bad_tables_are_one_message(tables, message, scans):
    with pytest.raises(InputError, match=message):
        quiet(scans(["01", "02"], tables), [AGE])


def test_what_was_there_before_comes_first(tmp_path):
    """participants.tsv gives the column; a further table with the same one does not replace it."""
    for subject in ("01", "02"):
        (tmp_path / f"d/sub-{subject}/anat").mkdir(parents=True)
        (tmp_path / f"d/sub-{subject}/anat/sub-{subject}_T1w.nii.gz").touch()
    (tmp_path / "d/dataset_description.json").write_text('{"Name": "test", "BIDSVersion": "1.10.0"}')
    (tmp_path / "d/participants.tsv").write_text("participant_id\tage\nsub-01\t50\nsub-02\t60\n")
    (tmp_path / "t.csv").write_text("participant_id,age,sex\n01,1,F\n02,2,M\n")
    data = DataConfig(bids=tmp_path / "d", grid=GRID, covariates_tables=[str(tmp_path / "t.csv")])
    frame, said = quiet(data, [AGE, SEX])
    assert list(frame["age"]) == [50, 60] and list(frame["sex"]) == ["F", "M"] and not said
