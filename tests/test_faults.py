"""A full disk, a folder that may not be written to, a clock that goes back, two processes in one folder; NaN and infinity."""

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax import checkpointing, cli, seals, stopping
from gadjax.checkpointing import Checkpoints
from gadjax.config import Config
from gadjax.data.snapshot import Snapshot, freeze
from gadjax.errors import Passing, UserError, no_room
from gadjax.files import replace_file
from gadjax.metrics import MetricsLog, read
from gadjax.models import checkpoint
from gadjax.models.decoder import language_model
from gadjax.optimizer import OptimizerConfig, make_optimizer, update
from gadjax.runs import Run
from gadjax.train import SKIPS, Stage, not_finite
from gadjax.types import Role
from tests.test_audit import make_run
from tests.test_data import examples
from tests.test_resume import abstract, state


@contextmanager
def full(size: int = 50) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: what a write to a full disk is, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_is_what_it_was(tmp_path: Path):
    replace_file(tmp_path / "summary.json", "before")
    with full(), pytest.raises(OSError, match="File too large"):
        replace_file(tmp_path / "summary.json", "x" * 100)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"], "something is left beside it"


def test_a_row_that_has_no_room_is_mended(tmp_path: Path):
    log = MetricsLog(tmp_path, tmp_path / "board")
    log.write(1, {"student/loss": 1.0})
    with full():
        for write in (lambda: log.write(2, {"student/loss": 2.0, "student/kl": 3.0, "student/entropy": 4.0}), log._file.close):
            with pytest.raises(OSError, match="File too large"):
                write()
    log._board.close()
    assert (tmp_path / "metrics.jsonl").read_bytes()[-1:] != b"\n", "nothing was torn"
    with MetricsLog(tmp_path, tmp_path / "board", after=1) as log:
        log.write(2, {"student/loss": 2.0})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.timeout(30)
def test_a_full_disk_does_not_leave_tensorboard_waiting(tmp_path: Path):
    (tmp_path / "board").mkdir()
    row = {f"student/{number}": 1.0 for number in range(20)}  # more than the library's queue holds
    with MetricsLog(tmp_path, tmp_path / "board") as log:
        log.write(1, row)
        (events,) = (tmp_path / "board").iterdir()
        before = events.stat().st_size
        with full(before + 30), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/board'") as error:
            log.write(2, row)
        assert (tmp_path / "metrics.jsonl").stat().st_size < before and no_room(error.value)
    with MetricsLog(tmp_path, tmp_path / "board", after=1) as log:
        log.write(2, row)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_report_that_has_no_room_is_told_and_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def report() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(tmp_path / "c.yaml"), f"run.folder={tmp_path}", "run.name=mine"])
        return ended.value.code

    run = make_run(tmp_path / "mine", ["an answer"] * 4, ["yes"] * 4, ["no"] * 4)
    (tmp_path / "c.yaml").write_text("teacher: {backend: tutor}\nprompts: {train: 'tutor:9'}\n")
    assert report() == 0
    pages = {path.name: path.read_text() for path in (run / "report").iterdir()}
    assert {*pages} == {"index.html", "data.html"}
    capsys.readouterr()
    for page in ("data.html", "index.html"):  # in the order in which they are written
        with full(1000 if page == "data.html" else len(pages["data.html"].encode()) + 10):
            assert report() == 2
        told = f"gadjax: [Errno 27] File too large: '{run}/report/{page}'; make room there, or choose another run.folder: "
        assert capsys.readouterr().err.splitlines()[-1:] == [f"{told}the same command goes on"]
        assert {path.name: path.read_text() for path in (run / "report").iterdir()} == pages


@pytest.mark.parametrize("size", [1000, 200_000], ids=["the weights", "the tokenizer"])
def test_an_export_that_has_no_room_is_not_there_and_the_one_before_is(tmp_path: Path, size: int):
    golden = Path(__file__).parent / "goldens" / "tied"
    family, dims = checkpoint.read_config(golden)
    params = checkpoint.load(golden, family, language_model(dims, jnp.dtype("float32")).shapes)
    assert 1000 < (golden / "model.safetensors").stat().st_size < 200_000
    tokens = {"eos_token_id": 1, "pad_token_id": 0}
    checkpoint.save(tmp_path / "gad", family, dims, params, tokens, {"tokenizer.json": b"before"})
    with full(size), pytest.raises(OSError, match="File too large: '.*(safetensors|tokenizer.json)'") as error:
        checkpoint.save(tmp_path / "gad", family, dims, params, tokens, {"tokenizer.json": bytes(300_000)})
    assert no_room(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gad"] and (tmp_path / "gad" / "tokenizer.json").read_bytes() == b"before"
    checkpoint.save(tmp_path / "gad", family, dims, params, tokens, {"tokenizer.json": b"after"})
    assert [path.name for path in tmp_path.iterdir()] == ["gad"] and (tmp_path / "gad" / "tokenizer.json").read_bytes() == b"after"


def test_data_that_has_no_room_is_not_there(tmp_path: Path):
    with full(), pytest.raises(Exception, match=r"(?i)too large|write|no space"):
        freeze(tmp_path / "data", {"train": examples(10)}, {})
    assert list(tmp_path.iterdir()) == []
    freeze(tmp_path / "data", {"train": examples(10)}, {})
    assert len(Snapshot.open(tmp_path / "data").train) == 10


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # Orbax's
@pytest.mark.parametrize("where", ["the checkpoint", "the seal"])
def test_a_checkpoint_that_has_no_room_is_told_and_the_next_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
):
    def save(step: int) -> None:
        checkpoints.save(step, state(step), {"key": [step]})
        checkpoints._sealing.thread.join()  # pyright: ignore[reportOptionalMemberAccess]

    with Checkpoints(tmp_path) as checkpoints:
        save(1)
        with full() if where == "the checkpoint" else monkeypatch.context() as patch:
            if patch is not None:
                patch.setattr(seals, "replace_file", refuse)
            try:
                save(2)
            except UserError:
                assert where == "the checkpoint"  # which Orbax may find at once
        save(3)
        assert checkpoints.latest == 3
    if where == "the seal":
        assert "WARNING" in (told := " ".join(capsys.readouterr().err.split())) and "the checkpoint after step 3 is tried" in told
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.whole() == 3
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, abstract(state(0)))[0], state(3))


@pytest.mark.parametrize("remote", [False, True])
def test_two_checkpoints_in_a_row_without_room_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool):
    monkeypatch.setattr(checkpointing, "is_remote", lambda _: remote)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(seals, "replace_file", refuse)
        checkpoints.save(2, state(2), {})
        checkpoints.save(3, state(3), {})
        with pytest.raises(UserError, match=r"cannot be written \(OSError: .*No space left.*; see to room and rights there") as told:
            checkpoints.save(4, state(4), {})
        assert isinstance(told.value, Passing) == remote  # another start may find that a bucket answers again
        assert checkpoints.latest == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.whole() == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "x"), OSError(errno.EROFS, "Read-only file system", "x")]
)
def test_what_has_no_room_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert f"{error.strerror}: 'x'; make room there, or choose another run.folder" in capsys.readouterr().err


def test_a_full_cache_is_no_fault_of_ours(tmp_path: Path):
    database = sqlite3.connect(tmp_path / "cache")
    database.execute("pragma max_page_count = 2")
    database.execute("create table a (b)")
    with pytest.raises(sqlite3.OperationalError) as error:
        database.execute("insert into a values (zeroblob(100000))")
    database.close()
    assert no_room(error.value) and not no_room(OSError(errno.EIO, "broken"))


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = time.time()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            monkeypatch.setattr(time, "time", lambda step=step: now - 86_400 * step)
            checkpoints.save(step, state(step), {})
            checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.whole() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_at_once_and_a_dead_ones_lock_is_taken_once(tmp_path: Path):
    run = Run(Config(), tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        began = time.monotonic()
        with pytest.raises(UserError, match="another gadjax process is using it"), run.locked():
            pass
        assert time.monotonic() - began < 5
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run.locked(), pytest.raises(UserError, match="another gadjax process is using it"), run.locked():
        pass


# --- SIGTERM ------------------------------------------------------------------------------------------------------------

STUCK = """
import ctypes
from gadjax import cli, stopping
stopping.LIMIT = 0.5
def app(*_, **__):
    ctypes.CDLL(None).system(b"echo stuck; exec sleep 5 >/dev/null 2>&1")  # as a device that does not answer: no handler of Python's runs
cli.app = app
cli.main([])
"""


def test_a_process_that_hangs_ends_in_time():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as stuck:
        assert stuck.stdout is not None and stuck.stderr is not None and stuck.stdout.readline() == b"stuck\n"
        began = time.monotonic()
        stuck.send_signal(signal.SIGTERM)
        assert stuck.wait(20) == 143
        assert time.monotonic() - began < 10
        assert b"the same command goes on" in stuck.stderr.read()


def test_sigterm_waits_for_the_step_and_comes_again(monkeypatch: pytest.MonkeyPatch):
    came: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("SIGTERM"))
    try:
        with stopping.finishing() as asked:
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() and came == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == ["SIGTERM"]  # asked again, it does not wait
        assert came == ["SIGTERM"] * 2  # it takes effect when the step is done
        monkeypatch.setattr(stopping, "GRACE", 0.05)
        with stopping.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            assert came == ["SIGTERM"] * 3  # the step took too long
    finally:
        signal.signal(signal.SIGTERM, before)


# --- NaN and infinity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("of", ["gradient", "loss"])
def test_what_is_not_finite_updates_nothing(bad: float, of: str):
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.1))
    params = {"w": jnp.arange(3.0)}
    role = Role(params, optimizer.init(params))
    good = {"w": jnp.ones(3)}
    role, norm = update(optimizer, role, good, loss=jnp.float32(1))
    assert norm == pytest.approx(3**0.5) and role.params["w"][0] != 0
    after, norm = update(
        optimizer, role, {"w": jnp.array([1, bad, 1])} if of == "gradient" else good, loss=jnp.float32(bad) if of == "loss" else None
    )
    assert np.isnan(norm)
    jax.tree.map(np.testing.assert_array_equal, after, role)


ROW = {"student/loss": 1.0, "student/grad_norm": 1.0, "student/reward_mean": 0.0, "discriminator/grad_norm": 1.0, "rollout/logp_gap": 0.0}


def stage(policy: str, finite: bool = True) -> Any:
    session: Any = SimpleNamespace(run=SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(nonfinite=policy))))
    programs: Any = SimpleNamespace(finite=lambda _: finite)
    unused: Any = None
    return Stage(session, "gad", programs, None, unused, unused, unused, unused)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*ROW, "validation/loss", "discriminator/student_score", "student/reward_std"])
def test_what_is_not_finite_stops_the_run(name: str, bad: float):
    assert stage("stop").checked(3, ROW) == ROW
    with pytest.raises(UserError, match=rf"stages\.gad: {name} is (nan|inf) in step 3; lower the learning rate"):
        stage("stop").checked(3, ROW | {name: bad})
    assert not_finite({"validation/distinct_2": bad}) == []  # nobody said two words


def test_steps_are_skipped_where_the_config_says_so_but_not_for_ever(capsys: pytest.CaptureFixture[str]):
    one, bad = stage("skip"), ROW | {"student/loss": float("nan"), "student/grad_norm": float("nan")}
    assert one.checked(1, bad)["student/skipped"] == 1 and "discriminator/skipped" not in one.checked(2, bad)
    assert "gad: step 1 is skipped: student/loss, student/grad_norm not finite" in capsys.readouterr().err
    assert one.checked(3, ROW) == ROW
    for step in range(SKIPS):
        one.checked(step, bad)
    with pytest.raises(UserError, match="student/loss is nan"):
        one.checked(SKIPS, bad)
    with pytest.raises(UserError, match="validation/loss is nan"):
        stage("skip").checked(1, ROW | {"validation/loss": float("nan")})  # no step can be skipped for that


def test_parameters_that_are_not_finite_are_never_kept():
    assert stage("stop").sound_state(4) is None  # here there are none
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match=r"stages\.gad: parameters are not finite after step 4"):
            stage(policy, finite=False).sound_state(4)
