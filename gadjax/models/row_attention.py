"""Attention within packed rows, in ways that compute the same: who may read whom says `gadjax.models.attention.group_mask`.

Letters: M rows, L tokens of a row, I blocks of a row, Q queries of a block, W keys of a block, P prompt tokens, K key/value heads,
G query heads per key/value head, H head width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.models.attention import MASKED, Attend, BiasedAttention, Memory, biased_attention, group_mask
from gadjax.models.cudnn_attention import FUSED_QUERIES, fused_attention, has_kernel
from gadjax.models.splash_attention import splash
from gadjax.types import Cells

AttendRows = Callable[[Cells], Attend]

QUERIES = 64  # of a block


def dense(cells: Cells, attention: BiasedAttention = biased_attention) -> Attend:
    """Every token against every other one, under a mask that is made once and shared by all layers."""
    bias_MLL = jnp.where(group_mask(cells.segments_ML, cells.responses_ML), 0.0, MASKED)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        return attention(query, key, value, bias_MLL), memory

    return attend


def blocks(prompt_tokens: int, response_tokens: int, queries: int = QUERIES, attention: BiasedAttention = biased_attention) -> AttendRows:
    """Blocks of Q tokens, each against its window and its prompt: P + R + Q keys a token, whatever the row's length.

    The window ends with the block and begins R tokens (rounded up to blocks) before it, so that it holds what a token may see of
    its own response. It holds the prompts of all groups that begin in it, too. So only one prompt can lie before it: that
    of the group of the block's first token, which is gathered.

    Args:
        prompt_tokens: P, the longest prompt.
        response_tokens: R, the longest response.
        queries: Q.
        attention: of each block.
    """
    behind = -(-response_tokens // queries)  # blocks of the window before its last one

    def in_blocks(array_ML: jax.Array, before: int = 0, fill: int = 0) -> jax.Array:
        """[M, L, ...] to [M, I, Q, ...], with `before` blocks of `fill` in front and the last block filled up."""
        rows, length, *rest = array_ML.shape
        pads = [(0, 0), (before * queries, -length % queries), *[(0, 0)] * len(rest)]
        return jnp.pad(array_ML, pads, constant_values=fill).reshape(rows, -1, queries, *rest)

    def windows(array_ML: jax.Array, fill: int) -> jax.Array:
        """[M, L, ...] to [M, I, W, ...]: every block with those before it."""
        padded = in_blocks(array_ML, behind, fill)
        count = padded.shape[1] - behind
        return jnp.concatenate([padded[:, shift : shift + count] for shift in range(behind + 1)], axis=2)

    def for_rows(cells: Cells) -> Attend:
        rows, length = cells.tokens_ML.shape
        columns_ML = jnp.broadcast_to(jnp.arange(length), (rows, length))
        place_MIP = jnp.minimum(_segment_starts(cells.segments_ML)[:, ::queries, None] + jnp.arange(prompt_tokens)[None, None], length - 1)

        def keys(array_ML: jax.Array, fill: int = 0) -> jax.Array:
            """[M, L, ...] to [M, I, P + W, ...]: the first tokens of the block's first group, and the block's window."""
            flat = place_MIP.reshape(rows, -1, *[1] * (array_ML.ndim - 2))
            prompt = jnp.take_along_axis(array_ML, flat, axis=1).reshape(*place_MIP.shape, *array_ML.shape[2:])
            return jnp.concatenate([prompt, windows(array_ML, fill)], axis=2)

        facts = (cells.segments_ML, cells.responses_ML, columns_ML)
        segment_Q, response_Q, column_Q = (in_blocks(fact, fill=-1)[..., None] for fact in facts)
        segment_W, response_W, column_W = (keys(fact, -1)[:, :, None] for fact in facts)
        seen = (segment_Q == segment_W) & (segment_W >= 0) & (column_Q >= column_W) & ((response_W == -1) | (response_Q == response_W))
        begins_I = (jnp.arange(place_MIP.shape[1]) - behind) * queries
        twice_MIP = place_MIP >= begins_I[None, :, None]  # the window has it too
        twice_MIW = jnp.pad(twice_MIP, ((0, 0), (0, 0), (0, (behind + 1) * queries)))
        bias = jnp.where(seen & ~twice_MIW[:, :, None], 0.0, MASKED)
        bias = bias.reshape(-1, *bias.shape[2:])

        def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
            query_Q = in_blocks(query)
            query_Q = query_Q.reshape(-1, *query_Q.shape[2:])
            key_W, value_W = (keys(array).reshape(query_Q.shape[0], -1, *array.shape[2:]) for array in (key, value))
            out = attention(query_Q, key_W, value_W, bias)
            return out.reshape(rows, -1, *query.shape[2:])[:, :length], memory

        return attend

    return for_rows


def automatic(prompt_tokens: int, response_tokens: int, device: Any) -> AttendRows:
    """By a kernel where such a device has one, and in what computes less in rows of the length that they are given: a TPU's kernel takes
    whole rows, and elsewhere short rows are dense.
    """
    if device.platform == "tpu":
        return splash
    attention, queries, even = (fused_attention, FUSED_QUERIES, 2) if has_kernel(device) else (biased_attention, QUERIES, 1)
    in_blocks = blocks(prompt_tokens + prompt_tokens % even, response_tokens, queries, attention)

    def for_rows(cells: Cells) -> Attend:
        keys, length = prompt_tokens + response_tokens + queries, cells.tokens_ML.shape[1]
        return in_blocks(cells) if length >= 2 * keys or length % even else dense(cells, attention)

    return for_rows


def _segment_starts(segments_ML: jax.Array) -> jax.Array:
    """[M, L] int32: the column where the token's segment begins."""
    columns = jnp.arange(segments_ML.shape[1])
    before_ML = jnp.pad(segments_ML, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
    return jax.lax.cummax(jnp.where(segments_ML != before_ML, columns[None], 0), axis=1)
