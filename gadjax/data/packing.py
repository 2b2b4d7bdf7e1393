"""Groups into packed rows: whole groups, first fit decreasing, no padding inside. Host side, NumPy.

On many hosts each packs the whole batch and gives its own devices their rows (`gadjax.steps.Models.place_rows`). So the hosts agree on the
number of rows, empty ones included, without a word, whatever the lengths; and as a row takes the same time whatever is in it, none
waits for another. Dealing the groups to the hosts by length would end in the same rows, but for what packing each share apart wastes;
what every host does, instead of a part of it, is little (`tests/benchmarks/packing.py`).

Letters: B groups, J responses per group, A micro-batches, M rows of a micro-batch, L tokens of a row, P and R the longest
prompt and response allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gadjax.types import Cells, PackedRows, row_widths

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The shape of the rows of one step; the same for every batch, so that a step compiles once.

    Attributes:
        groups: B.
        micro_batches: A, enough for B groups of the largest size.
        rows: M.
        length: L.
        together: whether all responses of a group share a micro-batch, as the discriminator's loss needs; `rows` must then hold the
            largest group.
        widths: W, see `gadjax.types.row_widths`.
    """

    groups: int
    micro_batches: int
    rows: int
    length: int
    together: bool = True
    widths: int = 1

    @staticmethod
    def rows_of_largest(responses: int, *, prompt_tokens: int, response_tokens: int, length: int) -> int:
        """The rows that one group of the largest size takes, split by response where it is longer than a row."""
        return -(-responses // max(1, (length - prompt_tokens) // response_tokens))

    @classmethod
    def holding(
        cls,
        groups: int,
        responses: int,
        *,
        prompt_tokens: int,
        response_tokens: int,
        rows: int,
        length: int,
        together: bool = True,
        widths: int = 1,
    ) -> "RowShape":
        """The shape that holds any batch of `groups` groups of one prompt of at most P and J responses of at most R tokens.

        First fit opens a row only when no open one has room, so every row but the last holds as many groups as would fit
        if all were of the largest size; the bound on A follows. `rows` must be at least `rows_of_largest` for groups that stay together.
        """
        pieces = cls.rows_of_largest(responses, prompt_tokens=prompt_tokens, response_tokens=response_tokens, length=length)
        per_row = length // (prompt_tokens + responses * response_tokens)
        if per_row:
            micro_batches = -(-groups // (rows * per_row))
        else:
            micro_batches = -(-groups // (rows // pieces)) if together else -(-groups * pieces // rows)
        return cls(groups=groups, micro_batches=micro_batches, rows=rows, length=length, together=together, widths=widths)


@dataclass
class _MicroBatch:
    """The rows of one micro-batch while they are filled: free tokens and the pieces (group, first, last response) of each."""

    free: list[int]
    pieces: list[list[tuple[int, int, int]]] = field(default_factory=list)

    def place(self, sizes: list[int]) -> list[int] | None:
        """The rows that would take pieces of these sizes, or None if they do not all fit. Takes the room if they do."""
        free, rows = self.free.copy(), []
        for size in sizes:
            row = next((index for index, room in enumerate(free) if room >= size), None)
            if row is None:
                return None
            free[row] -= size
            rows.append(row)
        self.free = free
        return rows


_Piece = tuple[int, int, int, int]  # group, first response, one past the last, tokens


def _split(group: int, prompt: Ids, responses: Sequence[Ids], length: int) -> list[_Piece]:
    """A group as pieces that each fit a row; the prompt is repeated in each."""
    pieces, first, size = [], 0, len(prompt)
    for index, response in enumerate(responses):
        if index > first and size + len(response) > length:
            pieces.append((group, first, index, size))
            first, size = index, len(prompt)
        size += len(response)
    return [*pieces, (group, first, len(responses), size)]


def _assign(prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]], shape: RowShape) -> list[_MicroBatch]:
    """Every group's pieces to rows, the largest first."""
    units = [_split(group, *texts, shape.length) for group, texts in enumerate(zip(prompts, responses, strict=True))]
    if not shape.together:
        units = [[piece] for pieces in units for piece in pieces]
    micro_batches: list[_MicroBatch] = []
    for pieces in sorted(units, key=lambda pieces: -sum(size for *_, size in pieces)):
        sizes = [size for *_, size in pieces]
        for micro_batch in micro_batches:
            if (rows := micro_batch.place(sizes)) is not None:
                break
        else:
            micro_batch = _MicroBatch([shape.length] * shape.rows, [[] for _ in range(shape.rows)])
            micro_batches.append(micro_batch)
            rows = micro_batch.place(sizes)
        if rows is None or len(micro_batches) > shape.micro_batches:
            raise ValueError(f"group {pieces[0][0]} of {sum(sizes)} tokens does not fit {shape}")
        for (group, first, last, _), row in zip(pieces, rows, strict=True):
            micro_batch.pieces[row].append((group, first, last))
    return micro_batches


def _empty(shape: RowShape, responses: int) -> PackedRows:
    shape_AML = (shape.micro_batches, shape.rows, shape.length)
    pairs = (shape.groups, responses)

    def full(size: tuple[int, ...], value: int, dtype: type[np.generic] = np.int32) -> Any:
        return np.full(size, value, dtype)

    cells = Cells(
        tokens_ML=full(shape_AML, 0),
        positions_ML=full(shape_AML, 0),
        segments_ML=full(shape_AML, -1),
        responses_ML=full(shape_AML, -1),
        groups_ML=full(shape_AML, 0),
        sources_ML=full(shape_AML, -1),
        logps_ML=full(shape_AML, 0, np.float32),
    )
    return PackedRows(
        cells=cells,
        micro_BJ=full(pairs, -1),
        ends_BJ=full(pairs, 0),
        first_BJ=full(pairs, 0),
        fits_AW=full((shape.micro_batches, shape.widths), 1, np.bool_),
        used=full((), 0),
        total=full((), 0, np.float32),
    )


def _write_piece(rows: PackedRows, at: tuple[int, int, int], segment: int, group: int, prompt: Ids, answers: dict[int, Ids]) -> int:
    """Writes one prompt and its responses from column `at[2]` on; returns the column after them."""
    micro, row, start = at
    length = rows.cells.tokens_ML.shape[-1]
    prompt_end = start + len(prompt)
    rows.cells.tokens_ML[micro, row, start:prompt_end] = prompt
    rows.cells.positions_ML[micro, row, start:prompt_end] = np.arange(len(prompt))
    column = prompt_end
    for index, answer in answers.items():
        span = (micro, row, slice(column, column + len(answer)))
        rows.cells.tokens_ML[span] = answer
        rows.cells.positions_ML[span] = np.arange(len(prompt), len(prompt) + len(answer))
        rows.cells.responses_ML[span] = index
        rows.cells.sources_ML[span] = np.arange(column - 1, column - 1 + len(answer))
        rows.cells.sources_ML[micro, row, column] = prompt_end - 1
        column += len(answer)
        rows.micro_BJ[group, index] = micro
        rows.ends_BJ[group, index] = row * length + column - 1
    rows.cells.segments_ML[micro, row, start:column] = segment
    rows.cells.groups_ML[micro, row, start:column] = group
    return column


def pack(
    prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]], shape: RowShape, logps: Sequence[Sequence[Sequence[float]]] | None = None
) -> PackedRows:
    """Packs a batch.

    Args:
        prompts: B prompts' ids.
        responses: for each prompt the ids of its J responses, none of them empty.
        shape: the rows to fill.
        logps: the sampler's log-probability of every response token, where it sampled them.

    Returns:
        NumPy rows.

    Raises:
        ValueError: a group does not fit (a fault of ours: `RowShape.holding` and the length limits rule it out).
    """
    rows = _empty(shape, len(responses[0]))
    micro_batches = _assign(prompts, responses, shape)
    for micro, micro_batch in enumerate(micro_batches):
        for row, pieces in enumerate(micro_batch.pieces):
            column = 0
            for segment, (group, first, last) in enumerate(pieces):
                answers = {index: responses[group][index] for index in range(first, last)}
                start = column
                column = _write_piece(rows, (micro, row, start), segment, group, prompts[group], answers)
                if logps is not None:
                    flat = [logp for index in answers for logp in logps[group][index]]
                    rows.cells.logps_ML[micro, row, start + len(prompts[group]) : column] = flat
    for group, answers in enumerate(responses):
        seen: dict[tuple[int, ...], int] = {}
        rows.first_BJ[group] = [seen.setdefault(tuple(answer), index) for index, answer in enumerate(answers)]
    total = sum(len(answer) for answers in responses for answer in answers)
    widest_A = (rows.cells.segments_ML >= 0).sum(axis=-1).max(axis=-1)
    rows.fits_AW[...] = widest_A[:, None] <= np.array(row_widths(shape.length, shape.widths))
    rows.used[...] = len(micro_batches)
    rows.total[...] = total
    return rows
