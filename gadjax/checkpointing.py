"""Checkpoints of a stage: all of the state in one Orbax transaction, sealed.

Each holds the student with its optimizer, the discriminator with its own where the stage has one, and on the host side a JSON object:
the random key, the state of the data iterator and of the balance, and what the stage was trained with (`gadjax.train`). Writing goes on
in the background while training continues.

Orbax does not see that a bit of an array has flipped on the disk. So every checkpoint is sealed (`gadjax.seals`) as soon as it is
committed, in the background too, by each process for the files that it wrote; what is not sealed was never there, and what is restored
is compared with its seal first. A checkpoint that is not as it was sealed is set aside and the one before is used.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from gadjax.errors import Passing, UserError
from gadjax.restoring import restored
from gadjax.seals import damage, identity, is_remote, is_sealed, seal
from gadjax.sharding import by_first, is_first, least, wait_for_all
from gadjax.terminal import say
from gadjax.types import Role, TrainState

KEEP = 2  # of the newest ones, at least; the one before the last serves where the last is damaged
UNSEALED = "unsealed"  # a file that names the step that is being written
HOST = "host"


class Checkpoints:
    """The checkpoints of one stage, in `folder`/<step>. Use as a context manager: leaving waits for what is being written.

    Args:
        folder: of the stage, or `gs://...`.
        read_only: another process may be writing there.
        keep: how many of the newest ones are kept; None: all.

    Attributes:
        best: a step that is kept all the same.
    """

    def __init__(self, folder: epath.PathLike, *, read_only: bool = False, keep: int | None = KEEP):
        self.best = 0
        self._folder = epath.Path(folder) if is_remote(folder) else epath.Path(folder).absolute()
        self._read_only, self._keep = read_only, keep
        self._verified: set[int] = set()
        self._sealing: _Sealing | None = None
        self._failed = False
        if not read_only:
            self._clear_unsealed()
        self._manager = self._opened(clear=not read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or jax.process_count() == 1:
                self.wait()
            elif self._sealing is not None:  # without a word from the other processes, which may be elsewhere
                self._sealing.thread.join()
        except UserError:
            if kind is None:  # else what came first is told
                raise
        finally:
            with suppress(Exception):  # what failed is told already
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest sealed checkpoint's step: the number of steps that it has behind it."""
        return max(self.steps, default=None)

    def whole(self) -> int | None:
        """The newest checkpoint that is as it was sealed, or None where there is none at all; damaged ones are set aside, loudly.

        All processes read for this, each its share.

        Raises:
            UserError: all are damaged.
        """
        steps, told = sorted(self._manager.all_steps(), reverse=True), list[str]()
        for step in steps:
            wrong = self._damage(step)
            if wrong is None:
                self._set_aside(steps[: steps.index(step)], told)
                return step
            told.append(" ".join(wrong))
        if told:
            mend = "bring it back, or delete the folder to begin the stage anew"
            raise UserError(str(self._folder), f"no checkpoint is whole ({'; '.join(told)})", mend)
        return None

    @property
    def steps(self) -> list[int]:
        """The steps of all sealed checkpoints, in their order."""
        return sorted(step for step in self._manager.all_steps() if is_sealed(self._folder / str(step)))

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Begins to write the state after `step` steps; waits for an earlier write first.

        A write that fails in the background is told, and this one takes its place; a second one in a row ends the run.

        Raises:
            UserError: it cannot be written; a `Passing` where the folder is in an object store.
        """
        try:
            self.wait()
        except UserError as error:
            if self._failed:
                raise
            self._failed = True
            say(f"WARNING: {error}; the run goes on, and the checkpoint after step {step} is tried")
        items = {name: ocp.args.StandardSave(role) for name, role in state._asdict().items() if role is not None}
        try:
            by_first(partial((self._folder / UNSEALED).write_text, str(step)))
            self._manager.save(step, args=ocp.args.Composite(**items, **{HOST: ocp.args.JsonSave(host)}))
        except Exception as error:
            if jax.process_count() == 1:  # several end with this one, and the next start clears what they leave
                self._rebuild()
            raise self._not_written(error) from error
        self._sealing = _Sealing(self._manager, self._folder, step)

    def wait(self) -> None:
        """Waits until what is being written is sealed, by all processes.

        Raises:
            UserError: one of them cannot write its part; a `Passing` where the folder is in an object store.
        """
        sealing, self._sealing = self._sealing, None
        if sealing is None:
            return
        sealing.thread.join()
        failed = least(jax.process_index() if sealing.error else jax.process_count())
        if failed < jax.process_count():
            self._rebuild()
            raise self._not_written(sealing.error or OSError(f"by process {failed}")) from sealing.error
        if is_first():
            with suppress(Exception):  # the next start clears it
                (self._folder / UNSEALED).unlink()
        self._failed = False

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state after `step` steps, laid out as the shardings in `abstract` say.

        Raises:
            UserError: a file of it is not what was written.
        """
        student = self.restore_role(step, "student", abstract.student)
        discriminator = None if abstract.discriminator is None else self.restore_role(step, "discriminator", abstract.discriminator)
        return TrainState(student, discriminator), self.restore_host(step)

    def restore_host(self, step: int) -> dict[str, Any]:
        """What the host kept beside the models."""
        self._check(step)
        return self._manager.restore(step, args=ocp.args.Composite(**{HOST: ocp.args.JsonRestore()}))[HOST]

    def restore_role(self, step: int, name: str, abstract: Role) -> Role:
        """One model with its optimizer: `student` or `discriminator`."""
        self._check(step)
        return restored(self._folder / str(step) / name, abstract)

    def _check(self, step: int) -> None:
        if wrong := self._damage(step):
            raise UserError(*wrong, "run `gadjax train` again: the stage goes on from the checkpoint before")

    def _damage(self, step: int) -> tuple[str, str] | None:
        """The first file of a checkpoint with which something is wrong, and what."""
        if step in self._verified:
            return None
        folder = self._folder / str(step)
        wrong = next(damage(folder, _place(folder), jax.process_index(), jax.process_count()), None)
        if least(0 if wrong else 1) == 1:
            self._verified.add(step)
            return None
        return (f"{folder}/{wrong[0]}", wrong[1]) if wrong else (str(folder), "is damaged, as another process has found")

    def _set_aside(self, steps: list[int], told: list[str]) -> None:
        """Gives damaged checkpoints another name, in which nothing takes them for checkpoints."""
        if not steps or self._read_only:
            return
        if is_first():
            for step, wrong in zip(steps, told, strict=True):
                number = sum(1 for _ in self._folder.glob(f"{step}.damaged*"))
                aside = self._folder / f"{step}.damaged-{number + 1}"
                (self._folder / str(step)).rename(aside)
                say(f"WARNING: {wrong}; it is set aside as {aside.name}, and the checkpoint before it is used")
        wait_for_all()
        self._rebuild()

    def _opened(self, clear: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), _Best(self)]),
            create=not self._read_only,
            cleanup_tmp_directories=clear,  # of a process that was killed
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _rebuild(self) -> None:
        """A manager that knows what lies in the folder now: after a failure the old one counts what is not there."""
        with suppress(Exception):  # the failure, which is told already
            self._manager.close()
        self._clear_unsealed()
        self._manager = self._opened(clear=False)  # threads of a write that has failed may still be at work there

    def _clear_unsealed(self) -> None:
        """Removes what a process that was killed had written and not sealed; all processes wait for that."""
        mark = self._folder / UNSEALED
        if is_first() and mark.exists():
            left = self._folder / mark.read_text()
            if left.name.isdigit() and left.exists() and not is_sealed(left):
                left.rmtree()
            mark.unlink()
        wait_for_all()

    def _not_written(self, error: BaseException) -> UserError:
        mend = "see to room and rights there; the same command goes on from the checkpoint before"
        kind = Passing if is_remote(self._folder) else UserError  # a bucket may answer again, a full disk stays full
        return kind(str(self._folder), f"the checkpoint cannot be written ({type(error).__name__}: {error})", mend)


class _Sealing:
    """A thread that waits until a checkpoint is committed, on all processes, and seals the files of this one.

    Attributes:
        thread: is over when the checkpoint is sealed or has failed.
        error: why it has failed.
    """

    def __init__(self, manager: ocp.CheckpointManager, folder: epath.Path, step: int):
        self.error: BaseException | None = None
        self._manager, self._folder, self._step = manager, folder, step
        self.thread = threading.Thread(target=self._run, name="seal")
        self.thread.start()

    def _run(self) -> None:
        folder = self._folder / str(self._step)
        try:
            self._manager.wait_until_finished()
            seal(folder, _place(folder), jax.process_index(), jax.process_count())
        except BaseException as error:
            self.error = error


def _place(folder: epath.Path) -> str:
    """What a checkpoint is of: its stage and step."""
    return "/".join((folder.parent.parent.name, folder.name))


class _Best(policies.PreservationPolicy):
    """Keeps the best step, whenever it was."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        return [each.step == self._checkpoints.best for each in checkpoints]


def checkpoint_digest(folder: epath.Path, step: int) -> str | None:
    """What names the content of a checkpoint, or None where there is no such checkpoint."""
    return identity(folder / str(step))
