"""Studies: seeds run one after the other, and their summaries made one."""

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gadjax import study
from gadjax.errors import UserError

Runner = Callable[..., object]
VALIDITY = {0: (0.5, 0.6), 1: (0.6, 0.8), 2: (0.4, 0.7)}  # of seqkd and gad; the differences are 0.1, 0.2, 0.3
UNSEEN = {0: (0.2, 0.1), 1: (0.2, 0.2), 2: (0.2, 0.3)}  # the same on a test set


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{name: some, folder: {tmp_path / 'runs'}}}\nprompts: {{train: 'tutor:2'}}\nteacher: {{backend: tutor}}\n")
    return file


def stages(values: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return dict(zip(("seqkd", "gad"), values, strict=True))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of each run; in its place stands what it would have written."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        calls.append(command[len(study.RUN) + 1 :])
        seed = len(calls) - 1
        folder = tmp_path / "runs" / f"some-seed{seed}"
        metrics = [{"step": step, "rollout/length_mean": 10.0 * step + seed, "validation/validity": 0.1 * seed} for step in (0, 1, 2)]
        for name in ("seqkd", "gad"):
            (folder / "stages" / name).mkdir(parents=True)
            (folder / "stages" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        values = [{"validity": value, "odd": value if seed else None} for value in VALIDITY[seed]]
        unseen = {"stages": stages({"validity": value} for value in UNSEEN[seed]), "baseline": "seqkd", "prompts": 3}
        summary = {"stages": stages(values), "baseline": "seqkd", "prompts": 7, "tests": {"unseen": unseen}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_study_runs_every_seed_and_gives_intervals_over_them(tmp_path: Path, config: Path, started: list[list[str]]):
    study.study(config, ["data.rows=8"], 3, None, False)
    assert started == [["data.rows=8", f"run.seed={seed}", f"run.name=some-seed{seed}"] for seed in range(3)]
    found = json.loads((tmp_path / "runs/some-study/study.json").read_text())
    gap = found["differences"]["gad"]["validity"]
    # standard error 0.1 / √3, Student's t with two degrees of freedom 4.3026527
    assert (gap["mean"], gap["low"], gap["high"]) == pytest.approx((0.2, 0.2 - 0.2484138, 0.2 + 0.2484138), abs=1e-6)
    assert found["stages"]["gad"]["validity"] == pytest.approx(0.7)
    assert "odd" not in found["stages"]["gad"], "a metric that one seed lacks"
    lines = (tmp_path / "runs/some-study/study.csv").read_text().splitlines()
    assert lines[0] == "split,stage,metric,mean,low,high,minus_baseline,difference_low,difference_high,seeds"
    assert lines[2].startswith("validation,gad,validity,") and lines[2].endswith(",3")
    drawings = {file.name for file in (tmp_path / "runs/some-study").glob("*.svg")}
    means = {"means-validity.svg", "means-unseen-validity.svg"}
    assert drawings == means | {"curve-length-of-responses.svg", "validation-validity.svg"}


def test_figures_tell_what_they_show(tmp_path: Path, config: Path, started: list[list[str]]):
    study.study(config, [], 3, None, False)
    means, length, validity = (
        (tmp_path / f"runs/some-study/{name}.svg").read_text()
        for name in ("means-validity", "curve-length-of-responses", "validation-validity")
    )
    assert all(f">{told}</text>" in means for told in ("mean over 3 seeds with 95 % interval", "share", "seqkd", "gad"))
    assert ">validity: share of answers in one of the tutor&#39;s forms, T = 0.8</text>" in means
    assert all(f">{told}</text>" in length for told in ("Length of responses", "mean over 3 seeds with 95 % band", "tokens"))
    assert all(f">{told}</text>" in validity for told in ("share", "seqkd", "gad"))
    assert means.count('class="whisker"') == 2, "one for each stage"
    for drawing in (length, validity):
        assert len(re.findall(r'<polygon class="k\d band"', drawing)) == 2, "a band for each stage"
        assert len(set(re.findall(r'<path class="line (k\d+)', drawing))) == 2


def test_test_sets_are_pooled_too(tmp_path: Path, config: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]):
    study.study(config, [], 3, None, False)
    found = json.loads((tmp_path / "runs/some-study/study.json").read_text())["tests"]["unseen"]
    assert (found["stages"]["gad"]["validity"], found["prompts"], found["seeds"]) == (pytest.approx(0.2), 3, 3)
    gap = found["differences"]["gad"]["validity"]
    assert (gap["mean"], gap["high"]) == pytest.approx((0.0, 0.2484138), abs=1e-6)
    lines = (tmp_path / "runs/some-study/study.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines[3:]] == [["unseen", stage, "validity"] for stage in ("seqkd", "gad")]
    table = capsys.readouterr().err.split("unseen:")[1]
    assert "3 prompts" in table and "0.200 ± 0.248" in table


def test_differences_are_taken_from_any_stage(tmp_path: Path, config: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]):
    study.study(config, [], 3, "gad", False)
    found = json.loads((tmp_path / "runs/some-study/study.json").read_text())
    for part, mean in ((found, -0.2), (found["tests"]["unseen"], 0.0)):
        assert part["differences"].keys() == {"seqkd"}
        assert part["differences"]["seqkd"]["validity"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert "minus gad" in capsys.readouterr().err


def test_an_unknown_baseline_is_told_before_anything_runs(config: Path, started: list[list[str]]):
    with pytest.raises(UserError, match=r"^--baseline: gab is not evaluated; use one of student, seqkd, warmup, gad$"):
        study.study(config, [], 3, "gab", False)
    assert not started


def test_one_seed_has_no_interval():
    found = study.pooled([{"stages": {"gad": {"validity": 0.5}}, "baseline": "seqkd", "prompts": 7}])
    assert found["intervals"]["gad"]["validity"] == [None, None]


def test_a_run_that_fails_ends_the_study_with_its_status(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit, match="2"):
        study.study(config, [], 3, None, False)


def test_the_seed_is_the_study_s_own(config: Path, started: list[list[str]]):
    with pytest.raises(UserError, match="leave it out"):
        study.study(config, ["run.seed=4"], 3, None, False)
    assert not started
