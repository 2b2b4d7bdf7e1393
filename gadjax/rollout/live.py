"""Decoding for conversations: requests come and go at any time, each with a temperature, a top-p, a length and a stream of its own.

Attention, streams and draws are those of a rollout (`gadjax.rollout.decode`). But what a request asks for is a value here and no part
of the program, so that nothing compiles when one comes; and the host looks every few steps, hands out what there is, and fills the
places that are free. A place holds one prompt and slots for N samples of it, which read it together.

Letters: G places, N samples of a prompt, S = G x N slots, P prompt tokens, R response tokens, K steps from look to look, V vocabulary,
T likeliest tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gadjax.models.cache_attention import decode
from gadjax.models.decoder import Network
from gadjax.rollout.decode import bound, bucket, make_prefill, make_weights
from gadjax.rollout.sampling import draw, integer_probabilities, nucleus
from gadjax.rollout.slots import Blocks, Prompts, kept, prompt_caches, prompts_on_mesh, response_caches
from gadjax.sharding import constrain, jit_on, multiple_of, named_sharding, put, replicated
from gadjax.types import Params

STEPS = 4  # K
LIKELIEST = 20  # T, as many as OpenAI tells


class Slots(NamedTuple):
    """What the host knows of every slot.

    Attributes:
        going_S: whether it is at work.
        input_S: the token that it reads next.
        position_S: how many tokens it has made.
        offset_S: where in the conversation the first input stands.
        limit_S: the most tokens that it may make.
        keys_S: [S, 2] uint32, its stream.
        temperature_S: 0 is greedy.
        top_p_S: the share of the mass that is drawn from.
        tells_S: whether the likeliest tokens are wanted.
    """

    going_S: Any
    input_S: Any
    position_S: Any
    offset_S: Any
    limit_S: Any
    keys_S: Any
    temperature_S: Any
    top_p_S: Any
    tells_S: Any


class Looked(NamedTuple):
    """What the device made from one look to the next: tokens, their log-probabilities at temperature 1, and the likeliest ones."""

    tokens_KS: Any
    logps_KS: Any
    top_KST: Any
    top_logps_KST: Any


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One sample of a prompt: as in `gadjax.completions.Ask`. `key` is its stream, two uint32; `tells`: with the likeliest tokens."""

    key: tuple[int, int]
    temperature: float
    top_p: float
    limit: int
    tells: bool = False


@dataclass(frozen=True)
class Heard:
    """New tokens of a slot, log-probabilities and likeliest tokens beside each; how it ended, if it did: "stop" or "length"."""

    tokens: list[int]
    logps: list[float]
    top: list[list[tuple[int, float]]]
    ended: Literal["stop", "length"] | None


def sample_each(logits_SV: jax.Array, slots: Slots) -> tuple[jax.Array, jax.Array]:
    """Draws a token in every slot as that slot asks; and log softmax(logits), at temperature 1. [S] int32 and [S, V]."""
    greedy_S, shares_S1 = slots.temperature_S == 0, slots.top_p_S[:, None]

    def restricted(weights_SV: jax.Array) -> jax.Array:
        return jnp.where(shares_S1 < 1, nucleus(weights_SV, shares_S1), weights_SV)

    scaled_SV = logits_SV / jnp.where(greedy_S, 1.0, slots.temperature_S)[:, None]
    weights_SV = integer_probabilities(scaled_SV)
    weights_SV = jax.lax.cond(jnp.any(shares_S1 < 1), restricted, lambda weights: weights, weights_SV)
    keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.keys_S), slots.position_S)
    token_S = jnp.where(greedy_S, jnp.argmax(logits_SV, axis=-1).astype(jnp.int32), draw(weights_SV, keys_S))
    return token_S, jax.nn.log_softmax(logits_SV, axis=-1)


def make_decode(network: Network, samples: int, end_of_turn: int) -> Callable[..., tuple[list[Blocks], Looked]]:
    """Builds `(weights, prompts, caches, slots) -> (caches, looked)`: K steps, or fewer where every slot has come to its end."""

    def run(weights: Params, prompts: Prompts, caches: list[Blocks], slots: Slots) -> tuple[list[Blocks], Looked]:
        count, (trunk, logits) = slots.going_S.shape[0], bound(network, weights)
        likeliest = min(LIKELIEST, weights["head"].shape[1])

        def of_all(logps_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
            top_ST, ids_ST = jax.lax.top_k(logps_SV, likeliest)
            return top_ST, ids_ST.astype(jnp.int32)

        def of_none(logps_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.zeros((count, likeliest)), jnp.zeros((count, likeliest), jnp.int32)

        def step(carry: tuple[jax.Array, Slots, list[Blocks], Looked]) -> tuple[jax.Array, Slots, list[Blocks], Looked]:
            index, slots, caches, looked = carry
            # An idle slot writes where the next sample will write first.
            attend = decode(jnp.arange(count), samples, prompts.keys_G, jnp.where(slots.going_S, slots.position_S, 0))
            memory = list(zip(prompts.caches, caches, strict=True))
            hidden_SD, caches = trunk(slots.input_S, slots.offset_S + slots.position_S, attend, memory)
            token_S, logps_SV = sample_each(logits(hidden_SD), slots)
            top_ST, ids_ST = jax.lax.cond(jnp.any(slots.tells_S), of_all, of_none, logps_SV)
            chosen_S = jnp.take_along_axis(logps_SV, token_S[:, None], axis=-1).squeeze(-1)
            new = (token_S, chosen_S, ids_ST, top_ST)
            position_S = slots.position_S + 1
            going_S = slots.going_S & (token_S != end_of_turn) & (position_S < slots.limit_S)
            looked = Looked(*(old.at[index].set(values) for old, values in zip(looked, new, strict=True)))
            return index + 1, slots._replace(going_S=going_S, input_S=token_S, position_S=position_S), _on_mesh(caches), looked

        def nothing(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.zeros((STEPS, count, *shape), dtype)

        looked = Looked(nothing(dtype=jnp.int32), nothing(), nothing(likeliest, dtype=jnp.int32), nothing(likeliest))
        first = (jnp.int32(0), slots, _on_mesh(caches), looked)
        _, _, caches, looked = jax.lax.while_loop(lambda carry: (carry[0] < STEPS) & jnp.any(carry[1].going_S), step, first)
        return caches, looked

    return run


def _on_mesh(caches: list[Blocks]) -> list[Blocks]:
    return jax.tree.map(lambda cache: constrain(cache, "slots", "kv_heads", None, None), caches)


class Live:
    """Places for prompts, and slots that speak. For one thread.

    Args:
        network: the student's.
        mesh: its devices.
        params: its parameters; kept in the compute dtype.
        end_of_turn: the id that ends a response.
        lengths: P and R.
        places: G; rounded up to what the mesh divides.
        samples: N.
    """

    def __init__(
        self, network: Network, mesh: Mesh, params: Params, end_of_turn: int, *, lengths: tuple[int, int], places: int, samples: int
    ):
        self._mesh, self._end, self.samples = mesh, end_of_turn, samples
        self._prompt_tokens, self.response_tokens = lengths
        multiple = multiple_of("slots", mesh)
        self.places = -(-places // multiple) * multiple
        dtype = network.bind(network.shapes).trunk.dtype

        def cast(whole: Params) -> Params:
            # Norms are computed in float32.
            return jax.tree.map(lambda leaf, axes: leaf if "norm" in axes else leaf.astype(dtype), whole, network.axes)

        self._params = jit_on(mesh, cast)(params)  # stacked, for prefills
        self._weights = jit_on(mesh, make_weights(network))(self._params)
        self._prompts, self._caches = jit_on(mesh, lambda: self._empty(network))()
        fill = make_prefill(network)
        self._prefill = jit_on(mesh, lambda params, prompts, tokens, *where: kept(prompts, fill(params, tokens), *where), donate_argnums=1)
        self._decode = jit_on(mesh, make_decode(network, samples, end_of_turn), donate_argnums=2)
        count = self.places * samples
        no, zeros, numbers = np.zeros(count, np.bool_), np.zeros(count, np.int32), np.ones(count, np.float32)
        self._slots = Slots(
            going_S=no,
            input_S=zeros,
            position_S=zeros.copy(),
            offset_S=zeros.copy(),
            limit_S=zeros.copy(),
            keys_S=np.zeros((count, 2), np.uint32),
            temperature_S=numbers,
            top_p_S=numbers.copy(),
            tells_S=no.copy(),
        )

    def _empty(self, network: Network) -> tuple[Prompts, list[Blocks]]:
        trunk = network.bind(network.shapes).trunk
        none = jnp.zeros(self.places, jnp.int32)
        prompts = Prompts(prompt_caches(trunk, self.places, self._prompt_tokens), none, none)
        return prompts_on_mesh(prompts), _on_mesh(response_caches(trunk, self.places * self.samples, self.response_tokens))

    @property
    def going(self) -> bool:
        """Whether any slot is at work."""
        return bool(self._slots.going_S.any())

    def is_free(self, place: int) -> bool:
        """Whether no slot of a place is at work."""
        return not self._slots.going_S[place * self.samples : (place + 1) * self.samples].any()

    def admit(self, place: int, prompt: Sequence[int], wishes: Sequence[Wish]) -> None:
        """Puts a prompt of at most P tokens in a free place; up to N slots begin to answer it."""
        ids = np.zeros((1, bucket(len(prompt), self._prompt_tokens)), np.int32)
        ids[0, : len(prompt)] = prompt
        tokens = put(ids, named_sharding(("groups", None), ids.shape, self._mesh))
        at = np.array([place], np.int32)
        self._prompts = self._prefill(self._params, self._prompts, tokens, *map(self._put, (np.array([len(prompt)], np.int32), at, at)))
        for slot, wish in enumerate(wishes, place * self.samples):
            limit = min(wish.limit, self.response_tokens)
            values = (True, prompt[-1], 0, len(prompt) - 1, limit, wish.key, wish.temperature, wish.top_p, wish.tells)
            for field, value in zip(self._slots, values, strict=True):
                field[slot] = value

    def drop(self, slot: int) -> None:
        """Ends what a slot does."""
        self._slots.going_S[slot] = False

    def hear(self) -> dict[int, Heard]:
        """K more steps; the new tokens of each slot that was at work."""
        self._caches, looked = self._decode(self._weights, self._prompts, self._caches, jax.tree.map(self._put, self._slots))
        made = Looked(*jax.device_get(looked))
        return {int(slot): self._heard(int(slot), made) for slot in np.flatnonzero(self._slots.going_S)}

    def _heard(self, slot: int, made: Looked) -> Heard:
        slots = self._slots
        count, ended = min(STEPS, int(slots.limit_S[slot] - slots.position_S[slot])), None
        tokens = made.tokens_KS[:count, slot].tolist()
        if self._end in tokens:
            tokens, ended = tokens[: tokens.index(self._end) + 1], "stop"
        slots.position_S[slot] += len(tokens)
        slots.input_S[slot] = tokens[-1]
        if ended is None and slots.position_S[slot] >= slots.limit_S[slot]:
            ended = "length"
        slots.going_S[slot] = ended is None
        steps = range(len(tokens))
        likeliest = [list(zip(made.top_KST[k, slot].tolist(), made.top_logps_KST[k, slot].tolist(), strict=True)) for k in steps]
        likeliest = likeliest if slots.tells_S[slot] else [[] for _ in steps]
        return Heard(tokens, made.logps_KS[: len(tokens), slot].tolist(), likeliest, ended)

    def _put(self, values: np.ndarray) -> jax.Array:
        return put(values, replicated(self._mesh))
