"""The rows of what users bring: .jsonl, .jsonl.gz, .jsonl.zst, .json and .parquet files, folders of them, and data sets of the library
`datasets`, from a folder or from the hub.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gadjax.errors import UserError
from gadjax.foreign import read_whole
from gadjax.hub import fetched

JSON = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KINDS = (*JSON, ".parquet")
ARRAY = ".json"  # one array of objects; of a folder's only where there is nothing else, for libraries keep notes of their own in such files
ARROW = ".arrow"  # as `save_to_disk` writes it, in folders only
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
USUAL = "train"  # the split that is read where there are several and none is named

MAX_LINE = 16 * 2**20  # characters: a text is read no further, whatever a small file unpacks to

Row = dict[str, Any]


def read_rows(source: str, where: str) -> Iterator[tuple[str, Row]]:
    """Yields the place of each row (`data.jsonl, line 3`), and the row.

    Args:
        source: a file of one of KINDS; or a folder of such files, or one that `save_to_disk` of `datasets` wrote, or a data set's
            name on the hub, each with an optional `:split`. Without one, `train` is read, or all where there is no `train`.
        where: the config field that names it.

    Raises:
        UserError: the file is absent, of another kind, or broken; names the line.
    """
    if source.endswith((*KINDS, ARRAY)):
        if Path(source).is_dir():
            return _folder_rows(Path(source), None, where)
        if not Path(source).is_file():
            raise UserError(where, f"there is no file {source}", "correct the path, which is relative to where gadjax is started")
        return _file_rows(source)
    name, _, split = source.partition(":")
    if Path(name).expanduser().is_dir():
        return _folder_rows(Path(name).expanduser(), split or None, where)
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        raise UserError(where, f"{source} is none of {', '.join(KINDS)}", "name a file of one of these kinds, a folder or a data set")
    return _folder_rows(_fetched(name, where), split or None, where)


def _fetched(name: str, where: str) -> Path:
    """A data set of the hub, its files of known kinds only: no code of it is fetched, let alone run."""
    what = f"{name} is neither a file nor a folder nor a data set that the hub gives"
    return fetched(name, where, what, "correct the name", [f"*{kind}" for kind in (*KINDS, ARRAY)], "dataset")


def _folder_rows(folder: Path, split: str | None, where: str) -> Iterator[tuple[str, Row]]:
    # `datasets` keeps results of its own in cache-*.arrow; hidden folders are the hub's.
    found = [path for path in sorted(folder.rglob("*")) if not path.name.startswith("cache-") and not _hidden(path.relative_to(folder))]
    files = [path for path in found if path.name.endswith((*KINDS, ARROW))] or [path for path in found if path.name.endswith(ARRAY)]
    if split is None:
        chosen = [path for path in files if _is_of(path.relative_to(folder), USUAL)] or files
    else:
        chosen = [path for path in files if _is_of(path.relative_to(folder), split)]
    if not chosen:
        what = f"{folder} holds no file of {', '.join(KINDS)}" + (f" of a split {split!r}" if split else "")
        raise UserError(where, what, "name a folder that has one, or another split" if split else "name a folder that has one")
    return (row for path in chosen for row in _file_rows(str(path)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_of(path: Path, split: str) -> bool:
    """Whether a file's name, or that of a folder it lies in, tells that it is of a split: train-00000-of-00002.parquet, test/data.jsonl."""
    return any(split in re.split(r"[-_.]", part) for part in path.parts)


def _file_rows(path: str) -> Iterator[tuple[str, Row]]:
    if path.endswith(JSON):
        return _json_rows(path)
    if path.endswith(ARRAY):
        return _array_rows(path)
    return _table_rows(path, _parquet_batches if path.endswith(".parquet") else _arrow_batches)


def _json_rows(path: str) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), start=1):
                if len(line) > MAX_LINE:
                    raise UserError(
                        f"{path}, line {number}", f"has more than {MAX_LINE} characters", "leave it out, or break it into lines"
                    )
                if line.strip():
                    yield f"{path}, line {number}", _json_row(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 in line {number + 1}", "write it in UTF-8") from error
    except OSError as error:
        raise UserError(path, f"cannot be read after line {number} ({error})", "check that the file is whole") from error


def _array_rows(path: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(read_whole(Path(path), "write one object a line in a .jsonl file", encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(path, f"is not JSON ({error})", "write an array of objects, or one object a line in a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(path, "is not an array of objects", "write one, or one object a line in a .jsonl file")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _open(path: str) -> TextIO:
    # pyarrow's streams, unlike zstandard's, raise at a file that is cut off.
    stream = pyarrow.input_stream(path, compression=COMPRESSIONS.get(Path(path).suffix))
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _json_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(place, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(place, "is not a JSON object", "write one JSON object a line")
    return row


def _table_rows(path: str, batches: Callable[[str], Iterator[Sequence[Row]]]) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for batch in batches(path):
            for row in batch:
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(path, f"cannot be read after row {number} ({error})", "check that the file is whole") from error


def _parquet_batches(path: str) -> Iterator[Sequence[Row]]:
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(1024):
            yield batch.to_pylist()


def _arrow_batches(path: str) -> Iterator[Sequence[Row]]:
    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            yield batch.to_pylist()
