"""Llama 3.x: the plain decoder, and from 3.1 on stretched rotary frequencies. Its `model_type` has no number."""

from gadjax.models.hugging_face import Family

FAMILY = Family("llama", "Llama", only={"attention_bias": False, "mlp_bias": False})
