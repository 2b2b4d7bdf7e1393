"""The frozen data and the order in which training sees it."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadjax.data import snapshot as snapshot_module
from gadjax.data.pipeline import batches, steps
from gadjax.data.snapshot import Example, Snapshot, freeze
from gadjax.errors import UserError
from gadjax.records import Answer, Prompt, TokenGroup

FINGERPRINT = {"tokenizer": "abc", "template": "def"}


def example(i: int, text: str = "fine", truncated: bool = False) -> Example:
    prompt = Prompt(f"p{i}", ({"role": "system", "content": "short"}, {"role": "user", "content": f"{text} {i}?"}))
    return Example(prompt, Answer(prompt.id, text, truncated), TokenGroup(prompt.id, (1, 2, i + 3), tuple(range(i % 4 + 1))))


def examples(count: int) -> list[Example]:
    return [example(i) for i in range(count)]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "data"
    freeze(folder, {"train": examples(10), "validation": examples(3)}, FINGERPRINT)
    return folder


def test_what_is_frozen_is_read_back(frozen: Path):
    snapshot = Snapshot.open(frozen)
    assert list(snapshot.train) == examples(10)
    assert snapshot.validation[2] == example(2)
    assert snapshot.fingerprint == FINGERPRINT


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), truncated=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str, truncated: bool):
    folder = tmp_path_factory.mktemp("texts")
    freeze(folder, {"train": [example(0, text, truncated)]}, {})
    assert list(Snapshot.open(folder).train) == [example(0, text, truncated)]


def test_order_holds_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot_module, "GROUPS_PER_FILE", 4)
    freeze(tmp_path / "data", {"train": iter(examples(10))}, {})
    assert len(list((tmp_path / "data").glob("*array_record*"))) == 3
    assert list(Snapshot.open(tmp_path / "data").train) == examples(10)


def test_digest_names_the_content(frozen: Path, tmp_path: Path):
    splits = {"train": examples(10), "validation": examples(3)}
    freeze(tmp_path / "same", splits, FINGERPRINT)
    freeze(tmp_path / "other", splits | {"train": [*examples(9), example(9, "changed")]}, FINGERPRINT)
    digest = Snapshot.open(frozen).digest
    assert Snapshot.open(tmp_path / "same").digest == digest
    assert Snapshot.open(tmp_path / "other").digest != digest


FROZEN_ELSEWHERE = """
import sys
from pathlib import Path
from gadjax.data.snapshot import Snapshot, freeze
from tests.test_data import FINGERPRINT, examples
freeze(Path(sys.argv[1]), {"train": examples(10), "validation": examples(3)}, FINGERPRINT)
"""


def test_digest_is_that_of_any_process(frozen: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": ":".join([str(Path(__file__).parent.parent), *sys.path]), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", FROZEN_ELSEWHERE, str(tmp_path / "data")], check=True, env=environment)
    assert Snapshot.open(tmp_path / "data").digest == Snapshot.open(frozen).digest


@pytest.mark.parametrize(
    "change",
    [
        lambda row: replace(row, answer=replace(row.answer, truncated=True)),
        lambda row: replace(row, prompt=replace(row.prompt, messages=({"role": "user", "content": "other"},))),
        lambda row: replace(row, tokens=replace(row.tokens, prompt=row.tokens.prompt[:-1], teacher=row.tokens.prompt[-1:])),
        lambda row: replace(row, tokens=replace(row.tokens, teacher=(9,) * len(row.tokens.teacher))),
    ],
    ids=["answer", "prompt", "tokens", "teacher"],
)
def test_digest_depends_on_every_part(tmp_path: Path, change: Callable[[Example], Example]):
    freeze(tmp_path / "a", {"train": [example(0), example(4)]}, {})
    freeze(tmp_path / "b", {"train": [change(example(0)), example(4)]}, {})
    freeze(tmp_path / "c", {"train": [example(4), example(0)]}, {})
    freeze(tmp_path / "d", {"train": [example(0)], "validation": [example(4)]}, {})
    assert len({Snapshot.open(tmp_path / name).digest for name in "abcd"}) == 4


def test_what_was_made_on_other_data_is_refused(frozen: Path):
    snapshot = Snapshot.open(frozen)
    snapshot.check_origin(snapshot.digest, Path("here"))
    with pytest.raises(UserError, match=r"^stages/gad/4: was trained on other data than the run has now; delete it, or"):
        snapshot.check_origin("another", Path("stages/gad/4"))


def test_every_changed_or_missing_file_is_named(tmp_path: Path):
    freeze(tmp_path / "data", {"train": examples(5)}, {})
    paths = [path for path in (tmp_path / "data").iterdir() if path.name != "manifest.json"]
    assert len(paths) == 3
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{path.name}.*changed"):
            Snapshot.open(tmp_path / "data")
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}.*missing"):
            Snapshot.open(tmp_path / "data")
        path.write_bytes(content)
    Snapshot.open(tmp_path / "data")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": {}}'])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str):
    freeze(tmp_path / "data", {"train": examples(1)}, {})
    (tmp_path / "data" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json.*changed"):
        Snapshot.open(tmp_path / "data")


def test_no_snapshot_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="no data snapshot.*gadjax prepare"):
        Snapshot.open(tmp_path)


def test_an_empty_split_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="prompts.validation"):
        freeze(tmp_path / "data", {"train": examples(1), "validation": []}, {})
    assert not (tmp_path / "data").exists()


def test_freeze_replaces_a_snapshot_and_nothing_else(tmp_path: Path):
    freeze(tmp_path / "data", {"train": examples(1)}, {})
    freeze(tmp_path / "data", {"train": examples(2)}, {})
    assert len(Snapshot.open(tmp_path / "data").train) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine.*not a data snapshot"):
        freeze(tmp_path / "mine", {"train": examples(2)}, {})
    assert (tmp_path / "mine" / "thesis.txt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from gadjax.data.snapshot import Example, freeze
from gadjax.records import Answer, Prompt, TokenGroup
example = Example(Prompt.of("hi", "p"), Answer("p", "hello"), TokenGroup("p", (1,), (2,)))
def rows():
    yield example
    os.kill(os.getpid(), signal.SIGKILL)
freeze(Path(sys.argv[1]), {"train": [example], "validation": rows()}, {})
"""


def test_a_killed_freeze_leaves_no_snapshot_and_does_not_hinder_the_next(tmp_path: Path):
    folder = tmp_path / "data"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()), "killed before it wrote anything"
    with pytest.raises(UserError, match="no data snapshot"):
        Snapshot.open(folder)
    freeze(folder, {"train": examples(3)}, {})
    assert len(Snapshot.open(folder).train) == 3
    assert list(tmp_path.iterdir()) == [folder]


def ids(batch: list[TokenGroup]) -> list[str]:
    return [group.prompt_id for group in batch]


def test_every_epoch_is_a_new_order_of_all_groups(frozen: Path):
    train = Snapshot.open(frozen).train
    seen = list(itertools.chain.from_iterable(ids(batch) for batch in itertools.islice(iter(batches(train, 4, seed=1)), 5)))
    assert len(seen) == 20, "the batch across the epochs is not full"
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(f"p{i}" for i in range(10))
    assert seen[:10] != seen[10:]


def test_batches_hold_token_groups_and_depend_on_the_seed_alone(frozen: Path):
    train = Snapshot.open(frozen).train
    first = next(iter(batches(train, 10, seed=1)))
    assert sorted(first, key=lambda group: group.prompt) == [row.tokens for row in examples(10)]
    assert next(iter(batches(train, 10, seed=1))) == first != next(iter(batches(train, 10, seed=2)))


def test_restores_at_every_index(frozen: Path):
    dataset = batches(Snapshot.open(frozen).train, 4, seed=1)
    grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(dataset, 8))


def test_the_state_survives_json(frozen: Path):
    dataset = batches(Snapshot.open(frozen).train, 4, seed=1)
    iterator, restored = iter(dataset), iter(dataset)
    for _ in range(3):
        next(iterator)
    restored.set_state(json.loads(json.dumps(iterator.get_state())))
    assert next(restored) == next(iterator)


@pytest.mark.parametrize(
    ("groups", "batch", "epochs", "expected"), [(10, 4, 1, 3), (10, 4, 2, 5), (10, 16, 1, 1), (8, 4, 3, 6), (10, 5, 0.5, 1)]
)
def test_steps(groups: int, batch: int, epochs: float, expected: int):
    assert steps(groups, batch, epochs) == expected
