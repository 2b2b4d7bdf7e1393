"""Attention with caches: a prefill that fills them, and a decode step that reads them.

Letters: B prompts prefilled together, G places for prompts, N samples of a prompt, S decode slots, P prompt tokens, R response
tokens, K key/value heads, Q query heads per key/value head, H head width.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gadjax.models.attention import MASKED, Attend, Memory

PREFILL_BLOCK = 256  # queries of a prompt that are scored together
RESPONSE_BLOCK = 64  # keys of a response that are read together, or more where responses are long
RESPONSE_BLOCKS = 8  # no more of these

Block = tuple[jax.Array, jax.Array]  # of a response's cache, keys [S, K, H, t] and values [S, K, t, H]


class Part(NamedTuple):
    """A softmax over a part of the keys, to be merged with another part.

    Attributes:
        top: [...] the largest score, float32.
        total: [...] sum of exp(score - top).
        out: [..., H] sum of exp(score - top) * value.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


def _read(query: jax.Array, keys: jax.Array, values: jax.Array, readable: jax.Array) -> Part:
    """Queries [..., q, H], already scaled, against keys [..., H, t] and values [..., t, H]; `readable` broadcasts to [..., q, t]."""
    scores = jnp.einsum("...qh,...ht->...qt", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(readable, scores, MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("...qt,...th->...qh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Part(top, jnp.sum(weights, axis=-1), out)


def _merge(one: Part, other: Part) -> Part:
    """Both parts as one. A part in which nothing was readable has no weight beside one with something: the other comes out, bit for bit."""
    top = jnp.maximum(one.top, other.top)
    ours, theirs = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Part(top, one.total * ours + other.total * theirs, one.out * ours[..., None] + other.out * theirs[..., None])


def prefill(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
    """An `Attend`: causal attention over prompts [B, P]; remembers keys as [B, K, H, P] and values as [B, K, P, H].

    Prompts are padded on the right, where nothing real looks: no lengths are needed.
    """
    del memory
    prompt_tokens, width = query.shape[1], query.shape[-1]
    query_BKQPH = (query * width**-0.5).transpose(0, 2, 3, 1, 4)
    key_BKHP, value_BKPH = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    blocks = []
    for start in range(0, prompt_tokens, PREFILL_BLOCK):
        end = min(start + PREFILL_BLOCK, prompt_tokens)
        asking = query_BKQPH[:, :, :, start:end]
        batch, kv_heads, group, asked, _ = asking.shape
        not_later = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        readable = jnp.broadcast_to(not_later[None], (group, asked, end)).reshape(1, 1, group * asked, end)
        part = _read(asking.reshape(batch, kv_heads, group * asked, width), key_BKHP[..., :end], value_BKPH[:, :, :end], readable)
        blocks.append((part.out / part.total[..., None]).reshape(asking.shape))
    out = jnp.concatenate(blocks, axis=3).astype(value.dtype)
    return out.transpose(0, 3, 1, 2, 4), (key_BKHP, value_BKPH)


def response_blocks(tokens: int) -> list[int]:
    """The sizes of the blocks in which a response's cache of so many tokens is kept."""
    block = max(RESPONSE_BLOCK, -(-tokens // RESPONSE_BLOCKS))
    return [min(block, tokens - first) for first in range(0, tokens, block)]


def _with(block: Block, first: jax.Array | int, positions_S: jax.Array, key: jax.Array, value: jax.Array) -> Block:
    """A block that begins at `first`, with the new tokens that belong into it."""
    keys, values = block
    slots, heads, length, _ = values.shape
    every_S1, every_1K = jnp.arange(slots)[:, None], jnp.arange(heads)[None]
    here_S1 = jnp.where(positions_S >= first, positions_S - first, length)[:, None]
    keys = keys.at[every_S1, every_1K, :, here_S1].set(key, mode="drop", unique_indices=True)
    return keys, values.at[every_S1, every_1K, here_S1].set(value, mode="drop", unique_indices=True)


def decode(places_S: jax.Array, samples: int, prompt_keys_G: jax.Array, positions_S: jax.Array) -> Attend:
    """One new token in every slot, read against its prompt's cache and its own response's, into which it goes first.

    The prompts' keys, [G, K, H, P], and values, [G, K, P, H], are stored once; a prompt's N samples read them in one matrix product,
    for which the slots' queries are put in the order of prompts, and what they read back into the order of slots. The responses' are
    blocks [S, K, H, t] and [S, K, t, H] of R tokens in all (`response_blocks`); with the new token in them they are what is remembered.
    (It goes first because the compiler then sees that nobody reads the cache as it was, and writes in place.) Blocks are read up to
    the longest response, each where it lies: a part of one array would be copied for the product. Blocks that a slot does not need
    leave its bits as they are.

    Args:
        places_S: g * N + n of the slot's sample; at least G * N in an idle slot.
        samples: N.
        prompt_keys_G: how many keys of a prompt can be read.
        positions_S: where in its response's cache the new token goes; nowhere if that is beyond the end.
    """
    places, slots = prompt_keys_G.shape[0], places_S.shape[0]
    longest = jnp.max(jnp.where(places_S < places * samples, positions_S, 0))
    slots_GN = jnp.zeros(places * samples, jnp.int32).at[places_S].set(jnp.arange(slots), mode="drop").reshape(places, samples)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        (prompt_key, prompt_value), response = memory
        _, kv_heads, group, width = query.shape
        query = query * width**-0.5
        together_GKqH = query[slots_GN].transpose(0, 2, 1, 3, 4).reshape(places, kv_heads, samples * group, width)
        in_prompt = jnp.arange(prompt_value.shape[2])[None, :] < prompt_keys_G[:, None]
        of_prompt = _read(together_GKqH, prompt_key, prompt_value, in_prompt[:, None, None, :])

        def of_slots(part: jax.Array) -> jax.Array:
            apart = part.reshape(places, kv_heads, samples, group, *part.shape[3:]).swapaxes(1, 2)
            return apart.reshape(places * samples, *apart.shape[2:]).at[places_S].get(mode="clip")

        firsts = itertools.accumulate((values.shape[2] for _, values in response), initial=0)
        blocks = [_with(block, first, positions_S, key, value) for first, block in zip(firsts, response, strict=False)]
        of_response = _read_blocks(query, blocks, positions_S, longest)
        read = _merge(Part(*jax.tree.map(of_slots, of_prompt)), of_response)
        return (read.out / read.total[..., None]).astype(value.dtype), blocks

    return attend


def _read_blocks(query: jax.Array, blocks: Sequence[Block], positions_S: jax.Array, longest: jax.Array) -> Part:
    """`_read` of the blocks up to the longest response. The others count as unreadable: whether one is read changes no bit of a slot
    that does not need it.
    """
    ends = list(itertools.accumulate(values.shape[2] for _, values in blocks))
    needed = [longest >= end - values.shape[2] for end, (_, values) in zip(ends, blocks, strict=True)]
    shape = query.shape[:-1]

    def score(keys: jax.Array) -> jax.Array:
        return jnp.einsum("skqh,skht->skqt", query, keys, preferred_element_type=jnp.float32)

    def no_score(keys: jax.Array) -> jax.Array:
        return jnp.zeros((*shape, keys.shape[3]), jnp.float32)

    scores = [jax.lax.cond(need, score, no_score, keys) for need, (keys, _) in zip(needed, blocks, strict=True)]
    readable_ST = jnp.arange(ends[-1])[None, :] <= positions_S[:, None]
    scores_SKqT = jnp.where(readable_ST[:, None, None, :], jnp.concatenate(scores, axis=-1), MASKED)
    top = jnp.max(scores_SKqT, axis=-1)
    weights = jnp.exp(scores_SKqT - top[..., None])

    def add(out: jax.Array, weights: jax.Array, values: jax.Array) -> jax.Array:
        return out + jnp.einsum("skqt,skth->skqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    out = jnp.zeros(query.shape, jnp.float32)
    for need, part, (_, values) in zip(needed, jnp.split(weights, ends[:-1], axis=-1), blocks, strict=True):
        out = jax.lax.cond(need, add, lambda out, *_: out, out, part, values)
    return Part(top, jnp.sum(weights, axis=-1), out)
