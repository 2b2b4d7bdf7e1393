"""A whole run through the command line: what it leaves in its folder, and that it is done only once."""

import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from gadjax import cli, evaluate, runs, terminal
from gadjax.answering import Answerer
from gadjax.errors import UserError
from gadjax.evaluation.answers import read_answers
from gadjax.metrics import read
from gadjax.models.checkpoint import load, read_config
from gadjax.runs import CLOCK, Clock, Run
from gadjax.session import Session
from gadjax.teachers import tutor
from gadjax.text import Text
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # the first test waits for a whole run

STUDENT = {"student/loss", "student/entropy", "student/grad_norm"}
DISCRIMINATOR = {f"discriminator/{name}" for name in ("loss", "accuracy", "teacher_score", "student_score", "margin", "grad_norm")}
ROLLOUT = {"rollout/length_mean", "rollout/truncated_fraction", "rollout/tokens_per_second", "time/idle_fraction"}
MEASURED = {"rouge_l", "overlap_1", "overlap_2", "overlap_3", "overlap_4", "length_mean"} | {f"distinct_{n}" for n in (1, 2, 3, 4)}
MEASURED |= {"validity", "greedy_validity", "correctness", "reverse_kl"}  # the teacher is the tutor
VALIDATION = {"validation/loss", "time/validation_seconds"} | {f"validation/{name}" for name in MEASURED}
ADVERSARIAL_VALIDATION = VALIDATION | {"validation/discriminator_accuracy", "validation/margin", "discriminator/probe_gap"}


def seconds(*parts: str) -> set[str]:
    return {f"time/{part}_seconds" for part in parts}


NAMES = {
    "seqkd": STUDENT | seconds("data", "student", "host/packing"),
    "warmup": STUDENT | DISCRIMINATOR | ROLLOUT | seconds("rollout", "data", "discriminator", "student", "host/answers", "host/packing"),
    "gad": STUDENT
    | {"student/reward_mean", "student/reward_std", "student/kl", "student/clip_fraction"}
    | DISCRIMINATOR
    | ROLLOUT
    | {"rollout/zero_std_fraction", "rollout/logp_gap"}
    | seconds("rollout", "data", "discriminator", "student", "host/answers", "host/packing"),
}
WHILE_ANOTHER_WORKS = seconds("host/metrics")  # those of the step before are written


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What `gadjax run` said."""
    return tiny.finished(tmp_path_factory.getbasetemp())[1]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, first: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the finished run; the test is where gadjax was started."""
    experiment, _ = tiny.finished(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(experiment.folder)
    return experiment.run


def gadjax(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def contents(folder: Path) -> Mapping[str, object]:
    """The folder's files, but for the clock, which counts every call."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CLOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_it_succeeds_and_says_nothing_but_what_it_does(first: subprocess.CompletedProcess[str]):
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    ours = re.compile(r"(collect|prepare|seqkd|warmup|gad|evaluate|report|export): .+|\| .+ \||\|[-|]+\||8 prompts, 95 % intervals; .+| *")
    assert [line for line in first.stderr.splitlines() if not ours.fullmatch(line)] == []


def test_its_table_is_not_broken(first: subprocess.CompletedProcess[str]):
    head, _, *rows = [line for line in first.stderr.splitlines() if line.startswith("|")]
    assert head.replace("|", " ").split() == ["metric", "student", "seqkd", "warmup", "gad"]
    assert {len(row) for row in rows} == {len(head)}
    assert "…" not in "".join(rows)
    assert [row.split()[1] for row in rows[::2]][:2] == ["rouge_l", "overlap_1"]


def test_all_artefacts_are_there(run: Path):
    files = contents(run).keys()
    expected = {
        "config.yaml",
        "summary.json",
        "summary.csv",
        "teacher.sqlite",
        "data/manifest.json",
        "student/model.safetensors",
        "report/index.html",
    }
    expected |= {f"stages/{stage}/metrics.jsonl" for stage in tiny.STEPS}
    expected |= {f"evaluation/{stage}.jsonl" for stage in ("student", *tiny.STEPS)}
    assert expected <= files
    for stage, steps in tiny.STEPS.items():
        kept = sorted(int(path.name) for path in (run / "stages" / stage / "checkpoints").iterdir())
        assert kept == ([steps] if stage == "seqkd" else [steps - 2, steps])
        assert list((run / "tensorboard" / stage).glob("events.out.tfevents.*"))
    assert [path.name for path in (run / "export").iterdir()] == ["gad"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (run / "export" / "gad").iterdir()
    }
    assert not [name for name in files if "tmp" in name or "partial" in name or name.endswith(("-wal", "-shm"))]


def test_its_config_is_the_resolved_one(run: Path):
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["optimizer"]["clip_norm"] == 0.2  # a default
    assert kept["stages"]["gad"]["from"] == "warmup"
    assert Run.at(run).config == Run.open(Path("tiny.yaml"), []).config


def test_summary_has_all_stages_and_metrics(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == ["student", "seqkd", "warmup", "gad"]
    assert all(set(metrics) == MEASURED for metrics in summary["stages"].values())
    assert (summary["baseline"], summary["prompts"]) == ("seqkd", 8)
    assert 1 < summary["seconds"] <= float((run / CLOCK).read_text())


@pytest.mark.parametrize("stage", tiny.STEPS)
def test_metrics_have_one_row_a_step(run: Path, stage: str):
    before, *rows = read(run / "stages" / stage / "metrics.jsonl")
    validation = VALIDATION if stage == "seqkd" else ADVERSARIAL_VALIDATION
    assert set(before) == {"step"} | validation
    assert [row["step"] for row in rows] == list(range(1, tiny.STEPS[stage] + 1))
    for row in rows:
        validated = row["step"] % 3 == 0
        learns = stage != "warmup" or row["step"] > 2  # only_first_steps
        names = NAMES[stage] if learns else NAMES[stage] - STUDENT - seconds("student", "host/packing")
        if row["step"] in ((2, 3) if stage == "seqkd" else (2, 6)):  # the step before has neither validation nor checkpoint
            names = names | WHILE_ANOTHER_WORKS
        assert set(row) - {"step"} == names | (validation if validated else set())
        assert np.isfinite([value for name, value in row.items() if "distinct" not in name]).all()  # nobody said two words


@pytest.mark.parametrize("stage", tiny.STEPS)
def test_a_few_answers_are_kept_at_every_validation(run: Path, stage: str):
    kept = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in (run / "stages" / stage / "answers").iterdir()
    }
    assert kept.keys() == {"0", "3"} | {str(tiny.STEPS[stage])}
    assert all([row["id"] for row in rows] == [row["id"] for row in kept["0"]] and len(rows) == 6 for rows in kept.values())
    ended = {row["id"]: row["greedy"] for row in map(json.loads, (run / "evaluation" / f"{stage}.jsonl").read_text().splitlines())}
    assert all(row["greedy"] == ended[row["id"]] for row in kept[str(tiny.STEPS[stage])]), "the last validation is the evaluation"


def test_the_models_learn_and_agree_with_the_sampler(run: Path):
    rows = {stage: read(run / "stages" / stage / "metrics.jsonl") for stage in tiny.STEPS}
    assert rows["seqkd"][-1]["validation/loss"] < rows["seqkd"][0]["validation/loss"]
    assert rows["warmup"][-1]["validation/loss"] < rows["warmup"][0]["validation/loss"]
    assert rows["gad"][0]["validation/loss"] == rows["warmup"][-1]["validation/loss"]  # it goes on with the warmed-up student
    assert rows["gad"][1]["student/kl"] < 1e-8 < rows["gad"][-1]["student/kl"]  # from the student at the start of the stage
    assert max(row["rollout/logp_gap"] for row in rows["gad"][1:]) < 1e-5
    assert max(row.get("discriminator/probe_gap", 0) for row in rows["gad"]) < 1e-5


def test_the_last_validation_is_the_evaluation(run: Path):
    # All 8 held-out groups are looked at in both, by the same programs and the same streams.
    measured = json.loads((run / "summary.json").read_text())["stages"]
    for stage, steps in tiny.STEPS.items():
        last = json.loads((run / "stages" / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == steps
        assert {name: last[f"validation/{name}"] for name in MEASURED} == measured[stage]


def test_export_is_the_checkpoint(run: Path):
    session = Session.open(Run.at(run), run / "student")
    folder = run / "export" / "gad"
    family, dims = read_config(folder)
    assert dims == session.dims
    exported = load(folder, family, session.models.student.shapes)
    trained, untouched = session.student_params("gad"), session.untouched()
    jax.tree.map(np.testing.assert_array_equal, exported, trained)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (trained, untouched)), strict=True))
    messages = [{"role": "user", "content": "two plus two"}]
    text = Text.load(str(folder))
    assert text.prompt_ids(messages, 16) == session.text.prompt_ids(messages, 16)
    described = json.loads((folder / "config.json").read_text())
    assert (described["eos_token_id"], described["pad_token_id"]) == (text.end_of_turn, text.pad)


def test_another_stage_is_exported(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"  # elsewhere, and without the teacher's answers
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("teacher.sqlite", "export"))
    assert gadjax("export", str(copy / "warmup")) == 0
    assert gadjax("export", str(copy)) == 0
    assert sorted(path.name for path in (copy / "export").iterdir()) == ["gad", "warmup"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (copy / "export" / "gad", run / "export" / "gad")]
    assert weights[0] == weights[1] != (copy / "export" / "warmup" / "model.safetensors").read_bytes()


def test_an_export_in_bfloat16_replaces_one_in_float32(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert gadjax("export", str(copy), "--dtype", "bfloat16") == 0
    assert {str(array.dtype) for array in load_file(copy / "export" / "gad" / "model.safetensors").values()} == {"bfloat16"}
    assert gadjax("export", str(copy), "--dtype", "int8") == 2
    assert "gadjax: --dtype: int8 is not offered; use float32 or bfloat16" in capsys.readouterr().err


def test_a_discriminator_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    assert gadjax("export", str(copy / "warmup"), "--discriminator") == 0
    session = Session.open(Run.at(copy), copy / "student")
    tensors = load_file(copy / "export" / "warmup-discriminator" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"][0], session.final_role("warmup", "discriminator").params["head"])
    assert gadjax("export", str(copy / "seqkd"), "--discriminator") == 2
    assert capsys.readouterr().err.endswith("gadjax: stages.seqkd: has no discriminator; name a stage of algorithm warmup or gad\n")


def test_an_export_of_another_checkpoint_is_made_again(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "export" / "gad" / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(b"kept")
    assert gadjax("export", str(copy / "gad")) == 0 and weights.read_bytes() == b"kept"
    (copy / "export" / "gad" / "gadjax.json").write_text("{}")
    assert gadjax("export", str(copy / "gad")) == 0 and weights.read_bytes() == right


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    for name in (f"{tmp_path}/copy/gad", "runs/tiny/wramup", "runs/tniy"):
        assert gadjax("export", name) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"gadjax: {tmp_path}/copy/gad: is not trained yet; run `gadjax train` with its config first",
        "gadjax: runs/tiny/wramup: the run has no stage wramup; use one of seqkd, warmup, gad",
        "gadjax: runs/tniy: is no run; `gadjax run` makes one; name its folder or a stage of it, as in runs/quickstart/gad",
    ]


def test_the_same_command_again_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher is asked again")

    monkeypatch.setattr(tutor, "complete", refuse)
    written = ("data", "evaluation", "export", "stages", "student", "tensorboard")

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for part in written for path in (run / part).rglob("*")}

    files, when = contents(run), times()
    assert gadjax("run", "tiny.yaml") == 0
    assert contents(run) == files
    assert times() == when


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.gad.learning_rate=1e-4", "was made with stages.gad.learning_rate = 0.001, the config says 0.0001"),
        ("stages.gad.discriminator.train=false", "was made with stages.gad.discriminator.train = True, the config says False"),
        ("prompts.train=tutor:41", "was made with prompts.train = 'tutor:40', the config says 'tutor:41'"),
        ("run.seed=1", "was made with run.seed = 0, the config says 1"),
        ("student={path: x, random: null}", "was made with student.path = None, the config says 'x'"),
    ],
)
def test_another_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str], override: str, told: str):
    files = contents(run)
    assert gadjax("run", "tiny.yaml", override) == 2
    assert capsys.readouterr().err == f"gadjax: runs/tiny: {told}; undo the change or choose another run.name\n"
    assert contents(run) == files


def test_what_does_not_touch_the_results_may_change(run: Path):
    overrides = ["mesh.data=2", "teacher.concurrency=1", "evaluation.export=seqkd", "stages.later={algorithm: gad, from: gad}"]
    assert list(Run.open(Path("tiny.yaml"), overrides).config.stages) == ["seqkd", "warmup", "gad", "later"]


def test_a_run_that_was_moved_is_found(run: Path):
    moved = run.with_name("moved")
    run.rename(moved)
    try:
        assert Run.at(Path("runs/moved")).stage("gad").is_dir()
        assert Run.open(Path("tiny.yaml"), ["run.name=moved"]).folder == Path("runs/moved")
    finally:
        moved.rename(run)


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    with Run.open(Path("tiny.yaml"), []).begin():
        pass
    Path("runs/tiny/stages/seqkd/checkpoints").mkdir(parents=True)
    Run.open(Path("tiny.yaml"), ["run.seed=1"])
    Path("runs/tiny/stages/seqkd/checkpoints/2").mkdir()
    with pytest.raises(Exception, match=r"was made with run\.seed = 0, the config says 1"):
        Run.open(Path("tiny.yaml"), ["run.seed=1"])
    Run.open(Path("tiny.yaml"), ["stages.gad.group_size=4"])  # a stage that has none yet


def test_a_run_of_an_earlier_version_has_the_defaults_of_fields_that_came_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    with Run.open(Path("tiny.yaml"), []).begin():
        pass
    kept = Path("runs/tiny/config.yaml")
    older = yaml.safe_load(kept.read_text())
    del older["stages"]["seqkd"]["schedule"], older["prompts"]["tests"], older["cleaning"]
    kept.write_text(yaml.safe_dump(older, sort_keys=False))
    Path("runs/tiny/stages/seqkd/checkpoints/2").mkdir(parents=True)
    Run.open(Path("tiny.yaml"), [])
    with pytest.raises(Exception, match="was made with cleaning.duplicates = True, the config says False"):
        Run.open(Path("tiny.yaml"), ["cleaning.duplicates=false"])


def interrupt_after(seconds: float) -> None:
    time.sleep(seconds)
    raise KeyboardInterrupt


def test_the_clock_adds_up_all_calls_those_included_that_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "TICK", 0.01)
    file = tmp_path / "clock"
    with Clock(file).running() as clock:
        time.sleep(0.3)
        assert 0.1 < float(file.read_text()) <= clock.seconds  # what is left of a call that is killed here
    first = float(file.read_text())
    with pytest.raises(KeyboardInterrupt), Clock(file).running():
        interrupt_after(0.3)
    assert first + 0.2 < float(file.read_text()) < first + 5


def fake_answers(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are asked for answers from now on; nothing is computed."""
    asked = list[str]()
    old = read_answers(session.run.folder / "evaluation" / "gad.jsonl")
    monkeypatch.setattr(Answerer, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Answerer, "answer", lambda self, params, examples, mode, scorer: old[mode])
    monkeypatch.setattr(Session, "student_params", lambda self, name: asked.append(name))
    return asked


def test_a_stage_whose_checkpoint_is_another_one_is_measured_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("export"))
    session = Session.open(Run.at(tmp_path / "copy"), tmp_path / "copy" / "student")
    asked = fake_answers(session, monkeypatch)
    evaluate.evaluate_stages(session)
    assert asked == []
    manifest = tmp_path / "copy" / "stages" / "gad" / "checkpoints" / "6" / "sha256-0-of-1.json"
    manifest.write_text(manifest.read_text() + "\n")  # as after another training
    evaluate.evaluate_stages(session)
    assert asked == ["gad"]
    evaluate.evaluate_stages(session)
    assert asked == ["gad"]
    evaluate.evaluate_stages(replace(session, snapshot=replace(session.snapshot, digest="other")))
    assert asked == ["gad", "student", "seqkd", "warmup", "gad"]


def test_a_stage_without_its_checkpoints_is_not_shown_as_measured(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "stages" / "gad" / "checkpoints")
    session = Session.open(Run.at(tmp_path / "copy"), tmp_path / "copy" / "student")
    with pytest.raises(UserError, match=r"^stages\.gad: is not trained yet"):
        evaluate.evaluate_stages(session)


def test_a_bar_keeps_its_counts_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(terminal, "console", screen)
    with terminal.track("seqkd-continued", 2400, 1200) as advance:
        advance(1234, "  ".join(f"{word} 0.123" for word in ("loss", "accuracy", "reward", "entropy", "length")))
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue().replace("\x1b", "\n")
    assert "1234/2400" in shown and "length 0.123" in shown


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=terminal.PLAIN_WIDTH))
    with terminal.track("gad", 3) as advance:
        advance(1, "loss 1")
        advance(3, "loss 0")
    terminal.say("[bold]kept[/bold] as it is")
    assert file.getvalue().splitlines()[0] == "gad: 3/3 loss 0"
    assert "[bold]kept[/bold]" in file.getvalue()
