"""A run whose machine is taken away goes on elsewhere with what the bucket has."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from gadjax import cli, collecting
from gadjax.errors import Passing, UserError
from gadjax.metrics import read
from gadjax.mirror import Mirror, told_of
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


@pytest.mark.parametrize("bucket", ["/proc/bucket", "/etc/hostname/x", "file:///proc/nope"])
def test_a_bucket_that_cannot_be_used_is_told_before_the_teacher_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], bucket: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collecting, "collect_answers", lambda *_: pytest.fail("the teacher was asked"))
    Path("tiny.yaml").write_text(tiny.CONFIG)
    with pytest.raises(SystemExit) as stop:
        cli.main(["collect", "tiny.yaml", f"run.bucket={bucket}"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"gadjax: run.bucket: {bucket}")


class HttpError(Exception):
    """As gcsfs has it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: int):
        super().__init__(f"status {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("Forbidden: b/x"), UserError),
        (HttpError(401), UserError),
        (HttpError(503), Passing),
        (TimeoutError(), Passing),
        (ConnectionResetError("reset"), Passing),
        (PermissionError("no"), UserError),
    ],
)
def test_what_a_bucket_refuses_is_told_and_what_may_pass_is_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[UserError]
):
    mirror = Mirror(run, str(run.parent / "bucket"))

    def fail(*_: object, **__: object) -> None:
        raise error

    for name, call in (("put_file", mirror.push), ("pipe_file", mirror.check), ("find", mirror.fetch)):
        with monkeypatch.context() as patch:
            patch.setattr(type(mirror._files), name, fail)
            with pytest.raises(UserError, match=r"^run\.bucket: ") as told:
                call()
        assert type(told.value) is kind


def test_a_fault_of_ours_is_not_told_as_the_buckets():
    with pytest.raises(KeyError), told_of("gs://x"):
        raise KeyError("ours")


def test_a_check_leaves_nothing(tmp_path: Path, run: Path):
    Mirror(run, str(tmp_path / "bucket")).check()
    assert listed(tmp_path / "bucket") == []


def test_a_file_that_vanishes_while_it_is_sent_is_left_out(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    is_file, stat = Path.is_file, Path.stat

    def looked(path: Path, **options: bool) -> os.stat_result:
        if path.name == "config":
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "config" or is_file(path))
    monkeypatch.setattr(Path, "stat", looked)
    Mirror(run, str(tmp_path / "bucket")).push()
    monkeypatch.undo()
    assert listed(tmp_path / "bucket") == sorted({*SMALL} - {"config"})


def test_a_file_that_vanishes_before_it_is_sent_ends_nothing(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    mirror = Mirror(run, str(tmp_path / "bucket"))
    send = mirror._files.put_file

    def sent(file: str, *others: str) -> None:
        if file.endswith("config"):
            Path(file).unlink(missing_ok=True)
        send(file, *others)

    monkeypatch.setattr(mirror._files, "put_file", sent)
    mirror.push()
    assert listed(tmp_path / "bucket") == sorted({*SMALL} - {"config"})


def test_what_was_fetched_and_is_the_same_is_not_fetched_again(tmp_path: Path, run: Path):
    bucket, other = tmp_path / "bucket", tmp_path / "there"
    write(run, weights__model="large")
    Mirror(run, str(bucket)).push()
    mirror = Mirror(other, str(bucket))
    mirror.fetch()
    before = (other / "weights" / "model").stat().st_ino
    write(bucket, _dot_seconds="20.0\n", config="a: 3")
    assert mirror.fetch()
    assert (other / "weights" / "model").stat().st_ino == before
    assert (other / "config").read_text() == "a: 3"


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
