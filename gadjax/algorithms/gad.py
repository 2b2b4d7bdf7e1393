"""GAD: the student is trained by GRPO on the discriminator's scores, while the discriminator goes on learning.

*Black-Box On-Policy Distillation of Large Language Models*, arXiv 2511.10643. For B groups of one prompt x, one teacher
response y and N student responses ŷ_i, sampled at temperature T:

    D(x, y)   = w · h(x ⊕ y)[last token]
    L_D       = mean over b, i of  -log σ( D(x_b, y_b) - D(x_b, ŷ_bi) )
    r_bi      = D(x_b, ŷ_bi), from the same forward, before D is updated
    A_bi      = (r_bi - mean_i r_bi) / (std_i r_bi + 1e-6)
    ρ         = exp(logp - logp_old)
    L_G       = - token-mean[ min(ρ A, clip(ρ, 1 - 0.2, 1 + 0.2) A) ] + β · token-mean[ k3(logp_ref - logp) ]

Where it departs from textbook GRPO: the token mean is over all response tokens of the global batch (no division by each
response's length); the clip is dual (c = 3 where A < 0); with one update per rollout logp_old = stop_gradient(logp). Where a sampler's
probabilities are not the trainer's, each token's surrogate is weighed by min(exp(logp_old - logp_sampler), C), logp_old the trainer's.
Identical responses of a group get one common score before the advantage, or rounding would become advantages.

Letters: B groups, J = 1 + N responses of a group with the teacher's first, N student responses, M rows, L tokens of a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from gadjax import losses
from gadjax.algorithms.balance import BalanceConfig, make_advantages, make_rewards, reward_metrics
from gadjax.algorithms.forward import accumulate, response_log_probs, response_loss, response_mask, response_scores, sum_over
from gadjax.algorithms.stage import Algorithm, DiscriminatorConfig, Guidance, JudgeStep, OptimizerAt, SamplingStageConfig, StudentStep
from gadjax.models.decoder import Network
from gadjax.optimizer import update
from gadjax.types import Metrics, MicroBatch, PackedRows, Params, Role

Score = Callable[[Params, PackedRows], jax.Array]


class GadConfig(SamplingStageConfig):
    """The adversarial stage; by default the paper's, two epochs at 1e-6.

    Attributes:
        group_size: N; at least 2, because an advantage compares responses of one group.
        kl_weight: β; with 0 there is no reference, neither in memory nor in the step, and no `student/kl`.
        updates_per_rollout: optimizer updates on one batch of samples; with more than one, logp_old is the sampler's.
        importance_cap: C, for a rollout backend that is not exact; logp_old is then the trainer's. None: no weights.
        balance: between the two models.
    """

    algorithm: str = "gad"
    epochs: int = Field(default=2, ge=1)
    group_size: int = Field(default=8, ge=2)
    kl_weight: float = Field(default=0.001, ge=0)
    updates_per_rollout: int = Field(default=1, ge=1)
    importance_cap: float | None = Field(default=None, ge=1)
    balance: BalanceConfig = BalanceConfig()


def common_scores(scores_BJ: jax.Array, first_BJ: jax.Array) -> jax.Array:
    """Gives identical responses of a group the score of the first of them, so that a tie is exactly a tie. [B, J]."""
    return jnp.take_along_axis(scores_BJ, first_BJ, axis=1)


def score_metrics(scores_BJ: jax.Array) -> Metrics:
    """What the scores say of the discriminator; ties count one half in the accuracy."""
    teacher_B1, student_BN = scores_BJ[:, :1], scores_BJ[:, 1:]
    margin_BN = teacher_B1 - student_BN
    return {
        "discriminator/accuracy": jnp.mean(0.5 * (1.0 + jnp.sign(margin_BN))),
        "discriminator/teacher_score": jnp.mean(teacher_B1),
        "discriminator/student_score": jnp.mean(student_BN),
        "discriminator/margin": jnp.mean(margin_BN),
    }


def make_score(network: Network) -> Score:
    """Builds `score(params, rows) -> scores_BJ`, the discriminator's own score of every response, without gradients."""

    def score(params: Params, rows: PackedRows) -> jax.Array:
        return sum_over(lambda micro: response_scores(network, params, micro), rows)

    return score


def make_discriminator_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    config: DiscriminatorConfig = DiscriminatorConfig(),  # noqa: B008 (it is frozen)
) -> JudgeStep:
    """Builds `step(discriminator, rows, rate=None) -> (discriminator, scores_BJ, metrics)`.

    The rows hold prompt + teacher + N students per group. One forward gives the loss and the scores, which are those before
    the update. With `train: false` (the paper's off-policy study) the discriminator scores and stays as it is.
    """
    score, pair_loss, smoothing = make_score(network), losses.PAIR_LOSSES[config.loss], config.label_smoothing

    def loss(params: Params, micro: MicroBatch) -> tuple[jax.Array, jax.Array]:
        scores_BJ = response_scores(network, params, micro)
        pairs_BN = pair_loss(scores_BJ[:, 0], scores_BJ[:, 1:], smoothing)
        return jnp.sum(jnp.where(micro.here_BJ[:, 1:], pairs_BN, 0.0)) / pairs_BN.size, scores_BJ

    def metrics_of(scores_BJ: jax.Array) -> Metrics:
        pairs_BN = pair_loss(scores_BJ[:, 0], scores_BJ[:, 1:], smoothing)
        return score_metrics(scores_BJ) | {"discriminator/loss": jnp.mean(pairs_BN)}

    def step(role: Role, rows: PackedRows, rate: jax.Array | None = None) -> tuple[Role, jax.Array, Metrics]:
        grads, raw_BJ = accumulate(loss, role.params, rows)
        scores_BJ = common_scores(raw_BJ, rows.first_BJ)
        metrics = metrics_of(scores_BJ)
        role, grad_norm = update(optimizer, role, grads, rate, metrics["discriminator/loss"])
        return role, scores_BJ, metrics | {"discriminator/grad_norm": grad_norm}

    def frozen_step(role: Role, rows: PackedRows, _: jax.Array | None = None) -> tuple[Role, jax.Array, Metrics]:
        scores_BJ = common_scores(score(role.params, rows), rows.first_BJ)
        return role, scores_BJ, metrics_of(scores_BJ)

    return step if config.train else frozen_step


def _share(values_ML: jax.Array, micro: MicroBatch) -> jax.Array:
    """A micro-batch's share of the token mean of the whole batch."""
    return jnp.sum(jnp.where(response_mask(micro.cells), values_ML, 0.0)) / micro.total


def make_student_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    kl_weight: float,
    updates: int = 1,
    importance_cap: float | None = None,
    balance: BalanceConfig = BalanceConfig(),  # noqa: B008 (it is frozen)
) -> StudentStep:
    """Builds `step(student, rows, guidance) -> (student, metrics)`; the rows hold prompt + N students per group.

    With several `updates` the metrics are those of the last one, but the gap to the sampler is that of the first.
    """
    rewards, advantages = make_rewards(balance), make_advantages(balance)

    def of_tokens(
        logp: jax.Array, sampled: jax.Array, before: jax.Array, advantage: jax.Array, logp_ref: jax.Array | None = None
    ) -> Metrics:
        logp_old = jax.lax.stop_gradient(logp) if updates == 1 else before
        surrogate, clipped = losses.clipped_surrogate(logp - logp_old, advantage)
        if importance_cap is not None:
            surrogate *= losses.truncated_importance(logp_old, sampled, importance_cap)
        seen = {"student/loss": surrogate, "student/clip_fraction": clipped}
        if logp_ref is not None:
            kl = losses.k3(logp_ref, logp)
            seen |= {"student/loss": surrogate + kl_weight * kl, "student/kl": kl}
        return seen

    def step(role: Role, rows: PackedRows, guidance: Guidance) -> tuple[Role, Metrics]:
        reference, scores_BJ = guidance.reference, guidance.scores_BJ
        assert scores_BJ is not None and (reference is None) == (kl_weight == 0)
        rewards_BN = rewards(scores_BJ, guidance.lengths_BJ)
        advantages_BN, first = advantages(rewards_BN, guidance.spread), role.params
        recomputed = importance_cap is not None and updates > 1

        def loss(params: Params, micro: MicroBatch) -> tuple[jax.Array, Metrics]:
            cells = micro.cells
            advantage_ML = advantages_BN[cells.groups_ML, jnp.maximum(cells.responses_ML, 0)]
            before_ML = response_log_probs(network, first, cells, temperature)[0] if recomputed else cells.logps_ML
            known = [cells.logps_ML, before_ML, advantage_ML]
            if reference is not None:
                known.append(response_log_probs(network, reference, cells, temperature)[0])
            of_token = lambda *known: of_tokens(*known)["student/loss"]  # noqa: E731
            loss, logp_ML, entropy_ML = response_loss(network, params, cells, temperature, of_token, *known)
            values = of_tokens(logp_ML, *known)
            values |= {"student/entropy": entropy_ML, "rollout/logp_gap": jnp.abs(logp_ML - cells.logps_ML)}
            return loss / micro.total, {name: _share(values_ML, micro) for name, values_ML in values.items()}

        metrics: Metrics = {}
        for _ in range(updates):
            grads, new = accumulate(loss, role.params, rows)
            role, grad_norm = update(optimizer, role, grads, loss=new["student/loss"])
            gap = metrics.get("rollout/logp_gap", new["rollout/logp_gap"])
            metrics = new | {"student/grad_norm": grad_norm, "rollout/logp_gap": gap}
        return role, metrics | reward_metrics(rewards_BN)

    return step


def build(config: GadConfig, optimizer_at: OptimizerAt, student: Network, discriminator: Network) -> Algorithm:
    """The algorithm of a `gad` stage."""
    return Algorithm(
        student=make_student_step(
            student,
            optimizer_at(config.learning_rate, config.updates_per_rollout),
            temperature=config.temperature,
            kl_weight=config.kl_weight,
            updates=config.updates_per_rollout,
            importance_cap=config.importance_cap,
            balance=config.balance,
        ),
        discriminator=make_discriminator_step(discriminator, optimizer_at(config.discriminator.learning_rate), config.discriminator),
        balance=config.balance,
        student_reads="samples",
        needs_reference=config.kl_weight > 0,
    )
