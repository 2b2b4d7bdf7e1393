"""Live against transformers on PyTorch: random Qwen2 folders of several shapes, both ways, and greedy decoding.

Only with `-m parity`, and then PyTorch must be there: its absence is an error, not a skip.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from gadjax.config import DataConfig
from gadjax.models.attention import packed
from gadjax.models.checkpoint import FAMILIES, load, read_config, save
from gadjax.models.decoder import DecoderConfig, discriminator, language_model
from gadjax.models.fresh import FreshConfig, write_fresh
from gadjax.optimizer import OptimizerConfig, make_optimizer
from gadjax.sharding import MeshConfig, make_mesh
from gadjax.steps import Models, Sampler
from gadjax.text import Text
from gadjax.types import Params

pytestmark = pytest.mark.parity

F32 = jnp.dtype(jnp.float32)
LENGTHS = (1, 7, 40)
NEW_TOKENS = 32
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


def config(**shape: Any) -> Qwen2Config:
    return Qwen2Config(**{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "bos_token_id": None, "eos_token_id": 1} | shape)


SHAPES = {
    "tied": config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "untied, grouped heads": config(
        vocab_size=384, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "one key/value head, many layers": config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def random_model(torch: Any, shape: Qwen2Config) -> Any:
    """A model of which no parameter is constant."""
    generator = torch.Generator().manual_seed(0)
    model: Any = Qwen2ForCausalLM(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + noise if "norm" in name else noise)
    return model


def read(folder: Path) -> tuple[DecoderConfig, Params]:
    family, dims = read_config(folder)
    return dims, load(folder, family, language_model(dims, F32).shapes, lambda array, _: jnp.asarray(array))


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
        attend = packed(jnp.where(valid, 0, -1), jnp.full(valid.shape, -1))
        hidden, _ = model.trunk(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape), attend)
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


def qwen_tokenizer(folder: Path) -> Path:
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
        tokenizer_object=tokenizer, chat_template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_our_model_is_transformers_model(torch: Any, name: str, tmp_path: Path):
    model = random_model(torch, SHAPES[name])
    model.save_pretrained(tmp_path)
    assert_parity(torch, model, *read(tmp_path))


def test_a_folder_in_bfloat16_is_the_same_model(torch: Any, tmp_path: Path):
    random_model(torch, SHAPES["tied"]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
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
    save(base / "ours", FAMILIES["qwen2"], dims, params, {"eos_token_id": text.end_of_turn, "pad_token_id": text.pad}, base / "tokenizer")
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
    models = Models(mesh, language_model(dims, F32), discriminator(dims, F32), make_optimizer(OptimizerConfig(), 1.0))
    data = DataConfig(max_prompt_tokens=max(map(len, prompts)), max_response_tokens=NEW_TOKENS)

    def answers(end: int) -> list[list[int]]:
        rollout = Sampler(models, data, 1, 0.0, end)(params, prompts, jax.random.key(0), 0)
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


def test_a_saved_folder_loads_with_transformers_and_answers_alike(torch: Any, saved: Path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is Qwen2ForCausalLM
    assert_parity(torch, model, *read(saved))
    assert_same_prompts(AutoTokenizer.from_pretrained(saved), Text.load(str(saved)))
    assert_same_answers(torch, saved)


def test_a_fresh_student_loads_with_transformers_and_answers_alike(torch: Any, fresh: Path):
    assert_parity(torch, AutoModelForCausalLM.from_pretrained(fresh), *read(fresh))
    assert_same_prompts(PreTrainedTokenizerFast.from_pretrained(fresh), Text.load(str(fresh)))
    assert_same_answers(torch, fresh)


@pytest.mark.xfail(
    raises=AssertionError,
    reason="for a Qwen2 model AutoTokenizer builds its own pre-tokenizer and BPE around the vocabulary, whatever tokenizer.json says",
)
def test_auto_tokenizer_encodes_as_the_fresh_student_s_tokenizer(fresh: Path):
    assert_same_prompts(AutoTokenizer.from_pretrained(fresh), Text.load(str(fresh)))
