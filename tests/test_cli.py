"""The command line itself: help, usage and exit status. What the commands do is tested beside them."""

import asyncio
import os
import pkgutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gadjax import cli
from gadjax.errors import UserError


def gadjax(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Puts a function in the place of what `gadjax run` does."""

    def put(function: Callable[..., None]) -> None:
        module = types.ModuleType("command")
        module.__dict__["main"] = function
        monkeypatch.setitem(sys.modules, "command", module)
        monkeypatch.setitem(cli.COMMANDS, "run", "command:main")

    return put


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "experiment.yaml"
    path.touch()
    return str(path)


def test_help_does_not_wait_for_jax():
    program = "import sys, atexit; from gadjax.cli import main; atexit.register(lambda: print('jax' in sys.modules)); main(['--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("target", cli.COMMANDS.values())
def test_what_the_commands_name_exists(target: str):
    assert callable(pkgutil.resolve_name(target))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    assert gadjax(name, "--help") == 0
    assert f"Example: gadjax {name} " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert gadjax("--version") == 0
    assert capsys.readouterr().out.startswith("gadjax 0.")


@pytest.mark.parametrize("arguments", [[], ["rnu"], ["run"], ["run", "missing.yaml"], ["run", "--fast"], ["--fast"]], ids=" ".join)
def test_usage_errors_are_told_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert gadjax(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gadjax: ")
    assert told.err.count("\n") == 1


def test_the_other_processes_are_told_of_by_options(command: Callable, config: str, monkeypatch: pytest.MonkeyPatch):
    told: list[dict[str, str]] = []
    command(lambda *_: told.append({name: value for name, value in os.environ.items() if name.startswith("JAX_")}))
    monkeypatch.setattr(os, "environ", {"JAX_PROCESS_ID": "5", "JAX_NUM_PROCESSES": "8"})
    assert gadjax("--coordinator", "10.0.0.1:8476", "--process", "3", "run", config) == 0
    assert told == [{"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "3"}]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.94"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),  # JAX refuses both
    ],
)
def test_training_may_have_a_whole_gpu(
    before: dict[str, str], after: dict[str, str], command: Callable, config: str, monkeypatch: pytest.MonkeyPatch
):
    told: list[dict[str, str]] = []
    command(lambda *_: told.append({name: value for name, value in os.environ.items() if name.startswith("XLA_")}))
    monkeypatch.setattr(os, "environ", dict(before))
    assert gadjax("run", config) == 0
    assert told == [after]


def test_a_command_gets_config_and_overrides(command: Callable, config: str):
    calls = []
    command(lambda *arguments: calls.append(arguments))
    assert gadjax("run", config, "mesh.fsdp=-1", "run.seed=1") == 0
    assert gadjax("run", config) == 0
    assert calls == [(Path(config), ["mesh.fsdp=-1", "run.seed=1"]), (Path(config), [])]


def test_a_users_mistake(command: Callable, config: str, capsys: pytest.CaptureFixture[str]):
    def fail(config: Path, overrides: list[str]) -> None:
        raise UserError("run.seed", "must be an integer", "write\n0")

    command(fail)
    assert gadjax("run", config) == 2
    assert capsys.readouterr().err == "gadjax: run.seed: must be an integer; write 0\n"


@pytest.fixture
def at_ctrl_c(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the process does at Ctrl-C: by default what it does in a terminal."""
    before = signal.signal(signal.SIGINT, getattr(request, "param", signal.default_int_handler))
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPTED = "interrupted; the same command goes on from the last checkpoint\n"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize(
    ("at_ctrl_c", "number"),
    [(signal.default_int_handler, signal.SIGINT), (signal.default_int_handler, signal.SIGTERM), (signal.SIG_IGN, signal.SIGTERM)],
    indirect=["at_ctrl_c"],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM in a shell's background"],
)
@pytest.mark.usefixtures("at_ctrl_c")
def test_an_interruption(command: Callable, config: str, capsys: pytest.CaptureFixture[str], number: signal.Signals):
    did = list[str]()

    def interrupted(config: Path, overrides: list[str]) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
            did.append("went on")
        finally:
            did.append("closed")

    command(interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert gadjax("run", config) == STATUS[number]
    assert (did, capsys.readouterr().err) == (["closed"], INTERRUPTED)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.usefixtures("at_ctrl_c")
def test_an_interruption_lets_asyncio_end_what_is_under_way(
    command: Callable, config: str, capsys: pytest.CaptureFixture[str], number: signal.Signals
):
    did = list[str]()

    def work() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        did.append("worked")

    async def work_and_finish() -> None:
        task = asyncio.create_task(asyncio.to_thread(work))
        try:
            await asyncio.wait([task])
        finally:
            await asyncio.wait([task])
            did.append("finished")

    command(lambda config, overrides: asyncio.run(work_and_finish()))
    assert gadjax("run", config) == STATUS[number]
    assert (did, capsys.readouterr().err) == (["worked", "finished"], INTERRUPTED)


def test_a_fault_of_ours_goes_through(command: Callable, config: str):
    def fail(config: Path, overrides: list[str]) -> None:
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", config])
