"""A run that is killed or interrupted and started again ends with the same bits as one that is not."""

import json
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gadjax.checkpointing import Checkpoints
from gadjax.metrics import read
from gadjax.runs import Run
from gadjax.seals import is_sealed
from gadjax.session import Session
from gadjax.types import Role, TrainState
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # the first test waits for six processes

STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}

# gadjax, which sends itself a signal as soon as a step's row is written, and tells what it holds when a state is restored.
STOPPED = """
import os, signal, sys
import jax
from gadjax import checkpointing, metrics
from gadjax.cli import main

stage, step, number = sys.argv.pop(1).split(":")
write = metrics.MetricsLog.write

def write_and_stop(log, at, row):
    write(log, at, row)
    if log._file.name.endswith(f"stages/{stage}/metrics.jsonl") and at == int(step):
        os.kill(os.getpid(), int(number))

def tell_and_restore(*arguments, restore=checkpointing.Checkpoints.restore):
    print("held:", sum(array.nbytes for array in jax.live_arrays()), file=sys.stderr)
    return restore(*arguments)

metrics.MetricsLog.write = write_and_stop
checkpointing.Checkpoints.restore = tell_and_restore
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have them ignore it
main()
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Tiny, dict[str, str]]:
    """The experiment, stopped four times, and what each of its five processes said."""
    base = tmp_path_factory.getbasetemp()
    tiny.finished(base)  # first, so that it fills the compiler's cache
    experiment = tiny.Tiny.make(base, "resumed")
    said = {}
    for stage, step, number in (
        ("warmup", 5, signal.SIGKILL),
        ("gad", 3, signal.SIGINT),
        ("gad", 4, signal.SIGTERM),
        ("gad", 6, signal.SIGKILL),
    ):
        done = experiment.gadjax(f"{stage}:{step}:{number}", "run", "tiny.yaml", program=STOPPED)
        assert done.returncode == STATUS[number], done.stderr
        last = step + 1 if number == signal.SIGTERM else step  # SIGTERM comes when a step is written, and the next one is begun and saved
        assert read(experiment.run / "stages" / stage / "metrics.jsonl")[-1]["step"] == last
        said[f"{stage} {step} {number.name}"] = done.stderr
    last = experiment.gadjax("run", "tiny.yaml")
    assert last.returncode == 0, last.stderr
    return experiment, said | {"last": last.stderr}


@pytest.mark.parametrize("stopped", ["gad 3 SIGINT", "gad 4 SIGTERM"], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_is_told_in_one_line(resumed: tuple[tiny.Tiny, dict[str, str]], stopped: str):
    said = resumed[1][stopped]
    assert said.splitlines()[-1] == "interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in said and "Error" not in said


def test_stages_go_on_from_their_last_checkpoint(resumed: tuple[tiny.Tiny, dict[str, str]]):
    _, *began = (re.findall(r"^(\w+): goes on after step (\d)", said, re.M) for said in resumed[1].values())
    # The checkpoint after step 4 was being written when it was killed in step 5: it may be whole or not there.
    assert began[0][0] in [("warmup", "2"), ("warmup", "4")]
    # Ctrl-C waits for the checkpoint that is being written; SIGTERM makes one, of a step that has none otherwise.
    assert began[1:] == [[("gad", "2")], [("gad", "5")], [("gad", "5")]]
    assert "gad: asked to stop; the checkpoint after step 5 is written" in resumed[1]["gad 4 SIGTERM"]
    last = resumed[1]["last"]
    assert "collect: 48/48" in last and "WARNING" not in "".join(resumed[1].values())
    assert not re.search(r"^(seqkd|warmup): \d/", last, re.M)  # finished stages are left alone


def test_no_second_state_is_held_while_one_is_restored(resumed: tuple[tiny.Tiny, dict[str, str]]):
    experiment, said = resumed
    student = Session.open(Run.at(experiment.run), experiment.run / "student").final_role("gad", "student").params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(student))
    [held] = re.findall(r"^held: (\d+)$", said["gad 6 SIGKILL"], re.M)
    assert size <= int(held) < 2 * size  # the reference, and hardly more; a state is two models with two moments each


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
    assert kept == {"seqkd": ["3"], "warmup": ["4", "6"], "gad": ["5", "6"]}


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
    assert is_sealed(epath.Path(tmp_path / "2"))


SEQKD = f"algorithm: seqkd, {tiny.COMMON.replace('1e-3', '1e38')}, checkpoint_every: 1"
JUDGED = f"algorithm: gad, {tiny.SAMPLING}, checkpoint_every: 1, max_steps: 3, discriminator: {{learning_rate: 1e38}}"


@pytest.mark.parametrize(
    ("stage", "told", "kept"),
    [
        (SEQKD, r"student/(loss|grad_norm) is (nan|inf) in step 2", [1]),
        (JUDGED, r"discriminator/(loss|grad_norm) is (nan|inf) in step 2", [1]),
        # What the last update broke is seen there alone; this rate is infinite in float32.
        (f"{SEQKD.replace('1e38', '1e39')}, max_steps: 1", r"validation/loss is nan in step 1", []),
    ],
    ids=["student", "discriminator", "validation"],
)
def test_a_loss_that_is_not_a_number_stops_the_run_and_is_not_kept(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, stage: str, told: str, kept: list[int]
):
    experiment = tiny.Tiny(tmp_path, tmp_path_factory.getbasetemp() / "compiled")
    (tmp_path / "tiny.yaml").write_text(tiny.with_stages(broken=stage))
    stopped = experiment.gadjax("run", "tiny.yaml")
    assert stopped.returncode == 2, stopped.stderr
    assert re.fullmatch(rf"gadjax: stages\.broken: {told}; lower the learning rate; .*", stopped.stderr.splitlines()[-1])
    assert [int(path.name) for path in (experiment.run / "stages" / "broken" / "checkpoints").iterdir()] == kept
    assert [row["step"] for row in read(experiment.run / "stages" / "broken" / "metrics.jsonl")] == [0, *kept]
