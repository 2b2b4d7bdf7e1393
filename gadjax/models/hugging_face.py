"""How a Hugging Face folder names a decoder's weights, and how theirs are laid out.

A linear layer there is [out, in]; ours has its inputs first and its dimensions apart ([D, heads, H]). `Tensor` says, once for
both directions, which is which. A family is a short file with a `Family`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gadjax.models.decoder import DecoderConfig


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

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of a parameter that is `shape` here (of one layer)."""
        if self.inputs is None:
            return shape
        outputs = (math.prod(shape[self.inputs :]),)
        return (*outputs, math.prod(shape[: self.inputs])) if self.inputs else outputs

    def to_ours(self, there: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their array in our layout, `shape`."""
        return there.T.reshape(shape) if self.inputs else there.reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our array (of one layer) in their layout."""
        shape = self.shape_there(ours.shape)
        return np.ascontiguousarray(ours.reshape(shape[::-1]).T) if self.inputs else ours.reshape(shape)


def _in_layer(ours: str, theirs: str, inputs: int | None = None) -> Tensor:
    return Tensor(("trunk", "blocks", ours), f"model.layers.{{}}.{theirs}", inputs)


# What the families share; the biases and the projection to the vocabulary are there where the config says so.
TRUNK = (
    Tensor(("trunk", "embedding"), "model.embed_tokens.weight"),
    _in_layer("attention_norm", "input_layernorm.weight"),
    _in_layer("query", "self_attn.q_proj.weight", 1),
    _in_layer("key", "self_attn.k_proj.weight", 1),
    _in_layer("value", "self_attn.v_proj.weight", 1),
    _in_layer("query_bias", "self_attn.q_proj.bias", 0),
    _in_layer("key_bias", "self_attn.k_proj.bias", 0),
    _in_layer("value_bias", "self_attn.v_proj.bias", 0),
    _in_layer("output", "self_attn.o_proj.weight", 2),
    _in_layer("mlp_norm", "post_attention_layernorm.weight"),
    _in_layer("gate", "mlp.gate_proj.weight", 1),
    _in_layer("up", "mlp.up_proj.weight", 1),
    _in_layer("down", "mlp.down_proj.weight", 1),
    Tensor(("trunk", "norm"), "model.norm.weight"),
    Tensor(("unembedding",), "lm_head.weight"),
)


@dataclass(frozen=True)
class Family:
    """A model family: its config.json to ours and back, and the names of its weights.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the causal language model's class in transformers.
        read: config.json's contents -> DecoderConfig. May raise KeyError for a missing field, ValueError for
            what the decoder does not compute.
        write: DecoderConfig -> config.json's contents, without model_type and architectures.
        tensors: the names; those whose path a model does not have are skipped.
    """

    model_type: str
    architecture: str
    read: Callable[[dict[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: tuple[Tensor, ...] = TRUNK
