"""Log-probabilities in chunks are those of all logits at once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.losses import token_log_probs
from gadjax.projection import projected_log_probs

M, L, D, V = 2, 12, 8, 30


def case() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((M, L, D)), rng.standard_normal((V, D))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray(rng.integers(0, V, (M, L)), jnp.int32)


def at_once(hidden: jax.Array, weight: jax.Array, targets: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    return token_log_probs(jnp.einsum("mld,vd->mlv", hidden, weight) / temperature, targets)


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_all_logits_at_once(chunk: int, temperature: float):
    hidden, weight, targets = case()
    probe = jnp.asarray(np.random.default_rng(1).standard_normal((M, L)), jnp.float32)
    chunked, back = jax.vjp(lambda h, w: projected_log_probs(h, w, targets, jnp.int32(L), temperature, chunk), hidden, weight)
    whole, whole_back = jax.vjp(lambda h, w: at_once(h, w, targets, temperature), hidden, weight)
    for found, wanted in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(back((probe, jnp.zeros_like(probe))), whole_back((probe, jnp.zeros_like(probe))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_what_is_not_used_is_not_computed_and_has_no_gradient():
    hidden, weight, targets = case()
    hidden = hidden.at[:, 8:].set(jnp.nan)
    (logp, entropy), back = jax.vjp(lambda h, w: projected_log_probs(h, w, targets, jnp.int32(7), 1.0, 4), hidden, weight)
    assert not np.any(np.asarray(logp)[:, 8:]) and not np.any(np.asarray(entropy)[:, 8:])
    by_hidden, by_weight = map(np.asarray, back((jnp.ones_like(logp), jnp.zeros_like(logp))))
    assert not np.any(by_hidden[:, 8:]) and np.all(np.isfinite(by_weight)) and np.any(by_hidden[:, :8])


def test_logits_far_apart_stay_finite():
    hidden, weight, targets = case()
    (logp, entropy), back = jax.vjp(lambda h, w: projected_log_probs(h, w, targets, jnp.int32(L), 1.0, 4), 1e4 * hidden, weight)
    assert np.isfinite(logp).all() and np.isfinite(entropy).all()
    assert all(np.isfinite(grad).all() for grad in back((jnp.ones_like(logp), jnp.zeros_like(logp))))
