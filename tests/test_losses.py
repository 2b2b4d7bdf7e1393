"""Every loss against numbers worked out by hand from its equation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax import losses


def test_token_log_probs_are_those_of_the_softmax():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [4.0, 4.0, 0.0]]) + 1e-30)  # p = 1/8, 2/8, 5/8 and 1/2, 1/2, 0
    logp, entropy = losses.token_log_probs(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(logp, [math.log(0.25), math.log(0.5)], atol=1e-6)
    np.testing.assert_allclose(entropy, [0.9002561, math.log(2)], atol=1e-6)


def test_bradley_terry_compares_every_student_with_its_teacher():
    pairs = losses.bradley_terry(jnp.array([1.0, -2.0]), jnp.array([[0.0, 1.0, 3.0], [-2.0, -1.0, -4.0]]))
    # -log sigmoid of the differences 1, 0, -2 and 0, -1, 2
    np.testing.assert_allclose(pairs, [[0.3132617, 0.6931472, 2.1269280], [0.6931472, 1.3132617, 0.1269280]], atol=1e-6)


def test_bradley_terry_pulls_the_teacher_up_and_the_student_down():
    teacher, student = jax.grad(lambda t, s: losses.bradley_terry(t, s).sum(), (0, 1))(jnp.array([0.0]), jnp.array([[0.0, 0.0]]))
    np.testing.assert_allclose(teacher, [-1.0], atol=1e-6)  # two pairs, -1/2 each
    np.testing.assert_allclose(student, [[0.5, 0.5]], atol=1e-6)


def test_cross_entropy_says_of_each_answer_alone_whose_it_is():
    """Against Goodfellow's equation written out with probabilities."""
    teacher, student, smoothing = [1.0, -2.0], [[0.0, 3.0], [-1.0, -4.0]], 0.1

    def halved(t: float, s: float, e: float) -> float:
        real, fake = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        says = (1 - e) * math.log(real) + e * math.log(1 - real), (1 - e) * math.log(1 - fake) + e * math.log(fake)
        return -sum(says) / 2

    for e in (0.0, smoothing):
        pairs = losses.binary_cross_entropy(jnp.array(teacher), jnp.array(student), e)
        expected = [[halved(t, s, e) for s in own] for t, own in zip(teacher, student, strict=True)]
        np.testing.assert_allclose(pairs, expected, atol=1e-6)
    assert losses.binary_cross_entropy(jnp.zeros(1), jnp.zeros((1, 1))) == pytest.approx(math.log(2))


def test_cross_entropy_knows_where_zero_is_and_bradley_terry_does_not():
    higher = lambda loss: loss(jnp.array([6.0]), jnp.array([[5.0]])) - loss(jnp.array([0.5]), jnp.array([[-0.5]]))  # noqa: E731
    assert higher(losses.bradley_terry) == 0
    assert higher(losses.binary_cross_entropy)[0, 0] > 1


def test_advantages_have_the_spread_with_one_degree_of_freedom_less():
    # mean 3; deviations -2, -1, 0, 3; squares 14; std = sqrt(14 / 3) = 2.1602469
    advantages = losses.group_advantages(jnp.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]))
    np.testing.assert_allclose(advantages[0], [-0.9258197, -0.4629099, 0.0, 1.3887296], atol=1e-6)
    np.testing.assert_array_equal(advantages[1], [0.0, 0.0, 0.0, 0.0])


def test_equal_rewards_have_no_advantage_whatever_their_mean_rounds_to():
    equal = jnp.full((1, 3), 0.1)
    assert jnp.mean(equal) != 0.1, "the mean of these rounds"
    np.testing.assert_array_equal(losses.group_advantages(equal), [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 1.0, -1.2, 1.0),  # gained enough
        (0.5, 1.0, -0.5, 0.0),  # fell behind: not clipped
        (0.5, -1.0, 0.8, 1.0),  # lost enough
        (1.5, -1.0, 1.5, 0.0),  # grew though it is bad: not clipped
        (5.0, -1.0, 3.0, 1.0),  # ... but bounded by the dual clip
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, clipped):
    value, was_clipped = losses.clipped_surrogate(jnp.array([math.log(ratio)]), jnp.array([advantage]))
    np.testing.assert_allclose(value, [loss], atol=1e-6)
    np.testing.assert_array_equal(was_clipped, [clipped])


def test_the_surrogate_moves_log_probabilities_along_the_advantage_and_not_where_it_is_clipped():
    def total(log_ratio: jax.Array) -> jax.Array:
        return losses.clipped_surrogate(log_ratio, jnp.array([2.0, -3.0, 1.0, -1.0, -1.0]))[0].sum()

    grads = jax.grad(total)(jnp.log(jnp.array([1.0, 1.0, 1.5, 0.5, 5.0])))
    np.testing.assert_allclose(grads, [-2.0, 3.0, 0.0, 0.0, 0.0], atol=1e-6)


def test_k3_is_e_to_the_d_minus_d_minus_one():
    logp = jnp.zeros(5)
    logp_ref = jnp.array([0.0, math.log(2), -math.log(2), 100.0, -100.0])
    # 2 - log 2 - 1, 1/2 + log 2 - 1; d is bounded by 20, the value by 10
    np.testing.assert_allclose(losses.k3(logp_ref, logp), [0.0, 0.3068528, 0.1931472, 10.0, 10.0], atol=1e-6)


def test_k3_pulls_towards_the_reference_and_stays_finite():
    grads = jax.grad(lambda logp: losses.k3(jnp.array([math.log(2), -math.log(2), 100.0]), logp).sum())(jnp.zeros(3))
    np.testing.assert_allclose(grads, [-1.0, 0.5, 0.0], atol=1e-6)  # 1 - e^d


def test_truncated_importance():
    """By hand: ratios of 1/2, 1, 3/2 and 4 under a cap of 2."""
    old, sampler = jnp.log(jnp.array([0.1, 0.3, 0.3, 0.8])), jnp.log(jnp.array([0.2, 0.3, 0.2, 0.2]))
    np.testing.assert_allclose(losses.truncated_importance(old, sampler, 2.0), [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
