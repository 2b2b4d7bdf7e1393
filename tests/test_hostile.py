"""Collecting through a hostile server, with collectors that are killed again and again: nothing is lost, and nothing doubled.

pytest -s -m "slow or not slow" tests/test_hostile.py        prints the figures of both trials
"""

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gadjax.records import Prompt
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import all_requests as requests_of
from gadjax.teachers.collect import answers, summarize
from gadjax.teachers.config import TeacherConfig
from tests.hostile import FAULTS

ROOT = Path(__file__).parent.parent
COLLECTOR = """
import sys
from gadjax.errors import UserError
from gadjax.records import Prompt
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import collect
from gadjax.teachers.config import TeacherConfig
teacher, path, count, lease = TeacherConfig.model_validate_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
with TeacherCache(path, lease_seconds=lease) as cache:
    summary = collect([Prompt.of(f"question {number}") for number in range(count)], teacher, cache)
sys.exit(0 if summary.ok == count else 3)
"""


@dataclass(frozen=True)
class Trial:
    """So many prompts, 30 % faults, two collectors at once on one cache, one of which is killed so many times."""

    prompts: int
    kills: int
    concurrency: int
    lease: float  # seconds
    between: tuple[float, float]  # seconds from a collector's first answers to its kill


SHORT = Trial(prompts=300, kills=2, concurrency=16, lease=1.5, between=(0.1, 0.3))
LONG = Trial(prompts=10_000, kills=20, concurrency=64, lease=5.0, between=(0.5, 2.5))


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """The figures of a trial."""
    port_file, path, rng = folder / "port", folder / "teacher.sqlite", random.Random(0)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile", str(port_file), "0.3", "0"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (port_file.exists() and port_file.read_text()):
        assert server.poll() is None
        time.sleep(0.02)
    address = f"http://127.0.0.1:{port_file.read_text()}/v1"
    teacher = TeacherConfig(
        base_url=address, api_key_env="HOSTILE_KEY", concurrency=trial.concurrency, tries=12, retry_wait=0.02, timeout=1.0, max_cost=1e6
    )
    command = [sys.executable, "-c", COLLECTOR, teacher.model_dump_json(), str(path), str(trial.prompts), str(trial.lease)]
    started, kills = time.monotonic(), 0
    collectors = [subprocess.Popen(command) for _ in range(2)]
    try:
        while any(collector.poll() is None for collector in collectors):
            if kills == trial.kills:
                time.sleep(0.05)
                continue
            victim = kills % 2
            wait_for_answers(path, collectors[victim])
            time.sleep(rng.uniform(*trial.between))
            if collectors[victim].poll() is None:
                collectors[victim].kill()
                collectors[victim].wait()
                kills += 1
                collectors[victim] = subprocess.Popen(command)
        statuses = [collector.returncode for collector in collectors]
    finally:
        for collector in collectors:
            collector.kill()
            collector.wait()
        told, _ = server.communicate("")
    prompts = [Prompt.of(f"question {number}") for number in range(trial.prompts)]
    with TeacherCache(path, read_only=True) as cache:
        found = answers(prompts, teacher, cache)
        rows = cache._db.execute("SELECT count(*), count(DISTINCT key) FROM answers").fetchone()
        summary = summarize(requests_of(prompts, teacher), cache)
    right = sum(answer.text == f"answer to {prompt.text}" for prompt, answer in zip(prompts, found, strict=False))
    figures = {"prompts": trial.prompts, "ok": summary.ok, "right": right, "rows": rows[0], "doubled": rows[0] - rows[1]}
    figures |= {"lost": trial.prompts - len(found), "kills": kills, "statuses": statuses, "seconds": round(time.monotonic() - started, 1)}
    return figures | json.loads(told)


def wait_for_answers(path: Path, collector: subprocess.Popen[bytes]) -> None:
    """Until there are some more answers than there were, or the collector has ended."""
    before = None
    while collector.poll() is None:
        with suppress(Exception), TeacherCache(path, read_only=True) as cache:
            (count,) = cache._db.execute("SELECT count(*) FROM answers WHERE state = 'ok'").fetchone()
            before = count if before is None else before
            if count > before + 10:
                return
        time.sleep(0.02)


def check(trial: Trial, figures: dict[str, Any]) -> None:
    print(json.dumps(figures))
    wanted = trial.prompts
    assert (figures["ok"], figures["right"], figures["rows"], figures["answered"]) == (wanted, wanted, wanted, wanted)
    assert (figures["lost"], figures["doubled"], figures["statuses"]) == (0, 0, [0, 0])
    assert figures["kills"] == trial.kills
    assert figures["paid twice"] <= trial.kills * trial.concurrency


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_KEY", "sk-hostile")


def test_a_short_trial_loses_and_doubles_nothing(tmp_path: Path) -> None:
    check(SHORT, run(SHORT, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_prompts_lose_and_double_nothing(tmp_path: Path) -> None:
    figures = run(LONG, tmp_path)
    check(LONG, figures)
    assert figures["kinds"] == len(FAULTS) >= 30
    assert figures["faults"] >= 0.25 * LONG.prompts
