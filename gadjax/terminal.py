"""What the user sees while a run goes on: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

PLAIN_WIDTH = 240  # a file or a pipe has no width: tables are not broken there

# Not on stdout, which belongs to what a program may read (`--json`).
console = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)

TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of the direction of writing
PLAIN_INTERVAL = 10.0  # seconds between plain lines

Advance = Callable[[int, str], None]


def harmless(text: str) -> str:
    """Foreign text that a terminal may show.

    Control characters but line ends and tabs become pictures, so that nothing moves the cursor, sets a title or answers in the user's
    name; marks that turn the direction of writing, and what is no character, become the replacement mark.
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)  # the Control Pictures
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or character in TURNS or 0xD800 <= code < 0xE000:
        return "\ufffd"
    return character


def say(line: str) -> None:
    """One line to the user. Nothing in it is taken for markup."""
    console.print(line, markup=False)


@contextmanager
def track(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Shows how far a piece of work is.

    Args:
        title: what is done.
        total: of how many steps.
        done: steps that were done before.

    Yields:
        `advance(done, note)`: the steps done so far, and a few words on how it goes.
    """
    if console.is_terminal:
        # In a narrow terminal the note is wrapped, so that the counts stay.
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(table_column=Column(width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column()),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield lambda done, note="": progress.update(task, completed=done, note=note)
        return
    last = time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= PLAIN_INTERVAL:
            last = time.monotonic()
            say(f"{title}: {done}/{total} {note}".rstrip())
            sys.stderr.flush()

    yield advance
