"""Hostile input ends in one clear message; a part of what `python -m torture` tries, and what was found by it."""

import gzip
import os
import pickle
import re
import resource
import signal
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torture.fuzzing import FAMILIES, cases_of, try_family
from torture.generation import make_pipeline
from torture.hostile.case import OUTSIDE, Case, Link, nifti
from torture.hostile.reading import Reader, problem_of

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.config.read import load_config
from ldm3d.config.yaml import parse_yaml
from ldm3d.data import bids, preparing
from ldm3d.data.bids import read_scans
from ldm3d.data.nifti import read_volume
from ldm3d.data.one_scan import prepare_scan
from ldm3d.data.tables import read_table, write_table
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline

GRID = {"shape": (8, 8, 8), "spacing_mm": 2}


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_ends_in_success_or_a_message(family, reader):
    found = try_family(family, 40, 0, reader)
    assert found.tried >= 40 and not found.lost, found.detail


# The harness itself: it must see what it is there to see


def hang(case):
    time.sleep(3600)


def fill_memory(case):
    np.ones(2**29)  # 4 GiB


def die(case):
    os._exit(1)


def raise_bug(case):
    {}["nothing"]


def say_nothing(case):
    raise InputError("")


def peep(case):
    open(f"../{OUTSIDE}/secret.nii.gz", "rb").close()


def follow(case):
    open("scan", "rb").close()


def unpickle(case):
    pickle.loads(pickle.dumps(print))


def blame_no_file(case):
    raise InputError("something about this is wrong, but who knows where")


@pytest.mark.parametrize(
    "read, seen",
    [
        (die, r"the process died \(1\)"),
        (fill_memory, "MemoryError|ArrayMemory"),
        (raise_bug, "KeyError: 'nothing'"),
        (say_nothing, "no message"),
        (peep, "which lies outside"),
        (follow, "which lies outside"),
        (unpickle, "a pickle was loaded"),
        (blame_no_file, "names no file"),
    ],
)
def test_the_harness_sees(read, seen, planted):
    problem = planted.problem_of(Case(read.__name__, (), {"scan": Link(f"../{OUTSIDE}/secret.nii.gz")}))
    assert problem is not None
    assert re.search(seen, problem), problem


@pytest.fixture(scope="module")
def planted():
    reads = (hang, fill_memory, die, raise_bug, say_nothing, peep, follow, unpickle, blame_no_file)
    reader = Reader({read.__name__: read for read in reads})
    yield reader
    reader.close()


@pytest.mark.slow
def test_the_harness_sees_a_hang(planted, monkeypatch):
    monkeypatch.setattr("torture.hostile.reading.SECONDS", 0.5)
    assert planted.problem_of(Case("hang", (), {})) == "not done after 3.0 s"
    assert planted.problem_of(Case("raise_bug", (), {})).startswith("KeyError")  # and goes on


def test_cases_follow_from_the_seed():
    def mutations(seed):
        found = []
        cases_of("tables", 10, seed, lambda case: found.append(case.mutations))
        return found

    assert mutations(1) == mutations(1) != mutations(2)


# What it found, and what hostile input was known to do


def test_voxels_that_begin_nowhere(tmp_path):
    for offset in (np.nan, np.inf, -1.0, 1e12, 100.0):
        path = tmp_path / "x.nii.gz"
        path.write_bytes(gzip.compress(nifti("single", fields={"vox_offset": offset})[0]))
        with pytest.raises(InputError, match=r"x.nii.gz: .*(should begin at byte|too low|header claims)"):
            read_volume(path)


def test_extensions_are_not_read(tmp_path):
    """nibabel reads what an extension of size 0 holds: all that a packed file unpacks to."""
    path = tmp_path / "x.nii.gz"
    extension = np.array([0, 6], "<i4").tobytes() + bytes(8)
    path.write_bytes(gzip.compress(nifti("single", extension=extension)[0] + bytes(2**26)))
    volume, _ = read_volume(path)
    assert volume.shape == (1, 8, 9, 10) and 200 < volume.max() < 251


@pytest.mark.parametrize("named", ["x.hdr", "x.img"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pairs_and_byte_orders(named, order, tmp_path):
    header, voxels = nifti("pair", "i2", order)
    (tmp_path / "x.hdr").write_bytes(header)
    (tmp_path / "x.img").write_bytes(voxels)
    volume, affine = read_volume(tmp_path / named)
    np.testing.assert_array_equal(volume[0], nibabel.load(tmp_path / named).get_fdata())
    np.testing.assert_array_equal(affine, np.diag([2, 2, 2, 1]))
    (tmp_path / "x.img").unlink()
    with pytest.raises(InputError, match=r"no such file|its voxels should be in x.img, which is not there"):
        read_volume(tmp_path / named)


def test_too_large_for_the_memory_is_said_before_it_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "x.nii"
    path.write_bytes(nifti("single")[0])
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(InputError, match=r"take 0.0 GiB of memory to read, and 0.0 GiB are free"):
        read_volume(path)


def _table(folder, *paths, **settings):
    rows = [f"s{i},{path},50" for i, path in enumerate(paths)]
    (folder / "scans.csv").write_text("\n".join(["participant_id,path,age", *rows]) + "\n")
    return DataConfig(table=folder / "scans.csv", grid=GRID, **settings)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.nii", "a/../../x.nii", "/", ".."])
def test_paths_out_of_the_root_name_their_row(path, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    with pytest.raises(
        InputError, match=r"1 scans lie outside of .*\n  line 3: .*\nset data.root .* to the folder that"
    ) as caught:
        read_scans(_table(folder, "fine.nii", path), [])
    assert repr(path) in str(caught.value)


def test_a_root_that_holds_all_lets_them_in(tmp_path):
    (tmp_path / "tables").mkdir()
    scans = read_scans(_table(tmp_path / "tables", str(tmp_path / "images/x.nii"), "images/y.nii", root=tmp_path), [])
    assert list(scans["path"]) == [str(tmp_path / "images/x.nii"), str(tmp_path / "images/y.nii")]
    (tmp_path / "alias").symlink_to(tmp_path)  # the same folder by another name
    scans = read_scans(_table(tmp_path / "tables", str(tmp_path / "alias/images/x.nii"), root=tmp_path), [])
    assert len(scans) == 1


def _dataset(tmp_path):
    """A table of three scans, of which one is a link; and their config."""
    scan = nifti("single")[0]
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in (folder / "a.nii", folder / "b.nii", folder / ".git/annex/objects/c", elsewhere / "d.nii"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scan)
    config = CONFIG.format(folder=folder)
    (folder / "config.yaml").write_text(config)
    return folder, elsewhere


CONFIG = """
name: test
output: {folder}/run
data: {{table: {folder}/scans.csv, grid: {{shape: [8, 8, 8], spacing_mm: 2}}}}
covariates: [{{name: age, kind: continuous}}]
autoencoder:
  network: {{latent_channels: 2, downsampling: 4, channels: [8, 8]}}
  training: {{steps: 1, batch_size: 1, learning_rate: 0.001}}
diffusion:
  network: {{channels: [8], attention: [false]}}
  training: {{steps: 1, batch_size: 1, learning_rate: 0.001}}
"""


def test_links_are_followed_within_the_root_only(tmp_path):
    folder, elsewhere = _dataset(tmp_path)
    (folder / "annexed.nii").symlink_to(".git/annex/objects/c")
    (folder / "out.nii").symlink_to(elsewhere / "d.nii")
    (folder / "pair.hdr").write_bytes(nifti("pair")[0])
    (folder / "pair.img").symlink_to(elsewhere / "d.nii")
    _table(folder, "a.nii", "annexed.nii", "out.nii", "pair.hdr")
    done = preparing.prepare(load_config(folder / "config.yaml"), workers=1)
    assert list(done.table["subject"]) == ["s0", "s1"] and list(done.failed["subject"]) == ["s2", "s3"]
    assert all("outside of" in reason and "data.root" in reason for reason in done.failed["reason"])
    wider = load_config(folder / "config.yaml", [f"data.root={tmp_path}"])
    _table(folder, "data/a.nii", "data/out.nii")
    assert len(preparing.prepare(wider, workers=1).table) == 2


def _bids(root):
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "dataset_description.json", "participants.tsv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "dataset_description.json").write_text('{"Name": "test", "BIDSVersion": "1.10.0"}')
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t50\n")
    return DataConfig(bids=root, grid=GRID)


@pytest.mark.parametrize(
    "name", ["participants.tsv", "dataset_description.json", "sub-01/sub-01_sessions.tsv", "sub-01/anat/more", "sub-02"]
)
def test_bids_files_that_are_links_out(name, tmp_path):
    data, age = _bids(tmp_path / "bids"), CovariateConfig(name="age", kind="continuous")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret.tsv").write_text("session_id\tage\n")
    assert len(read_scans(data, [age])) == 1
    (tmp_path / "bids" / name).unlink(missing_ok=True)
    (tmp_path / "bids" / name).symlink_to(tmp_path / ("secret.tsv" if "." in name else "secret"))
    with pytest.raises(InputError, match=r"leads to .*/secret.*, outside of .*data.root"):
        read_scans(data, [age])


def test_bids_links_that_go_round(tmp_path):
    data = _bids(tmp_path)
    for name in ("up", "sub-01/up"):
        (tmp_path / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match="links to a folder that holds it; remove the link"):
        read_scans(data, [])


def test_patterns_of_a_layout_file_are_not_taken(tmp_path):
    data = _bids(tmp_path)
    (tmp_path / "layout_config.json").write_text('{"name": "x", "entities": [{"name": "subject", "pattern": "(z)"}]}')
    assert list(read_scans(data, [])["subject"]) == ["01"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'id,note\n1,"never closed\n2,x\n', r"line 3: 'never closed\\n2,x' holds a line break .* quotation mark missing"),
        (b"id,note\n1,a\0b\n", r"line 2: 'a\\x00b' holds"),
        (b"id,note\n1," + b"x" * 200_000, r"no regular table: field larger than field limit .*line 2"),
        (b"id,note\n1\n2,3,4\n", "Expected 2 fields in line 3, saw 3"),
        ("id,note\n1,x\n".encode("utf-16"), "not text in UTF-8"),
    ],
)
def test_tables_that_are_none(content, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.csv")


def test_spreadsheets_leave_blank_columns_and_rows(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfid,age,,\r\n"0012",50,,\r\n , ,,\r\n,,,\r\n3\r\n')
    frame = read_table(tmp_path / "t.csv")
    assert list(frame.columns) == ["id", "age"] and list(frame.index) == [2, 5]
    assert frame.to_numpy().tolist() == [["0012", "50"], ["3", ""]]


def test_no_formula_is_written_and_text_comes_back(tmp_path):
    cells = ["=1+1", "@SUM(A1)", "+cmd|x", "-2+3", "'=1", "''=1", "plain", "+", "-", "it's", "'quoted'", "n/a"]
    write_table(tmp_path / "t.tsv", bids.pd.DataFrame({"id": cells, "number": -1.5}))
    lines = (tmp_path / "t.tsv").read_text().splitlines()[1:]
    assert not [line for line in lines if line[0] in "=@" or (line[0] in "+-" and line[1] != "\t")]
    frame = read_table(tmp_path / "t.tsv")
    assert list(frame["id"]) == cells and set(frame["number"]) == {"-1.5"}


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    text = "".join(f"{i},{i // 9}/{i}.nii.gz,{i % 90}.{i % 997:03d},{'FM'[i % 2]}\n" for i in range(10**6))
    (tmp_path / "scans.csv").write_text("participant_id,path,age,sex\n" + text)
    covariates = [
        CovariateConfig(name="age", kind="continuous"),
        CovariateConfig(name="sex", kind="categorical", categories=("F", "M")),
    ]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert len(read_scans(DataConfig(table=tmp_path / "scans.csv", grid=GRID), covariates)) == 10**6
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # kB


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 20)}]\n" for b, c in zip("abcde", "bcdef")),
            "more than 10,000",
        ),
        ("a: &a [*a]\n", "line 1: the alias stands within"),
        ("x: 1\ny: 2\nx: 3\n", "line 3: 'x' is there twice; keep one"),
        ("[" * 5000, "nested too deeply"),
        ("a: 2024-99-99\n", "one of its values cannot be read"),
        ("a: !!bool 7\n", "one of its values cannot be read"),
        ("a: !!timestamp x\n", "one of its values cannot be read"),
        ("a: " + "9" * 5000, "one of its values cannot be read"),
        ('a: "x\\0y"\n', "control character"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML: could not determine a constructor"),
    ],
)
def test_yaml_that_means_harm(text, message):
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "file")


def test_configs_of_a_megabyte_are_not_read(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n" * 10**5)
    with pytest.raises(InputError, match="has 1,000,000 bytes; a file of settings has at most 65,536"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        ("autoencoder.training.steps=yes", "autoencoder.training.steps is 'true': .* valid integer"),
        ("autoencoder.training.learning_rate=true", "learning_rate is 'true': .* valid number"),
        ("data.grid.shape=[8, yes, 8]", "data.grid.shape.1 is 'true'"),
        ("data.grid.shape=[2048, 2048, 2048]", "has 8,589,934,592 voxels; at most 1,073,741,824"),
        ("name=[" + "1, " * 2000 + "1]", r"name is \[1, 1.* \.\.\. .*1\]: Input should be a valid string"),
    ],
)
def test_values_of_the_wrong_kind(override, message, tmp_path):
    (tmp_path / "x.yaml").write_text(CONFIG.format(folder=tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        load_config(tmp_path / "x.yaml", [override])
    assert len(str(caught.value)) < 1000


def test_an_override_changes_one_of_an_alias_s_places_only(tmp_path):
    text = CONFIG.format(folder=tmp_path).replace("  training: {steps", "  training: &t {steps", 1)
    first = text.partition("diffusion:")[0]
    (tmp_path / "x.yaml").write_text(first + "diffusion:\n  network: {channels: [8], attention: [false]}\n  training: *t\n")
    config = load_config(tmp_path / "x.yaml", ["autoencoder.training.steps=9"])
    assert (config.autoencoder.training.steps, config.diffusion.training.steps) == (9, 1)


@pytest.fixture
def model(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value, model):
    path = model / "unet/model.safetensors"
    weights = load(path.read_bytes())
    weights["conv_in.bias"][1] = value
    save_file(weights, path)
    with pytest.raises(InputError, match=r"unet/model.safetensors: conv_in.bias holds NaN or infinite values"):
        Pipeline.from_pretrained(model, "cpu")


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("unet/config.json", '"blocks": 1', '"blocks": 1000000000', "describes more than the .* tensors"),
        ("autoencoder/config.json", '"latent_channels": 2', '"latent_channels": 1000000', "is of another configuration: "),
        ("autoencoder/config.json", '"latent_channels": 2', '"latent_channels": "2"', "was written by another version"),
        ("unet/config.json", '"class": "UNet"', '"class": ["UNet"]', "is damaged: expected JSON"),
        ("pipeline.json", '"std": 20', '"std": 0', "std 0 must be positive"),
        ("pipeline.json", '"std": 20', '"std": NaN', "damaged .*it holds NaN"),
        ("pipeline.json", '"std": 20', '"std": "x"', r"0.std is 'x': Input should be a valid number"),
        ("pipeline.json", '"steps": 2', '"steps": 2000000000', "at most .* 100,000 steps"),
        ("pipeline.json", '"target": "v"', '"target": "w"', "unknown target 'w'"),
        ("pipeline.json", '"name": "age",', '"name": "age", "colour": 1,', "0.colour is 1: Unexpected keyword argument"),
        ("pipeline.json", '"F",', '"F", "X",', "they are of different models"),
        ("pipeline.json", '"synthetic', "[" * 10**5 + '"synthetic', "damaged"),
    ],
)
def test_models_that_lie(file, old, new, message, model):
    _edit(model / file, old, new)
    with pytest.raises(InputError, match=message) as caught:
        Pipeline.from_pretrained(model, "cpu")
    assert str(model) in str(caught.value)


def test_no_pickle_is_loaded(model):
    weights = load((model / "unet/model.safetensors").read_bytes())
    torch.save(weights, model / "unet/model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        Pipeline.from_pretrained(model, "cpu")


# A scan whose worker dies or fills the memory


def short_of_memory(path, *arguments):
    """As `prepare_scan`, where 300 MB are left; or killed, as the kernel does it where none is."""
    if path.endswith("killer.nii"):
        os.kill(os.getpid(), signal.SIGKILL)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20, -1))
    return prepare_scan(path, *arguments)


@pytest.mark.slow  # worker processes start several times
def test_memory_bombs_in_workers_are_named(tmp_path, monkeypatch):
    folder, _ = _dataset(tmp_path)
    (folder / "killer.nii").write_bytes(b"kills its reader")
    (folder / "bomb.nii").write_bytes(nifti("single", "u1", fields={"dim": [3, 512, 512, 500, 1, 1, 1, 1]})[0])
    os.truncate(folder / "bomb.nii", 352 + 512 * 512 * 500)  # a file of holes
    _table(folder, "a.nii", "bomb.nii", "killer.nii")
    monkeypatch.setattr(preparing, "prepare_scan", short_of_memory)
    done = preparing.prepare(load_config(folder / "config.yaml"), workers=2)
    assert list(done.table["subject"]) == ["s0"] and list(done.failed["subject"]) == ["s1", "s2"]
    assert "more than there is" in done.failed["reason"].iloc[0]
    assert "its worker process died; out of memory?" in done.failed["reason"].iloc[1]


def test_a_problem_is_seen_in_this_process_too():
    assert problem_of(Case("config", (), {"config.yaml": b"["})) is None
