"""The training loop: batches, rollouts, packed rows, two updates, metrics, checkpoints; stage after stage.

One step of a stage that samples: prompts -> rollout -> rows of teacher and samples -> discriminator (scores, update) ->
rows of the student's responses -> student (update). A stage without a discriminator has only the last two.
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from gadjax.algorithms.balance import Balancer
from gadjax.algorithms.stage import Guidance, StageConfig
from gadjax.checkpointing import Checkpoints
from gadjax.data.packing import pack
from gadjax.data.pipeline import batches
from gadjax.errors import UserError
from gadjax.health import Watch
from gadjax.lineage import check_lineage, lineage
from gadjax.metrics import FILE, MetricsLog, read
from gadjax.origins import check_base
from gadjax.records import TokenGroup
from gadjax.runs import Run
from gadjax.selection import Selection
from gadjax.session import Session
from gadjax.sharding import agreed, is_first, on_any, put, replicated
from gadjax.steps import Programs, responses_of
from gadjax.stopping import finishing
from gadjax.stopwatch import Stopwatch
from gadjax.terminal import say, track
from gadjax.types import PackedRows, Params, Rollout, TrainState
from gadjax.validation import Validator
from gadjax.weights_and_biases import Board

Floats = dict[str, float]
Write = Callable[[int, Floats], None]
TRAINED = ("student/", "discriminator/", "rollout/logp_gap")  # what must be finite in every step
SKIPS = 10  # steps in a row that may be skipped
ANSWERS = "answers"  # in a stage's folder: what it answered to a few held-out prompts at every validation
REFRESH = 60.0  # seconds after which new numbers are shown, validated or not


@dataclass
class Pending:
    """A step that was given to the device and may not be done: its metrics are fetched while the next one runs.

    Attributes:
        host: what the host knows already.
        device: metrics on the device; they are ready when the student's update is.
        watch: of this step.
        open: whether its last lap, the student's, is still to be ended.
        follower: the step that was started after it.
    """

    host: Floats
    device: dict[str, Any]
    watch: Stopwatch
    open: bool
    follower: "Pending | None" = None

    def wait(self) -> None:
        """Waits for the device and ends the last lap."""
        if self.open:
            jax.block_until_ready(self.device)
            self.watch.lap("student")
            self.open = False
            if self.follower is not None:
                self.follower.watch.skip()

    def fetch(self) -> Floats:
        """All metrics of the step. Of a step that samples, the share in which the devices wait: the host reads answers and packs them."""
        self.wait()
        seconds = self.watch.seconds
        if "time/rollout_seconds" in seconds:
            waits = seconds["time/data_seconds"] + self.watch.host["time/host/answers_seconds"]
            self.host["time/idle_fraction"] = waits / sum(seconds.values())
        return self.host | {name: float(value) for name, value in jax.device_get(self.device).items()} | seconds | self.watch.host


@dataclass
class Stage:
    """A stage while it runs.

    Attributes:
        session: the run.
        name: of the stage.
        programs: what it compiles.
        reference: the student's parameters at the start of the stage, where the algorithm reads them.
        state: both models; changed by every step.
        key: of the rollouts.
        balancer: what is regulated from step to step.
        selection: the best step so far.
        unseen: metrics of a finished step which the balancer is to see when the next one has begun; it never knows of that one.
        skipped: how many steps in a row have updated nothing, because something in them was not finite.
        last: the step that was started last.
    """

    session: Session
    name: str
    programs: Programs
    reference: Params | None
    state: TrainState
    key: jax.Array
    balancer: Balancer
    selection: Selection
    unseen: Floats = field(default_factory=dict)
    skipped: int = 0
    last: Pending | None = None

    def step(self, index: int, groups: Sequence[TokenGroup]) -> Pending:
        """Starts one step; `index` counts from 0."""
        programs, algorithm = self.programs, self.programs.algorithm
        if self.last is not None and algorithm.discriminator is not None:
            self.last.wait()  # the rollout would wait for the student anyway: the time belongs to the step before
        watch = Stopwatch()
        prompts = [group.prompt for group in groups]
        teacher = [[group.teacher] for group in groups]
        host, device, rows = Floats(), dict[str, Any](), None
        sampled, logps, scores = list[Any](), None, None
        learns = index >= algorithm.student_begins and self.balancer.student_learns(index - algorithm.student_begins)
        if algorithm.discriminator is not None:
            rollout = programs.sampler(self.state.student.params, prompts, self.key, index)
            with watch.beside("answers"):
                sampled, logps = responses_of(rollout)
            watch.lap("rollout")
            host |= rollout_metrics(rollout, watch.seconds["time/rollout_seconds"])
            both = [own + others for own, others in zip(teacher, sampled, strict=True)]
            rows = self._placed(pack(prompts, both, programs.discriminator_rows()))
            watch.lap("data")
            scores, more = self._judge(rows)
            host |= self.balancer.metrics
            device |= more
        if learns:  # packed while the device works
            read, logps = (teacher, None) if algorithm.student_reads == "teacher" else (sampled, logps)
            with watch.beside("packing"):
                rows = self._placed(pack(prompts, read, programs.rows(len(read[0])), logps))
        jax.block_until_ready(scores)
        watch.lap("data" if scores is None else "discriminator")
        if learns:
            guidance = Guidance(self.reference, scores, self._lengths(teacher, sampled), self._everywhere(np.float32(self.balancer.spread)))
            student, more = programs.student_step(self.state.student, rows, guidance)
            self.state = self.state._replace(student=student)
            device |= more
        started = Pending(host, device, watch, open=learns)
        if self.last is not None:
            self.last.follower = started
        self.last = started
        return started

    def _judge(self, rows: PackedRows) -> tuple[jax.Array, dict[str, Any]]:
        """The discriminator's step: scores and metrics. At rate 0 it scores and does not learn."""
        programs, balancer = self.programs, self.balancer
        step = programs.discriminator_step if balancer.rate else programs.scores_step
        rate = [self._everywhere(np.float32(balancer.rate))] if balancer.changes_rate else []
        discriminator, scores, metrics = step(self.state.discriminator, rows, *rate)
        self.state = self.state._replace(discriminator=discriminator)
        return scores, metrics

    def checked(self, step: int, metrics: Floats) -> Floats:
        """The metrics of a step. Where something is not finite, and the config says so, it is counted that nothing was updated.

        Raises:
            UserError: something is not finite, and the run is to stop for it.
        """
        wrong = not_finite(metrics)
        validated = any(name.startswith("validation/") for name in wrong)  # then the models themselves are broken
        if self.session.run.config.run.nonfinite == "stop" or validated or self.skipped >= SKIPS:
            return refuse_nan(self.name, step, metrics)
        self.skipped = self.skipped + 1 if wrong else 0
        if wrong:
            say(f"{self.name}: step {step} is skipped: {', '.join(wrong)} not finite")
        return metrics | {f"{role}/skipped": 1.0 for role in ("student", "discriminator") if f"{role}/grad_norm" in wrong}

    def sound_state(self, step: int) -> TrainState:
        """The state, to be kept.

        Raises:
            UserError: something in it is not finite.
        """
        if not self.programs.finite(self.state):
            mend = "lower the learning rate; the same command goes on from the checkpoint before"
            raise UserError(f"stages.{self.name}", f"parameters are not finite after step {step}", mend)
        return self.state

    def kept(self, data: Any) -> dict[str, Any]:
        """What a checkpoint holds beside the models, for JSON: all that the steps to come depend on."""
        return {
            "data": data.get_state(),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "balance": self.balancer.state,
            "selection": self.selection.state,
            "unseen": self.unseen,
            "lineage": lineage(self.session, self.name),
            "base": self.session.models.mark,
        }

    def _lengths(self, teacher: Sequence[Sequence[Any]], sampled: Sequence[Sequence[Any]]) -> jax.Array | None:
        if not sampled:
            return None
        lengths = [[len(one) for one in (*own, *others)] for own, others in zip(teacher, sampled, strict=True)]
        return self._everywhere(np.array(lengths, np.int32))

    def _everywhere(self, value: Any) -> jax.Array:
        return put(value, replicated(self.session.models.mesh))

    def _placed(self, rows: PackedRows) -> PackedRows:
        return self.session.models.place_rows(rows)


def rollout_metrics(rollout: Rollout, seconds: float) -> Floats:
    """What a rollout says of the student's answers and of the sampler's speed."""
    lengths = np.asarray(rollout.lengths_BN)
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/truncated_fraction": float(1.0 - np.asarray(rollout.ended_BN).mean()),
        "rollout/tokens_per_second": float(lengths.sum() / seconds),
    }


def open_stage(session: Session, name: str) -> Stage:
    """A stage at its very beginning."""
    programs = Programs.of(session.run.config, name, session.total_steps(name), session.models_of(name), session.text.end_of_turn)
    state = session.first_state(name)
    reference = session.models.reference(state.student.params) if programs.algorithm.needs_reference else None
    selection = Selection(programs.stage.select, name)
    return Stage(session, name, programs, reference, state, session.key, Balancer(programs.algorithm.balance), selection)


def train_stage(session: Session, name: str, show: Callable[[], None] = lambda: None) -> None:
    """Trains one stage to its end, from its last checkpoint if it has one. A finished stage is left as it is.

    `show` is called when there are new numbers to show.
    """
    total, stage_config = session.total_steps(name), session.run.config.stages[name]
    with Checkpoints(session.run.checkpoints(name), keep=stage_config.keep) as checkpoints:
        done = agreed(checkpoints.whole() or 0)
        if done == total or (done and stage_config.select and checkpoints.restore_host(done)["selection"]["stops"]):
            return
        if done:
            kept = checkpoints.restore_host(done)
            check_lineage(session, name, kept["lineage"])
        stage = open_stage(session, name)
        data = iter(batches(session.snapshot.train, stage_config.batch_groups, session.run.config.run.seed))
        if done:
            say(f"{name}: goes on after step {done}")
            # The first state was for the reference alone. Shapes take its place, so that the devices never hold two.
            stage.state = stage.programs.models.abstract_state(stage.state.discriminator is not None)
            stage.state, kept = checkpoints.restore(done, stage.state)
            check_base(session.models, kept, str(session.run.checkpoints(name)))
            data.set_state(kept["data"])
            stage.balancer.state, stage.unseen, stage.selection.state = kept["balance"], kept["unseen"], kept["selection"]
            checkpoints.best = stage.selection.best
            stage.key = session.models.place_key(np.array(kept["key"]))
        with ExitStack() as stack:
            write = stack.enter_context(_log(session.run, name, done or -1)).write if is_first() else _nowhere
            _loop(stage, data, write, checkpoints, done, total, show)
    if stage.selection.on:
        say(f"{name}: {stage.selection.told}")


def _log(run: Run, name: str, after: int) -> MetricsLog:
    project = run.config.run.wandb
    board = Board(project, run.folder, name, run.config.model_dump(mode="json", by_alias=True)) if project else None
    return MetricsLog(run.stage(name), run.folder / "tensorboard" / name, after, board)


def _nowhere(step: int, metrics: Floats) -> None:
    """Where the other processes write: their metrics are those of process 0."""


class _Page:
    """What is shown of a run while it goes on: brought up to date when there is news, or when it has been a while."""

    def __init__(self, show: Callable[[], None]):
        self._show, self._shown = show, time.monotonic()

    def show(self, news: bool) -> None:
        if news or time.monotonic() - self._shown > REFRESH:
            self._show()
            self._shown = time.monotonic()


def _loop(stage: Stage, data: Any, write: Write, checkpoints: Checkpoints, done: int, total: int, show: Callable[[], None]) -> None:
    config, validate = stage.programs.stage, Validator(stage.session, stage.programs, stage.session.run.stage(stage.name) / ANSWERS)
    doctor = Watch(stage.name, read(stage.session.run.stage(stage.name) / FILE))
    if not done:
        _begin(stage, validate(stage.state, 0), write)
    page = _Page(show)
    with track(stage.name, total, done) as advance, finishing() as asked:

        def finish(step: int, pending: Pending, more: Floats) -> None:
            metrics = stage.checked(step, pending.fetch() | more)
            stage.unseen = metrics
            write(step, metrics)
            advance(step, summary(metrics))
            news = doctor.see({"step": step} | metrics)
            for line in news:
                say(line)
            if more:
                stage.selection.see(step, more)
            page.show(bool(more or news))

        late: Pending | None = None
        for step in range(done + 1, total + 1):
            groups, heard = next(data), on_any(asked, stage.session.models.mesh)
            with jax.transfer_guard("disallow"):
                pending = stage.step(step - 1, groups)
            if late is not None:
                late.wait()
                with pending.watch.beside("metrics"):
                    finish(step - 1, late, {})  # of the step before, while the device works on this one
            stage.balancer.see(stage.unseen)
            late, stops = pending, _stops(asked, heard)
            validates, saves = _due(config, step, total, stops)
            if validates or saves:
                pending.wait()  # what follows is no part of its time
                finish(step, pending, validate(stage.state, step) if validates else {})
                late = None
            if saves:
                checkpoints.best = stage.selection.best
                stage.session.run.push()  # first, so that the bucket has the rows of every checkpoint in it
                checkpoints.save(step, stage.sound_state(step), stage.kept(data))
            if stops or stage.selection.stops:
                say(f"{stage.name}: {'asked to stop' if stops else 'ends early'}; the checkpoint after step {step} is written")
                return


def _begin(stage: Stage, first: Floats, write: Write) -> None:
    """The validation before the first step."""
    write(0, first)
    if (accuracy := first.get("validation/discriminator_accuracy")) is not None:
        say(f"{stage.name}: begins with a discriminator that is right on {accuracy:.3f} of the held-out pairs (0.5 is chance)")


def _due(config: StageConfig, step: int, total: int, stops: bool) -> tuple[bool, bool]:
    """Whether a step is validated, and whether it has a checkpoint: where the best is selected, every validation has one."""
    validates, saves = (step % every == 0 or step == total for every in (config.validate_every, config.checkpoint_every))
    return validates, saves or stops or (validates and config.select is not None)


def _stops(asked: Callable[[], bool], heard: Callable[[], bool]) -> bool:
    """Whether to save this step and end. If SIGTERM has come to another process, it is from here on as if it had come to this one."""
    if heard() and not asked():
        signal.raise_signal(signal.SIGTERM)
    return heard()


def refuse_nan(stage: str, step: int, metrics: Floats) -> Floats:
    """The metrics of a step as they are.

    Raises:
        UserError: one is not finite; what was trained since the last checkpoint is worth nothing.
    """
    if name := next(iter(not_finite(metrics)), None):
        mend = "lower the learning rate; the same command goes on from the checkpoint before"
        raise UserError(f"stages.{stage}", f"{name} is {metrics[name]} in step {step}", mend)
    return metrics


def not_finite(metrics: Floats) -> list[str]:
    """The names of losses, gradients, scores, rewards and log-probabilities that are NaN or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value) and (name.endswith("/loss") or name.startswith(TRAINED))]


def summary(metrics: Floats) -> str:
    """A step's metrics in a few words."""
    words = {
        "student/loss": "loss",
        "discriminator/accuracy": "accuracy",
        "student/reward_mean": "reward",
        "student/entropy": "entropy",
        "rollout/length_mean": "length",
    }
    return "  ".join(f"{word} {metrics[name]:.3f}" for name, word in words.items() if name in metrics)
