"""Which checkpoint of a stage is its outcome: the last one, or the best by a metric of the validation; and when a stage ends early."""

import math
from collections.abc import Mapping
from typing import Any

from gadjax.algorithms.stage import SelectionConfig
from gadjax.errors import UserError
from gadjax.sharding import agreed, is_first

LOWER_IS_BETTER = ("loss", "reverse_kl", "margin", "discriminator_accuracy")  # the last two: the harder to tell apart from the teacher


class Selection:
    """The best step so far.

    Args:
        config: of the stage; None, and the last step is the outcome.
        stage: its name.

    Attributes:
        best: the step that is best so far; 0 before the first validation.
        value: of the metric there, on process 0.
        waited: validations since.
    """

    def __init__(self, config: SelectionConfig | None, stage: str):
        self._config, self._stage = config, stage
        self.best, self.value, self.waited = 0, math.nan, 0

    @property
    def on(self) -> bool:
        """Whether there is something to select."""
        return self._config is not None

    @property
    def stops(self) -> bool:
        """Whether the stage has waited long enough for a better value."""
        return self._config is not None and self._config.patience is not None and self.waited >= self._config.patience

    @property
    def told(self) -> str:
        """What became of it, in words."""
        early = f"ended early after {self.waited} validations that were no better; " if self.stops else ""
        return f"{early}the outcome is step {self.best}"

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": self.best, "value": None if math.isnan(self.value) else self.value, "waited": self.waited, "stops": self.stops}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
        self.value = math.nan if state["value"] is None else state["value"]

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes note of a validation, whose metrics process 0 has.

        Raises:
            UserError: the validation has no such metric.
        """
        if self._config is None:
            return
        name = f"validation/{self._config.metric}"
        if is_first() and name not in metrics:
            known = ", ".join(sorted(key.removeprefix("validation/") for key in metrics if key.startswith("validation/")))
            raise UserError(f"stages.{self._stage}.select.metric", f"{self._config.metric} is not measured", f"use one of {known}")
        value = metrics.get(name, math.nan)
        sign = -1 if self._config.metric in LOWER_IS_BETTER else 1
        if agreed(math.isnan(self.value) or sign * value > sign * self.value):
            self.best, self.value, self.waited = step, value, 0
        else:
            self.waited += 1
