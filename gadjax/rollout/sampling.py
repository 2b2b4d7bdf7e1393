"""The next token: temperature, top-k, top-p, and a random stream that depends on (seed, step, group, sample, position) alone.

Letters: B groups, N responses per group, V vocabulary.
"""

import jax
import jax.numpy as jnp


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
        sorted_down = jnp.flip(jnp.sort(weights, axis=-1), axis=-1)
        before = jnp.cumsum(sorted_down, axis=-1) - sorted_down
        reached = (before.astype(jnp.float32) >= top_p * jnp.sum(weights, axis=-1, keepdims=True).astype(jnp.float32)) & (before > 0)
        least = jnp.min(jnp.where(reached, jnp.iinfo(jnp.int32).max, sorted_down), axis=-1, keepdims=True)
        weights = jnp.where(weights >= least, weights, 0)
    return weights


def sample(
    logits_BNV: jax.Array, keys_BN: jax.Array, position: jax.Array, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for every response.

    The draw is by inverse distribution: one random number against the cumulated probabilities, which costs a pass over the
    vocabulary where Gumbel noise costs a random number for every entry of it.

    Args:
        logits_BNV: float32.
        keys_BN: the samples' keys.
        position: index of the token in its response.
        temperature: T; 0 takes the likeliest token.
        top_k: see `restrict`.
        top_p: see `restrict`.

    Returns:
        [B, N] int32 tokens, and [B, N] float32 log softmax(logits / T) of them over the whole vocabulary (at T = 1 for greedy
        decoding).
    """
    if temperature == 0:
        token = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32)
        scaled = logits_BNV
    else:
        scaled = logits_BNV / temperature
        cumulated = jnp.cumsum(restrict(integer_probabilities(scaled), top_k, top_p), axis=-1)
        draw_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_BN, position)
        draw = jax.vmap(jax.vmap(lambda key, total: jax.random.randint(key, (), 0, total)))(draw_keys, cumulated[..., -1])
        token = jnp.sum(cumulated <= draw[..., None], axis=-1, dtype=jnp.int32)
    logps = jax.nn.log_softmax(scaled, axis=-1)
    return token, jnp.take_along_axis(logps, token[..., None], axis=-1).squeeze(-1)
