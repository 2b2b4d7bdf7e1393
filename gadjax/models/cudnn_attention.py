"""Attention under an additive mask by cuDNN's fused kernel, which never writes scores to memory.

Letters: M rows, Q queries, W keys, K key/value heads, G query heads per key/value head, H head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gadjax.sharding import on_shards

KERNEL = "dot_product_attention_fwd_wrapper"  # JAX's primitive; beside what it attends to it gives what its gradient needs
WIDEST = 128  # H on every GPU that has it
FUSED_QUERIES = 256  # of a block: keys and values of a block are gathered, so that few blocks move less


def serves(dtype: jnp.dtype, head_width: int) -> bool:
    """Whether the kernel takes such numbers; it wants an even number of queries and of keys besides."""
    return dtype == jnp.bfloat16 and head_width <= WIDEST and head_width % 8 == 0


def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias_MQW: jax.Array, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """`gadjax.models.attention.biased_attention`: [M, Q, K, G, H] against [M, W, K, H], each device its own rows and heads."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias_MQW: jax.Array) -> jax.Array:
        heads = query.reshape(*query.shape[:2], -1, query.shape[-1])
        bias_M1QW = bias_MQW[:, None].astype(query.dtype)
        return jax.nn.dot_product_attention(heads, key, value, bias=bias_M1QW, implementation=implementation).reshape(query.shape)

    by_head = ("rows", None, "kv_heads", None)
    return on_shards(attend, [query, key, value, bias_MQW], [(*by_head, None), by_head, by_head, ("rows", None, None)])
