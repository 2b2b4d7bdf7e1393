"""What the user sees while a run goes on: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from gadjax.foreign import harmless

PLAIN_WIDTH = 240  # a file or a pipe has no width: tables are not broken there

# Not on stdout, which belongs to what a program may read (`--json`).
console = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)

PLAIN_INTERVAL = 10.0  # seconds between plain lines

Advance = Callable[[int, str], None]


def say(line: str) -> None:
    """One line to the user. Nothing in it is taken for markup, or reaches the terminal as a command."""
    console.print(harmless(line), markup=False)


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
