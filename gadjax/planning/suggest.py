"""Meshes and rows that suit a topology: ranked by arithmetic, the best three compiled."""

from collections.abc import Callable
from typing import Any

from gadjax.config import Config
from gadjax.errors import UserError
from gadjax.planning.budget import budget_of
from gadjax.planning.compiled import measure
from gadjax.planning.flops import matrix_flops
from gadjax.planning.programs import Traced
from gadjax.planning.topology import GIB, Topology
from gadjax.sharding import MeshConfig

TENSORS = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4)
ROWS = (4096, 6144, 8192, 12288, 16384)
COMPILED = 3


def suggest(config: Config, topology: Topology, traced_of: Callable[[Config], Traced]) -> list[dict[str, Any]]:
    """The best meshes and rows for the student's step, the best first.

    By arithmetic: seconds are FLOPs at the chips' peak plus what travels over their links, that is the weights three times a micro-batch,
    where `tensor` divides the layers every layer's tokens eight times, and where `context` divides the rows every layer's keys and values
    three times. What does not fit is left out.
    """
    ranked = sorted(
        (found for found in (_judge(each, topology, traced_of) for each in _candidates(config, topology)) if found),
        key=lambda found: found[0],
    )
    suggestions = []
    for seconds, candidate, traced in ranked[:COMPILED]:
        measured = measure(traced.student(), topology)
        mesh = candidate.mesh
        names = {"mesh.fsdp": mesh.fsdp, "mesh.context": mesh.context, "mesh.tensor": mesh.tensor}
        names |= {"data.row_tokens": candidate.data.row_tokens}
        more = {"needed_gib": measured.needed_gib, "roofline_seconds": measured.roofline_seconds}
        suggestions.append(names | {"arithmetic_seconds": seconds} | more)
    return suggestions


def _candidates(config: Config, topology: Topology) -> list[Config]:
    data = config.data
    largest = data.max_prompt_tokens + 9 * data.max_response_tokens
    rows = [size for size in ROWS if data.max_prompt_tokens + data.max_response_tokens <= size <= largest] or [data.row_tokens]
    return [
        config.model_copy(
            update={
                "mesh": MeshConfig(fsdp=topology.chips // (tensor * context), context=context, tensor=tensor),
                "data": data.model_copy(update={"row_tokens": size}),
            }
        )
        for tensor in TENSORS
        for context in CONTEXTS
        if topology.chips % (tensor * context) == 0
        for size in rows
    ]


def _judge(config: Config, topology: Topology, traced_of: Callable[[Config], Traced]) -> tuple[float, Config, Traced] | None:
    """Seconds of the student's step by arithmetic; None for what does not fit or cannot be."""
    try:
        traced = traced_of(config)
    except UserError:
        return None
    tensor, dims = config.mesh.tensor, traced.dims
    if dims.heads % tensor or budget_of(traced).needed > topology.chip.memory / GIB:
        return None
    step, shape = traced.student(), traced.programs.rows(traced.programs.samples)
    micro_batches = traced.work.rows_used(shape, traced.programs.samples)
    weights = 2.0 * sum(leaf.size for leaf in _leaves(traced)) / tensor
    tokens = 2.0 * dims.layers * shape.rows * shape.length / traced.rows_parts  # bytes for each number of every layer
    travels = 8 * dims.width * tokens / config.mesh.context if tensor > 1 else 0.0
    if config.mesh.context > 1:
        travels += 3 * 2 * dims.kv_heads * dims.head_width * tokens / (1 if dims.kv_heads % tensor else tensor)
    links = micro_batches * (3 * weights + travels) / topology.chip.links
    return matrix_flops(step.traced.jaxpr.jaxpr, step.trips) / topology.chips / topology.chip.flops + links, config, traced


def _leaves(traced: Traced) -> list[Any]:
    blocks = traced.programs.models.student.shapes["trunk"]["blocks"]
    return list(blocks.values())
