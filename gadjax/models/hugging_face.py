"""How a Hugging Face folder names a decoder's weights, and how theirs are laid out.

A linear layer there is [out, in]; ours has its inputs first and its dimensions apart ([D, heads, H]). `Tensor` says, once for
both directions, which is which. `Family` does the same for config.json; a family is a short file with one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gadjax.models.decoder import DecoderConfig, RopeScaling


@dataclass(frozen=True)
class Tensor:
    """One parameter of ours and its Hugging Face name.

    Attributes:
        path: ours, in the nested dicts of parameters.
        name: theirs; `{}` stands for the index of the layer, and our parameter stacks the layers on its first axis.
        inputs: how many of our leading dimensions are the inputs of a linear layer (0 for a bias, which has none); None where
            both sides are laid out alike: embeddings and norms.
    """

    path: tuple[str, ...]
    name: str
    inputs: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether our parameter stacks the layers."""
        return "{}" in self.name

    def names(self, layers: int) -> list[str]:
        """Theirs, one for each layer if our parameter stacks them."""
        return [self.name.format(layer) for layer in range(layers)] if self.stacked else [self.name]

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of a parameter that is `shape` here (of one layer)."""
        if self.inputs is None:
            return shape
        outputs = (math.prod(shape[self.inputs :]),)
        return (*outputs, math.prod(shape[: self.inputs])) if self.inputs else outputs

    def part(self, there: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """A part of our parameter, which is `shape` (of one layer), from their array; it reads what is in the part alone.

        Args:
            there: their array, or a safetensors slice of it.
            index: the part, in our layout.
            shape: of the whole.
        """
        if self.inputs is None:
            return there[index]
        size = [len(range(length)[span]) for span, length in zip(index, shape, strict=True)]
        outputs = _flat(index[self.inputs :], shape[self.inputs :])
        if not self.inputs:
            return there[outputs].reshape(size)
        return there[outputs, _flat(index[: self.inputs], shape[: self.inputs])].T.reshape(size)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our array (of one layer) in their layout."""
        shape = self.shape_there(ours.shape)
        return np.ascontiguousarray(ours.reshape(shape[::-1]).T) if self.inputs else ours.reshape(shape)


def _flat(index: Sequence[slice], shape: Sequence[int]) -> slice:
    """Where a part lies when these dimensions are taken as one: only the first of them is ever divided."""
    if not shape:
        return slice(0, 1)
    assert all(len(range(length)[span]) == length for span, length in zip(index[1:], shape[1:], strict=True))
    start, stop, _ = index[0].indices(shape[0])
    return slice(start * math.prod(shape[1:]), stop * math.prod(shape[1:]))


def _in_layer(ours: str, theirs: str, inputs: int | None = None) -> Tensor:
    return Tensor(("trunk", "blocks", ours), f"model.layers.{{}}.{theirs}", inputs)


# A model has those of its config: biases, norms of queries and keys, a projection to the vocabulary or to a score.
TENSORS = (
    Tensor(("trunk", "embedding"), "model.embed_tokens.weight"),
    _in_layer("attention_norm", "input_layernorm.weight"),
    _in_layer("query", "self_attn.q_proj.weight", 1),
    _in_layer("key", "self_attn.k_proj.weight", 1),
    _in_layer("value", "self_attn.v_proj.weight", 1),
    _in_layer("query_bias", "self_attn.q_proj.bias", 0),
    _in_layer("key_bias", "self_attn.k_proj.bias", 0),
    _in_layer("value_bias", "self_attn.v_proj.bias", 0),
    _in_layer("query_norm", "self_attn.q_norm.weight"),
    _in_layer("key_norm", "self_attn.k_norm.weight"),
    _in_layer("output", "self_attn.o_proj.weight", 2),
    _in_layer("mlp_norm", "post_attention_layernorm.weight"),
    _in_layer("gate", "mlp.gate_proj.weight", 1),
    _in_layer("up", "mlp.up_proj.weight", 1),
    _in_layer("down", "mlp.down_proj.weight", 1),
    Tensor(("trunk", "norm"), "model.norm.weight"),
    Tensor(("unembedding",), "lm_head.weight"),
    Tensor(("head",), "score.weight", 1),
)


# What a config.json of any family may ask for and the decoder computes in one way only.
ONLY = {"partial_rotary_factor": 1.0, "hidden_act": "silu", "quantization_config": None}


@dataclass(frozen=True)
class Family:
    """A model family: how its config.json describes a decoder.

    Attributes:
        model_type: `model_type` in config.json.
        name: of its classes in transformers, as in `<name>ForCausalLM`.
        qkv_bias: as in `DecoderConfig`.
        qk_norm: as in `DecoderConfig`.
        only: fields of config.json -> the one value, the field's default too, that the decoder computes.
        tensors: the names of the weights; those whose path a model does not have are skipped.
    """

    model_type: str
    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    only: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = TENSORS

    @property
    def language_model(self) -> str:
        """The student's class in transformers."""
        return f"{self.name}ForCausalLM"

    @property
    def classifier(self) -> str:
        """The discriminator's class in transformers."""
        return f"{self.name}ForSequenceClassification"

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that a config.json describes, whether transformers 4 or 5 wrote it.

        Raises:
            KeyError: a field is missing.
            ValueError: it asks for what the decoder does not compute.
        """
        rope = _rope(config)
        self._check({**config, **rope})
        return DecoderConfig(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_width=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            feed_forward=config["intermediate_size"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_scaling(rope),
            norm_epsilon=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            init_std=config.get("initializer_range", 0.02),
            context=config["max_position_embeddings"],
        )

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json of a decoder, for transformers 4 and 5; what stands on the decoder is not in it."""
        rope = _rope_there(config)
        dims = {
            "model_type": self.model_type,
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "intermediate_size": config.feed_forward,
            "rope_theta": config.rope_theta,
            "rope_scaling": rope if config.rope_scaling else None,
            "rope_parameters": rope | {"rope_theta": config.rope_theta},
            "rms_norm_eps": config.norm_epsilon,
            "tie_word_embeddings": config.tied,
            "initializer_range": config.init_std,
            "hidden_act": "silu",
            "max_position_embeddings": config.context,
            "bos_token_id": None,
        }
        return dims | self.only

    def _check(self, config: Mapping[str, Any]) -> None:
        asked = {**ONLY, **self.only, **config}
        for name, value in (ONLY | self.only).items():
            if asked[name] != value:
                raise ValueError(f"{name} {asked[name]!r} is not supported")
        if asked["rope_type"] not in ("default", "llama3"):
            raise ValueError(f"rope_type {asked['rope_type']!r} is not supported")
        if others := sorted({*(config.get("layer_types") or ())} - {"full_attention"}):
            raise ValueError(f"layer_types {', '.join(others)} is not supported")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the rotary embedding: transformers 5 nests them, transformers 4 has them at the top and in `rope_scaling`."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {"rope_theta": config.get("rope_theta", 10_000.0), "rope_type": nested.get("type", "default")} | nested


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low=float(rope["low_freq_factor"]),
        high=float(rope["high_freq_factor"]),
        context=rope["original_max_position_embeddings"],
    )


def _rope_there(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.context,
    }
