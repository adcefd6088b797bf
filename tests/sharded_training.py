"""Run by test_sharding.py on two gloo processes: the training of stage 2 under configs/accelerate/fsdp.yaml.

Accelerate spreads parameters over GPUs only, PyTorch over CPUs as well. So Accelerate is told that it may; from there on all
is its own doing, from the environment that `accelerate launch` makes of that file.
"""

import os
from pathlib import Path

from accelerate import state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

FSDP = Path(__file__).parents[1] / "configs/accelerate/fsdp.yaml"


def environment() -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp.yaml` gives to its processes about FSDP."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FSDP), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    given = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in given.items() if "FSDP" in name}


def spread_over_cpus() -> None:
    begin = state.AcceleratorState.__init__

    def begin_spread(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    state.AcceleratorState.__init__ = begin_spread


if __name__ == "__main__":
    os.environ.update(environment())
    spread_over_cpus()
    from ldm3d.training import diffusion

    start = diffusion.start_accelerator

    def start_and_say(*arguments):
        accelerator = start(*arguments)
        wrapped = ", ".join(sorted(accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap))
        accelerator.print(f"FSDP2: {accelerator.is_fsdp2}; {accelerator.num_processes} processes; {wrapped}")
        return accelerator

    diffusion.start_accelerator = start_and_say
    diffusion.main()
