"""cuDNN's attention without a GPU: the same call by XLA against ours, and what is lowered for one."""

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.models.attention import MASKED, biased_attention
from gadjax.models.cudnn_attention import fused_attention, has_kernel, serves
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.models.rematerialisation import KEPT, Rematerialise
from gadjax.models.row_attention import automatic
from gadjax.planning.flops import matrix_flops
from gadjax.sharding import MeshConfig, jit_on, make_mesh
from gadjax.types import Cells

M, Q, W, K, G, H = 4, 6, 10, 2, 3, 8
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
BF16 = jnp.dtype(jnp.bfloat16)


def test_it_is_attention_under_the_mask(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((M, Q, K, G, H), (M, W, K, H), (M, W, K, H)))
    bias = jnp.asarray(np.where(rng.random((M, Q, W)) < 0.6, 0.0, MASKED), jnp.float32).at[:, 1:, 0].set(0.0).at[:, 0].set(MASKED)
    monkeypatch.setattr("gadjax.models.cudnn_attention.serves", lambda *_: True)  # float32, to compare
    ways = (biased_attention, partial(fused_attention, implementation="xla"))
    ours, theirs = (jax.vjp(partial(way, bias_MQW=bias), query, key, value) for way in ways)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(ours[0], theirs[0])  # what reads nothing is finite: a NaN would reach others through the next layer's values
    up = jnp.sin(ours[0]).at[:, 0].set(0.0)
    jax.tree.map(close, ours[1](up), theirs[1](up))


def test_what_it_serves():
    assert serves(BF16, 128) and serves(BF16, 64)
    assert not serves(jnp.dtype(jnp.float32), 128) and not serves(BF16, 256) and not serves(BF16, 12)


def test_which_devices_have_it():
    def device(platform: str, capability: str) -> SimpleNamespace:
        return SimpleNamespace(platform=platform, compute_capability=capability)

    assert has_kernel(device("gpu", "8.0")) and has_kernel(device("gpu", "12.0")) and not has_kernel(jax.devices()[0])
    assert not has_kernel(device("gpu", "7.5")) and not has_kernel(device("gpu", "gfx90a")), "one too old, one of AMD's"


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, context=4), MeshConfig(fsdp=2, tensor=4), MeshConfig(tensor=8)])
@pytest.mark.usefixtures("cudnn")
def test_every_device_has_its_part(mesh: MeshConfig):
    shapes = [jax.ShapeDtypeStruct(shape, BF16) for shape in ((8, 16, 2, 8, 8), (8, 32, 2, 8), (8, 32, 2, 8))]
    bias = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32)
    traced = jit_on(make_mesh(mesh), fused_attention).trace(*shapes, bias)
    assert matrix_flops(traced.jaxpr.jaxpr, lambda _: 1.0) == 2 * 2 * (8 * 16 * 16 * 8) * 32, "some is computed twice"


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were here: JAX asks for its version when it traces."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def gradient(length: int, again: Rematerialise = True) -> tuple[Callable[..., Any], Any]:
    """Of a loss in two rows of so many tokens, on a GPU, by parameters; and their shapes."""
    dims = DecoderConfig(vocabulary=32, width=24, layers=5, heads=4, kv_heads=2, head_width=8, feed_forward=40)
    network = language_model(dims, BF16, again, automatic(9, 15, H100))
    zeros = jnp.zeros((2, length), jnp.int32)
    cells = Cells(zeros, zeros, zeros, zeros, zeros, zeros, zeros.astype(jnp.float32))

    def loss(params: Any) -> jax.Array:
        hidden, _ = network.bind(params).trunk(cells.tokens_ML, cells.positions_ML, network.attend(cells))
        return jnp.sum(hidden.astype(jnp.float32))

    return jax.grad(loss), network.shapes


@pytest.mark.parametrize("length", [64, 65, 1024])
@pytest.mark.usefixtures("cudnn")
def test_rows_of_any_length_are_lowered_for_a_gpu(length: int):
    function, shapes = gradient(length)
    text = jit_on(make_mesh(MeshConfig(fsdp=2, tensor=4)), function).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(", text)
    assert sorted(calls) == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"], "not again for the gradient"
    assert (f"{length}x{length}x" in text) == (length == 64), "only short rows have a mask of the whole row"


@pytest.mark.parametrize("again", KEPT)
@pytest.mark.usefixtures("cudnn")
def test_its_products_are_counted_and_none_is_made_again(again: Rematerialise):
    def flops(length: int) -> float:
        function, shapes = gradient(length, again)
        return matrix_flops(jax.jit(function).trace(shapes).jaxpr.jaxpr, lambda _: 1.0)

    quadratic = (flops(66) - flops(64) * 66 / 64) / (66 * 66 - 64 * 66)
    product = 2 * 2 * 5 * 4 * 8  # of a query and a key, in all rows, layers and heads
    assert quadratic == (2 + 5) * product
