"""The processes of a command: started by torchrun, by accelerate launch, or by srun with their variables set."""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from ldm3d.errors import InputError

TIMEOUT = datetime.timedelta(days=1)  # shares of the work differ; if a process dies, the launcher ends the others


@dataclass(frozen=True)
class Processes:
    """The number of this process, and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's share of `items`: every world-th."""
        return items[self.rank :: self.world]

    def gather(self, value: Any) -> list:
        """The values of all processes, in their order; a collective, which every process has to call."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def merge(self, shares: Sequence) -> list:
        """The inverse of `share`: all items, on every process."""
        parts = self.gather(list(shares))
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until all processes call it."""
        self.gather(None)


ALONE = Processes()


def share_work(work: Callable[[Any], Any], items: Sequence, processes: Processes, title: str, unit: str = "step") -> list:
    """work(item) of all items, in their order, on every process; each does its share, and the main one shows a bar."""
    own = processes.share(items)
    return processes.merge([work(item) for item in tqdm(own, desc=title, unit=unit, disable=not processes.is_main)])


def started_processes() -> Processes:
    """Find the other processes, and set up communication with them.

    Raises:
        InputError: `accelerate launch` was asked for several processes and started one, or srun started several.
    """
    found = which_process()
    if found.world > 1 and "WORLD_SIZE" not in os.environ:
        _refuse(
            found,
            f"srun started {found.world} processes without an address to meet at; let it start torchrun, once a node",
        )
    if found.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
        torch.set_num_threads(cores_each())  # torchrun sets one, on any machine
    return found


# If OpenMP pins threads to cores, this one included: the cores that it found before
_BOUND_CORES = torch.get_num_threads() if os.environ.get("OMP_PROC_BIND", "false").lower() != "false" else 0


def cores() -> int:
    """Cores of this machine that the job may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed, _BOUND_CORES)


def cores_each() -> int:
    """Cores for each process on this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def own_device() -> str:
    """The GPU of this process, made its current one; the CPU where there is none.

    The number of a process on its machine comes from torchrun, accelerate launch or srun. Slurm shows each task all GPUs of
    the machine, or its own alone (--gpus-per-task).
    """
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    number = local % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def which_process() -> Processes:
    """This process's number and how many there are: from torchrun, accelerate launch or srun.

    Raises:
        InputError: fewer were started than requested, or the environment does not give this one's number.
    """
    check_all_started()
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:  # of the step, not the job, in which a process outside of srun runs alone
        rank, world = os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS")
        if world is None:
            return Processes()
    if not (str(rank).isdecimal() and str(world).isdecimal() and int(rank) < int(world)):
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE {world}; set both, to a process's number from 0 and how many there are, or neither"
        )
    return Processes(int(rank), int(world))


def work_alone(command: str) -> None:
    """For a command of one process: several would all do the same work, and write the same files.

    Raises:
        InputError: several processes were started; see `_refuse`.
    """
    found = which_process()
    if found.world > 1:
        _refuse(found, f"{command} works in one process, and {found.world} were started; start it without a launcher")


def _refuse(found: Processes, message: str) -> NoReturn:
    """Raise InputError on process 0; the others exit silently.

    They exit without an error, at which a launcher would end process 0 before it prints the message.
    """
    if not found.is_main:
        raise SystemExit(0)
    raise InputError(message)


def check_all_started() -> None:
    """Raise InputError where accelerate launch was asked for several processes and started one.

    It does so with --cpu and no MPI hostfile. The only trace of the other processes is the address for their communication.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "accelerate launch was asked for several processes and started one; for several CPU processes use "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m MODULE ..."
        )
