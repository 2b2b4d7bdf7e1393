"""The numbers of a stage, step by step: `metrics.jsonl` for programs and the report, TensorBoard and, on request, W&B for the eye.

`metrics.jsonl` has one object per step: {"step": 7, "student/loss": 1.25, ...}. A value that is not finite is null there,
and NaN when it is read; the boards do not get it. A step that runs again after an interruption has one row, that of the last time.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from gadjax.errors import UserError
from gadjax.files import replace_file, to_json, told_where
from gadjax.weights_and_biases import Board

FILE = "metrics.jsonl"
Event: Any = getattr(event_pb2, "Event")  # noqa: B009 (generated code, without types)
SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009
Row = dict[str, float]


class MetricsLog:
    """Writes `folder/metrics.jsonl` and TensorBoard's events. On one process of a run only.

    Args:
        folder: the stage's folder.
        tensorboard: the folder of the stage's events; TensorBoard shows the folders beside each other as runs.
        after: the step of the checkpoint that the stage goes on from. Rows of later steps are dropped, for these steps come again.
            -1: from the beginning.
        board: another one that is shown the same; closed with the log.
    """

    def __init__(self, folder: Path, tensorboard: Path, after: int = -1, board: Board | None = None):
        path = folder / FILE
        rows = [row for row in read(path) if row["step"] <= after]
        replace_file(path, "".join(f"{to_json(row)}\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        self._board = _Events(tensorboard, after + 1)
        self._last = after
        self._shown = board

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the row of a step, which must be later than all before. It is in the file, whole, when this returns."""
        if step <= self._last:
            raise ValueError(f"the row of step {step} comes after that of step {self._last}")
        row = {name: float(value) for name, value in metrics.items()}
        with told_where(Path(self._file.name)):
            self._file.write(f"{to_json({'step': step} | row)}\n")
            self._file.flush()
        self._board.write(step, {name: value for name, value in row.items() if math.isfinite(value)})
        if self._shown is not None:
            self._shown.write(step, row)
        self._last = step

    def close(self) -> None:
        """Ends both files, and the board."""
        with ExitStack() as every:  # whichever fails
            for each in (self._shown, self._board, self._file):
                if each is not None:
                    every.callback(each.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Events:
    """TensorBoard's file of a stage.

    Written here and now: the library's own writer has a thread for it that a full disk ends, and whoever adds more then waits for ever.

    Args:
        folder: of the stage's events.
        first: TensorBoard hides what earlier files have of this step and later ones.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with told_where(folder):
            self._writer = EventsWriter(str(folder / "events"))
        self._add(Event(step=first, file_version="brain.Event:2"), Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        self._add(*(Event(wall_time=now, step=step, summary=scalar(name, value)) for name, value in values.items()))

    def _add(self, *events: Any) -> None:
        with told_where(self._folder):
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        with told_where(self._folder):
            self._writer.close()


def read(path: Path) -> list[Row]:
    """The rows of a metrics file, none where there is no file. A last line that was cut off by a crash is left out.

    Raises:
        UserError: another line is no row.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"]} | {name: math.nan if value is None else value for name, value in row.items()})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}", "is not a row of metrics", "delete the line") from None
    return rows
