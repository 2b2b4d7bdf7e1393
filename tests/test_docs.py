"""The pages in docs/ and the README: their commands are understood, their configs are, and their links lead somewhere."""

import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gadjax import cli
from gadjax.config import load_config, make_config
from tests import tiny

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
