"""The steps of gad, warm-up and SeqKD against a slow oracle that knows no packing, and against their own invariances.

The optimizer is plain gradient descent at rate 1, so the change of the parameters is the gradient.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax import losses
from gadjax.algorithms import gad, seqkd
from gadjax.algorithms.stage import DiscriminatorConfig, Guidance
from gadjax.data.packing import RowShape, pack
from gadjax.models.cache_attention import prefill
from gadjax.models.decoder import DecoderConfig, Network, discriminator, discriminator_params, language_model
from gadjax.types import Params, Role

DIMS = DecoderConfig(vocabulary=13, width=16, layers=1, heads=4, kv_heads=2, head_width=4, feed_forward=24, init_std=0.3)
DIMS_DEEP = replace(DIMS, layers=5)
STUDENT = language_model(DIMS, jnp.dtype(jnp.float32))
DISCRIMINATOR = discriminator(DIMS, jnp.dtype(jnp.float32))
DESCENT = optax.sgd(1.0)
TEMPERATURE, KL_WEIGHT = 0.8, 0.5
LONGEST = 9

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 1]]
TEACHER = [[[2, 3, 12]], [[4, 4, 4, 4, 12]], [[11, 12]], [[12]]]
SAMPLES = [
    [[3, 3, 12], [5, 12], [6, 7, 8, 9, 10]],
    [[4, 12], [4, 12], [5, 5, 12]],  # two identical ones
    [[1, 2, 3, 12], [9, 9, 12], [10, 12]],
    [[8, 8, 8, 8, 8], [7, 12], [12]],
]
BOTH = [own + others for own, others in zip(TEACHER, SAMPLES, strict=True)]
DISCRIMINATOR_STEP = jax.jit(gad.make_discriminator_step(DISCRIMINATOR, DESCENT))
STUDENT_STEP = jax.jit(gad.make_student_step(STUDENT, DESCENT, temperature=TEMPERATURE, kl_weight=KL_WEIGHT))
ONE_ROW_EACH = RowShape(groups=4, micro_batches=1, rows=4, length=20)


def perturbed(params: Params, seed: int) -> Params:
    """Other parameters near these."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.01 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)])


STUDENT_PARAMS = STUDENT.init(jax.random.key(0))
REFERENCE = perturbed(STUDENT_PARAMS, 1)
HEAD_KEY = jax.random.key(2)
DISCRIMINATOR_PARAMS = perturbed(discriminator_params(DISCRIMINATOR, STUDENT_PARAMS, HEAD_KEY), 3)


def role(params: Params) -> Role:
    return Role(params, DESCENT.init(params))


def gradient(before: Params, after: Role) -> Params:
    return jax.tree.map(lambda old, new: np.asarray(old - new), before, after.params)


def assert_close(actual: object, expected: object, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def alone(network: Network, params: Params, prompts: list, responses: list) -> tuple[Any, jax.Array]:
    """The model and its hidden states, [n, LONGEST, D], of every prompt with every response of it on its own, as any causal model
    sees them: one padded row each, the prompt repeated."""
    rows = [[*prompt, *response] for prompt, group in zip(prompts, responses, strict=True) for response in group]
    tokens = jnp.array([row + [0] * (LONGEST - len(row)) for row in rows])  # what comes later does not matter
    places = jnp.broadcast_to(jnp.arange(LONGEST)[None], tokens.shape)
    model = network.bind(params)
    hidden, _ = model.trunk(tokens, places, prefill)
    return model, hidden


def logps_alone(params: Params, responses: list, temperature: float) -> list[jax.Array]:
    """The log-probabilities of each response's tokens, group by group."""
    model, hidden = alone(STUDENT, params, PROMPTS, responses)
    pairs = [(len(prompt), jnp.array(response)) for prompt, group in zip(PROMPTS, responses, strict=True) for response in group]
    logps = jax.nn.log_softmax(model.logits(hidden) / temperature, axis=-1)
    return [logps[i, at - 1 + jnp.arange(len(response)), response] for i, (at, response) in enumerate(pairs)]


def oracle_scores(params: Params) -> jax.Array:
    model, hidden = alone(DISCRIMINATOR, params, PROMPTS, BOTH)
    last = [len(prompt) + len(response) - 1 for prompt, group in zip(PROMPTS, BOTH, strict=True) for response in group]
    return model.scores(hidden)[jnp.arange(len(last)), jnp.array(last)].reshape(4, 4)


def oracle_discriminator_loss(params: Params) -> jax.Array:
    scores = oracle_scores(params)
    return jnp.mean(-jnp.log(jax.nn.sigmoid(scores[:, :1] - scores[:, 1:])))


def oracle_student_loss(params: Params, rewards: np.ndarray) -> jax.Array:
    logps, logps_ref = (logps_alone(each, SAMPLES, TEMPERATURE) for each in (params, REFERENCE))
    total, count = jnp.zeros(()), 0
    for index, (logp, logp_ref) in enumerate(zip(logps, logps_ref, strict=True)):
        group = rewards[index // 3]
        advantage = (group[index % 3] - group.mean()) / (np.std(group, ddof=1) + 1e-6)
        ratio, difference = jnp.exp(logp - jax.lax.stop_gradient(logp)), logp_ref - logp
        total += jnp.sum(-ratio * advantage + KL_WEIGHT * (jnp.exp(difference) - difference - 1))
        count += len(logp)
    return total / count


def test_the_discriminators_scores_loss_and_gradient_are_the_papers():
    rows = pack(PROMPTS, BOTH, ONE_ROW_EACH)
    after, scores, metrics = DISCRIMINATOR_STEP(role(DISCRIMINATOR_PARAMS), rows)
    assert_close(scores, jax.jit(oracle_scores)(DISCRIMINATOR_PARAMS))
    loss, grads = jax.jit(jax.value_and_grad(oracle_discriminator_loss))(DISCRIMINATOR_PARAMS)
    assert_close(metrics["discriminator/loss"], loss)
    assert_close(gradient(DISCRIMINATOR_PARAMS, after), grads)
    assert_close(metrics["discriminator/grad_norm"], optax.tree.norm(grads))


def test_the_students_loss_and_gradient_are_the_papers():
    rows = pack(PROMPTS, SAMPLES, ONE_ROW_EACH)
    scores = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    after, metrics = STUDENT_STEP(role(STUDENT_PARAMS), rows, Guidance(REFERENCE, jnp.array(scores)))
    loss, grads = jax.jit(jax.value_and_grad(lambda params: oracle_student_loss(params, scores[:, 1:])))(STUDENT_PARAMS)
    assert_close(metrics["student/loss"], loss)
    assert_close(gradient(STUDENT_PARAMS, after), grads)
    assert_close(metrics["student/reward_mean"], scores[:, 1:].mean())
    assert_close(metrics["student/reward_std"], np.std(scores[:, 1:], axis=1, ddof=1).mean())
    assert metrics["student/clip_fraction"] == 0, "with one update per rollout the ratio is 1"


def test_several_updates_per_rollout_clip_where_the_ratio_has_gone_far():
    own = [[np.asarray(logp).tolist() for logp in group] for group in grouped(logps_alone(STUDENT_PARAMS, SAMPLES, TEMPERATURE))]
    rows, scores = pack(PROMPTS, SAMPLES, ONE_ROW_EACH, own), np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    guidance = Guidance(None, jnp.array(scores))

    def after(updates: int) -> tuple[Role, dict[str, Any]]:
        step = gad.make_student_step(STUDENT, DESCENT, temperature=TEMPERATURE, kl_weight=0.0, updates=updates)
        return jax.jit(step)(role(STUDENT_PARAMS), rows, guidance)

    (one, first), (two, second) = after(1), after(2)
    assert "student/kl" not in first, "there is no reference"
    assert first["student/clip_fraction"] == 0 and second["student/clip_fraction"] > 0.1
    assert first["rollout/logp_gap"] < 1e-5 and second["rollout/logp_gap"] < 1e-5, "the gap is the first update's"
    # The second update by hand: from the first one's parameters, against the sampler's log-probabilities.
    old = logps_alone(STUDENT_PARAMS, SAMPLES, TEMPERATURE)

    def surrogate(params: Params, clips: bool) -> jax.Array:
        total = jnp.zeros(())
        for index, (before, now) in enumerate(zip(old, logps_alone(params, SAMPLES, TEMPERATURE), strict=True)):
            group = scores[index // 3, 1:]
            advantage = (group[index % 3] - group.mean()) / (np.std(group, ddof=1) + 1e-6)
            ratio = jnp.exp(now - before)
            loss = -ratio * advantage
            if clips:
                loss = jnp.maximum(loss, -jnp.clip(ratio, 0.8, 1.2) * advantage)
                loss = jnp.minimum(loss, -3 * advantage) if advantage < 0 else loss
            total += jnp.sum(loss)
        return total / sum(map(len, old))

    by_hand = jax.jit(jax.value_and_grad(surrogate), static_argnums=1)
    (loss, clipped), (_, plain) = by_hand(one.params, True), by_hand(one.params, False)
    assert_close(second["student/loss"], loss)
    assert_close(gradient(one.params, two), clipped)
    difference = optax.tree.norm(optax.tree.sub(clipped, plain))
    assert difference > 0.1 * optax.tree.norm(plain), "the clipping changes the update"


@pytest.mark.parametrize("updates", [1, 2])
def test_samples_of_a_backend_that_is_not_exact_are_weighed_by_the_ratio_up_to_a_cap(updates):
    """Against one that is: each token's surrogate times min(trainer / sampler, C), whatever the sampler said."""
    own = logps_alone(STUDENT_PARAMS, SAMPLES, TEMPERATURE)
    cap, noise = 1.25, [np.random.default_rng(index).normal(0, 0.5, len(values)) for index, values in enumerate(own)]
    told = grouped([(np.asarray(values) - shift).tolist() for values, shift in zip(own, noise, strict=True)])
    weights = [np.minimum(np.exp(shift), cap) for shift in noise]
    assert {bool(weight == cap) for each in weights for weight in each} == {True, False}
    rows, scores = pack(PROMPTS, SAMPLES, ONE_ROW_EACH, told), np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    step = gad.make_student_step(STUDENT, optax.sgd(0.05), temperature=TEMPERATURE, kl_weight=0.0, updates=updates, importance_cap=cap)
    after, metrics = jax.jit(step)(Role(STUDENT_PARAMS, DESCENT.init(STUDENT_PARAMS)), rows, Guidance(None, jnp.array(scores)))
    advantages = np.asarray(losses.group_advantages(jnp.array(scores[:, 1:]))).ravel()
    count = sum(len(values) for values in own)

    def loss(params: Params) -> jax.Array:
        total = jnp.zeros(())
        for index, now in enumerate(logps_alone(params, SAMPLES, TEMPERATURE)):
            surrogate, _ = losses.clipped_surrogate(now - own[index], jnp.broadcast_to(advantages[index], now.shape))
            total += jnp.sum(weights[index] * surrogate)
        return total / count

    params, value = STUDENT_PARAMS, jnp.zeros(())
    for _ in range(updates):
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        params = jax.tree.map(lambda leaf, grad: leaf - 0.05 * grad, params, grads)
    assert_close(metrics["student/loss"], value)
    assert_close(after.params, params)
    np.testing.assert_allclose(metrics["rollout/logp_gap"], np.mean(np.abs(np.concatenate(noise))), rtol=1e-4)


def test_a_stage_makes_the_updates_that_it_says_and_its_schedule_counts_steps():
    rows = pack(PROMPTS, SAMPLES, ONE_ROW_EACH)
    guidance = Guidance(REFERENCE, jnp.array(np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)))
    asked: list[tuple[float, int]] = []

    def optimizer_at(rate: float, updates: int = 1) -> optax.GradientTransformation:
        asked.append((rate, updates))
        return optax.adam(rate)

    config = gad.GadConfig.model_validate({"updates_per_rollout": 3, "learning_rate": 0.25, "discriminator": {"learning_rate": 0.5}})
    algorithm = gad.build(config, optimizer_at, STUDENT, DISCRIMINATOR)
    assert asked == [(0.25, 3), (0.5, 1)] and algorithm.needs_reference
    without = gad.build(config.model_copy(update={"kl_weight": 0.0}), optimizer_at, STUDENT, DISCRIMINATOR)
    assert not without.needs_reference, "it would be computed for nothing"
    after, _ = jax.jit(algorithm.student)(Role(STUDENT_PARAMS, optax.adam(1.0).init(STUDENT_PARAMS)), rows, guidance)
    assert after.optimizer[0].count == 3


def grouped(values: list) -> list[list]:
    """Three of each group."""
    return [values[start : start + 3] for start in range(0, len(values), 3)]


def test_rematerialised_gradients_are_the_same_and_keep_less():
    again = language_model(DIMS_DEEP, jnp.dtype(jnp.float32), rematerialise=True)
    plain = language_model(DIMS_DEEP, jnp.dtype(jnp.float32))
    params = plain.init(jax.random.key(0))
    rows = pack(PROMPTS, TEACHER, ONE_ROW_EACH)
    results, kept = [], []
    for network in (plain, again):
        step = jax.jit(seqkd.make_student_step(network, DESCENT))
        results.append(step(role(params), rows, Guidance(None, None))[0].params)
        loss = seqkd.make_loss(network)
        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(lambda them: loss(them, rows), params)[1], params)
        kept.append(sum(residual.size for residual in jax.tree.leaves(residuals)))
    assert_close(*results)
    assert kept[1] < 0.7 * kept[0]


def test_seqkd_is_the_cross_entropy_of_the_teachers_tokens():
    def oracle(params: Params) -> jax.Array:
        return -jnp.mean(jnp.concatenate(logps_alone(params, TEACHER, 1.0)))

    rows = pack(PROMPTS, TEACHER, ONE_ROW_EACH)
    after, metrics = jax.jit(seqkd.make_student_step(STUDENT, DESCENT))(role(STUDENT_PARAMS), rows, Guidance(None, None))
    loss, grads = jax.jit(jax.value_and_grad(oracle))(STUDENT_PARAMS)
    assert_close(metrics["student/loss"], loss)
    assert_close(gradient(STUDENT_PARAMS, after), grads)
    log_probs = jax.jit(seqkd.make_sequence_log_probs(STUDENT))(STUDENT_PARAMS, pack(PROMPTS, SAMPLES, ONE_ROW_EACH))
    assert_close(log_probs.reshape(-1), jnp.array([logp.sum() for logp in logps_alone(STUDENT_PARAMS, SAMPLES, 1.0)]))


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        (ONE_ROW_EACH, [2, 0, 3, 1]),  # permuted groups
        (RowShape(groups=4, micro_batches=1, rows=1, length=64), [0, 1, 2, 3]),  # several groups in a row
        (RowShape(groups=4, micro_batches=4, rows=1, length=20), [0, 1, 2, 3]),  # a group a micro-batch: sizes differ
        (RowShape(groups=4, micro_batches=4, rows=4, length=10), [3, 2, 1, 0]),  # split by response, the prompt repeated
        (RowShape(groups=4, micro_batches=4, rows=1, length=20, widths=3), [1, 0, 2, 3]),  # each as wide as its tokens
    ],
    ids=["permuted", "one row", "micro-batches", "split", "widths"],
)
def test_the_gradient_does_not_depend_on_how_groups_lie_in_rows(shape, order):
    scores = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)

    def grads(shape: RowShape, order: list[int]) -> tuple[Params, Params]:
        prompts, samples, both = [PROMPTS[i] for i in order], [SAMPLES[i] for i in order], [BOTH[i] for i in order]
        judge, _, _ = DISCRIMINATOR_STEP(role(DISCRIMINATOR_PARAMS), pack(prompts, both, shape))
        student, _ = STUDENT_STEP(role(STUDENT_PARAMS), pack(prompts, samples, shape), Guidance(REFERENCE, jnp.array(scores[order])))
        return gradient(DISCRIMINATOR_PARAMS, judge), gradient(STUDENT_PARAMS, student)

    assert_close(grads(shape, order), grads(ONE_ROW_EACH, [0, 1, 2, 3]))


def test_identical_responses_get_one_score_and_ties_count_one_half():
    copies = [[teacher[0]] * 4 for teacher in TEACHER]
    shape = RowShape(groups=4, micro_batches=1, rows=1, length=128)
    _, scores, metrics = DISCRIMINATOR_STEP(role(DISCRIMINATOR_PARAMS), pack(PROMPTS, copies, shape))
    assert metrics["discriminator/accuracy"] == 0.5
    assert (np.asarray(scores) == np.asarray(scores)[:, :1]).all()
    samples = pack(PROMPTS, [each[1:] for each in copies], ONE_ROW_EACH)
    after, student = STUDENT_STEP(role(STUDENT_PARAMS), samples, Guidance(STUDENT_PARAMS, scores))
    assert student["rollout/zero_std_fraction"] == 1
    assert_close(gradient(STUDENT_PARAMS, after), jax.tree.map(np.zeros_like, STUDENT_PARAMS), 1e-7)


def test_the_probe_gap_is_zero_before_scores_are_made_common():
    rows = pack(PROMPTS, [[teacher[0]] * 4 for teacher in TEACHER], RowShape(groups=4, micro_batches=1, rows=2, length=64))
    scores = np.asarray(jax.jit(gad.make_score(DISCRIMINATOR))(DISCRIMINATOR_PARAMS, rows))
    assert np.abs(scores - scores[:, :1]).max() < 1e-5
    assert np.ptp(scores[:, 0]) > 1e-3, "the scores say something"


def test_a_frozen_discriminator_scores_and_stays():
    rows = pack(PROMPTS, BOTH, ONE_ROW_EACH)
    _, learning, _ = DISCRIMINATOR_STEP(role(DISCRIMINATOR_PARAMS), rows)
    frozen = jax.jit(gad.make_discriminator_step(DISCRIMINATOR, DESCENT, DiscriminatorConfig(train=False)))
    after, scores, metrics = frozen(role(DISCRIMINATOR_PARAMS), rows)
    assert_close(scores, learning)
    assert_close(after.params, DISCRIMINATOR_PARAMS, 0)
    assert "discriminator/grad_norm" not in metrics


def test_a_discriminator_of_cross_entropy_learns_on_which_side_of_zero_each_answer_lies():
    """Without a bias in its head: what the trunk makes of the responses' last token stands for it."""
    rows = pack(PROMPTS, BOTH, ONE_ROW_EACH)
    optimizer = optax.adam(3e-3)
    step = jax.jit(gad.make_discriminator_step(DISCRIMINATOR, optimizer, DiscriminatorConfig(loss="cross_entropy")))
    judge = Role(DISCRIMINATOR_PARAMS, optimizer.init(DISCRIMINATOR_PARAMS))
    for _ in range(40):
        judge, *_ = step(judge, rows)
    _, scores, metrics = step(judge, rows)
    teacher, student = scores[:, :1], scores[:, 1:]
    wrong = jnp.mean(jnp.log1p(jnp.exp(-teacher))) / 2 + jnp.mean(jnp.log1p(jnp.exp(student))) / 2
    np.testing.assert_allclose(metrics["discriminator/loss"], wrong, rtol=1e-5)
    assert (teacher > 0).all() and (student < 0)[student != teacher].all(), "but for the sample that is the teacher's own text"
