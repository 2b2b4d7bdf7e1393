"""What is read of a checkpoint at once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gadjax import restoring
from gadjax.checkpointing import Checkpoints
from gadjax.restoring import restored
from gadjax.types import Role, TrainState

VALUES = np.arange(8 * 24, dtype=np.float32).reshape(8, 24)


def laid_out(*axes: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")), PartitionSpec(*axes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """A tree whose array was written in parts of [2, 12]."""
    folder = epath.Path(tmp_path_factory.mktemp("saved") / "tree")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave({"one": [jax.device_put(VALUES, laid_out("a", "b"))]}))
    return folder


def abstract(*axes: str | None) -> Any:
    return {"one": [jax.ShapeDtypeStruct(VALUES.shape, VALUES.dtype, sharding=laid_out(*axes))]}


def test_the_parts_of_a_model_and_its_optimizer_are_found_by_name(tmp_path: Path):
    """Orbax names what it keeps as it likes; what were not found would count as it is wanted now, not as it was written."""
    params = {"weight": jax.device_put(VALUES, laid_out())}
    role = Role(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TrainState(role, None), {})
    divided = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=laid_out(*("a", "b")[: leaf.ndim])), role)
    stored = ocp.StandardCheckpointHandler().metadata(epath.Path(tmp_path) / "1" / "student")
    names = [set(ocp.tree.to_flat_dict(tree, sep=".")) for tree in (stored.tree, divided)]
    assert names[0] == names[1] and len(names[0]) == 4
    assert restoring._largest(stored, divided) == 4 * 2 * 24  # the eight devices wrote a row each


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What Orbax was told."""
    given, handler = [], ocp.StandardCheckpointHandler
    monkeypatch.setattr(ocp, "StandardCheckpointHandler", lambda **options: given.append(options) or handler(**options))
    return given


@pytest.mark.parametrize(
    ("axes", "cells"),
    [
        (("a", "b"), 2 * 12),
        (("b", "a"), 4 * 12),  # a part of [4, 6] takes two of the written ones
        ((None, "a"), 8 * 12),
        ((None, ("a", "b")), 8 * 12),
        ((), 8 * 24),
    ],
)
def test_parts_that_were_written_are_read_whole(saved: epath.Path, limits: list, axes: tuple, cells: int):
    assert restoring._largest(ocp.StandardCheckpointHandler().metadata(saved), abstract(*axes)) == 4 * cells
    found = restored(saved, abstract(*axes))["one"][0]
    np.testing.assert_array_equal(found, VALUES)
    assert found.sharding.is_equivalent_to(laid_out(*axes), 2)
    assert limits[-1] == {"restore_concurrent_gb": 1}


@pytest.mark.parametrize(("size", "chunk", "covered"), [(6, 6, 6), (6, 12, 12), (12, 6, 12), (8, 6, 18), (6, 8, 16), (1, 5, 5)])
def test_chunks_that_cover_a_part(size: int, chunk: int, covered: int):
    assert restoring._covering(size, chunk) == covered
    reached = max(-(-(first + size) // chunk) - first // chunk for first in range(0, size * chunk, size))
    assert reached * chunk <= covered


@pytest.mark.parametrize(("largest", "limit"), [(10, 1), (999_999_999, 1), (1_000_000_000, 2), (13_600_000_000, 14)])
def test_the_largest_part_is_never_refused(saved: epath.Path, limits: list, monkeypatch: pytest.MonkeyPatch, largest: int, limit: int):
    """Orbax refuses a part of as many bytes as its limit."""
    monkeypatch.setattr(restoring, "_largest", lambda *_: largest)
    restored(saved, abstract())
    assert limits[-1] == {"restore_concurrent_gb": limit}
    assert limit * 10**9 > largest
