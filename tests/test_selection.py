"""Which step of a stage is its outcome."""

import math

import pytest

from gadjax.algorithms.stage import SelectionConfig
from gadjax.errors import UserError
from gadjax.selection import Selection


def seen(metric: str, values: list[float], patience: int | None = None) -> Selection:
    selection = Selection(SelectionConfig(metric=metric, patience=patience), "gad")
    for step, value in enumerate(values, start=1):
        selection.see(step, {f"validation/{metric}": value})
    return selection


@pytest.mark.parametrize(("metric", "best"), [("rouge_l", 2), ("reverse_kl", 1), ("loss", 1), ("margin", 1), ("discriminator_accuracy", 1)])
def test_the_best_is_the_highest_or_the_lowest(metric: str, best: int):
    assert seen(metric, [0.1, 0.3, 0.2]).best == best


def test_of_equals_the_first_is_the_best():
    assert seen("rouge_l", [0.1, 0.3, 0.3]).best == 2


def test_what_is_no_number_is_never_the_best():
    assert seen("rouge_l", [0.1, math.nan]).best == 1
    assert seen("rouge_l", [math.nan, 0.1, math.nan]).best == 2


def test_patience_ends():
    assert not seen("rouge_l", [0.3, 0.2, 0.4, 0.1], patience=2).stops
    assert seen("rouge_l", [0.3, 0.2, 0.4, 0.1, 0.4], patience=2).stops
    assert not seen("rouge_l", [0.3] + [0.1] * 9).stops


def test_it_goes_on_where_it_was():
    before = seen("loss", [0.3, 0.2, 0.4], patience=2)
    after = Selection(SelectionConfig(metric="loss", patience=2), "gad")
    after.state = before.state
    after.see(4, {"validation/loss": 0.25})
    assert (after.best, after.stops) == (2, True)
    assert after.told == "ended early after 2 validations that were no better; the outcome is step 2"


def test_an_unknown_metric_is_told_with_the_known_ones():
    selection = Selection(SelectionConfig(metric="rouge"), "gad")
    with pytest.raises(UserError, match=r"^stages.gad.select.metric: rouge is not measured; use one of loss, rouge_l$"):
        selection.see(1, {"validation/loss": 1.0, "validation/rouge_l": 0.5, "student/loss": 2.0})


def test_without_a_metric_nothing_is_selected():
    selection = Selection(None, "gad")
    selection.see(1, {"validation/loss": 1.0})
    assert (selection.on, selection.stops, selection.best) == (False, False, 0)
