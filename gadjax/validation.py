"""What a stage is told of held-out groups while it trains."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gadjax.algorithms.gad import common_scores, score_metrics
from gadjax.data.packing import Ids, pack
from gadjax.evaluation.answers import write_answers
from gadjax.evaluation.measure import measure
from gadjax.evaluation.samples import MODES
from gadjax.session import Session
from gadjax.sharding import is_first
from gadjax.steps import Programs, responses_of
from gadjax.types import PackedRows, Params, TrainState

Floats = dict[str, float]
STREAM = 2**31 - 1  # the step whose random streams validation samples from: always the same, and never a training step's
ANSWERS = 6  # held-out prompts whose answers are kept


class Validator:
    """Measures the first `evaluation.validation_groups` held-out groups, always the same way.

    Gives `validation/loss` (cross entropy of the teacher's answers, nats a token), all metrics that the evaluation has of the
    student's answers (`gadjax.evaluation.measure`), and, in a stage with a discriminator,
    `validation/discriminator_accuracy` and `validation/margin` on fresh samples and `discriminator/probe_gap`: the largest
    difference that the discriminator sees between a teacher's answer and its copy in the student's place, which must be 0.
    The greedy answers to the first prompts are kept in `<step>.jsonl`, as the evaluation keeps its own.

    Args:
        session: the run.
        programs: of the stage.
        kept: the folder of these answers.
    """

    def __init__(self, session: Session, programs: Programs, kept: Path):
        held_out = session.snapshot.validation
        self._examples = [held_out[index] for index in range(min(session.run.config.evaluation.validation_groups, len(held_out)))]
        self._session, self._programs, self._kept = session, programs, kept

    def __call__(self, state: TrainState, step: int) -> Floats:
        """The metrics by their names, after so many steps, and the seconds that they took."""
        begun = time.perf_counter()
        metrics = self._measured(state, step)
        return metrics | {"time/validation_seconds": time.perf_counter() - begun}

    def _measured(self, state: TrainState, step: int) -> Floats:
        prompts = [example.tokens.prompt for example in self._examples]
        teacher = [[example.tokens.teacher] for example in self._examples]
        loss = self._programs.teacher_loss(state.student.params, self._placed(pack(prompts, teacher, self._programs.rows(1, len(prompts)))))
        metrics = {"validation/loss": float(loss)} | self._answers(state.student.params, step)
        if state.discriminator is None:
            return metrics
        return metrics | self._discriminator(state.student.params, state.discriminator.params, prompts, teacher)

    def _answers(self, student: Params, step: int) -> dict[str, float]:
        """The metrics of the student's answers, on process 0. Only a tutor's need more than the greedy ones."""
        session = self._session
        modes = ["greedy"] if session.tutored is None else MODES
        answers = {mode: session.answerer.answer(student, self._examples, mode) for mode in modes}
        if not is_first():
            return {}
        write_answers(self._kept / f"{step}.jsonl", {"greedy": answers["greedy"].first(ANSWERS)}, session.tutored is not None)
        measured = measure(answers, session.run.config.evaluation.metrics, session.tutored)
        return {f"validation/{name}": metric.value for name, metric in measured.items()}

    def _discriminator(self, student: Params, discriminator: Params, prompts: Sequence[Ids], teacher: Sequence[Sequence[Ids]]) -> Floats:
        rollout = self._programs.sampler(student, prompts, self._session.key, STREAM)
        sampled, _ = responses_of(rollout)
        shape = self._programs.discriminator_rows(len(prompts))
        rows = self._placed(pack(prompts, [[*own, *others] for own, others in zip(teacher, sampled, strict=True)], shape))
        seen = score_metrics(common_scores(self._programs.score(discriminator, rows), rows.first_BJ))
        copies = self._placed(pack(prompts, [[*own] * (1 + self._programs.samples) for own in teacher], shape))
        probe = np.asarray(self._programs.score(discriminator, copies))
        return {
            "validation/discriminator_accuracy": float(seen["discriminator/accuracy"]),
            "validation/margin": float(seen["discriminator/margin"]),
            "discriminator/probe_gap": float(np.abs(probe[:, 1:] - probe[:, :1]).max()),
        }

    def _placed(self, rows: PackedRows) -> PackedRows:
        return self._session.models.place_rows(rows)
