"""The metrics files: what is written, and what is left after a crash and a resume."""

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import pytest
from tensorboardX.proto import event_pb2

from gadjax import weights_and_biases
from gadjax.errors import UserError
from gadjax.metrics import MetricsLog, read
from gadjax.weights_and_biases import Board, check_installed


def log(folder: Path, steps: range, after: int = -1, value: float = 0.5) -> Path:
    with MetricsLog(folder, folder / "tensorboard", after) as metrics:
        for step in steps:
            metrics.write(step, {"student/loss": value})
    return folder / "metrics.jsonl"


def test_one_object_per_step(tmp_path: Path):
    path = log(tmp_path, range(1, 3))
    assert path.read_text() == '{"step": 1, "student/loss": 0.5}\n{"step": 2, "student/loss": 0.5}\n'
    assert read(path) == [{"step": 1, "student/loss": 0.5}, {"step": 2, "student/loss": 0.5}]


def test_a_row_is_in_the_file_when_write_returns(tmp_path: Path):
    with MetricsLog(tmp_path, tmp_path / "tensorboard") as metrics:
        metrics.write(0, {"a": 1.0})
        assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float):
    path = log(tmp_path, range(1), value=value)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 0, "student/loss": None}
    assert math.isnan(read(path)[0]["student/loss"])


def test_resume_keeps_one_row_a_step(tmp_path: Path):
    log(tmp_path, range(1, 8), value=1.0)
    path = log(tmp_path, range(6, 10), after=5, value=2.0)
    assert [(row["step"], row["student/loss"]) for row in read(path)] == [(s, 1.0 if s <= 5 else 2.0) for s in range(1, 10)]


def test_a_stage_that_begins_anew_has_no_old_rows(tmp_path: Path):
    log(tmp_path, range(5))
    assert read(log(tmp_path, range(2))) == [{"step": 0, "student/loss": 0.5}, {"step": 1, "student/loss": 0.5}]


@pytest.mark.parametrize("cut", range(1, 33))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int):
    path = log(tmp_path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read(path)] == ([1, 2, 3] if cut == 1 else [1, 2])
    log(tmp_path, range(3, 5), after=2)
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", "7", '{"a": 1}', "null"])
def test_any_other_broken_line_is_named(tmp_path: Path, line: str):
    path = log(tmp_path, range(1, 3))
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UserError, match="line 1"):
        read(path)


def test_steps_never_go_back(tmp_path: Path):
    with MetricsLog(tmp_path, tmp_path / "tensorboard", after=3) as metrics:
        with pytest.raises(ValueError, match="step 3"):
            metrics.write(3, {})
        metrics.write(4, {})
        with pytest.raises(ValueError, match="step 4"):
            metrics.write(4, {})


def test_no_file_has_no_rows(tmp_path: Path):
    assert read(tmp_path / "metrics.jsonl") == []


def events(folder: Path) -> list[Any]:
    """TensorBoard's events. Their record format: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(cast(Any, event_pb2).Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    log(tmp_path, range(1, 3))
    scalars = [(event.step, value.tag, value.simple_value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert scalars == [(1, "student/loss", 0.5), (2, "student/loss", 0.5)]


def test_tensorboard_does_not_get_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    log(tmp_path, range(1, 3), value=math.nan)
    assert not any(event.summary.value for event in events(tmp_path / "tensorboard"))
    assert not caplog.records


def test_tensorboard_hides_what_comes_again(tmp_path: Path):
    log(tmp_path, range(6, 7), after=5)
    assert [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status == 1] == [6]


def test_weights_and_biases_is_shown_the_same_and_no_key_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = "0123456789abcdef" * 2 + "fedcba98"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "mine"
    for after in (-1, 1):  # the second call goes on
        board = Board("trials", folder, "gad", {"run": {"seed": 7}})
        with MetricsLog(folder / "stages" / "gad", folder / "tensorboard", after, board) as metrics:
            metrics.write(after + 1, {"student/loss": 0.5, "student/kl": math.nan})
    name = (folder / "stages" / "gad" / "wandb-id").read_bytes()
    until = time.monotonic() + 30
    while True:  # a process of W&B's own writes them, and may be late
        kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        records = [content for file, content in kept.items() if file.suffix == ".wandb"]
        if all(b"student/loss" in content for content in records) or time.monotonic() > until:
            break
        time.sleep(0.1)
    assert len(records) == 2
    for content in records:
        assert name in content and b"student/loss" in content and b"mine/gad" in content
        assert b"student/kl" not in content
    assert not [file for file, content in kept.items() if key.encode() in content]


def test_without_the_package_the_project_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(weights_and_biases, "wandb", None)
    check_installed(None)
    with pytest.raises(UserError, match=r"run.wandb: needs the package wandb; pip install 'gadjax\[wandb\]'"):
        Board("trials", tmp_path, "gad", {})
    assert not [*tmp_path.iterdir()]
