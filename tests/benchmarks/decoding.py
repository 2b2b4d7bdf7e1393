"""The floor of a decode step: its matrix products alone, at few rows, in the layouts that were tried. Milliseconds of a step of the
peers' model (39 M parameters, float32), and what they make of the peers' rollout if nothing else took time.

python tests/benchmarks/decoding.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.bench import lengths_of

D, F, V, KV, LAYERS = 512, 1408, 32_000, 128, 8
STEPS, REPEATS = 20, 5
ROWS = (32, 24, 20, 16, 12, 8, 4, 2, 1)
HALVES = (32, 16, 8)  # the numbers of slots that the engine has, one after the other
STEP = "all of a step"  # as the engine has them, layer by layer: together they do not stay in the processor's cache

Weights = list[jax.Array]


def weights(*shape: int, count: int = LAYERS) -> Weights:
    return [0.02 * jax.random.normal(jax.random.key(index), shape) for index in range(count)]


def seconds(step: Callable[..., jax.Array], x: jax.Array, *others: Any) -> float:
    """The fastest of a few loops, for one step of it; what a step gives goes into the next."""
    loop = jax.jit(lambda x, *others: jax.lax.fori_loop(0, STEPS, lambda _, x: step(x, *others), x))
    loop(x, *others).block_until_ready()
    took: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        loop(x, *others).block_until_ready()
        took.append(time.perf_counter() - start)
    return min(took) / STEPS


def head(x: jax.Array, weight_DV: jax.Array) -> jax.Array:
    return x + 1e-9 * jnp.max(x @ weight_DV, axis=1, keepdims=True)


def tied_head(x: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return x + 1e-9 * jnp.max(jnp.einsum("sd,vd->sv", x, weight_VD), axis=1, keepdims=True)


def feed_forward(x: jax.Array, gates: Weights, ups: Weights, downs: Weights) -> jax.Array:
    for gate, up, down in zip(gates, ups, downs, strict=True):
        x = x + 1e-6 * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return x


def fused_feed_forward(x: jax.Array, both: Weights, downs: Weights) -> jax.Array:
    for gate_up, down in zip(both, downs, strict=True):
        gate, up = jnp.split(x @ gate_up, 2, axis=1)
        x = x + 1e-6 * ((jax.nn.silu(gate) * up) @ down)
    return x


def attention(x: jax.Array, queries: Weights, keys: Weights, values: Weights, outputs: Weights) -> jax.Array:
    for query, key, value, output in zip(queries, keys, values, outputs, strict=True):
        x = x + 1e-6 * ((x @ query + jnp.tile(x @ key + x @ value, (1, D // KV))) @ output)
    return x


def step(x: jax.Array, gates: Weights, ups: Weights, downs: Weights, kv: list[Weights], weight_DV: jax.Array) -> jax.Array:
    for layer in range(LAYERS):
        x = attention(x, *([each[layer]] for each in kv))
        x = feed_forward(x, [gates[layer]], [ups[layer]], [downs[layer]])
    return head(x, weight_DV)


def main() -> None:
    projection = weights(V, D, count=1)[0]
    gates, downs, head_DV = weights(D, F), weights(F, D), jnp.array(projection.T)
    ups = [gate[:, ::-1] for gate in gates]
    kv = [weights(D, D), weights(D, KV), weights(D, KV), weights(D, D)]
    tried: dict[str, tuple[Any, ...]] = {
        "head [D, V]": (head, head_DV),
        "head [V, D]": (tied_head, projection),
        "gate, up, down": (feed_forward, gates, ups, downs),
        "gate and up in one": (fused_feed_forward, weights(D, 2 * F), downs),
        "query, key, value, output": (attention, *kv),
        STEP: (step, gates, ups, downs, kv, head_DV),
    }
    print(f"{'rows':>26}", *(f"{rows:>6}" for rows in ROWS))
    took: dict[str, list[float]] = {}
    for name, (products, *others) in tried.items():
        took[name] = [1e3 * seconds(products, weights(rows, D, count=1)[0], *others) for rows in ROWS]
        print(f"{name:>26}", *(f"{each:6.2f}" for each in took[name]))
    of_rows: dict[int, float] = dict(zip(ROWS, took[STEP], strict=True))
    lengths = lengths_of(32, 256, 0)
    alive = [sum(length > step for length in lengths) for step in range(max(lengths))]
    for offered in (HALVES, (*HALVES, 4), (*HALVES, 24, 20, 12), ROWS):
        floor = sum(min(of_rows[rows] for rows in offered if rows >= count) for count in alive) / 1e3
        slots = ", ".join(map(str, sorted(offered, reverse=True)))
        print(f"products of the rollout with {slots} slots: {floor:.2f} s, {sum(lengths) / floor:.0f} tokens/s")


if __name__ == "__main__":
    main()
