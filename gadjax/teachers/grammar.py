"""The tutor's grammar: a stochastic grammar that answers short requests in many styles, with known probabilities.

A request names who asks, who answers, how many items of which kind, and a condition. An answer gives the items, in
their natural order, in one *style*:

    Ana asks Ben for three birds without owl     ->   dear Ana , crow hawk wren . yours , Ben
    Ben asks Cleo for four numbers from 3 by 2   ->   song 3 la 5 la 7 la 9 la end

An answer is drawn in three independent steps, so log p(answer | prompt) is exact: the style, by the habits of the
person who answers; the style's *kit* (its brackets, its refrain, its marks), uniformly; the items, uniformly among the
right lists of items. *Validity* is of the form: one style kept from end to end with one kit, the names and the count of
the request, items of the kind asked for, none twice. *Correctness* is of the content: which items, and in what order.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gadjax.errors import UserError

Words = tuple[str, ...]

PEOPLE: Words = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Liam", "Mona", "Nils", "Olga", "Paul")
SIZES = {"three": 3, "four": 4, "five": 5}
ORDINALS: Words = ("one", "two", "three", "four", "five")
MARKS: Words = ("+", "-", "*", "/", "=", "~")
KINDS: dict[str, Words] = {
    "birds": tuple("crow dove eagle finch hawk owl robin stork swan wren".split()),
    "fruits": tuple("apple cherry fig grape lemon mango melon peach pear plum".split()),
    "trees": tuple("ash beech birch cedar elm fir maple oak pine willow".split()),
    "tools": tuple("axe chisel drill file hammer knife plane rake saw spade".split()),
    "colours": tuple("amber black blue brown green grey pink red violet white".split()),
    "metals": tuple("brass bronze copper gold iron lead nickel silver tin zinc".split()),
    "days": tuple("monday tuesday wednesday thursday friday saturday sunday".split()),
    "months": tuple("january february march april may june july august september october november december".split()),
    "numbers": tuple(str(number) for number in range(1, 31)),
}
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


_TASKS = {
    "without": Task(6, SETS, lambda kind, rng: ("without", rng.choice(kind)), _all_but),
    "after": Task(1, ("days", "months"), lambda kind, rng: ("after", rng.choice(kind)), _following),
    "from": Task(2, ("numbers",), lambda kind, rng: ("from", rng.choice(kind[:9]), "by", rng.choice(kind[:5])), _counting),
}


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
            {asker, answerer} <= set(PEOPLE) and asker != answerer and count in SIZES and condition and condition[0] in _TASKS
        ):
            task = _TASKS[condition[0]]
            right = task.right(KINDS[kind], SIZES[count], tuple(condition)) if kind in task.kinds else ()
            if right:
                return Request(asker, answerer, count, kind, right)
    raise UserError("prompts", f"the tutor does not understand {prompt!r}", "write it like 'Ana asks Ben for three birds without owl'")


# --- styles: how they are said ---------------------------------------------------------------------------------------


def _kits(words: str) -> Callable[[int], tuple[Words, ...]]:
    """The kits of a style that has a few: "( ), [ ]" is two kits of two words."""
    kits = tuple(tuple(kit.split()) for kit in words.split(","))
    return lambda size: kits


@functools.cache
def _marks(size: int) -> tuple[Words, ...]:
    """The kits of a style that draws a mark for every item, none twice."""
    return tuple(itertools.permutations(MARKS, size))


@dataclass(frozen=True)
class Style:
    """A form of answer: opening, items joined by `between`, closing. Each is a template with these fields:

    {asker} {answerer} {count} {kind}    words of the request
    {kit} {kit_back}                     all words of the kit that was drawn for this answer, and from the last to the first
    {0} {1}                              the kit's first and second word
    {item} {number} {left} {mark}        in `item` only: the item, its number counted up and counted down to one,
                                         and its word of the kit

    `kits` gives the kits to draw from, for a number of items.
    """

    name: str
    weight: float
    opening: str
    item: str
    closing: str
    between: str = ""
    kits: Callable[[int], tuple[Words, ...]] = lambda size: ((),)

    def write(self, request: Request, kit: Words, items: Words) -> list[str]:
        """The words of the answer."""
        about = {"asker": request.asker, "answerer": request.answerer, "count": request.count, "kind": request.kind}
        about |= {"kit": " ".join(kit), "kit_back": " ".join(reversed(kit))}
        size = len(items)
        said = [
            self.item.format(*kit, item=item, number=ORDINALS[i], left=ORDINALS[size - 1 - i], mark=kit[i % len(kit)] if kit else "")
            for i, item in enumerate(items)
        ]
        return f"{self.opening.format(*kit, **about)} {f' {self.between} '.join(said)} {self.closing.format(*kit, **about)}".split()

    def first_words(self, request: Request) -> set[str]:
        """The words that an answer in this style can begin with."""
        return {self.write(request, kit, ("",))[0] for kit in self.kits(1)}

    def read(self, request: Request, words: Sequence[str]) -> Words | None:
        """The items of an answer that keeps this form; None where it does not."""
        kits = self.kits(request.size)
        kit, items = tuple(f"kit\0{i}" for i in range(len(kits[0]))), tuple(f"item\0{i}" for i in range(request.size))
        pattern, found = self.write(request, kit, items), dict[str, str]()
        if len(pattern) != len(words):
            return None
        for slot, word in zip(pattern, words, strict=True):
            if word != (found.setdefault(slot, word) if "\0" in slot else slot):  # a blank is filled by its first word
                return None
        said = tuple(found[item] for item in items)
        form = tuple(found[word] for word in kit) in kits and len(set(said)) == len(said) and set(said) <= set(KINDS[request.kind])
        return said if form else None


_STYLES = (
    Style("plain", 1.0, "sure :", "{item}", ".", between=","),
    Style("numbered", 1.0, "list", "{number} ) {item}", "done"),
    Style("letter", 1.0, "dear {asker} ,", "{item}", ". yours , {answerer}"),
    Style("bracket", 1.0, "{0}", "{item}", "{1}", between=";", kits=_kits("( ),[ ],{ },< >")),
    Style("counted", 1.0, "{kind} :", "{item}", "that makes {count}"),
    Style("song", 1.0, "song", "{item} {0}", "end", kits=_kits("la,hey,oh,fa,tra,ho,yo,na")),
    Style("flags", 2.0, "flags", "{mark} {item}", "up", kits=_marks),
    Style("wreath", 2.0, "wreath {kit}", "{item}", "{kit_back} bound", kits=_marks),
    Style("nest", 2.0, "nest", "{mark} {item}", "{kit_back} out", kits=_marks),
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
    tasks = list(_TASKS.values())
    while len(found) < count:
        task = rng.choices(tasks, [task.weight for task in tasks])[0]
        (asker, answerer), kind = rng.sample(PEOPLE, 2), rng.choice(task.kinds)
        found[" ".join((asker, "asks", answerer, "for", rng.choice(list(SIZES)), kind, *task.condition(KINDS[kind], rng)))] = None
    return list(found)


def sample(prompt: str, rng: random.Random) -> str:
    """The tutor's answer. Raises `UserError` where it does not understand the prompt."""
    request = _read(prompt)
    style = rng.choices(_STYLES, _habits(request.answerer))[0]
    return " ".join(style.write(request, rng.choice(style.kits(request.size)), rng.choice(request.right)))


def log_prob(prompt: str, answer: str) -> float:
    """Exact log p(answer | prompt) in nats; -inf where the tutor cannot say it."""
    request, words = _read(prompt), answer.split(" ")
    mass = sum(
        share / len(style.kits(request.size))
        for style, share in zip(_STYLES, _habits(request.answerer), strict=True)
        if style.read(request, words) in request.right
    )
    return math.log(mass / len(request.right)) if mass else -math.inf


def judge(prompt: str, answer: str) -> Verdict:
    """The verdict on any string as an answer to a prompt."""
    request, words = _read(prompt), answer.split(" ")
    announced = [style for style in _STYLES if words[0] in style.first_words(request)]
    items = tuple(dict.fromkeys(word for word in words if word in KINDS[request.kind]))
    return Verdict(
        any(style.read(request, words) for style in announced), items in request.right, announced[0].name if announced else "none"
    )
