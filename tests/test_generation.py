"""Generation of whole datasets: the same volumes to the last bit however they are asked for, and none lost or done twice."""

import errno
import json
import os
import shutil
import signal
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line
from torture.generation import digests, make_pipeline, run

from ldm3d.data.derivative import synthetic_path
from ldm3d.data.nifti import read_volume
from ldm3d.errors import InputError
from ldm3d.generation import run as run_series
from ldm3d.generation import series as series_format
from ldm3d.generation import workspace
from ldm3d.generation.run import generate
from ldm3d.generation.sampling import grouped
from ldm3d.generation.series import Series
from ldm3d.generation.workspace import Workspace
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.privacy.volumes import written_in
from ldm3d.processes import Processes, which_process

ROWS = [{"age": 20.0 + 5 * i, "sex": "FM"[i % 2]} for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(model, monkeypatch) -> Pipeline:
    monkeypatch.setattr(series_format, "MOSAIC_VOLUMES", 1)  # most of the time would go into drawing
    return Pipeline.from_pretrained(model, "cpu", torch.float32)


@pytest.fixture(scope="module")
def wide() -> Pipeline:
    """Wide enough that kernels choose their way by batch size and threads; narrow networks are exact by themselves."""
    return make_pipeline(channels=32)


@pytest.fixture
def series(pipeline, tmp_path) -> Path:
    """Ten volumes, made by one process."""
    generate(pipeline, tmp_path / "series", pipeline.parse(ROWS), pipeline.sampling)
    return tmp_path / "series"


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What it is called


def test_volumes_have_the_suffix_of_what_was_trained_on(pipeline, tmp_path):
    pipeline.suffix = "FLAIR"
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again.suffix == "FLAIR"
    generate(again, tmp_path / "out", again.parse(ROWS[:1]), again.sampling)
    volume = synthetic_path(tmp_path / "out", 0, suffix="FLAIR")
    assert volume.name == "sub-syn0001_desc-synthetic_FLAIR.nii.gz" and volume.is_file()
    sidecar = json.loads(volume.with_name(volume.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Description"].startswith("Synthetic FLAIR-like")
    assert "FLAIR-like" in (tmp_path / "out/README").read_text()
    assert not [path for path in (tmp_path / "out").rglob("*") if "T1w" in path.name]
    assert written_in(tmp_path / "out", again).names == ["sub-syn0001"]


def test_suffix_of_older_models_is_t1w_and_no_path(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model/pipeline.json"
    description = json.loads(path.read_text())
    del description["suffix"]
    path.write_text(json.dumps(description))
    assert Pipeline.from_pretrained(tmp_path / "model", device="cpu").suffix == "T1w"
    path.write_text(json.dumps({**description, "suffix": "../T1w"}))
    with pytest.raises(InputError, match=r"pipeline.json is damaged .*T1w"):
        Pipeline.from_pretrained(tmp_path / "model", device="cpu")


# To the last bit


def test_a_volume_is_the_same_to_the_last_bit_however_it_is_asked_for(wide):
    rows = wide.parse(ROWS[:6])
    expected = [v.tobytes() for v in wide.volumes(rows, wide.sampling)]
    assert len(set(expected)) == len(rows)
    for batch_size in (1, 3, 16):
        assert [v.tobytes() for v in wide.volumes(rows, wide.sampling, batch_size)] == expected
    for i in (0, 2, 5):  # alone, at every place of a batch
        assert next(wide.volumes([rows[i]], wide.sampling, numbers=[i])).tobytes() == expected[i]
    for count in (2, 3):
        with threads(count):
            assert [v.tobytes() for v in wide.volumes(rows, wide.sampling)] == expected
            assert torch.get_num_threads() == count


def test_other_requests_beside_it_change_nothing(wide):
    few = [v.tobytes() for v in wide.volumes(wide.parse([{"age": 40}] * 3), wide.sampling)]
    many = [v.tobytes() for v in wide.volumes(wide.parse([{"age": 40}] * 3 + [{"sex": "M"}] * 5), wide.sampling)]
    assert many[:3] == few and len(set(many)) == 8


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_bfloat16_and_other_samplers_are_exact_too(sampler):
    pipeline = make_pipeline(channels=32).to(dtype=torch.bfloat16)
    images = [pipeline(rows=ROWS[:n], sampler=sampler, batch_size=n).images for n in (5, 3)]
    for one, other in zip(*images):
        assert np.asarray(one.dataobj).tobytes() == np.asarray(other.dataobj).tobytes()


def test_groups_are_runs_of_numbers_that_fit_into_one_batch():
    assert list(grouped([0, 1, 2, 3, 4, 9, 10], 4)) == [[0, 1, 2, 3], [4], [5, 6]]
    assert list(grouped([0, 0, 0], 4)) == [[0], [1], [2]]
    assert list(grouped([2, 1, 5], 4)) == [[0], [1], [2]]
    assert list(grouped([], 4)) == []


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_writes_the_same_files(pipeline, series, tmp_path, world):
    out, rows = tmp_path / "shared", pipeline.parse(ROWS)
    tallies = []
    for rank in reversed(range(world)):  # whoever comes last finishes
        tallies.append(generate(pipeline, out, rows, pipeline.sampling, 1 + rank, Processes(rank, world)))
    assert digests(out) == digests(series)
    assert sum(tally.made for tally in tallies) == 10
    assert tallies[-1].missing == 0 and all(tally.missing for tally in tallies[:-1])


def test_a_result_is_saved_as_the_command_would_write_it(pipeline, series, tmp_path):
    pipeline(rows=ROWS).save(tmp_path / "saved")
    assert digests(tmp_path / "saved") == digests(series)


# Stopped, killed, damaged


@pytest.mark.slow
def test_killed_processes_lose_and_repeat_nothing():
    """Two processes killed twice, finished by torchrun, beside one that was left alone; and the BIDS validator."""
    for outcome in run(volumes=24, kills=2):
        assert outcome.lost == 0, outcome.detail


def sidecar(path: Path) -> Path:
    return path.with_name(path.name.replace(".nii.gz", ".json"))


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "a bit flipped": lambda path: path.write_bytes(path.read_bytes()[:500] + b"\x55" + path.read_bytes()[501:]),
    "no volume": Path.unlink,
    "no sidecar": lambda path: sidecar(path).unlink(),
    "half a sidecar": lambda path: sidecar(path).write_text(sidecar(path).read_text()[:100]),
    "a strange sidecar": lambda path: sidecar(path).write_text("[1, 2]"),
    "another volume": lambda path: shutil.copy(synthetic_path(path.parents[2], 1), path),
    "another request": lambda path: sidecar(path).write_text(sidecar(path).read_text().replace('"age": 35', '"age": 36')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_done_again_and_the_rest_kept(pipeline, series, damage):
    before = digests(series)
    untouched = synthetic_path(series, 2).stat().st_mtime_ns
    DAMAGES[damage](synthetic_path(series, 3))
    assert digests(series) != before
    tally = generate(pipeline, series, pipeline.parse(ROWS), pipeline.sampling)
    assert (tally.made, tally.kept, tally.redone, tally.missing) == (0, 9, 1, 0)
    assert digests(series) == before
    assert synthetic_path(series, 2).stat().st_mtime_ns == untouched


def test_sizes_alone_can_be_checked(pipeline, series):
    rows = pipeline.parse(ROWS)
    DAMAGES["a bit flipped"](synthetic_path(series, 3))
    DAMAGES["cut short"](synthetic_path(series, 4))
    assert generate(pipeline, series, rows, pipeline.sampling, read_finished=False).redone == 1
    assert generate(pipeline, series, rows, pipeline.sampling).redone == 1


def test_what_a_killed_process_left_is_cleared_away(pipeline, series):
    before = digests(series)
    for rank in (0, 5):  # 5: it was started with more processes then
        desk = series / ".unfinished" / str(rank)
        desk.mkdir(parents=True)
        (desk / "lock").touch()
        (desk / "sub-syn0004_desc-synthetic_T1w.nii.gz").write_bytes(b"half")
    (series / "participants.tsv").unlink()
    generate(pipeline, series, pipeline.parse(ROWS), pipeline.sampling)
    assert digests(series) == before


def test_a_folder_of_nothing_but_a_desk_is_begun_anew(pipeline, series, tmp_path):
    (tmp_path / "new/.unfinished/0").mkdir(parents=True)
    generate(pipeline, tmp_path / "new", pipeline.parse(ROWS), pipeline.sampling)
    assert digests(tmp_path / "new") == digests(series)


def test_a_full_disk_loses_nothing_that_was_written(pipeline, series, tmp_path, monkeypatch):
    rows, out, place, written = pipeline.parse(ROWS), tmp_path / "full", Workspace.write, []

    def until_full(desk, path, content):
        written.append(path)
        if len(written) > 12:
            desk.draft(path).write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        place(desk, path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Workspace, "write", until_full)
        generate(pipeline, out, rows, pipeline.sampling)
    assert not (out / "participants.tsv").exists() and not (out / ".unfinished").exists()
    tally = generate(pipeline, out, rows, pipeline.sampling)
    assert tally.kept >= 4 and tally.missing == 0
    assert digests(out) == digests(series)


def test_a_stop_is_heeded_after_a_volume(pipeline, series, tmp_path):
    rows, out, stop = pipeline.parse(ROWS), tmp_path / "stopped", Stop()

    def ask(count: int, _volumes: int) -> None:
        stop.signal = "SIGUSR1" if count == 3 else None

    tally = generate(pipeline, out, rows, pipeline.sampling, progress=ask, stop=stop)
    assert (tally.made, tally.missing) == (3, 7) and not (out / "participants.tsv").exists()
    assert generate(pipeline, out, rows, pipeline.sampling).kept == 3
    assert digests(out) == digests(series)


def test_a_covariate_with_the_name_of_an_option_can_be_asked(model, tmp_path, fails):
    """Models that were trained before such names were refused have them."""
    shutil.copytree(model, tmp_path / "model")
    description = tmp_path / "model/pipeline.json"
    description.write_text(
        description.read_text().replace('"name": "sex"', '"name": "group"').replace('"name": "age"', '"name": "seed"')
    )
    generate = ["generate", tmp_path / "model", "--device", "cpu", "--out"]
    command_line(*generate, tmp_path / "asked", "--ask", "group=female", "--ask", "seed=50", "--seed", 3)
    rows = (tmp_path / "asked/participants.tsv").read_text().splitlines()
    assert rows == ["participant_id\tseed\tgroup", "sub-syn0001\t50.0\tF"]
    pipeline = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    result = pipeline(ask={"group": "f", "seed": 50}, seed=3)
    assert result.rows == [{"seed": 50.0, "group": "F"}]
    np.testing.assert_allclose(
        result.images[0].get_fdata(),
        read_volume(tmp_path / "asked/sub-syn0001/anat/sub-syn0001_desc-synthetic_T1w.nii.gz")[0][0],
        atol=1e-6,
    )
    assert "write --ask NAME=VALUE" in fails(*generate, tmp_path / "b", "--ask", "group")
    assert "'age' is asked twice" in fails("generate", model, "--out", tmp_path / "b", "--age", 50, "--ask", "age=60")
    assert "'89+' is not one number; write one, for example 89" in fails(
        "generate", model, "--out", tmp_path / "b", "--age", "89+"
    )
    with pytest.raises(InputError, match="group: asked twice"):
        pipeline(ask={"group": "f"}, **{"group": "f"})


def test_sigterm_ends_the_command_with_the_code_for_requeueing(model, tmp_path, capsys):
    out, done = tmp_path / "out", threading.Event()

    def send() -> None:
        while not list(out.glob("sub-*/anat/*.json")) and not done.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as stopped:
        command_line("generate", model, "--num", 20_000, "--out", out, "--age", 50, "--device", "cpu")
    done.set()
    sender.join()
    assert stopped.value.code == REQUEUE == 75
    said = capsys.readouterr().out
    assert "stopped by SIGTERM" in said and "run the same command to continue from there" in said
    volumes = list(out.glob("sub-*/anat/*.nii.gz"))
    assert len(volumes) == len(list(out.glob("sub-*/anat/*.json"))) < 20_000
    assert not (out / ".unfinished").exists()


def test_memory_does_not_grow_with_the_series(pipeline, tmp_path, monkeypatch):
    """However slow the disk: no more volumes at a time than wait for it, are being written, or have just been decoded."""
    alive, most, volumes, write = [0], [0], Pipeline.volumes, Series.write

    def gone() -> None:
        alive[0] -= 1

    def watched(self, *arguments):
        for volume in volumes(self, *arguments):
            volume = volume.copy()
            weakref.finalize(volume, gone)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield volume

    def slow(self, i, volume):
        time.sleep(0.01)
        write(self, i, volume)

    monkeypatch.setattr(Series, "write", slow)
    monkeypatch.setattr(Pipeline, "volumes", watched)
    assert generate(pipeline, tmp_path / "out", pipeline.parse(ROWS * 4), pipeline.sampling).made == 40
    assert run_series.WAITING <= most[0] <= run_series.WAITING + 3


# Refused


def test_another_series_is_refused_and_says_what_differs(pipeline, series):
    before = digests(series)

    def message(rows=ROWS, **changes) -> str:
        with pytest.raises(InputError, match="holds another series: ") as caught:
            generate(pipeline, series, pipeline.parse(rows), pipeline.sampling.replace(**changes))
        return str(caught.value)

    assert "sampling.seed: 0 -> 3; sampling.steps: 2 -> 1." in message(seed=3, steps=1)
    assert "requests: " in message([*ROWS[1:], ROWS[0]])
    assert "volumes: 10 -> 11" in message([*ROWS, {}])
    pipeline.group = 3
    assert "computing.group: 4 -> 3" in message()
    pipeline.group = None
    pipeline.to(dtype=torch.bfloat16)
    assert "computing.dtype: float32 -> bfloat16" in message()
    pipeline.to(dtype=torch.float32)
    pipeline.target = "x"
    assert "model.settings: " in message()
    assert digests(series) == before


def test_a_folder_of_other_things_is_refused(pipeline, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"is not empty and holds no series.json.* name a new one"):
        generate(pipeline, tmp_path, pipeline.parse(ROWS), pipeline.sampling)
    with pytest.raises(InputError, match="is a file"):
        generate(pipeline, tmp_path / "file", pipeline.parse(ROWS), pipeline.sampling)
    (tmp_path / "series").mkdir()
    (tmp_path / "series/series.json").write_text("{}")
    with pytest.raises(InputError, match=r"series.json is damaged"):
        generate(pipeline, tmp_path / "series", pipeline.parse(ROWS), pipeline.sampling)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine.txt", "series"] and os.listdir(tmp_path / "series") == [
        "series.json"
    ]


def test_a_model_that_was_never_saved_cannot_go_on(series, tmp_path):
    unsaved = make_pipeline()
    unsaved(rows=ROWS[:2]).save(tmp_path / "out")
    with pytest.raises(InputError, match="never saved"):
        unsaved(rows=ROWS[:2]).save(tmp_path / "out")


def test_the_same_command_twice_at_a_time_is_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "PATIENCE_SECONDS", 0.1)
    rows = pipeline.parse(ROWS)
    with Series(tmp_path / "out", pipeline.origin, rows, pipeline.sampling.to_dict()):
        with pytest.raises(InputError, match="another process is at work in"):
            generate(pipeline, tmp_path / "out", rows, pipeline.sampling)
        generate(pipeline, tmp_path / "out", rows, pipeline.sampling, processes=Processes(1, 2))  # another share may
    assert generate(pipeline, tmp_path / "out", rows, pipeline.sampling).kept == 4


def test_decoding_stays_as_the_series_was_begun(pipeline, tmp_path):
    rows, out = pipeline.parse(ROWS), tmp_path / "out"
    pipeline.decode_mode = "streamed"
    generate(pipeline, out, rows, pipeline.sampling, processes=Processes(0, 2))
    pipeline.decode_mode = "auto"
    generate(pipeline, out, rows, pipeline.sampling, processes=Processes(1, 2))
    assert json.loads((out / "series.json").read_text())["computing"]["decode"] == "streamed"
    assert pipeline.decode_mode == "auto"
    pipeline.decode_mode = "whole"
    with pytest.raises(InputError, match=r"computing.decode: streamed -> whole"):
        generate(pipeline, out, rows, pipeline.sampling)


# Processes


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, (0, 1)),  # a job script outside of srun
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
    ],
)
def test_which_process(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert which_process() == Processes(*expected)


@pytest.mark.parametrize("environment", [("4", "4"), ("-1", "2"), ("", "2"), ("one", "2")])
def test_environments_that_make_no_sense(monkeypatch, environment):
    for name, value in zip(("RANK", "WORLD_SIZE"), environment):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="set both"):
        which_process()


def test_fewer_processes_than_asked_for_is_an_error(monkeypatch):
    """What accelerate launch --cpu --num_processes 2 leaves behind when it starts one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="several processes and started one"):
        which_process()


def test_subjects_sort_by_name_however_many_there_are():
    for volumes in (1, 9_999, 10_000, 100_000):
        names = [synthetic_path("x", i, volumes).parents[1].name for i in (0, 8, 98, volumes - 1) if i < volumes]
        assert names == sorted(names) and len({len(name) for name in names}) == 1
    assert synthetic_path("x", 0, 9_999).parents[1].name == "sub-syn0001"
    assert synthetic_path("x", 0, 10_000).parents[1].name == "sub-syn00001"


def test_no_group_and_no_thread_are_errors(pipeline):
    parts = (pipeline.autoencoder, pipeline.unet, pipeline.schema, pipeline.grid, pipeline.process, pipeline.target)
    for settings in ({"group": 0}, {"threads": 0}):
        with pytest.raises(InputError, match="must be at least 1, or None"):
            Pipeline(*parts, **settings)
