"""Computing in bfloat16 over float32 parameters: what stays float32, and how near everything is to a run in float32.

bfloat16 keeps 8 bits: a rounding is off by 2^-9 of its value at most. Log-probabilities from logits of a spread near 1, whose errors
add up over a few layers, are bounded here by 0.02 on average and 0.1 for every token.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax.algorithms import gad, seqkd
from gadjax.algorithms.forward import hidden_states, response_log_probs
from gadjax.algorithms.stage import Guidance
from gadjax.config import make_config
from gadjax.data.packing import RowShape, pack
from gadjax.models.decoder import DecoderConfig, discriminator_params
from gadjax.rollout.engine import SamplingPlan
from gadjax.steps import Models, Programs, Sampler, responses_of
from gadjax.types import PackedRows, Params, Role

DIMS = DecoderConfig(vocabulary=300, width=64, layers=3, heads=4, kv_heads=2, head_width=16, feed_forward=160, init_std=0.12)
F32, BF16 = "float32", "bfloat16"
GROUPS, SAMPLES, P, R = 4, 3, 12, 16
TEMPERATURE = 0.8
ORDER = np.random.default_rng(0)
PROBE_GAP = 1e-2
MEAN_GAP, LARGEST_GAP = 0.02, 0.1
COSINE = 0.99


def texts(longest: int, count: int = 1) -> list[list[tuple[int, ...]]]:
    return [[tuple(ORDER.integers(1, DIMS.vocabulary, length)) for length in ORDER.integers(3, longest + 1, count)] for _ in range(GROUPS)]


PROMPTS = [group[0] for group in texts(P)]
TEACHER, STUDENTS = texts(R), texts(R, SAMPLES)
BOTH = [own + others for own, others in zip(TEACHER, STUDENTS, strict=True)]
SHAPE = RowShape(groups=GROUPS, micro_batches=2, rows=2, length=P + (1 + SAMPLES) * R)
SCORES = ORDER.normal(size=(GROUPS, 1 + SAMPLES)).astype(np.float32)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@cache
def models(dtype: str) -> Models:
    stages = {"seqkd": {"algorithm": "seqkd"}, "gad": {"algorithm": "gad"}}
    data = {"max_prompt_tokens": P, "max_response_tokens": R}
    return Models.of(make_config({"student": {"compute_dtype": dtype}, "stages": stages, "data": data}), DIMS)


@cache
def student() -> Params:
    return models(F32).student.init(jax.random.key(0))


@cache
def judge() -> Params:
    """A discriminator whose scores lie apart, as after some training: its head is ten times a fresh one."""
    fresh = discriminator_params(models(F32).discriminator, student(), jax.random.key(1))
    return fresh | {"head": 10 * fresh["head"]}


def test_bfloat16_is_the_default():
    assert make_config({}).student.compute_dtype == BF16


@pytest.mark.parametrize("stage", ["seqkd", "gad"])
def test_parameters_moments_scores_and_metrics_are_float32(stage: str):
    config = make_config({"student": {"compute_dtype": BF16}, "stages": {stage: {"algorithm": stage}}})
    ours = models(BF16)
    algorithm = Programs.of(config, stage, 10, ours, end_of_turn=0).algorithm
    role, rows = ours.abstract_role(ours.student), pack(PROMPTS, STUDENTS, SHAPE)
    after, metrics = jax.eval_shape(algorithm.student, role, rows, Guidance(role.params, jnp.asarray(SCORES)))
    assert types(after) == types(role) and types(after.params) == {"float32"} and types(after.optimizer) == {"float32", "int32"}
    assert types(metrics) == {"float32"}
    if algorithm.discriminator is not None:
        role = ours.abstract_role(ours.discriminator)
        after, scores, metrics = jax.eval_shape(algorithm.discriminator, role, pack(PROMPTS, BOTH, SHAPE))
        assert types(after) == types(role) and types(after.params) == {"float32"}
        assert types((scores, metrics)) == {"float32"}


def types(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_only_hidden_states_are_in_bfloat16():
    ours, cells = models(BF16), jax.tree.map(lambda cell: cell[0], pack(PROMPTS, STUDENTS, SHAPE).cells)

    def parts(student: Params, judge: Params) -> dict[str, Any]:
        model, scorer = ours.student.bind(student), ours.discriminator.bind(judge)
        hidden = hidden_states(ours.student, model, cells)
        logps = response_log_probs(ours.student, student, cells, TEMPERATURE)
        return {"hidden": hidden, "logits": model.logits(hidden), "logps": logps, "scores": scorer.scores(hidden)}

    found = jax.eval_shape(parts, student(), judge())
    assert {name: types(part) for name, part in found.items()} == {
        "hidden": {"bfloat16"},
        "logits": {"float32"},
        "logps": {"float32"},
        "scores": {"float32"},
    }


def test_the_probe_gap_is_within_its_bound():
    copies = pack(PROMPTS, [teacher * (1 + SAMPLES) for teacher in TEACHER], SHAPE)
    scores = np.asarray(jax.jit(gad.make_score(models(BF16).discriminator))(judge(), copies))
    assert np.abs(scores - scores[:, :1]).max() <= PROBE_GAP
    assert np.ptp(scores[:, 0]) > 100 * PROBE_GAP, "the scores say something"


def test_the_sampler_s_log_probabilities_are_near_the_trainer_s():
    ours = models(BF16)
    plan = SamplingPlan(samples=SAMPLES, response_tokens=R, temperature=TEMPERATURE, end_of_turn=0)
    ids, logps = responses_of(
        Sampler(ours, make_config({"data": {"max_prompt_tokens": P}}).data, plan)(student(), PROMPTS, jax.random.key(2), 0)
    )
    cells = jax.tree.map(lambda cell: cell.reshape(-1, SHAPE.length), pack(PROMPTS, ids, SHAPE, logps).cells)
    found, _ = jax.jit(lambda params: response_log_probs(ours.student, params, cells, TEMPERATURE))(student())
    gaps = np.abs(found - cells.logps_ML)[cells.sources_ML >= 0]
    assert len(gaps) > 100 and np.std(cells.logps_ML[cells.sources_ML >= 0]) > 0.5
    assert np.mean(gaps) < MEAN_GAP and np.max(gaps) < LARGEST_GAP
    assert np.max(gaps) > 1e-4, "it is computed in bfloat16"


DESCENT = optax.sgd(1.0)  # the change of the parameters is the gradient


def discriminator_gradient(dtype: str) -> tuple[Params, Params]:
    step = jax.jit(gad.make_discriminator_step(models(dtype).discriminator, DESCENT))
    return judge(), step(Role(judge(), DESCENT.init(judge())), pack(PROMPTS, BOTH, SHAPE))[0].params


def student_gradient(dtype: str, step: Any, rows: PackedRows) -> tuple[Params, Params]:
    reference = jax.tree.map(lambda leaf: 1.02 * leaf, student())
    after, _ = jax.jit(step)(Role(student(), DESCENT.init(student())), rows, Guidance(reference, jnp.asarray(SCORES)))
    return student(), after.params


def gad_gradient(dtype: str) -> tuple[Params, Params]:
    step = gad.make_student_step(models(dtype).student, DESCENT, temperature=TEMPERATURE, kl_weight=0.1)
    return student_gradient(dtype, step, pack(PROMPTS, STUDENTS, SHAPE))


def seqkd_gradient(dtype: str) -> tuple[Params, Params]:
    return student_gradient(dtype, seqkd.make_student_step(models(dtype).student, DESCENT), pack(PROMPTS, TEACHER, SHAPE))


@pytest.mark.parametrize("gradient", [discriminator_gradient, gad_gradient, seqkd_gradient])
def test_a_step_s_gradient_points_where_that_in_float32_does(gradient: Any):
    def flat(dtype: str) -> np.ndarray:
        before, after = gradient(dtype)
        return np.concatenate([np.ravel(old - new) for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True)])

    exact, rounded = flat(F32), flat(BF16)
    lengths = np.linalg.norm(exact), np.linalg.norm(rounded)
    assert exact @ rounded / np.prod(lengths) > COSINE
    assert lengths[1] == pytest.approx(lengths[0], rel=0.02)
    assert not np.array_equal(exact, rounded)
