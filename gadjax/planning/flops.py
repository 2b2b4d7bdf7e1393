"""FLOPs of a traced program: its matrix products, 2 per multiply-add, over all devices.

The body of a scan counts as often as it runs, that of a loop whose bounds are data as often as the caller expects; of a `cond` the
dearest branch counts. What rematerialisation computes again counts again. Of the blocks of a TPU's attention kernel those that
causality leaves count, of a GPU's all. Additions, exponentials and norms do not count.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from gadjax.models.cudnn_attention import GRADIENT, KERNEL

FUSED = {KERNEL: 2, GRADIENT: 5}  # products of Q x W x H

Trips = Callable[[int], float]  # depth of a loop whose bounds are data -> how often it runs


def matrix_flops(jaxpr: Any, trips: Trips) -> float:
    """The FLOPs of a jaxpr.

    Args:
        jaxpr: of a traced function, `jit(f).trace(...).jaxpr.jaxpr`.
        trips: how often loops with data as bounds run: by depth, 0 for one in no other such loop.
    """
    return _count(jaxpr, trips, 0)


def _count(jaxpr: Any, trips: Trips, depth: int) -> float:
    # What gives and does nothing is dead, and the compiler leaves it out: of what is kept, the computation that made it.
    return sum(_of_equation(equation, trips, depth) for equation in jaxpr.eqns if equation.outvars or equation.effects)


def _of_equation(equation: Any, trips: Trips, depth: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, trips, depth)
    if name == "while":
        return trips(depth) * _count(params["body_jaxpr"].jaxpr, trips, depth + 1)
    if name == "cond":
        return max(_count(branch.jaxpr, trips, depth) for branch in params["branches"])
    if name in FUSED:
        queries, keys = (equation.invars[index].aval.shape for index in (0, 1))  # [M, Q, heads, H], [M, W, ..]
        return FUSED[name] * 2.0 * math.prod(queries) * keys[1]
    inner = sum(_count(each, trips, depth) for each in _inner(params))
    if name == "pallas_call":
        blocks = params["grid_mapping"].grid
        return inner * math.prod(blocks) * (blocks[-1] + 1) / (2 * blocks[-1])
    return inner * (params["mesh"].size if name == "shard_map" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each
