"""The balance between the two models: by hand, and in steps that are regulated."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from gadjax import losses
from gadjax.algorithms import gad
from gadjax.algorithms.balance import BalanceConfig, Balancer, make_advantages, make_rewards
from gadjax.algorithms.gad import GadConfig
from gadjax.algorithms.stage import Guidance
from gadjax.data.packing import pack
from gadjax.metrics import read
from tests import tiny
from tests.test_gad import (
    BOTH,
    DESCENT,
    DISCRIMINATOR,
    DISCRIMINATOR_PARAMS,
    ONE_ROW_EACH,
    PROMPTS,
    SAMPLES,
    STUDENT,
    STUDENT_PARAMS,
    assert_close,
    gradient,
    role,
)

SCORES = jnp.array([[1.0, 0.5, -0.5, 3.0], [0.0, 2.0, 2.0, 2.0]])
LENGTHS = jnp.array([[10, 10, 20, 5], [8, 8, 8, 8]], jnp.int32)
NONE = jnp.float32(0)


def test_a_length_has_its_price():
    plain, priced = (make_rewards(BalanceConfig(length_weight=weight))(SCORES, LENGTHS) for weight in (0.0, 2.0))
    np.testing.assert_array_equal(plain, SCORES[:, 1:])
    np.testing.assert_allclose(plain - priced, [[0, 2 * np.log(2), 2 * np.log(2)], [0, 0, 0]], atol=1e-6)


def test_advantages_are_scaled_as_the_config_says():
    rewards = SCORES[:, 1:]
    centred, std = np.array([-0.5, -1.5, 2.0]), np.std([0.5, -0.5, 3.0], ddof=1)
    expected = {"z_score": centred / std, "none": centred, "running": centred / 4}
    for scaling, first in expected.items():
        found = make_advantages(BalanceConfig.model_validate({"reward_scaling": scaling}))(rewards, jnp.float32(4))
        np.testing.assert_allclose(found, [first, [0, 0, 0]], rtol=1e-5, atol=1e-6)
    begun = make_advantages(BalanceConfig(reward_scaling="running"))(rewards, NONE)
    np.testing.assert_allclose(begun[0], centred / (std / 2), rtol=1e-5)  # the mean of this batch's spreads


def test_a_smoothed_loss_has_its_minimum_at_the_best_margin():
    margins = jnp.log(jnp.array([[8.0, 9.0, 10.0]]))

    def slope(margin: jax.Array) -> jax.Array:
        return jax.grad(lambda m: losses.bradley_terry(jnp.zeros(1), -m[None, None], 0.1)[0, 0])(margin)

    low, best, high = jax.vmap(slope)(margins[0])
    assert low < 0 and abs(best) < 1e-6 and high > 0
    assert losses.bradley_terry(jnp.zeros(1), -margins)[0, 0] == jax.nn.softplus(-margins[0, 0])


def test_a_step_is_as_long_as_its_rate():
    step, rows = jax.jit(gad.make_discriminator_step(DISCRIMINATOR, DESCENT)), pack(PROMPTS, BOTH, ONE_ROW_EACH)
    whole, half = (gradient(DISCRIMINATOR_PARAMS, step(role(DISCRIMINATOR_PARAMS), rows, jnp.float32(rate))[0]) for rate in (1.0, 0.5))
    assert_close(half, jax.tree.map(lambda leaf: leaf / 2, whole))


def test_the_student_follows_the_balanced_reward():
    """A price that undoes the scores leaves nothing to learn."""
    balance = BalanceConfig(length_weight=3.0, reward_scaling="none")
    step = jax.jit(gad.make_student_step(STUDENT, DESCENT, temperature=0.8, kl_weight=0.0, balance=balance))
    lengths = jnp.array([[1 + b, 1 + b, 2 + b, 3 + b] for b in range(4)], jnp.int32)
    logs = jnp.log(lengths.astype(jnp.float32))
    scores = 3.0 * jnp.abs(logs - logs[:, :1])
    after, metrics = step(role(STUDENT_PARAMS), pack(PROMPTS, SAMPLES, ONE_ROW_EACH), Guidance(None, scores, lengths, NONE))
    assert metrics["student/reward_std"] < 1e-6
    assert_close(gradient(STUDENT_PARAMS, after), jax.tree.map(jnp.zeros_like, STUDENT_PARAMS), 1e-5)


@pytest.mark.parametrize(("control", "rates"), [("skip", [1, 1, 0]), ("rate", [1, 1, 0.5])])
def test_above_the_band_the_discriminator_learns_less(control: str, rates: list[float]):
    found = []
    for accuracy in (None, 0.8, 0.9):
        balancer = Balancer(BalanceConfig.model_validate({"accuracy_band": [0.6, 0.8], "control": control}))
        if accuracy is not None:
            balancer.see({"discriminator/accuracy": accuracy})
        found.append(balancer.rate)
        assert balancer.metrics == {"discriminator/rate": balancer.rate}
        assert balancer.student_learns(0)
    assert found == pytest.approx(rates)
    balancer = Balancer(BalanceConfig(accuracy_band=(0.6, 0.8)))
    balancer.see({"discriminator/accuracy": 0.5})
    assert balancer.rate == 1 and not balancer.student_learns(0)


def test_without_a_band_nothing_is_regulated():
    balancer = Balancer()
    balancer.see({"discriminator/accuracy": 1.0, "student/reward_std": 2.0})
    balancer.see({"student/reward_std": 1.0})
    assert (balancer.rate, balancer.metrics, balancer.changes_rate) == (1.0, {}, False)
    assert balancer.spread == pytest.approx(1.9)
    assert [Balancer(BalanceConfig(discriminator_steps=3)).student_learns(index) for index in range(6)] == [False, False, True] * 2


@pytest.mark.parametrize("band", [[0.8, 0.6], [-1, 0.5], [0.5, 1.5]])
def test_a_band_is_low_to_high(band: list[float]):
    with pytest.raises(ValidationError, match="accuracy_band must be"):
        BalanceConfig.model_validate({"accuracy_band": band})


KILLED = f"""
import os, pathlib, time
from gadjax.metrics import MetricsLog

def write(log, step, row, before=MetricsLog.write):
    if "balanced/metrics" in log._file.name and step == 3:
        while not (pathlib.Path(log._file.name).parent / "checkpoints" / "2" / "sha256-0-of-1.json").exists():
            time.sleep(0.01)  # it is written beside the steps
        os._exit(9)
    before(log, step, row)

MetricsLog.write = write
{tiny.MAIN}
"""


BALANCED = """  balanced:
    {algorithm: gad, from: warmup, max_steps: 4, batch_groups: 8, group_size: 2, checkpoint_every: 2, validate_every: 4,
     discriminator: {learning_rate: 1.0e-3, label_smoothing: 0.1},
     balance: {discriminator_steps: 2, accuracy_band: [0.0, 0.01], control: rate, reward_scaling: running, length_weight: 0.1}}
"""


@pytest.mark.timeout(600)  # it may wait for a whole run
def test_a_balanced_stage_that_was_interrupted_knows_its_running_means(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.getbasetemp()
    experiment = tiny.Tiny(Path(shutil.copytree(tiny.finished(base)[0].folder, base / "balanced")), base / "compiled")
    (experiment.folder / "tiny.yaml").write_text(tiny.CONFIG.replace("evaluation:", f"{BALANCED}evaluation:"))
    killed, done = (experiment.gadjax("train", "tiny.yaml", program=program) for program in (KILLED, tiny.MAIN))
    assert (killed.returncode, done.returncode) == (9, 0), done.stderr
    assert "balanced: goes on after step 2" in done.stderr
    rows = read(experiment.run / "stages" / "balanced" / "metrics.jsonl")[1:]
    assert ["student/loss" in row for row in rows] == [False, True, False, True], "every second step is the discriminator's alone"
    expected, balancer = [1.0, 1.0], Balancer(GadConfig.model_validate(yaml.safe_load(BALANCED)["balanced"]).balance)
    for row in rows[:2]:  # a step's metrics are seen when the next one has begun, whether there is a checkpoint between the two or not
        balancer.see(row)
        expected.append(balancer.rate)
    assert [row["discriminator/rate"] for row in rows] == expected and 0 <= balancer.rate < 1
    assert all(row["discriminator/loss"] > 0.1 for row in rows)
