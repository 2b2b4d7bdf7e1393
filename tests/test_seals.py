"""Damage to checkpoints and to frozen data is found, whatever it is, and the checkpoint before is used.

pytest -s -m "slow or not slow" tests/test_seals.py        prints how many corruptions were made and how many were found
"""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from gadjax.checkpointing import UNSEALED, Checkpoints
from gadjax.data.snapshot import Snapshot, freeze
from gadjax.errors import UserError
from gadjax.seals import damage, guarded, is_sealed, read_guarded, seal
from tests.test_data import FINGERPRINT, examples
from tests.test_resume import abstract, state

Spoil = Callable[[Path, random.Random], Path]  # does something to a folder of files, and says which file cannot be trusted any more


def some_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def flip(path: Path, chance: random.Random) -> Path:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path


def cut(path: Path, chance: random.Random) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])
    return path


def lose(path: Path, chance: random.Random) -> Path:
    del chance
    path.unlink()
    return path


def add(path: Path, chance: random.Random) -> Path:
    other = path.with_name(f"{path.name}{chance.randrange(10)}")
    other.write_bytes(b"" if chance.random() < 0.5 else path.read_bytes())
    return other


def swap(path: Path, chance: random.Random) -> Path:
    others = [other for other in sorted(path.parent.parent.rglob("*")) if other.is_file() and other.read_bytes() != path.read_bytes()]
    other = chance.choice(others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return path


def grow(path: Path, chance: random.Random) -> Path:
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 9)))
    return path


KINDS = (flip, cut, lose, add, swap, grow)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "gad" / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1), {"key": [1]})
        checkpoints.save(2, state(2), {"key": [2]})
    return folder


@pytest.fixture
def stage(two: Path, tmp_path: Path) -> Path:
    """A copy of it to be spoiled."""
    return Path(shutil.copytree(two, tmp_path / "gad" / "checkpoints"))


def found(folder: Path) -> list[str]:
    """The files of a checkpoint that are told to be wrong."""
    return [name for name, _ in damage(epath.Path(folder), f"gad/{folder.name}")]


def test_what_is_whole_is_whole(two: Path):
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]
    assert found(two / "1") == found(two / "2") == []


def test_every_file_is_sealed(stage: Path):
    for path in sorted(path for path in (stage / "2").rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert found(stage / "2") == [path.relative_to(stage / "2").as_posix()]
        path.write_bytes(before)


def test_what_another_process_is_sealing_is_no_part_of_the_seal(tmp_path: Path):
    folder = epath.Path(tmp_path)
    (folder / "file").write_text("content")
    beside = folder / ".sha256-1-of-2.json.partial"  # listed by the first process, and gone when it reads
    beside.write_text("half")
    seal(folder, "here", 0, 2)
    beside.unlink()
    seal(folder, "here", 1, 2)
    assert list(damage(folder, "here")) == []


def edited(stage: Path, change: Callable[[dict], object], honest: bool) -> list[str]:
    manifest = stage / "2" / "sha256-0-of-1.json"
    content = json.loads(manifest.read_text())
    change(content)
    content = {name: value for name, value in content.items() if honest or name != "sha256"}
    manifest.write_text(json.dumps(content, indent=1) if honest else guarded(content))
    return found(stage / "2")


def test_an_edited_manifest_is_found(stage: Path):
    assert edited(stage, lambda content: content["files"].popitem(), honest=True) == ["sha256-0-of-1.json"]


def test_a_manifest_that_was_made_for_other_files_is_found(stage: Path):
    # Its own hash is right, and yet it is not that of these files.
    assert edited(stage, lambda content: content["files"].pop("student/manifest.ocdbt"), honest=False) == ["student/manifest.ocdbt"]


def test_swapped_checkpoints_are_found(stage: Path):
    (stage / "1").rename(stage / "3")
    (stage / "2").rename(stage / "1")
    (stage / "3").rename(stage / "2")
    assert found(stage / "1") == found(stage / "2") == ["sha256-0-of-1.json"]
    with (
        Checkpoints(stage) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint is whole \(.*2/sha256-0-of-1.json belongs to gad/1"),
    ):
        checkpoints.whole()


def test_each_process_seals_and_reads_its_own_files(tmp_path: Path):
    folder = epath.Path(tmp_path)
    for name in ("ocdbt.process_0/d", "ocdbt.process_1/d", "array_metadatas/process_1", "manifest"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    seal(folder, "here", 1, 2)
    assert not is_sealed(folder) and [*damage(folder, "here")] == [("sha256-0-of-2.json", "is missing")]
    seal(folder, "here", 0, 2)
    assert is_sealed(folder) and not [*damage(folder, "here")]
    kept = [sorted(read_guarded((folder / f"sha256-{index}-of-2.json").read_bytes())["files"]) for index in (0, 1)]
    assert kept == [["manifest", "ocdbt.process_0/d"], ["array_metadatas/process_1", "ocdbt.process_1/d"]]
    for name in ("manifest", "ocdbt.process_1/d"):
        (folder / name).write_text("changed")
    seen = [[name for name, _ in damage(folder, "here", index, 3)] for index in range(3)]
    assert sorted(itertools.chain(*seen)) == ["manifest", "ocdbt.process_1/d"], "two readers looked at one file, or none"


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"sha256": 1}', "[" * 100_000, b"\xff", '{"files": NaN}'])
def test_what_is_no_manifest_is_refused(text: str | bytes):
    with pytest.raises(ValueError):  # noqa: PT011 (any of them)
        read_guarded(text)


@pytest.mark.parametrize("kind", [flip, lose, add])
def test_the_checkpoint_before_a_damaged_one_is_used_loudly(stage: Path, capsys: pytest.CaptureFixture[str], kind: Spoil):
    wrong = kind(stage / "2" / "student" / "manifest.ocdbt", random.Random(0))
    before = sorted(path.name for path in (stage / "2").rglob("*"))
    with Checkpoints(stage, read_only=True) as checkpoints, pytest.raises(UserError, match="run `gadjax train` again"):
        checkpoints.restore(2, abstract(state(0)))
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.whole() == checkpoints.latest == 1
        restored, host = checkpoints.restore(1, abstract(state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state(1))
        assert host == {"key": [1]}
        checkpoints.save(2, state(3), {"key": [3]})
    told = " ".join(capsys.readouterr().err.split())
    assert f"WARNING: {wrong} " in told and "it is set aside as 2.damaged-1, and the checkpoint before it is used" in told
    assert sorted(path.name for path in stage.iterdir()) == ["1", "2", "2.damaged-1"]
    assert sorted(path.name for path in (stage / "2.damaged-1").rglob("*")) == before, "something of it was lost"
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.whole() == 2


def test_where_all_are_damaged_nothing_is_touched(stage: Path):
    for step in (1, 2):
        lose(stage / str(step) / "host" / "metadata", random.Random(0))
    with (
        Checkpoints(stage) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint is whole \(.*2/host/metadata is missing; .*1/host"),
    ):
        checkpoints.whole()
    assert sorted(path.name for path in stage.iterdir()) == ["1", "2"]


def test_what_was_not_sealed_was_never_there(stage: Path):
    (stage / "2" / "sha256-0-of-1.json").unlink()
    (stage / UNSEALED).write_text("2")  # killed between the commit and the seal
    with Checkpoints(stage, read_only=True) as checkpoints:
        assert checkpoints.latest == 1
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.whole() == 1
    assert [path.name for path in stage.iterdir()] == ["1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def corrupted(whole: Path, folder: Path, look: Callable[[Path], list[str]], count: int) -> tuple[int, int]:
    """How often a folder was spoiled, and how often a file was named that is not as it was, and none other."""
    before = contents(whole)
    named = 0
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        chance = random.Random(number)
        KINDS[number % len(KINDS)](some_file(folder, chance), chance)
        after, told = contents(folder), set(look(folder))
        named += bool(told) and told <= {name for name in before | after if before.get(name) != after.get(name)}
    return count, named


def of_data(folder: Path) -> list[str]:
    try:
        Snapshot.open(folder)
    except UserError as error:
        return [Path(error.where).relative_to(folder).as_posix()]
    return []


def trial(two: Path, tmp_path: Path, count: int) -> None:
    freeze(tmp_path / "whole", {"train": examples(10), "validation": examples(3)}, FINGERPRINT)
    ends = [
        corrupted(two / "2", tmp_path / "gad" / "2", found, count * 3 // 4),
        corrupted(tmp_path / "whole", tmp_path / "data", of_data, count // 4),
    ]
    made, named = (sum(end) for end in zip(*ends, strict=True))
    print(f"\n{made} corruptions, {named} found")
    assert made == named == count


def test_40_corruptions_are_found(two: Path, tmp_path: Path):
    trial(two, tmp_path, 40)


@pytest.mark.slow
def test_400_corruptions_are_found(two: Path, tmp_path: Path):
    trial(two, tmp_path, 400)
