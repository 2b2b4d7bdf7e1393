"""The ways of attending in packed rows compute what the dense mask computes, forward and backward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.data.packing import RowShape, pack
from gadjax.models.attention import Attend
from gadjax.models.row_attention import AttendRows, blocks, dense
from gadjax.models.splash_attention import splash
from gadjax.types import Cells

P, R, LENGTH, RESPONSES = 9, 12, 62, 3
GROUPS, KV_HEADS, GROUP, WIDTH = 12, 2, 2, 8


def packed(seed: int) -> Cells:
    """Random groups in rows: several in one row, some split over two, prompts of one token, responses of one token."""
    rng = np.random.default_rng(seed)
    prompts = [(0,) * int(rng.integers(1, P + 1)) for _ in range(GROUPS)]
    longest = [R if group % 2 else 2 for group in range(GROUPS)]
    responses = [[(0,) * int(length) for length in rng.integers(1, most + 1, RESPONSES)] for most in longest]
    shape = RowShape.holding(GROUPS, RESPONSES, rows=10, length=LENGTH, prompt_tokens=P, response_tokens=R)
    return jax.tree.map(lambda cell: cell[0], pack(prompts, responses, shape).cells)


def attended(way: AttendRows, cells: Cells) -> list[np.ndarray]:
    """The output at all tokens and the gradients by queries, keys and values, under random weights of what is no padding."""
    rng = np.random.default_rng(1)

    def draw(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((*cells.tokens_ML.shape, *sizes)), jnp.float32)

    query, key, value, probe = draw(KV_HEADS, GROUP, WIDTH), draw(KV_HEADS, WIDTH), draw(KV_HEADS, WIDTH), draw(KV_HEADS, GROUP, WIDTH)
    valid = jnp.asarray(cells.segments_ML >= 0)[..., None, None, None]

    @jax.jit
    def run(cells: Cells, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
        def output(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.where(valid, way(cells)(query, key, value, None)[0], 0.0)

        out, back = jax.vjp(output, query, key, value)
        return out, *back(probe)

    return [np.asarray(array) for array in run(cells, query, key, value)]


def in_kernel(cells: Cells) -> Attend:
    return splash(cells, interpret=True)


WAYS: dict[str, Callable[[], AttendRows]] = {
    "blocks of 8": lambda: blocks(P, R, queries=8),
    "blocks that divide neither row nor response": lambda: blocks(P, R, queries=5),
    "blocks longer than a response": lambda: blocks(P, R, queries=16),
    "one block": lambda: blocks(P, R, queries=64),
    "the TPU's kernel": lambda: in_kernel,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_dense_way(way: str):
    for seed in range(3):
        cells = packed(seed)
        assert len(np.unique(cells.groups_ML)) == GROUPS and np.any(cells.segments_ML > 1)
        for found, wanted in zip(attended(WAYS[way](), cells), attended(dense, cells), strict=True):
            assert np.abs(wanted).max() > 0.5
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
def test_padding_has_no_part_in_it(way: str):
    cells = packed(0)
    empty = cells.segments_ML < 0
    noisy = cells._replace(responses_ML=np.where(empty, 1, cells.responses_ML), positions_ML=np.where(empty, 3, cells.positions_ML))
    for found, wanted in zip(attended(WAYS[way](), noisy), attended(WAYS[way](), cells), strict=True):
        np.testing.assert_array_equal(found, wanted)
