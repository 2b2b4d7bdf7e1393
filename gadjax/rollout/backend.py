"""What answers prompts in a rollout: our engine (`gadjax.rollout.engine`), or another one behind the same two calls."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from gadjax.types import Params, Rollout


class RolloutBackend(Protocol):
    """Samples N responses to every prompt, under the sampling plan that it was made for.

    Attributes:
        exact: whether its log-probabilities are those of training to rounding. For one whose are not, training weighs its samples
            by the ratio.
    """

    exact: bool

    def update(self, params: Params, step: int) -> None:
        """From now on samples come from these parameters, which are those after `step` steps."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], key: jax.Array, step: int, limits_BN: np.ndarray | None = None) -> Rollout:
        """Samples for B prompts.

        Args:
            prompts: ids.
            key: of the run's rollouts.
            step: which of them this is.
            limits_BN: int32, the most tokens that each response may have; by default R.

        Returns:
            a Rollout of NumPy arrays. `versions_BN` are the steps that `update` was told.
        """
        ...
