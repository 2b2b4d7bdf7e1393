"""The optimizer of both models: AdamW behind a global-norm clip, from a config to an optax chain."""

from typing import Any

import jax
import optax
from pydantic import Field

from gadjax.section import Section
from gadjax.types import Params, Role


class OptimizerConfig(Section):
    """AdamW as the paper's code sets it, for both models and every stage; the learning rate belongs to the stage.

    Attributes:
        weight_decay: decoupled; on every parameter.
        clip_norm: bound of the gradient's global norm.
        b1: decay of the first moment.
        b2: decay of the second moment.
    """

    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=0.2, gt=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.999, ge=0, lt=1)


def make_optimizer(config: OptimizerConfig, learning_rate: float) -> optax.GradientTransformation:
    """Clip, then AdamW at a constant rate; parameters and moments in float32. Its state does not depend on the rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def update(optimizer: optax.GradientTransformation, role: Role, grads: Params) -> tuple[Role, jax.Array]:
    """One optimizer step. Returns the new role and the gradients' global norm before clipping."""
    # optax mixes dtypes inside (counts and float32 moments), which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, role.optimizer, role.params)
        params: Any = optax.apply_updates(role.params, updates)
        return Role(params, state), optax.tree.norm(grads)
