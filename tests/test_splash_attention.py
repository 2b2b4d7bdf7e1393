"""The TPU's kernel, interpreted, at the head counts of real models and divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.data.packing import RowShape, pack
from gadjax.models.row_attention import AttendRows, dense
from gadjax.models.splash_attention import splash
from gadjax.sharding import MeshConfig, jit_on, make_mesh, replicated
from gadjax.types import Cells

RESPONSES, WIDTH = 9, 16  # the teacher's and eight samples


def two_groups() -> Cells:
    rng = np.random.default_rng(0)
    prompts = [(0,) * 20, (0,) * 7]
    responses = [[(0,) * int(length) for length in rng.integers(1, 14, RESPONSES)] for _ in prompts]
    shape = RowShape(groups=2, micro_batches=1, rows=2, length=168, together=True)
    return jax.tree.map(lambda cell: cell[0], pack(prompts, responses, shape).cells)


def attended(way: AttendRows, cells: Cells, heads: int, kv_heads: int, mesh: MeshConfig, devices: int) -> list[np.ndarray]:
    """The output and the gradients by queries, keys and values where there are tokens."""
    sizes = [(kv_heads, heads // kv_heads, WIDTH), (kv_heads, WIDTH), (kv_heads, WIDTH)]
    key = jax.random.key(0)
    arrays = [jax.random.normal(jax.random.fold_in(key, i), (*cells.tokens_ML.shape, *size)) for i, size in enumerate(sizes)]
    valid = jnp.asarray(cells.segments_ML >= 0)[..., None, None, None]

    def run(cells: Cells, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(lambda *arrays: jnp.where(valid, way(cells)(*arrays, memory=None)[0], 0.0), *arrays)
        return out, *back(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    over = make_mesh(mesh, jax.devices()[:devices])
    return [np.asarray(array) for array in jit_on(over, run)(*jax.device_put((cells, *arrays), replicated(over)))]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mesh"),
    [
        (28, 4, MeshConfig()),  # Qwen2.5-7B on one device
        (28, 4, MeshConfig(fsdp=2, tensor=4)),
        (16, 2, MeshConfig(data=2, fsdp=1, tensor=4)),  # Qwen2.5-3B: each key/value head on two devices
        (4, 2, MeshConfig(fsdp=1, context=4, tensor=2)),  # queries in four parts, of which two have none
        (6, 2, MeshConfig(data=1, fsdp=2, tensor=4)),  # heads that cannot be divided are whole everywhere
    ],
)
def test_real_head_counts_on_a_mesh(heads: int, kv_heads: int, mesh: MeshConfig):
    cells, devices = two_groups(), mesh.data * abs(mesh.fsdp) * mesh.context * mesh.tensor
    found = attended(lambda cells: splash(cells, interpret=True), cells, heads, kv_heads, mesh, devices)
    wanted = attended(dense, cells, heads, kv_heads, MeshConfig(), 1)
    assert len(np.unique(cells.segments_ML)) >= 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())
