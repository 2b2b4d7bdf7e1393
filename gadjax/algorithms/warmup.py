"""The warm-up before GAD: cross entropy for the student, Bradley-Terry on its fresh samples for the discriminator.

The paper's section 2: without it the discriminator tells the two apart at a glance and its scores teach nothing. In the
first steps the discriminator learns alone.
"""

from pydantic import Field

from gadjax.algorithms import gad, seqkd
from gadjax.algorithms.stage import Algorithm, DiscriminatorConfig, OptimizerAt, SamplingStageConfig
from gadjax.models.decoder import Network


class WarmupDiscriminatorConfig(DiscriminatorConfig):
    """The discriminator of a warm-up.

    Attributes:
        only_first_steps: steps at the beginning in which the discriminator learns and the student does not. With as many as the
            stage has (`max_steps: 800, discriminator: {only_first_steps: 800}`) or more the student stays as it came: the ablation
            without a student's warm-up.
    """

    only_first_steps: int = Field(default=10, ge=0)


class WarmupConfig(SamplingStageConfig):
    """The stage that warms both models up; by default the paper's, one epoch at 5e-6."""

    algorithm: str = "warmup"
    learning_rate: float = Field(default=5e-6, gt=0)
    discriminator: WarmupDiscriminatorConfig = WarmupDiscriminatorConfig()  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen: it is only read


def build(config: WarmupConfig, optimizer_at: OptimizerAt, student: Network, discriminator: Network) -> Algorithm:
    """The algorithm of a `warmup` stage."""
    return Algorithm(
        student=seqkd.make_student_step(student, optimizer_at(config.learning_rate)),
        discriminator=gad.make_discriminator_step(discriminator, optimizer_at(config.discriminator.learning_rate), config.discriminator),
        student_begins=config.discriminator.only_first_steps,
    )
