"""Rollouts: drawn from the right distribution, with log-probabilities that training finds again, whatever else is in the batch."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax.algorithms.forward import hidden_states, response_log_probs
from gadjax.data.config import DataConfig
from gadjax.data.packing import RowShape, pack
from gadjax.models.decoder import DecoderConfig, discriminator, language_model
from gadjax.optimizer import OptimizerConfig, make_optimizer
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.sampling import integer_probabilities, restrict, sample, stream_keys
from gadjax.sharding import MeshConfig, make_mesh
from gadjax.steps import Models, Sampler, responses_of
from gadjax.types import Cells, Params, Rollout

DIMS = DecoderConfig(vocabulary=24, width=16, layers=2, heads=4, kv_heads=2, head_width=4, feed_forward=32)
OPTIMIZER = make_optimizer(OptimizerConfig(), optax.constant_schedule(1.0))
F32 = jnp.dtype(jnp.float32)
P, R, N = 8, 6, 4
DATA = DataConfig(max_prompt_tokens=P, max_response_tokens=R)
END = 5
T = 0.8
KEY = jax.random.key(3)
PROMPTS = [tuple(np.random.default_rng(length).integers(0, DIMS.vocabulary, length).tolist()) for length in (3, 8, 1, 5)]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def models(mesh: MeshConfig, devices: int) -> Models:
    made = make_mesh(mesh, jax.devices()[:devices])
    return Models(made, language_model(DIMS, F32), discriminator(DIMS, F32), OPTIMIZER)


@cache
def one_device() -> Models:
    return models(MeshConfig(), 1)


@cache
def params() -> Params:
    """Weights under which every token has a chance, none is certain, and the likeliest is not the same everywhere."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> np.ndarray:
        std = 0.25 if "vocabulary" in axes else 0.8
        return (float(axes[-1] == "norm") + std * rng.standard_normal(leaf.shape)).astype(np.float32)

    network = one_device().student
    return jax.tree.map(draw, network.shapes, network.axes)


def plan(temperature: float, **others: Any) -> SamplingPlan:
    return SamplingPlan(samples=N if temperature else 1, response_tokens=R, temperature=temperature, end_of_turn=END, **others)


@cache
def sampler(temperature: float) -> Sampler:
    return Sampler(one_device(), DATA, plan(temperature))


@cache
def sampled() -> Rollout:
    return sampler(T)(params(), PROMPTS, KEY, 0)


@cache
def greedy() -> Rollout:
    return sampler(0.0)(params(), PROMPTS, KEY, 0)


def rows(rollout: Rollout) -> tuple[Cells, np.ndarray]:
    """The responses behind their prompts in packed rows, and where their tokens are."""
    ids, logps = responses_of(rollout)
    shape = RowShape(groups=len(ids), micro_batches=1, rows=len(ids), length=P + N * R)
    cells = jax.tree.map(lambda cell: cell[0], pack(PROMPTS, ids, shape, logps).cells)
    return cells, np.asarray(cells.sources_ML) >= 0


def assert_same(left: Rollout, right: Rollout, groups: Sequence[int] | slice) -> None:
    for name in ("tokens_BNR", "lengths_BN", "ended_BN"):
        np.testing.assert_array_equal(getattr(left, name)[groups], getattr(right, name)[groups], err_msg=name)
    np.testing.assert_allclose(left.logps_BNR[groups], right.logps_BNR[groups], rtol=0, atol=1e-5)


def assert_logps_are_those_of_training(rollout: Rollout) -> None:
    cells, chosen = rows(rollout)
    assert np.sum(chosen) > 50 and np.all(np.asarray(cells.logps_ML)[chosen] < -1e-3)
    found, _ = jax.jit(lambda params, cells: response_log_probs(one_device().student, params, cells, T))(params(), cells)
    np.testing.assert_allclose(found, cells.logps_ML, rtol=0, atol=1e-5)


def test_log_probabilities_are_those_that_training_computes():
    assert_logps_are_those_of_training(sampled())


def test_greedy_decoding_takes_the_likeliest_token_of_the_full_forward():
    """By induction over the tokens: each is the likeliest after the prompt and those before it."""
    cells, chosen = rows(greedy())
    assert np.sum(chosen) > 2 * len(PROMPTS)

    @jax.jit
    def full_forward(params: Params, cells: Cells) -> jax.Array:
        network = one_device().student
        model = network.bind(params)
        return jax.nn.log_softmax(model.logits(hidden_states(network, model, cells)))

    before = np.take_along_axis(np.asarray(full_forward(params(), cells)), np.maximum(cells.sources_ML, 0)[..., None], axis=1)[chosen]
    np.testing.assert_array_equal(np.argmax(before, axis=-1), cells.tokens_ML[chosen])
    np.testing.assert_allclose(np.max(before, axis=-1), cells.logps_ML[chosen], rtol=0, atol=1e-5)


def test_a_response_ends_with_its_one_end_of_turn_or_is_cut():
    tokens_BNR, logps_BNR, lengths_BN, ended_BN, _ = sampled()
    assert tokens_BNR.shape == (len(PROMPTS), N, R)
    assert set(ended_BN.ravel().tolist()) == {True, False} and len(set(lengths_BN.ravel().tolist())) > 2
    for place in np.ndindex(lengths_BN.shape):
        tokens, length, ended = tokens_BNR[place].tolist(), lengths_BN[place], bool(ended_BN[place])
        assert tokens[:length].count(END) == int(ended)
        assert tokens[length - 1] == END if ended else length == R
        assert not any(tokens[length:]) and not np.any(logps_BNR[place][length:])


def test_samples_depend_on_key_step_group_and_sample_alone():
    others = [PROMPTS[0], PROMPTS[3], PROMPTS[2], PROMPTS[1]]
    assert_same(sampler(T)(params(), others, KEY, 0), sampled(), [0, 2])
    repeated = sampler(T)(params(), [PROMPTS[1]] * 4, KEY, 0).tokens_BNR.reshape(4 * N, R)
    assert len(np.unique(repeated, axis=0)) > 2 * N, "groups or samples share a stream"
    for key, step in ((KEY, 1), (jax.random.key(4), 0)):
        assert not np.array_equal(sampler(T)(params(), PROMPTS, key, step).tokens_BNR, sampled().tokens_BNR)


def test_prompts_of_different_lengths_give_in_one_batch_what_they_give_alone():
    for first in range(len(PROMPTS)):
        turned = PROMPTS[first:] + PROMPTS[:first]
        assert_same(sampler(T)(params(), turned, KEY, 0), sampler(T)(params(), turned[:1], KEY, 0), [0])


def test_eight_devices_give_the_samples_of_one():
    eight = models(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    placed = eight.place_params(eight.student, params())
    assert len(placed["trunk"]["blocks"]["query"].sharding.device_set) == 8
    assert placed["trunk"]["blocks"]["query"].addressable_shards[0].data.size == params()["trunk"]["blocks"]["query"].size // 4
    on_eight = Sampler(eight, DATA, plan(T))
    assert_same(on_eight(placed, PROMPTS, KEY, 0), sampled(), slice(None))
    three = on_eight(placed, PROMPTS[:3], KEY, 0)  # no multiple of the mesh
    assert_same(three, jax.tree.map(lambda array: array[:3], sampled()), slice(None))


def chi_square(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic of counts against a distribution, divided by its degrees of freedom."""
    counts = np.bincount(drawn, minlength=probabilities.size)
    expected = drawn.size * probabilities.ravel()
    return float(np.sum((counts - expected) ** 2 / expected)) / (probabilities.size - 1)


def test_tokens_are_drawn_from_softmax_at_the_temperature():
    vocabulary, samples = 8, 20_000
    logits = np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32)

    @jax.jit
    def draw(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.full(samples, position)
        return sample(jnp.broadcast_to(logits, (samples, vocabulary)), stream_keys(KEY, 1, samples)[0], positions, T)

    (first, logps), (second, _) = (jax.tree.map(np.asarray, draw(jnp.int32(position))) for position in (0, 1))
    probabilities = np.exp(logits / T) / np.sum(np.exp(logits / T))
    np.testing.assert_allclose(logps, np.log(probabilities)[first], rtol=0, atol=1e-5)
    # Chance exceeds 3 (7 degrees of freedom) and 1.8 (63) less than once in 200.
    assert chi_square(first, probabilities) < 3
    assert chi_square(second, probabilities) < 3
    assert chi_square(first * vocabulary + second, np.outer(probabilities, probabilities)) < 1.8
    assert chi_square(first, np.exp(logits) / np.sum(np.exp(logits))) > 30, "another temperature is not told apart"


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, 1.0, [50, 5, 20, 15, 0, 10]),
        (2, 1.0, [50, 0, 20, 0, 0, 0]),
        (1, 1.0, [50, 0, 0, 0, 0, 0]),
        (9, 1.0, [50, 5, 20, 15, 0, 10]),
        (None, 0.5, [50, 0, 0, 0, 0, 0]),
        (None, 0.51, [50, 0, 20, 0, 0, 0]),
        (None, 0.85, [50, 0, 20, 15, 0, 0]),
        (None, 0.86, [50, 0, 20, 15, 0, 10]),
        (None, 1e-9, [50, 0, 0, 0, 0, 0]),
        (3, 0.6, [50, 0, 20, 0, 0, 0]),  # 51 of the 85 that top-k leaves
        (3, 0.59, [50, 0, 20, 0, 0, 0]),
        (3, 0.58, [50, 0, 0, 0, 0, 0]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(top_k: int | None, top_p: float, kept: list[int]):
    weights = jnp.array([[50, 5, 20, 15, 0, 10]], jnp.int32)
    np.testing.assert_array_equal(restrict(weights, top_k, top_p)[0], kept)


def test_what_is_left_out_is_never_drawn_and_log_probabilities_are_of_the_whole_vocabulary():
    restricted = Sampler(one_device(), DATA, plan(T, top_k=2))(params(), PROMPTS, KEY, 0)
    assert not np.array_equal(restricted.tokens_BNR, sampled().tokens_BNR)
    assert_logps_are_those_of_training(restricted)
    narrow = Sampler(one_device(), DATA, plan(T, top_p=1e-6))(params(), PROMPTS, KEY, 0)
    np.testing.assert_array_equal(narrow.tokens_BNR, np.broadcast_to(greedy().tokens_BNR, narrow.tokens_BNR.shape))


@pytest.mark.parametrize("scale", [0.0, 6.0, 100.0])
def test_probabilities_as_integers_are_exact_to_one_part_and_add_up(scale: float):
    logits = scale * np.random.default_rng(0).standard_normal((2, 152_064), np.float32)
    parts = np.asarray(integer_probabilities(jnp.asarray(logits)))
    exact = np.exp((logits - logits.max(axis=-1, keepdims=True)).astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    assert parts.dtype == np.int32 and np.all(parts >= 0)
    np.testing.assert_allclose(parts, exact * 2**30, rtol=1e-5, atol=1)
    total = parts.sum(axis=-1, dtype=np.int64)
    assert np.all(total < 2**31) and np.all(np.abs(total / 2**30 - 1) < 1e-4)
    cumulated = np.asarray(jnp.cumsum(integer_probabilities(jnp.asarray(logits)), axis=-1))
    np.testing.assert_array_equal(cumulated, parts.cumsum(axis=-1, dtype=np.int64))
