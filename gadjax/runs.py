"""A run: one config and the folder where all that it makes lives.

    config.yaml  summary.json  teacher.sqlite  data/  student/  stages/<name>/{checkpoints/,metrics.jsonl}
    tensorboard/  evaluation/  report/index.html  export/<stage>/
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from gadjax.config import Config, dump_config, load_config
from gadjax.errors import UserError
from gadjax.files import replace_file

# What may change between two calls of the same run: how teacher and judge are reached, how the work is laid out on devices.
_MAY_CHANGE = {("teacher", "base_url"), ("teacher", "api_key_env"), ("teacher", "concurrency"), ("teacher", "max_cost"), ("mesh",), ("run", "folder")}


@dataclass(frozen=True)
class Run:
    """A run's config and folder."""

    config: Config
    folder: Path

    @classmethod
    def open(cls, file: Path, overrides: list[str]) -> "Run":
        """Reads the config and makes the run's folder, or finds it.

        Raises:
            UserError: the config is at fault, the folder cannot be made, or it belongs to another config.
        """
        config = load_config(file, overrides)
        folder = config.run.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("run.folder", f"{folder} cannot be made ({error.strerror})", "choose another folder") from error
        text = dump_config(config)
        kept = folder / "config.yaml"
        if kept.exists():
            _check_same(kept, yaml.safe_load(text))
        replace_file(kept, text)
        return cls(config, folder)

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

    def checkpoints(self, name: str) -> Path:
        """A stage's checkpoints."""
        return self.stage(name) / "checkpoints"


def _check_same(kept: Path, now: dict[str, object]) -> None:
    """Refuses to go on with a run whose config says something else."""
    before = yaml.safe_load(kept.read_text())
    for path, old, new in _differences((), before, now):
        if not any(path[: len(free)] == free for free in _MAY_CHANGE):
            field = ".".join(path)
            raise UserError(str(kept.parent), f"was made with {field} = {old!r}, the config says {new!r}", "choose another run.name, or undo the change")


def _differences(path: tuple[str, ...], old: object, new: object) -> list[tuple[tuple[str, ...], object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [each for key in keys for each in _differences((*path, str(key)), old.get(key), new.get(key))]
    return [] if old == new else [(path, old, new)]
