"""Group attention: who may read whom in a packed row, and the `Attend` in which the ways of running the decoder differ.

Letters: M rows, L tokens of a row, Q queries, W keys, K key/value heads, G query heads per key/value head, H head width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Added to the score of a pair that may not see each other; exp of it is 0 in float32, and a row of nothing else stays finite.
MASKED = -1e30

Memory = Any  # what a layer reads from, or leaves for, another call: a pytree whose leaves lead with the layers, or None


# [M, Q, K, G, H] of queries [M, Q, K, G, H], keys and values [M, W, K, H], and [M, Q, W], which is added to the scores.
BiasedAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Attend(Protocol):
    """Attention over the queries, keys and values of one layer."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        """Attends.

        Args:
            query: [..., K, G, H], rotated.
            key: [..., K, H], rotated.
            value: [..., K, H].
            memory: what this layer remembers of earlier tokens.

        Returns:
            [..., K, G, H], and what is to be remembered.
        """
        ...


def group_mask(segments_ML: jax.Array, responses_ML: jax.Array) -> jax.Array:
    """[M, L, L] bool: query (second axis) may read key (third axis). See `PackedRows`."""
    same_segment = segments_ML[:, :, None] == segments_ML[:, None, :]
    own_or_prompt = (responses_ML[:, None, :] == -1) | (responses_ML[:, :, None] == responses_ML[:, None, :])
    length = segments_ML.shape[1]
    not_later = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    return same_segment & own_or_prompt & not_later[None] & (segments_ML >= 0)[:, None, :]


def biased_attention(query: jax.Array, key: jax.Array, value: jax.Array, bias_MQW: jax.Array) -> jax.Array:
    """Softmax attention of Q queries against W keys under an additive mask: 0 where a query may read a key, else `MASKED`.

    Scores are float32. Batch dimensions lead and the normalisation comes after the values: on the CPU that is three times as
    fast as the textbook's order (12 rows of 304 tokens).
    """
    rows, queries, kv_heads, group, width = query.shape
    keys = key.shape[1]
    query_MKQH = (query * query.shape[-1] ** -0.5).transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * queries, width)
    scores = jnp.einsum("mkqh,mkhw->mkqw", query_MKQH, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads * group, queries, keys) + bias_MQW[:, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total_MGQ = jnp.sum(weights, axis=-1)
    weights_MKQW = weights.reshape(rows, kv_heads, group * queries, keys).astype(value.dtype)
    out = jnp.einsum("mkqw,mkwh->mkqh", weights_MKQW, value.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    out = out.reshape(rows, kv_heads * group, queries, width) / total_MGQ[..., None]
    return out.reshape(rows, kv_heads, group, queries, width).transpose(0, 3, 1, 2, 4).astype(value.dtype)
