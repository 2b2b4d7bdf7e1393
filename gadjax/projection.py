"""Log-probabilities of tokens through the projection to the vocabulary, of which logits exist for a few columns at a time.

A batch of 100,000 tokens and 150,000 words would make 60 GB of logits. Here there is never more than one chunk of them, and each is
computed once, gradients included.

Letters: M rows, L columns (tokens of a row), C columns of a chunk, T tokens of a chunk (M x C), D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gadjax.sharding import constrain

TokenLoss = Callable[..., jax.Array]  # (log-probabilities of tokens, what else is known of each, ...) -> their losses


def projected_log_probs(
    hidden_MLD: jax.Array, weight_VD: jax.Array, targets_ML: jax.Array, counts_M: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`losses.token_log_probs` of logits = hidden · weight / T, without gradients.

    Args:
        hidden_MLD: hidden states in the compute dtype; L is a multiple of `chunk`.
        weight_VD: the projection, float32.
        targets_ML: int32.
        counts_M: int32, how many of its first columns a row uses; only the chunks in which some row does are computed.
        temperature: T.
        chunk: columns at a time.

    Returns:
        [M, L] float32 log-probabilities and [M, L] float32 entropies, 0 from the last computed chunk on.
    """
    weight, hidden_MLD = _spread(weight_VD.astype(hidden_MLD.dtype)), _whole_rows(hidden_MLD)

    def add(index: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        hidden_MCD, targets_MC = _cut((hidden_MLD, targets_ML), index, chunk)
        logp_MC, entropy_MC, _ = _of_targets(_logits(hidden_MCD, weight, temperature), targets_MC)
        return _put(found, (logp_MC, entropy_MC), index, chunk)

    zeros_ML = jnp.zeros(targets_ML.shape, jnp.float32)
    logp_ML, entropy_ML = jax.lax.fori_loop(0, _chunks(counts_M, chunk), add, [zeros_ML, zeros_ML])
    return logp_ML, entropy_ML


def projected_loss(
    token_loss: TokenLoss,
    temperature: float,
    chunk: int,
    hidden_MLD: jax.Array,
    weight_VD: jax.Array,
    targets_ML: jax.Array,
    counts_M: jax.Array,
    known: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum over the used columns of a loss that is a function of each token's log-probability.

    Because the loss of a token needs no other token, its gradient is there as soon as its logits are: with gradients, the
    forward pass makes those by hidden states and projection while it has them, and logits are computed once.

    Args:
        token_loss: the loss of tokens.
        temperature: as in `projected_log_probs`, and so the following ones but `known`.
        chunk: columns at a time.
        hidden_MLD: hidden states.
        weight_VD: the projection.
        targets_ML: int32.
        counts_M: columns that a row uses.
        known: arrays [M, L], further arguments of `token_loss`.

    Returns:
        The loss, and log-probabilities and entropies as `projected_log_probs` has them; they have no gradient.
    """
    found: Any = _loss(token_loss, temperature, chunk, hidden_MLD, weight_VD, targets_ML, counts_M, known)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(
    token_loss: TokenLoss,
    temperature: float,
    chunk: int,
    hidden_MLD: jax.Array,
    weight_VD: jax.Array,
    targets_ML: jax.Array,
    counts_M: jax.Array,
    known: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logp_ML, entropy_ML = projected_log_probs(hidden_MLD, weight_VD, targets_ML, counts_M, temperature, chunk)
    used_ML = jnp.arange(targets_ML.shape[1])[None] < counts_M[:, None]
    return jnp.sum(jnp.where(used_ML, token_loss(logp_ML, *known), 0.0)), logp_ML, entropy_ML


def _loss_and_gradients(
    token_loss: TokenLoss, temperature: float, chunk: int, *given: Any
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    hidden_MLD, weight_VD, targets_ML, counts_M, known = jax.tree.map(lambda each: each.value, given)
    trained = given[1].perturbed  # else the projection is a frozen base's
    weight, hidden_MLD = _spread(weight_VD.astype(hidden_MLD.dtype)), _whole_rows(hidden_MLD)

    def add(index: jax.Array, found: tuple[Any, ...]) -> tuple[Any, ...]:
        loss, by_weight_VD, parts = found
        hidden_MCD, targets_MC, known_MC = _cut((hidden_MLD, targets_ML, known), index, chunk)
        used_MC = (index * chunk + jnp.arange(chunk))[None] < counts_M[:, None]
        logits_MCV = _logits(hidden_MCD, weight, temperature)
        logp_MC, entropy_MC, normaliser_MC = _of_targets(logits_MCV, targets_MC)

        def of(logp_MC: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(used_MC, token_loss(logp_MC, *known_MC), 0.0))

        new, by_logp_MC = jax.value_and_grad(of)(logp_MC)
        probs_MCV = jnp.exp(logits_MCV - normaliser_MC[..., None])
        chosen_MCV = jax.nn.one_hot(targets_MC, weight.shape[0], dtype=jnp.float32)
        by_logits_MCV = (chosen_MCV - probs_MCV) * (by_logp_MC / temperature)[..., None]
        by_logits_TV = by_logits_MCV.astype(weight.dtype).reshape(-1, weight.shape[0])
        by_hidden_TD = jnp.einsum("tv,vd->td", by_logits_TV, weight, preferred_element_type=jnp.float32)
        by_hidden_MCD = constrain(by_hidden_TD.reshape(hidden_MCD.shape), "rows", None, None).astype(weight.dtype)
        if trained:
            flat_TD = constrain(hidden_MCD.reshape(-1, hidden_MCD.shape[-1]), None, None)
            by_weight_VD = _spread(by_weight_VD + jnp.einsum("tv,td->vd", by_logits_TV, flat_TD, preferred_element_type=jnp.float32))
        return loss + new, by_weight_VD, _put(parts, (logp_MC, entropy_MC, by_hidden_MCD), index, chunk)

    zeros_ML = jnp.zeros(targets_ML.shape, jnp.float32)
    zeros_VD = _spread(jnp.zeros(weight_VD.shape, jnp.float32)) if trained else None
    none = (jnp.float32(0.0), zeros_VD, [zeros_ML, zeros_ML, jnp.zeros_like(hidden_MLD)])
    loss, by_weight_VD, (logp_ML, entropy_ML, by_hidden_MLD) = jax.lax.fori_loop(0, _chunks(counts_M, chunk), add, none)
    return (loss, logp_ML, entropy_ML), (_whole_rows(by_hidden_MLD), by_weight_VD.astype(weight_VD.dtype) if trained else None)


def _scaled(
    token_loss: TokenLoss, temperature: float, chunk: int, kept: tuple[jax.Array, jax.Array | None], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    del token_loss, temperature, chunk
    if isinstance(cotangents[0], SymbolicZero):  # nothing depends on the loss
        return (None,) * 5
    scaled = jax.tree.map(lambda array: array * jnp.broadcast_to(cotangents[0].astype(array.dtype), array.shape), kept)
    return *scaled, None, None, None


_loss.defvjp(_loss_and_gradients, _scaled, symbolic_zeros=True)


def _logits(hidden_MCD: jax.Array, weight_VD: jax.Array, temperature: float) -> jax.Array:
    hidden_TD = constrain(hidden_MCD.reshape(-1, hidden_MCD.shape[-1]), None, None)
    flat = constrain(jnp.einsum("td,vd->tv", hidden_TD, weight_VD, preferred_element_type=jnp.float32), None, "words")
    return flat.reshape(*hidden_MCD.shape[:-1], -1) / temperature


def _total(x: jax.Array) -> jax.Array:
    """The sum over the last axis. On a CPU a product: XLA would pull the exponential into the sum, where it takes several times as long."""
    return jax.lax.platform_dependent(x, cpu=lambda x: x @ jnp.ones(x.shape[-1], x.dtype), default=lambda x: jnp.sum(x, axis=-1))


def _of_targets(logits_MCV: jax.Array, targets_MC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, entropies and log-normalisers."""
    largest_MC = jnp.max(logits_MCV, axis=-1)
    shifted_MCV = logits_MCV - largest_MC[..., None]
    weights_MCV = jnp.exp(shifted_MCV)
    total_MC = _total(weights_MCV)
    mean_MC = _total(weights_MCV * shifted_MCV) / total_MC
    # From the logits, not the shifted ones: what several things read is no longer pulled into the product that makes it.
    chosen_MC = jnp.take_along_axis(logits_MCV, targets_MC[..., None], axis=-1).squeeze(-1)
    log_total_MC = jnp.log(total_MC)
    return chosen_MC - largest_MC - log_total_MC, log_total_MC - mean_MC, largest_MC + log_total_MC


def _spread(weight_VD: jax.Array) -> jax.Array:
    """The projection with its rows over all devices: each then has its words' logits of every token, and its own part of the gradient.

    With the tokens divided instead, every chunk's gradient would be a whole [V, D] to be summed over the devices.
    """
    return constrain(weight_VD, "words", None)


def _whole_rows(hidden_MLD: jax.Array) -> jax.Array:
    """Each row's tokens on one device: were they divided, every chunk would gather the whole row to cut its own columns out of it."""
    return constrain(hidden_MLD, "rows", None, None)


def _chunks(counts_M: jax.Array, chunk: int) -> jax.Array:
    return (jnp.max(counts_M) + chunk - 1) // chunk


def _cut(arrays: Any, index: jax.Array, chunk: int) -> Any:
    """The columns of a chunk."""
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk, axis=1), arrays)


def _put(arrays: Any, parts: Any, index: jax.Array, chunk: int) -> list[jax.Array]:
    """Arrays with a chunk's columns written into them."""
    return [jax.lax.dynamic_update_slice_in_dim(old, part, index * chunk, axis=1) for old, part in zip(arrays, parts, strict=True)]
