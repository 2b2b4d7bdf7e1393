"""The losses of GAD, each one an equation: arrays in, arrays out.

Letters: B groups, N student responses per group, `...` any shape, V vocabulary. Nothing here reduces over tokens: a token
mean is taken over the whole batch by whoever knows the batch (see `gadjax.algorithms`).
"""

import jax
import jax.numpy as jnp

# Bounds of the KL estimator: e^d must not overflow where the two models disagree entirely.
K3_DIFFERENCE = 20.0
K3_VALUE = 10.0


def token_log_probs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and the entropy of the distribution it was drawn from.

    Args:
        logits: [..., V] float32, already divided by the temperature.
        targets: [...] int32.

    Returns:
        [...] float32 log softmax(logits)[target], and [...] float32 entropy in nats.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1).squeeze(-1)
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def bradley_terry(teacher_B: jax.Array, student_BN: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log σ(D(x, y) - D(x, ŷ_i)) of every pair, [B, N] (the paper's discriminator loss; its mean is L_D).

    With `smoothing` ε the pair counts as 1 - ε of one and ε of its reverse, so that the best margin is log((1 - ε) / ε) and no more.
    """
    worse_BN = student_BN - teacher_B[:, None]
    if not smoothing:
        return jax.nn.softplus(worse_BN)
    return (1 - smoothing) * jax.nn.softplus(worse_BN) + smoothing * jax.nn.softplus(-worse_BN)


def binary_cross_entropy(teacher_B: jax.Array, student_BN: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(-log σ(D(x, y)) - log(1 - σ(D(x, ŷ_i)))) / 2 of every pair, [B, N] (Goodfellow et al. 2014, equation 1; halved).

    Teacher and student count the same, whatever N, and a discriminator that knows nothing has log 2, as with Bradley-Terry. With
    `smoothing` ε the teacher's label is 1 - ε and the student's ε.
    """
    teacher_B1 = teacher_B[:, None]
    wrong_BN = jax.nn.softplus(-teacher_B1) + jax.nn.softplus(student_BN)
    if not smoothing:
        return wrong_BN / 2
    return ((1 - smoothing) * wrong_BN + smoothing * (jax.nn.softplus(teacher_B1) + jax.nn.softplus(-student_BN))) / 2


PAIR_LOSSES = {"bradley_terry": bradley_terry, "cross_entropy": binary_cross_entropy}  # by their names in a config


def group_spread(rewards_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each reward's distance from its group's mean, [B, N], and the group's standard deviation with ddof = 1, [B].

    Both are exactly 0 where all rewards of a group are equal: the first reward is taken off before the mean, which would
    round otherwise.
    """
    shifted_BN = rewards_BN - rewards_BN[:, :1]
    centred_BN = shifted_BN - jnp.mean(shifted_BN, axis=1, keepdims=True)
    return centred_BN, jnp.std(shifted_BN, axis=1, ddof=1)


def group_advantages(rewards_BN: jax.Array) -> jax.Array:
    """A_i = (r_i - mean r) / (std r + 1e-6) within each group (GRPO). [B, N] -> [B, N], N >= 2."""
    centred_BN, spread_B = group_spread(rewards_BN)
    return centred_BN / (spread_B[:, None] + 1e-6)


def clipped_surrogate(log_ratio: jax.Array, advantage: jax.Array, clip: float = 0.2, dual_clip: float = 3.0) -> tuple[jax.Array, jax.Array]:
    """The negated objective -min(ρA, clip(ρ, 1 - ε, 1 + ε) A) of each token, bounded by -cA where A < 0 (PPO, dual clip).

    Args:
        log_ratio: [...] log ρ = logp - logp_old.
        advantage: [...] A.
        clip: ε.
        dual_clip: c > 1.

    Returns:
        [...] the loss, and [...] 1.0 where clipping cut the gradient, else 0.0.
    """
    ratio = jnp.exp(log_ratio)
    plain = -ratio * advantage
    clipped = -jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage
    bounded = jnp.maximum(plain, clipped)
    loss = jnp.where(advantage < 0, jnp.minimum(bounded, -dual_clip * advantage), bounded)
    return loss, (loss != plain).astype(loss.dtype)


def truncated_importance(logp_old: jax.Array, logp_sampler: jax.Array, most: float) -> jax.Array:
    """min(π_old / π_sampler, C) of each token, its weight where another program samples than trains (Ionides 2008)."""
    return jnp.minimum(jnp.exp(logp_old - logp_sampler), most)


def k3(logp_ref: jax.Array, logp: jax.Array) -> jax.Array:
    """KL(student || reference) of each token, estimated by e^d - d - 1 with d = logp_ref - logp (Schulman's k3), bounded."""
    difference = jnp.clip(logp_ref - logp, -K3_DIFFERENCE, K3_DIFFERENCE)
    return jnp.clip(jnp.expm1(difference) - difference, -K3_VALUE, K3_VALUE)
