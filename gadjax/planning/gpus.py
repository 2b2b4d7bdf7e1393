"""NVIDIA's GPUs for their compiler, which needs none at hand: it is told of one in words, XLA's `GpuTargetConfigProto` as text.

Figures are those of the data sheets, and of the table of compute capabilities in CUDA's programming guide.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gadjax.chips import Chip


@dataclass(frozen=True)
class Multiprocessors:
    """Of a GPU.

    Attributes:
        capability: the compute capability, major and minor.
        count: of them.
        lanes: float32 units of each.
        shared: KiB of shared memory of each.
        cache: MiB of the level 2 cache.
        clock: GHz, boosted.
    """

    capability: tuple[int, int]
    count: int
    lanes: int
    shared: int
    cache: int
    clock: float


HOPPER = Multiprocessors(capability=(9, 0), count=132, lanes=128, shared=228, cache=50, clock=1.98)
OF = {
    "a100": Multiprocessors(capability=(8, 0), count=108, lanes=64, shared=164, cache=40, clock=1.41),
    "h100": HOPPER,
    "h200": HOPPER,
}
CUDNN = (9, 10)  # the version that is supposed


def gpus(name: str, chip: Chip, count: int) -> list[Any]:
    """Devices to compile for, in one host.

    Raises:
        Exception: what the plug-in raises where it is not installed, or what it does not like.
    """
    jax.devices()  # finds the plug-in
    target = target_of(OF[name], chip)
    return topologies.get_topology_desc(topology_name=name, platform="cuda", target_config=target, topology=f"1x1x{count}").devices


def target_of(each: Multiprocessors, chip: Chip) -> str:
    """What the compiler is told."""
    (major, minor), kept = each.capability, 1024  # bytes of shared memory that a block cannot have
    facts = {
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "core_count": each.count,
        "fpus_per_core": each.lanes,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": each.shared * 1024 - kept,
        "shared_memory_per_core": each.shared * 1024,
        "l2_cache_size": each.cache * 2**20,
        "clock_rate_ghz": each.clock,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
    }
    info = " ".join(f"{name}: {value}" for name, value in facts.items())
    versions = " ".join(f"{name}: {value}" for name, value in zip(("major", "minor"), CUDNN, strict=True))
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {versions} }} device_description_str: "{chip.kind}"'
    )
