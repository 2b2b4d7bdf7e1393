"""Several processes, each with devices of its own, as on many hosts: they do what one process does, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gadjax.errors import Passing, UserError
from gadjax.metrics import read
from gadjax.processes import BIND, COORDINATOR, PROCESS, PROCESSES, start_processes
from tests import tiny

CONFIG = tiny.with_stages(
    seqkd=f"algorithm: seqkd, {tiny.COMMON}, max_steps: 2",
    gad=f"algorithm: gad, from: seqkd, {tiny.SAMPLING}, max_steps: 4, checkpoint_every: 2, discriminator: {{learning_rate: 1e-3}}",
)


@dataclass(frozen=True)
class Ended:
    """A process that is over: its status, what it said, and the `time.monotonic()` of its end."""

    status: int
    said: str
    seconds: float


def together(folder: Path, processes: int, devices: int, program: str, *arguments: str, only: int | None = None) -> list[Ended]:
    """Runs a program in several processes, told of each other by the environment; of these, `only` one where it is given."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": tiny.on_devices(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    started, command = time.monotonic(), [sys.executable, "-c", program, *arguments]
    files = {index: folder / f"said-{index}.txt" for index in range(processes) if only in (None, index)}
    running: dict[int, subprocess.Popen[bytes]] = {}
    for index, file in files.items():
        told = environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {})
        with file.open("wb") as output:
            running[index] = subprocess.Popen(command, cwd=folder, env=told, stdout=output, stderr=subprocess.STDOUT)
    ended: dict[int, Ended] = {}
    try:
        while running and time.monotonic() < started + 500:
            for index in [index for index, process in running.items() if process.poll() is not None]:
                status = running.pop(index).returncode
                ended[index] = Ended(status, files[index].read_text(), time.monotonic())
            time.sleep(0.1)
        assert not running, {index: files[index].read_text()[-2000:] for index in running}
    finally:
        for process in running.values():
            process.kill()
    return [ended[index] for index in files]


PRIMITIVES = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from gadjax import checkpointing
from gadjax.checkpointing import Checkpoints
from gadjax.errors import UserError
from gadjax.models import checkpoint
from gadjax.models.decoder import language_model
from gadjax.sharding import MeshConfig, agreed, by_first, check_same, gathered, is_first, make_mesh, named_sharding, put, replicated
from gadjax.processes import start_processes
from gadjax.sharding import wait_for_all
from gadjax.types import Role, TrainState

start_processes()
me, mesh = jax.process_index(), make_mesh(MeshConfig())
rows = np.arange(8.0).reshape(4, 2)
with jax.transfer_guard("disallow"):
    placed = put(rows, named_sharding(("rows", None), rows.shape, mesh))
assert len(jax.devices()) == 4 and [shard.index[0].start for shard in placed.addressable_shards] == [2 * me, 2 * me + 1]
np.testing.assert_array_equal(gathered(placed), rows)
assert gathered(placed[3]).tolist() == [6, 7]
assert is_first() == (me == 0) and agreed(me + 5) == 5
assert by_first(lambda: me + 7) == (7 if me == 0 else None)
check_same("alike", "configs")

def refuse():
    raise UserError("run.folder", "is full", "make room")

for failing in (lambda: by_first(lambda: 1 / 0), lambda: by_first(refuse), lambda: check_same(str(me), "configs")):
    try:
        failing()
    except (UserError, ZeroDivisionError) as error:
        print(type(error).__name__, error)

checkpoint.TOGETHER, folder = 1, Path(sys.argv[1])  # layer by layer
family, dims = checkpoint.read_config(folder)
network = language_model(dims, jnp.dtype(jnp.float32))
shapes = network.shapes
wanted = jax.tree.map(
    lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(axes, leaf.shape, mesh)), shapes, network.axes
)
here, spread = checkpoint.load(folder, family, shapes), checkpoint.load(folder, family, wanted)
jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), gathered(other)), here, spread)
assert spread["trunk"]["blocks"]["gate"].addressable_shards[0].data.shape[1] == dims.width // 4

seal = checkpointing.seal
def seal_but_once(folder, *told):
    if me == 1 and folder.name == "2":
        raise OSError(28, "No space left on device")
    seal(folder, *told)

checkpointing.seal = seal_but_once
with Checkpoints(Path("checkpoints")) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, TrainState(Role({"w": placed * step}, {}), None), {})
    checkpoints.wait()
    assert checkpoints.steps == [1, 3] and checkpoints.whole() == 3
wait_for_all()
assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["1", "3"]

with Checkpoints(Path("checkpoints")) as checkpoints:
    if me == 0:
        Path("checkpoints/unsealed").mkdir()  # where the mark is to be written
    try:
        checkpoints.save(4, TrainState(Role({"w": placed}, {}), None), {})
    except UserError as error:
        print("refused:", type(error).__name__, error)

time.sleep(me)
wait_for_all()
print("waited", time.time())
"""


def test_two_processes_share_arrays_values_failures_weights_and_waits(tmp_path: Path):
    first, second = together(tmp_path, 2, 2, PRIMITIVES, str(Path(__file__).parent / "goldens" / "qwen3"))
    assert (first.status, second.status) == (0, 0), first.said + second.said
    assert "ZeroDivisionError division by zero" in first.said
    assert "UserError run.folder: is full; make room" in first.said
    # Another start may help against a fault of process 0, and not against a mistake that it was told of.
    told = "Passing process 0: has failed; see what it says\nUserError process 0: has failed; see what it says"
    assert told in second.said
    assert "(OSError: by process 1); see to room and rights there; " in " ".join(first.said.split())
    assert "refused: UserError" in first.said and "(IsADirectoryError: " in first.said
    assert "refused: UserError" in second.said and "(Passing: process 0: has failed; see what it says)" in second.said
    for ended in (first, second):
        assert "UserError the processes of this run: have different configs; " in ended.said
    waited = [float(ended.said.split("waited ")[1].split()[0]) for ended in (first, second)]
    assert abs(waited[0] - waited[1]) < 0.5, "one did not wait for the other"


LEFT = """
import os, time
from pathlib import Path
import jax, numpy as np
from gadjax.checkpointing import Checkpoints
from gadjax.processes import start_processes
from gadjax.sharding import MeshConfig, make_mesh, named_sharding, put
from gadjax.types import Role, TrainState

start_processes()
rows, mesh = np.arange(8.0).reshape(4, 2), make_mesh(MeshConfig())
placed = put(rows, named_sharding(("rows", None), rows.shape, mesh))
try:
    with Checkpoints(Path("checkpoints")) as checkpoints:
        checkpoints.save(1, TrainState(Role({"w": placed}, {}), None), {})
        if jax.process_index() == 1:
            raise ValueError("alone")
        time.sleep(6)
        os._exit(0)
except ValueError as error:
    print(error, flush=True)
os._exit(3)
"""


def test_who_leaves_a_checkpoint_by_an_error_seals_its_part_and_asks_no_other(tmp_path: Path):
    first, second = together(tmp_path, 2, 2, LEFT)
    assert (first.status, second.status) == (0, 3) and second.said.endswith("alone\n")
    assert second.seconds < first.seconds - 1
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "1").glob("sha256-*")) == ["sha256-0-of-2.json", "sha256-1-of-2.json"]


@pytest.mark.parametrize("left_out", [COORDINATOR, PROCESSES, PROCESS])
def test_what_is_told_by_half_is_refused(monkeypatch: pytest.MonkeyPatch, left_out: str):
    for name, value in ((COORDINATOR, "127.0.0.1:1"), (PROCESSES, "2"), (PROCESS, "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(left_out)
    with pytest.raises(UserError, match="--coordinator, --processes, --process: belong together"):
        start_processes()


@pytest.mark.parametrize(
    "told",
    [
        ("127.0.0.1", "2", "0"),
        ("127.0.0.1:99999", "2", "0"),
        ("127.0.0.1:0", "2", "0"),
        ("127.0.0.1:1", "2", "2"),
        ("127.0.0.1:1", "two", "0"),
        ("127.0.0.1:1", "2", "-1"),
    ],
)
def test_what_is_told_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch, told: tuple[str, str, str]):
    for name, value in zip((COORDINATOR, PROCESSES, PROCESS), told, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="is no address and the number of one of so many processes; write, "):
        start_processes()


def told_of(monkeypatch: pytest.MonkeyPatch, coordinator: str, process: int) -> UserError:
    """What is said of an address."""
    for name, value in ((COORDINATOR, coordinator), (PROCESSES, "2"), (PROCESS, str(process))):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        start_processes()
    return told.value


@pytest.mark.parametrize(
    ("number", "said", "kind"),
    [
        (socket.EAI_NONAME, "Name or service not known", UserError),
        (socket.EAI_AGAIN, "Temporary failure in name resolution", Passing),
    ],
)
def test_a_host_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch, number: int, said: str, kind: type[UserError]):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(number, said)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    told = told_of(monkeypatch, "tpu-O:8476", 1)
    assert type(told) is kind and str(told).startswith(f"--coordinator: there is no host tpu-O ({said}); write ")


def test_what_is_no_name_of_a_host_is_told(monkeypatch: pytest.MonkeyPatch):
    assert str(told_of(monkeypatch, "tpu..1:8476", 1)).startswith("--coordinator: there is no host tpu..1 (")


@pytest.mark.parametrize("bound", [None, "127.0.0.1:{}", "[::]:{}"])
def test_a_port_that_another_program_has_is_told(monkeypatch: pytest.MonkeyPatch, bound: str | None):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if bound:
            monkeypatch.setenv(BIND, bound.format(port))
        told = told_of(monkeypatch, f"127.0.0.1:{port}", 0)
    assert type(told) is Passing and re.fullmatch(
        rf"--coordinator: port {port} cannot be listened at \(.*in use.*\); choose another", str(told)
    )


ALONE = """
from gadjax import processes
processes.FIND_WITHIN = 2.0
processes.start_processes()
"""


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_do_not_come_says_so(tmp_path: Path, process: int):
    (ended,) = together(tmp_path, 2, 1, ALONE, only=process)
    assert ended.status == 1
    assert re.fullmatch(r"gadjax: the 2 processes that are to meet at \S+ are not all there after 2 s; start all of them, .*\n", ended.said)


FAILING = """
import os, signal, sys, time
from gadjax import processes
from gadjax.cli import main
from gadjax.runs import Run

processes.FIND_WITHIN, processes.FAIL_WITHIN = 60.0, 3
which, how = sys.argv.pop(1).split(":")
if how == "fault":
    Run.open = lambda *_: 1 / 0
if how == "terminated":
    Run.open = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))
if os.environ["JAX_PROCESS_ID"] in which:
    main()
processes.start_processes()
time.sleep(8)
os._exit(0)
"""
SAID = {"refused": "gadjax: seeed: ", "fault": "Traceback ", "terminated": "interrupted; "}


@pytest.mark.parametrize(
    ("failing", "how", "status"),
    [
        ("1", "refused", 2),
        ("0", "refused", 2),
        ("01", "refused", 2),
        ("1", "fault", 1),
        ("1", "terminated", 143),
        ("01", "terminated", 143),
    ],
)
def test_who_fails_ends_with_its_own_status(tmp_path: Path, failing: str, how: str, status: int):
    (tmp_path / "wrong.yaml").write_text("seeed: 3")
    start = time.monotonic()
    ended = together(tmp_path, 2, 1, FAILING, f"{failing}:{how}", "run", "wrong.yaml")
    for index in map(int, failing):
        assert ended[index].status == status, ended[index].said
        assert ended[index].said.startswith(SAID[how]) and ended[index].seconds < start + 30
        assert ended[index].said.count("\n") == 1 or ended[index].said.endswith("ZeroDivisionError: division by zero\n")
    if failing == "1":  # without process 0 there is no going on
        assert (ended[0].status, ended[0].said) == (0, "")


FETCHING = """
import time
from pathlib import Path
from gadjax.mirror import Mirror
from gadjax.processes import start_processes
from gadjax.runs import Run
from gadjax.sharding import is_first

fetch = Mirror.fetch
Mirror.fetch = lambda mirror: (time.sleep(1), fetch(mirror))[1]
start_processes()
run = Run.open(Path("tiny.yaml"), ["run.bucket=bucket"])
if not is_first():
    time.sleep(0.5)
run.fetch()
if is_first():  # which keeps the folder for itself, and must not before the other has fetched
    with run.begin():
        time.sleep(1)
"""


def test_processes_that_share_a_folder_fetch_one_after_the_other(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    ended = together(tmp_path, 2, 1, FETCHING)
    assert [process.status for process in ended] == [0, 0], ended[0].said + ended[1].said


# --- whole runs ---------------------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, os, signal, sys, time
from pathlib import Path
import jax
from gadjax.processes import start_processes
from gadjax.sharding import gathered, is_first

def digest(state):
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        whole.update(gathered(leaf).tobytes())
    return whole.hexdigest()
"""

# gadjax, which keeps the digest of every state that it saves. Its first argument says which process signals itself in which step of gad.
RUN = f"""{DIGEST}
from gadjax import train
from gadjax.checkpointing import Checkpoints
from gadjax.cli import main

process, step, number = map(int, sys.argv.pop(1).split(":"))
check, save = train.refuse_nan, Checkpoints.save

def check_or_die(stage, at, metrics):
    if (stage, at, jax.process_index()) == ("gad", step, process):
        Path("signalled").write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)
    return check(stage, at, metrics)

def save_and_tell(checkpoints, at, state, host):
    save(checkpoints, at, state, host)
    name = f"{{checkpoints._folder.parent.name}}-{{at}}"
    found = digest(state)
    if is_first():
        Path(f"{{name}}.saved").write_text(found)

train.refuse_nan, Checkpoints.save = check_or_die, save_and_tell
main()
"""

RESTORE = f"""{DIGEST}
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.types import TrainState

start_processes()
run = Run.at(Path("runs/tiny"))
session = Session.open(run, run.folder / "student")
state = TrainState(session.final_role("gad", "student"), session.final_role("gad", "discriminator"))
found = digest(state)
if is_first():
    print("restored", found)
"""
NEVER = "-1:0:0"


def made(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment on one process with 4 devices."""
    folder = made(tmp_path_factory.getbasetemp() / "one")
    (ended,) = together(folder, 1, 4, RUN, NEVER, "run", "tiny.yaml")
    assert ended.status == 0, ended.said
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on 2 processes with 2 devices each."""
    folder = made(tmp_path_factory.getbasetemp() / "two")
    ended = together(folder, 2, 2, RUN, NEVER, "run", "tiny.yaml")
    assert [process.status for process in ended] == [0, 0], ended[0].said + ended[1].said
    assert "gadjax" not in ended[1].said and "gad:" not in ended[1].said, "process 0 alone speaks"
    return folder


def rows(folder: Path, stage: str) -> list[dict[str, float]]:
    """The metrics of every step, but for times."""
    found = read(folder / "runs" / "tiny" / "stages" / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/") and "per_second" not in name} for row in found]


def assert_same_run(one: Path, other: Path) -> None:
    for stage in ("seqkd", "gad"):
        mine, theirs = rows(one, stage), rows(other, stage)
        assert len(mine) == len(theirs) > 2
        for row, same in zip(mine, theirs, strict=True):
            assert row.keys() == same.keys()
            np.testing.assert_allclose(list(row.values()), list(same.values()), rtol=1e-5, atol=1e-5)
    summaries = [json.loads((folder / "runs" / "tiny" / "summary.json").read_text())["stages"] for folder in (one, other)]
    assert summaries[0].keys() == summaries[1].keys()
    for name in ("evaluation/gad.jsonl", "report/index.html", "export/gad/model.safetensors", "tensorboard/gad"):
        assert (other / "runs" / "tiny" / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_and_evaluate_as_one_does(one: Path, two: Path):
    assert_same_run(one, two)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_processes_train_and_evaluate_as_one_does(tmp_path: Path, one: Path):
    folder = made(tmp_path / "four")
    ended = together(folder, 4, 1, RUN, NEVER, "run", "tiny.yaml")
    assert [process.status for process in ended] == [0] * 4, ended[0].said
    assert_same_run(one, folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2)])
def test_a_checkpoint_of_two_processes_is_restored_on_others(two: Path, processes: int, devices: int):
    first, *_ = together(two, processes, devices, RESTORE)
    assert f"restored {(two / 'gad-4.saved').read_text()}" in first.said, first.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_process_ends_all_and_the_restart_ends_with_the_same_bits(tmp_path: Path, two: Path):
    folder = made(tmp_path / "killed")
    for process, step in ((1, 3), (0, 4)):
        ended = together(folder, 2, 2, RUN, f"{process}:{step}:{signal.SIGKILL:d}", "run", "tiny.yaml")
        killed, other = ended[process], ended[1 - process]
        assert killed.status == -signal.SIGKILL, killed.said
        assert other.status != 0 and other.seconds - killed.seconds < 120
        if process == 0:
            assert "gad: goes on after step 2" in killed.said
    ended = together(folder, 2, 2, RUN, NEVER, "run", "tiny.yaml")
    assert [process.status for process in ended] == [0, 0], ended[0].said
    assert "gad: goes on after step 2" in ended[0].said
    for name in ("gad-2.saved", "gad-4.saved"):
        assert (folder / name).read_text() == (two / name).read_text()
    assert rows(folder, "gad") == rows(two, "gad")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_to_one_process_saves_the_same_step_on_all_and_ends_them(tmp_path: Path, two: Path):
    folder = made(tmp_path / "terminated")
    ended = together(folder, 2, 2, RUN, f"1:2:{signal.SIGTERM:d}", "run", "tiny.yaml")
    assert [process.status for process in ended] == [143, 143], ended[0].said + ended[1].said
    took = max(process.seconds for process in ended) - float((folder / "signalled").read_text())
    print(f"\nsaved, and all processes out, {took:.1f} s after SIGTERM to one of them")
    assert took < 20
    assert "gad: asked to stop; the checkpoint after step 3 is written" in ended[0].said
    assert (folder / "gad-3.saved").exists() and len(rows(folder, "gad")) == 1 + 3
    ended = together(folder, 2, 2, RUN, NEVER, "run", "tiny.yaml")
    assert [process.status for process in ended] == [0, 0], ended[0].said
    assert "gad: goes on after step 3" in ended[0].said
    assert (folder / "gad-4.saved").read_text() == (two / "gad-4.saved").read_text()
    assert rows(folder, "gad") == rows(two, "gad")
