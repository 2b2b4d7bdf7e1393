"""Several runs side by side, and the model card of what came out of one."""

import json
from pathlib import Path

import pytest
import yaml

from gadjax import cli
from gadjax.config import dump_config, make_config
from gadjax.metrics import MetricsLog
from gadjax.report.comparison import settings
from tests import tiny
from tests.test_report import Page


def make_run(folder: Path, seed: int, value: float, stages: tuple[str, ...] = ("seqkd", "gad")) -> Path:
    config = make_config({"run": {"name": "any", "seed": seed}, "teacher": {"backend": "tutor"}, "prompts": {"train": "tutor:9"}})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    for stage in stages:
        with MetricsLog(folder / "stages" / stage, folder / "tensorboard" / stage) as log:
            for step in range(1, 4):
                log.write(step, {"student/loss": value / step, "validation/rouge_l": value})
    told = {stage: {"rouge_l": value + index, "distinct_2": value} for index, stage in enumerate(stages)}
    intervals = {stage: {"rouge_l": [value + index - 0.1, value + index + 0.1]} for index, stage in enumerate(stages)}
    summary = {"stages": told, "intervals": intervals, "differences": {}, "baseline": "seqkd", "prompts": 50, "seconds": 10.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def compare(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *map(str, arguments)])
    return stop.value.code


def test_runs_are_compared_in_a_table_and_on_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = make_run(tmp_path / "one<b>", 0, 0.25), make_run(tmp_path / "two", 7, 0.5)
    page = tmp_path / "page.html"
    assert compare(one, two, "--out", page) == 0
    table = capsys.readouterr().err
    assert "one<b>/gad" in table and "1.250 ± 0.100" in table and "1.500 ± 0.100" in table
    found = Page(page.read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(found.tags) - {"b"}
    for words in ("one<b> and two", "Settings that differ", "run.seed", "Stage seqkd", "Stage gad", "Student's loss", "1.500"):
        assert words in found.text, words
    assert "run.name" not in found.text
    assert compare(one, two, "--out", page, "--stage", "seqkd", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert {name: metrics["rouge_l"] for name, metrics in summary["stages"].items()} == {"one<b>/seqkd": 0.25, "two/seqkd": 0.5}


def test_runs_of_one_name_in_two_folders_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a/same", "b/same")):
        make_run(Path(name), seed, 0.25)
    assert compare("a/same", "b/same") == 0
    assert "a/same/gad" in capsys.readouterr().err
    assert (tmp_path / "compare.html").is_file()


def test_what_cannot_be_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = make_run(tmp_path / "one", 0, 0.25), make_run(tmp_path / "two", 0, 0.5, stages=("seqkd",))
    (tmp_path / "empty").mkdir()
    for arguments, told in (
        ((one,), "name two or more"),
        ((one, one), "name two or more"),
        ((one, tmp_path / "empty"), "is no run"),
        ((one, two, "--stage", "gad"), "two: has not evaluated a stage gad"),
    ):
        assert compare(*arguments, "--out", tmp_path / "page.html") == 2
        assert told in capsys.readouterr().err
    (two / "summary.json").unlink()
    assert compare(one, two) == 2
    assert not (tmp_path / "page.html").exists()


def test_settings_that_differ_are_found_wherever_they_are():
    rows = settings({"a": {"x": {"y": 1, "z": 2}, "run": {"name": "a"}}, "b": {"x": {"y": 1}, "run": {"name": "b"}}})
    assert rows == [("x.z", ["2", "–"])]


@pytest.mark.timeout(600)  # it may wait for a whole run
def test_an_export_has_a_card(tmp_path_factory: pytest.TempPathFactory):
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    card = (experiment.run / "export" / "gad" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    summary = json.loads((experiment.run / "summary.json").read_text())
    for words in (
        "# tiny/gad",
        "algorithm `gad`",
        "`tutor`",
        "Read these terms",
        "training groups: 40",
        "held-out groups: 8",
        "learning_rate: 0.001",
    ):
        assert words in text, words
    assert f"| rouge_l | {summary['stages']['gad']['rouge_l']:.4g} |" in text
