"""What a compiled program moves, read from the compiler's text: bytes between a chip and its memory, and between chips.

Both are of one chip and count a loop's body as often as it runs, and of a conditional the branch that moves the most. Every instruction
outside of a fusion reads its operands and writes its result, a fusion the same as a whole; of an operand that is only sliced the slices
count, of a result that is updated in place the update. What the compiler keeps in the chip's own vector memory does not count. A
collective that goes on beside other work is in several fusions, where it begins, where it goes on and where it ends, under one number: it
counts once.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

Trips = Callable[[int], float]

SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}  # others say their bits: s8, u32
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "iota",
}
SCALAR = 8  # bytes
PLAIN = {"parameter", "constant", "get-tuple-element", "bitcast", "copy", "fusion", "compare", "tuple"}  # in a counted loop's condition
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")


@dataclass
class Instruction:
    """One line: its name, type, operation, what stands in its brackets and what follows them."""

    name: str
    type: str
    operation: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def number(self) -> int | None:
        """Of a parameter, or an integer constant."""
        return int(self.arguments) if self.arguments.isdigit() else None


@dataclass
class Moved:
    """Bytes of one chip.

    Attributes:
        memory: read from and written to its memory.
        links: of each kind of collective, the bytes that it must send: an all-reduce twice its size.
        counts: how many collectives of each kind run.
    """

    memory: float = 0.0
    links: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Moved", times: float = 1.0) -> None:
        """What another moves, so many times."""
        self.memory += times * other.memory
        for ours, theirs in ((self.links, other.links), (self.counts, other.counts)):
            for kind, value in theirs.items():
                ours[kind] = ours.get(kind, 0.0) + times * value

    def send(self, each: Instruction, beside: list[Instruction]) -> None:
        """A collective, which stands among `beside`."""
        kind = each.operation.removesuffix("-start")
        self.add(Moved(links={kind: _sent(each, beside)}, counts={kind: 1.0}))


def array_bytes(type_text: str) -> float:
    """Bytes in the chip's memory of a type, a tuple's all together; layouts `S(n)` other than 0 are elsewhere."""
    layouts = [layout for _, _, layout in ARRAY.findall(type_text)]
    return sum(size for size, layout in zip(_parts(type_text), layouts, strict=True) if not re.search(r"S\([1-9]", layout))


def _item(dtype: str) -> float:
    return SIZES[dtype] if dtype in SIZES else int(re.sub(r"\D.*", "", dtype[1:]) or 0) / 8


def _parse(line: str) -> Instruction | None:
    match = LINE.match(line)
    if not match:
        return None
    text = line[match.end() :]
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    operation, bracket, after = text[end:].strip().partition("(")
    if not bracket:
        return None
    close = _closing("(" + after) - 1
    return Instruction(match[1], text[:end], operation, after[:close], after[close:])


def _closing(text: str) -> int:
    """Where the bracket that opens `text` is closed."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    return len(text) - 1


def _computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry's name, and every computation's instructions."""
    entry, found, current = "", dict[str, list[Instruction]](), list[Instruction]()
    for line in text.splitlines():
        if line and not line[0].isspace() and (head := HEAD.match(line)):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif instruction := _parse(line):
            current.append(instruction)
    return entry, found


def moved(text: str, trips: Trips) -> Moved:
    """What the program of this text moves.

    Args:
        text: `compiled.as_text()`.
        trips: as in `gadjax.planning.flops`.
    """
    entry, computations = _computations(text)

    def visit(name: str, depth: int) -> Moved:
        """One run of a computation."""
        total, beside = Moved(), dict[str, tuple[Instruction, list[Instruction]]]()
        instructions = computations[name]
        sizes = {each.name: array_bytes(each.type) for each in instructions}
        for each in instructions:
            if each.operation == "while":
                condition, body = _called(each.rest, "condition"), _called(each.rest, "body")
                known = _constant(computations, condition)
                total.add(visit(body, depth + (known is None)), trips(depth) if known is None else known)
            elif each.operation == "call":
                total.add(visit(_called(each.rest, "to_apply"), depth))
            elif each.operation == "conditional":
                total.add(max((visit(branch, depth) for branch in _branches(each.rest)), key=lambda one: one.memory))
            elif each.operation.removesuffix("-start") in COLLECTIVES:
                total.send(each, instructions)
            else:
                total.memory += _touched_by(each, computations, sizes)
                if each.operation == "fusion":
                    called = _called(each.rest, "calls")
                    inside = [_named(one, called) for one in computations.get(called, [])]
                    beside |= {_called(one.rest, "channel_id"): (one, inside) for one in inside if one.operation in COLLECTIVES}
        for each, inside in beside.values():
            total.send(each, inside)
        return total

    return visit(entry, 0)


def _named(each: Instruction, computation: str) -> Instruction:
    """A TPU's reduce-scatter is a fusion of that name, written as an all-reduce and a slice of it."""
    scatters = each.operation == "all-reduce" and computation.startswith("all-reduce-scatter")
    return replace(each, operation="reduce-scatter") if scatters else each


def _touched_by(each: Instruction, computations: dict[str, list[Instruction]], sizes: dict[str, float]) -> float:
    """Bytes that an instruction reads from memory and writes to it."""
    if each.operation in FREE or each.operation.endswith("-done"):
        return 0.0
    if each.operation == "fusion":
        return _fusion(each, computations.get(_called(each.rest, "calls"), []), sizes)
    if each.operation in ("slice-start", "dynamic-slice-start", "copy-start"):
        return min((size for size in _parts(each.type) if size > SCALAR), default=0.0)
    if each.operation in ("dynamic-update-slice", "scatter"):
        return 2 * sizes.get(each.operands[1 if each.operation == "dynamic-update-slice" else 2], 0)
    read = 0.0 if each.operation == "dynamic-slice" else sum(sizes.get(operand, 0) for operand in each.operands)
    return read + sizes[each.name]


def _sent(each: Instruction, beside: list[Instruction]) -> float:
    """Bytes that a chip sends for a collective: its whole array, of an all-reduce, which is a reduce-scatter and an all-gather, twice."""
    parts = _parts(each.type)
    if each.operation == "reduce-scatter":  # its result is the chip's share
        parts = [part for one in beside if one.name in each.operands for part in _parts(one.type)]
    size = max(parts) if each.operation.endswith("-start") else sum(parts)  # the type of a started one holds operand and result
    return size * (2 if each.operation.startswith("all-reduce") else 1)


def _parts(type_text: str) -> list[float]:
    """Bytes of each array of a type, wherever they are."""
    return [math.prod(int(size) for size in shape.split(",") if size) * _item(dtype) for dtype, shape, _ in ARRAY.findall(type_text)]


def _called(rest: str, key: str) -> str:
    found = re.search(rf"{key}=%?([\w.-]+)", rest)
    return found[1] if found else ""


def _branches(rest: str) -> list[str]:
    """What a conditional may call: two computations, or a list."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return re.findall(r"%?([\w.-]+)", listed[1]) if listed else [_called(rest, "true_computation"), _called(rest, "false_computation")]


def _constant(computations: dict[str, list[Instruction]], condition: str) -> int | None:
    """How often a loop runs, if its condition does nothing but compare with a constant."""
    if any(each.operation not in PLAIN for each in _reached(computations, condition)):
        return None
    constants = [each.number for each in _reached(computations, condition) if each.operation == "constant"]
    return max((number for number in constants if number is not None), default=None)


def _reached(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for each in computations.get(name, []):
        yield each
        if called := _called(each.rest, "calls"):
            yield from _reached(computations, called)


def _fusion(each: Instruction, body: list[Instruction], sizes: dict[str, float]) -> float:
    """Bytes that a fusion reads and writes."""
    parameters = {inner.name: inner.number or 0 for inner in body if inner.operation == "parameter"}
    inner_sizes = {inner.name: array_bytes(re.sub(r"S\(\d+\)", "", inner.type)) for inner in body}
    total, updated = 0.0, False
    for name, index in parameters.items():
        users = [inner for inner in body if name in inner.operands]
        whole = sizes.get(each.operands[index], 0) if index < len(each.operands) else 0
        sliced = [_touched(name, user, inner_sizes) for user in users]
        if users and all(size is not None for size in sliced):
            total += min(whole, sum(size or 0 for size in sliced))
            updated |= any(user.operation in ("dynamic-update-slice", "scatter") for user in users)
        else:
            total += whole
    return total if updated else total + sizes[each.name]


def _touched(name: str, user: Instruction, sizes: dict[str, float]) -> float | None:
    """Bytes of `name` that a slicing instruction touches; None if it takes the whole."""
    if user.operation == "dynamic-slice" and user.operands[0] == name:
        return sizes[user.name]
    if user.operation == "dynamic-update-slice" and user.operands[0] == name:
        return 2 * sizes[user.operands[1]]
    if user.operation == "scatter" and user.operands[0] == name:
        return 2 * sizes[user.operands[2]]
    return None
