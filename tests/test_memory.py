"""The plan of a decode: what it will take, what there is, and what follows."""

import pytest
import torch
from torch import nn

from ldm3d import memory
from ldm3d.errors import InputError
from ldm3d.memory import LiveBytes, Plan, decode_bytes, free_bytes, plan_decode, tried
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.monai import MonaiAutoencoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
BIG = (1, 8, 64, 64, 64)  # latents of 512^3; nothing of that size is made


@pytest.fixture(scope="module")
def brain():
    return Autoencoder(8, 8, [32, 128, 256])


# What a decode takes


def test_bytes_alive_by_hand():
    x = torch.empty(1000, device="meta")
    with LiveBytes(CUDA) as counter:
        a = x + 1  # 4000
        b = a.double()  # + 8000
        del a
        c = b[:500]  # a view: nothing
        del b
        d = c * 1  # + 4000 beside the 8000 of which c is a view
        assert (counter.now, counter.peak) == (12000, 12000)
        del c, d
    assert counter.now == 0


@pytest.mark.parametrize("memory_format, copies", [(torch.contiguous_format, 2), (torch.channels_last_3d, 0)])
def test_copies_of_a_convolution(memory_format, copies):
    """The output, with the holes beside it, and what oneDNN copies when channels do not come last."""
    conv = nn.Conv3d(4, 4, 3, padding=1, device="meta").to(memory_format=memory_format)
    x = torch.empty(1, 4, 10, 10, 10, device="meta").contiguous(memory_format=memory_format)
    with torch.no_grad(), LiveBytes(CPU) as counter:
        conv(x)
    assert counter.peak == pytest.approx((1 + memory.HOLES + copies) * x.nbytes, abs=1)


def test_large_blocks_leave_no_holes():
    with LiveBytes(CPU) as counter:
        x = torch.empty(memory.HEAP_BLOCK + 1, dtype=torch.uint8, device="meta")
    assert counter.peak == x.nbytes


def test_whole_decode_by_hand(brain):
    """At half resolution a residual block holds its input, two inner maps and the output at least: maps of 32 channels."""
    maps = decode_bytes(brain, BIG, CPU, streamed=False) / (32 * 256**3 * 4)
    assert 4 < maps < 8
    half = decode_bytes(brain.bfloat16(), BIG, CPU, streamed=False)
    assert half == pytest.approx(decode_bytes(brain.float(), BIG, CPU, streamed=False) / 2, rel=0.1)


def test_stream_grows_with_the_plane_only(brain):
    """A volume twice as long takes the longer output and nothing else; a whole decode takes twice as much."""
    short, long = (1, 8, 80, 28, 20), (1, 8, 160, 28, 20)
    more = decode_bytes(brain, long, CPU, streamed=True) - decode_bytes(brain, short, CPU, streamed=True)
    output = memory.SAFETY * 4 * 640 * 224 * 160
    assert output < more < 1.5 * output
    assert decode_bytes(brain, long, CPU, streamed=False) > 1.9 * decode_bytes(brain, short, CPU, streamed=False)


def test_512_cubed_within_2_gb(brain):
    assert decode_bytes(brain, BIG, CPU, streamed=True) < 2e9


def test_group_norm_makes_a_stream_hold_two_maps():
    """MONAI's block from 128 to 64 channels at full resolution: 128 in all, where a whole decode holds four times that."""
    network = MonaiAutoencoder(3, [64, 128], blocks=1)
    z = (1, 3, 80, 56, 40)
    full = 160 * 112 * 80 * 128 * 4  # bytes of 128 channels at full resolution
    whole, streamed = (decode_bytes(network, z, CPU, streamed) for streamed in (False, True))
    assert 1 < streamed / full < 2
    assert 4 < whole / full < 5.5


def test_estimate_leaves_the_network_alone(brain):
    before = {name: value.clone() for name, value in brain.state_dict().items()}
    decode_bytes(brain, (1, 8, 4, 4, 4), CPU, streamed=True)
    for name, value in brain.state_dict().items():
        assert torch.equal(value, before[name])


# The choice


def test_gpu_streams_what_does_not_fit(brain):
    long = (1, 8, 80, 28, 20)
    assert plan_decode(brain, long, CUDA, free=80 * GIB).mode == "whole"
    plan = plan_decode(brain, long, CUDA, free=GIB)
    assert plan.mode == "streamed"
    assert plan.estimated_bytes < GIB
    assert "1.00 GiB are free" in str(plan)


def test_cpu_takes_what_needs_less(brain):
    assert plan_decode(brain, (1, 8, 20, 28, 20), CPU).mode == "streamed"
    assert plan_decode(brain, (1, 8, 5, 6, 5), CPU).mode == "whole", "nothing to save"


def test_what_cannot_be_streamed_is_decoded_whole():
    network = Autoencoder(3, 2, [4])
    network.decoder.append(nn.InstanceNorm3d(4))
    assert plan_decode(network, (1, 3, 4, 4, 4), CPU).mode == "whole"


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_as_asked(brain, mode):
    assert plan_decode(brain, (1, 8, 5, 6, 5), CUDA, mode, free=0).mode == mode


def test_unknown_mode(brain):
    with pytest.raises(InputError, match="'tiled' is not one of auto, whole, streamed"):
        plan_decode(brain, (1, 8, 5, 6, 5), CPU, "tiled")


# What there is


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_free_memory_without_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 5 * GIB}))
    assert free_bytes(CPU, tmp_path) == 5 * GIB


@pytest.mark.parametrize("inside, expected", [("max", 3), (str(2 * GIB), 1)])
def test_cgroup_v2_and_the_one_above(tmp_path, monkeypatch, inside, expected):
    """A job's limit and that of the slice it is in; what caches files can be had."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 50 * GIB}))
    write(tmp_path / "proc/self", cgroup="0::/slurm/job_7\n")
    base = tmp_path / "sys/fs/cgroup"
    above = {"memory__max": f"{8 * GIB}\n", "memory__current": f"{6 * GIB}\n", "memory__stat": f"inactive_file {GIB}\n"}
    write(base / "slurm", **above)
    stat = "anon 5\ninactive_file 0\n"
    write(base / "slurm/job_7", memory__max=inside + "\n", memory__current=f"{GIB}\n", memory__stat=stat)
    assert free_bytes(CPU, tmp_path) == expected * GIB


def test_cgroup_v1_in_a_container(tmp_path, monkeypatch):
    """The path is the host's and does not exist here: the container's own limit is at the base."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": 50 * GIB}))
    write(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    base = tmp_path / "sys/fs/cgroup/memory"
    files = {"memory__usage_in_bytes": f"{GIB}\n", "memory__stat": f"total_inactive_file {GIB // 2}\n"}
    write(base, memory__limit_in_bytes=f"{4 * GIB}\n", **files)
    assert free_bytes(CPU, tmp_path) == 3.5 * GIB
    write(base, memory__limit_in_bytes="9223372036854771712\n")  # no limit
    assert free_bytes(CPU, tmp_path) == 50 * GIB


# A plan that is tried


@pytest.mark.parametrize("fits", [True, False])
def test_a_whole_decode_that_runs_out_of_memory_becomes_a_stream(monkeypatch, fits):
    network, tries = Autoencoder(2, 2, [8]), []
    whole = network.decode

    def decode(z):
        if z.is_meta:
            return whole(z)
        tries.append(tuple(z.shape))
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(z)

    monkeypatch.setattr(network, "decode", decode)
    shape, planned = (1, 2, 4, 4, 4), Plan("whole", 2 * memory.SMALL, "plenty is free")
    plan = tried(planned, network, shape, torch.float32, CPU)
    assert tries == [shape]
    assert plan.mode == ("whole" if fits else "streamed")
    assert fits or "ran out of memory" in plan.reason
    # What is small, or cannot be streamed, is not tried
    for other in (Plan("whole", memory.SMALL, "small"), Plan("whole", 2 * memory.SMALL, memory.NOT_STREAMED)):
        assert tried(other, network, shape, torch.float32, CPU) is other
    assert len(tries) == 1
