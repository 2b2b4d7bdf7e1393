"""What differs on an accelerator, on the one at hand: `JAX_PLATFORMS=cuda pytest -n 0 -m accelerator`, or `tpu`."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.chips import chip_of
from gadjax.cli import main
from gadjax.data.packing import RowShape, pack
from gadjax.metrics import read
from gadjax.models.row_attention import AttendRows, automatic, dense
from gadjax.types import Cells
from tests import tiny

pytestmark = [pytest.mark.accelerator, pytest.mark.timeout(900)]

PROMPT, RESPONSE, RESPONSES, HEADS, KV_HEADS, WIDTH = 256, 128, 4, 4, 2, 128


@pytest.fixture
def platform() -> str:
    return jax.devices()[0].platform


def two_groups() -> Cells:
    rng = np.random.default_rng(0)
    prompts = [(0,) * PROMPT, (0,) * 70]
    responses = [[(0,) * int(length) for length in rng.integers(1, RESPONSE + 1, RESPONSES)] for _ in prompts]
    shape = RowShape(groups=2, micro_batches=1, rows=1, length=1536, together=True)
    return jax.tree.map(lambda cell: cell[0], pack(prompts, responses, shape).cells)


def attended(way: AttendRows, cells: Cells, dtype: str) -> list[np.ndarray]:
    """The output and the gradients by queries, keys and values where there are tokens."""
    sizes = [(KV_HEADS, HEADS // KV_HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH)]
    drawn = [jax.random.normal(jax.random.key(i), (*cells.tokens_ML.shape, *size)) for i, size in enumerate(sizes)]
    arrays = [array.astype(jnp.bfloat16).astype(dtype) for array in drawn]  # the same numbers for every dtype
    valid = jnp.asarray(cells.segments_ML >= 0)[..., None, None, None]

    @jax.jit
    def run(cells: Cells, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        whole, back = jax.vjp(lambda *arrays: way(cells)(*arrays, memory=None)[0], *arrays)
        up = jnp.sin(jnp.arange(whole.size, dtype=jnp.float32)).reshape(whole.shape).astype(whole.dtype)
        return jnp.where(valid, whole, 0), *back(jnp.where(valid, up, 0)), whole

    with jax.default_matmul_precision("highest"):
        *found, whole = (np.asarray(array, np.float32) for array in run(cells, *arrays))
    assert np.isfinite(whole).all(), "padding too: it is the next layer's values"
    return found


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_rows_are_attended_as_densely(dtype: str, error: float):
    cells = two_groups()
    assert len(np.unique(cells.segments_ML)) >= 2
    found, wanted = attended(automatic(PROMPT, RESPONSE, jax.devices()[0]), cells, dtype), attended(dense, cells, "float32")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=error * np.abs(theirs).max())


def test_a_device_at_hand_is_known(platform: str):
    assert (chip_of(jax.devices()[0]) is None) == (platform == "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    with pytest.raises(SystemExit) as ended:
        main(["run", "tiny.yaml", f"student.compute_dtype={dtype}"])
    assert ended.value.code == 0
    rows = [row for stage in tiny.STEPS for row in read(Path("runs/tiny/stages") / stage / "metrics.jsonl")]
    measured = [value for row in rows for name, value in row.items() if isinstance(value, float) and not name.startswith("validation/")]
    assert all(map(math.isfinite, measured))  # an untrained student's answers may be empty, and have no share of distinct words
    gaps = [row["rollout/logp_gap"] for row in rows if "rollout/logp_gap" in row]
    assert gaps and max(gaps) < 0.05  # the sampler's log-probabilities are those of training
