"""SeqKD: cross entropy on the teacher's text (sequence-level knowledge distillation), the paper's baseline and warm-up.

L = - token-mean[ log p(y_t | x, y_<t) ]     at T = 1, over all response tokens of the global batch, end of turn included
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from gadjax.algorithms.forward import accumulate, response_log_probs, response_loss, sum_over
from gadjax.algorithms.stage import Algorithm, Guidance, OptimizerAt, StageConfig, StudentStep
from gadjax.models.decoder import Network
from gadjax.optimizer import update
from gadjax.types import Metrics, MicroBatch, PackedRows, Params, Role


class SeqkdConfig(StageConfig):
    """The supervised stage; by default the paper's, three epochs at 5e-6."""

    algorithm: str = "seqkd"
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=5e-6, gt=0)


def _micro_loss(network: Network, params: Params, micro: MicroBatch) -> tuple[jax.Array, Metrics]:
    loss, _, entropy_ML = response_loss(network, params, micro.cells, 1.0, jnp.negative)
    sums = {"student/loss": loss / micro.total, "student/entropy": jnp.sum(entropy_ML) / micro.total}
    return sums["student/loss"], sums


def make_loss(network: Network) -> Callable[[Params, PackedRows], jax.Array]:
    """Builds `loss(params, rows)`, the cross entropy in nats a token without its gradients."""

    def loss(params: Params, rows: PackedRows) -> jax.Array:
        return sum_over(lambda micro: _micro_loss(network, params, micro)[0], rows)

    return loss


def make_sequence_log_probs(network: Network) -> Callable[[Params, PackedRows], jax.Array]:
    """Builds `log_probs(params, rows) -> [B, J]`, log p(y | x) of each whole response at T = 1, end of turn included."""

    def log_probs(params: Params, rows: PackedRows) -> jax.Array:
        def of_micro_batch(micro: MicroBatch) -> jax.Array:
            cells = micro.cells
            logp_ML, _ = response_log_probs(network, params, cells, temperature=1.0)  # 0 outside of responses
            zeros_BJ = jnp.zeros(micro.here_BJ.shape, jnp.float32)
            return zeros_BJ.at[cells.groups_ML, jnp.maximum(cells.responses_ML, 0)].add(logp_ML)

        return sum_over(of_micro_batch, rows)

    return log_probs


def make_student_step(network: Network, optimizer: optax.GradientTransformation) -> StudentStep:
    """Builds `step(student, rows, guidance) -> (student, metrics)`; the rows hold prompt + teacher per group."""

    def step(role: Role, rows: PackedRows, guidance: Guidance) -> tuple[Role, Metrics]:
        del guidance
        grads, metrics = accumulate(lambda params, micro: _micro_loss(network, params, micro), role.params, rows)
        role, grad_norm = update(optimizer, role, grads, loss=metrics["student/loss"])
        return role, metrics | {"student/grad_norm": grad_norm}

    return step


def build(config: SeqkdConfig, optimizer_at: OptimizerAt, student: Network, discriminator: Network) -> Algorithm:
    """The algorithm of a `seqkd` stage."""
    del discriminator
    return Algorithm(student=make_student_step(student, optimizer_at(config.learning_rate)))
