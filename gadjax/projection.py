"""Log-probabilities of tokens through the projection to the vocabulary, of which logits exist for a few columns at a time.

A batch of 100,000 tokens and 150,000 words would make 60 GB of logits. Here neither the forward nor the backward pass ever holds
more than one chunk of them; the backward pass computes them again.

Letters: M rows, L columns (tokens of a row), C columns of a chunk, T tokens of a chunk (M x C), D model width, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.sharding import constrain


def projected_log_probs(
    hidden_MLD: jax.Array, weight_VD: jax.Array, targets_ML: jax.Array, used: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`losses.token_log_probs` of logits = hidden · weight / T, which exist for `chunk` columns at a time only, forward and backward.

    Args:
        hidden_MLD: hidden states in the compute dtype; L is a multiple of `chunk`.
        weight_VD: the projection, float32.
        targets_ML: int32.
        used: int32 scalar; only the chunks that begin before this column are computed.
        temperature: T.
        chunk: columns at a time.

    Returns:
        [M, L] float32 log-probabilities and [M, L] float32 entropies, 0 from the last computed chunk on. The entropy has no gradient:
        it is only looked at.
    """
    found: Any = _projected(hidden_MLD, weight_VD, targets_ML, used, temperature, chunk)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _projected(
    hidden_MLD: jax.Array, weight_VD: jax.Array, targets_ML: jax.Array, used: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, ...]:
    return _project(hidden_MLD, weight_VD, targets_ML, used, temperature, chunk)[0]


def _logits(hidden_MCD: jax.Array, weight_VD: jax.Array, temperature: float) -> jax.Array:
    hidden_TD = constrain(hidden_MCD.reshape(-1, hidden_MCD.shape[-1]), None, None)
    flat = constrain(jnp.einsum("td,vd->tv", hidden_TD, weight_VD, preferred_element_type=jnp.float32), None, "words")
    return flat.reshape(*hidden_MCD.shape[:-1], -1) / temperature


def _spread(weight_VD: jax.Array) -> jax.Array:
    """The projection with its rows over all devices: each then has its words' logits of every token, and its own part of the gradient.

    With the tokens divided instead, every chunk's gradient would be a whole [V, D] to be summed over the devices.
    """
    return constrain(weight_VD, "words", None)


def _chunks(used: jax.Array, chunk: int) -> jax.Array:
    return (used + chunk - 1) // chunk


def _project(
    hidden_MLD: jax.Array, weight_VD: jax.Array, targets_ML: jax.Array, used: jax.Array, temperature: float, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    weight = _spread(weight_VD.astype(hidden_MLD.dtype))
    zeros_ML = jnp.zeros(targets_ML.shape, jnp.float32)

    def add(index: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = index * chunk
        hidden_MCD, targets_MC = (jax.lax.dynamic_slice_in_dim(array, at, chunk, axis=1) for array in (hidden_MLD, targets_ML))
        logits_MCV = _logits(hidden_MCD, weight, temperature)
        largest_MC = jnp.max(logits_MCV, axis=-1)
        shifted_MCV = logits_MCV - largest_MC[..., None]
        weights_MCV = jnp.exp(shifted_MCV)
        total_MC = jnp.sum(weights_MCV, axis=-1)
        mean_MC = jnp.sum(weights_MCV * shifted_MCV, axis=-1) / total_MC
        chosen_MC = jnp.take_along_axis(shifted_MCV, targets_MC[..., None], axis=-1).squeeze(-1)
        log_total_MC = jnp.log(total_MC)
        new = (chosen_MC - log_total_MC, log_total_MC - mean_MC, largest_MC + log_total_MC)
        return tuple(jax.lax.dynamic_update_slice_in_dim(old, part, at, axis=1) for old, part in zip(found, new, strict=True))

    logp_ML, entropy_ML, normaliser_ML = jax.lax.fori_loop(0, _chunks(used, chunk), add, (zeros_ML, zeros_ML, zeros_ML))
    return (logp_ML, entropy_ML), (hidden_MLD, weight_VD, targets_ML, used, normaliser_ML)


def _project_back(temperature: float, chunk: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    hidden_MLD, weight_VD, targets_ML, used, normaliser_ML = kept
    weight, by_logp_ML = _spread(weight_VD.astype(hidden_MLD.dtype)), cotangents[0]

    def add(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_hidden_MLD, by_weight_VD = found
        at = index * chunk
        hidden_MCD, targets_MC, normaliser_MC, by_logp_MC = (
            jax.lax.dynamic_slice_in_dim(array, at, chunk, axis=1) for array in (hidden_MLD, targets_ML, normaliser_ML, by_logp_ML)
        )
        probs_MCV = jnp.exp(_logits(hidden_MCD, weight, temperature) - normaliser_MC[..., None])
        chosen_MCV = jax.nn.one_hot(targets_MC, weight.shape[0], dtype=jnp.float32)
        by_logits_MCV = (chosen_MCV - probs_MCV) * (by_logp_MC / temperature)[..., None]
        by_logits_TV = by_logits_MCV.astype(weight.dtype).reshape(-1, weight.shape[0])
        by_hidden_TD = jnp.einsum("tv,vd->td", by_logits_TV, weight, preferred_element_type=jnp.float32)
        by_hidden_MCD = constrain(by_hidden_TD.reshape(hidden_MCD.shape), "rows", None, None).astype(weight.dtype)
        flat_TD = constrain(hidden_MCD.reshape(-1, hidden_MCD.shape[-1]), None, None)
        by_weight_VD = _spread(by_weight_VD + jnp.einsum("tv,td->vd", by_logits_TV, flat_TD, preferred_element_type=jnp.float32))
        return jax.lax.dynamic_update_slice_in_dim(by_hidden_MLD, by_hidden_MCD, at, axis=1), by_weight_VD

    zeros = (jnp.zeros_like(hidden_MLD), _spread(jnp.zeros(weight_VD.shape, jnp.float32)))
    by_hidden_MLD, by_weight_VD = jax.lax.fori_loop(0, _chunks(used, chunk), add, zeros)
    return by_hidden_MLD, by_weight_VD.astype(weight_VD.dtype), None, None


_projected.defvjp(_project, _project_back)
