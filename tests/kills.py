"""Runs of gadjax in children that are killed, at named points or at any moment; for tests/test_kills.py.

A process of its own: it imports gadjax once and forks a child for every call, which is much cheaper than starting anew. Nothing in the
package knows of it: a point is a function of it that is wrapped in the child.

python -m tests.kills FOLDER CONFIG KILLS SEED        prints one JSON object
"""

import json
import os
import pkgutil
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gadjax.run  # noqa: F401 (all that the children need)
from gadjax import train
from gadjax.cli import main
from gadjax.metrics import MetricsLog

RECORDS, FIRED = "records.jsonl", "fired.txt"


@dataclass(frozen=True)
class Point:
    """Where a child kills itself.

    Attributes:
        target: "module:function", in which it does so.
        when: before or after the function does its work, or when a text that it is to write is half written.
        stage: the first one, and with `step` the first step of it, in which it may.
        number: the signal.
    """

    target: str
    when: str = "before"
    stage: str = ""
    step: int = 0
    number: int = signal.SIGKILL


STAGES = ["", "warmup", "gad"]
POINTS = [  # in the order in which a run comes by; both stages have a checkpoint every two steps
    Point("gadjax.run:prepare_data", "after"),
    Point("gadjax.checkpointing:Checkpoints.save", "before", "warmup", 2),
    Point("gadjax.steps:Sampler.__call__", "after", "warmup", 3),
    Point("gadjax.checkpointing:_Sealing.__init__", "before", "warmup", 3),  # while Orbax writes
    Point("gadjax.train:Stage._judge", "after", "gad", 3),
    Point("gadjax.checkpointing:seal", "before", "gad", 3),  # committed, not sealed
    Point("gadjax.seals:replace_file", "half", "gad", 4),
    Point("gadjax.checkpointing:seal", "after", "gad", 3),
    Point("gadjax.train:Stage.step", "after", "gad", 5),  # the student's update is under way
    Point("gadjax.metrics:MetricsLog.write", "half", "gad", 5),
    Point("gadjax.metrics:MetricsLog.write", "after", "gad", 5, signal.SIGTERM),
    Point("gadjax.train:Pending.fetch", "after", "gad", 6),
    Point("gadjax.validation:Validator.__call__", "after", "gad", 6),
    Point("gadjax.checkpointing:Checkpoints.save", "after", "gad", 7),
    Point("gadjax.evaluate:write_answers"),
    Point("gadjax.evaluate:write_answers", "after"),
    Point("gadjax.run:_report"),
    Point("gadjax.report.page:replace_file", "half", "gad", 7),
    Point("gadjax.run:export_stage"),
]
ITERATOR = "iterator advance"
SHORT = [POINTS[index] for index in (2, 3, 4, 6, 8, 9, 10, 14, 16)]  # eight of them kill


@dataclass
class At:
    """The stage and the step that was begun last in this process."""

    stage: str = ""
    step: int = 0


at = At()


def fire(point: Point) -> None:
    Path(FIRED).write_text(str(time.monotonic()))
    os.kill(os.getpid(), point.number)


def arm(point: Point) -> None:
    """Wraps the point's function."""
    place, _, name = point.target.rpartition(":")
    owner: Any = pkgutil.resolve_name(f"{place}:{name.rpartition('.')[0]}" if "." in name else place)
    name = name.rpartition(".")[2]
    plain, first, once = getattr(owner, name), (STAGES.index(point.stage), point.step), iter([True])

    def wrapped(*arguments: Any, **options: Any) -> Any:
        now = (STAGES.index(at.stage), at.step) >= first and next(once, False)
        if now and point.when == "before":
            fire(point)
        if now and point.when == "half":
            write_half(*arguments)
            fire(point)
        result = plain(*arguments, **options)
        if now and point.when == "after":
            fire(point)
        return result

    setattr(owner, name, wrapped)


def write_half(first: Any, *rest: Any) -> None:
    """Half of what `replace_file(path, text)` or `MetricsLog.write(step, metrics)` writes."""
    if isinstance(first, MetricsLog):
        first._file.write(f'{{"step": {rest[0]}, "student/lo')
        first._file.flush()
    else:
        first.with_name(f".{first.name}.partial").write_text(rest[0][: len(rest[0]) // 2])


def arm_iterator() -> None:
    """Kills between the advance of the data's iterator and the step that uses what it gave."""
    plain = train.batches

    class Once:
        def __init__(self, inner: Any):
            self._inner, self._count = inner, 0

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            found, self._count = next(self._inner), self._count + 1
            if self._count == 2 and at.stage == "gad":
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    setattr(train, "batches", lambda *arguments: Once(iter(plain(*arguments))))  # noqa: B010


def record(kind: str, stage: str, step: int, value: Any) -> None:
    line = json.dumps({"kind": kind, "stage": stage, "step": step, "value": value})
    with Path(RECORDS).open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def keep_records() -> None:
    """Lets this process write down the sampled ids, scores and metrics of every step that it does, one way or the other."""
    step, judge, ids, write = train.Stage.step, train.Stage._judge, train.responses_of, MetricsLog.write

    def kept_step(stage: train.Stage, index: int, groups: Any) -> Any:
        at.stage, at.step = stage.name, index + 1
        return step(stage, index, groups)

    def kept_judge(stage: train.Stage, rows: Any) -> Any:
        scores, metrics = judge(stage, rows)
        record("scores", at.stage, at.step, np.asarray(jax.device_get(scores), np.float64).tolist())
        return scores, metrics

    def kept_ids(rollout: Any) -> Any:
        found = ids(rollout)
        record("ids", at.stage, at.step, found[0])
        record("logps", at.stage, at.step, found[1])
        return found

    def kept_write(log: MetricsLog, number: int, metrics: Any) -> None:
        same = {name: value for name, value in metrics.items() if not name.startswith("time/") and "per_second" not in name}
        record("metrics", Path(log._file.name).parent.name, number, same)
        write(log, number, metrics)

    for owner, name, kept in (
        (train.Stage, "step", kept_step),
        (train.Stage, "_judge", kept_judge),
        (train, "responses_of", kept_ids),
        (MetricsLog, "write", kept_write),
    ):
        setattr(owner, name, kept)


def call(folder: Path, prepare: Callable[[], object], seconds: float | None = None) -> tuple[int, float]:
    """`gadjax run tiny.yaml` in a child, killed after so many seconds if it is still there; its status and the seconds that it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        said = os.open("said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 1
        try:
            keep_records()
            prepare()
            main(["run", "tiny.yaml"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        while time.monotonic() < started + seconds and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def made(folder: Path, config: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(config)
    return folder


def trial(base: Path, config: str, kills: int, seed: int) -> dict[str, Any]:
    """One whole run, and runs that are killed so often in all: at every point, then at any moment."""
    chance = random.Random(seed)
    whole = made(base / "whole", config)
    status, _ = call(whole, lambda: None)
    assert status == 0, (whole / "said.txt").read_text()
    _, seconds = call(made(base / "timed", config), lambda: None)  # with all compiled
    done, ends, runs, slowest = 0, list[dict[str, Any]](), list[str](), 0.0
    while done < kills:
        folder = made(base / f"killed-{len(runs)}", config)
        runs.append(folder.name)
        plans: list[Any] = (SHORT if kills <= len(SHORT) else [*POINTS, ITERATOR]) if len(runs) == 1 else [None] * 10
        for plan in plans:
            if plan is None:
                status, _ = call(folder, lambda: None, chance.uniform(0, seconds))
            elif plan == ITERATOR:
                status, _ = call(folder, arm_iterator)
            else:
                status, _ = call(folder, lambda plan=plan: arm(plan))
                if plan.number == signal.SIGTERM:
                    slowest = max(slowest, time.monotonic() - float((folder / FIRED).read_text()))
            ends.append({"point": str(plan), "status": status})
            done += status == -signal.SIGKILL
            if done == kills or status == 0:
                break
        status = 1
        while status:  # one call more ends it, unless something is wrong
            status, _ = call(folder, lambda: None)
            assert status == 0, (folder / "said.txt").read_text()
    return {"whole": whole.name, "runs": runs, "kills": done, "ends": ends, "slowest": slowest}


if __name__ == "__main__":
    folder, config, kills, seed = sys.argv[1:]
    print(json.dumps(trial(Path(folder), Path(config).read_text(), int(kills), int(seed))))
