"""Attention under a mask by cuDNN's fused kernel, which never writes scores to memory.

Letters: M rows, Q queries, W keys, K key/value heads, G query heads per key/value head, H head width.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gadjax.models.attention import biased_attention
from gadjax.sharding import on_shards, parts_of

# JAX's primitives. The forward gives, beside what it attends to, what its gradient needs.
KERNEL, GRADIENT = "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"
OLDEST = 8  # compute capability
WIDEST = 128  # H on every GPU that has it
FUSED_QUERIES = 256  # of a block: keys and values of a block are gathered, so that few blocks move less


def has_kernel(device: Any) -> bool:
    """Whether it is a GPU on which the kernel runs."""
    capability = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of AMD's, letters
    return device.platform == "gpu" and capability.isdigit() and int(capability) >= OLDEST


def serves(dtype: jnp.dtype, head_width: int) -> bool:
    """Whether the kernel takes such numbers; it wants an even number of queries and of keys besides."""
    return dtype == jnp.bfloat16 and head_width <= WIDEST and head_width % 8 == 0


def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias_MQW: jax.Array, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """`gadjax.models.attention.biased_attention`, by the kernel where it serves: on each device its own rows, or blocks, and heads."""
    rows, queries, kv_heads, group, width = query.shape
    if not serves(query.dtype, width):
        return biased_attention(query, key, value, bias_MQW)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, readable: jax.Array) -> jax.Array:
        # As a mask, not as a bias: JAX then adds a number of which cuDNN makes no NaN where a query reads nothing.
        return jax.nn.dot_product_attention(query, key, value, mask=readable[:, None], implementation=implementation)

    copies = math.lcm(kv_heads, parts_of("heads", kv_heads * group)) // kv_heads  # so that every device has the keys of its queries
    key, value = (jnp.repeat(array, copies, axis=2) for array in (key, value))
    first = "groups" if parts_of("groups", rows) > 1 else "rows"  # of blocks each is on its own, wherever in a row it is
    arrays = [query.reshape(rows, queries, kv_heads * group, width), key, value, bias_MQW == 0]
    return on_shards(attend, arrays, [*[(first, None, "heads", None)] * 3, (first, None, None)]).reshape(query.shape)
