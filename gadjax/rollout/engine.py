"""Rollouts: prompts in, N sampled responses each out, in one jitted program.

Every prompt is computed once; its keys and values are read by all N samples of its group (`attention.decode`). The
decode loop stays on the device until every response has ended.

Letters: B groups, N responses per group, P prompt tokens, R response tokens, K key/value heads, H head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gadjax.models.attention import decode, prefill
from gadjax.models.decoder import Network
from gadjax.rollout.sampling import sample, stream_keys
from gadjax.sharding import constrain
from gadjax.types import Params, Rollout


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


class _Decoding(NamedTuple):
    """The carry of the decode loop; arrays as in `Rollout`, caches [layers, B, N, K, R, H]."""

    position: jax.Array
    tokens_BNR: jax.Array
    logps_BNR: jax.Array
    lengths_BN: jax.Array
    ended_BN: jax.Array
    cache: tuple[jax.Array, jax.Array]


Generate = Callable[[Params, jax.Array, jax.Array, jax.Array], Rollout]


def make_generate(network: Network, plan: SamplingPlan) -> Generate:
    """Builds `generate(params, prompts_BP, prompt_lengths_B, key) -> Rollout`, to be jitted."""

    def generate(params: Params, prompts_BP: jax.Array, prompt_lengths_B: jax.Array, key: jax.Array) -> Rollout:
        model = network.bind(params)
        groups, prompt_tokens = prompts_BP.shape
        prompts_BP = constrain(prompts_BP, "groups", None)
        positions_BP = jnp.broadcast_to(jnp.arange(prompt_tokens)[None, :], prompts_BP.shape)
        hidden_BPD, prompt_cache = model.trunk(prompts_BP, positions_BP, prefill(prompt_lengths_B, prompt_tokens))
        last_BD = jnp.take_along_axis(hidden_BPD, (prompt_lengths_B - 1)[:, None, None], axis=1).squeeze(1)
        logits_BV = model.logits(last_BD)
        first_BNV = jnp.broadcast_to(logits_BV[:, None], (groups, plan.samples, logits_BV.shape[-1]))
        keys_BN = stream_keys(key, groups, plan.samples)

        def write(state: _Decoding, logits_BNV: jax.Array) -> _Decoding:
            token_BN, logp_BN = sample(logits_BNV, keys_BN, state.position, plan.temperature, plan.top_k, plan.top_p)
            running_BN = ~state.ended_BN
            return state._replace(
                position=state.position + 1,
                tokens_BNR=state.tokens_BNR.at[:, :, state.position].set(jnp.where(running_BN, token_BN, 0)),
                logps_BNR=state.logps_BNR.at[:, :, state.position].set(jnp.where(running_BN, logp_BN, 0.0)),
                lengths_BN=state.lengths_BN + running_BN.astype(jnp.int32),
                ended_BN=state.ended_BN | (token_BN == plan.end_of_turn),
            )

        def step(state: _Decoding) -> _Decoding:
            previous = state.position - 1
            token_BN = jax.lax.dynamic_index_in_dim(state.tokens_BNR, previous, axis=2, keepdims=False)
            positions_BN = jnp.broadcast_to((prompt_lengths_B + previous)[:, None], token_BN.shape)
            memory = (prompt_cache, state.cache)
            hidden_BND, new = model.trunk(token_BN, positions_BN, decode(prompt_lengths_B, previous), memory)
            cache = tuple(old.at[:, :, :, :, previous].set(now) for old, now in zip(state.cache, new, strict=True))
            return write(state._replace(cache=cache), model.logits(hidden_BND))

        def unfinished(state: _Decoding) -> jax.Array:
            return (state.position < plan.response_tokens) & ~jnp.all(state.ended_BN)

        state = jax.lax.while_loop(unfinished, step, write(_empty(plan, groups, prompt_cache), first_BNV))
        return Rollout(state.tokens_BNR, state.logps_BNR, state.lengths_BN, state.ended_BN)

    return generate


def _empty(plan: SamplingPlan, groups: int, prompt_cache: tuple[jax.Array, jax.Array]) -> _Decoding:
    """Nothing decoded yet. The response cache has the layers, key/value heads and width of the prompt's [layers, B, K, P, H]."""
    responses = (groups, plan.samples)

    def cache_like(prompt_part: jax.Array) -> jax.Array:
        layers, _, kv_heads, _, head_width = prompt_part.shape
        shape = (layers, *responses, kv_heads, plan.response_tokens, head_width)
        return constrain(jnp.zeros(shape, prompt_part.dtype), None, "groups", None, "kv_heads", None, None)

    return _Decoding(
        position=jnp.int32(0),
        tokens_BNR=jnp.zeros((*responses, plan.response_tokens), jnp.int32),
        logps_BNR=jnp.zeros((*responses, plan.response_tokens), jnp.float32),
        lengths_BN=jnp.zeros(responses, jnp.int32),
        ended_BN=jnp.zeros(responses, bool),
        cache=(cache_like(prompt_cache[0]), cache_like(prompt_cache[1])),
    )
