"""The pages in docs/ and the README: their commands do what they say, their configs are understood, and their links lead somewhere.

Every command is run: those that train nothing anew always, those that do by `pytest -m slow tests/test_docs.py`, with the shipped configs
made small, and those that need somebody else by tests of their own (ELSEWHERE).
"""

import gzip
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from gadjax import cli
from gadjax.config import load_config, make_config
from tests import tiny
from tests.test_remote import Fake, listening

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^    (gadjax (?!/)[a-z]+ .*)$|`(gadjax [a-z]+ (?:configs|runs)/[^`]*)`", re.M)
COMMANDS = sorted(
    {(match[1] or match[2]).split("  #")[0].rstrip() for page in PAGES for match in COMMAND.finditer(page.read_text(encoding="utf-8"))}
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
NOT_HERE = re.compile(r"=N\b|CONFIG|RUN")  # a word that stands for something

RUN_HERE = re.compile(
    r"gadjax (?:run|collect|prepare|train|evaluate|report|export|compare|doctor|chat) (?:configs|runs)/quickstart[^=]*"
)  # nothing is set anew
ELSEWHERE = {  # what needs a server, a voter, a compiler for other chips or a token: the test that does it
    r"gadjax judge runs/quickstart evaluation.*": "test_judge.py::test_a_run_is_judged",
    r"gadjax judge --human .* --results": "test_human.py::test_results_are_told_and_written",
    r"gadjax judge --human .*seqkd": "test_human.py::test_a_poll_from_its_beginning_to_its_end",
    r"gadjax plan .* v\d.*": "test_paper.py::test_the_whole_cycle_fits",
    r"gadjax run .*backend: remote.*": "test_docs.py::test_a_run_takes_its_samples_from_the_server_of_the_page",
    r"gadjax serve .* --host 0.0.0.0": "test_speaking.py::test_serving_to_others_needs_a_token",
    r"gadjax serve .*": "test_docs.py::test_the_client_of_the_page_is_answered",
}
TRAINING = sorted(
    (each for each in COMMANDS if not RUN_HERE.fullmatch(each) and not any(re.fullmatch(form, each) for form in ELSEWHERE)),
    key=lambda command: "referee" in command,  # a referee is trained first
)


def given(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[Any, ...]]:
    """What a command line means to the function behind it."""
    calls = list[tuple[str, tuple[Any, ...]]]()
    monkeypatch.setattr(cli, "_call", lambda name, *arguments: calls.append((name, arguments)))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(command)[1:])
    assert stop.value.code == 0, command
    (call,) = calls
    return call


@pytest.mark.parametrize("command", [command for command in COMMANDS if not NOT_HERE.search(command)])
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    name, arguments = given(command, monkeypatch)
    assert name in cli.COMMANDS
    config = next((argument for argument in arguments if isinstance(argument, Path) and argument.suffix == ".yaml"), None)
    if config is not None:
        words = [word for argument in arguments if isinstance(argument, list) for word in argument]
        load_config(ROOT / config, [word for word in words if "=" in word])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the one that the pages speak of, where the quickstart is the tiny run, and has been run twice."""
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("documented")
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(tiny.CONFIG.replace("name: tiny", "name: quickstart"))
    for name in ("quickstart", "second"):
        shutil.copytree(experiment.run, folder / "runs" / name)
    return folder


@pytest.mark.timeout(600)  # it may wait for a whole run
@pytest.mark.parametrize("command", [command for command in COMMANDS if RUN_HERE.fullmatch(command) and not NOT_HERE.search(command)])
def test_commands_do_what_they_say(command: str, finished: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that train nothing anew, on a run that is finished; those that listen are run where they are tested."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # a chat that is over at once
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(command)[1:])
    assert stop.value.code == 0, command


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A shipped config with its names, stages and settings, in a size that takes seconds."""
    most = {"epochs": 1, "max_steps": 3, "batch_groups": 8, "checkpoint_every": 2, "validate_every": 2, "group_size": 4}
    for stage in config.get("stages", {}).values():
        stage |= {name: min(stage[name], value) for name, value in most.items() if name in stage}
    if "extends" not in config and "random" in config["student"]:
        if config["teacher"]["backend"] == "tutor":
            config["prompts"] = {"train": "tutor:40", "validation": "tutor:8"}
        config["student"]["random"] = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 32, "words": 300}
    return config


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """The shipped configs, made small, and the quickstart run with its own."""
    made = tiny.Tiny.make(tmp_path_factory.getbasetemp(), "shipped")
    for file in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/studies/*.yaml")]:
        copy = made.folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(small(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False))
    shutil.copytree(ROOT / "configs" / "paper", made.folder / "configs" / "paper")
    some = Random(0)
    rows = [{"prompt": " ".join(f"word{some.randrange(300)}" for _ in range(6)), "response": f"It is {i}."} for i in range(50)]
    (made.folder / "answers").mkdir()
    teachers = re.findall(r"answers/[\w.-]+\.jsonl\.gz", "".join(file.read_text() for file in ROOT.glob("configs/studies/real-text*.yaml")))
    parts = {"train.jsonl": rows[:40], "selfinst.jsonl": rows[40:45], "vicuna.jsonl": rows[45:]} | dict.fromkeys(teachers, rows)
    for name, own in parts.items():
        with (gzip.open if name.endswith(".gz") else open)(made.folder / name, "wt", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in own)
    done = made.gadjax("run", "configs/quickstart.yaml")
    assert done.returncode == 0, done.stderr
    shutil.copytree(made.run.with_name("quickstart") / "student", made.run.with_name("real-text-student") / "export" / "language")
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", TRAINING)
def test_commands_that_train_do_what_they_say(command: str, shipped: tiny.Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    stands_for = {"CONFIG": "configs/quickstart.yaml", "=N": "=2", "seedN": "seed2"}
    done = shipped.gadjax(*shlex.split(re.sub("|".join(stands_for), lambda match: stands_for[match[0]], command))[1:])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_of_the_balance_is_printed(shipped: tiny.Tiny):
    assert shipped.gadjax("run", "configs/balance.yaml").returncode == 0
    command = [sys.executable, str(ROOT / "tests/benchmarks/balance.py"), "runs/balance"]
    done = subprocess.run(command, cwd=shipped.folder, env=shipped.environment, capture_output=True, text=True, check=True)
    assert all(f"| `{stage}` | " in done.stdout for stage in ("gad", "two-to-one", "smoothed", "length"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_takes_its_samples_from_the_server_of_the_page(shipped: tiny.Tiny):
    """One that answers as vLLM does."""
    (command,) = (each for each in COMMANDS if "backend: remote" in each)
    weights = shutil.copytree(shipped.folder / "runs/quickstart/export/gad", shipped.folder / "served")
    before = (weights / "model.safetensors").read_bytes()
    fake = Fake()
    with listening(fake) as url:
        command = command.replace("http://127.0.0.1:8000", url).replace("/models/student", str(weights))
        done = shipped.gadjax(*shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    assert {"/v1/completions", "/collective_rpc"} <= {path for path, _ in fake.asked}
    assert (weights / "model.safetensors").read_bytes() != before, "the server has the student as it is now"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_client_of_the_page_is_answered(shipped: tiny.Tiny):
    """The command and the program of docs/using.md, at a port that is free."""
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"(?:^    .*\n|^\n)*^    from openai .*\n(?:^    .*\n|^\n)*", page, re.M)
    (command,) = re.findall(r"^    (gadjax serve .*)$", page, re.M)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
    arguments = [sys.executable, "-c", heeding + tiny.MAIN, *shlex.split(command.replace("8000", port))[1:]]
    open_to_all = {name: value for name, value in shipped.environment.items() if name != "GADJAX_TOKEN"}
    with subprocess.Popen(arguments, cwd=shipped.folder, env=open_to_all, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        assert any(f"http://127.0.0.1:{port}/v1" in line for line in served.stderr)
        code = re.sub("^    ", "", program, flags=re.M).replace("8000", port)
        answered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        served.send_signal(signal.SIGINT)
        rest = served.stderr.read()
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr
    assert served.returncode == 0, rest


def test_every_command_is_run():
    for command in COMMANDS:
        forms = [form for form in ELSEWHERE if re.fullmatch(form, command)]
        assert bool(forms) + (command in TRAINING) + bool(RUN_HERE.fullmatch(command)) == 1, command
    for form, where in ELSEWHERE.items():
        file, test = where.split("::")
        assert any(re.fullmatch(form, command) for command in COMMANDS), f"nobody writes {form} any more"
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), where


def test_every_page_has_commands_and_every_command_a_page():
    named = {command.split()[1] for command in COMMANDS}
    assert {"run", "collect", "evaluate", "report", "export", "bench", "chat", "serve", "compare", "doctor"} <= named
    assert all(any(command in page.read_text() for command in COMMANDS) for page in PAGES if page.name not in ("log.md", "method.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor[1:] in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sections_of_configs_are_right(page: Path):
    """Indented blocks that begin like a config are one."""
    for block in re.findall(r"(?:^    (?:run|teacher|prompts|student|stages|evaluation): .*\n)+", page.read_text(encoding="utf-8"), re.M):
        make_config({"prompts": {"train": "tutor:2"}} | yaml.safe_load(re.sub("^    ", "", block, flags=re.M)))


def test_the_examples_in_help_are_understood(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        for example in re.findall(r"Example: (.*)", capsys.readouterr().out):
            assert given(example, monkeypatch)[0] == name
