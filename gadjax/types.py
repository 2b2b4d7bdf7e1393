"""What travels on the device: packed rows, rollouts and the state of training. Pytrees of arrays, nothing else.

On the host, where rows are packed and rollouts are read, the same pytrees hold NumPy arrays.

Letters: B groups in the batch, J responses of a group, N student responses, R response tokens, A micro-batches, M rows of
a micro-batch, L tokens of a row, W widths of a micro-batch.

A *packed row* holds whole groups without padding inside: a prompt once, then its responses one after the other, then the
next group. A token attends to another iff both are in the same segment, the key is in the prompt or in the query's own
response, and the key does not come later. What is left at the end of a row is padding and belongs to segment -1.
"""

from typing import Any, NamedTuple

import jax

Params = dict[str, Any]  # nested dicts of arrays, as `gadjax.models.decoder` declares them
Metrics = dict[str, jax.Array]  # scalars by their names in metrics.jsonl


class Cells(NamedTuple):
    """The tokens of packed rows and what is known of each. In `PackedRows` every field leads with A.

    Attributes:
        tokens_ML: int32 token ids; 0 where there is no token.
        positions_ML: int32 rotary positions; they restart after the prompt for every response.
        segments_ML: int32 index of the group's piece within its row; -1 for padding. Says who may see whom.
        responses_ML: int32 index of the response within its group; -1 for prompt and padding.
        groups_ML: int32 index of the group within the batch; 0 for padding.
        sources_ML: int32 column of the token whose hidden state predicts this one (the last prompt token for the first
            token of every response); -1 where nothing is predicted: prompt and padding.
        logps_ML: float32 log-probability that the sampler gave the token; 0 where it sampled none.
    """

    tokens_ML: jax.Array
    positions_ML: jax.Array
    segments_ML: jax.Array
    responses_ML: jax.Array
    groups_ML: jax.Array
    sources_ML: jax.Array
    logps_ML: jax.Array


class PackedRows(NamedTuple):
    """A batch of groups, packed into the rows of A micro-batches.

    Attributes:
        cells: the tokens; every field is [A, M, L].
        micro_BJ: int32 micro-batch that holds the response. In rows for a discriminator all responses of one group share it.
        ends_BJ: int32 flat index into [M * L] of the response's last token.
        first_BJ: int32 index of the first response of the group with the same tokens; its own index if there is none.
        fits_AW: bool, whether the micro-batch's tokens are all in the first columns, as many as each of `row_widths(L, W)`.
        used: int32 scalar, the number of micro-batches with tokens in them; the first ones.
        total: float32 scalar, the number of response tokens in the batch: what a token mean divides by.
    """

    cells: Cells
    micro_BJ: jax.Array
    ends_BJ: jax.Array
    first_BJ: jax.Array
    fits_AW: jax.Array
    used: jax.Array
    total: jax.Array


def row_widths(length: int, count: int) -> list[int]:
    """The `count` widths for which a step is compiled: evenly from the row's half, that excluded, to its whole `length`."""
    return [-(-length * part // (2 * count)) for part in range(count + 1, 2 * count + 1)]


class MicroBatch(NamedTuple):
    """One micro-batch of a `PackedRows`.

    Attributes:
        cells: its tokens; every field is [M, L].
        here_BJ: bool, whether the response is in this micro-batch.
        ends_BJ: as in `PackedRows`, into the columns that there are.
        total: as in `PackedRows`: of the whole batch.
    """

    cells: Cells
    here_BJ: jax.Array
    ends_BJ: jax.Array
    total: jax.Array


class Rollout(NamedTuple):
    """Responses sampled for a batch of prompts.

    Attributes:
        tokens_BNR: int32 sampled ids, the end of turn included; anything after `lengths_BN` tokens is padding.
        logps_BNR: float32 log-softmax(logits / T) of each sampled token over the whole vocabulary.
        lengths_BN: int32 number of tokens, the end of turn included.
        ended_BN: bool, whether the response ended by itself; the others were cut at R tokens.
        versions_BN: int32 number of steps after which the student was what it was when it gave this response.
    """

    tokens_BNR: jax.Array
    logps_BNR: jax.Array
    lengths_BN: jax.Array
    ended_BN: jax.Array
    versions_BN: jax.Array


class Role(NamedTuple):
    """A model in training: the student or the discriminator.

    Attributes:
        params: float32 parameters.
        optimizer: the state of its optax chain.
    """

    params: Params
    optimizer: Any


class TrainState(NamedTuple):
    """Everything on the device that a step changes.

    Attributes:
        student: the model that learns to answer.
        discriminator: the model that learns to tell teacher from student; None in a stage without one.
    """

    student: Role
    discriminator: Role | None
