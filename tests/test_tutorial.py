"""The tutorial on real data: its script, its config and its first commands, on a stand-in with the dataset's layout."""

import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import command_line

from ldm3d.config.read import load_config
from ldm3d.data.preparing import load_info, load_prepared, read_scan_table
from ldm3d.data.registration import _template
from ldm3d.geometry import resample

PAGE = (Path(__file__).parents[1] / "docs/tutorial-real-data.md").read_text()
NAMES = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI013-HH-1212", "IXI025-Guys-0852", "IXI035-IOP-0873")
# Keeps the brain, which the stand-ins' heads have above 200; a shell of 100 around it is the rest of the head
STRIP = """#!{python}
import sys
import nibabel as nib, numpy as np
from scipy import ndimage
image = nib.load(sys.argv[sys.argv.index("-i") + 1])
mask = ndimage.binary_closing(np.asarray(image.dataobj) > 200, iterations=2)
nib.save(nib.Nifti1Image(mask.astype(np.uint8), image.affine), sys.argv[sys.argv.index("-m") + 1])
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def ixi(tmp_path, monkeypatch) -> Path:
    """Heads made of the template, tilted, in IXI's folders, with its spreadsheet; and a program called mri_synthstrip."""
    voxels, affine = _template("mni152")
    (tmp_path / "ixi/T1").mkdir(parents=True)
    coarse = np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = -90, -126, -72
    for i, name in enumerate(NAMES):
        brain = resample(voxels, affine, coarse, (46, 56, 46))[0]
        brain = 250 + 500 * brain / brain.max() * (brain > 0) - 250 * (brain <= 0.02 * brain.max())
        grid = np.indices(brain.shape).transpose(1, 2, 3, 0) - (np.array(brain.shape) - 1) / 2
        head = np.where((np.linalg.norm(grid / (22, 27, 22), axis=-1) < 1) & (brain < 200), 100, brain)
        tilt, angle = np.eye(4), np.radians(8 * (i - 2))
        tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        tilt[:3, 3] = 5 * i, -3 * i, 10
        nib.save(nib.Nifti1Image((head + i).astype(np.float32), tilt @ coarse), tmp_path / f"ixi/T1/{name}-T1.nii.gz")
    people = {"IXI_ID": [2, 12, 12, 13, 25], "SEX_ID (1=m, 2=f)": [2, 1, 1, 1, 2], "AGE": [35.8, 38.78, 38.78, 50.1, 46.7]}
    pd.DataFrame(people).to_excel(tmp_path / "ixi/IXI.xlsx", index=False)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/mri_synthstrip"
    program.write_text(STRIP.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_first_steps_work_as_they_are_written(ixi, capsys):
    exec(compile(blocks("python")[0], "ixi_table.py", "exec"), {})
    table = pd.read_csv("ixi/scans.csv")
    assert table["participant_id"].tolist() == [name.split("-")[0] for name in NAMES]
    assert table["site"].tolist() == ["Guys", "HH", "HH", "Guys", "IOP"]
    assert table["sex"].tolist()[:4] == ["F", "M", "M", "F"] and table["age"].isna().tolist() == [
        *([False] * 4),
        True,
    ]
    (written,) = (text for text in blocks("yaml") if "name: ixi" in text)
    Path("ixi.yaml").write_text(written)
    small = ["--set", "data.grid.shape=[24, 28, 24]", "--set", "data.grid.spacing_mm=7.5", "--set", "data.splits.stratify=[]"]
    small += ["--set", "data.exclude=[IXI013, IXI035]", "--set", "data.splits={validation: 0, test: 0}"]  # three are enough
    command_line("check", "ixi.yaml", "--no-times", *small)
    assert capsys.readouterr().out.rstrip().endswith("ready")
    command_line("prepare", "ixi.yaml", "--workers", 1, *small)
    assert "3 scans prepared, 0 unchanged, 0 failed" in capsys.readouterr().out
    config = load_config("ixi.yaml", small[1::2])
    assert (config.prepared_folder / "report.html").is_file()
    volumes = [load_prepared(config, key) for key in read_scan_table(config)["key"]]
    for key in read_scan_table(config)["key"]:
        info = load_info(config, key)
        assert info["registration"]["correlation"] > 0.9
        assert info["brain_extraction"]["command"].startswith("mri_synthstrip") and "bias_correction" in info
    alike = [np.corrcoef(volumes[0].ravel(), other.ravel())[0, 1] for other in volumes[1:]]
    assert min(alike) > 0.97  # one brain in three poses


def test_its_commands_are_commands():
    """Every one of them, with options that exist: those that are not run above."""
    from typer.testing import CliRunner

    from ldm3d.cli import app

    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        if line.startswith("ldm3d "):
            _, command, *words = line.split()
            shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
            covariates = ("--age", "--sex", "--site")
            assert all(word in shown for word in words if word.startswith("--") and word not in covariates), line
