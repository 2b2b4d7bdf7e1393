"""Weights & Biases, for those who watch their runs there (the extra `wandb`). Who you are it finds out itself; we never touch the key.

Its environment variables hold: `WANDB_API_KEY`, `WANDB_MODE=offline`, `WANDB_ENTITY`.
"""

# pyright: reportMissingImports=false
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadjax.errors import UserError
from gadjax.files import replace_file

try:
    import wandb
except ImportError:
    wandb = None

ID = "wandb-id"  # in a stage's folder: one line there for all calls of the same run


def check_installed(project: str | None) -> None:
    """Refuses a project where there is no package to send to it."""
    if project is not None and wandb is None:
        raise UserError("run.wandb", "needs the package wandb", "pip install 'gadjax[wandb]', or leave the field out")


class Board:
    """One stage as a line of a project's charts; the stages of a run are a group.

    Args:
        project: its name.
        folder: of the run; what waits to be sent is kept there, in `wandb/`.
        stage: the stage's name.
        config: the run's settings, shown beside the charts.
    """

    def __init__(self, project: str, folder: Path, stage: str, config: Mapping[str, Any]):
        check_installed(project)
        assert wandb is not None
        kept = folder / "stages" / stage / ID
        if not kept.exists():
            replace_file(kept, secrets.token_hex(8))
        name = folder.resolve().name
        self._run: Any = wandb.init(
            project=project,
            dir=folder,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            name=f"{name}/{stage}",
            group=name,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step; a step that is done again after an interruption is there twice."""
        self._run.log({"step": step} | {name: value for name, value in metrics.items() if math.isfinite(value)})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
