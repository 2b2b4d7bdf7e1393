"""The chips that a plan is for, and devices to compile for without having them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

from gadjax.chips import CHIPS, GPUS, Chip, chip_of
from gadjax.errors import UserError, first_line
from gadjax.planning.gpus import gpus

LOCAL = "local"
ONE_DEVICE = {"v4": {"chip_config_name": "megacore"}}  # else each of a v4 chip's two cores is one
# Cloud TPU's machines have four chips, 2 x 2, but for these (its documentation of v5e, v6e and the other types, "TPU configurations").
ONE_HOST = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}


@dataclass(frozen=True)
class Topology:
    """Chips and how many of them.

    Attributes:
        name: as the command line has it.
        chip: one of them.
        devices: to compile for.
        platform: "cpu", "gpu" or "tpu".
        missing: why nothing can be compiled for them here; empty if it can.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    platform: str
    missing: str = ""

    @property
    def compiles(self) -> bool:
        """Whether the compiler of these chips is here."""
        return not self.missing

    @property
    def chips(self) -> int:
        """How many."""
        return len(self.devices) // self.chip.devices

    @property
    def hosts(self) -> int:
        """How many machines they are in."""
        return len({device.process_index for device in self.devices})


FLAT = ("v5e", "v6e")  # their tori have two dimensions, the others' three: the compiler would take any


def topology_of(name: str) -> Topology:
    """The topology `<chip>:<a>x<b>[x<c>]`, one of `GPUS` or several in a host, `<gpu>:<count>`, or `local` for the devices at hand.

    Raises:
        UserError: the chip is not known, the compiler does not know the topology, or there is no compiler for the chips.
    """
    if name == LOCAL:
        return Topology(name, _local(), jax.devices(), jax.devices()[0].platform)
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch("[1-9]|1[0-6]|", shape):
        return _gpus(name, kind, int(shape or 1))
    if kind not in CHIPS or shape.count("x") + 1 != (2 if kind in FLAT else 3):
        others = ", ".join([*GPUS, f"{next(iter(GPUS))}:8", LOCAL])
        raise UserError("--topology", f"{name} is not known", f"write CHIP:SHAPE as v5p:2x2x4, CHIP one of {', '.join(CHIPS)}; or {others}")
    try:
        options = ONE_DEVICE.get(kind, {}) | ({"chips_per_host_bounds": ONE_HOST[shape]} if shape in ONE_HOST else {})
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
    except Exception as error:  # the plug-in raises what it likes
        reason = first_line(error)
        mend = "install gadjax[tpu], or write another shape, such as v5e:4x4 or v5p:2x2x4"
        raise UserError("--topology", f"{name} cannot be compiled for ({reason})", mend) from error
    return Topology(name, CHIPS[kind], found.devices, "tpu")


def _gpus(name: str, kind: str, count: int) -> Topology:
    """GPUs of a host; without their compiler one of them can still be planned for by arithmetic."""
    try:
        return Topology(name, GPUS[kind], gpus(kind, GPUS[kind], count), "gpu")
    except Exception as error:  # the plug-in raises what it likes
        reason = first_line(error)
        if count > 1:
            raise UserError("--topology", f"{name} cannot be compiled for ({reason})", "install gadjax[cuda]") from error
    return Topology(name, GPUS[kind], jax.devices()[:1], "gpu", missing=f"{reason}; gadjax[cuda] brings the compiler")


def _local() -> Chip:
    """A device at hand. For one that is not known there is a guess: a plan for it is for trying the command out."""
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if known := chip_of(devices[0]):  # there are some with less memory
        return replace(known, memory=min(known.memory, limit or known.memory))
    memory = float(limit) if limit else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return Chip(devices[0].device_kind, memory=memory, flops=1e11, bandwidth=2e10, links=1e10)
