"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from gadjax.models.hugging_face import Family

FAMILY = Family("qwen2", "Qwen2", qkv_bias=True, only={"use_sliding_window": False})
