"""What a process knows of itself and of the others."""

import os
import subprocess
import sys

import pytest

COUNT = "from ldm3d.processes import cores_each; print(cores_each())"


@pytest.mark.parametrize("world", [1, 2])
def test_cores_that_openmp_binds_threads_to_are_counted(world):
    """With OMP_PROC_BIND, whoever loads PyTorch finds itself on one core; the others are there all the same."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_PROC_BIND": "true", "LOCAL_WORLD_SIZE": str(world)}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == max(1, len(os.sched_getaffinity(0)) // world)
