"""What gradients keep of a layer: no more than they say, nothing computed again that is kept, and the same numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.models.adapters import AdaptersConfig
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.models.rematerialisation import KEPT, Rematerialise
from gadjax.models.row_attention import AttendRows, dense
from gadjax.models.splash_attention import splash
from gadjax.planning.flops import matrix_flops
from gadjax.sharding import MeshConfig, jit_on, make_mesh
from gadjax.types import Cells, Params

DIMS = DecoderConfig(vocabulary=32, width=24, layers=5, heads=4, kv_heads=2, head_width=8, feed_forward=40)
ROWS, TOKENS = 2, 12
WHICH: list[Rematerialise] = list(KEPT)


def rows_of(rows: int, tokens: int) -> Cells:
    """Rows of one prompt's tokens."""
    ids = jnp.array(np.random.default_rng(0).integers(0, DIMS.vocabulary, (rows, tokens)), jnp.int32)
    columns, zeros = jnp.broadcast_to(jnp.arange(tokens), (rows, tokens)), jnp.zeros((rows, tokens), jnp.int32)
    return Cells(ids, columns, zeros, zeros - 1, zeros, zeros - 1, zeros.astype(jnp.float32))


def loss_of(again: Rematerialise, cells: Cells, attend: AttendRows = dense, dims: DecoderConfig = DIMS) -> Any:
    """A loss of the parameters, and parameters for it."""
    network = language_model(dims, jnp.dtype(jnp.float32), again, attend)

    def loss(params: Params) -> jax.Array:
        hidden, _ = network.bind(params).trunk(cells.tokens_ML, cells.positions_ML, network.attend(cells))
        return jnp.mean(jnp.sin(hidden))

    return loss, jax.tree.map(lambda leaf: leaf + 0.01, network.init(jax.random.key(0)))


@pytest.mark.parametrize("adapters", [None, AdaptersConfig(rank=2)])
def test_gradients_keep_what_they_say_and_are_the_same(adapters: AdaptersConfig | None):
    dims, cells = DIMS.adapted(adapters), rows_of(ROWS, TOKENS)
    kept: dict[Rematerialise, int] = {}
    grads = []
    for again in WHICH:
        loss, params = loss_of(again, cells, dims=dims)
        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        kept[again] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
        grads.append(jax.jit(jax.grad(loss))(params))
    each = ROWS * TOKENS * DIMS.layers
    assert kept["feed_forward"] - kept[True] == each * (DIMS.heads + 2 * DIMS.kv_heads) * DIMS.head_width + each * DIMS.width
    assert kept[False] - kept["feed_forward"] == each * 2 * DIMS.feed_forward
    for other in grads[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), grads[0], other)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, context=2, tensor=2)])
def test_the_attention_kernel_runs_once(mesh: MeshConfig):
    cells, made = rows_of(8, 256), make_mesh(mesh)
    forwards: list[int] = []
    backwards: list[int] = []
    for again in WHICH:
        loss, params = loss_of(again, cells, partial(splash, interpret=True))
        for found, function in ((forwards, loss), (backwards, jax.grad(loss))):
            found.append(kernels(jit_on(made, function).trace(params).jaxpr.jaxpr))
    assert forwards == [1] * 3, "in the loop over layers"
    assert backwards == [3] * 3, "one forward, one for queries and one for keys and values"


def kernels(jaxpr: Any) -> int:
    """How many calls of kernels a program makes, of whose results something is read."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            count += 1
        elif equation.outvars or equation.effects:
            inner = [getattr(each, "jaxpr", each) for each in equation.params.values()]
            count += sum(kernels(each) for each in inner if hasattr(each, "eqns"))
    return count


@pytest.mark.parametrize(("attend", "passes"), [(dense, 4.0), (partial(splash, interpret=True), 4.8)])
def test_what_is_kept_is_not_counted_as_computed_again(attend: AttendRows, passes: float):
    cells = rows_of(ROWS, 128)

    def flops(again: Rematerialise, derive: Any = jax.grad) -> float:
        loss, params = loss_of(again, cells, attend)
        return matrix_flops(jit_on(make_mesh(MeshConfig()), derive(loss)).trace(params).jaxpr.jaxpr, lambda _: 1.0)

    each = 2 * ROWS * 128 * DIMS.layers * DIMS.width
    projections, feed_forward = each * (2 * DIMS.heads + 2 * DIMS.kv_heads) * DIMS.head_width, each * 3 * DIMS.feed_forward
    assert flops(True) - flops("feed_forward") == projections
    assert flops("feed_forward") - flops(False) == feed_forward * 2 / 3
    attention = flops(True, lambda loss: loss) - projections - feed_forward
    in_gradient = flops(False) - 3 * (projections + feed_forward)
    # Dense it is computed twice and its gradient is two; the kernel is run once, and its gradient is some 3.8, but never another 1.
    assert in_gradient / attention == pytest.approx(passes, abs=0.1)
