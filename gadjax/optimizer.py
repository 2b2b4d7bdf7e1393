"""The optimizer of both models: AdamW behind a global-norm clip, from a config to an optax chain."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from gadjax.section import Section
from gadjax.types import Params, Role


class OptimizerConfig(Section):
    """AdamW as the paper's code sets it, for both models and every stage; the learning rate belongs to the stage.

    Attributes:
        weight_decay: decoupled.
        decay: which parameters decay: `all` (as the paper's code does), or only `matrices`, not norms and biases.
        clip_norm: bound of the gradient's global norm.
        b1: decay of the first moment.
        b2: decay of the second moment.
    """

    weight_decay: float = Field(default=0.01, ge=0)
    decay: Literal["all", "matrices"] = "all"
    clip_norm: float = Field(default=0.2, gt=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.999, ge=0, lt=1)


class ScheduleConfig(Section):
    """How a stage's learning rates move from its first step to its last; the same way for both models.

    Attributes:
        shape: `constant` (the paper's), or `cosine` from the rate down to `floor`.
        warmup_steps: steps in which the rate rises linearly to its full height.
        floor: share of the rate at the end of `cosine`.
    """

    shape: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)

    def of(self, rate: float, steps: int, updates: int = 1) -> optax.Schedule:
        """The learning rate by update in a stage of `steps` steps of so many updates; `rate` is its height."""
        rise = optax.linear_schedule(rate / (self.warmup_steps + 1), rate, self.warmup_steps)
        if self.shape == "constant":
            rest = optax.constant_schedule(rate)
        else:
            rest = optax.cosine_decay_schedule(rate, max(1, steps - self.warmup_steps), self.floor)
        by_step = optax.join_schedules([rise, rest], [self.warmup_steps]) if self.warmup_steps else rest
        return lambda count: by_step(jnp.floor_divide(count, updates))


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW; parameters and moments in float32. The shape of its state does not depend on the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=matrices if config.decay == "matrices" else None
        ),
    )


def matrices(params: Params) -> Params:
    """True for the parameters that are neither norms nor biases; their names tell."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(("norm", "bias")), params)


def restart_schedule(state: optax.OptState) -> optax.OptState:
    """The optimizer's state with its moments as they are and its schedule at the first step, where a new stage begins."""

    def restart(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            count: Any = node.count
            return node._replace(count=jnp.zeros_like(count, device=count.sharding))
        return node

    return jax.tree.map(restart, state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def update(
    optimizer: optax.GradientTransformation, role: Role, grads: Params, rate: jax.Array | None = None, loss: jax.Array | None = None
) -> tuple[Role, jax.Array]:
    """One optimizer step, `rate` times as long where there is one. Returns the new role and the gradients' global norm before clipping.

    Where that norm, or the `loss`, is not finite the role stays as it is and the norm is NaN.
    """
    # optax mixes dtypes inside (counts and float32 moments), which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, role.optimizer, role.params)
        updates = updates if rate is None else jax.tree.map(lambda update: rate * update, updates)
        params: Any = optax.apply_updates(role.params, updates)
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(norm if loss is None else norm + loss)
        role = jax.tree.map(lambda new, old: jnp.where(sound, new, old), Role(params, state), role)
        return role, jnp.where(sound, norm, jnp.nan)
