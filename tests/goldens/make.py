"""Makes the stored folders and numbers that tests/test_models.py compares with; needs PyTorch: python tests/goldens/make.py.

Each golden is a folder as transformers saves it, and an .npz with token sequences of several lengths and what PyTorch's model
makes of each alone, in float32: `tokens_i` [L], `hidden_i` [L, D] after the final norm, `logits_i` [L, V].
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).parent
LENGTHS = (1, 5, 12)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
# Of the 8 frequencies of a head 16 wide the first is left alone, two are stretched in part and the others in full.
LLAMA3 = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GOLDENS: dict[str, PreTrainedConfig] = {
    "tied": Qwen2Config(**SMALL, num_hidden_layers=2, num_key_value_heads=4, rope_parameters=ROPE, tie_word_embeddings=True),
    # More layers than are unrolled.
    "untied": Qwen2Config(**SMALL, num_hidden_layers=5, num_key_value_heads=2, rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, rope_parameters=ROPE, tie_word_embeddings=False),
    "llama3": LlamaConfig(
        **SMALL,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    ),
}


def make(name: str, config: Any, seed: int) -> None:
    """Writes one golden; every parameter is random, those that usually are constant too."""
    torch: Any = importlib.import_module("torch")
    generator = torch.Generator().manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + noise if "norm" in parameter_name else noise)
        arrays = {}
        for index, length in enumerate(LENGTHS):
            tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
            hidden = model.model(tokens).last_hidden_state
            arrays[f"tokens_{index}"] = tokens[0].numpy().astype(np.int32)
            arrays[f"hidden_{index}"] = hidden[0].numpy()
            arrays[f"logits_{index}"] = model(tokens).logits[0].numpy()
    model.save_pretrained(HERE / name)
    np.savez(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    for seed, (name, config) in enumerate(GOLDENS.items()):
        make(name, config, seed)
