"""One step, compiled: its bytes on a chip, its FLOPs, what it moves, and the time that the chip's limits leave it."""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax

from gadjax.chips import GIB
from gadjax.errors import first_line
from gadjax.planning.flops import matrix_flops
from gadjax.planning.hlo import moved
from gadjax.planning.programs import Step, bytes_on_chip
from gadjax.planning.topology import LOCAL, Topology

NO_TILES = "Couldn't find output tile sizes"
HARDLY = 0.1
MEMORY, UNABLE = "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"


@dataclass(frozen=True)
class Measured:
    """What the plan says of a step; bytes and FLOPs of one run.

    Attributes:
        arguments_gib: on a chip.
        temporaries_gib: on a chip.
        peak_gib: on a chip at once, by the compiler's account: arguments, results and temporaries as they live.
        beside_gib: what else lies on the chip meanwhile.
        flops: of matrix products, over all chips.
        memory_gib: between a chip and its memory.
        collectives: how many of each kind.
        links_gib: of each kind, bytes that a chip sends.
        roofline_seconds: the longest of FLOPs, memory and links, each at the chip's limit.
        bound: which of the three it is.
        compile_seconds: that the compiler took.
        times: how often a step of training runs it (`Step.times`).
    """

    arguments_gib: float
    temporaries_gib: float
    peak_gib: float
    beside_gib: float
    flops: float
    memory_gib: float
    collectives: dict[str, float]
    links_gib: dict[str, float]
    roofline_seconds: float
    bound: str
    compile_seconds: float
    times: float

    @property
    def needed_gib(self) -> float:
        """On a chip while it runs."""
        return self.peak_gib + self.beside_gib

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"needed_gib": self.needed_gib}


class Refused(Exception):
    """The compiler does not take a program.

    Attributes:
        over: GiB that the chip has too little, `HARDLY` any where the compiler does not tell; None if that is not why.
    """

    def __init__(self, error: Exception):
        super().__init__(first_line(error)[:200])
        sizes = dict(zip("KMG", (2**-20, 2**-10, 1.0), strict=True))
        too_much = re.search(r"[Ee]xceeded hbm capacity by ([0-9.]+)([KMG])", str(error))
        lacks = MEMORY in str(error) and not re.search("memory space [sv]mem", str(error))  # of a kernel, which no config makes smaller
        self.over = float(too_much[1]) * sizes[too_much[2]] if too_much else (HARDLY if lacks else None)


def measure(step: Step, topology: Topology) -> Measured:
    """Compiles a step.

    Raises:
        Refused: it is too large, or the compiler cannot do it.
    """
    flops = matrix_flops(step.traced.jaxpr.jaxpr, step.trips)
    lowered = step.traced.lower()
    start = time.perf_counter()
    try:
        compiled = _compiled(lowered)
    except Exception as error:  # the compiler's own, of which only the text tells what it is
        if not any(kind in str(error) for kind in (MEMORY, UNABLE)):
            raise
        raise Refused(error) from error
    seconds = time.perf_counter() - start
    memory, chip = compiled.memory_analysis(), topology.chip
    moves = moved(compiled.as_text(), step.trips)
    takes = {
        "FLOPs": flops / len(topology.devices) / chip.flops,
        "memory": moves.memory / chip.bandwidth,
        "links": sum(moves.links.values()) / chip.links,
    }
    bound = max(takes, key=takes.__getitem__)
    return Measured(
        arguments_gib=memory.argument_size_in_bytes / GIB,
        temporaries_gib=memory.temp_size_in_bytes / GIB,
        peak_gib=_peak(memory, topology) / GIB,
        beside_gib=bytes_on_chip(step.beside) / GIB,
        flops=flops,
        memory_gib=moves.memory / GIB,
        collectives=moves.counts,
        links_gib={kind: size / GIB for kind, size in moves.links.items()},
        roofline_seconds=takes[bound],
        bound=bound,
        compile_seconds=seconds,
        times=step.times,
    )


def _compiled(lowered: Any) -> Any:
    """A GPU's compiler tries on it how to divide a product into Triton's tiles; where there is none it refuses some, and has cuBLAS."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _peak(memory: Any, topology: Topology) -> float:
    """The compiler's peak; a GPU's has none, and that of devices at hand may leave temporaries out: there all that it lists is added up.

    For a TPU the sum would be too much: the compiler takes programs whose sum is more than the chip has, and refuses by its peak.
    """
    if topology.platform == "tpu" and topology.name != LOCAL:
        return memory.peak_memory_in_bytes
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
