"""Live against transformers on PyTorch: random folders of every family, both ways, greedy decoding, and discriminators' scores.

Only with `-m parity`, and then PyTorch must be there: its absence is an error, not a skip.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from gadjax.algorithms.gad import make_score
from gadjax.data.config import DataConfig
from gadjax.data.packing import RowShape, pack
from gadjax.export import with_padding
from gadjax.models.cache_attention import prefill
from gadjax.models.checkpoint import load, read_config, save, tokenizer_files
from gadjax.models.decoder import DecoderConfig, discriminator, discriminator_params, language_model
from gadjax.models.fresh import FreshConfig, write_fresh
from gadjax.optimizer import OptimizerConfig, make_optimizer
from gadjax.rollout.decode import SamplingPlan
from gadjax.sharding import MeshConfig, make_mesh
from gadjax.steps import Models, Sampler
from gadjax.text import Text
from gadjax.types import Params

pytestmark = pytest.mark.parity

OPTIMIZER = make_optimizer(OptimizerConfig(), optax.constant_schedule(1.0))
F32 = jnp.dtype(jnp.float32)
LENGTHS = (1, 7, 40)
NEW_TOKENS = 64
WORDS = "the harbour is quiet tonight and the sea was loud, too: who's there at 12 o'clock? Zażółć gęślą jaźń"
CORPUS = [WORDS, *WORDS.split(), "user system assistant"] * 3
QUESTIONS = ["Is the harbour quiet?", "the sea\n\n  was  loud at 1234, wasn't it? 🙂", "jaźń", "who is there " * 9]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    return importlib.import_module("torch")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "qwen2, tied": Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, rope_parameters=rope(1e6),
    ),
    "qwen2, untied, grouped heads": Qwen2Config(
        vocab_size=384, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=False, rope_parameters=rope(1e6),
    ),
    "qwen2, one key/value head, many layers": Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(1e4),
    ),
    "qwen3, untied, wide heads": Qwen3Config(
        vocab_size=384, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=False, rope_parameters=rope(1e6),
    ),
    "qwen3, tied, narrow heads, many layers": Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, tie_word_embeddings=True, rope_parameters=rope(1e6),
    ),
    "llama 3, untied": LlamaConfig(
        vocab_size=384, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=False, rope_parameters=rope(5e5),
    ),
    "llama 3.1, tied, wide heads": LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(1e4, **LLAMA3),
    ),
}  # fmt: skip
ONE_OF_EACH = ["qwen2, untied, grouped heads", "qwen3, untied, wide heads", "llama 3.1, tied, wide heads"]


def random_model(torch: Any, shape: Any) -> Any:
    """A model of which no parameter is constant."""
    generator = torch.Generator().manual_seed(0)
    shape.bos_token_id, shape.eos_token_id = None, 1
    model: Any = AutoModelForCausalLM.from_config(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + noise if "norm" in name else noise)
    return model


def read(folder: Path) -> tuple[DecoderConfig, Params]:
    family, dims = read_config(folder)
    return dims, load(folder, family, language_model(dims, F32).shapes)


def ours(dims: DecoderConfig, params: Params, sequences: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Hidden states and logits of each sequence; all run in one batch."""
    network = language_model(dims, F32)
    lengths = np.array([len(sequence) for sequence in sequences])
    valid = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(valid.shape, np.int32)
    tokens[valid] = np.concatenate(sequences)

    @jax.jit
    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        model = network.bind(params)
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        hidden, _ = model.trunk(jnp.asarray(tokens), positions, prefill)
        return hidden, model.logits(hidden)

    hidden, logits = map(np.asarray, forward(params))
    return [(hidden[row, :length], logits[row, :length]) for row, length in enumerate(lengths)]


def assert_parity(torch: Any, model: Any, dims: DecoderConfig, params: Params) -> None:
    """Hidden states and logits within 1e-4."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, dims.vocabulary, length) for length in LENGTHS]
    for sequence, (hidden, logits) in zip(sequences, ours(dims, params, sequences), strict=True):
        with torch.no_grad():
            out = model(torch.tensor(sequence)[None], output_hidden_states=True)
        np.testing.assert_allclose(hidden, out.hidden_states[-1][0].numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits, out.logits[0].numpy(), rtol=1e-4, atol=1e-4)


def qwen_tokenizer(folder: Path, pad: str | None = "<|endoftext|>") -> Path:
    """A small tokenizer of Qwen2's make, with its ids below every vocabulary of `SHAPES`."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHATML, eos_token="<|im_end|>", pad_token=pad, unk_token="<|endoftext|>"
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_our_model_is_transformers_model(torch: Any, name: str, tmp_path: Path):
    model = random_model(torch, SHAPES[name])
    model.save_pretrained(tmp_path)
    assert_parity(torch, model, *read(tmp_path))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_folder_in_bfloat16_and_several_files_is_the_same_model(torch: Any, name: str, tmp_path: Path):
    random_model(torch, SHAPES[name]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_parity(torch, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), *read(tmp_path))


@pytest.fixture(scope="module", params=SHAPES)
def saved(request: pytest.FixtureRequest, torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that gadjax wrote, its tokenizer included."""
    base = tmp_path_factory.mktemp("saved")
    random_model(torch, SHAPES[request.param]).save_pretrained(base / "theirs")
    text = Text.load(str(qwen_tokenizer(base / "tokenizer")))
    dims, params = read(base / "theirs")
    assert dims.vocabulary > text.vocabulary_size  # padded beyond the tokenizer
    tokens = {"eos_token_id": text.end_of_turn, "pad_token_id": text.pad}
    save(base / "ours", read_config(base / "theirs")[0], dims, params, tokens, tokenizer_files(base / "tokenizer"), shard_bytes=20_000)
    assert read_config(base / "ours") == read_config(base / "theirs")
    return base / "ours"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "student"
    write_fresh(folder, FreshConfig(width=32, layers=2, heads=4, kv_heads=2, feed_forward=48, words=20), CORPUS, seed=0)
    return folder


def talk(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "the sea"}, {"role": "user", "content": question}]


def assert_same_prompts(tokenizer: Any, text: Text) -> None:
    for question in QUESTIONS:
        theirs = tokenizer.apply_chat_template(talk(question), add_generation_prompt=True)["input_ids"]
        assert list(text.prompt_ids(talk(question), 10_000)) == theirs
        assert text.decode(text.response_ids(question, 10_000)) == tokenizer.decode(tokenizer(question)["input_ids"]) == question


def assert_same_answers(torch: Any, folder: Path) -> None:
    """Both decode greedily to the same ids, with the folder's end of turn and with one that does come up."""
    text, (dims, params) = Text.load(str(folder)), read(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == text.end_of_turn
    prompts = [text.prompt_ids(talk(question), 10_000) for question in QUESTIONS]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    models = Models(mesh, language_model(dims, F32), discriminator(dims, F32), OPTIMIZER)
    data = DataConfig(max_prompt_tokens=max(map(len, prompts)), max_response_tokens=NEW_TOKENS)

    def answers(end: int) -> list[list[int]]:
        plan = SamplingPlan(samples=1, response_tokens=NEW_TOKENS, temperature=0.0, end_of_turn=end)
        rollout = Sampler(models, data, plan)(params, prompts, jax.random.key(0), 0)
        return [tokens[:length].tolist() for tokens, length in zip(rollout.tokens_BNR[:, 0], rollout.lengths_BN[:, 0], strict=True)]

    def theirs(end: int) -> list[list[int]]:
        asked = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": end}
        return [model.generate(torch.tensor(prompt)[None], **asked)[0, len(prompt) :].tolist() for prompt in prompts]

    whole = answers(text.end_of_turn)
    assert whole == theirs(text.end_of_turn)
    assert max(map(len, whole)) == NEW_TOKENS
    end = whole[0][5]
    cut = answers(end)
    assert cut == theirs(end)
    assert len(cut[0]) <= 6 and cut[0][-1] == end


def loaded(auto: Any, folder: Path) -> Any:
    """The model that transformers reads, of which no weight was missing or left over."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_a_saved_folder_loads_with_transformers_and_answers_alike(torch: Any, saved: Path):
    model = loaded(AutoModelForCausalLM, saved)
    assert type(model).__name__ == read_config(saved)[0].language_model
    assert_parity(torch, model, *read(saved))
    assert_same_prompts(AutoTokenizer.from_pretrained(saved), Text.load(str(saved)))
    assert_same_answers(torch, saved)


def test_a_fresh_student_loads_with_transformers_and_answers_alike(torch: Any, fresh: Path):
    assert_parity(torch, loaded(AutoModelForCausalLM, fresh), *read(fresh))
    assert_same_prompts(AutoTokenizer.from_pretrained(fresh), Text.load(str(fresh)))
    assert_same_answers(torch, fresh)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", None])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_saved_discriminator_scores_a_padded_batch_as_ours(torch: Any, name: str, pad: str | None, tmp_path: Path):
    random_model(torch, SHAPES[name]).save_pretrained(tmp_path / "student")
    text = Text.load(str(qwen_tokenizer(tmp_path / "student", pad)))
    dims, student = read(tmp_path / "student")
    network = discriminator(dims, F32)
    params = discriminator_params(network, student, jax.random.key(0))
    params["head"] = 10 * params["head"]
    pad_id, files = with_padding(text, tokenizer_files(tmp_path / "student"))
    tokens = {"eos_token_id": text.end_of_turn, "pad_token_id": pad_id}
    save(tmp_path / "saved", read_config(tmp_path / "student")[0], dims, params, tokens, files)

    prompts = [text.prompt_ids(talk(question), 10_000) for question in QUESTIONS]
    answers = [[text.response_ids("the sea", 100, truncated=True), text.response_ids("quiet", 100)] for _ in QUESTIONS]
    responses = [[*group, text.response_ids(question, 100)] for group, question in zip(answers, QUESTIONS, strict=True)]
    longest = {"prompt_tokens": max(map(len, prompts)), "response_tokens": max(len(ids) for group in responses for ids in group)}
    shape = RowShape.holding(
        len(prompts), 3, **longest, together=True, rows=2, length=longest["prompt_tokens"] + 3 * longest["response_tokens"]
    )
    scores_BJ = jax.jit(make_score(network))(params, pack(prompts, responses, shape))

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = loaded(AutoModelForSequenceClassification, tmp_path / "saved")
    assert tokenizer.pad_token_id == model.config.pad_token_id != model.config.eos_token_id == text.end_of_turn
    sequences = [[*prompt, *response] for prompt, group in zip(prompts, responses, strict=True) for response in group]
    for side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**batch).logits.numpy()
        assert theirs.shape == (len(sequences), 1) and theirs.std() > 0.1
        np.testing.assert_allclose(theirs.reshape(scores_BJ.shape), scores_BJ, rtol=1e-4, atol=1e-4)
