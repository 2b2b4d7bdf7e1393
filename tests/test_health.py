"""Each finding comes with what it is about, names a knob that the config has, and does not come without."""

import math
import re
from typing import Any

import pytest

from gadjax.algorithms.gad import GadConfig
from gadjax.health import WINDOW, Finding, Watch, episodes, findings

WELL = {
    "discriminator/accuracy": 0.7,
    "validation/discriminator_accuracy": 0.65,
    "discriminator/probe_gap": 1e-6,
    "student/reward_std": 0.5,
    "rollout/length_mean": 100.0,
    "student/entropy": 0.8,
    "rollout/zero_std_fraction": 0.1,
    "student/kl": 0.05,
}
STEPS = 3 * WINDOW


def stage(*, steps: int = STEPS, **late: float) -> list[dict[str, float]]:
    """A stage's rows; in the last third some metrics are others: `accuracy` means discriminator/accuracy if it ends so."""
    names = {short: name for name in WELL for short in (name, name.rpartition("/")[2])} | {
        "held_out": "validation/discriminator_accuracy",
        "accuracy": "discriminator/accuracy",
    }
    changed = {names[short]: value for short, value in late.items()}
    return [{"step": step} | WELL | (changed if step > 2 * steps // 3 else {}) for step in range(1, steps + 1)]


ILL: dict[str, dict[str, Any]] = {
    "blind": {"held_out": 0.54},
    "too strong": {"accuracy": 0.96},
    "collapsed": {"reward_std": 0.004},
    "probe gap": {"probe_gap": 0.02},
    "length": {"length_mean": 151.0},
    "entropy": {"entropy": 0.2},
    "no spread": {"zero_std_fraction": 0.6},
    "KL": {"kl": 0.6},
}


def kinds(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


def test_nothing_is_wrong_with_a_stage_that_is_well():
    assert findings(stage()) == [] and findings([]) == [] and episodes([]) == [] and episodes(stage()) == []


@pytest.mark.parametrize("name", ILL)
def test_each_finding_comes_with_its_cause_alone(name: str):
    assert kinds(findings(stage(**ILL[name]))) == [name]
    assert kinds(findings(stage(**ILL[name])[: 2 * STEPS // 3])) == []


@pytest.mark.parametrize("name", sorted(set(ILL) - {"probe gap"}))
def test_each_names_a_knob_of_the_config(name: str):
    (finding,) = findings(stage(**ILL[name]))
    told = finding.told("gad")
    knobs = re.findall(r"stages\.gad\.([a-z_.]+[a-z])", told)
    assert knobs and "STAGE" not in told
    for knob in knobs:
        section = GadConfig()
        for part in knob.split("."):
            section = getattr(section, part)


def test_shorter_answers_are_a_drift_too():
    assert kinds(findings(stage(length_mean=60.0))) == ["length"]


def test_a_warm_up_may_begin_blind():
    rows = [{name: value for name, value in row.items() if "reward" not in name} for row in stage(held_out=0.5)]
    assert findings(rows) == []


def test_a_few_steps_and_steps_without_a_number_tell_nothing():
    assert findings(stage(steps=WINDOW - 1, kl=9.0, entropy=0.0, accuracy=1.0)) == []
    rows = stage()
    for row in rows[-5:]:
        row |= dict.fromkeys(WELL, math.nan)
    assert findings(rows) == []


def test_an_episode_ends_when_all_is_well_again():
    rows = stage(held_out=0.5)
    again = [row | {"step": row["step"] + STEPS} for row in stage()]
    (episode,) = episodes([*rows, *again], looks=10_000)
    assert (episode.finding.name, episode.first, episode.last) == ("blind", 2 * WINDOW + 1, STEPS)
    assert episodes(rows, looks=7)[0].last == STEPS


def test_news_are_told_once_and_so_is_their_end():
    rows = [*stage(held_out=0.5), *stage()]
    told = [(index, line) for watch in [Watch("gad", rows[:10])] for index, row in enumerate(rows[10:], 10) for line in watch.see(row)]
    assert [index for index, _ in told] == [2 * WINDOW, STEPS]
    assert told[0][1].startswith("gad: the discriminator is right on only 0.50") and "stages.gad.discriminator" in told[0][1]
    assert told[1][1] == "gad: no longer: blind"
    assert Watch("gad", rows[: STEPS - 1]).see(rows[STEPS - 1]) == [], "what was told before an interruption is not told again"
