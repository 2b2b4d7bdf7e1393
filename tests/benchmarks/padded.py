"""The discriminator's step beside the same step in the padded way: for each of N pairs teacher and student in sequences of their own.

    python tests/benchmarks/padded.py CONFIG [ROUNDS]

Both have the same network, optimizer, texts and machine and take turns. The padded way runs 2 N sequences of P + R tokens for every
prompt, in micro-batches of 8, as the paper's code lays them out. Told are medians in seconds, and how many times as many steps ours makes.

Letters: A micro-batches, M sequences of a micro-batch, L = P + R tokens of a sequence.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gadjax import losses
from gadjax.bench import Bench, stage_to_measure
from gadjax.config import load_config
from gadjax.data.packing import pack
from gadjax.models.row_attention import dense
from gadjax.optimizer import update
from gadjax.types import Cells, Role

SEQUENCES = 8  # of a micro-batch; peers are fastest so


def sequences(made: Bench, responses: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [A, M, L] and last places [A, M] of every pair: the teacher's sequence, then a student's."""
    data = made.config.data
    rows = [
        [*prompt, *answer]
        for prompt, (teacher, *students) in zip(made.prompts, responses, strict=True)
        for student in students
        for answer in (teacher, student)
    ]
    length = data.max_prompt_tokens + data.max_response_tokens
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    last = np.array([len(row) - 1 for row in rows], np.int32)
    return tokens.reshape(-1, SEQUENCES, length), last.reshape(-1, SEQUENCES)


def padded_step(made: Bench) -> Callable[[Role, jax.Array, jax.Array], tuple[Role, jax.Array]]:
    """(discriminator, tokens, last places) -> (discriminator, loss)."""
    network, optimizer = made.programs.models.discriminator, made.programs.models.optimizer

    def step(role: Role, tokens_AML: jax.Array, last_AM: jax.Array) -> tuple[Role, jax.Array]:
        pairs = last_AM.size // 2

        def loss(params: Any, tokens_ML: jax.Array, last_M: jax.Array) -> jax.Array:
            zeros_ML = jnp.zeros_like(tokens_ML)
            places_ML = zeros_ML + jnp.arange(tokens_ML.shape[1], dtype=jnp.int32)[None]
            cells = Cells(tokens_ML, places_ML, zeros_ML, zeros_ML - 1, zeros_ML, zeros_ML, zeros_ML)
            model = network.bind(params)
            scores_ML = model.scores(model.trunk(tokens_ML, places_ML, dense(cells))[0])
            scores_M = jnp.take_along_axis(scores_ML, last_M[:, None], axis=1)[:, 0]
            return jnp.sum(losses.bradley_terry(scores_M[::2], scores_M[1::2, None])) / pairs

        def add(total: Any, micro: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(role.params, *micro)
            return jax.tree.map(jnp.add, total, grads), value

        grads, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, role.params), (tokens_AML, last_AM))
        return update(optimizer, role, grads)[0], jnp.sum(values)

    return made.programs.models.jit(step, donate_argnums=0)


def main(config: Path, rounds: int = 5) -> None:
    """Measures, and tells."""
    made = Bench(*stage_to_measure(load_config(config, [])), repeats=rounds)
    programs, each = made.programs, 1 + made.programs.samples
    responses = made.responses(each)
    rows = programs.models.place_rows(pack(made.prompts, responses, programs.discriminator_rows()))
    network = programs.models.discriminator
    roles = {"ours": made.role(network), "padded": made.role(network)}
    tokens, last = map(jnp.asarray, sequences(made, responses))
    padded = padded_step(made)
    found: dict[str, float] = {}

    def ours() -> None:
        roles["ours"], _, metrics = programs.discriminator_step(roles["ours"], rows)
        found["ours"] = float(metrics["discriminator/loss"])

    def theirs() -> None:
        roles["padded"], loss = padded(roles["padded"], tokens, last)
        found["padded"] = float(loss)

    seconds: dict[str, list[float]] = {"ours": [], "padded": []}
    for at in range(rounds + 1):
        for name, step in (("ours", ours), ("padded", theirs)):
            start = time.perf_counter()
            step()
            if at:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
            else:
                np.testing.assert_allclose(found[name], found["ours"], rtol=1e-4)  # the same loss of the same weights
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps({f"{name}_seconds": value for name, value in medians.items()} | {"times": medians["padded"] / medians["ours"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
