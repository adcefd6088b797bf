"""What a process knows of itself and of the others."""

import os
import subprocess
import sys

import pytest
from conftest import command_line

from ldm3d.cli.options import SHARED, app
from ldm3d.errors import InputError
from ldm3d.processes import started_processes

# Of a job that may use so many of a machine's cores at most: these tests' own processes have one
COUNT = """
import os, sys
os.sched_setaffinity(0, range(os.cpu_count()))
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
cores = len(os.sched_getaffinity(0))
from ldm3d.processes import cores_each
print(cores, cores_each())
"""


def counted(cores: int, **variables: str) -> tuple[int, int]:
    """(cores that a new process may use of these, how many it takes for itself)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | variables
    command = [sys.executable, "-c", COUNT, str(cores)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    allowed, each = map(int, done.stdout.split())
    return allowed, each


@pytest.mark.parametrize("world", [1, 2])
def test_cores_that_openmp_binds_threads_to_are_counted(world):
    """With OMP_PROC_BIND, a process that loads PyTorch is bound to one core; the others still count."""
    allowed, each = counted(os.cpu_count(), OMP_PROC_BIND="true", LOCAL_WORLD_SIZE=str(world))
    assert each == max(1, allowed // world)


@pytest.mark.parametrize("cores, threads", [(os.cpu_count(), 1), (1, 2)])
def test_cores_are_those_that_a_job_was_given(cores, threads):
    """torchrun asks for one thread, accelerate launch --cpu for as many as the machine has cores, whatever the job may use."""
    allowed, each = counted(cores, OMP_NUM_THREADS=str(threads))
    assert each == allowed


VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    "command", ["likelihood", "explain", "segmenter", "compare", "info", "phantoms", "demo", "import-monai"]
)
@pytest.mark.parametrize("variables", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_commands_that_know_no_processes_refuse_several(monkeypatch, capsys, tmp_path, command, variables):
    """With one message, of process 0; under torchrun each did everything, and all wrote the same files."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variables[1], "4")
    said = []
    for rank, code in (("0", 2), ("3", None)):
        monkeypatch.setenv(variables[0], rank)
        try:
            command_line(command, "model")  # what is wrong with its arguments is not looked at
        except SystemExit as done:
            assert done.code == code
        said.append(capsys.readouterr().err)
    assert f"ldm3d {command} works in one process, and 4 were started" in said[0] and said[1] == ""
    assert not list(tmp_path.iterdir())


def test_every_command_is_shared_or_works_alone():
    """A new command does not share its work, unless it is said to; and what is said to, there is."""
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(SHARED) < names


def test_tasks_of_srun_that_do_not_know_where_to_meet_are_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(InputError, match="srun started 2 processes"):
        started_processes()
