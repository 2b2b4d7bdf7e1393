"""A run where no key is, as on rented chips: what was collected is frozen, so no teacher is needed, and a judge can wait."""

from pathlib import Path

import pytest

from gadjax import cli
from gadjax.errors import UserError
from gadjax.session import Session
from tests import tiny
from tests.desk import KEY, PROMPTS, Desk, Reply, desk, error, ok
from tests.test_collecting import write_rows

JUDGE = "evaluation.judge={model: j, api_key_env: JUDGE_KEY, price: {input: 1.0, output: 1.0}}"


def reply(text: str, before: int) -> Reply:
    return (400, {}, error("too long")) if text == PROMPTS[0].text else ok(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run that trains and measures nothing, in `here` and with its bucket in `bucket`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", KEY)
    write_rows("prompts.jsonl", [{"prompt": prompt.text} for prompt in PROMPTS])
    Path("tiny.yaml").write_text(tiny.CONFIG)

    def export(session: Session, name: str) -> Path:
        folder = session.run.folder / "export" / name
        folder.mkdir(parents=True)
        (folder / "weights").write_text("all")
        return folder

    monkeypatch.setattr("gadjax.run.export_stage", export)
    for part in ("_train", "_evaluate", "_report"):
        monkeypatch.setattr(f"gadjax.run.{part}", lambda *_: None)
    return ["tiny.yaml", "prompts={train: prompts.jsonl, validation: null}", f"run.bucket={tmp_path / 'bucket'}"]


def gadjax(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def asked_of(server: Desk, url: str) -> str:
    return f"teacher={{backend: openai, model: gpt-5-chat, api_key_env: TEST_KEY, base_url: '{url}', tries: 1}}"


def test_frozen_data_needs_no_teacher(run: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    with desk(reply) as (server, teacher):
        run.append(asked_of(server, str(teacher.base_url)))
        assert gadjax("collect", *run) == gadjax("prepare", *run) == 0
        asked = len(server.bodies)
        monkeypatch.delenv("TEST_KEY")
        capfd.readouterr()
        assert gadjax("run", *run, JUDGE) == 0
        assert len(server.bodies) == asked  # the answer that failed is missing still
    said = capfd.readouterr().err
    assert "collect: the data is frozen, and no key is here: nothing more is asked" in said
    assert "judge: JUDGE_KEY is not set here; where it is, ask with `gadjax judge runs/tiny`" in said
    assert Path("bucket/tiny/export/gad/weights").read_text() == "all"


def test_all_is_in_the_bucket_before_a_judge_refuses(run: list[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise UserError("evaluation.judge", "is dear", "pay")

    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr("gadjax.run.judge_run", refuse)
    with desk(reply) as (server, teacher):
        assert gadjax("run", *run, asked_of(server, str(teacher.base_url)), JUDGE) == 2
        assert len(server.bodies) == len(PROMPTS)
    assert Path("bucket/tiny/export/gad/weights").read_text() == "all"
