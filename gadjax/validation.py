"""What a stage is told of held-out groups while it trains."""

from collections.abc import Sequence

import numpy as np

from gadjax.algorithms.gad import common_scores, score_metrics
from gadjax.data.packing import Ids, pack
from gadjax.records import TokenGroup
from gadjax.session import Session
from gadjax.steps import Programs, responses_of
from gadjax.types import PackedRows, TrainState

STREAM = 2**31 - 1  # the step whose random streams validation samples from: always the same, and never a training step's


class Validator:
    """Measures the first `evaluation.validation_groups` held-out groups, always the same way.

    Gives `validation/loss` (cross entropy of the teacher's answers, nats a token) and, in a stage with a discriminator,
    `validation/discriminator_accuracy` and `validation/margin` on fresh samples and `discriminator/probe_gap`: the largest
    difference that the discriminator sees between a teacher's answer and its copy in the student's place, which must be 0.
    """

    def __init__(self, session: Session, programs: Programs):
        held_out = session.snapshot.validation
        count = min(session.run.config.evaluation.validation_groups, len(held_out))
        self._groups: Sequence[TokenGroup] = [held_out[index].tokens for index in range(count)]
        self._models, self._programs, self._key = session.models, programs, session.key

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The metrics by their names."""
        prompts = [group.prompt for group in self._groups]
        teacher = [[group.teacher] for group in self._groups]
        metrics = {"validation/loss": float(self._programs.teacher_loss(state.student.params, self._rows(prompts, teacher)))}
        if state.discriminator is None:
            return metrics
        rollout = self._programs.sampler(state.student.params, prompts, self._key, STREAM)
        sampled, _ = responses_of(rollout)
        rows = self._rows(prompts, [own + others for own, others in zip(teacher, sampled, strict=True)])
        scores = self._programs.score(state.discriminator.params, rows)
        seen = score_metrics(common_scores(scores, rows.first_BJ))
        copies = self._rows(prompts, [own * (1 + self._programs.samples) for own in teacher])
        probe = np.asarray(self._programs.score(state.discriminator.params, copies))
        return metrics | {
            "validation/discriminator_accuracy": float(seen["discriminator/accuracy"]),
            "validation/margin": float(seen["discriminator/margin"]),
            "validation/length_mean": float(np.mean(rollout.lengths_BN)),
            "discriminator/probe_gap": float(np.abs(probe[:, 1:] - probe[:, :1]).max()),
        }

    def _rows(self, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> PackedRows:
        shape = self._programs.rows(len(responses[0]), groups=len(prompts))
        return self._models.place_rows(pack(prompts, responses, shape))
