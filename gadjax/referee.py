"""A discriminator that none of a run's students was trained against, as the judge of their answers.

It is another run's, trained apart with another seed, and reads texts with its own run's tokenizer and template.
"""

from dataclasses import dataclass

import jax
import numpy as np

from gadjax.errors import UserError
from gadjax.evaluation.measure import Metric
from gadjax.evaluation.samples import Samples
from gadjax.evaluation.statistics import by_prompt
from gadjax.prepare import student_folder
from gadjax.runs import Run
from gadjax.scoring import Scorer
from gadjax.session import Session

WHERE = "evaluation.referee"


@dataclass(frozen=True)
class Referee:
    """The discriminator of a trained stage.

    Attributes:
        session: of its run.
        scorer: of one teacher's and one student's answer to each prompt.
    """

    session: Session
    scorer: Scorer

    @classmethod
    def of(cls, origin: str, groups: int) -> "Referee":
        """The discriminator of `origin`, RUN/STAGE, for so many prompts at a time.

        Raises:
            UserError: there is none, or there are several processes, of which only the first has all answers.
        """
        if jax.process_count() > 1:
            raise UserError(WHERE, "scores in one process", "evaluate on one host: `gadjax evaluate` with the same config")
        run, stage = Run.find(origin)
        session = Session.open(run, student_folder(run))
        params = session.final_role(stage, "discriminator").params
        return cls(session, Scorer(session.models_of(stage), params, run.config.data, responses=2, groups=groups))

    def measure(self, samples: Samples) -> dict[str, Metric]:
        """`referee_wins`, the share of prompts on which the student's answer scores higher than the teacher's, a tie counting one half,
        and `referee_score`, the student's score itself: on no scale, good for differences between stages.
        """
        data, text = self.session.run.config.data, self.session.text
        prompts = [text.prompt_ids(prompt.messages, data.max_prompt_tokens) for prompt in samples.prompts]

        def ids(answer: str, truncated: bool = False) -> tuple[int, ...]:
            """A score is read at the last token: an answer that was cut off before any text has that of an empty one."""
            return text.response_ids(answer, data.max_response_tokens, truncated) or (text.end_of_turn,)

        answers = [
            [ids(teacher), ids(own, truncated)]
            for teacher, own, truncated in zip(samples.teacher, samples.texts, samples.truncated.tolist(), strict=True)
        ]
        teacher_n, student_n = np.array(self.scorer(prompts, answers)).T
        ties = np.array([one == two for one, two in answers])  # of which rounding might make wins
        wins_n = np.where(ties, 0.5, 0.5 * (1 + np.sign(student_n - teacher_n)))
        return {"referee_wins": _mean(samples, wins_n), "referee_score": _mean(samples, student_n)}


def _mean(samples: Samples, values_n: np.ndarray) -> Metric:
    prompts = by_prompt(samples.ids, values_n)
    return Metric(float(np.mean(list(prompts.values()))), prompts)
