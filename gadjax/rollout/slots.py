"""What the decode loop holds: prompts, slots with a sample each, and the responses so far; and how slots are filled.

Samples are numbered m = b * N + n and are taken in this order. A sample begins with its prompt's last token as its first input, like
any later one: its slot reads one key less of the prompt and keeps that token's own. So a step is the same for every slot, and a slot
can be filled at any step.

Letters: B groups, N samples of each, M = B x N samples, G places for prompts, S decode slots, P prompt tokens, R response tokens,
K key/value heads, H head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gadjax.models.cache_attention import response_blocks
from gadjax.models.decoder import Trunk
from gadjax.sharding import constrain

Cache = tuple[jax.Array, jax.Array]  # one layer's keys [.., K, H, tokens] and values [.., K, tokens, H]
Blocks = list[Cache]  # the same of responses, a few tokens each


class Order(NamedTuple):
    """What is to be sampled.

    Attributes:
        lengths_B: tokens of each prompt.
        last_B: its last token.
        keys_M: the samples' random keys.
        limits_M: the most tokens of each sample.
    """

    lengths_B: jax.Array
    last_B: jax.Array
    keys_M: jax.Array
    limits_M: jax.Array


class Prompts(NamedTuple):
    """The prompts that are at hand.

    Attributes:
        caches: of each layer, for G places of P tokens.
        keys_G: how many of a prompt's keys are read: all but its last token's.
        places_B: where a group's prompt is.
    """

    caches: list[Cache]
    keys_G: jax.Array
    places_B: jax.Array


class Slots(NamedTuple):
    """Samples in the making.

    Attributes:
        sample_S: the slot's sample; M in an idle slot.
        position_S: how many tokens it has.
        input_S: what the slot reads next: the prompt's last token, then the token sampled last.
        caches: of each layer, for S slots of R tokens in blocks: their inputs so far.
    """

    sample_S: jax.Array
    position_S: jax.Array
    input_S: jax.Array
    caches: list[Blocks]


class Responses(NamedTuple):
    """The samples so far; as in `Rollout`, where B x N is M."""

    tokens_MR: jax.Array
    logps_MR: jax.Array
    lengths_M: jax.Array
    ended_M: jax.Array


class Decoding(NamedTuple):
    """The carry of the decode loop.

    Attributes:
        slots: at work or idle.
        next: the first sample that has had no slot yet.
        responses: what they have made.
    """

    slots: Slots
    next: jax.Array
    responses: Responses


def _cache(trunk: Trunk, count: int, tokens: int) -> Cache:
    shape = (count, trunk.config.kv_heads, tokens, trunk.config.head_width)
    return jnp.zeros(shape, trunk.dtype).swapaxes(2, 3), jnp.zeros(shape, trunk.dtype)


def prompt_caches(trunk: Trunk, places: int, tokens: int) -> list[Cache]:
    """Of each layer, empty."""
    return [_cache(trunk, places, tokens) for _ in range(trunk.config.layers)]


def response_caches(trunk: Trunk, slots: int, tokens: int) -> list[Blocks]:
    """Of each layer, empty, in the blocks that a decode step reads."""
    return [[_cache(trunk, slots, block) for block in response_blocks(tokens)] for _ in range(trunk.config.layers)]


def empty(trunk: Trunk, order: Order, places: int, prompt_tokens: int, slots: int, response_tokens: int) -> tuple[Prompts, Decoding]:
    """G empty places for prompts and S idle slots."""
    samples = order.limits_M.shape[0]

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    prompts = Prompts(prompt_caches(trunk, places, prompt_tokens), zeros(places), jnp.zeros_like(order.lengths_B))
    idle = Slots(jnp.full(slots, samples, jnp.int32), zeros(slots), zeros(slots), response_caches(trunk, slots, response_tokens))
    nothing = zeros(samples, response_tokens)
    responses = Responses(nothing, nothing.astype(jnp.float32), zeros(samples), zeros(samples).astype(bool))
    return prompts_on_mesh(prompts), on_mesh(Decoding(idle, jnp.int32(0), responses))


def prompts_on_mesh(prompts: Prompts) -> Prompts:
    """The prompts, divided over the mesh in scope."""
    return prompts._replace(caches=jax.tree.map(lambda cache: constrain(cache, "groups", "kv_heads", None, None), prompts.caches))


def kept(prompts: Prompts, caches: list[Cache], lengths_C: jax.Array, groups_C: jax.Array, places_C: jax.Array) -> Prompts:
    """The prompts with C more in their places, which may hold longer ones. What would go beyond the last place is dropped."""

    def written(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[places_C, :, : new.shape[2], : new.shape[3]].set(new, mode="drop")

    keys_G = prompts.keys_G.at[places_C].set(lengths_C - 1, mode="drop")
    places_B = prompts.places_B.at[groups_C].set(places_C, mode="drop")
    return prompts_on_mesh(Prompts(jax.tree.map(written, prompts.caches, caches), keys_G, places_B))


def on_mesh(state: Decoding) -> Decoding:
    """The slots, divided over the mesh in scope; the responses are on every device."""
    sample_S, position_S, input_S = (constrain(array, "slots") for array in state.slots[:3])
    caches = jax.tree.map(lambda cache: constrain(cache, "slots", "kv_heads", None, None), state.slots.caches)
    responses = jax.tree.map(lambda array: constrain(array, *[None] * array.ndim), state.responses)
    return Decoding(Slots(sample_S, position_S, input_S, caches), state.next, responses)


def refilled(state: Decoding, order: Order, ready: jax.Array) -> Decoding:
    """The idle slots with the next samples in them, as far as those are below `ready`."""
    slots, samples = state.slots, order.limits_M.shape[0]
    idle_S = slots.sample_S == samples
    candidate_S = state.next + jnp.cumsum(idle_S, dtype=jnp.int32) - 1
    taken_S = idle_S & (candidate_S < ready)
    group_S = jnp.minimum(candidate_S, samples - 1) // (samples // order.last_B.shape[0])
    filled = slots._replace(
        sample_S=jnp.where(taken_S, candidate_S, slots.sample_S),
        position_S=jnp.where(taken_S, 0, slots.position_S),
        input_S=jnp.where(taken_S, order.last_B[group_S], slots.input_S),
    )
    return on_mesh(state._replace(slots=filled, next=state.next + jnp.sum(taken_S, dtype=jnp.int32)))


def advanced(
    state: Decoding, caches: list[Blocks], token_S: jax.Array, logp_S: jax.Array, limit_S: jax.Array, end_of_turn: int
) -> Decoding:
    """Every slot one token on; those whose sample has ended become idle. What an idle slot would write is dropped."""
    (sample_S, position_S, _, _), responses = state.slots, state.responses
    ended_S = token_S == end_of_turn
    over_S = ended_S | (position_S + 1 >= limit_S)
    idle = responses.ended_M.shape[0]
    return on_mesh(
        Decoding(
            slots=Slots(jnp.where(over_S, idle, sample_S), position_S + 1, token_S, caches),
            next=state.next,
            responses=Responses(
                tokens_MR=responses.tokens_MR.at[sample_S, position_S].set(token_S, mode="drop"),
                logps_MR=responses.logps_MR.at[sample_S, position_S].set(logp_S, mode="drop"),
                lengths_M=responses.lengths_M.at[sample_S].set(position_S + 1, mode="drop"),
                ended_M=responses.ended_M.at[sample_S].set(ended_S, mode="drop"),
            ),
        )
    )


def fewer(state: Decoding, count: int) -> Decoding:
    """`count` slots, of which no more may be at work: those at work and some idle ones."""
    kept = jnp.argsort(state.slots.sample_S == state.responses.ended_M.shape[0], stable=True)[:count]
    return on_mesh(state._replace(slots=jax.tree.map(lambda leaf: leaf[kept], state.slots)))
