"""Attention within packed rows on a TPU: one call of JAX's splash kernel, which knows nothing of groups, and never an L x L mask.

The kernel hides what comes later and what is in another segment. That a response does not read its siblings is said in extra
dimensions of queries and keys, two for each bit of the response's index: the query has (b, 1 - b), the key -(1 - b), -b, both times
`HIDE`. They add exactly 0 to the score of a pair in one response and at most -HIDE² to any other; prompts have zeros there and add
nothing. No term of a readable pair is other than 0, so nothing is rounded away.

Letters: M rows, L tokens of a row, K key/value heads, G query heads per key/value head, H head width, E extra dimensions.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask, MultiHeadMask

from gadjax.models.attention import Attend, Memory
from gadjax.sharding import on_shards, parts_of
from gadjax.types import Cells

BITS = 10  # of the index of a response: groups of at most 1024
HIDE = 128.0  # exact in bfloat16; its square makes exp of any score 0
ATTENDED = "attended"  # the name of what the kernel's gradient needs of its forward, for who keeps it
BLOCKS = (512, 256, 128)  # tokens that the kernel takes at a time; the first that divides the row, which is filled up to the last


def splash(cells: Cells, *, interpret: bool = False) -> Attend:
    """Every token against every earlier one of its group that it may read.

    Args:
        cells: the rows.
        interpret: runs the kernel's steps one by one, on any device; for tests.
    """
    length = cells.tokens_ML.shape[1]
    shards = parts_of("queries", length)
    fill = -length % (BLOCKS[-1] * shards)
    block = next(size for size in BLOCKS if (length + fill) // shards % size == 0)
    masks, way = _kernel(length + fill, shards, block, interpret)
    segments_ML = jnp.pad(cells.segments_ML, ((0, 0), (0, fill)), constant_values=-1)
    query_tags, key_tags = _tags(cells.responses_ML)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        rows, _, kv_heads, group, width = query.shape
        heads = kv_heads * group
        query = _tagged(query * width**-0.5, query_tags).reshape(rows, length, heads, -1)
        copies = math.lcm(kv_heads, parts_of("heads", heads)) // kv_heads  # so that every device has the keys of its queries
        key, value = (jnp.repeat(array, copies, axis=2) for array in (_tagged(key, key_tags), value))
        by_head = [jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, fill), (0, 0))) for array in (query, key, value)]
        names = [("rows", "heads", tokens, None) for tokens in ("queries", None, None)]
        of_masks = [(None, "queries", None) if mask.ndim == 3 else ("queries",) for mask in masks]
        arrays = [*by_head, segments_ML, segments_ML, *masks]
        out = on_shards(partial(_run, way), arrays, [*names, ("rows", "queries"), ("rows", None), *of_masks])
        return out[:, :, :length].swapaxes(1, 2).reshape(rows, length, kv_heads, group, width), memory

    return attend


def _kernel(length: int, shards: int, block: int, interpret: bool) -> tuple[list[jax.Array], Any]:
    """The kernel for queries in so many parts: what it knows of each block of queries, one part after the other, and the rest."""
    sizes = kernel.BlockSizes(**dict.fromkeys(SIZES, block))
    mask = MultiHeadMask([CausalMask((length, length), shard_count=shards)])  # of every head
    made = kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret, residual_checkpoint_name=ATTENDED
    )
    return jax.tree.flatten(made)


def _run(way: Any, query: jax.Array, key: jax.Array, value: jax.Array, asking: jax.Array, asked: jax.Array, *masks: jax.Array) -> jax.Array:
    """[M, heads, L, ...] each, the segments of queries and of keys; what is on one device."""
    attention = jax.tree.unflatten(way, masks)
    out: Any = jax.vmap(attention)(query, key, value, kernel.SegmentIds(asking, asked))
    return out


SIZES = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")


def _tags(responses_ML: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[M, L, E] float32 extra dimensions of queries and of keys."""
    bits_MLb = (jnp.maximum(responses_ML, 0)[..., None] >> jnp.arange(BITS)[None, None]) & 1
    both_MLE = HIDE * jnp.concatenate([bits_MLb, 1 - bits_MLb], axis=-1).astype(jnp.float32)
    other_MLE = -HIDE * jnp.concatenate([1 - bits_MLb, bits_MLb], axis=-1).astype(jnp.float32)
    answers_ML1 = (responses_ML >= 0)[..., None]
    return jnp.where(answers_ML1, both_MLE, 0.0), jnp.where(answers_ML1, other_MLE, 0.0)


def _tagged(array: jax.Array, tags_MLE: jax.Array) -> jax.Array:
    """[M, L, ..., H] to [M, L, ..., H + E]."""
    between = array.ndim - 3
    tags = tags_MLE.reshape(*tags_MLE.shape[:2], *[1] * between, -1).astype(array.dtype)
    return jnp.concatenate([array, jnp.broadcast_to(tags, (*array.shape[:-1], tags.shape[-1]))], axis=-1)
