"""The rows of what users bring: .jsonl, .jsonl.gz, .jsonl.zst, .json and .parquet files, folders of them, and data sets of the library
`datasets`, from a folder or from the hub.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
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

BATCH = 64  # rows of a table that are unpacked at a time
MAX_LINE = 16 * 2**20  # characters: a text is read no further, whatever a small file unpacks to

Row = dict[str, Any]


def read_rows(source: str, where: str, file: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yields the place of each row (`data.jsonl, line 3`), and the row.

    Args:
        source: a file of one of KINDS; or a folder of such files, or one that `save_to_disk` of `datasets` wrote, or a data set's
            name on the hub, each with an optional `:split`. Without one, `train` is read, or all where there is no `train`.
        where: the config field that names it.
        file: of a data set on the hub this one alone is fetched and read.

    Raises:
        UserError: the file is absent, of another kind, or broken; names the line.
    """
    if file is not None:
        found = _fetched(source, where, [file]) / file
        if not found.is_file():
            raise UserError(where, f"{source} has no file {file} any more", "name a file of your own")
        return _file_rows(str(found))
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
    return _folder_rows(_fetched(name, where, [f"*{kind}" for kind in (*KINDS, ARRAY)]), split or None, where)


def _fetched(name: str, where: str, files: list[str]) -> Path:
    """A data set of the hub, its files of known kinds only: no code of it is fetched, let alone run."""
    what = f"{name} is neither a file nor a folder nor a data set that the hub gives"
    return fetched(name, where, what, "correct the name", files, "dataset")


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


def _table_rows(path: str, batches: Callable[[str], Iterator[pyarrow.RecordBatch]]) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for batch in batches(path):
            for start in range(0, batch.num_rows, BATCH):
                for row in _plain_rows(batch.slice(start, BATCH), path, number):
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(path, f"cannot be read after row {number} ({error})", "check that the file is whole") from error


def _plain_rows(batch: pyarrow.RecordBatch, path: str, before: int) -> Iterator[Row]:
    """The rows of a batch, as long as none holds more than a line of text may: a small file unpacks to anything."""
    coded = [index for index, column in enumerate(batch.schema) if pyarrow.types.is_dictionary(column.type)]
    for index, column in enumerate(batch.schema):
        if _shares(column.type.value_type if index in coded else column.type):
            raise UserError(path, f"its column {column.name} is a {str(column.type)[:60]}", "write it as plain texts, or as .jsonl")
    if not coded and batch.nbytes <= MAX_LINE:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        for index in coded:
            row = row.set_column(index, batch.schema.field(index).name, row.column(index).dictionary_decode())
        if row.nbytes > MAX_LINE:
            raise UserError(f"{path}, row {before + number + 1}", f"has more than {MAX_LINE} bytes", "leave it out")
        yield row.to_pylist()[0]


def _shares(kind: pyarrow.DataType) -> bool:
    """Whether its values may share their bytes, which then do not bound what they unpack to."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _shares(kind.storage_type)
    types = pyarrow.types
    shared = types.is_dictionary, types.is_run_end_encoded, types.is_string_view, types.is_binary_view, types.is_list_view
    if any(each(kind) for each in (*shared, types.is_large_list_view)):
        return True
    return any(_shares(kind.field(index).type) for index in range(kind.num_fields))


def _parquet_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as table:
        yield from table.iter_batches(BATCH)


def _arrow_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
        yield from stream
