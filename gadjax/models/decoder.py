"""The one decoder, in Flax NNX, and the two models that stand on it: the student and the discriminator.

Families differ by `DecoderConfig` alone. A weight's shape, logical axes and initialiser are declared once, in the
constructors; shardings, checkpoints and Hugging Face names derive from that. The layers' weights are stacked on a leading axis and
the layers run under `jax.lax.scan`.

Letters: D model width, H head width, K key/value heads, G query heads per key/value head, F feed-forward width,
V vocabulary. `...` is whatever shape the tokens come in: [M, L] in packed rows, [B, P] in a prefill, [S] in a decode step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gadjax.errors import UserError
from gadjax.models.adapters import ADAPTED, AdaptersConfig, beside, united, within
from gadjax.models.attention import Attend, Memory
from gadjax.models.rematerialisation import Rematerialise, policy_of
from gadjax.models.row_attention import AttendRows, dense
from gadjax.sharding import constrain
from gadjax.types import Params

Unrolled = Callable[[jax.Array, jax.Array, Attend, Sequence[Memory]], tuple[jax.Array, list[Memory]]]

# Decoders of so few layers are unrolled: a loop of 3 costs more in its carries than it saves in compilation.
UNROLLED_LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.x stretches its rotary frequencies beyond the context that it was first trained with (`llama3`).

    Waves that fit into that context `high` times keep their frequency, those that fit less than `low` times are `factor` times as
    long, and the fraction between is interpolated.

    Attributes:
        factor: how much longer the longest waves become.
        low: waves per context up to which they are stretched in full.
        high: waves per context from which they are left alone.
        context: tokens of the first training's context.
    """

    factor: float
    low: float
    high: float
    context: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The dimensions of a decoder.

    Attributes:
        vocabulary: rows of the embedding; at least the tokenizer's size.
        width: D.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key/value heads; divides `heads`.
        head_width: H.
        feed_forward: F.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, if at all.
        norm_epsilon: of every RMS norm.
        tied: the output projection is the embedding.
        qkv_bias: queries, keys and values have biases (Qwen2).
        qk_norm: queries and keys are normed, head by head, before they are rotated (Qwen3).
        init_std: standard deviation of fresh weights.
        context: the most tokens that the model is said to serve; nothing here depends on it, an export tells it on.
        adapters: of every block's matrices, if they have any.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    tied: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    init_std: float = 0.02
    context: int = 32_768
    adapters: AdaptersConfig | None = None

    def adapted(self, adapters: AdaptersConfig | None) -> "DecoderConfig":
        """The same with these adapters.

        Raises:
            UserError: they are not narrower than the model.
        """
        if adapters and adapters.rank >= self.width:
            raise UserError("adapters.rank", f"{adapters.rank} is not less than the student's width, {self.width}", "make it smaller")
        return replace(self, adapters=adapters)


def _weight(rngs: nnx.Rngs, std: float, **dims: int) -> nnx.Param[jax.Array]:
    """A float32 normal weight whose dimensions are given as logical name = size."""
    return nnx.Param(std * jax.random.normal(rngs.params(), tuple(dims.values()), jnp.float32), axes=tuple(dims))


def _ones(**dims: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.ones(tuple(dims.values()), jnp.float32), axes=tuple(dims))


def _zeros(**dims: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.zeros(tuple(dims.values()), jnp.float32), axes=tuple(dims))


def linear(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` dimensions of `x` with the first of `weight`, in the dtype of `x`.

    As one matrix product over flattened tokens: XLA's CPU backend transposes its way through a contraction over several
    dimensions, which the gradient of an einsum over [M, L, D] is (2 times slower, 3 layers of width 96).
    """
    contracted = weight.shape[:inputs]
    batch = x.shape[: x.ndim - inputs]
    flat = x.reshape(-1, math.prod(contracted)) @ weight.astype(x.dtype).reshape(math.prod(contracted), -1)
    return flat.reshape(*batch, *weight.shape[inputs:])


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def rotary_frequencies(config: DecoderConfig) -> jax.Array:
    """Radians per position, [H/2] float32."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    waves = scaling.context * frequencies / (2 * math.pi)
    kept = jnp.clip((waves - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotary_angles(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary embedding, each [..., H/2] float32."""
    frequencies = jnp.broadcast_to(rotary_frequencies(config), (*positions.shape, config.head_width // 2))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in the half-split layout of Hugging Face. x is [..., heads, H], the angles [..., H/2]."""
    cos, sin = (angle[..., None, :].astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Block(nnx.Module):
    """A transformer block. Constructed with all layers' weights stacked; called with those of one layer."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        n, std, c = config.layers, config.init_std, config
        self.config = config
        self.attention_norm = _ones(layers=n, norm=c.width)
        self.query = _weight(rngs, std, layers=n, embed=c.width, heads=c.heads, head=c.head_width)
        self.key = _weight(rngs, std, layers=n, embed=c.width, kv_heads=c.kv_heads, head=c.head_width)
        self.value = _weight(rngs, std, layers=n, embed=c.width, kv_heads=c.kv_heads, head=c.head_width)
        self.output = _weight(rngs, std, layers=n, heads=c.heads, head=c.head_width, embed=c.width)
        if config.qkv_bias:
            self.query_bias = _zeros(layers=n, heads=c.heads, head=c.head_width)
            self.key_bias = _zeros(layers=n, kv_heads=c.kv_heads, head=c.head_width)
            self.value_bias = _zeros(layers=n, kv_heads=c.kv_heads, head=c.head_width)
        if config.qk_norm:
            self.query_norm = _ones(layers=n, norm=c.head_width)
            self.key_norm = _ones(layers=n, norm=c.head_width)
        self.mlp_norm = _ones(layers=n, norm=c.width)
        self.gate = _weight(rngs, std, layers=n, embed=c.width, mlp=c.feed_forward)
        self.up = _weight(rngs, std, layers=n, embed=c.width, mlp=c.feed_forward)
        self.down = _weight(rngs, std, layers=n, mlp=c.feed_forward, embed=c.width)
        if config.adapters:
            for name, inputs in ADAPTED.items():
                a, b = beside(getattr(self, name), inputs, config.adapters.rank, rngs)
                setattr(self, f"{name}_a", a)
                setattr(self, f"{name}_b", b)

    def _product(self, x: jax.Array, name: str) -> jax.Array:
        """`x` through the matrix of this name and its adapters; a gradient knows the result by the name, too."""
        inputs, adapters = ADAPTED[name], self.config.adapters
        out = linear(x, getattr(self, name)[...], inputs)
        if adapters is not None:
            narrow = linear(x, getattr(self, f"{name}_a")[...], inputs)
            out += adapters.scale * linear(narrow, getattr(self, f"{name}_b")[...])
        return checkpoint_name(out, name)

    def _attention(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, memory: Memory) -> tuple[jax.Array, Memory]:
        c, biased = self.config, self.config.qkv_bias
        query = _biased(self._product(x, "query"), self.query_bias if biased else None)
        key = _biased(self._product(x, "key"), self.key_bias if biased else None)
        value = _biased(self._product(x, "value"), self.value_bias if biased else None)
        if c.qk_norm:
            query = rms_norm(query, self.query_norm[...], c.norm_epsilon)
            key = rms_norm(key, self.key_norm[...], c.norm_epsilon)
        query, key = rotate(query, angles), rotate(key, angles)
        grouped = query.reshape(*query.shape[:-2], c.kv_heads, c.heads // c.kv_heads, c.head_width)
        out, memory = attend(grouped, key, value, memory)
        return self._product(out.reshape(query.shape), "output"), memory

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self._product(jax.nn.silu(self._product(x, "gate")) * self._product(x, "up"), "down")

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, memory: Memory) -> tuple[jax.Array, Memory]:
        attended, memory = self._attention(rms_norm(x, self.attention_norm[...], self.config.norm_epsilon), angles, attend, memory)
        x = x + attended
        return x + self._mlp(rms_norm(x, self.mlp_norm[...], self.config.norm_epsilon)), memory


def _biased(x: jax.Array, bias: nnx.Param[jax.Array] | None) -> jax.Array:
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


class Trunk(nnx.Module):
    """Embedding, blocks and final norm: tokens to hidden states."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rematerialise: Rematerialise, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.rematerialise: Rematerialise = rematerialise
        self.embedding = _weight(rngs, config.init_std, vocabulary=config.vocabulary, embed=config.width)
        self.blocks = Block(config, rngs)
        self.norm = _ones(norm=config.width)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend, memory: Memory = None) -> tuple[jax.Array, Memory]:
        """Runs the trunk.

        Args:
            tokens: [...] int32.
            positions: [...] int32 rotary positions.
            attend: who reads whom.
            memory: pytree whose leaves lead with the layers, handed to `attend` layer by layer.

        Returns:
            [..., D] hidden states after the final norm, in the compute dtype, and what every layer remembered, stacked.
        """
        x = self.embedding[...][tokens].astype(self.dtype)
        x = _between_layers(x)
        angles = rotary_angles(positions, self.config)
        structure, layers = nnx.split(self.blocks)

        def layer(x: jax.Array, weights_and_memory: tuple[Any, Memory]) -> tuple[jax.Array, Memory]:
            weights, memory = weights_and_memory
            weights = jax.tree.map(self._laid_out, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
            x, memory = nnx.merge(structure, weights)(x, angles, attend, memory)
            return _between_layers(x), memory

        layer = jax.checkpoint(layer, policy=policy_of(self.rematerialise))
        x, memory = jax.lax.scan(layer, x, (layers, memory), unroll=self.config.layers <= UNROLLED_LAYERS)
        return rms_norm(x, self.norm[...], self.config.norm_epsilon), memory

    def _laid_out(self, weight: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        """One layer's weight in the compute dtype, which is what travels between devices, and its gradient where the weight lies."""
        axes = weight.get_metadata()["axes"][1:]
        return weight if "norm" in axes else weight.replace(constrain(weight[...].astype(self.dtype), *axes))

    def unrolled(self, layers: Sequence[Params]) -> "Unrolled":
        """The trunk for a loop of many short calls, which has each layer's parameters at hand and need not cut them from a stack.

        Its memory, going in and coming out, is a list with an entry for each layer.
        """
        structure, _ = nnx.split(self.blocks)
        blocks = [nnx.merge(structure, layer) for layer in layers]

        def run(tokens: jax.Array, positions: jax.Array, attend: Attend, memory: Sequence[Memory]) -> tuple[jax.Array, list[Memory]]:
            x = self.embedding[...][tokens].astype(self.dtype)
            angles, remembered = rotary_angles(positions, self.config), []
            for block, own in zip(blocks, memory, strict=True):
                x, new = block(x, angles, attend, own)
                remembered.append(new)
            return rms_norm(x, self.norm[...], self.config.norm_epsilon), remembered

        return run


def _between_layers(x: jax.Array) -> jax.Array:
    """What a gradient keeps of a layer, divided over all devices; between them weights travel rather than tokens."""
    return constrain(x, "rows", "tokens", *[None] * (x.ndim - 2))


class LanguageModel(nnx.Module):
    """The student: a trunk and the projection to the vocabulary."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rematerialise: Rematerialise, rngs: nnx.Rngs):
        self.trunk = Trunk(config, dtype, rematerialise, rngs)
        if not config.tied:
            self.unembedding = _weight(rngs, config.init_std, vocabulary=config.vocabulary, embed=config.width)

    @property
    def projection(self) -> jax.Array:
        """The projection to the vocabulary, float32."""
        return (self.trunk.embedding if self.trunk.config.tied else self.unembedding)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] hidden states to [..., V] float32 logits."""
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        flat = jnp.einsum("td,vd->tv", tokens_TD, self.projection.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return flat.reshape(*hidden.shape[:-1], -1)


class Discriminator(nnx.Module):
    """D(x, y) = w · h(x ⊕ y): a trunk and a scalar head without bias, which would cancel (the paper's section 2)."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rematerialise: Rematerialise, rngs: nnx.Rngs):
        self.trunk = Trunk(config, dtype, rematerialise, rngs)
        self.head = _weight(rngs, 0.02, norm=config.width)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """[..., D] hidden states to [...] float32 scores; the score of a response is the one at its last token."""
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.head[...])


@dataclass(frozen=True)
class Network:
    """A pure view of an NNX model: its structure apart from its parameters.

    Attributes:
        structure: the graph definition.
        shapes: nested dicts of `jax.ShapeDtypeStruct`, one per parameter.
        axes: the same nested dicts with each parameter's logical axes.
        create: makes the model from random streams.
        attend: how it attends in packed rows.
        base: frozen parameters on which it stands: what it is bound to need not have them.
    """

    structure: Any
    shapes: Params
    axes: Params
    create: Callable[[nnx.Rngs], nnx.Module]
    attend: AttendRows
    base: Params = field(default_factory=dict)

    @classmethod
    def of(cls, create: Callable[[nnx.Rngs], nnx.Module], attend: AttendRows) -> "Network":
        """The network that `create` makes; nothing is computed."""
        structure, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
        axes = jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        return cls(structure, nnx.to_pure_dict(state), nnx.to_pure_dict(axes), create, attend)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, as nested dicts of arrays."""
        return nnx.to_pure_dict(nnx.state(self.create(nnx.Rngs(key))))

    def in_compute_dtype(self, params: Params) -> Params:
        """The parameters as the decoder reads them: cast, but for norms and a discriminator's head, which are computed in float32."""
        dtype = self.bind(self.shapes).trunk.dtype
        return jax.tree.map(lambda leaf, axes: leaf if "norm" in axes else leaf.astype(dtype), params, within(self.axes, params))

    def on(self, base: Params) -> "Network":
        """This network on frozen parameters, of which it takes those that it has."""
        return replace(self, base=within(base, self.shapes))

    def whole(self, params: Params) -> Params:
        """All of its parameters: the base's and these."""
        return united(self.base, params)

    def bind(self, params: Params) -> Any:
        """The model with these parameters and the base's, to be called inside a jitted function."""
        return nnx.merge(self.structure, self.whole(params))


def language_model(config: DecoderConfig, dtype: jnp.dtype, rematerialise: Rematerialise = False, attend: AttendRows = dense) -> Network:
    """The student's network, computing in `dtype`. `rematerialise`: see `gadjax.models.rematerialisation`."""
    return Network.of(lambda rngs: LanguageModel(config, dtype, rematerialise, rngs), attend)


def discriminator(config: DecoderConfig, dtype: jnp.dtype, rematerialise: Rematerialise = False, attend: AttendRows = dense) -> Network:
    """The discriminator's network; as `language_model`."""
    return Network.of(lambda rngs: Discriminator(config, dtype, rematerialise, rngs), attend)


def discriminator_params(network: Network, student: Params, key: jax.Array) -> Params:
    """A discriminator's first parameters: the student's trunk, copied, and a fresh head w ~ N(0, 0.02²)."""
    head = 0.02 * jax.random.normal(key, network.shapes["head"].shape, jnp.float32)
    return {"trunk": jax.tree.map(jnp.copy, student["trunk"]), "head": head}
