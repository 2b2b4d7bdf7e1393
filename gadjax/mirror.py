"""A run's folder mirrored in a bucket, so that a machine that is taken away takes nothing with it.

The bucket holds the folder as it is, file by file, under the run's name. Checkpoints are written there directly and are no
part of the mirror. One machine at a time works on a run; which of two copies is further, the run's clock tells.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from gadjax.errors import UserError

CLOCK = ".seconds"  # how far a copy is; written last, so that a copy that has it is whole
CHECKPOINTS = "checkpoints"
CACHE = "teacher.sqlite"
EXPORT = "export"
SKEW = 60.0  # seconds by which the clocks of machines and bucket may differ

Stat = tuple[int, float]  # bytes and time of a file


class Mirror:
    """The copy of a run's folder in a bucket.

    Args:
        folder: the run's.
        url: of the copy: `gs://bucket/runs/name`, or a folder.
    """

    def __init__(self, folder: Path, url: str):
        self._folder, self._url = folder, url
        with _told_of(url):
            self._files, self._root = url_to_fs(url)

    def fetch(self) -> bool:
        """Brings the folder up to the copy, where the copy is further; says whether it was. Exports stay in the bucket.

        Raises:
            UserError: the bucket cannot be read.
        """
        with _told_of(self._url):
            there = self._there()
        if CLOCK not in there:
            return False
        clock = self._folder / CLOCK
        if clock.exists() and float(clock.read_text()) >= float(self._files.cat_file(self._at(CLOCK))):
            return False
        for name, (_, seconds) in _clock_last(there):
            target = self._folder / name
            if name.startswith(f"{EXPORT}/") or (name == CACHE and target.exists()):  # answers that are here may be newer, and cost money
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.partial")
            self._files.get_file(self._at(name), str(beside))
            os.utime(beside, (seconds, seconds))  # else it would be sent back
            beside.replace(target)
        return True

    def push(self) -> None:
        """Sends what is new in the folder; what another machine has written since is left as it is."""
        there = self._there()
        here = {
            path.relative_to(self._folder).as_posix(): (path.stat().st_size, path.stat().st_mtime)
            for path in self._folder.rglob("*")
            if path.is_file()
        }
        for name, (size, seconds) in _clock_last(here):
            size_there, seconds_there = there.get(name, (-1, 0.0))
            is_new = seconds > seconds_there or (size != size_there and seconds > seconds_there - SKEW)
            if _is_mirrored(name) and is_new:
                self._files.makedirs(self._files._parent(self._at(name)), exist_ok=True)
                self._files.put_file(str(self._folder / name), self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _there(self) -> dict[str, Stat]:
        """Every file of the copy."""
        found: dict[str, dict[str, Any]] = self._files.find(self._root, detail=True)
        names = {path: PurePosixPath(path).relative_to(self._root).as_posix() for path in found}
        return {name: (found[path]["size"], _seconds(found[path])) for path, name in names.items() if _is_mirrored(name)}


def _is_mirrored(name: str) -> bool:
    """Whether a file is part of the copy: no checkpoint, lock, or file that is being written."""
    path = PurePosixPath(name)
    return CHECKPOINTS not in path.parts and path.name != ".lock" and not path.name.endswith((".partial", "-wal", "-shm"))


def _clock_last(files: dict[str, Stat]) -> list[tuple[str, Stat]]:
    return sorted(files.items(), key=lambda item: (item[0] == CLOCK, item[0]))


def _seconds(info: dict[str, Any]) -> float:
    """When a file was written; stores tell it as a number or as a date."""
    when = info["mtime"]
    return when.timestamp() if isinstance(when, datetime) else float(when)


@contextmanager
def _told_of(url: str) -> Iterator[None]:
    """What only the user can mend, as the user's mistake; a bucket that does not answer is none."""
    try:
        yield
    except ImportError as error:
        raise UserError("run.bucket", f"{url} needs a package ({error})", "pip install 'gadjax[bucket]'") from error
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise UserError("run.bucket", f"{url} cannot be used ({error})", "name a bucket that is there and may be written to") from error
