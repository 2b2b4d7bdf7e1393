"""Draws in two steps are those of one cumulated sum, on one device and with the vocabulary divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.rollout.sampling import draw, integer_probabilities, sample
from gadjax.sharding import MeshConfig, jit_on, make_mesh, named_sharding

SLOTS = 64
KEYS = jax.random.split(jax.random.key(1), SLOTS)


def logits(vocabulary: int) -> np.ndarray:
    """Of all kinds: flat, peaked, and certain of the last token."""
    made = np.random.default_rng(vocabulary).standard_normal((SLOTS, vocabulary), np.float32) * np.linspace(0, 20, SLOTS)[:, None]
    made[-1] = -1e4
    made[-1, -1] = 0
    return made.astype(np.float32)


def by_one_sum(weights: np.ndarray) -> np.ndarray:
    until = np.cumsum(weights, axis=-1, dtype=np.int64)
    drawn = [int(jax.random.randint(key, (), 0, int(total))) for key, total in zip(KEYS, until[:, -1], strict=True)]
    return np.array([np.searchsorted(row, number, side="right") for row, number in zip(until, drawn, strict=True)])


@pytest.mark.parametrize("vocabulary", [2, 24, 127, 128, 129, 1000, 32_000])
def test_two_steps_draw_what_one_sum_draws(vocabulary):
    weights = integer_probabilities(jnp.asarray(logits(vocabulary)))
    drawn = np.asarray(jax.jit(draw)(weights, KEYS))
    np.testing.assert_array_equal(drawn, by_one_sum(np.asarray(weights)))
    assert drawn[-1] == vocabulary - 1


def test_tokens_without_probability_are_not_drawn_at_the_chunks_edges():
    weights = np.zeros((SLOTS, 1000), np.int32)
    weights[:, [7, 8, 15, 16, 999]] = 2**24
    drawn = np.asarray(draw(jnp.asarray(weights), KEYS))
    assert set(drawn.tolist()) == {7, 8, 15, 16, 999}


@pytest.mark.parametrize("vocabulary", [512, 1000])
def test_a_divided_vocabulary_gives_the_same_tokens_and_log_probabilities(vocabulary):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    rows = logits(vocabulary)
    placed = jax.device_put(rows, named_sharding(("slots", "vocabulary"), rows.shape, mesh))
    positions = jnp.arange(SLOTS)
    for temperature in (0.8, 0.0):
        token, logp = jax.jit(lambda x, t=temperature: sample(x, KEYS, positions, t))(rows)
        token_8, logp_8 = jit_on(mesh, lambda x, t=temperature: sample(x, KEYS, positions, t))(placed)
        np.testing.assert_array_equal(token, token_8)
        np.testing.assert_allclose(logp, logp_8, rtol=0, atol=1e-5)
