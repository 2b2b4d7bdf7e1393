"""What a stage answered to the validation prompts, in one way of decoding."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from gadjax.records import Prompt

BEST_OF = "best_of"  # the discriminator's choice among several samples at BEST_OF_TEMPERATURE
BEST_OF_TEMPERATURE = 0.8
MODES = {"greedy": 0.0, "sampled_0_8": 0.8, "sampled_1_0": 1.0}  # a way of decoding: its temperature, over the whole vocabulary


@dataclass(frozen=True, eq=False)
class Samples:
    """n answers of one stage in one way of decoding; a prompt may be answered more than once.

    Attributes:
        prompts: what each answers.
        teacher: the teacher's answer to that prompt.
        texts: the answer, without its end of turn.
        log_probs: f64[n], log-probability of the whole answer, its end of turn included, at temperature 1, in nats.
        lengths: int[n], its tokens, the end of turn included.
        truncated: bool[n], it reached the length limit and has no end of turn.
    """

    prompts: tuple[Prompt, ...]
    teacher: tuple[str, ...]
    texts: tuple[str, ...]
    log_probs: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray

    def __post_init__(self):
        columns = (self.teacher, self.texts, self.log_probs, self.lengths, self.truncated)
        if {len(column) for column in columns} != {len(self.prompts)}:
            raise ValueError(f"{len(self.prompts)} prompts have columns of {[len(column) for column in columns]}")

    def first(self, count: int) -> Self:
        """The first `count` answers, or all where there are fewer."""
        return type(self)(**{column.name: getattr(self, column.name)[:count] for column in fields(self)})

    @property
    def ids(self) -> list[str]:
        """The prompt's id of each answer."""
        return [prompt.id for prompt in self.prompts]
