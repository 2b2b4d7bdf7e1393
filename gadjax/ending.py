"""How a command line ends: with which status, and what it says."""

import sqlite3
import sys
from collections.abc import Callable

import typer

from gadjax.errors import Passing, UserError, no_room
from gadjax.foreign import harmless


def ended(command: Callable[[], int | None]) -> int:
    """The status of a command, of which a mistake of the user has been told in one line. A fault of ours goes through."""
    try:
        return command() or 0
    except UserError as mistake:
        return _fail(str(mistake), 1 if isinstance(mistake, Passing) else 2)
    except (OSError, sqlite3.OperationalError) as error:
        if not no_room(error):
            raise
        return _fail(f"{error}; make room there, or choose another run.folder: the same command goes on")
    except typer.TyperException as mistake:  # the command line itself
        return _fail(f"{mistake.format_message()} (gadjax --help tells more)")


def leave(status: int, last_words: str = "") -> None:
    """`gadjax.processes.leave`, where a command may have joined other processes."""
    if processes := sys.modules.get("gadjax.processes"):
        processes.leave(status, last_words)


def _fail(message: str, status: int = 2) -> int:
    print(f"gadjax: {harmless(message)}", file=sys.stderr)
    return status
