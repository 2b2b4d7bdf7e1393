"""The config section `evaluation`."""

from typing import Literal

from pydantic import Field

from gadjax.evaluation.judge import JudgeConfig
from gadjax.section import Section

TextMetric = Literal["rouge_l", "overlap"]


class EvaluationConfig(Section):
    """How stages are measured.

    Attributes:
        metrics: how answers are compared with the teacher's; what needs no comparison is always measured.
        validation_groups: held-out groups that a stage looks at while it trains.
        batch_groups: prompts answered at a time in the evaluation after training.
        stages: the stages in the table, in this order, besides the untouched `student`; all of them by default.
        best_of: with more than 1, every stage also answers so often at T = 0.8, and a discriminator chooses: what does it add?
        discriminator: the stage whose discriminator does; by default the last one that has one.
        referee: RUN/STAGE of another run, whose discriminator scores the greedy answers; null: none.
        judge: a model that compares answers (`gadjax judge RUN`); null: none.
        export: the stage that is exported at the end of a run; the last one by default.
    """

    metrics: tuple[TextMetric, ...] = Field(default=("rouge_l", "overlap"), strict=False)
    validation_groups: int = Field(default=128, ge=1)
    batch_groups: int = Field(default=128, ge=1)
    stages: tuple[str, ...] | None = Field(default=None, strict=False)  # YAML has lists
    best_of: int = Field(default=1, ge=1, le=64)
    discriminator: str | None = None
    referee: str | None = None
    judge: JudgeConfig | None = None
    export: str | None = None
