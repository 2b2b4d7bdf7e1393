"""Log-probabilities in chunks are those of all logits at once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.losses import token_log_probs
from gadjax.planning.flops import matrix_flops
from gadjax.planning.hlo import moved
from gadjax.projection import projected_log_probs, projected_loss
from gadjax.sharding import MeshConfig, constrain, jit_on, make_mesh, named_sharding

M, L, D, V = 2, 12, 8, 30


def case() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((M, L, D)), rng.standard_normal((V, D))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray(rng.integers(0, V, (M, L)), jnp.int32)


def at_once(hidden: jax.Array, weight: jax.Array, targets: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    return token_log_probs(jnp.einsum("mld,vd->mlv", hidden, weight) / temperature, targets)


def lossy(logp: jax.Array, probe: jax.Array) -> jax.Array:
    """A loss that is linear in nothing."""
    return probe * jnp.exp(0.3 * logp)


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_all_logits_at_once(chunk: int, temperature: float):
    hidden, weight, targets = case()
    probe = jnp.asarray(np.random.default_rng(1).standard_normal((M, L)), jnp.float32)
    counts = jnp.array([L, L - 3])
    used = jnp.arange(L)[None] < counts[:, None]

    def chunked(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        loss, *found = projected_loss(lossy, temperature, chunk, hidden, weight, targets, counts, (probe,))
        return 3 * loss, (loss, *found)

    def whole(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        logp, entropy = at_once(hidden, weight, targets, temperature)
        loss = jnp.sum(jnp.where(used, lossy(logp, probe), 0.0))
        return 3 * loss, (loss, logp, entropy)

    (_, (loss, *found)), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, weight)
    (_, (wanted_loss, *wanted)), wanted_grads = jax.value_and_grad(whole, (0, 1), has_aux=True)(hidden, weight)
    without_gradients = chunked(hidden, weight)[1]
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    np.testing.assert_allclose(without_gradients[0], wanted_loss, rtol=1e-5)
    alone = projected_log_probs(hidden, weight, targets, counts, temperature, chunk)
    for one, other, again, value in zip(found, without_gradients[1:], alone, wanted, strict=True):
        for each in (one, other, again):
            np.testing.assert_allclose(np.asarray(each)[used], np.asarray(value)[used], rtol=1e-5, atol=1e-5)
    for one, value in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(one, value, rtol=1e-5, atol=2e-5)


def test_of_a_frozen_projection_no_gradient_is_made():
    hidden, weight, targets = case()

    def loss(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        return projected_loss(jnp.negative, 1.0, 4, hidden, weight, targets, jnp.array([L, L - 3]), ())[0]

    trained, frozen = (jax.jit(jax.grad(loss, which)).trace(hidden, weight) for which in ((0, 1), 0))
    all_three, two = (matrix_flops(traced.jaxpr.jaxpr, lambda _: 1) for traced in (trained, frozen))
    assert all_three - two == 2 * M * 4 * D * V  # of a chunk
    np.testing.assert_array_equal(jax.grad(loss)(hidden, weight), jax.grad(loss, (0, 1))(hidden, weight)[0])


def test_log_probabilities_and_entropies_have_no_gradient():
    hidden, weight, targets = case()

    def found(hidden: jax.Array) -> jax.Array:
        _, logp, entropy = projected_loss(jnp.negative, 1.0, 4, hidden, weight, targets, jnp.array([L, L]), ())
        return jnp.sum(logp + entropy)

    assert not np.any(jax.grad(found)(hidden))


def test_what_is_not_used_is_not_computed_and_has_no_gradient():
    hidden, weight, targets = case()
    hidden, counts = hidden.at[:, 8:].set(jnp.nan), jnp.array([7, 5])

    def loss(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, *found = projected_loss(jnp.negative, 1.0, 4, hidden, weight, targets, counts, ())
        return value, tuple(found)

    (value, (logp, entropy)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    assert np.isfinite(value) and not np.any(np.asarray(logp)[:, 8:]) and not np.any(np.asarray(entropy)[:, 8:])
    by_hidden, by_weight = map(np.asarray, grads)
    assert np.any(by_hidden[0, :7]) and np.any(by_hidden[1, :5]) and np.all(np.isfinite(by_weight))
    assert not np.any(by_hidden[0, 7:]) and not np.any(by_hidden[1, 5:])


def test_logits_far_apart_stay_finite():
    hidden, weight, targets = case()

    def loss(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, *found = projected_loss(jnp.negative, 1.0, 4, hidden, weight, targets, jnp.array([L, L]), ())
        return value, tuple(found)

    (_, found), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(1e4 * hidden, weight)
    assert all(np.isfinite(each).all() for each in (*found, *grads))


def test_a_row_whose_tokens_are_on_several_devices_is_gathered_once():
    """Not for each chunk: in its loop a device sends less than a row."""
    rows, length, chunk = 4, 512, 8
    mesh = make_mesh(MeshConfig(fsdp=4, context=2), jax.devices()[:8])

    def work(hidden: jax.Array, weight: jax.Array, targets: jax.Array, counts: jax.Array) -> tuple[jax.Array, ...]:
        def of(hidden: jax.Array, weight: jax.Array) -> jax.Array:
            hidden = constrain(hidden, "rows", "tokens", None)
            return projected_loss(lambda logp: -logp, 1.0, chunk, hidden, weight, targets, counts, ())[0]

        logp, _ = projected_log_probs(constrain(hidden, "rows", "tokens", None), weight, targets, counts, 1.0, chunk)
        by_hidden, by_weight = jax.grad(of, (0, 1))(hidden, weight)
        return logp, constrain(by_hidden, "rows", "tokens", None), by_weight

    named = {
        "hidden": ((rows, length, D), jnp.float32, ("rows", "tokens", None)),
        "weight": ((64, D), jnp.float32, ("vocabulary", "embed")),
        "targets": ((rows, length), jnp.int32, ("rows", None)),
        "counts": ((rows,), jnp.int32, ("rows",)),
    }
    given = [jax.ShapeDtypeStruct(size, dtype, sharding=named_sharding(names, size, mesh)) for size, dtype, names in named.values()]
    text = jit_on(mesh, work).lower(*given).compile().as_text()
    once, often = (sum(moved(str(text), lambda _, times=times: times).links.values()) for times in (1, 101))
    assert 0 < (often - once) / 100 < length * D * 4
