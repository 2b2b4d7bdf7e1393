"""A user's mistake, through the real command line: status 2, one line that names the field or file and the mend, nothing half made."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.numpy import load_file, save_file

from gadjax import cli
from gadjax.models.fresh import FreshConfig, write_fresh
from gadjax.report.page import write_report
from gadjax.runs import CLOCK, LOCK, Run
from gadjax.server import Server
from gadjax.teachers import tutor
from tests import tiny

Told = Callable[..., str]
FOLDER = "run.folder=here"
ENDPOINT = "teacher={backend: openai, model: m, api_key_env: TEST_KEY, tries: 1, price: {input: 0, output: 0}, base_url: 'http://127.0.0.1:PORT/v1'}"


@pytest.fixture(autouse=True)
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is in a folder with tiny.yaml, and its teacher has a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", "k")
    Path("tiny.yaml").write_text(tiny.CONFIG)


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    """What `gadjax ARGUMENTS` says of a mistake."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        said = capfd.readouterr()
        assert (stop.value.code, said.out) == (2, "")
        *progress, line = said.err.splitlines()
        assert all(each.startswith("collect: ") for each in progress), said.err
        assert line.startswith("gadjax: ") and said.err.endswith("\n")
        assert "Traceback" not in said.err and ";" in line
        return line.removeprefix("gadjax: ")

    return call


def made() -> set[str]:
    """What is in the folder of runs, the lock and the clock of a run aside."""
    return {str(path.relative_to("here")) for path in Path("here").rglob("*")} - {f"tiny/{name}" for name in ("", LOCK, CLOCK)}


def port_of(server: Server) -> str:
    return str(urlsplit(server.address).port)


def closed_port() -> str:
    """A port that was free a moment ago."""
    with Server(tutor.complete, model="m") as server:
        return port_of(server)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: [}", "tiny.yaml, line 1: is not YAML ("),
        ("run: {nmae: a}", "run.nmae: there is no such field; did you mean `name`?"),
        ("run: {seed: x}", "run.seed: must be a valid integer (it is 'x'); "),
        ("stages: {g: {algorithm: gad, group_size: 1}}", "stages.g.group_size: must be greater than or equal to 2 (it is 1); "),
        ("run: {name: ../../a}", "run.name: must be a plain name"),
        ("data: {max_response_tokens: -1}", "data.max_response_tokens: must be greater than or equal to 1 (it is -1); "),
        ("extends: missing.yaml", "PWD/tiny.yaml: extends: PWD/missing.yaml cannot be read ("),
        ("teacher: {backend: file}", "teacher: backend: file needs `path`"),
    ],
)
@pytest.mark.parametrize("command", ["run", "collect", "prepare", "train", "evaluate", "report"])
def test_a_config_at_fault(told: Told, command: str, text: str, message: str):
    Path("tiny.yaml").write_text(text)
    assert told(command, "tiny.yaml", FOLDER).startswith(message.replace("PWD", os.getcwd()))
    assert made() == set()


def test_a_config_that_is_not_there(told: Told):
    assert "'missing.yaml' does not exist" in told_usage("run", "missing.yaml")
    assert made() == set()


def told_usage(*arguments: str) -> str:
    """In a process of its own, where nothing was imported yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS")}  # an earlier test set it
    command = [sys.executable, "-c", tiny.MAIN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


def test_a_process_of_its_own_says_nothing_else():
    line = told_usage("run", "tiny.yaml", FOLDER, "student={random: null, path: nowhere/student}")
    assert line.startswith("gadjax: student.path: nowhere/student is neither a folder nor a model that the hub gives (")
    assert made() == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.train=missing.jsonl"], "prompts.train: there is no file missing.jsonl; correct the path"),
        (["prompts.train=prompts.txt"], "prompts.train: prompts.txt is none of .jsonl, "),
        (["prompts.train="], "prompts.train: is not given; name a .jsonl file, tutor:6000 "),
        (["prompts.train=broken.jsonl"], "broken.jsonl, line 3: is not JSON ("),
        (["prompts.train=blank.jsonl"], "blank.jsonl, line 2: the prompt is empty; give the last user message a text or leave"),
        (["prompts.validation=blank.jsonl"], "blank.jsonl, line 2: the prompt is empty; "),
        (["teacher={backend: file, path: blank.jsonl}", "prompts.train="], "blank.jsonl, line 2: the prompt is empty; "),
        (["prompts.validation=empty.jsonl"], "prompts: there are none to train on, or none held out; give more prompts"),
        (["teacher={backend: file, path: broken.jsonl}", "prompts.train="], "broken.jsonl, line 1: has none of prompt/response"),
        (["teacher.backend=openai", "teacher.api_key_env=UNSET"], "teacher.api_key_env: the environment variable UNSET is not set; "),
        (["teacher.backend=openai", "teacher.api_key_env=TEST_KEY"], "teacher.price: the price of tutor is not known, "),
        (["prompts.train=strange.jsonl"], "prompts: the tutor does not understand 'hello there'; write it like 'Ana asks Ben"),
        (["teacher={backend: file, path: missing.jsonl}"], "teacher.path: there is no file missing.jsonl; correct the path"),
        (["mesh.data=3"], "mesh: data 3 x fsdp 2 x context 1 x tensor 1 does not make 8 devices; choose sizes "),
        (
            ["stages.gad.batch_groups=-1"],
            "stages.gad.batch_groups: must be greater than or equal to 1 (it is -1); mend it in the config or on",
        ),
        (["student.random.width=-8"], "student.random.width: must be greater than or equal to 8 (it is -8); "),
        (["student={random: null, path: nowhere/student}"], "student.path: nowhere/student is neither a folder nor a model"),
        (["student={random: null, path: .}"], "config.json: cannot be read ("),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_before_anything_is_made(told: Told, overrides: list[str], message: str):
    Path("broken.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"\n')
    Path("blank.jsonl").write_text('{"prompt": "one", "response": "yes"}\n{"prompt": " \\n", "response": "no"}\n')
    Path("prompts.txt").write_text("one\n")
    Path("empty.jsonl").touch()
    Path("strange.jsonl").write_text('{"prompt": "hello there"}\n')
    assert told("run", "tiny.yaml", FOLDER, *overrides).startswith(message)
    assert made() == set()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def change_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def break_architecture(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["LlamaForTokenClassification"])


def break_vocabulary(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=8)


def lose_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def lose_the_end_of_turn(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    change_json(folder / "tokenizer_config.json", eos_token=None)


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def lose_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))


def resize_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:3]}))


def cut_the_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_tokenizer, "student.path: no tokenizer in model ("),
        (break_config, "model/config.json: cannot be read ("),
        (break_family, "model/config.json: model_type 'gpt2' is not supported; "),
        (break_architecture, "model/config.json: architectures ['LlamaForTokenClassification'] is not supported; take a LlamaForCausalLM"),
        (break_vocabulary, "model: embeds 8 tokens, its tokenizer has "),
        (lose_the_template, "student.path: the tokenizer of model has no chat template; take an instruct model or add chat_template.jinja"),
        (lose_the_end_of_turn, "student.path: neither chat template nor tokenizer names an end of turn; set eos_token in tokenizer_config"),
        (break_weights, "model: has no *.safetensors file; save the model with safetensors"),
        (lose_a_tensor, "model: has no tensor model.norm.weight; "),
        (resize_a_tensor, "model/model.safetensors: tensor model.norm.weight is [3], config.json makes it [8]; "),
        (cut_the_weights, "model/model.safetensors: is no safetensors file ("),
    ],
)
def test_a_broken_student_is_told_before_the_teacher_is_paid(
    told: Told, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher is asked")

    monkeypatch.setattr(tutor, "complete", refuse)
    write_fresh(Path("model"), FreshConfig(width=8, layers=1, heads=1, kv_heads=1, feed_forward=8), ["a word"], seed=0)
    damage(Path("model"))
    assert told("run", "tiny.yaml", FOLDER, "student={random: null, path: model}").startswith(message)
    assert made() == set()


@pytest.mark.parametrize("command", ["run", "collect"])
def test_an_endpoint_that_is_down(told: Told, command: str):
    port = closed_port()
    message = told(command, "tiny.yaml", FOLDER, ENDPOINT.replace("PORT", port))
    assert message.startswith(f"teacher.base_url: http://127.0.0.1:{port}/v1 is not reached (")
    assert message.endswith("; check the address and the network")
    assert made() == {"tiny", "tiny/config.yaml", "tiny/teacher.sqlite"}
    # What was wrong can be mended in the same run.
    with Server(tutor.complete, model="n") as server:
        endpoint = ENDPOINT.replace("PORT", port_of(server)).replace("model: m", "model: n")
        with pytest.raises(SystemExit) as stop:
            cli.main(["collect", "tiny.yaml", FOLDER, endpoint])
    assert stop.value.code == 0


def test_a_key_that_is_none_is_not_made_known(told: Told, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_KEY", "sécret")
    message = told("run", "tiny.yaml", FOLDER, ENDPOINT.replace("PORT", "9"))
    assert message.startswith("teacher.api_key_env: TEST_KEY holds characters that no key has; ") and "cret" not in message
    assert made() == set()


@pytest.mark.parametrize("key", ["sk-proj-1234", "gsk_aB3cret", "1cret", "", "$TEST_KEY", "one two"])
@pytest.mark.parametrize("also", [[], ["teacher.samples=0"], ["teacher.smaples=1"]])
def test_a_key_in_the_config_is_not_made_known(told: Told, key: str, also: list[str]):
    Path("tiny.yaml").write_text(f"teacher: {{api_key_env: '{key}'}}")
    message = told("run", "tiny.yaml", FOLDER, *also)
    assert message.startswith("teacher.api_key_env: is no name of an environment variable; name the variable ")
    assert made() == set() and (not key or key not in message)


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate"])
def test_a_part_that_comes_too_early(told: Told, command: str):
    message = told(command, "tiny.yaml", FOLDER)
    assert message == "here/tiny/teacher.sqlite: holds no answers to the prompts; run `gadjax collect` first"
    assert made() == {"tiny", "tiny/config.yaml"}


HOLDER = """
import sys, time
from pathlib import Path
from gadjax.runs import Run
with Run.at(Path(sys.argv[1])).locked():
    print(end=".", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is using the run."""
    Path("here/tiny").mkdir(parents=True)
    shutil.copy("tiny.yaml", "here/tiny/config.yaml")
    with subprocess.Popen([sys.executable, "-c", HOLDER, "here/tiny"], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.read(1) == b"."
        yield other
        other.kill()


def test_a_run_that_another_process_is_using(told: Told, held: subprocess.Popen[bytes]):
    kept = Path("here/tiny")
    message = "here/tiny: another gadjax process is using it; wait until it has ended, or choose another run.name"
    for command in ("collect", "prepare", "train", "evaluate", "run"):
        assert told(command, "tiny.yaml", FOLDER) == message
    (kept / "stages/gad/checkpoints/2").mkdir(parents=True)
    assert told("export", str(kept)) == message
    assert (kept / "config.yaml").read_text() == tiny.CONFIG
    assert write_report(kept, []).exists()  # which only reads what others write
    held.kill()
    held.wait()
    with Run.at(kept).locked():  # what a killed process held is free
        pass


def test_a_report_on_no_run(told: Told):
    assert told("report", "tiny.yaml", FOLDER).startswith("here/tiny: there is no such run; ")
    assert made() == set()


def test_a_folder_that_cannot_be_made(told: Told):
    Path("here").write_text("a file")
    assert told("collect", "tiny.yaml", FOLDER).startswith("run.folder: here/tiny cannot be written to (")


def test_a_broken_config_in_the_runs_folder(told: Told):
    Path("here/tiny/stages/seqkd/checkpoints/2").mkdir(parents=True)
    Path("here/tiny/config.yaml").write_text("run: {")
    assert told("run", "tiny.yaml", FOLDER).startswith("here/tiny/config.yaml, line 1: is not YAML (")
