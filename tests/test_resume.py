"""A run that is killed or interrupted and started again ends with the same bits as one that is not."""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.checkpointing import MANIFEST, Checkpoints
from gadjax.errors import UserError
from gadjax.metrics import read
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.types import Role, TrainState
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # the first test waits for five processes

# gadjax, which sends itself a signal as soon as a step's row is written.
STOPPED = """
import os, sys
from gadjax import metrics
from gadjax.cli import main

stage, step, number = sys.argv.pop(1).split(":")
write = metrics.MetricsLog.write

def write_and_stop(log, at, row):
    write(log, at, row)
    if log._file.name.endswith(f"stages/{stage}/metrics.jsonl") and at == int(step):
        os.kill(os.getpid(), int(number))

metrics.MetricsLog.write = write_and_stop
main()
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Tiny, dict[str, str]]:
    """The experiment, stopped three times, and what each of its four processes said."""
    base = tmp_path_factory.getbasetemp()
    tiny.finished(base)  # first, so that it fills the compiler's cache
    experiment = tiny.Tiny.make(base, "resumed")
    said = {}
    for stop in (f"warmup:5:{signal.SIGKILL}", f"gad:3:{signal.SIGINT}", f"gad:6:{signal.SIGKILL}"):
        done = experiment.gadjax(stop, "run", "tiny.yaml", program=STOPPED)
        stage, step, number = stop.split(":")
        assert done.returncode == (130 if int(number) == signal.SIGINT else -signal.SIGKILL), done.stderr
        assert read(experiment.run / "stages" / stage / "metrics.jsonl")[-1]["step"] == int(step)
        said[stop] = done.stderr
    last = experiment.gadjax("run", "tiny.yaml")
    assert last.returncode == 0, last.stderr
    return experiment, said | {"last": last.stderr}


def test_an_interruption_is_told_in_one_line(resumed: tuple[tiny.Tiny, dict[str, str]]):
    said = resumed[1][f"gad:3:{signal.SIGINT}"]
    assert said.splitlines()[-1] == "interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in said and "Error" not in said


def test_stages_go_on_from_their_last_checkpoint(resumed: tuple[tiny.Tiny, dict[str, str]]):
    _, killed, killed_again, last = resumed[1].values()
    # The checkpoint after step 4 was being written when it was killed in step 5 (6): it may be whole or not there.
    assert re.findall(r"^(\w+): goes on after step (\d)", killed, re.M)[0] in [("warmup", "2"), ("warmup", "4")]
    assert re.findall(r"^(\w+): goes on after step (\d)", killed_again, re.M) == [("gad", "2")]  # Ctrl-C waits for the checkpoint
    assert re.findall(r"^(\w+): goes on after step (\d)", last, re.M)[0] in [("gad", "2"), ("gad", "4")]
    assert "collect: 48/48" in last and "WARNING" not in "".join(resumed[1].values())
    assert not re.search(r"^(seqkd|warmup): \d/", last, re.M)  # finished stages are left alone


@pytest.mark.parametrize("stage", tiny.STEPS)
def test_every_step_has_the_same_metrics(tmp_path_factory: pytest.TempPathFactory, resumed: tuple[tiny.Tiny, dict[str, str]], stage: str):
    whole, _ = tiny.finished(tmp_path_factory.getbasetemp())

    def rows(run: Path) -> list[dict[str, float]]:
        timed = re.compile(r"time/.*|rollout/tokens_per_second")
        found = read(run / "stages" / stage / "metrics.jsonl")
        return [{name: value for name, value in row.items() if not timed.fullmatch(name)} for row in found]

    assert rows(resumed[0].run) == rows(whole.run)


@pytest.mark.parametrize("stage", tiny.STEPS)
def test_the_last_checkpoint_has_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, resumed: tuple[tiny.Tiny, dict[str, str]], stage: str
):
    whole, _ = tiny.finished(tmp_path_factory.getbasetemp())
    sessions = [Session.open(Run.at(run), run / "student") for run in (resumed[0].run, whole.run)]
    for role in ("student",) if stage == "seqkd" else ("student", "discriminator"):
        ours, theirs = (session.final_role(stage, role) for session in sessions)  # parameters and moments
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_results_are_the_same(tmp_path_factory: pytest.TempPathFactory, resumed: tuple[tiny.Tiny, dict[str, str]]):
    whole, _ = tiny.finished(tmp_path_factory.getbasetemp())
    for name in ("evaluation/gad.jsonl", "evaluation/student.jsonl", "export/gad/model.safetensors"):
        assert (resumed[0].run / name).read_bytes() == (whole.run / name).read_bytes(), name
    summaries = [json.loads((run / "summary.json").read_text()) for run in (resumed[0].run, whole.run)]
    assert summaries[0]["stages"] == summaries[1]["stages"]


def test_nothing_half_written_is_left(resumed: tuple[tiny.Tiny, dict[str, str]]):
    run = resumed[0].run
    assert [path.name for path in run.rglob("*") if "tmp" in path.name or "partial" in path.name] == []
    kept = {stage: sorted(path.name for path in (run / "stages" / stage / "checkpoints").iterdir()) for stage in tiny.STEPS}
    assert kept == {"seqkd": ["3"], "warmup": ["4", "6"], "gad": ["4", "6"]}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state(value: float, discriminator: bool = True) -> TrainState:
    role = Role({"w": jnp.full((4, 4), value)}, {"mu": jnp.full((4, 4), value / 2)})
    return TrainState(role, role._replace(params={"w": jnp.full(4, -value)}) if discriminator else None)


def abstract(like: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)


@pytest.mark.parametrize("discriminator", [False, True])
def test_a_checkpoint_is_what_was_saved(tmp_path: Path, discriminator: bool):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step, discriminator), {"key": [step]})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == 3
        for step in (2, 3):  # two are kept
            found, host = checkpoints.restore(step, abstract(state(0, discriminator)))
            jax.tree.map(np.testing.assert_array_equal, found, state(step, discriminator))
            assert host == {"key": [step]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_flipped_bit_is_seen(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.save(2, state(2), {})
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.name != MANIFEST and path.parent.name != "2"]
    assert len(files) > 10
    for path in files:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if before else b"x")
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"was changed after it was written; delete this folder"):
            checkpoints.restore(2, abstract(state(0)))
        path.write_bytes(before)
    files[0].unlink()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"2: is not whole \(.*No such file"):
        checkpoints.restore(2, abstract(state(0)))
    shutil.rmtree(tmp_path / "2")  # the mend
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, abstract(state(0)))[0], state(1))


def test_what_a_killed_process_left_is_cleared_by_the_next_writer_only(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
    left = tmp_path / "7.orbax-checkpoint-tmp"
    (left / "student").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == 1
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, state(2), {})
    assert not left.exists()
    assert (tmp_path / "2" / MANIFEST).is_file()


def test_a_loss_that_is_not_a_number_stops_the_run_and_is_not_kept(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    experiment = tiny.Tiny(tmp_path, tmp_path_factory.getbasetemp() / "compiled")
    (tmp_path / "tiny.yaml").write_text(tiny.CONFIG)
    stopped = experiment.gadjax("run", "tiny.yaml", "stages.seqkd.learning_rate=1e38", "stages.seqkd.checkpoint_every=1")
    assert stopped.returncode == 2, stopped.stderr
    told = r"gadjax: stages\.seqkd: student/(loss|grad_norm) is (nan|inf) in step 2; lower the learning rate; .*"
    assert re.fullmatch(told, stopped.stderr.splitlines()[-1])
    assert [path.name for path in (experiment.run / "stages" / "seqkd" / "checkpoints").iterdir()] == ["1"]
    assert [row["step"] for row in read(experiment.run / "stages" / "seqkd" / "metrics.jsonl")] == [0, 1]
