"""The tutor's grammar: a stochastic grammar that answers short requests in many styles, with known probabilities.

A request names who asks, who answers, how many items of which kind; an answer gives the items in one *style*:

    Ana asks Ben for three birds without owl     ->   dear Ana , hawk crow wren . yours , Ben
    Ben asks Cleo for four numbers from 3 by 2   ->   song 3 la 5 la 7 la 9 la end

An answer is drawn in three independent steps, so log p(answer | prompt) is exact: the style, by the habits of the
person who answers; the style's *kit* (its brackets, its refrain, ...), uniformly; the items, uniformly among the right
ones. *Validity* is of the form: one style kept from end to end with one kit, the names and the count of the request,
items of the kind asked for, none twice. *Correctness* is of the content: which items, and in what order.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gadjax.errors import UserError

Words = tuple[str, ...]

PEOPLE: Words = tuple("Ana Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kira Liam Mona Nils Olga Paul".split())
COUNTS = {"three": 3, "four": 4, "five": 5}
ORDINALS: Words = ("one", "two", "three", "four", "five")
KINDS: dict[str, Words] = {
    kind: tuple(words.split())
    for kind, words in {
        "birds": "crow dove eagle finch hawk owl robin stork swan wren",
        "fruits": "apple cherry fig grape lemon mango melon peach pear plum",
        "trees": "ash beech birch cedar elm fir maple oak pine willow",
        "tools": "axe chisel drill file hammer knife plane rake saw spade",
        "colours": "amber black blue brown green grey pink red violet white",
        "metals": "brass bronze copper gold iron lead nickel silver tin zinc",
        "days": "monday tuesday wednesday thursday friday saturday sunday",
        "months": "january february march april may june july august september october november december",
        "numbers": " ".join(map(str, range(1, 31))),
    }.items()
}
SETS = tuple(kind for kind in KINDS if kind not in ("days", "months", "numbers"))


# --- tasks: what is asked for ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """The items that a request wants.

    Attributes:
        allowed: the words that may stand as an item (form).
        right: the items of a right answer (content): `size` of them in any order or, where there are no more, all in this order.
        size: how many items.
    """

    allowed: Words
    right: Words
    size: int

    @property
    def log_prob(self) -> float:
        """log p of any one list of right items."""
        return -math.log(math.perm(len(self.right), self.size)) if len(self.right) > self.size else 0.0

    def draw(self, rng: random.Random) -> list[str]:
        return rng.sample(self.right, self.size) if len(self.right) > self.size else list(self.right)

    def is_right(self, items: Sequence[str]) -> bool:
        if len(self.right) == self.size:
            return tuple(items) == self.right
        return len(items) == len(set(items)) == self.size and set(items) <= set(self.right)


@dataclass(frozen=True)
class Task:
    """A way to ask: `ask` draws the words that follow the kind, `goal` reads them again (None: not understood)."""

    kinds: Words
    ask: Callable[[Words, int, random.Random], str]
    goal: Callable[[Words, int, Words], Goal | None]


def _without(kind: Words, size: int, words: Words) -> Goal | None:
    match words:
        case ["without", word] if word in kind:
            return Goal(kind, tuple(item for item in kind if item != word), size)
    return None


def _sorting(kind: Words, size: int, words: Words) -> Goal | None:
    match words:
        case ["sorting", *items] if len(items) == len(set(items)) == size and set(items) <= set(kind):
            return Goal(tuple(items), tuple(sorted(items)), size)
    return None


def _after(kind: Words, size: int, words: Words) -> Goal | None:
    match words:
        case ["after", word] if word in kind:
            start = kind.index(word) + 1
            return Goal(kind, tuple(kind[(start + i) % len(kind)] for i in range(size)), size)
    return None


def _stepping(kind: Words, size: int, words: Words) -> Goal | None:
    match words:
        case ["from", first, "by", step] if first in kind[:9] and step in kind[:5]:
            return Goal(kind, tuple(str(int(first) + i * int(step)) for i in range(size)), size)
    return None


_TASKS = {
    "without": Task(SETS, lambda kind, size, rng: f"without {rng.choice(kind)}", _without),
    "sorting": Task(SETS, lambda kind, size, rng: f"sorting {' '.join(rng.sample(kind, size))}", _sorting),
    "after": Task(("days", "months"), lambda kind, size, rng: f"after {rng.choice(kind)}", _after),
    "from": Task(("numbers",), lambda kind, size, rng: f"from {rng.randint(1, 9)} by {rng.randint(1, 5)}", _stepping),
}
_MIX = {"without": 5, "sorting": 3, "after": 1, "from": 1}  # how often `prompts` draws a task


@dataclass(frozen=True)
class Request:
    """A prompt that was understood: its words that answers repeat, and its goal."""

    asker: str
    answerer: str
    count: str
    kind: str
    goal: Goal


def _read(prompt: str) -> Request:
    """The request that a prompt makes. Raises `UserError` where the tutor does not understand it."""
    match prompt.split(" "):
        case [asker, "asks", answerer, "for", count, kind, relation, *rest] if (
            asker in PEOPLE and answerer in PEOPLE and asker != answerer and count in COUNTS and relation in _TASKS
        ):
            task = _TASKS[relation]
            goal = task.goal(KINDS[kind], COUNTS[count], (relation, *rest)) if kind in task.kinds else None
            if goal:
                return Request(asker, answerer, count, kind, goal)
    raise UserError("prompts", f"the tutor does not understand {prompt!r}", "write it like 'Ana asks Ben for three birds without owl'")


# --- styles: how it is answered --------------------------------------------------------------------------------------


def _kits(words: str) -> tuple[Words, ...]:
    """"( ), [ ]" are two kits of two words."""
    return tuple(tuple(kit.split()) for kit in words.split(", "))


@dataclass(frozen=True)
class Style:
    """A form of answer: opening, items joined by `between`, closing. Each is a template with these fields:

    {asker} {answerer} {count} {kind}    words of the request
    {items} {back}                       all items, and all items from the last to the first
    {0} {1} ...                          the words of the kit that was drawn for this answer
    {item} {number} {left} {mark}        in `item` only: the item, its number counted up and counted down to one,
                                         and the kit's words taken in turn
    """

    name: str
    weight: float
    opening: str
    item: str
    closing: str
    between: str = ""
    kits: tuple[Words, ...] = ((),)

    def write(self, request: Request, kit: Words, items: Sequence[str]) -> list[str]:
        about = {"asker": request.asker, "answerer": request.answerer, "count": request.count, "kind": request.kind}
        about |= {"items": " ".join(items), "back": " ".join(reversed(items))}
        said = [
            self.item.format(
                *kit, **about, item=item, number=ORDINALS[i], left=ORDINALS[len(items) - 1 - i], mark=kit[i % len(kit)] if kit else ""
            )
            for i, item in enumerate(items)
        ]
        return f"{self.opening.format(*kit, **about)} {f' {self.between} '.join(said)} {self.closing.format(*kit, **about)}".split()

    def read(self, request: Request, kit: Words, words: Sequence[str]) -> Words | None:
        """The items of an answer that keeps this form with this kit; None where it does not."""
        blanks = [f"item {i}" for i in range(request.goal.size)]  # no word has a space
        pattern = self.write(request, kit, [blank.replace(" ", "\0") for blank in blanks])
        if len(pattern) != len(words):
            return None
        found: dict[str, str] = {}
        for slot, word in zip(pattern, words, strict=True):
            if (found.setdefault(slot, word) if "\0" in slot else slot) != word:
                return None
        items = tuple(found.values())
        return items if len(set(items)) == len(items) and set(items) <= set(request.goal.allowed) else None


_STYLES = (
    Style("plain", 1.0, "sure :", "{item}", ".", between=","),
    Style("numbered", 1.0, "list", "{number} ) {item}", "done"),
    Style("letter", 1.0, "dear {asker} ,", "{item}", ". yours , {answerer}"),
    Style("bracket", 1.0, "{0}", "{item}", "{1}", between=";", kits=_kits("( ), [ ], { }, < >")),
    Style("counted", 1.0, "{kind} :", "{item}", "that makes {count}"),
    Style("song", 1.0, "song", "{item} {0}", "end", kits=_kits("la, hey, oh, fa, tra, ho, yo, na, ba, do, re, mi")),
    Style("launch", 1.0, "ready", "{left} {item}", "go"),
    Style("pair", 1.0, "{0}", "{item}", "{1}", between="then",
          kits=_kits("dawn dusk, salt pepper, sun moon, bread butter, hand glove, lock key, cup saucer, nut bolt, needle thread, bow arrow, king queen, rise fall")),
    Style("mirror", 1.0, "mirror", "{item}", "| {back} end"),
    Style("parade", 1.0, "parade", "{mark} {item}", "halt", kits=_kits("left right, up down, tick tock, ping pong, in out, yes maybe")),
)
STYLES = tuple(style.name for style in _STYLES)


def _habits(answerer: str) -> dict[str, float]:
    """p(style) of one person: everyone has favourites, that is styles used three times as often as others use them."""
    place = PEOPLE.index(answerer)
    liking = {s.name: s.weight * (3.0 if (i + place) % 4 == 0 else 1.0) for i, s in enumerate(_STYLES)}
    total = sum(liking.values())
    return {name: weight / total for name, weight in liking.items()}


_HABITS = {person: _habits(person) for person in PEOPLE}


# --- the tutor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`valid`: the form; `correct`: the content, whatever the form; `style`: by its first words, "none" where unknown."""

    valid: bool
    correct: bool
    style: str


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts, the same for the same seed."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        relation = rng.choices(list(_MIX), list(_MIX.values()))[0]
        task, number = _TASKS[relation], rng.choice(list(COUNTS))
        asker, answerer = rng.sample(PEOPLE, 2)
        kind = rng.choice(task.kinds)
        found[f"{asker} asks {answerer} for {number} {kind} {task.ask(KINDS[kind], COUNTS[number], rng)}"] = None
    return list(found)


def sample(prompt: str, rng: random.Random) -> str:
    """The tutor's answer. Raises `UserError` where it does not understand the prompt."""
    request = _read(prompt)
    habits = _HABITS[request.answerer]
    style = rng.choices(_STYLES, [habits[style.name] for style in _STYLES])[0]
    return " ".join(style.write(request, rng.choice(style.kits), request.goal.draw(rng)))


def log_prob(prompt: str, answer: str) -> float:
    """Exact log p(answer | prompt) in nats; -inf where the tutor cannot say it."""
    request, words = _read(prompt), answer.split(" ")
    mass = sum(
        _HABITS[request.answerer][style.name] / len(style.kits)
        for style in _STYLES
        for kit in style.kits
        if (items := style.read(request, kit, words)) and request.goal.is_right(items)
    )
    return math.log(mass) + request.goal.log_prob if mass else -math.inf


def judge(prompt: str, answer: str) -> Verdict:
    """The verdict on any string as an answer to a prompt."""
    request, words = _read(prompt), answer.split(" ")
    style = _style(request, words)
    valid = style is not None and any(style.read(request, kit, words) for kit in style.kits)
    lexicon = KINDS[request.kind]
    items = list(dict.fromkeys(word for word in words if word in lexicon))
    return Verdict(valid, request.goal.is_right(items), style.name if style else "none")


def _style(request: Request, words: Sequence[str]) -> Style | None:
    """The style that the first words of an answer announce."""
    for style in _STYLES:
        for kit in style.kits:
            opening = style.write(request, kit, ["\0"])
            opening = opening[:opening.index(next(w for w in opening if "\0" in w))]
            if tuple(words[:1]) == tuple(opening[:1]):
                return style
    return None
