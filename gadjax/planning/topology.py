"""The chips that a plan is for: their limits, and devices to compile for without having them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gadjax.errors import UserError

LOCAL = "local"
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker's data sheet has it; or one of the devices that JAX has it as, each with its share.

    Attributes:
        memory: bytes that a program may use.
        flops: bfloat16 operations per second.
        bandwidth: bytes per second between the chip and its memory.
        links: bytes per second that it sends over all of its links to other chips: half of what the data sheet calls bidirectional.
        devices: how many JAX has a chip as.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    devices: int = 1


# The tables of Cloud TPU's documentation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: bfloat16 peak, HBM and inter-chip
# interconnect (ICI) bandwidth per chip; of ICI they tell both ways together, of v4's nothing: arXiv 2304.01433 has 6 links of 50 GB/s.
# Of the memory (32 GiB, 16 GB, 95 GiB, 32 GB and 192 GiB in the tables), what the compiler says that a program may use.
CHIPS = {
    "v4": Chip(memory=30.75 * GIB, flops=275e12, bandwidth=1200e9, links=300e9),
    "v5e": Chip(memory=15.75 * GIB, flops=197e12, bandwidth=819e9, links=200e9),
    "v5p": Chip(memory=95.74 * GIB, flops=459e12, bandwidth=2765e9, links=600e9),
    "v6e": Chip(memory=31.25 * GIB, flops=918e12, bandwidth=1638e9, links=400e9),
    "tpu7x": Chip(memory=94.75 * GIB, flops=2307e12 / 2, bandwidth=7380e9 / 2, links=600e9 / 2, devices=2),
}
ONE_DEVICE = {"v4": {"chip_config_name": "megacore"}}  # else each of a v4 chip's two cores is one
# One GPU, by its maker's data sheet; nothing is compiled for it, so that a plan is by arithmetic alone.
GPUS = {"h100": Chip(memory=80e9, flops=989e12, bandwidth=3350e9, links=450e9)}


@dataclass(frozen=True)
class Topology:
    """Chips and how many of them.

    Attributes:
        name: as the command line has it.
        chip: one of them.
        devices: to compile for.
        compiles: whether the compiler of these chips is here.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    compiles: bool = True

    @property
    def chips(self) -> int:
        """How many."""
        return len(self.devices) // self.chip.devices

    @property
    def hosts(self) -> int:
        """How many machines they are in."""
        return len({device.process_index for device in self.devices})


def topology_of(name: str) -> Topology:
    """The topology `<chip>:<a>x<b>[x<c>]`, one of `GPUS`, or `local` for the devices at hand.

    Raises:
        UserError: the chip is not known, the compiler does not know the topology, or there is no compiler for TPUs.
    """
    if name == LOCAL:
        return Topology(name, _local(), jax.devices())
    if name in GPUS:
        return Topology(name, GPUS[name], jax.devices()[:1], compiles=False)
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not shape:
        others = ", ".join([*GPUS, LOCAL])
        raise UserError("--topology", f"{name} is not known", f"write CHIP:SHAPE as v5p:2x2x4, CHIP one of {', '.join(CHIPS)}; or {others}")
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **ONE_DEVICE.get(kind, {}))
    except Exception as error:  # the plug-in raises what it likes
        reason = str(error).splitlines()[0]
        mend = "install gadjax[tpu], or write another shape, such as v5e:4x4 or v5p:2x2x4"
        raise UserError("--topology", f"{name} cannot be compiled for ({reason})", mend) from error
    return Topology(name, CHIPS[kind], found.devices)


def _local() -> Chip:
    """A device at hand. Of what the runtime does not tell there is a guess: a plan for it is for trying the command out."""
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    memory = float(limit) if limit else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return Chip(memory=memory, flops=1e11, bandwidth=2e10, links=1e10)
