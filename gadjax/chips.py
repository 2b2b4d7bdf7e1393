"""Accelerators and their limits, as their makers' data sheets have them."""

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker's data sheet has it; or one of the devices that JAX has it as, each with its share.

    Attributes:
        kind: how the name begins that JAX gives its devices.
        memory: bytes that a program may use.
        flops: bfloat16 operations per second.
        bandwidth: bytes per second between the chip and its memory.
        links: bytes per second that it sends over all of its links to other chips: half of what the data sheet calls bidirectional.
        devices: how many JAX has a chip as.
    """

    kind: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    devices: int = 1


# The tables of Cloud TPU's documentation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: bfloat16 peak, HBM and inter-chip
# interconnect (ICI) bandwidth per chip; of ICI they tell both ways together, of v4's nothing: arXiv 2304.01433 has 6 links of 50 GB/s.
# Of the memory (32 GiB, 16 GB, 95 GiB, 32 GB and 192 GiB in the tables), what the compiler says that a program may use.
CHIPS = {
    "v4": Chip("TPU v4", memory=30.75 * GIB, flops=275e12, bandwidth=1200e9, links=300e9),
    "v5e": Chip("TPU v5 lite", memory=15.75 * GIB, flops=197e12, bandwidth=819e9, links=200e9),
    "v5p": Chip("TPU v5", memory=95.74 * GIB, flops=459e12, bandwidth=2765e9, links=600e9),
    "v6e": Chip("TPU v6 lite", memory=31.25 * GIB, flops=918e12, bandwidth=1638e9, links=400e9),
    "tpu7x": Chip("TPU7x", memory=94.75 * GIB, flops=2307e12 / 2, bandwidth=7380e9 / 2, links=600e9 / 2, devices=2),
}
# GPUs, by their maker's data sheets; of NVLink they tell both ways together.
GPUS = {
    "a100": Chip("NVIDIA A100", memory=80e9, flops=312e12, bandwidth=2039e9, links=300e9),
    "h100": Chip("NVIDIA H100", memory=80e9, flops=989e12, bandwidth=3350e9, links=450e9),
    "h200": Chip("NVIDIA H200", memory=141e9, flops=989e12, bandwidth=4800e9, links=450e9),
}


def chip_of(device: Any) -> Chip | None:
    """What is known of a device at hand; None for others, a CPU say."""
    known = (chip for chip in (*CHIPS.values(), *GPUS.values()) if device.device_kind.startswith(chip.kind))
    return max(known, key=lambda chip: len(chip.kind), default=None)
