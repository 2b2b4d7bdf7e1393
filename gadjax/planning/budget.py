"""Whether a stage can fit at all, by arithmetic, before anything is compiled; and the knob that would make it fit."""

from dataclasses import dataclass

from gadjax.chips import GIB
from gadjax.config import Config
from gadjax.models.rematerialisation import Rematerialise
from gadjax.models.row_attention import QUERIES
from gadjax.planning.programs import Traced, bytes_on_chip
from gadjax.planning.topology import Topology


@dataclass(frozen=True)
class Budget:
    """GiB on a chip.

    Attributes:
        residents: what lies there through the whole stage, by name.
        rollout: what a rollout adds: caches and a copy of the student in the compute dtype, of tied weights two.
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
    """The arithmetic of a stage. `compiles`: what it leaves out is told by a compiler."""
    programs, models = traced.programs, traced.programs.models
    student, judge = models.abstract_role(models.student), models.abstract_role(models.discriminator) if traced.judges else None
    shape, dims = programs.discriminator_rows() if traced.judges else programs.rows(1), traced.dims
    tokens = shape.rows * shape.length / traced.tokens_parts
    residents = {"base": models.base, "student": student, "discriminator": judge, "reference": traced.reference}
    rollout = {}
    if traced.judges:
        copy = traced.engine.weights(models.whole(models.student, student.params))
        rollout = {"caches": traced.engine.resident(traced.work.groups), "copy": copy}
    return Budget(
        residents={name: bytes_on_chip(held) / GIB for name, held in residents.items()},
        rollout={name: bytes_on_chip(held) / GIB for name, held in rollout.items()},
        step={
            "gradients": 2 * bytes_on_chip(student.params) / GIB,
            "activations": tokens * traced.kept * 2 * dims.layers / GIB,
            "attention": 0.0 if compiles or traced.fused else _scores(traced, tokens) / GIB,
        },
    )


def _scores(traced: Traced, tokens: float) -> float:
    """Bytes of a layer's scores where attention is in blocks: float32, with the weights that they become and the gradient of these."""
    data = traced.programs.data
    return 3 * 4 * tokens * traced.dims.heads * (data.max_prompt_tokens + data.max_response_tokens + QUERIES)


TRAINING = ("discriminator", "student")  # programs that compute gradients
LESS: dict[Rematerialise, str] = {
    False: "student.rematerialise=feed_forward or =true",
    "feed_forward": "student.rematerialise=true",
    True: "shorter rows: a smaller data.row_tokens",
}
_MORE = "take more chips: both models with their optimizers need as much as this, however the work is cut"


def knob(budget: Budget, config: Config, topology: Topology, program: str | None = None) -> str:
    """What to change so that it fits. `program`: the one that does not, by the compiler; None: by arithmetic."""
    room = topology.chip.memory / GIB - sum(budget.residents.values())
    if room <= budget.step["gradients"]:
        return _MORE if config.adapters else f"train adapters on one frozen base, adapters={{rank: 64}}, or {_MORE}"
    if program in TRAINING or sum(budget.step.values()) > room:
        return LESS[config.student.rematerialise]
    return "fewer decode slots: a smaller rollout.slots"
