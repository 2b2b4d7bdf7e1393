"""A run: one config and the folder where all that it makes lives.

config.yaml  summary.json  teacher.sqlite  data/  student/  stages/<name>/{checkpoints/,metrics.jsonl}
tensorboard/  evaluation/  report/index.html  export/<stage>/
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from gadjax.config import Config, dump_config, load_config, parse_yaml
from gadjax.errors import UserError
from gadjax.files import replace_file
from gadjax.records import Prompt
from gadjax.teachers.sources import load_prompts

# What may change between two calls of the same run: where it lies, how the teacher is reached, how the work is laid out on
# devices, what is shown.
_MAY_CHANGE = (
    *("run.folder", "run.name", "mesh", "evaluation.stages", "evaluation.export"),
    *(f"teacher.{name}" for name in ("base_url", "api_key_env", "concurrency", "max_cost", "price", "timeout", "tries", "retry_wait")),
)

CONFIG = "config.yaml"


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
    def at(cls, folder: Path) -> "Run":
        """The run that lies in a folder, wherever it was made."""
        return cls(load_config(folder / CONFIG, []), folder)

    def begin(self) -> None:
        """Makes the folder, where there is none, and writes the config into it."""
        try:
            replace_file(self.folder / CONFIG, dump_config(self.config))
        except OSError as error:
            raise UserError("run.folder", f"{self.folder} cannot be written to ({error.strerror})", "choose another folder") from error

    @cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """The training prompts and those held out."""
        return load_prompts(self.config.prompts, self.config.teacher, self.config.run.seed)

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

    def begun(self, name: str = "*") -> bool:
        """Whether a stage (by default any) has a checkpoint."""
        return any(step.name.isdigit() for step in self.folder.glob(f"stages/{name}/checkpoints/*"))

    def _check_unchanged(self) -> None:
        """Refuses to go on with stages that began with another config.

        Before the first checkpoint everything may change, and so may stages that have none yet: answers of the teacher know
        their question, and data is made anew.
        """
        kept = self.folder / CONFIG
        if not kept.exists() or not self.begun():
            return
        before = parse_yaml(kept.read_text(encoding="utf-8"), str(kept))
        for field, old, new in _differences("", before, yaml.safe_load(dump_config(self.config))):
            section, _, rest = field.partition(".")
            waits = section == "stages" and not self.begun(rest.split(".")[0])
            if not waits and not any(f"{field}.".startswith(f"{free}.") for free in _MAY_CHANGE):
                what = f"was made with {field} = {old!r}, the config says {new!r}"
                raise UserError(str(self.folder), what, "undo the change or choose another run.name")


def _differences(field: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    """The fields in which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{field}.{key}" if field else str(key), old.get(key), new.get(key))
    elif old != new:
        yield field, old, new
