"""A run's folder mirrored in a bucket, so that a machine that is taken away takes nothing with it.

The bucket holds the folder as it is, file by file, under the run's name. Checkpoints are written there directly and are no
part of the mirror. One machine at a time works on a run; which of two copies is further, the run's clock tells.
"""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from gadjax.errors import Passing, UserError, first_line, no_room

CLOCK = ".seconds"  # how far a copy is; written last, so that a copy that has it is whole
CHECKPOINTS = "checkpoints"
TURN = ".turn"  # what processes that share a folder lock while they fetch
CACHE = "teacher.sqlite"
EXPORT = "export"
WEIGHTS = "weights"  # of models that the run starts from: nobody changes them
SKEW = 60.0  # seconds by which the clocks of machines and bucket may differ
SAME = 0.001  # seconds that the time of a file may lose where it is kept
# What the packages that reach a bucket raise is theirs, and often a plain `Exception`; they need not be installed.
PACKAGES = ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")

Stat = tuple[int, float]  # bytes and time of a file


class Mirror:
    """The copy of a run's folder in a bucket.

    Args:
        folder: the run's.
        url: of the copy: `gs://bucket/runs/name`, or a folder.
    """

    def __init__(self, folder: Path, url: str):
        self._folder, self._url = folder, url
        with told_of(url):
            self._files, self._root = url_to_fs(url)

    def check(self) -> None:
        """Writes a small file to the bucket and deletes it: before there is anything that would be lost.

        Raises:
            UserError: the bucket cannot be written to; a `Passing` where it may be later.
        """
        probe = self._at(f".{uuid.uuid4().hex}.partial")  # a name that is no other machine's, and of no copy
        with told_of(self._url):
            self._make_folder_of(probe)
            self._files.pipe_file(probe, b"gadjax")
            self._files.rm_file(probe)

    def fetch(self) -> bool:
        """Brings the folder up to the copy, where the copy is further; says whether it was. Exports stay in the bucket.

        Weights that were fetched before, and are still the same here and there, are not fetched again.

        Raises:
            UserError: the bucket cannot be read; a `Passing` where it may be later.
        """
        with told_of(self._url):
            there = self._there()
            if CLOCK not in there:
                return False
            further = float(self._files.cat_file(self._at(CLOCK)))
        clock = self._folder / CLOCK
        if clock.exists() and float(clock.read_text()) >= further:
            return False
        for name, stat_there in _clock_last(there):
            target = self._folder / name
            if name.startswith(f"{EXPORT}/") or (name == CACHE and target.exists()):  # answers that are here may be newer, and cost money
                continue
            if not (name.startswith(f"{WEIGHTS}/") and _is_same(target, stat_there)):
                self._fetch(name, target, stat_there[1])
        return True

    def push(self) -> None:
        """Sends what is new in the folder; what another machine has written since is left as it is.

        Raises:
            UserError: the bucket cannot be written to; a `Passing` where it may be later.
        """
        with told_of(self._url):
            there = self._there()
            for name, (size, seconds) in _clock_last(self._here()):
                size_there, seconds_there = there.get(name, (-1, 0.0))
                if seconds > seconds_there or (size != size_there and seconds > seconds_there - SKEW):
                    self._send(name)

    def _fetch(self, name: str, target: Path, seconds: float) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.partial")
        with told_of(self._url):
            self._files.get_file(self._at(name), str(beside))
        os.utime(beside, (seconds, seconds))  # else it would be sent back
        beside.replace(target)

    def _send(self, name: str) -> None:
        """Sends a file, unless it has vanished meanwhile."""
        file = self._folder / name
        self._make_folder_of(self._at(name))
        try:
            self._files.put_file(str(file), self._at(name))
        except FileNotFoundError:
            if file.exists():
                raise

    def _make_folder_of(self, path: str) -> None:
        self._files.makedirs(self._files._parent(path), exist_ok=True)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _here(self) -> dict[str, Stat]:
        """Every file of the folder that is part of the copy. Other threads write there: what vanishes meanwhile is none."""
        found: dict[str, Stat] = {}
        for folder, _, names in os.walk(self._folder):
            for path in (Path(folder) / name for name in names):
                name = path.relative_to(self._folder).as_posix()
                with suppress(FileNotFoundError):
                    told = path.stat()
                    if _is_mirrored(name) and stat.S_ISREG(told.st_mode):
                        found[name] = (told.st_size, told.st_mtime)
        return found

    def _there(self) -> dict[str, Stat]:
        """Every file of the copy."""
        found: dict[str, dict[str, Any]] = self._files.find(self._root, detail=True)
        names = {path: PurePosixPath(path).relative_to(self._root).as_posix() for path in found}
        return {name: (found[path]["size"], _seconds(found[path])) for path, name in names.items() if _is_mirrored(name)}


def _is_mirrored(name: str) -> bool:
    """Whether a file is part of the copy: no checkpoint, lock, or file that is being written."""
    path = PurePosixPath(name)
    return CHECKPOINTS not in path.parts and path.name not in (".lock", TURN) and not path.name.endswith((".partial", "-wal", "-shm"))


def _is_same(file: Path, there: Stat) -> bool:
    """Whether a file is as it was fetched, which gave it the time that it has in the bucket."""
    try:
        here = file.stat()
    except OSError:
        return False
    return here.st_size == there[0] and abs(here.st_mtime - there[1]) < SAME


def _clock_last(files: dict[str, Stat]) -> list[tuple[str, Stat]]:
    return sorted(files.items(), key=lambda item: (item[0] == CLOCK, item[0]))


def _seconds(info: dict[str, Any]) -> float:
    """When a file was written; stores tell it as a number or as a date."""
    when = info["mtime"]
    return when.timestamp() if isinstance(when, datetime) else float(when)


@contextmanager
def told_of(url: str) -> Iterator[None]:
    """What only the user can mend in a bucket, as the user's mistake; that it does not answer, as what may pass."""
    try:
        yield
    except ImportError as error:
        raise UserError("run.bucket", f"{url} needs a package ({error})", "pip install 'gadjax[bucket]'") from error
    except Exception as error:
        if isinstance(error, UserError) or not _is_of_bucket(error):
            raise
        why = first_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
        if _is_mistake(error):
            raise UserError("run.bucket", f"{url} cannot be used ({why})", "name a bucket that is there and may be written to") from error
        raise Passing("run.bucket", f"{url} does not answer ({why})", "start the same command again") from error


def _is_of_bucket(error: Exception) -> bool:
    """Whether an error is what a bucket gives. A full disk is told elsewhere, and the rest are faults of ours."""
    if isinstance(error, OSError):
        return error.errno == errno.EROFS or not no_room(error)
    return isinstance(error, ValueError) or type(error).__module__.split(".")[0] in PACKAGES


def _is_mistake(error: Exception) -> bool:
    """Whether trying again is of no use: there is no such place, or no right to it.

    gcsfs raises a plain `OSError` for status 403, and for others an error that has it as its `code`.
    """
    if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError)):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
        return True
    if str(getattr(error, "code", "")) in ("400", "401", "403", "404"):
        return True
    refused = type(error).__name__ in ("DefaultCredentialsError", "RefreshError") and not getattr(error, "retryable", False)
    return refused or str(error).startswith("Forbidden")
