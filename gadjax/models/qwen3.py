"""Qwen3: norms on queries and keys, and a head width that need not be width / heads."""

from gadjax.models.hugging_face import Family

FAMILY = Family("qwen3", "Qwen3", qk_norm=True, only={"use_sliding_window": False, "attention_bias": False})
