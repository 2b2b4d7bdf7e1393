"""Our own rollouts: continuous batching on the devices of a mesh.

The device decodes (`gadjax.rollout.decode`); the host gives it prompts. Where all prompts fit at once, everything is given to the
device without waiting for it. Where they do not, the host looks every few steps, one look behind, which prompts are needed no longer,
and gives their places to the next ones.

Letters: B groups, N samples of each, M = B x N samples, C prompts prefilled together, G places for prompts, S decode slots.
"""

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gadjax.models.decoder import Network
from gadjax.rollout.config import RolloutConfig
from gadjax.rollout.decode import SamplingPlan, bucket, make_decode, make_prefill, make_weights, weights_axes
from gadjax.rollout.sampling import stream_keys
from gadjax.rollout.slots import Decoding, Order, Prompts, empty, fewer, kept
from gadjax.sharding import for_decoding, jit_on, multiple_of, named_sharding, put, replicated, reshaped
from gadjax.types import Params, Rollout

Ids = Sequence[int]

SLOTS = 512
SPARE = 2  # prompts at hand for each that full slots need
HALVINGS = 2  # of the slots at the end
FEWEST = 8  # slots that are not halved
SHORT = 128  # response tokens below which that is not worth its compilation
PREFILL_TOKENS = 2048  # prefilled together on one device
NOWHERE = FOREVER = 2**30


class Engine:
    """A `RolloutBackend`; for batches of any number of groups."""

    exact = True

    def __init__(self, network: Network, mesh: Mesh, plan: SamplingPlan, prompt_tokens: int, config: RolloutConfig):
        self._network, self._plan, self._prompt_tokens, self._config = network, plan, prompt_tokens, config
        kv_heads = network.bind(network.shapes).trunk.config.kv_heads
        self._training, self._mesh = mesh, reshaped(mesh, config.mesh) if config.mesh else for_decoding(mesh, kv_heads)
        self._params: Params = {}
        self._version = 0
        mesh = self._mesh
        self._moved = jit_on(self._training, lambda key: key, out_shardings=replicated(mesh))
        self._begin = jit_on(mesh, self._first, static_argnums=(0, 1))
        self._weights = jit_on(self._training, make_weights(network), out_shardings=self._weights_layout())
        self._prefill = jit_on(self._training, make_prefill(network), out_shardings=self._cache_layout())
        self._kept = jit_on(mesh, kept, donate_argnums=0)
        self._decode = jit_on(mesh, make_decode(network, plan), donate_argnums=3)
        self._fewer = jit_on(mesh, fewer, static_argnums=1)

    def update(self, params: Params, step: int) -> None:
        """See `RolloutBackend`. The parameters are not copied."""
        self._params, self._version = params, step

    def generate(self, prompts: Sequence[Ids], key: jax.Array, step: int, limits_BN: np.ndarray | None = None) -> Rollout:
        """See `RolloutBackend`. The streams depend on (key, step, group, sample, position)."""
        places, count, together = self.sizes(len(prompts))
        turns_B, *asked = self._asked(prompts, limits_BN)
        prompts = [prompts[group] for group in turns_B]
        order, resident, state = self._begin(places, count, *map(self._put, (turns_B, *asked)), self._moved(key), self._put(step))
        decoded = partial(self._decoded, self._weights(self._params), order)
        begun, free, homes, looks = 0, list(range(places)), dict[int, int](), deque[jax.Array]()
        while True:
            while begun < len(prompts) and len(free) >= (taken := min(together, len(prompts) - begun)):
                new = dict(zip(range(begun, begun + taken), free, strict=False))
                resident = self._prefilled(resident, prompts, new, together)
                begun, free, homes = begun + taken, free[taken:], homes | new
            if begun == len(prompts):
                break
            state, finished_B = decoded(resident, state, begun, self._config.look_every)
            finished_B.copy_to_host_async()
            looks.append(finished_B)
            if len(looks) > 1:  # one look behind: the device has work while the host looks
                finished = np.flatnonzero(jax.device_get(looks.popleft())).tolist()
                free += [homes.pop(group) for group in finished if group in homes]
        for half in self._halves(count):
            state, _ = decoded(resident, state, begun, FOREVER, few=half)
            state = self._fewer(state, half)
        state, _ = decoded(resident, state, begun, FOREVER)
        return self._rollout(state, turns_B)

    def traced(self, params: Params, held: tuple[Order, Prompts, Decoding]) -> list[tuple[str, Any, Any]]:
        """The programs of a rollout, for a plan, but for those that only begin or move prompts: name, the traced program, its arguments.

        `params`, and `held` by it, are abstract.
        """
        order, resident, state = held
        _, _, together = self.sizes(order.lengths_B.shape[0])

        def everywhere(shape: tuple[int, ...], mesh: Mesh) -> Any:
            return jax.ShapeDtypeStruct(shape, np.int32, sharding=replicated(mesh))

        asked = {
            "weights": (self._weights, (params,)),
            "prefill": (self._prefill, (params, everywhere((together, self._prompt_tokens), self._training))),
            "decode": (self._decode, (self.weights(params), resident, order, state, *[everywhere((), self._mesh)] * 3)),
        }
        return [(name, program.trace(*arguments), arguments) for name, (program, arguments) in asked.items()]

    def weights(self, params: Params) -> Params:
        """Shapes and shardings of the decode loop's weights."""
        shapes = jax.eval_shape(make_weights(self._network), params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, self._weights_layout()
        )

    def resident(self, groups: int) -> tuple[Order, Prompts, Decoding]:
        """Shapes and shardings of what a rollout of so many groups holds on the devices beside the parameters."""
        places, count, _ = self.sizes(groups)
        asked = jax.eval_shape(lambda: [np.zeros(groups, np.int32)] * 3 + [np.zeros(groups * self._plan.samples, np.int32)])
        key = jax.eval_shape(jax.random.key, jax.ShapeDtypeStruct((), np.uint32))
        order, prompts, state = jax.eval_shape(partial(self._first, places, count), *asked, key, np.int32(0))

        def placed(leaf: Any, first: str | None) -> Any:
            names = (first, "kv_heads", None, None) if leaf.ndim == 4 else (first, *[None] * (leaf.ndim - 1))[: leaf.ndim]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(names, leaf.shape, self._mesh))

        prompts = Prompts(jax.tree.map(lambda leaf: placed(leaf, "groups"), prompts.caches), *(placed(leaf, None) for leaf in prompts[1:]))
        slots = jax.tree.map(lambda leaf: placed(leaf, "slots"), state.slots)
        everywhere = jax.tree.map(lambda leaf: placed(leaf, None), (order, state.next, state.responses))
        return everywhere[0], prompts, Decoding(slots, *everywhere[1:])

    def _weights_layout(self) -> Params:
        """Where the decode loop's weights lie."""
        shapes = jax.eval_shape(make_weights(self._network), self._network.shapes)
        return jax.tree.map(lambda leaf, names: named_sharding(names, leaf.shape, self._mesh), shapes, weights_axes(self._network))

    def _cache_layout(self) -> Any:
        """Where the caches of prompts that were prefilled together lie; there are enough of them to be divided."""
        config, parts = self._network.bind(self._network.shapes).trunk.config, multiple_of("groups", self._mesh)
        return named_sharding(("groups", "kv_heads", None, None), (parts, config.kv_heads, 1, 1), self._mesh)

    def sizes(self, groups: int) -> tuple[int, int, int]:
        """For so many groups: G, S and C."""
        samples, multiple = self._plan.samples, math.lcm(*(multiple_of("slots", mesh) for mesh in (self._mesh, self._training)))

        def rounded_up(number: int) -> int:
            return -(-number // multiple) * multiple

        count = rounded_up(min(groups * samples, self._config.slots or SLOTS))
        places = rounded_up(min(groups, self._config.prompts or SPARE * -(-count // samples)))
        return places, count, min(places, multiple * max(1, PREFILL_TOKENS // self._prompt_tokens))

    def _halves(self, count: int) -> list[int]:
        """The numbers of slots after `count`."""
        halvings = self._config.halvings
        if halvings is None:
            halvings = HALVINGS if self._plan.response_tokens >= SHORT else 0
        return [count >> halving for halving in range(1, halvings + 1) if count >> halving >= FEWEST]

    def _asked(self, prompts: Sequence[Ids], limits_BN: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The groups by turns; and as these come, lengths and last tokens of the prompts, and the samples' limits.

        Long prompts come first: they are prefilled with their like, and none is filled up to the length of a much longer one.
        """
        lengths_B, last_B = np.array([len(prompt) for prompt in prompts]), np.array([prompt[-1] for prompt in prompts])
        turns_B = np.argsort(-lengths_B, kind="stable")
        all_BN = np.full((len(prompts), self._plan.samples), self._plan.response_tokens)
        limits_BN = all_BN if limits_BN is None else np.minimum(limits_BN, all_BN)
        return turns_B, lengths_B[turns_B], last_B[turns_B], limits_BN[turns_B].ravel()

    def _first(
        self,
        places: int,
        count: int,
        turns_B: jax.Array,
        lengths_B: jax.Array,
        last_B: jax.Array,
        limits_M: jax.Array,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Order, Prompts, Decoding]:
        """The order, and nothing done yet."""
        keys_BN = stream_keys(jax.random.fold_in(key, step), lengths_B.shape[0], self._plan.samples)[turns_B]
        order = Order(lengths_B, last_B, keys_BN.reshape(-1), limits_M)
        trunk = self._network.bind(self._network.shapes).trunk
        return order, *empty(trunk, order, places, self._prompt_tokens, count, self._plan.response_tokens)

    def _prefilled(self, resident: Prompts, prompts: Sequence[Ids], new: dict[int, int], together: int) -> Prompts:
        """Prefills prompts; `new` tells the places of these groups."""
        columns = bucket(max(len(prompts[group]) for group in new), self._prompt_tokens)
        ids, lengths = np.zeros((together, columns), np.int32), np.ones(together, np.int32)
        for row, group in enumerate(new):
            lengths[row] = len(prompts[group])
            ids[row, : lengths[row]] = prompts[group]
        none = [NOWHERE] * (together - len(new))
        caches = self._prefill(self._params, put(ids, replicated(self._training)))
        return self._kept(resident, caches, *map(self._put, (lengths, [*new, *none], [*new.values(), *none])))

    def _decoded(
        self, weights: Params, order: Order, resident: Prompts, state: Decoding, begun: int, steps: int, few: int = 0
    ) -> tuple[Decoding, jax.Array]:
        return self._decode(weights, resident, order, state, *map(self._put, (begun * self._plan.samples, steps, few)))

    def _put(self, values: Any) -> jax.Array:
        return put(np.asarray(values, np.int32), replicated(self._mesh))

    def _rollout(self, state: Decoding, turns_B: np.ndarray) -> Rollout:
        shape, groups_B = (len(turns_B), self._plan.samples), np.argsort(turns_B)
        made = [array.reshape(*shape, *array.shape[1:])[groups_B] for array in jax.device_get(state.responses)]
        return Rollout(*made, np.full(shape, self._version, np.int32))  # pyright: ignore[reportCallIssue]
