"""What the algorithms share: a model run over packed rows, and gradients accumulated over their micro-batches.

Letters: A micro-batches, M rows, L tokens of a row, D model width, B groups, J responses per group.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gadjax.models.decoder import Network
from gadjax.projection import projected_log_probs
from gadjax.sharding import constrain, row_shards
from gadjax.types import Cells, MicroBatch, PackedRows, Params

LOGITS = 1 << 24  # of one chunk, on one device: 64 MB

Sums = TypeVar("Sums")  # a pytree of arrays that add up over micro-batches


def micro_batch(rows: PackedRows, index: jax.Array) -> MicroBatch:
    """Micro-batch `index` of the batch, its rows divided over the mesh."""
    cells = jax.tree.map(lambda cell: constrain(jax.lax.dynamic_index_in_dim(cell, index, keepdims=False), "rows", None), rows.cells)
    return MicroBatch(cells, rows.micro_BJ == index, rows.ends_BJ, rows.total)


def accumulate(loss: Callable[[Params, MicroBatch], tuple[jax.Array, Sums]], params: Params, rows: PackedRows) -> tuple[Params, Sums]:
    """Sums gradients, and whatever else adds up, over the used micro-batches.

    Args:
        loss: (params, micro-batch) -> (this micro-batch's share of the loss, sums). A share is divided by what counts in the
            *whole* batch, so that the sum is the loss: never a mean of means.
        params: what to differentiate by.
        rows: the batch.

    Returns:
        The gradients of the loss, and the sums.
    """

    def value(micro: MicroBatch) -> tuple[Params, Sums]:
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return grads, sums

    return sum_over(value, rows)


def sum_over(value: Callable[[MicroBatch], Sums], rows: PackedRows) -> Sums:
    """Sums `value(micro-batch)` over the used micro-batches."""

    def add(index: jax.Array, total: Sums) -> Sums:
        return jax.tree.map(jnp.add, total, value(micro_batch(rows, index)))

    shapes = jax.eval_shape(lambda: value(micro_batch(rows, jnp.int32(0))))
    return jax.lax.fori_loop(0, rows.used, add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def hidden_states(network: Network, model: Any, cells: Cells) -> jax.Array:
    """[M, L, D] hidden states of one micro-batch. `model` is the network with its parameters."""
    hidden_MLD, _ = model.trunk(cells.tokens_ML, cells.positions_ML, network.attend(cells))
    return constrain(hidden_MLD, "rows", None, None)


def response_log_probs(network: Network, params: Params, cells: Cells, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the response tokens under softmax(logits / T), and the entropies there.

    Each is [M, L] float32 and 0 at prompt and padding. Only what predicts a response token is projected to the vocabulary.
    """
    model = network.bind(params)
    mask_ML, length = response_mask(cells), cells.tokens_ML.shape[1]
    chunk = columns(cells.tokens_ML.shape, model.projection.shape[0])
    # A row's response tokens first; what comes after them may stay uncomputed.
    order_ML = jnp.pad(jnp.argsort(~mask_ML, axis=1, stable=True), ((0, 0), (0, -length % chunk)), mode="edge")
    sources_ML, targets_ML = (jnp.take_along_axis(array, order_ML, axis=1) for array in (jnp.maximum(cells.sources_ML, 0), cells.tokens_ML))
    before_MLD = jnp.take_along_axis(hidden_states(network, model, cells), sources_ML[..., None], axis=1)
    used = jnp.max(jnp.sum(mask_ML, axis=1))
    found = projected_log_probs(before_MLD, model.projection, targets_ML, used, temperature, chunk)
    place_ML = jnp.maximum(jnp.cumsum(mask_ML, axis=1) - 1, 0)
    logp_ML, entropy_ML = (jnp.where(mask_ML, jnp.take_along_axis(values, place_ML, axis=1), 0.0) for values in found)
    return logp_ML, entropy_ML


def columns(rows: tuple[int, ...], vocabulary: int) -> int:
    """How many columns are projected at a time: as many as make `LOGITS` logits on a device, the row's at most."""
    count, length = rows
    return max(1, min(length, LOGITS // (-(-count // row_shards()) * vocabulary)))


def response_mask(cells: Cells) -> jax.Array:
    """[M, L] bool: the tokens that a response consists of, its end of turn included."""
    return cells.sources_ML >= 0


def response_scores(network: Network, params: Params, micro: MicroBatch) -> jax.Array:
    """D(x, y) of the responses in this micro-batch, read at their last tokens; 0 for those elsewhere. [B, J] float32."""
    model = network.bind(params)
    scores_ML = model.scores(hidden_states(network, model, micro.cells))
    return jnp.where(micro.here_BJ, scores_ML.reshape(-1)[micro.ends_BJ], 0.0)
