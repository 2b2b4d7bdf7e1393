"""A run: one config and the folder where all that it makes lives.

config.yaml  summary.json  summary.csv  teacher.sqlite  data/  student/  stages/<name>/{checkpoints/,metrics.jsonl}
tensorboard/  evaluation/  report/index.html  export/<stage>/  .lock  .seconds

With `run.bucket` the checkpoints lie in the bucket instead, and it holds a copy of all the rest.
"""

import fcntl
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TextIO

import jax
import yaml
from etils import epath

from gadjax.config import Config, dump_config, load_config, stage_of
from gadjax.errors import UserError
from gadjax.files import replace_file
from gadjax.mirror import CHECKPOINTS, CLOCK, TURN, Mirror, told_of
from gadjax.records import Prompt
from gadjax.sharding import wait_for_all
from gadjax.teachers.sources import load_prompts, load_tests, without
from gadjax.terminal import say

# What may change between two calls of the same run: where it lies, how the teacher is reached, how the work is laid out on
# devices, what is shown.
_MAY_CHANGE = (
    *(
        "run.folder",
        "run.name",
        "run.nonfinite",
        "run.wandb",
        "mesh",
        "rollout",
        "student.rematerialise",
        "evaluation.metrics",
        "evaluation.stages",
        "evaluation.export",
        "evaluation.best_of",
        "evaluation.discriminator",
        "evaluation.referee",
        "evaluation.judge",
    ),
    *(f"teacher.{name}" for name in ("base_url", "api_key_env", "concurrency", "max_cost", "price", "timeout", "tries", "retry_wait")),
    *("teacher.requests_per_minute", "teacher.tokens_per_minute", "teacher.batch"),
)

CONFIG = "config.yaml"
LOCK = ".lock"
FETCH_WITHIN = 3600.0  # seconds that a process waits for the others of its run, of which each fetches weights
POLL = 0.2  # seconds between two looks
TICK = 10.0  # seconds that a killed process loses of the clock, at most


class Clock:
    """The wall seconds that the commands of a run have taken, all calls together: kept in a file, to which every call adds its own."""

    def __init__(self, file: Path):
        self._file, self._started = file, time.monotonic()
        self._before = float(file.read_text()) if file.exists() else 0.0

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self._before + time.monotonic() - self._started

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Keeps the file up to date, so that a process that is killed has counted too."""
        self._keep()  # at once: a copy in a bucket counts only with its clock
        stop = threading.Event()
        thread = threading.Thread(target=self._tick, args=(stop,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self._keep()

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(TICK):
            self._keep()

    def _keep(self) -> None:
        with suppress(OSError), _alone_in(self._file.parent):  # a full disk is told by what matters more
            replace_file(self._file, f"{self.seconds:.1f}\n")


@dataclass(frozen=True)
class Run:
    """A run's config and folder."""

    config: Config
    folder: Path

    @classmethod
    def open(cls, file: Path, overrides: list[str]) -> "Run":
        """Reads the config; writes nothing.

        Raises:
            UserError: the config is at fault, or the run's folder was made with another one.
        """
        config = load_config(file, overrides)
        run = cls(config, config.run.path)
        run._check_unchanged()
        return run

    @classmethod
    def at(cls, folder: Path, overrides: Sequence[str] = ()) -> "Run":
        """The run that lies in a folder, wherever it was made.

        Raises:
            UserError: there is none, or an override is at fault.
        """
        if not (folder / CONFIG).is_file():
            raise UserError(str(folder), "is no run", "`gadjax run` makes one; name its folder, as in runs/quickstart")
        return cls(load_config(folder / CONFIG, list(overrides)), folder)

    def fetch(self) -> None:
        """Brings the folder up to its copy in the bucket, where the run was taken further by another machine.

        All processes of a run do so, each for its own folder or, where they share one, one after the other.

        Raises:
            UserError: the bucket cannot be read, or a process that is none of this run's is using the folder.
        """
        if self._mirror is not None:
            with _told_of(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with self._in_turn(), self.locked():
                if self._mirror.fetch():
                    say(f"bucket: {self.folder} was fetched from {self.config.run.bucket}")
        wait_for_all()  # else the first begins, and keeps a shared folder for itself, before the last has looked there

    def push(self) -> None:
        """Sends what is new in the folder to the bucket; the first process does so for all."""
        if self._mirror is not None and jax.process_index() == 0:
            self._mirror.push()

    @classmethod
    def find(cls, place: str) -> "tuple[Run, str]":
        """The run and the name of the stage that `RUN/STAGE` means; `RUN` means the last stage, `RUN/STAGE@50` its step 50.

        Raises:
            UserError: there is no such run or stage, or the stage has no checkpoint.
        """
        folder, name = Path(place).expanduser(), None
        if not (folder / CONFIG).is_file():
            folder, name = folder.parent, folder.name
        if not (folder / CONFIG).is_file():
            raise UserError(place, "is no run", "`gadjax run` makes one; name its folder or a stage of it, as in runs/quickstart/gad")
        run = cls.at(folder)
        names = list(run.config.stages)
        if name is not None and not (stage_of(name) in names and re.fullmatch(r"[^@]+(@[1-9][0-9]{0,8})?", name)):
            raise UserError(place, f"the run has no stage {name}", f"use one of {', '.join(names)}")
        if not run.begun(stage_of(name or names[-1])):
            raise UserError(place, "is not trained yet", "run `gadjax train` with its config first")
        return run, name or names[-1]

    @contextmanager
    def begin(self, alone: bool = True) -> Iterator[Clock]:
        """Makes the folder, where there is none, writes the config into it, and keeps it for this process alone, or for collectors only.

        Raises:
            UserError: the folder cannot be written to, another process is using it, or did so with another config since `open`, or
                the bucket cannot be written to.
        """
        with _told_of(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked(alone):
            self._check_unchanged()
            if self._mirror is not None:  # before the teacher is asked, whose answers cost money
                self._mirror.check()
            with _told_of(self.folder), _alone_in(self.folder):
                replace_file(self.folder / CONFIG, dump_config(self.config))
            with Clock(self.folder / CLOCK).running() as clock:
                yield clock

    @contextmanager
    def locked(self, alone: bool = True) -> Iterator[None]:
        """Keeps other processes from writing into the folder; the system ends it with the process, however that ends.

        Several that do not need to be alone, which write into the teacher's cache only, may be there together.

        Raises:
            UserError: another process keeps it, or the folder cannot be written to.
        """
        with ExitStack() as stack:
            with _told_of(self.folder):
                lock = stack.enter_context((self.folder / LOCK).open("a"))
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            yield

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Of several processes of one run that share the folder, one after the other; one that is alone waits for nobody.

        It is not `locked` that is waited for: who keeps that may be another run, which takes days.
        """
        with ExitStack() as stack:
            if jax.distributed.is_initialized():
                with _told_of(self.folder):
                    turn = stack.enter_context((self.folder / TURN).open("a"))
                    _wait_for(turn, FETCH_WITHIN)
            yield

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts by their split: `train`, `validation`, and the test sets. No training prompt is in another split."""
        train, validation = load_prompts(self.config.prompts, self.config.teacher, self.config.run.seed, self.cache)
        tests = load_tests(self.config.prompts)
        kept = without(train, itertools.chain(*tests.values()))
        if len(kept) < len(train):
            say(f"prompts: {len(train) - len(kept)} training prompts are left out: they are in a test set, too")
        return {"train": kept, "validation": validation, **tests}

    @property
    def cache(self) -> Path:
        """The teacher's answers."""
        return self.folder / "teacher.sqlite"

    @property
    def data(self) -> Path:
        """The frozen data."""
        return self.folder / "data"

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.folder / "stages" / name

    def checkpoints(self, name: str) -> epath.Path:
        """A stage's checkpoints, also by the name of one of its steps."""
        return self._root / "stages" / stage_of(name) / CHECKPOINTS

    def begun(self, name: str = "*") -> bool:
        """Whether a stage (by default any) has a checkpoint."""
        with told_of(str(self._root)) if self.config.run.bucket else nullcontext():
            return any(step.name.isdigit() for step in self._root.glob(f"stages/{name}/{CHECKPOINTS}/*"))

    @property
    def _root(self) -> epath.Path:
        """Below it are the checkpoints: the copy in the bucket, where there is one, else the folder."""
        bucket = self.config.run.bucket
        if not bucket:
            return epath.Path(self.folder)
        try:
            return epath.Path(bucket).expanduser() / self.config.run.name
        except KeyError as error:  # of Orbax's paths, which know fewer schemes than the mirror's
            raise UserError(
                "run.bucket", f"{bucket} cannot be used (unknown scheme {error})", "name gs://bucket/folder or a folder"
            ) from error

    @cached_property
    def _mirror(self) -> Mirror | None:
        return Mirror(self.folder, str(self._root)) if self.config.run.bucket else None

    def _check_unchanged(self) -> None:
        """Refuses to go on with stages that began with another config.

        Before the first checkpoint everything may change, and so may stages that have none yet: answers of the teacher know
        their question, and data is made anew. A field that came later than the run has its default there.
        """
        kept = self.folder / CONFIG
        if not kept.exists() or not self.begun():
            return
        before, now = (yaml.safe_load(dump_config(config)) for config in (load_config(kept, []), self.config))
        waiting = {name for name in before["stages"] | now["stages"] if not self.begun(name)}
        refuse_changes(before, now, self.folder, tuple(f"stages.{name}" for name in waiting))


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: PurePath, free: tuple[str, ...] = ()) -> None:
    """Refuses another config, or other sections of one, than `where` was made with, but for fields that touch no results.

    Args:
        before: the config that it was made with.
        now: the one there is now.
        where: what was made.
        free: further fields that may change.

    Raises:
        UserError: names the field.
    """
    for field, old, new in _differences("", before, now):
        known = re.sub(r"^teachers\.[^.]+\.", "teacher.", field)
        if not any(f"{known}.".startswith(f"{name}.") for name in (*_MAY_CHANGE, *free)):
            what = f"was made with {field} = {old!r}, the config says {new!r}"
            raise UserError(str(where), what, "undo the change or choose another run.name")


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """What the system refuses, as the user's mistake."""
    try:
        yield
    except BlockingIOError as error:
        raise UserError(str(folder), "another gadjax process is using it", "wait until it has ended, or choose another run.name") from error
    except OSError as error:
        raise UserError("run.folder", f"{folder} cannot be written to ({error.strerror})", "choose another folder") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """For a moment: of several processes one after the other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _wait_for(file: TextIO, seconds: float) -> None:
    """Locks an open file, as soon as nobody else does.

    Raises:
        BlockingIOError: somebody does for longer.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(POLL)


def _differences(field: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    """The fields in which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{field}.{key}" if field else str(key), old.get(key), new.get(key))
    elif old != new:
        yield field, old, new
