"""The scripts in `tpu/`, with a `gcloud` that only writes down what it was called with."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from gadjax.config import load_config
from gadjax.errors import UserError
from gadjax.runs import Run

ROOT = Path(__file__).parent.parent
SECRET = "sk-do-not-tell"
OPTIONS = ["--type", "v5p-32", "--zone", "us-east5-a", "--bucket", "gs://my-bucket/runs"]
WHERE = "--zone=us-east5-a"
REQUESTED, NODE, PROGRESS = "queued-resources list", "tpu-vm describe", "cat gadjax/state 2"
LOG, KEPT = "gadjax/run.log", "storage ls"

# Writes its arguments down, and answers what STUB/answers.json has for the first text in it that they contain: the answers
# one after another, the last again and again; to some it gives none.
STUB = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["STUB"])
with (folder / "calls").open("a") as file:
    file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
script = json.loads((folder / "answers.json").read_text())
for text, answers in script.items():
    if text in " ".join(sys.argv[1:]):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        (folder / "answers.json").write_text(json.dumps(script))
        if answer == "no answer":
            sys.exit(1)
        print(answer, end="")
        break
"""
PREPARE = """
if sys.argv[1] == "prepare":  # the real command would leave this
    from gadjax.config import dump_config, load_config
    config = load_config(pathlib.Path(sys.argv[2]), sys.argv[3:])
    config.run.path.mkdir(parents=True)
    (config.run.path / "config.yaml").write_text(dump_config(config))
"""


class Desk:
    """A repository with the scripts, and stubs for what they call.

    Attributes:
        repo: the repository.
        stub: what the stubs read and write.
    """

    def __init__(self, folder: Path):
        self.repo, self.stub, self._bin = folder / "repo", folder / "stub", folder / "bin"
        for path in (self.repo, self.stub, self._bin):
            path.mkdir()
        shutil.copytree(ROOT / "tpu", self.repo / "tpu")
        (self.repo / ".gitignore").write_text("/runs/\n")
        self.have("gcloud")
        self.have("gadjax", PREPARE)
        self.script()

    def have(self, name: str, more: str = "") -> None:
        path = self._bin / name
        path.write_text(STUB.format(python=sys.executable) + more)
        path.chmod(0o755)

    def script(self, **answers: list[str]) -> None:
        """What gcloud says to a command with that text in it."""
        (self.stub / "answers.json").write_text(json.dumps(answers))

    def commit(self) -> None:
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
            subprocess.run([*git, *command], cwd=self.repo, check=True)

    def __call__(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{self._bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        more = {"PATH": path, "STUB": str(self.stub), "GADJAX_TPU_PAUSE": "0", "OPENAI_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
        command = ["bash", str(self.repo / "tpu" / script), *arguments]
        return subprocess.run(
            command,
            cwd=self.repo,
            env=os.environ | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            stdin=subprocess.DEVNULL,
        )

    def launched(self) -> None:
        """As if the run had been launched here."""
        state = self.repo / "runs" / ".tpu" / "my-run"
        state.mkdir(parents=True)
        (state / "options").write_text("\n".join([*OPTIONS, "--spot"]) + "\n")
        (state / "code.tar").touch()

    @property
    def calls(self) -> list[list[str]]:
        file = self.stub / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def done(self) -> list[str]:
        """What changed something in the cloud, in a word each."""
        words = {"queued-resources create": "create", "queued-resources delete": "delete", "worker.sh": "set up"}
        return [word for call in self.calls for text, word in words.items() if text in " ".join(call)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


COMMANDS = (["collect"], ["collect", "--status"], ["prepare"])  # of gadjax, on this machine
HOSTILE = ["a;touch x", "$(touch x)", "`touch x`", "two words", "a\nb", 'quo"te', "quo'te", "../up", "-rf", "A", "a" * 60, "ä", "a&b", ""]


@pytest.mark.parametrize("option", ["--name", "--type", "--zone", "--bucket", "--project", "--tries"])
def test_a_hostile_name_is_refused(desk: Desk, option: str):
    (desk.repo / "c.yaml").touch()
    for value in HOSTILE:
        if value or option != "--project":  # no project: gcloud's own
            done = desk("launch.sh", "c.yaml", "--name", "my-run", *OPTIONS, option, value)
            assert (done.returncode, done.stdout) == (2, ""), value
            assert re.fullmatch(rf"launch\.sh: {option}: .+\n", done.stderr), done.stderr
    assert desk.calls == [] and sorted(path.name for path in desk.repo.iterdir()) == [".gitignore", "c.yaml", "tpu"]


@pytest.mark.parametrize("script", ["watch.sh", "status.sh", "logs.sh", "stop.sh", "fetch.sh", "teardown.sh"])
def test_the_other_scripts_refuse_it_too(desk: Desk, script: str):
    for value in HOSTILE:
        done = desk(script, value)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, value
    unknown = desk(script, "my-run")
    assert unknown.returncode == 2 and "was not launched from here" in unknown.stderr
    desk.launched()
    options = desk.repo / "runs" / ".tpu" / "my-run" / "options"
    options.write_text(options.read_text().replace("us-east5-a", "$(touch x)"))
    assert desk(script, "my-run").returncode == 2
    assert desk.calls == [] and not (desk.repo / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--name: is missing"),
        (["--name", "my-run", *OPTIONS], "CONFIG: is missing"),
        (["--name", "my-run", *OPTIONS, "none;$(touch x).yaml"], "is no file"),
        (["--name", "my-run", *OPTIONS, "c.yaml", "words"], "is not an override"),
        (["--name", "my-run", *OPTIONS, "--type", "v5e-16", "c.yaml"], "--type: v5e-16 is not known"),
        (["--nmae", "my-run"], "there is no such option"),
        (["--name"], "--name: has no value"),
    ],
)
def test_a_mistake_is_told_in_one_line(desk: Desk, arguments: list[str], told: str):
    (desk.repo / "c.yaml").touch()
    done = desk("launch.sh", *arguments)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert desk.calls == [] and not (desk.repo / "x").exists()


def test_the_config_that_the_page_shows_is_one(tmp_path: Path):
    """Beside the shipped ones, as the page says."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "tpu" / "README.md").read_text(), re.S)
    (tmp_path / "configs" / "my.yaml").write_text(shown)
    config = load_config(tmp_path / "configs" / "my.yaml", [])
    assert (config.prompts.train, config.student.path, config.teacher.max_cost) == ("prompts.jsonl", "Qwen/Qwen2.5-14B-Instruct", 500)


NAME = "a b;$(touch x)'\"\n.yaml"
OVERRIDE = "teacher.model=$(touch x);`touch x` \"'"


def test_a_dry_run_shows_all_and_does_nothing(desk: Desk):
    (desk.repo / NAME).write_text("")
    done = desk("launch.sh", NAME, "--name", "my-run", *OPTIONS, "--project", "my-project", "--spot", "--dry-run", OVERRIDE)
    assert done.returncode == 0, done.stderr
    assert desk.calls == [] and sorted(path.name for path in desk.repo.iterdir()) == [".gitignore", NAME, "tpu"]
    settings = [OVERRIDE, "run.name=my-run", "run.folder=runs", "run.bucket=gs://my-bucket/runs"]
    shown = subprocess.run(  # as a shell reads it
        ["bash", "-c", f"gadjax() {{ printf '%s\\0' \"$@\"; }}\n{done.stdout.partition('mkdir')[0]}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\0")[:-1] == [part for verb, *more in COMMANDS for part in (verb, str(desk.repo / NAME), *settings, *more)]
    rest = [shlex.split(line) for line in done.stdout.partition("mkdir")[2].splitlines()[1:]]
    words = ["pack.py", "create", "list", "describe", "scp", "worker.sh", "state", "storage ls", "mkdir", "run.log", "delete"]
    assert [word in " ".join(line) for word, line in zip(words, rest, strict=True)] == [True] * len(words)


def test_from_a_config_to_the_end(desk: Desk):
    (desk.repo / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (desk.repo / NAME).write_text("prompts: {train: prompts.jsonl}\n")
    shutil.copy(ROOT / "pyproject.toml", desk.repo)
    desk.commit()
    (desk.repo / ".env").write_text(SECRET)  # never committed, never copied
    desk.script(
        **{
            REQUESTED: ["", "WAITING_FOR_RESOURCES\n", "ACTIVE\n"],
            NODE: ["READY\n"],
            PROGRESS: ["running 0\nrunning 0\n", "success 0 0\nsuccess 0 0\n"],
        }
    )
    assert desk("teardown.sh", "my-run", "--zone", "us-east5-a").returncode == 0  # of what was there before
    (desk.stub / "calls").unlink()
    done = desk("launch.sh", NAME, "--name", "my-run", *OPTIONS, "--project", "my-project", "--spot", OVERRIDE)
    assert done.returncode == 0, done.stderr
    assert "done; tpu/fetch.sh my-run brings the report here" in done.stdout
    settings = [OVERRIDE, "run.name=my-run", "run.folder=runs", "run.bucket=gs://my-bucket/runs"]
    assert desk.calls[:3] == [["gadjax", verb, str(desk.repo / NAME), *settings, *more] for verb, *more in COMMANDS]
    assert all(call[0] == "gcloud" for call in desk.calls[3:])
    where = [WHERE, "--project=my-project"]
    request = ["--node-id=my-run", "--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--spot", "--quiet"]
    assert desk.calls[4] == ["gcloud", "compute", "tpus", "queued-resources", "create", "my-run", *request, *where]
    assert desk.done() == ["create", "set up", "delete"]
    copied = next(call for call in desk.calls if "scp" in call)
    assert copied[4:] == ["scp", "runs/.tpu/my-run/code.tar", "my-run:", "--worker=all", "--quiet", *where]
    assert desk.calls[-1] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "my-run", "--force", "--quiet", *where]
    with tarfile.open(desk.repo / "runs" / ".tpu" / "my-run" / "code.tar") as tar:
        assert {"run.yaml", "prompts.jsonl", "tpu/worker.sh"} <= {*tar.getnames()} and ".env" not in tar.getnames()
        config = tar.extractfile("run.yaml")
        assert config is not None and b"bucket: gs://my-bucket/runs" in config.read()
    told = [path for path in [*desk.repo.rglob("*"), *desk.stub.rglob("*")] if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert told == [desk.repo / ".env"] and SECRET not in done.stdout + done.stderr
    assert not (desk.repo / "x").exists()


@pytest.mark.parametrize(
    ("answers", "expected", "status"),
    [
        # A spot TPU is gone, in the cloud's two ways of saying so: deleted, asked for and set up again, twice.
        (
            {
                REQUESTED: ["", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"],
                NODE: ["READY"],
                PROGRESS: ["new 0", "new 0", "success 0 0"],
            },
            ["create", "set up", "delete", "create", "set up", "delete"],
            0,
        ),
        (
            {
                REQUESTED: ["ACTIVE", "ACTIVE", "", "ACTIVE"],
                NODE: ["READY", "PREEMPTED", "READY"],
                PROGRESS: ["running 0", "new 0", "success 0 0"],
            },
            ["delete", "create", "set up", "delete"],
            0,
        ),
        # A command that fails says nothing of the TPU.
        (
            {
                REQUESTED: ["no answer", "ACTIVE"],
                NODE: ["no answer", "READY"],
                PROGRESS: ["no answer", "running 1\nexit-code 1 0", "success 0 1"],
            },
            ["delete"],
            0,
        ),
        # One worker of two is done; one is new.
        (
            {REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["success 0 0\nrunning 0", "success 0 0\nnew 0", "success 0 0"]},
            ["set up", "delete"],
            0,
        ),
        # A set-up that fails is tried again.
        (
            {REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["new 0", "new 0", "success 0 0"], "worker.sh": ["no answer", ""]},
            ["set up", "set up", "delete"],
            0,
        ),
        # What only the user can mend.
        ({REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["running 0\nexit-code 2 0"]}, ["delete"], 2),
        # Deleting is tried until it is done: chips cost money.
        ({REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["success 0 0"], "delete": ["no answer", ""]}, ["delete", "delete"], 0),
        # It was deleted meanwhile.
        ({REQUESTED: ["ACTIVE", ""], NODE: ["READY"], PROGRESS: ["success 0 0"], "delete": ["no answer"]}, ["delete"], 0),
        # Without the logs nobody would learn what the mistake was.
        (
            {REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["exit-code 2 0"], LOG: ["no answer", "no answer", "w-0: a mistake\n"]},
            ["delete"],
            2,
        ),
    ],
    ids=["suspended", "preempted", "no answer", "some workers", "set-up", "mistake", "delete", "deleted", "no logs"],
)
def test_watching(desk: Desk, answers: dict[str, list[str]], expected: list[str], status: int):
    desk.launched()
    desk.script(**answers)
    done = desk("watch.sh", "my-run")
    assert (done.returncode, desk.done()) == (status, expected), done.stdout + done.stderr


HERE = {REQUESTED: ["ACTIVE"], NODE: ["READY"]}


@pytest.mark.parametrize(
    "answers",
    [
        {PROGRESS: ["no answer", "no answer", "running 0"] * 4 + ["success 0 0"]},
        {PROGRESS: ["running 0"] * 12 + ["success 0 0"], LOG: ["no answer", "no answer", ""] * 5},
        {PROGRESS: ["running 0"] * 4 + ["success 0 0"], NODE: ["no answer", "REPAIRING", "READY"] * 5},
    ],
    ids=["progress", "logs", "node"],
)
def test_looks_without_an_answer_count_in_a_row(desk: Desk, answers: dict[str, list[str]]):
    """A healthy run may bring no checkpoint for hours, while now and then nothing is heard of it."""
    desk.launched()
    desk.script(**HERE | answers)
    done = desk("watch.sh", "my-run", "--tries", "3")
    assert (done.returncode, desk.done()) == (0, ["delete"]), done.stdout + done.stderr
    assert done.stdout.count("(2 of 3 in a row)") >= 4


MEANWHILE = """
import subprocess
if {text!r} in " ".join(sys.argv) and not (folder / "once").exists():
    (folder / "once").touch()
    subprocess.run({command!r}, stdout=subprocess.DEVNULL, check=True)
"""


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        (PROGRESS, ["ACTIVE", "", "ACTIVE"], ["delete", "delete"]),
        (REQUESTED, ["", "ACTIVE"], ["delete", "delete"]),  # between a look and what would follow from it
        ("queued-resources create", ["", "ACTIVE"], ["create", "delete", "delete"]),  # and while it is asked for
    ],
    ids=["looked", "found", "asked for"],
)
def test_a_teardown_ends_the_watch(desk: Desk, text: str, found: list[str], expected: list[str]):
    desk.launched()
    desk.have("gcloud", MEANWHILE.format(text=text, command=["bash", "tpu/teardown.sh", "my-run"]))
    desk.script(**{REQUESTED: found, NODE: ["READY"], PROGRESS: ["running 0", "success 0 0"]})
    done = desk("watch.sh", "my-run")
    assert (done.returncode, desk.done()) == (1, expected), done.stdout + done.stderr
    assert "my-run: was torn down" in done.stdout
    desk.script(**HERE | {PROGRESS: ["success 0 0"]})
    assert desk("watch.sh", "my-run").returncode == 0  # who starts it again wants it


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["bash", "tpu/teardown.sh", "my-run", "--dry-run"], (0, ["delete"])),
        (["bash", "-c", "echo other 1 >runs/.tpu/my-run/watch"], (1, [])),
    ],
    ids=["shown", "another watch"],
)
def test_a_watch_heeds_another_and_not_what_is_only_shown(desk: Desk, command: list[str], expected: tuple[int, list[str]]):
    desk.launched()
    desk.have("gcloud", MEANWHILE.format(text=PROGRESS, command=command))
    desk.script(**HERE | {PROGRESS: ["running 0", "success 0 0"]})
    done = desk("watch.sh", "my-run")
    assert (done.returncode, desk.done()) == expected, done.stdout + done.stderr


def test_a_run_that_was_not_launched_here_is_not_watched(desk: Desk):
    done = desk("watch.sh", "my-run", *OPTIONS)
    assert done.returncode == 2 and not desk.calls
    assert done.stderr.startswith("watch.sh: my-run: was not launched from here") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (HERE | {PROGRESS: ["new 0"], "worker.sh": ["no answer"]}, ["set up"] * 3),
        (HERE | {PROGRESS: ["no answer"]}, []),
        (HERE | {PROGRESS: ["exit-code 2 0"], LOG: ["no answer"]}, []),
        (HERE | {NODE: ["no answer"]}, []),
        (HERE | {NODE: ["REPAIRING"]}, []),
        (HERE | {PROGRESS: ["running 0", "running 1\nrunning 0", "running 1\nexit-code 1 0", "running 2\nrunning 9", "running 10"]}, []),
        ({REQUESTED: ["SUSPENDED", "", "SUSPENDED"], KEPT: ["checkpoint 2"]}, ["delete", "create", "delete"]),
        # A checkpoint came between the second failure and the third.
        (HERE | {PROGRESS: [f"running {n}" for n in range(9)], KEPT: ["2", "2", "4", "4", "4", "6", "no answer"]}, []),
    ],
    ids=["set-up", "no answer", "no logs", "no node", "repaired", "restarts", "preempted", "progress"],
)
def test_chips_that_bring_nothing_are_given_back(desk: Desk, answers: dict[str, list[str]], expected: list[str]):
    desk.launched()
    desk.script(**{"delete": [""]} | answers)
    done = desk("watch.sh", "my-run", "--tries", "3")
    assert (done.returncode, desk.done()) == (1, [*expected, "delete"]), done.stdout + done.stderr
    assert re.search(
        r"\(3 of 3\)\n.*gives up and deletes the TPU: 3 attempts brought no checkpoint; |"
        r"the (workers do not answer|TPU is not ready) \(3 of 3 in a row\)\n.*gives up and deletes the TPU: the \1; ",
        done.stdout,
    )
    if KEPT in answers and len(answers[KEPT]) > 1:
        assert re.findall(r"\((\d) of 3\)", done.stdout) == ["1", "2", "1", "2", "3"]


@pytest.mark.parametrize(("found", "expected"), [("", ["create"]), ("FAILED", ["delete"])])
def test_a_first_request_that_is_refused_is_not_repeated(desk: Desk, found: str, expected: list[str]):
    desk.launched()
    desk.script(**{REQUESTED: [found], "create": ["no answer"]})
    assert desk("watch.sh", "my-run", "--deploy").returncode in (1, 2)
    assert desk.done() == expected


def test_another_launch_takes_over_a_running_tpu(desk: Desk):
    desk.launched()
    desk.script(**{REQUESTED: ["ACTIVE"], NODE: ["READY"], PROGRESS: ["running 0", "success 0 0"]})
    assert desk("watch.sh", "my-run", "--deploy").returncode == 0
    assert desk.done() == ["set up", "delete"]


def test_the_siblings(desk: Desk):
    desk.launched()
    for script in ("status.sh", "logs.sh", "stop.sh", "fetch.sh", "teardown.sh"):
        assert desk(script, "my-run").returncode == 0
    tpus = ["gcloud", "compute", "tpus"]
    logs = """--command=tail -n 2000 gadjax/run.log | sed "s/^/$(hostname): /\""""
    assert desk.calls == [
        [*tpus, "queued-resources", "describe", "my-run", WHERE],
        [*tpus, "tpu-vm", "ssh", "my-run", "--worker=all", "--command=cat gadjax/state && tail -n 3 gadjax/run.log", "--quiet", WHERE],
        [*tpus, "tpu-vm", "ssh", "my-run", "--worker=all", logs, "--quiet", WHERE],
        [*tpus, "tpu-vm", "ssh", "my-run", "--worker=all", "--command=sudo systemctl disable --now gadjax", "--quiet", WHERE],
        ["gcloud", "storage", "rsync", "gs://my-bucket/runs/my-run", "runs/my-run", "--recursive", "--exclude=stages/.*/checkpoints/.*"],
        [*tpus, "queued-resources", "delete", "my-run", "--force", "--quiet", WHERE],
    ]


def on_worker(call: list[str], home: Path) -> str:
    """What the command that a call has for the workers says on one with that home."""
    command = next(part for part in call if part.startswith("--command=")).removeprefix("--command=")
    return subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, check=True).stdout


def test_logs_are_gathered_worker_by_worker(desk: Desk, tmp_path: Path):
    desk.launched()
    desk.script(**{LOG: ["w-1: one\nw-0: two\nw-1: three\nw-0: four\n", "no answer"]})
    whole = "w-0: two\nw-0: four\nw-1: one\nw-1: three\n"
    assert desk("logs.sh", "my-run").stdout == whole
    lost = desk("logs.sh", "my-run")
    assert (lost.returncode, lost.stderr) == (2, "logs.sh: my-run: no worker answers\n")
    assert (desk.repo / "runs" / ".tpu" / "my-run" / "logs" / "all.log").read_text() == whole
    (tmp_path / "gadjax").mkdir()
    (tmp_path / "gadjax" / "run.log").write_text("one & two\n")
    said = on_worker(desk.calls[0], tmp_path)
    assert re.fullmatch(r"[\w.-]+: one & two\n", said)


def test_of_the_code_of_before_nothing_is_left_on_a_worker(desk: Desk, tmp_path: Path):
    desk.launched()
    desk.script(**HERE | {PROGRESS: ["running 0", "success 0 0"]})
    assert desk("watch.sh", "my-run", "--deploy").returncode == 0
    (tmp_path / "gadjax" / "build").mkdir(parents=True)
    (tmp_path / "worker.sh").write_text("echo here")
    with tarfile.open(tmp_path / "code.tar", "w") as tar:
        tar.add(tmp_path / "worker.sh", "tpu/worker.sh")
    set_up = next(call for call in desk.calls if "worker.sh" in " ".join(call))
    assert on_worker(set_up, tmp_path) == "here\n"
    assert sorted(path.name for path in (tmp_path / "gadjax").rglob("*")) == ["tpu", "worker.sh"]


def test_a_worker_is_set_up(desk: Desk, tmp_path: Path):
    desk.have("python3", 'if "site" in sys.argv: print(folder)')
    desk.have("sudo", 'if sys.argv[1] == "tee": (folder / "unit").write_text(sys.stdin.read())')
    (desk.stub / "bin").mkdir()
    desk.have("uv")
    (tmp_path / "bin" / "uv").rename(desk.stub / "bin" / "uv")
    done = desk("worker.sh")
    assert done.returncode == 0, done.stderr
    assert desk.calls == [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["python3", "-m", "site", "--user-base"],
        ["uv", "venv", "--quiet", "--python", "3.11", ".venv"],
        ["uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", "-c", "constraints.txt", ".[tpu,languages]"],
        ["sudo", "tee", "/etc/systemd/system/gadjax.service"],
        ["sudo", "systemctl", "daemon-reload"],
        ["sudo", "systemctl", "enable", "--quiet", "gadjax"],
        ["sudo", "systemctl", "restart", "gadjax"],
    ]
    unit = (desk.stub / "unit").read_text()
    assert f"ExecStart={desk.repo}/.venv/bin/gadjax run run.yaml\n" in unit
    assert "\nRestart=on-failure\n" in unit and "\nRestartPreventExitStatus=2\n" in unit
    assert """ExecStopPost=/bin/sh -c 'echo "$SERVICE_RESULT $EXIT_STATUS" >state'\n""" in unit


def test_what_cannot_be_packed_is_told_before_anything_costs(desk: Desk):
    (desk.repo / "c.yaml").touch()
    desk.have("gadjax")
    desk.have("python", "sys.exit(2)")
    assert desk("launch.sh", "c.yaml", "--name", "my-run", *OPTIONS).returncode == 2
    assert [call[0] for call in desk.calls] == ["gadjax", "gadjax", "gadjax", "python"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("prompts: {train: FOLDER/p.jsonl}", "prompts.train: "),
        ("prompts: {validation: ../repo/p.jsonl}", "prompts.validation: "),
        ("student: {path: tpu}", "student.path: "),
        ("stages: {gad: {algorithm: gad, from: runs/other/warmup}}", "stages.gad.from: "),
        ("prompts: {tests: {mine: 'FOLDER/set:dev'}}", "prompts.tests.mine: "),
        ("prompts: {train: .}", "prompts.train: "),
        ("teacher: {backend: file, path: FOLDER/p.jsonl}", "teacher.path: "),
        ("teachers: {second: {backend: file, path: ../repo/p.jsonl}}", "teachers.second.path: "),
        ("stages: {gad: {algorithm: gad, from: student, discriminator: {from: runs/other/gad}}}", "stages.gad.discriminator.from: "),
        ("evaluation: {referee: runs/other/gad}", "evaluation.referee: "),
        ("run: {wandb: mine}", "run.wandb: its key"),
        (
            "{rollout: {backend: remote, remote: {url: 'http://127.0.0.1:8000', weights: w}}, stages: {s: {algorithm: seqkd}}}",
            "rollout.remote: ",
        ),
    ],
)
def test_what_would_not_be_on_the_tpu_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch, config: str, told: str):
    monkeypatch.chdir(desk.repo)
    folder = Path("runs/my-run")
    (folder / "weights").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.replace("FOLDER", str(desk.repo)))
    Path("p.jsonl").touch()
    Path("set").mkdir()
    with pytest.raises(UserError, match=re.escape(told) + ".* would not be there on a TPU"):
        runpy.run_path("tpu/pack.py")["inputs"](Run.at(folder))


PACKED = """
run: {name: my-run}
prompts: {train: p.jsonl, validation: runs/my-run/held.jsonl, tests: {mine: "set:dev", known: vicuna, theirs: some/set}}
teacher: {backend: file, path: linked.jsonl}
teachers: {second: {backend: file, path: set, model: second}}
student: {path: runs/my-run/weights}
stages: {gad: {algorithm: gad, from: runs/my-run/start, discriminator: {from: student}}}
"""


def test_all_files_and_folders_that_the_config_reads_are_packed(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(desk.repo)
    folder, outside = Path("runs/my-run"), desk.stub / "outside.jsonl"
    (folder / "weights").mkdir(parents=True)
    for path in (Path("p.jsonl"), folder / "held.jsonl", Path("set/dev-0.jsonl"), Path("set/.env"), outside):
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    Path("linked.jsonl").symlink_to(outside)
    (folder / "config.yaml").write_text(PACKED)
    desk.commit()
    runpy.run_path("tpu/pack.py")["pack"](Run.at(folder), Path("code.tar"))
    with tarfile.open("code.tar") as tar:
        members = {member.name: member for member in tar.getmembers()}  # of two with one name the last counts
        assert members["linked.jsonl"].isreg() and members["linked.jsonl"].size == 4
        assert {"run.yaml", "p.jsonl", "set/dev-0.jsonl"} <= members.keys()
        added = tar.getnames()[tar.getnames().index("run.yaml") :]
    assert added == ["run.yaml", "p.jsonl", "set", "set/dev-0.jsonl", "linked.jsonl"]
