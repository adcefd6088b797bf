"""Brain extraction by a command, with stand-ins that the tests write: what is run, what comes back, what fails."""

import os
import sys

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import command_line, tiny_settings
from scipy import ndimage

from ldm3d.config.data import BrainExtractionConfig
from ldm3d.config.read import load_config
from ldm3d.data.extraction import extract, find_tool
from ldm3d.data.nifti import read_volume
from ldm3d.data.preparing import load_info, load_prepared, read_scan_table, restore_scan
from ldm3d.errors import InputError

SHAPE = (30, 36, 30)
# Whole heads: a brain of 700 to 900 in a skull of 300; the stand-in keeps what is above 500
STAND_IN = """#!{python}
import os, sys
import nibabel as nib
import numpy as np
if "--version" in sys.argv:
    print("stand-in 1.2")
    raise SystemExit
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
image = nib.load(sys.argv[1 + sys.argv[1:].index("-i") + 1])
data = np.asarray(image.dataobj)
if data.max() > 5000:
    sys.exit("too bright to be a head")
nib.save(nib.Nifti1Image((data > 500).astype(np.uint8), image.affine), sys.argv[1 + sys.argv[1:].index("-m") + 1])
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Five whole heads as BIDS, a config, and mri_synthstrip's stand-in on PATH, which writes a log."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "mri_synthstrip"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "log")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("FREESURFER_HOME", raising=False)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    rows = ["participant_id\tage\tsex\tventricular_volume_ml"]
    for i in range(5):
        head = np.where(radius < 0.9, 300.0, 0) + np.where(radius < 0.6 + 0.02 * i, 400 + 200 * (x > 0), 0)
        folder = tmp_path / f"data/sub-{i:02d}/anat"
        folder.mkdir(parents=True)
        image = nib.Nifti1Image(head.astype(np.float32), np.diag([6.0, 6, 6, 1]))
        nib.save(image, folder / f"sub-{i:02d}_T1w.nii.gz")
        rows.append(f"sub-{i:02d}\t{30 + i}\t{'FM'[i % 2]}\t{20 + i}")
    (tmp_path / "data/participants.tsv").write_text("\n".join(rows) + "\n")
    settings = tiny_settings(tmp_path)
    settings["data"]["brain_extraction"] = {"command": "mri_synthstrip"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_brains_are_extracted_recorded_and_given_back(dataset, capsys):
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "5 scans prepared" in capsys.readouterr().out
    config = load_config(dataset / "config.yaml")
    assert config.data.skull_stripped
    for row in read_scan_table(config).itertuples():
        info, scan = load_info(config, row.key), read_volume(row.path)[0]
        command = "mri_synthstrip -i {scan} -m {mask}"
        assert info["brain_extraction"] == {"command": command, "version": "stand-in 1.2"}
        assert info["mask_keeps"] == pytest.approx((scan > 500).mean(), abs=1e-4)
        prepared = load_prepared(config, row.key)
        alone, _ = restore_scan(config, row.key, prepared)
        whole, _ = restore_scan(config, row.key, prepared, scan)
        brain = scan > 500
        assert not alone[~brain].any() and np.array_equal(whole[~brain], scan[~brain])
        inside = ndimage.binary_erosion(brain[0], iterations=3)[None]
        assert np.corrcoef(whole[inside], scan[inside])[0, 1] > 0.9 and abs(whole[inside].mean() - scan[inside].mean()) < 20
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "0 scans prepared, 5 unchanged" in capsys.readouterr().out
    assert len((dataset / "log").read_text().splitlines()) == 5  # and none was extracted twice


def test_a_renamed_scan_is_not_extracted_again_and_another_version_is(dataset, capsys):
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    path = dataset / "data/sub-03/anat/sub-03_T1w.nii.gz"
    nib.save(nib.load(path), path.with_name("sub-03_T1w.nii"))
    path.unlink()
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "0 scans prepared, 5 unchanged" in capsys.readouterr().out
    program = dataset / "bin/mri_synthstrip"
    program.write_text(program.read_text().replace("stand-in 1.2", "stand-in 1.3"))
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "5 scans prepared" in capsys.readouterr().out


def test_a_tool_that_fails_on_one_scan_fails_that_scan_alone(dataset, capsys):
    path = dataset / "data/sub-03/anat/sub-03_T1w.nii.gz"
    bright = nib.load(path)
    nib.save(nib.Nifti1Image(20 * bright.get_fdata().astype(np.float32), bright.affine), path)
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    said = capsys.readouterr().out
    assert "sub-03: mri_synthstrip failed with exit code 1: 'too bright to be a head'" in said
    assert "4 scans prepared, 0 unchanged, 1 failed" in said


def test_without_the_tool_one_message_with_three_ways_out(dataset, fails, capsys):
    (dataset / "bin/mri_synthstrip").unlink()
    said = fails("prepare", dataset / "config.yaml")
    assert "no program 'mri_synthstrip' on PATH" in said
    assert "install it" in said and "data.mask" in said and "drop data.brain_extraction" in said
    with pytest.raises(SystemExit):
        command_line("check", dataset / "config.yaml", "--no-times")
    assert "no program 'mri_synthstrip' on PATH" in capsys.readouterr().out


def other(dataset, name: str, text: str) -> str:
    program = dataset / "bin" / name
    program.write_text(f"#!{sys.executable}\nimport sys\n{text}")
    program.chmod(0o755)
    return str(program)


COPY = "import nibabel as nib\nimage = nib.load(sys.argv[1])\ndata = image.get_fdata()\n"


def test_a_program_that_writes_only_the_brain(dataset, capsys):
    """Its zeros are what is outside; options stay one argument each, blanks included, and no shell reads them."""
    log = dataset / "arguments"
    program = other(
        dataset,
        "strip",
        f"{COPY}open({str(log)!r}, 'w').write(repr(sys.argv[3:]))\n"
        "nib.save(nib.Nifti1Image(data * (data > 500), image.affine), sys.argv[2])\n",
    )
    command = f"{program} {{scan}} {{brain}} 'two words' $HOME;"
    command_line("prepare", dataset / "config.yaml", "--workers", 1, "--set", f"data.brain_extraction.command={command}")
    assert "5 scans prepared" in capsys.readouterr().out
    assert log.read_text() == "['two words', '$HOME;']"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "wrote no mask where it should (in its folder is: nothing)"),
        ("open(sys.argv[2], 'w').write('no image')", "wrote no usable mask"),
        (COPY + "nib.save(nib.Nifti1Image(0 * data, image.affine), sys.argv[2])", "every voxel is 0"),
        (COPY + "image.affine[:3, 3] += 5000\nnib.save(nib.Nifti1Image(data, image.affine), sys.argv[2])", "keeps no voxel"),
        ("import os\nos.kill(os.getpid(), 9)", "failed with exit code -9"),
    ],
)
def test_what_a_program_can_do_wrong(dataset, fails, text, said):
    command = other(dataset, "strip", text) + " {scan} {mask}"
    told = fails("prepare", dataset / "config.yaml", "--workers", 1, "--set", f"data.brain_extraction.command={command}")
    assert said in told and "5 of 5 scans could not be prepared" in told


@pytest.mark.parametrize(
    "command, said",
    [
        ("synthstrip", "did you mean 'mri_synthstrip'?"),
        ("strip {scan}", "does not say where the scan and the mask belong"),
        ("strip '{scan} {mask}", "close its quotes"),
        ("''", "does not say where"),
        (" ", "the command is empty"),
    ],
)
def test_commands_that_cannot_be_run(dataset, fails, command, said):
    assert said in fails("prepare", dataset / "config.yaml", "--set", f'data.brain_extraction.command="{command}"')


def test_masks_are_given_or_made_not_both(dataset, fails):
    assert "give either mask" in fails("prepare", dataset / "config.yaml", "--set", "data.mask={desc: brain, suffix: mask}")


def test_a_program_without_a_version_is_known_by_its_file(dataset):
    config = load_config(dataset / "config.yaml").data.brain_extraction
    other(dataset, "mri_synthstrip", "sys.exit(1)")
    first = find_tool(config).version
    other(dataset, "mri_synthstrip", "sys.exit(2)")
    assert first.startswith("unknown, file ") and find_tool(config).version != first
    (dataset / "build-stamp.txt").write_text("freesurfer-linux-7.4.1\n")
    os.environ["FREESURFER_HOME"] = str(dataset)
    try:
        assert find_tool(config).version == "freesurfer-linux-7.4.1"
    finally:
        del os.environ["FREESURFER_HOME"]


def test_a_program_of_pip_has_the_version_of_its_package(dataset, monkeypatch, tmp_path):
    """Its own script is the same in every version, and --version is no option of it."""
    info = tmp_path / "packages/HD_BET-2.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: HD_BET\nVersion: 2.0.1\n")
    monkeypatch.setenv("PYTHONPATH", str(info.parent))
    other(dataset, "hd-bet", "sys.exit(2)")
    assert find_tool(BrainExtractionConfig(command="hd-bet")).version == "hd-bet 2.0.1"
    monkeypatch.delenv("PYTHONPATH")
    assert find_tool(BrainExtractionConfig(command="hd-bet")).version.startswith("unknown, file ")


def test_a_missing_program_is_named_with_those_that_are_there(dataset):
    other(dataset, "bet", "")
    config = load_config(dataset / "config.yaml", ["data.brain_extraction.command=hd-bet -device cpu"])
    with pytest.raises(InputError, match=r"bet and mri_synthstrip|mri_synthstrip and bet"):
        find_tool(config.data.brain_extraction)


# Each program known by name, played by a script that takes that program's own command line (argparse refuses the rest), fails
# on a head that is too bright, and writes where the program itself writes
PLAYED = """#!{python}
import argparse, os, sys
import nibabel as nib
import numpy as np

def brain(path):
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    if data.max() > 5000:
        sys.exit("too bright to be a head")
    return (data > 500).astype(np.uint8), data, image.affine

def write(data, affine, path):
    nib.save(nib.Nifti1Image(data, affine), path)

parser = argparse.ArgumentParser(allow_abbrev=False)
{play}
"""
PLAYS = {
    "mri_synthstrip": """
parser.add_argument("-i", "--image", required=True)
parser.add_argument("-o", "--out")
parser.add_argument("-m", "--mask")
parser.add_argument("-b", "--border", default=1, type=float)
parser.add_argument("--no-csf", action="store_true")
asked = parser.parse_args()
mask, _, affine = brain(asked.image)
write(mask, affine, asked.mask)
""",
    "hd-bet": """
parser.add_argument("-i", "--input", required=True)
parser.add_argument("-o", "--output")
parser.add_argument("-device", default="cuda")
parser.add_argument("--disable_tta", action="store_true")
parser.add_argument("--save_bet_mask", action="store_true")
parser.add_argument("--no_bet_image", action="store_true")
asked = parser.parse_args()
assert asked.input.endswith(".nii.gz") and asked.output.endswith(".nii.gz") and asked.save_bet_mask
if asked.device == "cuda":
    sys.exit("Found no NVIDIA driver on your system")
mask, _, affine = brain(asked.input)
write(mask, affine, asked.output[:-7] + "_bet.nii.gz")
""",
    "bet": """
scan, out, *options = sys.argv[1:]
if scan.startswith("-"):
    sys.exit("Usage: bet <input> <output> [options]")
assert {{"-m", "-n"}} <= set(options) <= {{"-m", "-n", "-R", "-f", "0.4"}}, options
mask, _, affine = brain(scan)
assert os.environ["FSLOUTPUTTYPE"] == "NIFTI_GZ"
write(mask, affine, out + "_mask.nii.gz")
""",
    "deepbet-cli": """
parser.add_argument("-i", "--input")
parser.add_argument("-o", "--output")
parser.add_argument("-m", "--mask_output")
parser.add_argument("-t", "--threshold", type=float, default=0.5)
parser.add_argument("-g", "--no_gpu", action=argparse.BooleanOptionalAction, default=False)
asked = parser.parse_args()
assert asked.no_gpu  # processes of `prepare` would share one
mask, data, affine = brain(asked.input)
write(data * mask, affine, asked.output)
write(mask, affine, asked.mask_output)
""",
}


COMMANDS = ["mri_synthstrip --no-csf", "hd-bet -device cpu --disable_tta", "bet -f 0.4 -R", "deepbet-cli"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_program_known_by_name_takes_its_own_command_line(tmp_path, monkeypatch, command):
    """Its mask is what is read, its version is written down, and what it says on a scan where it fails is told."""
    name, *_ = command.split()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for variable in ("FREESURFER_HOME", "FSLDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FSLOUTPUTTYPE", "NIFTI")  # as some have it; FSL then writes .nii
    (tmp_path / name).write_text(PLAYED.format(python=sys.executable, play=PLAYS[name].replace("{{", "{").replace("}}", "}")))
    (tmp_path / name).chmod(0o755)
    tool = find_tool(BrainExtractionConfig(command=command))
    assert (
        tool.told()["command"].startswith(name)
        and tool.told()["command"].endswith(command.removeprefix(name))
        and tool.version.startswith("unknown, file ")
    )  # none of these says one
    head = np.random.default_rng(0).uniform(0, 1000, (1, 6, 7, 8)).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    nib.save(nib.Nifti1Image(head[0], affine), tmp_path / "sub-01_T1w.nii.gz")
    mask, own = extract(tool, tmp_path / "sub-01_T1w.nii.gz", head, affine)
    np.testing.assert_array_equal(mask > 0.5, head > 500)
    np.testing.assert_array_equal(own, affine)
    nib.save(nib.Nifti1Image(head[0], affine), tmp_path / "sub-02_T1w.nii")
    for other_format in ("sub-02_T1w.nii", "orig.mgz"):  # a program that does not read it gets a copy
        mask, _ = extract(tool, tmp_path / other_format, head, affine)
        np.testing.assert_array_equal(mask > 0.5, head > 500)
    with pytest.raises(InputError, match=f"{name} failed with exit code 1: 'too bright to be a head'"):
        extract(tool, tmp_path / "orig.mgz", 20 * head, affine)
