"""Group attention: who may read whom, in a packed row, in a prefill and in a decode step.

Each maker returns an `Attend`: the one thing that differs between the three ways of running the decoder.

Letters: M rows, L tokens of a row, B groups, N responses per group, P prompt tokens, R response tokens, K key/value heads,
G query heads per key/value head, H head width.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Added to the score of a pair that may not see each other; exp of it is 0 in float32, and a row of nothing else stays finite.
MASKED = -1e30

Memory = Any  # what a layer reads from, or leaves for, another call: a pytree whose leaves lead with the layers, or None


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


def _masked_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask_MLL: jax.Array) -> jax.Array:
    """Softmax attention under a dense mask, scores in float32."""
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("mqkgh,mskh->mkgqs", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask_MLL[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("mkgqs,mskh->mqkgh", weights.astype(value.dtype), value)


def packed(segments_ML: jax.Array, responses_ML: jax.Array) -> Attend:
    """Attention within packed rows. The dense mask is made once and shared by all layers."""
    mask_MLL = group_mask(segments_ML, responses_ML)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        return _masked_attention(query, key, value, mask_MLL), memory

    return attend


def prefill(lengths_B: jax.Array, prompt_tokens: int) -> Attend:
    """Causal attention over prompts padded on the right to P; remembers keys and values as [B, K, P, H]."""
    segments_BP = jnp.where(jnp.arange(prompt_tokens)[None, :] < lengths_B[:, None], 0, -1)
    mask_BPP = group_mask(segments_BP, jnp.full_like(segments_BP, -1))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        del memory
        return _masked_attention(query, key, value, mask_BPP), (key.swapaxes(1, 2), value.swapaxes(1, 2))

    return attend


def decode(prompt_lengths_B: jax.Array, response_length: jax.Array) -> Attend:
    """One new token of every response, read against the prompt's cache, the response's own cache and itself.

    The prompt's keys and values, [B, K, P, H], are stored once per group and read by all its N samples in one matrix
    product; the responses' are [B, N, K, R, H], of which the first `response_length` are filled. The three parts are
    one softmax. What is remembered is the new token's key and value alone, [B, N, K, H]: the caller writes them into
    the cache, in place.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        (prompt_key, prompt_value), (response_key, response_value) = memory
        scale = query.shape[-1] ** -0.5
        prompt_tokens, response_tokens = prompt_key.shape[2], response_key.shape[3]
        on_prompt = jnp.einsum("bnkgh,bkph->bnkgp", query, prompt_key, preferred_element_type=jnp.float32)
        on_response = jnp.einsum("bnkgh,bnkrh->bnkgr", query, response_key, preferred_element_type=jnp.float32)
        on_itself = jnp.einsum("bnkgh,bnkh->bnkg", query, key, preferred_element_type=jnp.float32)
        in_prompt = (jnp.arange(prompt_tokens)[None, :] < prompt_lengths_B[:, None])[:, None, None, None, :]
        in_response = jnp.arange(response_tokens)[None, None, None, None, :] < response_length
        scores = jnp.concatenate(
            [jnp.where(in_prompt, on_prompt, MASKED), jnp.where(in_response, on_response, MASKED), on_itself[..., None]], axis=-1
        )
        weights = jax.nn.softmax(scores * scale, axis=-1).astype(value.dtype)
        of_prompt, of_response, of_itself = jnp.split(weights, [prompt_tokens, prompt_tokens + response_tokens], axis=-1)
        out = (
            jnp.einsum("bnkgp,bkph->bnkgh", of_prompt, prompt_value)
            + jnp.einsum("bnkgr,bnkrh->bnkgh", of_response, response_value)
            + of_itself * value[:, :, :, None, :]
        )
        return out, (key, value)

    return attend
