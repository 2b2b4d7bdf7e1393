"""Groups into rows: nothing lost, nothing doubled, nothing in the wrong place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadjax.data.packing import RowShape, pack
from gadjax.types import row_widths

P, R = 5, 4


@st.composite
def batches(draw: st.DrawFn):
    groups, responses = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    ids = st.integers(1, 99)
    prompts = [draw(st.lists(ids, min_size=1, max_size=P)) for _ in range(groups)]
    answers = [[draw(st.lists(ids, min_size=1, max_size=R)) for _ in range(responses)] for _ in range(groups)]
    rows, length = draw(st.integers(1, 3)), draw(st.integers(P + R, 30))
    return prompts, answers, rows, length


@given(batches(), st.booleans())
def test_every_response_stands_in_the_rows_once_with_its_prompt_before_it(batch, together: bool):
    prompts, answers, rows, length = batch
    responses = len(answers[0])
    if together:
        rows = max(rows, RowShape.rows_of_largest(responses, prompt_tokens=P, response_tokens=R, length=length))
    shape = RowShape.holding(len(prompts), responses, prompt_tokens=P, response_tokens=R, rows=rows, length=length, together=together)
    packed = pack(prompts, answers, shape)
    cells = packed.cells
    assert packed.total == sum(len(answer) for group in answers for answer in group)
    for group, index in np.ndindex(len(prompts), responses):
        micro, (row, end) = packed.micro_BJ[group, index], divmod(packed.ends_BJ[group, index], length)
        answer, prompt = answers[group][index], prompts[group]
        span = slice(end - len(answer) + 1, end + 1)
        assert cells.tokens_ML[micro, row, span].tolist() == answer
        assert (cells.responses_ML[micro, row, span] == index).all()
        assert (cells.groups_ML[micro, row, span] == group).all()
        assert cells.positions_ML[micro, row, span].tolist() == list(range(len(prompt), len(prompt) + len(answer)))
        segment = cells.segments_ML[micro, row, end]
        first = int(np.argmax(cells.segments_ML[micro, row] == segment))
        assert cells.tokens_ML[micro, row, first : first + len(prompt)].tolist() == prompt
        assert cells.positions_ML[micro, row, first : first + len(prompt)].tolist() == list(range(len(prompt)))
        sources = [first + len(prompt) - 1, *range(span.start, end)]
        assert cells.sources_ML[micro, row, span].tolist() == sources
    assert not together or all(len(set(row)) == 1 for row in packed.micro_BJ.tolist()), "a group is spread over micro-batches"
    assert (cells.sources_ML >= 0).sum() == packed.total
    assert ((cells.segments_ML >= 0) == (cells.tokens_ML > 0)).all()
    assert packed.used == packed.micro_BJ.max() + 1


def test_padding_is_only_at_the_end_of_a_row():
    shape = RowShape(groups=3, micro_batches=2, rows=2, length=12)
    cells = pack([[1, 2], [3], [4, 5, 6]], [[[7, 8]], [[9]], [[10, 11]]], shape).cells
    used = cells.segments_ML >= 0
    assert (np.diff(used.astype(int), axis=-1) <= 0).all()


def test_largest_groups_come_first_and_fill_the_first_row_that_has_room():
    shape = RowShape(groups=3, micro_batches=1, rows=2, length=10)
    packed = pack([[1], [2], [3]], [[[1] * 3], [[2] * 8], [[3] * 5]], shape)
    rows = packed.ends_BJ[:, 0] // 10
    assert rows.tolist() == [1, 0, 1]


def test_a_group_larger_than_a_row_is_split_by_response_and_keeps_its_prompt():
    shape = RowShape(groups=1, micro_batches=1, rows=2, length=7)
    packed = pack([[1, 2, 3]], [[[4, 5], [6, 7], [8, 9, 10]]], shape)
    assert packed.cells.tokens_ML[0].tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8, 9, 10, 0]]
    assert packed.cells.responses_ML[0].tolist() == [[-1, -1, -1, 0, 0, 1, 1], [-1, -1, -1, 2, 2, 2, -1]]


def test_identical_responses_name_the_first_of_them():
    shape = RowShape(groups=1, micro_batches=1, rows=1, length=20)
    packed = pack([[1]], [[[2, 3], [4], [2, 3], [4], [5]]], shape)
    assert packed.first_BJ.tolist() == [[0, 1, 0, 1, 4]]


def test_log_probabilities_stand_beside_their_tokens():
    shape = RowShape(groups=1, micro_batches=1, rows=1, length=8)
    packed = pack([[1, 2]], [[[3, 4], [5]]], shape, logps=[[[-0.5, -1.0], [-2.0]]])
    np.testing.assert_array_equal(packed.cells.logps_ML[0, 0], np.array([0, 0, -0.5, -1.0, -2.0, 0, 0, 0], np.float32))


def test_a_micro_batch_is_as_wide_as_its_tokens():
    shape = RowShape(groups=3, micro_batches=3, rows=1, length=10, widths=3)
    packed = pack([[1], [2], [3]], [[[1] * 9], [[2] * 6], [[3] * 5]], shape)
    assert row_widths(10, 3) == [7, 9, 10]
    assert packed.fits_AW.tolist() == [[False, False, True], [True, True, True], [True, True, True]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        pack([[1] * 9], [[[2]]], RowShape(groups=1, micro_batches=1, rows=1, length=9))


def test_pieces_that_need_not_stay_together_fill_the_rows_of_several_micro_batches():
    shape = RowShape.holding(2, 3, prompt_tokens=P, response_tokens=R, rows=1, length=P + R, together=False)
    assert shape.micro_batches == 6
    packed = pack([[1] * P] * 2, [[[2] * R] * 3] * 2, shape)
    assert packed.used == 6 and sorted(packed.micro_BJ.ravel().tolist()) == list(range(6))


def test_the_shape_holds_a_batch_of_largest_groups():
    shape = RowShape.holding(7, 3, prompt_tokens=P, response_tokens=R, rows=2, length=40)  # 17 tokens a group, 2 a row, 4 a micro-batch
    assert shape.micro_batches == 2
    packed = pack([[1] * P] * 7, [[[2] * R] * 3] * 7, shape)
    assert packed.used == 2
