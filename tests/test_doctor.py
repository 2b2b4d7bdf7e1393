"""What the machine has and what a config needs: told by name, keys never by value."""

import json
from pathlib import Path

import pytest

from gadjax.config import make_config
from gadjax.doctor import complaints, doctor, machine, needs

SECRET = "sk-very-secret"
TUTORED = {"teacher": {"backend": "tutor"}, "prompts": {"train": "tutor:20"}}
SMALL = {"path": None, "random": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 32, "words": 60}}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_the_machine_is_described_without_secrets(capsys: pytest.CaptureFixture[str]):
    doctor(None, [], as_json=True)
    said = capsys.readouterr().out
    assert SECRET not in said
    found = json.loads(said)["machine"]
    assert found["keys_set"]["OPENAI_API_KEY"] is True and found["keys_set"]["HF_TOKEN"] is False
    assert found["devices"].startswith("8 x ") and found["memory_gb"] > 0.5 and found["disk_free_gb"] > 0 and found["versions"]["jax"]


def test_what_a_config_needs_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(TUTORED | {"student": SMALL}))
    doctor(file, ["prompts.train=tutor:30"], as_json=False)
    said = capsys.readouterr().out
    for line in (
        "this machine",
        "keys set: OPENAI_API_KEY yes, HF_TOKEN no, WANDB_API_KEY no",
        "  prompts: 30",
        "  teacher: tutor",
        "nothing that the config needs is",
    ):
        assert line in said, line


def test_needs_follow_the_parameters():
    alone = {"stages": {"seqkd": {"algorithm": "seqkd"}}}
    one, both = (needs(make_config(TUTORED | {"student": SMALL} | stages)) for stages in (alone, {}))
    count = one["parameters"]
    assert count == 60 * 16 + 16 * (16 + 8 + 8 + 16) + 3 * 16 * 32 + 3 * 16, "tied embedding, one layer, norms"
    assert one["device_memory_gb"] == 12 * count / 1e9
    assert both["device_memory_gb"] == (24 + 4) * count / 1e9
    assert both["disk_gb"] == 3 * 2 * 24 * count / 1e9


def test_what_is_missing_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    wants = needs(make_config({"teacher": {"model": "unheard-of"}}))
    told = list(complaints(machine(), wants))
    assert [line.split(":")[0] for line in told] == ["teacher.api_key_env", "prompts.train", "teacher.price", "student.path"]
    small = {"disk_free_gb": 1.0, "parameters": 1, "device_memory_gb": 3.0, "disk_gb": 2.0}
    told = list(complaints({"device_memory_gb": None, "memory_gb": 2.0}, small))
    assert [line.split(":")[0] for line in told] == ["mesh", "run.folder"]
