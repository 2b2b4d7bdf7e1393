"""The optimizer against AdamW worked out by hand, its schedules, and what a new stage takes over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer, restart_schedule, update
from gadjax.types import Role

CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=1.0)


def trained(schedule: optax.Schedule, steps: int, role: Role | None = None) -> tuple[Role, list[float]]:
    """A single weight after some steps with the gradient 2; and how far each step moved it."""
    optimizer = make_optimizer(CONFIG, schedule)
    weight = jnp.array([1.0])
    role = role or Role({"w": weight}, optimizer.init({"w": weight}))
    moved: list[float] = []
    for _ in range(steps):
        before = float(role.params["w"][0])
        role, norm = update(optimizer, role, {"w": jnp.array([2.0])})
        assert float(norm) == 2.0  # before clipping
        moved.append(before - float(role.params["w"][0]))
    return role, moved


def test_a_step_is_adamw_after_the_clip() -> None:
    _, moved = trained(optax.constant_schedule(0.01), 2)
    # A constant gradient, clipped to 1: both bias-corrected moments are 1, so a step is rate · (1 + decay · weight).
    np.testing.assert_allclose(moved, [0.01 * (1 + 0.1 * 1.0), 0.01 * (1 + 0.1 * (1 - 0.011))], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "heights"),
    [
        (ScheduleConfig(), [1.0, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleConfig(warmup_steps=3), [0.25, 0.5, 0.75, 1.0, 1.0]),
        (ScheduleConfig(shape="cosine"), [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        (ScheduleConfig(shape="cosine", floor=0.2), [1.0, 0.882843, 0.6, 0.317157, 0.2]),
        (ScheduleConfig(shape="cosine", warmup_steps=2), [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),
    ],
)
def test_schedules(config: ScheduleConfig, heights: list[float]) -> None:
    rate = config.of(0.5, steps=4)
    np.testing.assert_allclose([np.asarray(rate(step)) for step in range(5)], 0.5 * np.array(heights), atol=1e-6)


def test_a_schedule_counts_steps_whatever_the_updates_in_them():
    rate = ScheduleConfig(shape="cosine").of(1.0, steps=4, updates=2)
    np.testing.assert_allclose([np.asarray(rate(count)) for count in range(6)], [1.0, 1.0, 0.853553, 0.853553, 0.5, 0.5], atol=1e-6)


def test_a_new_stage_keeps_the_moments_and_restarts_the_schedule() -> None:
    cosine = ScheduleConfig(shape="cosine").of(0.01, steps=3)
    role, moved = trained(cosine, 3)
    assert moved[2] < moved[0] / 2
    _, stopped = trained(cosine, 1, role)
    _, restarted = trained(cosine, 1, role._replace(optimizer=restart_schedule(role.optimizer)))
    assert stopped[0] == 0.0
    assert restarted[0] == pytest.approx(0.01 * (1 + 0.1 * float(role.params["w"][0])), rel=1e-4)


def test_the_state_has_one_shape_whatever_the_schedule() -> None:
    shapes = [
        jax.tree.structure(make_optimizer(CONFIG, config.of(0.01, 5)).init({"w": jnp.ones(3)}))
        for config in (ScheduleConfig(), ScheduleConfig(shape="cosine", warmup_steps=2))
    ]
    assert shapes[0] == shapes[1]


def test_norms_and_biases_may_be_left_out_of_the_decay():
    params = {"trunk": {"norm": jnp.ones(2), "blocks": {"query": jnp.ones((2, 2)), "query_bias": jnp.ones(2), "mlp_norm": jnp.ones(2)}}}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, decay="matrices"), optax.constant_schedule(0.1))
    after, _ = update(optimizer, Role(params, optimizer.init(params)), jax.tree.map(jnp.zeros_like, params))
    decayed = jax.tree.map(lambda leaf: float(leaf.ravel()[0]), after.params)
    assert decayed == {"trunk": {"norm": 1.0, "blocks": {"query": pytest.approx(0.95), "query_bias": 1.0, "mlp_norm": 1.0}}}
