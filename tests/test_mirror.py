"""A run whose machine is taken away goes on elsewhere with what the bucket has."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from gadjax.errors import UserError
from gadjax.metrics import read
from gadjax.mirror import Mirror
from tests import tiny
from tests.test_resume import STOPPED


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    write(folder, _dot_seconds="10.0\n", config="a: 1", teacher_dot_sqlite="answers", data__manifest="{}", stages__gad__metrics="rows")
    write(folder, _dot_lock="", stages__gad__checkpoints__2__array="big", _dot_config_dot_partial="half", export__gad__config="{}")
    return folder


SMALL = [".seconds", "config", "data/manifest", "stages/gad/metrics", "teacher.sqlite"]


def test_what_is_small_and_whole_is_sent_and_fetched(tmp_path: Path, run: Path):
    Mirror(run, str(tmp_path / "bucket" / "run")).push()
    assert listed(tmp_path / "bucket" / "run") == sorted([*SMALL, "export/gad/config"])
    other = tmp_path / "there"
    assert Mirror(other, str(tmp_path / "bucket" / "run")).fetch()
    assert listed(other) == SMALL  # nobody trains on an export
    assert (other / "teacher.sqlite").read_text() == "answers"


def test_only_what_changed_is_sent(tmp_path: Path, run: Path):
    bucket = tmp_path / "bucket"
    mirror = Mirror(run, str(bucket))
    mirror.push()
    before = {name: (bucket / name).stat().st_mtime_ns for name in listed(bucket)}
    write(run, stages__gad__metrics="more rows")
    mirror.push()
    assert [name for name, time in before.items() if (bucket / name).stat().st_mtime_ns != time] == ["stages/gad/metrics"]
    assert (bucket / "stages/gad/metrics").read_text() == "more rows"
    other = Mirror(tmp_path / "there", str(bucket))
    other.fetch()
    before = {name: (bucket / name).stat().st_mtime_ns for name in listed(bucket)}
    other.push()  # what was fetched is not sent back
    assert before == {name: (bucket / name).stat().st_mtime_ns for name in listed(bucket)}


def test_what_another_machine_wrote_since_is_left(tmp_path: Path, run: Path):
    bucket, other = tmp_path / "bucket", tmp_path / "there"
    Mirror(run, str(bucket)).push()
    mirror = Mirror(other, str(bucket))
    mirror.fetch()
    write(bucket, stages__gad__metrics="rows of an hour later")
    later = time.time() + 3600
    os.utime(bucket / "stages/gad/metrics", (later, later))
    write(other, config="a: 2")
    mirror.push()
    assert (bucket / "stages/gad/metrics").read_text() == "rows of an hour later"
    assert (bucket / "config").read_text() == "a: 2"


def test_a_copy_that_is_not_further_is_not_fetched(tmp_path: Path, run: Path):
    mirror = Mirror(run, str(tmp_path / "bucket"))
    assert not mirror.fetch()  # there is none
    mirror.push()
    write(run, config="a: 2")
    assert not mirror.fetch()
    assert (run / "config").read_text() == "a: 2"
    write(tmp_path / "bucket", _dot_seconds="20.0\n", teacher_dot_sqlite="older answers")
    assert mirror.fetch()
    assert (run / "config").read_text() == "a: 1"
    assert (run / "teacher.sqlite").read_text() == "answers"  # they cost money


def test_a_fetch_that_was_cut_off_is_done_again(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    bucket, other = tmp_path / "bucket", tmp_path / "there"
    Mirror(run, str(bucket)).push()
    mirror = Mirror(other, str(bucket))

    def fail(path: Path, target: Path) -> Path:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="gone"):
            mirror.fetch()
    assert mirror.fetch()
    assert listed(other) == SMALL


def test_a_bucket_that_cannot_be_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"run\.bucket: nowhere://x cannot be used"):
        Mirror(tmp_path, "nowhere://x")


@pytest.mark.timeout(600)
def test_another_machine_goes_on_from_the_bucket(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.getbasetemp()
    whole, _ = tiny.finished(base)
    bucket = tmp_path / "bucket"
    first, second = (tiny.Tiny(tmp_path / name, base / "compiled") for name in ("first", "second"))
    for machine in (first, second):
        machine.folder.mkdir()
        (machine.folder / "tiny.yaml").write_text(tiny.CONFIG)
    stopped = first.gadjax(f"gad:5:{signal.SIGKILL.value}", "run", "tiny.yaml", f"run.bucket={bucket}", program=STOPPED)
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    shutil.rmtree(first.folder)
    done = second.gadjax("run", "tiny.yaml", f"run.bucket={bucket}")
    assert done.returncode == 0, done.stderr
    assert f"was fetched from {bucket}" in done.stderr and "gad: goes on after step" in done.stderr and "warmup: 6" not in done.stderr
    copy = bucket / "tiny"
    summaries = [json.loads((run / "summary.json").read_text()) for run in (second.run, copy, whole.run)]
    assert summaries[0]["stages"] == summaries[1]["stages"] == summaries[2]["stages"]
    assert [row["step"] for row in read(copy / "stages" / "gad" / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert not list(second.run.rglob("checkpoints"))
    wanted = {
        "config.yaml",
        "teacher.sqlite",
        "data/manifest.json",
        "report/index.html",
        "export/gad/model.safetensors",
        "student/config.json",
    }
    assert wanted <= set(listed(copy))
    assert len(list((copy / "tensorboard").rglob("events*"))) >= 3
