"""What the algorithms share: a model run over packed rows, and gradients accumulated over their micro-batches.

Letters: A micro-batches, M rows, L tokens of a row, D model width, B groups, J responses per group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gadjax.models.decoder import Network
from gadjax.projection import TokenLoss, projected_log_probs, projected_loss
from gadjax.sharding import constrain, row_shards
from gadjax.types import Cells, MicroBatch, PackedRows, Params, row_widths

LOGITS = 1 << 24  # of one chunk, on one device, at most: 64 MB
CHUNKS = 8  # of a row, at least: what a row's last one computes for nothing is then little

Sums = TypeVar("Sums")  # a pytree of arrays that add up over micro-batches


def micro_batch(rows: PackedRows, index: jax.Array, width: int) -> MicroBatch:
    """The first `width` columns of micro-batch `index` of the batch, its rows divided over the mesh."""

    def cut(cell: jax.Array) -> jax.Array:
        return constrain(jax.lax.dynamic_index_in_dim(cell, index, keepdims=False)[:, :width], "rows", None)

    row_BJ, column_BJ = jnp.divmod(rows.ends_BJ, rows.cells.tokens_ML.shape[-1])
    return MicroBatch(jax.tree.map(cut, rows.cells), rows.micro_BJ == index, row_BJ * width + column_BJ, rows.total)


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
    """Sums `value(micro-batch)` over the used micro-batches, each as wide as its rows need."""
    widths = row_widths(rows.cells.tokens_ML.shape[-1], rows.fits_AW.shape[-1])

    def add(index: jax.Array, total: Sums) -> Sums:
        branches = [lambda index, width=width: value(micro_batch(rows, index, width)) for width in widths]
        fits_W = jax.lax.dynamic_index_in_dim(rows.fits_AW, index, keepdims=False)
        new = jax.lax.switch(jnp.argmax(fits_W), branches, index)
        return jax.tree.map(jnp.add, total, new)

    shapes = jax.eval_shape(lambda: value(micro_batch(rows, jnp.int32(0), widths[-1])))
    return jax.lax.fori_loop(0, rows.used, add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def hidden_states(network: Network, model: Any, cells: Cells) -> jax.Array:
    """[M, L, D] hidden states of one micro-batch. `model` is the network with its parameters."""
    hidden_MLD, _ = model.trunk(cells.tokens_ML, cells.positions_ML, network.attend(cells))
    return constrain(hidden_MLD, "rows", None, None)


@dataclass(frozen=True)
class _Answers:
    """What the projection needs of one micro-batch: a row's response tokens first; what comes after them may stay uncomputed."""

    before_MLD: jax.Array  # the hidden states that predict them
    weight_VD: jax.Array
    targets_ML: jax.Array
    counts_M: jax.Array  # response tokens of each row
    chunk: int
    order_ML: jax.Array  # where they stand in the row
    mask_ML: jax.Array  # which tokens of the row they are

    @classmethod
    def of(cls, network: Network, params: Params, cells: Cells) -> "_Answers":
        """Runs the trunk."""
        model = network.bind(params)
        mask_ML, length = response_mask(cells), cells.tokens_ML.shape[1]
        chunk = columns(cells.tokens_ML.shape, model.projection.shape[0])
        order_ML = jnp.pad(jnp.argsort(~mask_ML, axis=1, stable=True), ((0, 0), (0, -length % chunk)), mode="edge")
        sources_ML = jnp.take_along_axis(jnp.maximum(cells.sources_ML, 0), order_ML, axis=1)
        before_MLD = jnp.take_along_axis(hidden_states(network, model, cells), sources_ML[..., None], axis=1)
        targets_ML = jnp.take_along_axis(cells.tokens_ML, order_ML, axis=1)
        return cls(before_MLD, model.projection, targets_ML, jnp.sum(mask_ML, axis=1), chunk, order_ML, mask_ML)

    def back(self, values_ML: jax.Array) -> jax.Array:
        """Values of the response tokens at their places in the row, 0 elsewhere."""
        place_ML = jnp.maximum(jnp.cumsum(self.mask_ML, axis=1) - 1, 0)
        return jnp.where(self.mask_ML, jnp.take_along_axis(values_ML, place_ML, axis=1), 0.0)


def response_log_probs(network: Network, params: Params, cells: Cells, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the response tokens under softmax(logits / T), and the entropies there, without gradients.

    Each is [M, L] float32 and 0 at prompt and padding. Only what predicts a response token is projected to the vocabulary.
    """
    of = _Answers.of(network, params, cells)
    logp_ML, entropy_ML = projected_log_probs(of.before_MLD, of.weight_VD, of.targets_ML, of.counts_M, temperature, of.chunk)
    return of.back(logp_ML), of.back(entropy_ML)


def response_loss(
    network: Network, params: Params, cells: Cells, temperature: float, token_loss: TokenLoss, *known: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of `token_loss(logp_ML, *known)` over the response tokens; all are [M, L].

    Beside it the log-probabilities and entropies of `response_log_probs`, which have no gradients.
    """
    of = _Answers.of(network, params, cells)
    known = tuple(jnp.take_along_axis(array, of.order_ML, axis=1) for array in known)
    loss, *found = projected_loss(token_loss, temperature, of.chunk, of.before_MLD, of.weight_VD, of.targets_ML, of.counts_M, known)
    logp_ML, entropy_ML = map(of.back, found)
    return loss, logp_ML, entropy_ML


def columns(rows: tuple[int, ...], vocabulary: int) -> int:
    """How many columns are projected at a time: as many as make `LOGITS` logits on a device, a part of the row at most."""
    count, length = rows
    return max(1, min(-(-length // CHUNKS), LOGITS // (-(-count // row_shards()) * vocabulary)))


def response_mask(cells: Cells) -> jax.Array:
    """[M, L] bool: the tokens that a response consists of, its end of turn included."""
    return cells.sources_ML >= 0


def response_scores(network: Network, params: Params, micro: MicroBatch) -> jax.Array:
    """D(x, y) of the responses in this micro-batch, read at their last tokens; 0 for those elsewhere. [B, J] float32."""
    model = network.bind(params)
    scores_ML = model.scores(hidden_states(network, model, micro.cells))
    return jnp.where(micro.here_BJ, scores_ML.reshape(-1)[micro.ends_BJ], 0.0)
