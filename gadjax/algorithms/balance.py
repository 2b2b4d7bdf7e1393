"""The balance between the two models: how fast the discriminator learns, and what of its scores the student hears.

Everything is chosen when a step is built (`advantages`, `rewards`) or outside of the steps (`Balancer`); no step branches on it.

    reward      r_i = D(x, y_i) - λ |log(len y_i / len y)|                                       y: the teacher's response
    advantage   A_i = (r_i - mean r) / (s + 1e-6)       s: std of the group (z_score), 1 (none), or a running mean of the stds (running)
    rate        of the discriminator: 1; above the band of accuracies 0 (skip), or falling to 0 (rate); below it the student waits
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from gadjax import losses
from gadjax.section import Section
from gadjax.types import Metrics

DECAY = 0.9  # of the running means, per step


class BalanceConfig(Section):
    """The balance of a `gad` stage; by default the paper's, in which nothing is regulated.

    Attributes:
        discriminator_steps: steps of the discriminator for each of the student's; every one has samples of its own, and counts.
        accuracy_band: the accuracies between which the discriminator is to stay, [low, high]. Above, it learns less; below, the
            student waits. Null: no band.
        control: above the band the discriminator skips its updates (`skip`), or its rate falls to 0 as the accuracy goes to 1 (`rate`).
        reward_scaling: what advantages are divided by: the group's own spread (`z_score`), nothing (`none`), or the mean spread of
            the last steps (`running`), so that a group whose answers are alike teaches little.
        length_weight: λ, the price of a response that is longer or shorter than the teacher's.
    """

    discriminator_steps: int = Field(default=1, ge=1)
    accuracy_band: tuple[float, float] | None = Field(default=None, strict=False)
    control: Literal["skip", "rate"] = "skip"
    reward_scaling: Literal["z_score", "none", "running"] = "z_score"
    length_weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _the_band_is_one(self) -> "BalanceConfig":
        if self.accuracy_band is not None and not 0 <= self.accuracy_band[0] < self.accuracy_band[1] <= 1:
            raise ValueError("accuracy_band must be [low, high] with 0 <= low < high <= 1")
        return self


Rewards = Callable[[jax.Array, jax.Array], jax.Array]
Advantages = Callable[[jax.Array, jax.Array], jax.Array]


def make_rewards(config: BalanceConfig) -> Rewards:
    """Builds `rewards(scores_BJ, lengths_BJ) -> [B, N]`; the teacher is first."""

    def plain(scores_BJ: jax.Array, lengths_BJ: jax.Array) -> jax.Array:
        del lengths_BJ
        return scores_BJ[:, 1:]

    def priced(scores_BJ: jax.Array, lengths_BJ: jax.Array) -> jax.Array:
        logs_BJ = jnp.log(lengths_BJ.astype(jnp.float32))
        return scores_BJ[:, 1:] - config.length_weight * jnp.abs(logs_BJ[:, 1:] - logs_BJ[:, :1])

    return priced if config.length_weight else plain


def make_advantages(config: BalanceConfig) -> Advantages:
    """Builds `advantages(rewards_BN, running) -> [B, N]`; `running` is the mean spread of the last steps, 0 before the first."""

    def z_score(rewards_BN: jax.Array, running: jax.Array) -> jax.Array:
        del running
        return losses.group_advantages(rewards_BN)

    def none(rewards_BN: jax.Array, running: jax.Array) -> jax.Array:
        del running
        return losses.group_spread(rewards_BN)[0]

    def by_running(rewards_BN: jax.Array, running: jax.Array) -> jax.Array:
        centred_BN, spread_B = losses.group_spread(rewards_BN)
        return centred_BN / (jnp.where(running > 0, running, jnp.mean(spread_B)) + 1e-6)

    return {"z_score": z_score, "none": none, "running": by_running}[config.reward_scaling]


def reward_metrics(rewards_BN: jax.Array) -> Metrics:
    """The rewards' mean, their spread within groups, and the share of groups without any."""
    _, spread_B = losses.group_spread(rewards_BN)
    return {
        "student/reward_mean": jnp.mean(rewards_BN),
        "student/reward_std": jnp.mean(spread_B),
        "rollout/zero_std_fraction": jnp.mean((spread_B == 0).astype(jnp.float32)),
    }


class Balancer:
    """What is regulated from step to step, on the host.

    It knows the steps whose metrics it has seen, and is as deterministic as these; `state` goes into checkpoints.

    Attributes:
        state: running means by the metric's name.
    """

    def __init__(self, config: BalanceConfig | None = None):
        self._config = config or BalanceConfig()
        self.state: dict[str, float] = {}

    def see(self, metrics: Mapping[str, float]) -> None:
        """Takes a finished step into account."""
        for name in ("discriminator/accuracy", "student/reward_std"):
            if math.isfinite(metrics.get(name, math.nan)):
                before = self.state.get(name, metrics[name])
                self.state[name] = DECAY * before + (1 - DECAY) * metrics[name]

    @property
    def rate(self) -> float:
        """The factor of the discriminator's learning rate; with 0 it is not updated at all."""
        accuracy, band = self.state.get("discriminator/accuracy"), self._config.accuracy_band
        if band is None or accuracy is None or accuracy <= band[1]:
            return 1.0
        return 0.0 if self._config.control == "skip" else (1 - accuracy) / (1 - band[1])

    @property
    def changes_rate(self) -> bool:
        """Whether the rate may be another one than 0 and 1."""
        return self._config.accuracy_band is not None and self._config.control == "rate"

    @property
    def metrics(self) -> dict[str, float]:
        """What is regulated, for `metrics.jsonl`."""
        return {"discriminator/rate": self.rate} if self._config.accuracy_band is not None else {}

    @property
    def spread(self) -> float:
        """The mean spread of the rewards; 0 before the first step."""
        return self.state.get("student/reward_std", 0.0)

    def student_learns(self, index: int) -> bool:
        """Whether the student learns in a step; `index` counts from 0 in the steps in which it may."""
        accuracy, band = self.state.get("discriminator/accuracy"), self._config.accuracy_band
        sees = band is None or accuracy is None or accuracy >= band[0]
        return sees and (index + 1) % self._config.discriminator_steps == 0
