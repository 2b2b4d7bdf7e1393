"""The student's step beside the bare matrix products that it consists of, in turn on one machine.

    python tests/benchmarks/products.py CONFIG [ROUNDS]

Every product is a jitted function of its own over as many tokens as a full row, or a chunk of the projection, has: forward twice
(student and reference), and once each the gradients by inputs and by weights. Told are the rate of the bare products, all together
as the step has them, the rate of the step's needed products (as `gadjax bench` counts them), and its share of the bare ones.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.algorithms.forward import columns
from gadjax.bench import Bench, stage_to_measure
from gadjax.config import load_config


def products(tokens: int, inputs: int, outputs: int) -> list[tuple[Callable[[], jax.Array], int]]:
    """Forward, and the gradients by inputs and weights, each with how often the step computes it."""
    draw = np.random.default_rng(0).standard_normal
    x, weight, by_out = (jnp.asarray(draw(size), jnp.float32) for size in ((tokens, inputs), (inputs, outputs), (tokens, outputs)))
    forward, by_x, by_weight = (jax.jit(partial(jnp.einsum, how)) for how in ("ti,io->to", "to,io->ti", "ti,to->io"))
    return [(partial(forward, x, weight), 2), (partial(by_x, by_out, weight), 1), (partial(by_weight, x, by_out), 1)]


def bare(made: Bench, rounds: int) -> float:
    """FLOP/s of the bare products."""
    d, rows = made.dims, made.programs.rows(made.programs.samples)
    chunk = rows.rows * columns((rows.rows, rows.length), d.vocabulary)
    answers, heads = int(made.limits(made.programs.samples).sum()), d.heads * d.head_width
    all_tokens = sum(map(len, made.prompts)) + answers
    layer = [(1, d.width, heads), (2, d.width, d.kv_heads * d.head_width), (1, heads, d.width), (2, d.width, d.feed_forward)]
    layer += [(1, d.feed_forward, d.width)]
    shapes = [(rows.rows * rows.length, all_tokens, d.layers * count, *sizes) for count, *sizes in layer]
    seconds = flops = 0.0
    for tokens, needed, count, inputs, outputs in [*shapes, (chunk, answers, 1, d.width, d.vocabulary)]:
        for product, times in products(tokens, inputs, outputs):
            product().block_until_ready()
            taken: list[float] = []
            for _ in range(rounds):
                start = time.perf_counter()
                product().block_until_ready()
                taken.append(time.perf_counter() - start)
            calls = times * count * needed / tokens
            seconds += calls * statistics.median(taken)
            flops += calls * 2.0 * tokens * inputs * outputs
    return flops / seconds


def main(config: Path, rounds: int = 5) -> None:
    """Measures, and tells."""
    made = Bench(*stage_to_measure(load_config(config, [])), repeats=rounds)
    before, step, after = bare(made, rounds), made.student(), bare(made, rounds)
    products, rate = (before + after) / 2, step["needed_gflops_per_second"]
    print(json.dumps({"bare_gflops_per_second": products / 1e9, "step_gflops_per_second": rate, "share": 1e9 * rate / products}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
