"""Checkpoints of a stage: all of the state in one Orbax transaction.

Each holds the student with its optimizer, the discriminator with its own where the stage has one, and on the host side the
random key and the state of the data iterator. Writing goes on in the background while training continues.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from gadjax.types import Role, TrainState

KEEP = 2  # the newest ones; the one before the last serves where the last cannot be read


class Checkpoints:
    """The checkpoints of one stage, in `folder`/<step>. Use as a context manager: leaving waits for what is being written."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        writing = {"max_to_keep": KEEP, "create": True}
        reading = {"read_only": True, "create": False, "save_interval_steps": 0}
        options = ocp.CheckpointManagerOptions(**(reading if read_only else writing))
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step: the number of steps that it has behind it."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Begins to write the state after `step` steps; waits for an earlier write first."""
        items = {name: ocp.args.StandardSave(role) for name, role in state._asdict().items() if role is not None}
        self._manager.save(step, args=ocp.args.Composite(**items, host=ocp.args.JsonSave(host)))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state after `step` steps, laid out as the shardings in `abstract` say."""
        student = self.restore_role(step, "student", abstract.student)
        discriminator = None if abstract.discriminator is None else self.restore_role(step, "discriminator", abstract.discriminator)
        return TrainState(student, discriminator), self.restore_host(step)

    def restore_role(self, step: int, name: str, abstract: Role) -> Role:
        """One model with its optimizer: `student` or `discriminator`."""
        return self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}))[name]

    def restore_host(self, step: int) -> dict[str, Any]:
        """What the host saved with it."""
        return self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
