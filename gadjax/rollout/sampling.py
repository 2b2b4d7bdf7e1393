"""The next token: temperature, top-k, top-p, and a random stream that depends on (seed, step, group, sample, position) alone.

Letters: B groups, N responses per group, S decode slots, V vocabulary, C chunks of the vocabulary.
"""

import jax
import jax.numpy as jnp

CHUNKS = 128  # of the vocabulary; divides those of Qwen and Llama, so that each device of a mesh has whole chunks


def stream_keys(key: jax.Array, groups: int, samples: int) -> jax.Array:
    """A key for every sample of a step, [B, N], from the step's key by group and sample."""
    group_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(group_keys, jnp.arange(samples))


def integer_probabilities(logits: jax.Array) -> jax.Array:
    """[..., V] softmax as int32 multiples of 2^-30.

    Integers add up exactly in every order. A parallel sum of floats goes up and down by its rounding, and an inverse
    distribution over it draws tokens of no probability: once in 20 000 draws from 152 000 tokens.
    """
    return jnp.round(jax.nn.softmax(logits, axis=-1) * 2.0**30).astype(jnp.int32)


def restrict(weights: jax.Array, top_k: int | None, top_p: float) -> jax.Array:
    """[..., V] integer probabilities with 0 for what top-k, and then top-p, leave out.

    Args:
        weights: as `integer_probabilities` makes them.
        top_k: how many of the likeliest tokens stay; all that are as likely as the last of them stay too. None: all.
        top_p: of these, the likeliest stay whose mass reaches this share; ties as above. 1: all.
    """
    if top_k is not None and top_k < weights.shape[-1]:
        least = jax.lax.top_k(weights, top_k)[0][..., -1:]
        weights = jnp.where(weights >= least, weights, 0)
    if top_p < 1:
        weights = nucleus(weights, top_p)
    return weights


def nucleus(weights: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """[..., V] integer probabilities with 0 for all but the likeliest whose mass reaches the share `top_p`, a number or [..., 1]."""
    sorted_down = jnp.flip(jnp.sort(weights, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_down, axis=-1) - sorted_down
    reached = (before.astype(jnp.float32) >= top_p * jnp.sum(weights, axis=-1, keepdims=True).astype(jnp.float32)) & (before > 0)
    least = jnp.min(jnp.where(reached, jnp.iinfo(jnp.int32).max, sorted_down), axis=-1, keepdims=True)
    return jnp.where(weights >= least, weights, 0)


def draw(weights_SV: jax.Array, keys_S: jax.Array) -> jax.Array:
    """[S] int32 indices with probabilities in proportion to integer weights, by inverse distribution.

    One random number each, looked up in two steps: the chunk of the vocabulary by the chunks' sums, then the token in that chunk.
    Integers add up the same whichever way, so that this is what one cumulated sum over the vocabulary gives, for a small part of
    the work.
    """
    slots, vocabulary = weights_SV.shape
    size = -(-vocabulary // CHUNKS)
    weights_SCv = jnp.pad(weights_SV, ((0, 0), (0, CHUNKS * size - vocabulary))).reshape(slots, CHUNKS, size)
    until_SC = jnp.cumsum(jnp.sum(weights_SCv, axis=-1), axis=-1)
    drawn_S = jax.vmap(lambda key, total: jax.random.randint(key, (), 0, total))(keys_S, until_SC[:, -1])
    chunk_S = _count(until_SC, drawn_S)
    weights_Sv = jnp.take_along_axis(weights_SCv, chunk_S[:, None, None], axis=1).squeeze(1)
    before_S = jnp.take_along_axis(until_SC, chunk_S[:, None], axis=1).squeeze(1) - jnp.sum(weights_Sv, axis=-1)
    return chunk_S * size + _count(jnp.cumsum(weights_Sv, axis=-1), drawn_S - before_S)


def _count(until: jax.Array, drawn_S: jax.Array) -> jax.Array:
    """How many of the cumulated sums [S, ...] do not exceed what was drawn: the index that was drawn."""
    return jnp.sum(until <= drawn_S[:, None], axis=-1, dtype=jnp.int32)


def sample(
    logits_SV: jax.Array, keys_S: jax.Array, positions_S: jax.Array, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draws one token in every slot.

    Args:
        logits_SV: float32.
        keys_S: the samples' keys.
        positions_S: index of the token in its response.
        temperature: T; 0 takes the likeliest token.
        top_k: see `restrict`.
        top_p: see `restrict`.

    Returns:
        [S] int32 tokens, and [S] float32 log softmax(logits / T) of them over the whole vocabulary (at T = 1 for greedy decoding).
    """
    if temperature == 0:
        scaled_SV, token_S = logits_SV, jnp.argmax(logits_SV, axis=-1).astype(jnp.int32)
    else:
        scaled_SV = logits_SV / temperature
        weights_SV = restrict(integer_probabilities(scaled_SV), top_k, top_p)
        token_S = draw(weights_SV, jax.vmap(jax.random.fold_in)(keys_S, positions_S))
    chosen_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=-1).squeeze(-1)
    largest_S = jnp.max(scaled_SV, axis=-1)
    total_S = jnp.sum(jnp.exp(scaled_SV - largest_S[:, None]), axis=-1)
    return token_S, chosen_S - largest_S - jnp.log(total_S)
