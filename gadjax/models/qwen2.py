"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from typing import Any

from gadjax.models.decoder import DecoderConfig
from gadjax.models.hugging_face import Family

# What a config.json may ask for and the decoder does not compute otherwise.
COMPUTED = {"rope_type": "default", "use_sliding_window": False, "hidden_act": "silu"}


def _read(config: dict[str, Any]) -> DecoderConfig:
    rope = config.get("rope_parameters") or config  # transformers 5 nests what transformers 4 has at the top
    scaling = config.get("rope_scaling") or rope
    asked = COMPUTED | config | {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    for field, value in COMPUTED.items():
        if asked[field] != value:
            raise ValueError(f"{field} {asked[field]!r} is not supported")
    return DecoderConfig(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["hidden_size"] // config["num_attention_heads"],
        feed_forward=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm_epsilon=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        init_std=config.get("initializer_range", 0.02),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.feed_forward,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
    }


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _read, _write)
