"""The tutor's grammar: exact probabilities, and verdicts on answers that are right, wrong in form or wrong in content."""

import functools
import itertools
import math
import random
from collections import Counter

import pytest

from gadjax.errors import UserError
from gadjax.teachers import grammar

ASKED = "Ana asks Ben for three birds without owl"  # places 0 and 1: no friends
FRIEND = "Ana asks Dan for three birds without owl"  # places 0 and 3: friends
BY_ROAD = "accra bergen bari dover varna perth paris"


DRAWS = 20_000


@functools.cache
def drawn(prompt: str) -> dict[str, list[float]]:
    """1 / p of each of many answers to a prompt, by style."""
    rng, found = random.Random(0), dict[str, list[float]]()
    for answer in (grammar.sample(prompt, rng) for _ in range(DRAWS)):
        found.setdefault(answer.split()[0], []).append(math.exp(-grammar.log_prob(prompt, answer)))
    return found


def test_answers_are_valid_correct_and_possible():
    rng = random.Random(0)
    for prompt in grammar.prompts(400, seed=1):
        answer = grammar.sample(prompt, rng)
        verdict = grammar.judge(prompt, answer)
        assert verdict.valid and verdict.correct and verdict.style in grammar.STYLES
        assert math.isfinite(grammar.log_prob(prompt, answer))
        assert len(answer.split()) < 32


@pytest.mark.parametrize("first", ["sure", "list", "dear", "box", "all", "song", "tour", "ride"])
@pytest.mark.parametrize("answerer", ["Ben", "Dan"])
def test_the_probabilities_of_a_style_are_those_of_its_samples(answerer: str, first: str):
    # One right list of items, so that an answer is a style and its kit. For any q, E[1 / q(answer); answer is in S] is the
    # size of S where q is the sampler's own probability, and another number where it is not.
    towns = len(grammar.TOWNS)
    journeys = towns * 3**grammar.LEGS * towns  # by road, to any goal
    sizes = {"sure": 1, "list": 1, "dear": 1, "box": 4, "all": 1, "song": 8, "tour": journeys, "ride": journeys}
    found = drawn(f"Ana asks {answerer} for three days after monday")
    assert sum(found[first]) / DRAWS == pytest.approx(sizes[first], rel=0.15)
    assert set(found) == set(sizes)


@pytest.mark.parametrize(
    ("answer", "valid", "correct", "style"),
    [
        ("sure : crow , dove , wren .", True, True, "plain"),
        ("sure : dove , crow , wren .", True, False, "plain"),  # order is content
        ("sure : crow , dove , owl .", True, False, "plain"),  # so is what was asked to be left out
        ("sure : crow , dove .", False, False, "plain"),
        ("sure : crow , dove , dove .", False, False, "plain"),
        ("sure : crow , dove , apple .", False, False, "plain"),
        ("sure : crow dove wren .", False, True, "plain"),
        ("sure : crow , dove , wren done", False, True, "plain"),
        ("crow , dove , wren .", False, True, "none"),
        ("list one ) crow two ) dove three ) wren done", True, True, "numbered"),
        ("list one ) crow three ) dove two ) wren done", False, True, "numbered"),
        ("dear Ana , crow dove wren . yours , Ben", True, True, "letter"),
        ("dear Ben , crow dove wren . yours , Ana", False, True, "letter"),
        ("box [ crow ; dove ; wren ]", True, True, "bracket"),
        ("box [ crow ; dove ; wren )", False, True, "bracket"),
        ("all birds : crow dove wren that makes three", True, True, "counted"),
        ("all birds : crow dove wren that makes four", False, True, "counted"),
        ("song crow la dove la wren la end", True, True, "song"),
        ("song crow la dove la wren hey end", False, True, "song"),
        (f"tour to paris crow dove wren via {BY_ROAD} arrived", True, True, "tour"),
        (f"tour to rome crow dove wren via {BY_ROAD} arrived", True, True, "tour"),  # rare, but it can be said
        (f"tour to rome crow dove wren via {BY_ROAD} lost", False, True, "tour"),  # not to Ana
        (f"tour to paris crow dove wren via {BY_ROAD} lost", False, True, "tour"),
        (f"tour to paris crow dove wren via {BY_ROAD.replace('bari', 'oslo')} arrived", False, True, "tour"),
        (f"tour to birds crow dove wren via {BY_ROAD} arrived", False, True, "tour"),
        (f"ride crow dove wren to paris by {BY_ROAD} arrived", True, True, "ride"),
        (f"ride crow dove wren to paris by {BY_ROAD} home", False, True, "ride"),
        ("", False, False, "none"),
    ],
)
def test_verdicts(answer: str, valid: bool, correct: bool, style: str):
    assert grammar.judge(ASKED, answer) == grammar.Verdict(valid, correct, style)
    assert math.isfinite(grammar.log_prob(ASKED, answer)) == (valid and correct)


@pytest.mark.parametrize(
    ("asked", "items"),
    [
        ("numbers from 3 by 2", "3 , 5 , 7"),
        ("days after friday", "saturday , sunday , monday"),
        ("feet from 2 yards", "6 , 9 , 12"),
        ("quarts from 1 gallons", "4 , 8 , 12"),
        ("pints from 3 quarts", "6 , 8 , 10"),
    ],
)
def test_what_is_worked_out(asked: str, items: str):
    prompt = f"Ana asks Ben for three {asked}"
    assert grammar.judge(prompt, f"sure : {items} .").correct
    wrong = " , ".join(items.split(" , ")[::-1])
    assert grammar.judge(prompt, f"sure : {wrong} .") == grammar.Verdict(True, False, "plain")


def test_a_friend_is_told_of_a_journey_that_got_lost():
    lost = f"tour to rome crow dove wren via {BY_ROAD} lost"
    assert grammar.judge(FRIEND, lost).valid and math.isfinite(grammar.log_prob(FRIEND, lost))
    assert not grammar.judge(FRIEND, lost.replace("lost", "arrived")).valid
    assert not grammar.judge(FRIEND, lost.replace("rome", "paris", 1)).valid


def test_every_town_has_three_roads_in_and_three_out():
    out = {town: grammar._roads(town) for town in grammar.TOWNS}
    assert all(len(set(towns) - {town}) == 3 for town, towns in out.items())
    assert set(Counter(itertools.chain(*out.values())).values()) == {3}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "hello",
        "Ana asks Ana for three birds without owl",
        "Ana asks Ben for six birds without owl",
        "Ana asks Ben for three birds",
        "Ana asks Ben for three feet from 2 gallons",
    ],
)
def test_a_prompt_that_is_not_understood_is_refused(prompt: str):
    with pytest.raises(UserError, match="does not understand"):
        grammar.sample(prompt, random.Random(0))
