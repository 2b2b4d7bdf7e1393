"""Attention with caches against plain softmax attention, written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.models import cache_attention
from gadjax.models.attention import MASKED, biased_attention
from gadjax.models.cache_attention import decode, prefill

K, Q, H = 2, 3, 4
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("block", [4, 256])
def test_prefill_is_causal_attention(monkeypatch, block):
    monkeypatch.setattr(cache_attention, "PREFILL_BLOCK", block)
    tokens = 11
    query, key, value = normal(2, tokens, K, Q, H), normal(2, tokens, K, H), normal(2, tokens, K, H)
    out, (keys, values) = jax.jit(prefill)(query, key, value, None)
    bias = np.where(np.tri(tokens, dtype=bool), 0, MASKED).astype(np.float32)
    expected = biased_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), jnp.broadcast_to(bias, (2, tokens, tokens)))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(keys, key.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(values, value.transpose(0, 2, 1, 3))


# Three places for prompts of up to 5 tokens, 2 samples each; four slots: their prompt's place, their sample, their tokens.
P, R, N = 5, 6, 2
PROMPT_KEYS = [4, 0, 5]
SLOTS = [(2, 1, 3), (0, 0, 0), None, (1, 1, 5)]


def plain(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[Q, H] queries against [T, H]."""
    scores = query @ keys.T / np.sqrt(H)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ values / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("ends", [(0, R), (0, 2, 4, R), (0, 5, R)])
def test_a_slot_reads_its_prompt_its_response_and_itself(ends):
    prompt_key, prompt_value = normal(3, K, H, P), normal(3, K, P, H)
    response_key, response_value = normal(4, K, H, R) + 50, normal(4, K, R, H) - 50  # what lies beyond a slot's tokens is not seen
    for slot, working in enumerate(SLOTS):
        if working:
            response_key[slot, :, :, : working[2]], response_value[slot, :, : working[2]] = (
                normal(K, H, working[2]),
                normal(K, working[2], H),
            )
    query, key, value = normal(4, K, Q, H), normal(4, K, H), normal(4, K, H)
    places = jnp.array([slot[0] * N + slot[1] if slot else 3 * N for slot in SLOTS])
    positions = jnp.array([slot[2] if slot else R for slot in SLOTS])

    attend = jax.jit(decode(places, N, jnp.array(PROMPT_KEYS), positions))
    blocks = [(response_key[..., first:last], response_value[:, :, first:last]) for first, last in itertools.pairwise(ends)]
    out, new = attend(query, key, value, ((prompt_key, prompt_value), blocks))
    new_key, new_value = np.concatenate([keys for keys, _ in new], axis=3), np.concatenate([values for _, values in new], axis=2)
    expected_key, expected_value = response_key.copy(), response_value.copy()
    for slot, working in enumerate(SLOTS):
        if working is None:
            continue
        place, _, position = working
        expected_key[slot, :, :, position], expected_value[slot, :, position] = key[slot], value[slot]
        for head in range(K):
            keys = np.concatenate([prompt_key[place, head].T[: PROMPT_KEYS[place]], expected_key[slot, head].T[: position + 1]])
            values = np.concatenate([prompt_value[place, head][: PROMPT_KEYS[place]], expected_value[slot, head][: position + 1]])
            np.testing.assert_allclose(out[slot, head], plain(query[slot, head], keys, values), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(new_key, expected_key)
    np.testing.assert_array_equal(new_value, expected_value)
    assert np.all(np.isfinite(out))
