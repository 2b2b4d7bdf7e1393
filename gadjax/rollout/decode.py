"""The programs of a rollout: a prefill, and the decode loop, which stays on the device.

Letters: B groups, N samples of each, M = B x N samples, C prompts prefilled together, G places for prompts, S decode slots, P prompt
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import jax
import jax.numpy as jnp

from gadjax.models.cache_attention import decode, prefill
from gadjax.models.decoder import Network, Unrolled
from gadjax.rollout.sampling import sample
from gadjax.rollout.slots import Cache, Decoding, Order, Prompts, advanced, refilled
from gadjax.sharding import constrain
from gadjax.types import Params

SHORTEST = 64  # tokens of the shortest prefill


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What a rollout program is compiled for.

    Attributes:
        samples: N.
        response_tokens: R.
        temperature: T; 0 is greedy.
        end_of_turn: the id that ends a response.
        top_k: the likeliest tokens that are drawn from; None: all.
        top_p: the share of the mass that is drawn from.
    """

    samples: int
    response_tokens: int
    temperature: float
    end_of_turn: int
    top_k: int | None = None
    top_p: float = 1.0


def make_weights(network: Network) -> Callable[[Params], Params]:
    """Builds `params -> weights`: what the decode loop reads, in the compute dtype.

    The stacked blocks become a list of layers; and the projection to the vocabulary becomes "head", [D, V], beside the embedding that it
    may be: on a CPU the product of a few rows with [V, D] takes longer (docs/log.md).
    """

    def weights(params: Params) -> Params:
        model = network.bind(params)
        cast = network.in_compute_dtype(params)
        layers = [jax.tree.map(itemgetter(layer), cast["trunk"]["blocks"]) for layer in range(model.trunk.config.layers)]
        return {"trunk": cast["trunk"] | {"blocks": layers}, "head": model.projection.astype(model.trunk.dtype).T}

    return weights


def weights_axes(network: Network) -> Params:
    """The logical axes of what `make_weights` makes."""
    axes, layers = network.axes, network.bind(network.shapes).trunk.config.layers
    blocks = [{name: names[1:] for name, names in axes["trunk"]["blocks"].items()}] * layers
    return {"trunk": axes["trunk"] | {"blocks": blocks}, "head": ("embed", "vocabulary")}


def bound(network: Network, weights: Params) -> tuple[Unrolled, Callable[[jax.Array], jax.Array]]:
    """The trunk, and the projection [S, D] -> [S, V] float32, that read such weights."""
    layers = weights["trunk"]["blocks"]
    model = network.bind(network.shapes | {"trunk": weights["trunk"] | {"blocks": layers[0]}})

    def logits(hidden_SD: jax.Array) -> jax.Array:
        return jnp.einsum("sd,dv->sv", hidden_SD, weights["head"], preferred_element_type=jnp.float32)

    return model.trunk.unrolled(layers), logits


def bucket(prompt_tokens: int, most: int) -> int:
    """P of a prefill for prompts of at most so many tokens: a quarter, a half or all of `most`, so that few programs are compiled."""
    return next(tokens for tokens in (most // 4, most // 2, most) if tokens >= max(prompt_tokens, min(SHORTEST, most)))


def make_prefill(network: Network) -> Callable[[Params, jax.Array], list[Cache]]:
    """Builds `(params, tokens_CP) -> caches`: what C prompts leave to be read, layer by layer."""

    def fill(params: Params, tokens_CP: jax.Array) -> list[Cache]:
        tokens_CP = constrain(tokens_CP, "groups", None)
        positions_CP = jnp.broadcast_to(jnp.arange(tokens_CP.shape[1])[None, :], tokens_CP.shape)
        _, (keys, values) = network.bind(params).trunk(tokens_CP, positions_CP, prefill)
        return [(keys[layer], values[layer]) for layer in range(keys.shape[0])]

    return fill


def make_decode(network: Network, plan: SamplingPlan) -> Callable[..., tuple[Decoding, jax.Array]]:
    """Builds `(weights, prompts, order, state, ready, steps, few) -> (state, finished_B)`, the decode loop.

    It ends after `steps` steps, or when no sample below `ready` waits and at most `few` slots are at work. `finished_B` tells the
    groups whose prompts are needed no longer.
    """

    def run(
        weights: Params, prompts: Prompts, order: Order, state: Decoding, ready: jax.Array, steps: jax.Array, few: jax.Array
    ) -> tuple[Decoding, jax.Array]:
        samples, (trunk, logits) = order.limits_M.shape[0], bound(network, weights)

        def step(carry: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
            left, state = carry
            state = refilled(state, order, ready)
            slots, sample_S = state.slots, jnp.minimum(state.slots.sample_S, samples - 1)  # idle slots do as the last sample would
            group_S = sample_S // plan.samples
            places_S = prompts.places_B[group_S] * plan.samples + sample_S % plan.samples
            places_S = jnp.where(slots.sample_S < samples, places_S, prompts.keys_G.shape[0] * plan.samples)
            attend = decode(places_S, plan.samples, prompts.keys_G, slots.position_S)
            positions_S = order.lengths_B[group_S] - 1 + slots.position_S
            memory = list(zip(prompts.caches, slots.caches, strict=True))
            hidden_SD, caches = trunk(slots.input_S, positions_S, attend, memory)
            keys_S = order.keys_M[sample_S]
            chosen = sample(logits(hidden_SD), keys_S, slots.position_S, plan.temperature, plan.top_k, plan.top_p)
            return left - 1, advanced(state, caches, *chosen, order.limits_M[sample_S], plan.end_of_turn)

        def going(carry: tuple[jax.Array, Decoding]) -> jax.Array:
            left, state = carry
            return (left > 0) & ((state.next < ready) | (jnp.sum(state.slots.sample_S < samples) > few))

        _, state = jax.lax.while_loop(going, step, (steps, state))
        over_M = state.responses.ended_M | (state.responses.lengths_M >= order.limits_M)
        return state, constrain(jnp.all(over_M.reshape(-1, plan.samples), axis=1), None)

    return run
