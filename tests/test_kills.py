"""A run that is killed again and again does every step with the same bits as one that is not.

pytest -s -m slow tests/test_kills.py -k 8_kills         eight kills at named points, and SIGTERM once
pytest -s -m slow tests/test_kills.py -k 60_kills        at every named point, then at any moment
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gadjax.metrics import read
from tests import tiny
from tests.kills import RECORDS

# What the balance keeps from step to step counts too: a step depends on those before in every way that there is.
CONFIG = tiny.with_stages(
    warmup=f"algorithm: warmup, {tiny.SAMPLING}, max_steps: 3, checkpoint_every: 2, validate_every: 2, "
    "discriminator: {only_first_steps: 1, learning_rate: 1e-3}",
    gad=f"algorithm: gad, from: warmup, {tiny.SAMPLING}, max_steps: 7, checkpoint_every: 2, validate_every: 3, "
    "balance: {accuracy_band: [0.1, 0.5], control: rate, reward_scaling: running}, discriminator: {learning_rate: 1e-3}",
)
STEPS = {"warmup": 3, "gad": 7}


def trial(tmp_path: Path, kills: int) -> tuple[Path, dict[str, Any]]:
    experiment = tiny.Tiny(tmp_path, tmp_path / "compiled")
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "tests.kills", str(tmp_path / "trial"), str(tmp_path / "config.yaml"), str(kills), "0"]
    done = subprocess.run(command, env=experiment.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return tmp_path / "trial", json.loads(done.stdout.splitlines()[-1])


def recorded(folder: Path) -> list[tuple[tuple[str, str, int], Any]]:
    """What was done in every step, those included that were done again after a kill; a line that a kill cut off is left out."""
    lines = (folder / RECORDS).read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [((row["kind"], row["stage"], row["step"]), row["value"]) for row in rows]


def bits(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"".join(name.encode() + bits(value[name]) for name in sorted(value))
    if isinstance(value, list):
        return b"".join(map(bits, value))
    return np.float64(value).tobytes()


def differing(one: bytes, other: bytes) -> int:
    """Bits in which two texts of bytes differ; what one of them has more counts in full."""
    common = min(len(one), len(other))
    unlike = np.frombuffer(one[:common], np.uint8) ^ np.frombuffer(other[:common], np.uint8)
    return int(np.bitwise_count(unlike).sum()) + 8 * abs(len(one) - len(other))


def check(tmp_path: Path, kills: int) -> None:
    base, told = trial(tmp_path, kills)
    whole = dict(recorded(base / told["whole"]))
    assert {key[1:] for key in whole if key[0] == "ids" and key[2]} == {
        (stage, step) for stage, n in STEPS.items() for step in range(1, n + 1)
    }
    wrong, compared = 0, 0
    for name in told["runs"]:
        again = recorded(base / name)
        assert {key for key, _ in again} == whole.keys()
        wrong += sum(differing(bits(value), bits(whole[key])) for key, value in again)
        compared += len(again)
        for stage, steps in STEPS.items():
            mine, theirs = (read(base / run / "runs" / "tiny" / "stages" / stage / "metrics.jsonl") for run in (name, told["whole"]))
            assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [*range(steps + 1)], "not one row a step"
        for file in ("export/gad/model.safetensors", "evaluation/gad.jsonl", "evaluation/student.jsonl"):
            one, other = ((base / run / "runs" / "tiny" / file).read_bytes() for run in (name, told["whole"]))
            wrong += differing(one, other)
    print(f"\n{told['kills']} kills, {wrong} differing bits ({compared} records of {len(whole)} compared)")
    assert compared > len(whole), "no step was done again"
    said = "".join((base / name / "said.txt").read_text() for name in told["runs"])
    assert len(set(re.findall(r"(\w+): goes on after step (\d)", said))) >= 3, "too few resumed within a stage"
    assert re.search(r"asked to stop; the checkpoint after step \d is written", said), "SIGTERM saved nothing"
    assert 0 < told["slowest"] < 20, "SIGTERM was not tried, or took too long"
    statuses = {end["status"] for end in told["ends"]}
    assert statuses <= {-9, 143, 0}, told["ends"]
    assert told["kills"] == kills and wrong == 0
    assert [end["point"] for end in told["ends"] if "number=<Signals.SIGTERM" in end["point"] and end["status"] != 143] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_8_kills_change_no_bit(tmp_path: Path):
    check(tmp_path, 8)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_60_kills_change_no_bit(tmp_path: Path):
    check(tmp_path, 60)
