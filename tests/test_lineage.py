"""A stage goes on with the config, model, tokenizer, template and data that it began with, or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gadjax.checkpointing import Checkpoints
from gadjax.cli import main
from gadjax.errors import UserError
from gadjax.lineage import check_lineage
from gadjax.runs import Run
from gadjax.session import Session
from tests import tiny


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished experiment's run."""
    whole, _ = tiny.finished(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny.CONFIG)
    return Path(shutil.copytree(whole.run, tmp_path / "runs" / "tiny"))


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


FILES = {
    "config.json": lambda path: path.write_text(path.read_text() + "\n"),
    "tokenizer_config.json": lambda path: path.write_text(path.read_text() + "\n"),
    "tokenizer.json": lambda path: path.write_text(path.read_text() + "\n"),
    "chat_template.jinja": lambda path: path.write_text(path.read_text() + "!"),
    "model.safetensors": flip,
}
FIELDS = {
    "optimizer.clip_norm": {"optimizer": {"clip_norm": 0.5}},
    "stages.gad.learning_rate": {"stages": {"gad": {"learning_rate": 0.5}}},
    "data.max_prompt_tokens": {"data": {"max_prompt_tokens": 17}},
    "student.compute_dtype": {"student": {"compute_dtype": "bfloat16"}},
    "student.template": {"student": {"template": {"enable_thinking": False}}},
    "run.seed": {"run": {"seed": 1}},
}


def changed(run: Run, values: dict) -> Run:
    def merged(old: dict, new: dict) -> dict:
        return old | {name: merged(old[name], value) if isinstance(value, dict) and name in old else value for name, value in new.items()}

    config = type(run.config).model_validate(merged(run.config.model_dump(by_alias=True), values))
    return replace(run, config=config)


def test_what_has_changed_is_named(copy: Path):
    session = Session.open(Run.at(copy), copy / "student")
    with Checkpoints(session.run.checkpoints("gad"), read_only=True) as checkpoints:
        before = checkpoints.restore_host(6)["lineage"]
    check_lineage(session, "gad", before)
    check_lineage(replace(session, run=changed(session.run, {"mesh": {"data": 2}, "run": {"nonfinite": "skip"}})), "gad", before)
    for field, values in FIELDS.items():
        with pytest.raises(UserError, match=rf"gad/checkpoints: was made with {field}[. ].*; undo the change or choose another run\.name"):
            check_lineage(replace(session, run=changed(session.run, values)), "gad", before)
    for name, change in FILES.items():
        path: Path = copy / "student" / name
        content = path.read_bytes()
        spoil: Callable[[Path], object] = change
        spoil(path)
        with pytest.raises(UserError, match=rf"student/{name}: is not what stages\.gad was trained with; bring it back"):
            check_lineage(session, "gad", before)
        path.write_bytes(content)
    with pytest.raises(UserError, match="was trained on other data than the run has now"):
        check_lineage(replace(session, snapshot=replace(session.snapshot, digest="other")), "gad", before)


def test_a_config_that_was_edited_in_the_run_too_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(copy / "stages" / "gad" / "checkpoints" / "6")
    kept = yaml.safe_load((copy / "config.yaml").read_text())
    kept["optimizer"]["clip_norm"] = 0.5
    (copy / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    with pytest.raises(SystemExit) as ended:
        main(["train", "tiny.yaml", "optimizer.clip_norm=0.5"])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "stages/gad/checkpoints: was made with optimizer.clip_norm = 0.2, the config says 0.5" in told
