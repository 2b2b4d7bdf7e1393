"""Seals: the SHA-256 of every file of a folder, kept in the folder itself, so that a changed bit is found before it is used.

Several processes may have written the folder. Each seals the files of its own, in `sha256-<index>-of-<count>.json`; all of these
together are the seal. It says which place the folder is for, so that folders that were swapped are found too, and holds its own SHA-256.
An object store keeps a checksum of every object, which is taken instead: nothing is read back for it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath
from fsspec.core import url_to_fs

from gadjax.files import flush, replace_file

OWN = "sha256"  # where a manifest holds its own hash
_SEAL = re.compile(r"sha256-(\d{1,5})-of-(\d{1,5})\.json")
_SEAL_BEGUN = re.compile(rf"\.?{_SEAL.pattern}(\.partial)?")  # and what another process is about to rename to it
_WRITER = re.compile(r"process_(\d+)(/|$)")  # Orbax names files and folders after the process that writes them


def guarded(manifest: Mapping[str, Any]) -> str:
    """A manifest as JSON, with its own hash in it."""
    return json.dumps({**manifest, OWN: _own(manifest)}, indent=1)


def read_guarded(text: str | bytes) -> dict[str, Any]:
    """The manifest in a text of `guarded`.

    Raises:
        ValueError: the text was changed.
    """
    try:
        manifest = json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested without end") from error
    if not isinstance(manifest, dict):
        raise ValueError("is no manifest")
    manifest.pop(OWN, None)
    if guarded(manifest) != (text if isinstance(text, str) else text.decode()):
        raise ValueError("is not what was written")
    return manifest


def seal(folder: epath.Path, place: str, index: int = 0, count: int = 1) -> None:
    """Seals what process `index` of `count` has written to the folder, which from then on stays as it is.

    Args:
        folder: whole and in its place.
        place: names what the folder is for.
        index: of this process; the first one seals all files that have no other process in their name.
        count: how many there are.
    """
    own = {name: read for name, read in _digests(folder).items() if _writer(name, count) == index and not _SEAL_BEGUN.fullmatch(name)}
    digests = {name: read() for name, read in own.items()}
    target, text = folder / _name(index, count), guarded({"place": place, "files": digests})
    if is_remote(folder):
        target.write_text(text)
        return
    for name in digests:
        flush(Path(folder / name))
    replace_file(Path(target), text)


def is_sealed(folder: epath.Path) -> bool:
    """Whether all seals of a folder are there; what they say is not looked at."""
    found = {path.name for path in folder.glob("sha256-*.json") if _SEAL.fullmatch(path.name)}
    return bool(found) and _expected(found) <= found


def identity(folder: epath.Path) -> str | None:
    """What names the content of a sealed folder: the SHA-256 of its seals; None where it is not sealed."""
    if not is_sealed(folder):
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("sha256-*.json")))).hexdigest()


def damage(folder: epath.Path, place: str, index: int = 0, count: int = 1) -> Iterator[tuple[str, str]]:
    """What is wrong with a folder: files, and what has happened to them. Nothing, where it is as it was sealed.

    Several processes look through it together: each reads its share of the files.
    """
    found = _digests(folder)
    expected: dict[str, str] = {}
    sealed = {name for name in found if _SEAL.fullmatch(name)}
    if not is_sealed(folder):
        yield from ((name, "is missing") for name in sorted(_expected(sealed or {_name(0, 1)}) - sealed))
        return
    for name in sorted(sealed):
        try:
            manifest = read_guarded((folder / name).read_bytes())
            if manifest["place"] != place:
                yield name, f"belongs to {manifest['place']}"
            expected |= manifest["files"]
        except (ValueError, KeyError, TypeError) as error:
            yield name, f"was changed after it was written ({error})"
            return
    for name in sorted(expected.keys() | found.keys() - sealed):
        if name not in found:
            yield name, "is missing"
        elif name not in expected:
            yield name, "was added after it was written"
    for name in sorted(expected.keys() & found.keys())[index::count]:
        if found[name]() != expected[name]:
            yield name, "was changed after it was written"


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in an object store."""
    return "://" in str(path)


def _name(index: int, count: int) -> str:
    return f"sha256-{index}-of-{count}.json"


def _expected(seals: set[str]) -> set[str]:
    """The names of all seals, as those that were found say."""
    counts = {int(match[2]) for name in seals if (match := _SEAL.fullmatch(name))}
    return {_name(index, count) for count in counts for index in range(count)}


def _own(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _writer(name: str, count: int) -> int:
    """The process that wrote a file."""
    match = _WRITER.search(name)
    return int(match[1]) if match and int(match[1]) < count else 0


def _digests(folder: epath.Path) -> dict[str, Callable[[], str]]:
    """For every file below a folder what gives its SHA-256, or the checksum that the store keeps of it."""
    files, root = url_to_fs(str(folder))
    found: dict[str, dict[str, Any]] = files.find(root, detail=True)
    names = {path: str(PurePosixPath(path).relative_to(root)) for path in sorted(found)}
    return {name: partial(_digest, path, found[path].get("crc32c")) for path, name in names.items()}


def _digest(path: str, kept: str | None) -> str:
    if kept:
        return kept
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
