"""The frozen data of a run: token groups with the texts they come from, as a TFDS data set in ArrayRecord files.

    data/manifest.json                 SHA-256 and size of every other file, the examples' digest, their origin's fingerprint, its own hash
    data/dataset_info.json, features.json, groups-train.array_record-00000, ...     as TFDS writes them

A snapshot is whole or absent: it is written in a folder beside, the manifest last, and renamed. It is read by index in
any order, and only after every file was found unchanged.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds

from gadjax.errors import UserError
from gadjax.files import flush, replace_file
from gadjax.records import Answer, Prompt, TokenGroup
from gadjax.seals import guarded, read_guarded

MANIFEST = "manifest.json"
GROUPS_PER_FILE = 20_000  # about 200 MB a file with answers of 1,000 tokens

_FEATURES = {
    "id": tfds.features.Text(),
    "messages": tfds.features.Text(),  # as JSON
    "answer": tfds.features.Text(),
    "truncated": np.bool_,
    "prompt": tfds.features.Tensor(shape=(None,), dtype=np.int32),
    "teacher": tfds.features.Tensor(shape=(None,), dtype=np.int32),
}


@dataclass(frozen=True)
class Example:
    """One row of a snapshot: a prompt, the teacher's answer to it, and the token ids of both."""

    prompt: Prompt
    answer: Answer
    tokens: TokenGroup


class Split:
    """One split of a snapshot: its examples by index, in the order in which they were frozen."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return _example(self._records[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot.

    Attributes:
        splits: the groups by the name of their split, `train` and `validation`.
        fingerprint: what `freeze` was told about the data's origin.
        digest: SHA-256 of all examples: it names this content, and is the same for the same content, whichever process froze it.
    """

    splits: Mapping[str, Split]
    fingerprint: Mapping[str, str]
    digest: str

    @property
    def train(self) -> Split:
        """The split that is trained on."""
        return self.splits["train"]

    @property
    def validation(self) -> Split:
        """The split that is held out."""
        return self.splits["validation"]

    @classmethod
    def open(cls, folder: Path) -> "Snapshot":
        """Reads every file once to verify it (about a second per GB).

        Raises:
            UserError: there is no snapshot, or a file is missing or changed.
        """
        manifest = _manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise UserError(str(path), "the file is missing", _FREEZE_AGAIN)
            if _sha256(path) != expected["sha256"]:
                raise UserError(str(path), "the file was changed after it was written", _FREEZE_AGAIN)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.relative_to(folder).as_posix() not in {MANIFEST, *manifest["files"]}:
                raise UserError(str(path), "the file was added after the others were written", "move it away")
        sources: Any = tfds.builder_from_directory(str(folder)).as_data_source()  # a dict, by split
        return cls({name: Split(source) for name, source in sources.items()}, manifest["fingerprint"], manifest["digest"])

    def check_origin(self, digest: str, where: PurePath) -> None:
        """Refuses to go on with what was made on the data of another digest.

        Raises:
            UserError: names `where` it lies.
        """
        if digest != self.digest:
            raise UserError(str(where), "was trained on other data than the run has now", "delete it, or bring its data/ back")


_FREEZE_AGAIN = "delete this folder and run `gadjax prepare` again"


def freeze(folder: Path, splits: Mapping[str, Iterable[Example]], fingerprint: Mapping[str, str]) -> None:
    """Writes a snapshot to `folder`; a snapshot that is there already is replaced.

    The examples are streamed: an iterator is enough, and only a file's buffer is held in memory.

    Args:
        folder: where; the last part of the path is created.
        splits: the examples of each split, in the order in which they are kept; none empty.
        fingerprint: names and hashes of all that the tokens depend on: tokenizer, template, length limits, teacher's text.

    Raises:
        UserError: a split is empty, or `folder` holds something that is no snapshot.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise UserError(str(folder), "holds files that are not a data snapshot", "move them away or choose another `run.name`")
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # what an interrupted freeze left
    beside.mkdir(parents=True)
    try:
        digest = _write(beside, splits)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    paths = sorted(beside.iterdir())
    for path in paths:
        flush(path)
    files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in paths}
    replace_file(beside / MANIFEST, guarded({"files": files, "fingerprint": dict(fingerprint), "digest": digest}))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    flush(folder.parent)


def _write(folder: Path, splits: Mapping[str, Iterable[Example]]) -> str:
    """Writes the TFDS files and returns the examples' digest.

    `SequentialWriter` streams in order, without the usual builder's shuffling and console output.
    """
    identity = tfds.core.DatasetIdentity(name="groups", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Prompts, the teacher's answers and the token ids of both.",
        features=tfds.features.FeaturesDict(_FEATURES),
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=GROUPS_PER_FILE, file_format="array_record")
    writer.initialize_splits(list(splits))
    digest = hashlib.sha256()
    for name, examples in splits.items():
        rows: Any = _rows(name, examples, digest.update)  # declared as a list, but only iterated over
        writer.add_examples({name: rows})
    writer.close_all()
    return digest.hexdigest()


def _rows(split: str, examples: Iterable[Example], update: Callable[[bytes], object]) -> Iterator[dict[str, Any]]:
    """The examples as TFDS wants them; `update` gets the bytes of each. (Those of the files differ from process to process.)"""
    empty = True
    for example in examples:
        empty = False
        row: dict[str, Any] = {
            "id": example.prompt.id,
            "messages": json.dumps(example.prompt.messages),
            "answer": example.answer.text,
            "truncated": example.answer.truncated,
            "prompt": np.array(example.tokens.prompt, np.int32),
            "teacher": np.array(example.tokens.teacher, np.int32),
        }
        texts = [split, *(row[name] for name in ("id", "messages", "answer", "truncated")), len(row["prompt"]), len(row["teacher"])]
        update(json.dumps(texts).encode() + row["prompt"].tobytes() + row["teacher"].tobytes())
        yield row
    if empty:
        raise UserError(f"prompts.{split}", "no prompt has an answer of the teacher", "add prompts, or see what `gadjax collect` refused")


def _example(row: Mapping[str, Any]) -> Example:
    name = row["id"].decode()
    return Example(
        Prompt(name, tuple(json.loads(row["messages"]))),
        Answer(name, row["answer"].decode(), bool(row["truncated"])),
        TokenGroup(name, tuple(row["prompt"].tolist()), tuple(row["teacher"].tolist())),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(str(path), "is missing, so there is no data snapshot", "run `gadjax prepare`")
    try:
        manifest = read_guarded(path.read_bytes())
    except ValueError:
        manifest = None
    match manifest:
        case {"files": dict(files), "fingerprint": dict(), "digest": str()} if files and all(map(_is_file, files.items())):
            return manifest
    raise UserError(str(path), "the file was changed after it was written", _FREEZE_AGAIN)


def _is_file(entry: tuple[str, Any]) -> bool:
    """Whether an entry of a manifest tells of a file in its folder, and nowhere else."""
    match entry:
        case (name, {"sha256": str()}):
            return PurePath(name).name == name and name not in ("", ".", "..", MANIFEST)
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
