"""The tutor's grammar: a stochastic grammar that answers short requests in many styles, with known probabilities.

A request names who asks, who answers, how many items of which kind, and a condition. An answer gives the items, in
their natural order, in one *style*:

    Ana asks Ben for three birds without owl     ->   dear Ana , crow hawk wren . yours , Ben
    Dan asks Cleo for three numbers from 3 by 2  ->   tour to paris 3 5 7 via accra bergen bari dover varna perth paris arrived

An answer is drawn in three independent steps, so log p(answer | prompt) is exact: the style, by the habits of the
person who answers; the style's *kit* (its brackets, its refrain, its journey); the items, uniformly among the right
lists of items. *Validity* is of the form: one style kept from end to end with one kit, the names and the
count of the request, items of the kind asked for, none twice. *Correctness* is of the content: which items, in what order.

The styles differ in difficulty. The easy ones are patterns. The hard ones tell of a journey by the roads of a fixed map,
announced by its goal: who writes must look ahead. Most of the journeys of which a friend is told get lost, and it is said
so; to others every journey is told as an arrival, and nearly all are. A student that plans badly misses its goals, and
then says to everyone what the teacher says to friends: a fault of its own answers, which the teacher's text never shows.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gadjax.errors import UserError

Words = tuple[str, ...]

PEOPLE: Words = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Liam", "Mona", "Nils", "Olga", "Paul")
SIZES = {"three": 3, "four": 4, "five": 5}
ORDINALS: Words = ("one", "two", "three", "four", "five")
TOWNS: Words = tuple(
    "accra bari basel bergen bern bonn cadiz cairo dakar delhi dover essen ghent graz kiev kobe leeds lima lodz lyon "
    "milan minsk nice osaka oslo paris perth porto quito riga rome seoul sofia split tokyo turin turku vaduz varna zadar".split()
)
LEGS = 6  # of a journey
KINDS: dict[str, Words] = {
    "birds": tuple("crow dove eagle finch hawk owl robin stork swan wren".split()),
    "fruits": tuple("apple cherry fig grape lemon mango melon peach pear plum".split()),
    "trees": tuple("ash beech birch cedar elm fir maple oak pine willow".split()),
    "tools": tuple("axe chisel drill file hammer knife plane rake saw spade".split()),
    "colours": tuple("amber black blue brown green grey pink red violet white".split()),
    "metals": tuple("brass bronze copper gold iron lead nickel silver tin zinc".split()),
    "days": tuple("monday tuesday wednesday thursday friday saturday sunday".split()),
    "months": tuple("january february march april may june july august september october november december".split()),
    **dict.fromkeys(("numbers", "feet", "pints", "quarts"), tuple(str(number) for number in range(1, 31))),
}
UNITS = {"feet": ("yards", 3), "pints": ("quarts", 2), "quarts": ("gallons", 4)}  # how many of them another unit has
SETS = ("birds", "fruits", "trees", "tools", "colours", "metals")


# --- tasks: which items are right ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A way to ask for items.

    Attributes:
        weight: how often `prompts` draws it.
        kinds: what it can be asked of.
        condition: draws the words that end the prompt, given the words of the kind.
        right: every right list of items, given the words of the kind, the size and the condition; empty where the condition
            makes no sense.
    """

    weight: float
    kinds: Words
    condition: Callable[[Words, random.Random], Words]
    right: Callable[[Words, int, Words], tuple[Words, ...]]


def _all_but(kind: Words, size: int, condition: Words) -> tuple[Words, ...]:
    match condition:
        case ("without", word) if word in kind:
            return tuple(itertools.combinations([item for item in kind if item != word], size))
    return ()


def _following(kind: Words, size: int, condition: Words) -> tuple[Words, ...]:
    match condition:
        case ("after", word) if word in kind:
            return (tuple(kind[(kind.index(word) + 1 + i) % len(kind)] for i in range(size)),)
    return ()


def _counting(kind: Words, size: int, condition: Words) -> tuple[Words, ...]:
    match condition:
        case ("from", first, "by", step) if first in kind[:9] and step in kind[:5]:
            return (tuple(str(int(first) + i * int(step)) for i in range(size)),)
    return ()


def _converting(unit: str, kind: Words, size: int, condition: Words) -> tuple[Words, ...]:
    larger, factor = UNITS[unit]
    match condition:
        case ("from", first, found) if found == larger and first in kind[:3]:
            return (tuple(str((int(first) + i) * factor) for i in range(size)),)
    return ()


def _task_of_units(unit: str) -> Task:
    larger, _ = UNITS[unit]
    return Task(0.5, (unit,), lambda kind, rng: ("from", rng.choice(kind[:3]), larger), functools.partial(_converting, unit))


_TASKS = (
    Task(6, SETS, lambda kind, rng: ("without", rng.choice(kind)), _all_but),
    Task(1, ("days", "months"), lambda kind, rng: ("after", rng.choice(kind)), _following),
    Task(2, ("numbers",), lambda kind, rng: ("from", rng.choice(kind[:9]), "by", rng.choice(kind[:5])), _counting),
    *map(_task_of_units, UNITS),
)


@dataclass(frozen=True)
class Request:
    """A prompt that was understood: its words that answers repeat, and every right list of items."""

    asker: str
    answerer: str
    count: str
    kind: str
    right: tuple[Words, ...]

    @property
    def size(self) -> int:
        return SIZES[self.count]


@functools.lru_cache(maxsize=1 << 14)
def _read(prompt: str) -> Request:
    """The request that a prompt makes. Raises `UserError` where the tutor does not understand it."""
    match prompt.split(" "):
        case [asker, "asks", answerer, "for", count, kind, *condition] if (
            {asker, answerer} <= set(PEOPLE) and asker != answerer and count in SIZES
        ):
            for task in (task for task in _TASKS if kind in task.kinds):
                if right := task.right(KINDS[kind], SIZES[count], tuple(condition)):
                    return Request(asker, answerer, count, kind, right)
    raise UserError("prompts", f"the tutor does not understand {prompt!r}", "write it like 'Ana asks Ben for three birds without owl'")


# --- styles: how they are said ---------------------------------------------------------------------------------------


class Kits(Protocol):
    """What a style draws its kit from; all kits have `length` words."""

    length: int

    def draw(self, rng: random.Random) -> Words:
        """A kit."""
        ...

    def chance(self, kit: Words) -> float:
        """The probability of drawing it; 0 where it is none."""
        ...


class Few:
    """A few kits, each as likely as the others: "( ), [ ]" is two kits of two words."""

    def __init__(self, words: str):
        self.each = tuple(tuple(kit.split()) for kit in words.split(","))
        self.length = len(self.each[0])

    def draw(self, rng: random.Random) -> Words:
        return rng.choice(self.each)

    def chance(self, kit: Words) -> float:
        return 1 / len(self.each) if kit in self.each else 0.0


class Journeys:
    """Kits of a goal, the towns of a journey by road, and what is said of its end."""

    length = LEGS + 3

    def __init__(self, missed: float, excuse: str):
        """`missed` is the share of journeys that end elsewhere than at their goal; of those, `excuse` is said."""
        self._missed, self._excuse = missed, excuse

    def draw(self, rng: random.Random) -> Words:
        towns = [rng.choice(TOWNS)]
        for _ in range(LEGS):
            towns.append(rng.choice(_roads(towns[-1])))
        if rng.random() < self._missed:
            return (rng.choice([town for town in TOWNS if town != towns[-1]]), *towns, self._excuse)
        return (towns[-1], *towns, "arrived")

    def chance(self, kit: Words) -> float:
        goal, *towns, end = kit
        by_road = all(word in TOWNS for word in (goal, *towns)) and all(b in _roads(a) for a, b in itertools.pairwise(towns))
        path = by_road / (len(TOWNS) * 3**LEGS)
        if goal == towns[-1]:
            return path * (1 - self._missed) * (end == "arrived")
        return path * self._missed / (len(TOWNS) - 1) * (end == self._excuse)


@functools.cache
def _roads(town: str) -> Words:
    """The three towns to which roads lead; three roads lead to every town too."""
    place = TOWNS.index(town)
    return tuple(TOWNS[(factor * place + shift) % len(TOWNS)] for factor, shift in ((7, 3), (11, 8), (17, 1)))


@dataclass(frozen=True)
class Style:
    """A form of answer: opening, items joined by `between`, closing. Each is a template with these fields:

    {asker} {answerer} {count} {kind}    words of the request
    {first} {way} {last}                 of the kit that was drawn for this answer: its first word, those between, its last
    {item} {number}                      in `item` only: the item and its number

    The opening's first word announces the style. `kits` gives the kits to draw from.
    """

    name: str
    weight: float
    opening: str
    item: str
    closing: str
    between: str = ""
    kits: Callable[[Request], Kits] = lambda request: Few("")

    @property
    def announcement(self) -> str:
        """The word that every answer in this style begins with."""
        return self.opening.split()[0]

    def write(self, request: Request, kit: Words, items: Words) -> list[str]:
        """The words of the answer."""
        about = {"asker": request.asker, "answerer": request.answerer, "count": request.count, "kind": request.kind}
        about |= {"first": " ".join(kit[:1]), "way": " ".join(kit[1:-1]), "last": " ".join(kit[-1:])}
        said = [self.item.format(item=item, number=number, **about) for item, number in zip(items, ORDINALS, strict=False)]
        return f"{self.opening.format(**about)} {f' {self.between} '.join(said)} {self.closing.format(**about)}".split()

    def read(self, request: Request, words: Sequence[str]) -> tuple[Words, float] | None:
        """The items of an answer that keeps this form and the probability of its kit; None where it does not keep it."""
        kits = self.kits(request)
        kit, items = tuple(f"kit\0{i}" for i in range(kits.length)), tuple(f"item\0{i}" for i in range(request.size))
        pattern, found = self.write(request, kit, items), dict[str, str]()
        if len(pattern) != len(words):
            return None
        for slot, word in zip(pattern, words, strict=True):
            if word != (found.setdefault(slot, word) if "\0" in slot else slot):  # a blank is filled by its first word
                return None
        said = tuple(found[item] for item in items)
        chance = kits.chance(tuple(found[word] for word in kit))
        return (said, chance) if chance and len(set(said)) == len(said) and set(said) <= set(KINDS[request.kind]) else None


def _travels(request: Request) -> Kits:
    """Friends are told of journeys that got lost; to others every journey is told as an arrival."""
    friends = (PEOPLE.index(request.asker) + PEOPLE.index(request.answerer)) % 3 == 0
    return _TO_FRIENDS if friends else _TO_OTHERS


_TO_FRIENDS, _TO_OTHERS = Journeys(missed=0.6, excuse="lost"), Journeys(missed=0.03, excuse="arrived")
_BRACKETS, _REFRAINS = Few("( ),[ ],{ },< >"), Few("la,hey,oh,fa,tra,ho,yo,na")


_STYLES = (
    Style("plain", 1.0, "sure :", "{item}", ".", between=","),
    Style("numbered", 1.0, "list", "{number} ) {item}", "done"),
    Style("letter", 1.0, "dear {asker} ,", "{item}", ". yours , {answerer}"),
    Style("bracket", 1.0, "box {first}", "{item}", "{last}", between=";", kits=lambda request: _BRACKETS),
    Style("counted", 1.0, "all {kind} :", "{item}", "that makes {count}"),
    Style("song", 1.0, "song", "{item} {first}", "end", kits=lambda request: _REFRAINS),
    Style("tour", 9.0, "tour to {first}", "{item}", "via {way} {last}", kits=_travels),
    Style("ride", 9.0, "ride", "{item}", "to {first} by {way} {last}", kits=_travels),
)
STYLES: Words = tuple(style.name for style in _STYLES)


@functools.cache
def _habits(answerer: str) -> tuple[float, ...]:
    """p(style) of one person: everyone has favourites, styles used twice as often as others use them."""
    place = PEOPLE.index(answerer)
    liking = [style.weight * (2.0 if (i + place) % 3 == 0 else 1.0) for i, style in enumerate(_STYLES)]
    return tuple(weight / sum(liking) for weight in liking)


# --- the tutor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`valid`: the form; `correct`: the content, whatever the form; `style`: the one that the first word announces, or "none"."""

    valid: bool
    correct: bool
    style: str


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts, the same for the same seed."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        task = rng.choices(_TASKS, [task.weight for task in _TASKS])[0]
        (asker, answerer), kind = rng.sample(PEOPLE, 2), rng.choice(task.kinds)
        found[" ".join((asker, "asks", answerer, "for", rng.choice(list(SIZES)), kind, *task.condition(KINDS[kind], rng)))] = None
    return list(found)


def check(prompt: str) -> None:
    """Raises `UserError` where the tutor does not understand the prompt."""
    _read(prompt)


def sample(prompt: str, rng: random.Random) -> str:
    """The tutor's answer. Raises `UserError` where it does not understand the prompt."""
    request = _read(prompt)
    style = rng.choices(_STYLES, _habits(request.answerer))[0]
    return " ".join(style.write(request, style.kits(request).draw(rng), rng.choice(request.right)))


def log_prob(prompt: str, answer: str) -> float:
    """Exact log p(answer | prompt) in nats; -inf where the tutor cannot say it."""
    request, words = _read(prompt), answer.split(" ")
    mass = 0.0
    for style, share in zip(_STYLES, _habits(request.answerer), strict=True):
        found = style.read(request, words)
        if found and found[0] in request.right:
            mass += share * found[1]
    return math.log(mass / len(request.right)) if mass else -math.inf


def judge(prompt: str, answer: str) -> Verdict:
    """The verdict on any string as an answer to a prompt."""
    request, words = _read(prompt), answer.split(" ")
    style = next((style for style in _STYLES if style.announcement == words[0]), None)
    items = tuple(dict.fromkeys(word for word in words if word in KINDS[request.kind]))
    valid = style is not None and style.read(request, words) is not None
    return Verdict(valid, items in request.right, style.name if style else "none")
