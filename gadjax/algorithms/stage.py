"""What every algorithm offers to the training loop, and what every stage of a config has.

An algorithm is one file with a config class (a `StageConfig`) and `build(config, optimizer_at, student, discriminator) ->
Algorithm`. The loop knows no more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax
from pydantic import Field, model_validator

from gadjax.algorithms.balance import BalanceConfig
from gadjax.models.fresh import SizeConfig
from gadjax.optimizer import ScheduleConfig
from gadjax.section import Section
from gadjax.types import Metrics, PackedRows, Params, Role


class DiscriminatorConfig(Section):
    """The discriminator of a stage.

    Attributes:
        learning_rate: its height; the stage's schedule moves it.
        train: whether it goes on learning; false is the paper's off-policy study.
        from_: where its parameters and optimizer come from: a stage, RUN/STAGE of another run, the folder of an exported
            discriminator or of a language model with the student's tokenizer, of any size, or `student` for a copy of the stage's first
            student with a fresh head. By default the stage's own `from` if that has a discriminator, else `student`.
        random: a fresh discriminator of these dimensions instead.
        loss: `bradley_terry`, the paper's, compares teacher and student on one prompt; `cross_entropy` says of each alone whose it is.
            The score is then the log-odds of the teacher. The head has no bias for it: nearly all responses end with the same token, and
            what the trunk makes of that is one.
        label_smoothing: ε, the share of a pair that counts as its reverse; it bounds the margin.
    """

    learning_rate: float = Field(default=1e-6, gt=0)
    train: bool = True
    from_: str | None = Field(default=None, alias="from")
    random: SizeConfig | None = None
    loss: Literal["bradley_terry", "cross_entropy"] = "bradley_terry"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _from_or_random(self) -> "DiscriminatorConfig":
        if self.random is not None and self.from_ is not None:
            raise ValueError("has both `from` and `random`: leave one out")
        return self


class SelectionConfig(Section):
    """The checkpoint that counts as the outcome of a stage: what later stages start from, what is evaluated, served and exported.

    Attributes:
        metric: of the validation, by its name after `validation/`, for example `rouge_l`; its best value is looked for.
        patience: validations in a row without a better value after which the stage ends; null: it goes on to its last step.
    """

    metric: str
    patience: int | None = Field(default=None, ge=1)


class StageConfig(Section):
    """What every stage has.

    Attributes:
        algorithm: its name in `gadjax.algorithms.registry`.
        from_: the student that it starts from: an earlier stage, `student` for the untouched one, RUN/STAGE of another run,
            or a Hugging Face folder of the same family and size.
        epochs: passes over the training groups.
        max_steps: bound on the steps, or null.
        batch_groups: B, groups per step.
        learning_rate: the student's, at its height.
        schedule: how the learning rates move.
        checkpoint_every: steps between checkpoints; the last step always has one.
        validate_every: steps between validations.
        select: the best checkpoint is the outcome, and each validation makes one; null: the last one is.
        keep: the newest checkpoints that are kept, besides the best; null: all.
    """

    algorithm: str
    from_: str = Field(default="student", alias="from")
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_groups: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=50, ge=1)
    select: SelectionConfig | None = None
    keep: int | None = Field(default=2, ge=2)


class SamplingStageConfig(StageConfig):
    """A stage that samples responses from the student.

    Attributes:
        group_size: N, student responses per group; group attention on TPU numbers no more than 1,023.
        temperature: T of the samples.
        top_k: the likeliest tokens that they are drawn from; null: all. Log-probabilities are of the whole vocabulary all the same.
        top_p: the share of the mass that they are drawn from, after `top_k`.
        discriminator: its discriminator.
    """

    group_size: int = Field(default=8, ge=1, le=1000)
    temperature: float = Field(default=0.8, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class Guidance(NamedTuple):
    """What the student's step may go by, besides its rows.

    Attributes:
        reference: the student's parameters at the start of the stage.
        scores_BJ: the discriminator's scores of this batch before its update, teacher first.
        lengths_BJ: int32 tokens of the same responses.
        spread: float32 mean spread of the rewards in the steps before; 0 in the first.
    """

    reference: Params | None
    scores_BJ: jax.Array | None
    lengths_BJ: Any = None
    spread: Any = None


class OptimizerAt(Protocol):
    """Makes the optimizer of a stage: `rate` is its learning rate's height, `updates` how often a step updates with it."""

    def __call__(self, rate: float, updates: int = 1) -> optax.GradientTransformation:
        """The optimizer."""
        ...


JudgeStep = Callable[..., tuple[Role, jax.Array, Metrics]]
StudentStep = Callable[[Role, PackedRows, Guidance], tuple[Role, Metrics]]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One step of a stage, as pure functions.

    Attributes:
        student: (student, rows, guidance) -> (student, metrics).
        discriminator: (discriminator, rows of teacher and samples, rate) -> (discriminator, scores_BJ, metrics), or None in a
            stage without one. A stage that has one samples. `rate` may be left out; it is a factor of the learning rate.
        student_reads: the responses in the student's rows: the teacher's, or its own samples.
        student_begins: the first step, counted from 0, in which the student learns.
        needs_reference: whether `student` reads `Guidance.reference`.
        balance: what is regulated from step to step.
    """

    student: StudentStep
    discriminator: JudgeStep | None = None
    student_reads: str = "teacher"
    student_begins: int = 0
    needs_reference: bool = False
    balance: BalanceConfig = field(default_factory=BalanceConfig)
