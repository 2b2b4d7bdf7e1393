"""Files that are whole or absent: written beside, flushed to the disk, then renamed; and JSON without NaN."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told_where(path: Path) -> Iterator[None]:
    """Gives the file's name to errors of the system that have none, as those of writes: where the disk is full is to be told."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, text: str) -> None:
    """Makes `text` the file's content: a reader, or a run that was killed here, sees the old content or the new one; a full disk leaves the
    old one, and nothing beside it.

    Lone surrogates, which UTF-8 cannot hold, become question marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with told_where(path):
            beside.write_text(text, encoding="utf-8", errors="replace")
        flush(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, with null for what JSON cannot say: NaN and infinities."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula begins with an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_no_formula(cell) for cell in row] for row in rows)
    return file.getvalue()


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(("=", "+", "-", "@", "|", "%")) else cell


def finite(value: Any) -> Any:
    """`value` with None for every float in it that is NaN or infinite."""
    match value:
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value
