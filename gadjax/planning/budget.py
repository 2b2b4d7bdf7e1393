"""Whether a stage can fit at all, by arithmetic, before anything is compiled."""

from dataclasses import dataclass
from typing import Literal

from gadjax.chips import GIB
from gadjax.models.row_attention import QUERIES
from gadjax.planning.programs import Traced, bytes_on_chip

Moment = Literal["loading", "rollout", "step"]
WHEN: dict[str, Moment] = {"loading": "loading", "discriminator": "step", "student": "step"}  # programs; the others are a rollout's


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
        return max(self.during("rollout"), self.during("step"))

    def during(self, moment: Moment) -> float:
        """While this goes on; when weights are loaded, nothing but these is there."""
        beside = {"rollout": self.rollout, "step": self.step}.get(moment, {})
        return sum(self.residents.values()) + sum(beside.values())


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
