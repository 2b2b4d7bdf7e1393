"""Checkpoints of a stage: all of the state in one Orbax transaction.

Each holds the student with its optimizer, the discriminator with its own where the stage has one, and on the host side the
random key and the state of the data iterator. Writing goes on in the background while training continues.

Orbax does not see that a bit of an array has flipped on the disk. So every checkpoint is committed with the SHA-256 of its
files, and what is restored is verified first. An object store keeps a checksum of every object itself, which is committed instead:
nothing is read back for it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from fsspec.core import url_to_fs
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from gadjax.errors import UserError
from gadjax.files import flush, replace_file
from gadjax.types import Role, TrainState

KEEP = 2  # of the newest ones, at least; the one before the last serves where the last is damaged
MANIFEST = "sha256.json"
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
        self._folder = epath.Path(folder) if _is_remote(folder) else epath.Path(folder).absolute()
        self._written = 0  # the step that is being written
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self)]),
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # of a process that was killed
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
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

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in their order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Begins to write the state after `step` steps; waits for an earlier write first."""
        self._manager.wait_until_finished()
        self._written = step
        items = {name: ocp.args.StandardSave(role) for name, role in state._asdict().items() if role is not None}
        self._manager.save(step, args=ocp.args.Composite(**items, **{HOST: ocp.args.JsonSave(host)}))

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
        return self._restore(step, HOST, ocp.args.JsonRestore())

    def restore_role(self, step: int, name: str, abstract: Role) -> Role:
        """One model with its optimizer: `student` or `discriminator`."""
        return self._restore(step, name, ocp.args.StandardRestore(abstract))

    def _restore(self, step: int, name: str, arguments: Any) -> Any:
        self._verify(step, name)
        return self._manager.restore(step, args=ocp.args.Composite(**{name: arguments}))[name]

    def _seal(self) -> None:
        """Writes the manifest. Orbax calls this when all else is written, before the folder gets its final name."""
        beside = [*self._folder.glob(f"{self._written}.orbax-checkpoint-tmp*")]
        folder = beside[0] if beside else self._folder / str(self._written)  # a store cannot rename: a last file says that all is whole
        digests = _digests(folder)
        if _is_remote(folder):
            (folder / MANIFEST).write_text(json.dumps(digests, indent=1))
            return
        for file in digests:
            flush(Path(folder / file))
        replace_file(Path(folder / MANIFEST), json.dumps(digests, indent=1))

    def _verify(self, step: int, name: str) -> None:
        """Refuses a checkpoint of which a file of item `name` is missing or changed."""
        folder = self._folder / str(step)
        mend = "delete this folder and run the same command again: the stage goes on from the checkpoint before"
        try:
            manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            found = _digests(folder / name)
            changed = [
                file for file, digest in manifest.items() if file.startswith(f"{name}/") and found.get(file[len(name) + 1 :]) != digest
            ]
        except (OSError, ValueError) as error:
            raise UserError(str(folder), f"is not whole ({error})", mend) from error
        if changed:
            raise UserError(str(folder), f"{changed[0]} is missing or was changed after it was written", mend)


class _Best(policies.PreservationPolicy):
    """Keeps the best step, whenever it was."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        return [each.step == self._checkpoints.best for each in checkpoints]


def checkpoint_digest(folder: epath.Path, step: int) -> str | None:
    """What names the content of a checkpoint: the SHA-256 of its manifest, or None where there is no such checkpoint."""
    manifest = folder / str(step) / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def _digests(folder: epath.Path) -> dict[str, str]:
    """What names the content of every file below a folder: its SHA-256, or the checksum that the store keeps of it."""
    files, root = url_to_fs(str(folder))
    found: dict[str, dict[str, Any]] = files.find(root, detail=True)
    return {str(PurePosixPath(path).relative_to(root)): info.get("crc32c") or _sha256(path) for path, info in sorted(found.items())}


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
