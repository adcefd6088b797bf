"""What a process knows of itself and of the others."""

import os
import subprocess
import sys

import pytest

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
    """With OMP_PROC_BIND, whoever loads PyTorch finds itself on one core; the others are there all the same."""
    allowed, each = counted(os.cpu_count(), OMP_PROC_BIND="true", LOCAL_WORLD_SIZE=str(world))
    assert each == max(1, allowed // world)


@pytest.mark.parametrize("cores, threads", [(os.cpu_count(), 1), (1, 2)])
def test_cores_are_those_that_a_job_was_given(cores, threads):
    """torchrun asks for one thread, accelerate launch --cpu for as many as the machine has cores, whatever the job may use."""
    allowed, each = counted(cores, OMP_NUM_THREADS=str(threads))
    assert each == allowed
