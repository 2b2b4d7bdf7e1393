"""Meshes, rows, micro-batches and what gradients keep, as they suit a topology: ranked by arithmetic, the best three compiled."""

import itertools
from collections.abc import Callable
from typing import Any

from gadjax.chips import GIB
from gadjax.config import Config
from gadjax.data.packing import RowShape
from gadjax.errors import UserError
from gadjax.models.rematerialisation import KEPT, Rematerialise
from gadjax.planning.budget import budget_of
from gadjax.planning.compiled import Measured, Refused, measure
from gadjax.planning.flops import matrix_flops
from gadjax.planning.programs import Traced
from gadjax.planning.schedule import seconds_of
from gadjax.planning.topology import Topology
from gadjax.sharding import MeshConfig
from gadjax.terminal import say

TENSORS = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4)
ROW_TOKENS = (4096, 6144, 8192, 12288, 16384)
ROWS = (1, 2, 4)  # of a micro-batch, for each device that has rows of its own
COMPILED = 3
REFUSED = 9  # more that are tried for these, where the compiler finds that they do not fit after all
OF_ROWS = ("student", "discriminator")  # programs that read packed rows

Judged = tuple[tuple[float, float], Config, Traced]
Works = dict[tuple[RowShape, Rematerialise], tuple[float, int]]


def suggest(config: Config, topology: Topology, traced_of: Callable[[Config], Traced]) -> list[dict[str, Any]]:
    """The best meshes and rows for a training step, the best first, as settings of the config and what the compiler says of them.

    Ranked by arithmetic, for the student's step: seconds are the longer of FLOPs at the chips' peak and what travels over their links (of
    equals the one that sends less). These are of a micro-batch five times the weights, gathered three times and their gradients summed;
    where `tensor` divides the layers every layer's tokens eight times, and three times those of all rows, which the compiler gathers for
    the weights' gradients; and where `context` divides the rows every layer's keys and values three times. Copies of the weights, the axis
    `data`, would take memory and save nothing of that.
    Of the best every program of a step is compiled, and those of which all programs fit are put in the order of the whole step's time.
    """
    works: Works = {}
    samples = traced_of(config).programs.samples
    judged = (_judge(each, topology, traced_of, works) for each in _candidates(config, topology, samples))
    ranked = sorted((found for found in judged if found), key=lambda found: found[0])
    suggestions: list[dict[str, Any]] = []
    of_meshes: dict[tuple[str, str], Measured] = {}
    for (seconds, _), candidate, traced in ranked[: COMPILED + REFUSED]:
        if len(suggestions) == COMPILED:
            break
        settings = _settings(candidate)
        say("compiling " + as_written(settings))
        if measured := _measured(candidate, traced, topology, of_meshes):
            needed = max(each.needed_gib for each in measured.values())
            told = {"arithmetic_seconds": seconds, "needed_gib": needed, "seconds_per_step": seconds_of(measured)}
            suggestions.append({"settings": settings} | told)
    return sorted(suggestions, key=lambda suggestion: suggestion["seconds_per_step"])


def as_written(settings: dict[str, Any]) -> str:
    """As the command line takes them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())


def _settings(candidate: Config) -> dict[str, Any]:
    mesh = {f"mesh.{axis}": size for axis, size in candidate.mesh.model_dump().items()}
    rows = {"data.row_tokens": candidate.data.row_tokens, "data.rows": candidate.data.rows}
    return mesh | rows | {"student.rematerialise": candidate.student.rematerialise}


def _measured(candidate: Config, traced: Traced, topology: Topology, of_meshes: dict[tuple[str, str], Measured]) -> dict[str, Measured]:
    """Every program, those with rows first, which are the largest; nothing if one does not fit.

    `of_meshes` is filled with the others, which do not depend on the rows.
    """
    measured: dict[str, Measured] = {}
    for step in reversed(traced.all()):
        known = candidate.mesh.model_dump_json(), step.name
        try:
            found = of_meshes.get(known) or measure(step, topology)
        except Refused:
            return {}
        if step.name not in OF_ROWS:
            of_meshes[known] = found
        if found.needed_gib > topology.chip.memory / GIB:
            return {}
        measured[step.name] = found
    return measured


def _candidates(config: Config, topology: Topology, samples: int) -> list[Config]:
    data, devices = config.data, len(topology.devices)
    shortest, largest = (data.max_prompt_tokens + responses * data.max_response_tokens for responses in (1, 1 + samples))
    lengths = [size for size in ROW_TOKENS if shortest <= size <= largest] or [data.row_tokens]
    found = []
    for tensor, context, length, rows, again in itertools.product(TENSORS, CONTEXTS, lengths, ROWS, KEPT):
        if devices % (tensor * context) == 0:
            mesh = MeshConfig(fsdp=devices // (tensor * context), context=context, tensor=tensor)
            cut = data.model_copy(update={"row_tokens": length, "rows": rows * mesh.fsdp})
            student = config.student.model_copy(update={"rematerialise": again})
            found.append(config.model_copy(update={"mesh": mesh, "data": cut, "student": student}))
    return found


def _judge(config: Config, topology: Topology, traced_of: Callable[[Config], Traced], works: Works) -> Judged | None:
    """The student's step by arithmetic: its seconds, and those of its links alone; None for what does not fit or cannot be.

    `works` is filled with the FLOPs and micro-batches of each shape of rows, which do not depend on the mesh.
    """
    try:
        traced = traced_of(config)
    except UserError:
        return None
    tensor, dims = config.mesh.tensor, traced.dims
    if dims.heads % tensor or budget_of(traced).needed > topology.chip.memory / GIB:
        return None
    each = traced.programs.samples if traced.judges else 1
    shape = traced.programs.rows(each)
    kind = shape, config.student.rematerialise
    if kind not in works:
        step = traced.student()
        works[kind] = matrix_flops(step.traced.jaxpr.jaxpr, step.trips), traced.work.rows_used(shape, each)
    flops, micro_batches = works[kind]
    weights = 2.0 * sum(leaf.size for leaf in _leaves(traced)) / tensor
    tokens = 2.0 * dims.layers * shape.rows * shape.length / traced.rows_parts  # bytes for each number of every layer
    travels = dims.width * (8 * tokens / config.mesh.context + 3 * tokens * traced.rows_parts) if tensor > 1 else 0.0
    if config.mesh.context > 1:
        travels += 3 * 2 * dims.kv_heads * dims.head_width * tokens / (1 if dims.kv_heads % tensor else tensor)
    links = micro_batches * (5 * weights + travels) / topology.chip.links
    computes = flops / len(topology.devices) / topology.chip.flops
    return (max(computes, links), links), config, traced


def _leaves(traced: Traced) -> list[Any]:
    blocks = traced.programs.models.student.shapes["trunk"]["blocks"]
    return list(blocks.values())
