"""Whether a stage can fit at all, by arithmetic, before anything is compiled; and the knob that would make it fit."""

from dataclasses import dataclass

from gadjax.config import Config
from gadjax.models.row_attention import QUERIES
from gadjax.planning.programs import Traced, bytes_on_chip
from gadjax.planning.topology import GIB, Topology


@dataclass(frozen=True)
class Budget:
    """GiB on a chip.

    Attributes:
        residents: what lies there through the whole stage, by name.
        rollout: what a rollout adds: caches and a copy of the student in the compute dtype.
        step: what the largest step of training adds at least: two sets of gradients and what a layer's gradient needs of the forward;
            where no compiler tells it, the scores of a layer's attention too.
    """

    residents: dict[str, float]
    rollout: dict[str, float]
    step: dict[str, float]

    @property
    def needed(self) -> float:
        """At the worst moment."""
        return sum(self.residents.values()) + max(sum(self.rollout.values()), sum(self.step.values()))


def budget_of(traced: Traced, compiles: bool = True) -> Budget:
    """The arithmetic of a stage that samples. `compiles`: what it leaves out is told by a compiler."""
    programs, models = traced.programs, traced.programs.models
    student, judge = models.abstract_role(models.student), models.abstract_role(models.discriminator)
    caches = traced.engine.resident(traced.work.groups)
    shape, dims = programs.discriminator_rows(), traced.dims
    tokens = shape.rows * shape.length / traced.tokens_parts
    return Budget(
        residents={
            "base": bytes_on_chip(models.base) / GIB,
            "student": bytes_on_chip(student) / GIB,
            "discriminator": bytes_on_chip(judge) / GIB,
            "reference": bytes_on_chip(traced.reference) / GIB,
        },
        rollout={
            "caches": bytes_on_chip(caches) / GIB,
            "copy": bytes_on_chip(traced.engine.weights(models.whole(models.student, student.params))) / GIB,
        },
        step={
            "gradients": 2 * bytes_on_chip(student.params) / GIB,
            "activations": tokens * dims.width * 2 * dims.layers * (1 if traced.rematerialise else 12) / GIB,
            "attention": 0.0 if compiles else _scores(traced, tokens) / GIB,
        },
    )


def _scores(traced: Traced, tokens: float) -> float:
    """Bytes of a layer's scores where attention is in blocks: float32, with the weights that they become and the gradient of these."""
    data = traced.programs.data
    return 3 * 4 * tokens * traced.dims.heads * (data.max_prompt_tokens + data.max_response_tokens + QUERIES)


_MORE = "take more chips: both models with their optimizers need as much as this, however the work is cut"


def knob(budget: Budget, config: Config, topology: Topology) -> str:
    """What to change so that it fits."""
    room = topology.chip.memory / GIB - sum(budget.residents.values())
    if room <= budget.step["gradients"]:
        return _MORE if config.adapters else f"train adapters on one frozen base, adapters={{rank: 64}}, or {_MORE}"
    if budget.step["activations"] + budget.step["attention"] > room - budget.step["gradients"]:
        return "student.rematerialise=true" if not config.student.rematerialise else "shorter rows: a smaller data.row_tokens"
    return "fewer decode slots: a smaller rollout.slots"
