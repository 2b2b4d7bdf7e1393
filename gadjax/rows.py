"""The rows of the files that users bring: .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from gadjax.errors import UserError

KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def read_rows(path: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each row of a file (`data.jsonl, line 3`), and the row.

    Args:
        path: ends with one of KINDS.
        where: the config field that names the file.

    Raises:
        UserError: the file is absent, of another kind, or broken; names the line.
    """
    if not path.endswith(KINDS):
        raise UserError(where, f"{path} is none of {', '.join(KINDS)}", "name a file of one of these kinds")
    if not Path(path).is_file():
        raise UserError(where, f"there is no file {path}", "correct the path, which is relative to where gadjax is started")
    return _parquet_rows(path) if path.endswith(".parquet") else _json_rows(path)


def _json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _json_row(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 in line {number + 1}", "write it in UTF-8") from error
    except OSError as error:
        raise UserError(path, f"cannot be read after line {number} ({error})", "check that the file is whole") from error


def _open(path: str) -> TextIO:
    # pyarrow's streams, unlike zstandard's, raise at a file that is cut off.
    stream = pyarrow.input_stream(path, compression=COMPRESSIONS.get(Path(path).suffix))
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(place, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(place, "is not a JSON object", "write one JSON object a line")
    return row


def _parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(path, f"cannot be read after row {number} ({error})", "check that the file is whole") from error
