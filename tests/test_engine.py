"""Continuous batching: the same samples whatever the slots, the places for prompts, and when the host looks."""

import math
import re
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.models.cache_attention import response_blocks
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.rollout import decode, engine
from gadjax.rollout.config import RolloutConfig
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.engine import Engine
from gadjax.sharding import MeshConfig, make_mesh
from gadjax.types import Rollout

DIMS = DecoderConfig(vocabulary=24, width=16, layers=2, heads=4, kv_heads=2, head_width=4, feed_forward=32, init_std=0.3)
NETWORK = language_model(DIMS, jnp.dtype(jnp.float32))
P, R, N, B = 16, 12, 4, 10
KEY = jax.random.key(3)
LENGTHS = (1, 4, 8, 3, 16, 15, 2, 9, 5, 13)
PROMPTS = [tuple(np.random.default_rng(index).integers(0, 24, length).tolist()) for index, length in enumerate(LENGTHS)]
PLAN = SamplingPlan(samples=N, response_tokens=R, temperature=0.9, end_of_turn=5)
VERSION = 7


@cache
def params() -> Any:
    return jax.jit(NETWORK.init)(jax.random.key(0))


@cache
def compiled(slots: int | None = None, prompts: int | None = None, plan: SamplingPlan = PLAN, devices: int = 1, tensor: int = 1) -> Engine:
    mesh = MeshConfig(data=tensor, tensor=tensor)
    made = Engine(NETWORK, make_mesh(mesh, jax.devices()[:devices]), plan, P, RolloutConfig(slots=slots, prompts=prompts, halvings=0))
    made.update(params(), VERSION)
    return made


def with_config(made: Engine, **changed: int) -> Engine:
    """The same engine, nothing compiled anew."""
    other = copy(made)
    other._config = made._config.model_copy(update=changed)
    return other


@cache
def at_once() -> Rollout:
    return compiled().generate(PROMPTS, KEY, 0)


@cache
def in_few_slots() -> Rollout:
    return compiled(6, 3).generate(PROMPTS, KEY, 0)


def assert_bits(one: Rollout, other: Rollout) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one: Rollout, other: Rollout) -> None:
    for name in ("tokens_BNR", "lengths_BN", "ended_BN", "versions_BN"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.logps_BNR, other.logps_BNR, rtol=0, atol=1e-5)


def counted(monkeypatch: pytest.MonkeyPatch, made: Engine, name: str) -> list[Any]:
    """The arguments of each call of one of the engine's programs."""
    calls: list[Any] = []
    program: Callable[..., Any] = getattr(made, name)
    monkeypatch.setattr(made, name, lambda *arguments: calls.append(arguments) or program(*arguments))
    return calls


def test_samples_are_of_many_lengths():
    lengths = at_once().lengths_BN
    assert len(np.unique(lengths)) > 6 and 0.2 < at_once().ended_BN.mean() < 0.95


@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_when_the_host_looks_does_not_change_a_bit(steps):
    """Samples get other slots, at other steps, with other neighbours."""
    assert_bits(with_config(compiled(6, 3), look_every=steps).generate(PROMPTS, KEY, 0), in_few_slots())


@pytest.mark.parametrize(("slots", "prompts"), [(6, 3), (1, 2), (39, B)])
def test_slots_and_places_change_no_more_than_rounding(slots, prompts):
    assert_close(compiled(slots, prompts).generate(PROMPTS, KEY, 0), at_once())


def test_halving_the_slots_changes_no_more_than_rounding(monkeypatch):
    made = with_config(compiled(), halvings=3)
    halved = counted(monkeypatch, made, "_fewer")
    limits = np.random.default_rng(1).integers(1, R, (B, N))
    assert_close(made.generate(PROMPTS, KEY, 0, limits), compiled().generate(PROMPTS, KEY, 0, limits))
    assert [arguments[1] for arguments in halved] == [20, 10], "fewer than 8 are not halved"
    at_work = [np.sum(np.asarray(state.slots.sample_S) < B * N) for state, _ in halved]
    assert all(0 < count <= half for count, half in zip(at_work, (20, 10), strict=True)), at_work


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_give_the_samples_of_one(tensor: int):
    """Whether decoding lies otherwise than training, or as it does."""
    made = compiled(8, 4, devices=8, tensor=tensor)
    assert (made._mesh.shape["tensor"], made._mesh == made._training) == (2, tensor == 2)
    assert_close(with_config(made, look_every=3).generate(PROMPTS, KEY, 0), at_once())


def test_a_group_gives_what_it_gives_among_other_prompts():
    others = compiled(6, 3).generate([PROMPTS[0], PROMPTS[4], PROMPTS[2], PROMPTS[1], *PROMPTS[4:]], KEY, 0)
    same = [0, 2, *range(4, B)]
    assert_bits(*(jax.tree.map(lambda array: array[same], rollout) for rollout in (others, in_few_slots())))
    assert not np.array_equal(others.tokens_BNR[1], in_few_slots().tokens_BNR[1])


def test_limits_cut_samples_and_leave_the_rest_as_it_is():
    limits = np.random.default_rng(0).integers(1, 2 * R, (B, N))
    cut, whole = compiled(6, 3).generate(PROMPTS, KEY, 0, limits), in_few_slots()
    np.testing.assert_array_equal(cut.lengths_BN, np.minimum(whole.lengths_BN, limits))
    np.testing.assert_array_equal(cut.ended_BN, whole.ended_BN & (whole.lengths_BN <= limits))
    here = np.arange(R) < cut.lengths_BN[..., None]
    np.testing.assert_array_equal(cut.tokens_BNR, np.where(here, whole.tokens_BNR, 0))
    np.testing.assert_array_equal(cut.logps_BNR, np.where(here, whole.logps_BNR, 0))
    assert np.any(cut.lengths_BN < whole.lengths_BN) and np.any(limits > R)


def test_every_sample_carries_the_version_that_made_it():
    np.testing.assert_array_equal(at_once().versions_BN, np.full((B, N), VERSION))


def test_what_fits_is_one_prefill_and_one_loop_without_a_look(monkeypatch):
    made = copy(compiled())
    prefills, loops = (counted(monkeypatch, made, name) for name in ("_prefill", "_decode"))
    looks: list[Any] = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: looks.append(tree) or get(tree))
    made.generate(PROMPTS, KEY, 0)
    assert (len(prefills), len(loops), len(looks)) == (1, 1, 1)


def test_prompts_are_prefilled_once_and_in_the_bucket_of_the_longest(monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST", 4)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 2 * P)
    made = copy(compiled(6, 3))
    prefills, kept = (counted(monkeypatch, made, name) for name in ("_prefill", "_kept"))
    assert_close(made.generate(PROMPTS, KEY, 0), in_few_slots())
    together = [np.asarray(turns).tolist() for _, _, _, turns, _ in kept]
    assert sorted(np.concatenate(together).tolist()) == list(range(B))
    buckets = [tokens.shape for _, tokens in prefills]
    lengths = sorted(LENGTHS, reverse=True)  # long ones with their like
    longest = [max(lengths[turn] for turn in turns) for turns in together]
    assert buckets == [(2, 4 if least <= 4 else 8 if least <= 8 else 16) for least in longest] and len(set(buckets)) == 3


def test_another_batch_compiles_nothing():
    made, heard = with_config(compiled(6, 3), look_every=2), list[str]()

    def hear(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if "backend_compile" in event:
            heard.append(event)

    made.generate(PROMPTS, KEY, 0)
    jax.monitoring.register_event_duration_secs_listener(hear)
    made.generate(PROMPTS[::-1], KEY, 1)
    assert not heard
    jax.jit(lambda x: x + 12345)(1)
    assert heard, "compilations are not heard of"


def test_the_loop_writes_its_caches_in_place():
    slots, tokens = 32, 1024
    plan = SamplingPlan(samples=N, response_tokens=tokens, temperature=1.0, end_of_turn=5)
    made = compiled(plan=plan)
    asked = map(made._put, made._asked([PROMPTS[1]] * (slots // N), None))
    order, resident, state = made._begin(slots // N, slots, *asked, KEY, made._put(0))
    program: Any = made._decode
    text = program.lower(made._weights(params()), resident, order, state, *map(made._put, (slots, 100, 0))).compile().as_text()
    block, *others = response_blocks(tokens)
    assert block < tokens and set(others) == {block}
    for shape in (rf"f32\[{slots},2,4,{block}\]", rf"f32\[{slots},2,{block},4\]"):
        assert re.search(rf"{shape}\S* (fusion|scatter)\(", text) and not re.search(rf"{shape}\S* copy\(", text)


def test_logits_stay_divided_over_the_vocabulary():
    """On devices that share the vocabulary no step gathers [S, V] numbers, whatever their shape and type."""
    slots, vocabulary = 8, 1024
    network = language_model(replace(DIMS, vocabulary=vocabulary), jnp.dtype(jnp.float32))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()[:8])
    made = Engine(network, mesh, PLAN, P, RolloutConfig(slots=slots))
    order, resident, state = made.resident(B)
    program: Any = made._decode
    text = (
        program.lower(made.weights(network.shapes), resident, order, state, *[jax.ShapeDtypeStruct((), jnp.int32)] * 3).compile().as_text()
    )
    gathered = [[int(size) for size in found.split(",") if size] for found in re.findall(r"\[([\d,]*)\]\S* all-(?:gather|to-all)\(", text)]
    assert gathered and max(map(math.prod, gathered)) < slots // 2 * vocabulary, gathered
