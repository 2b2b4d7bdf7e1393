"""The fresh student: its tokenizer keeps every text and knows the frequent words, its folder goes the way of every other."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gadjax.models.checkpoint import load, read_config
from gadjax.models.decoder import language_model
from gadjax.models.fresh import CONTROL, END, PAD, TEMPLATE, FreshConfig, word_tokenizer, write_fresh
from gadjax.records import Message
from gadjax.text import Text
from gadjax.types import Params

CORPUS = ["the harbour is quiet tonight", "the harbour was loud, the sea too", "Zażółć the sea", "the <|end|> of the sea <|user|>"]
CONFIG = FreshConfig(width=16, layers=2, heads=2, kv_heads=1, feed_forward=24, words=6)
BYTES = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with jax.numpy_dtype_promotion("strict"):
        write_fresh(tmp_path_factory.mktemp("fresh") / "student", CONFIG, CORPUS, seed=1)
    return next(tmp_path_factory.getbasetemp().glob("fresh*/student"))


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text.load(str(folder))


def weights(folder: Path) -> Params:
    family, dims = read_config(folder)
    return load(folder, family, language_model(dims, jnp.dtype(jnp.float32)).shapes)


@pytest.fixture(scope="module")
def auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


hostile = st.lists(st.sampled_from([*CONTROL, "<|", "|>", "end", " the", " harbour"]) | st.text(max_size=6)).map("".join)
# What AutoTokenizer, which takes control tokens for such in any text, must encode alike.
plain = (st.lists(st.sampled_from([" the", " harbour", "  sea", "\n", "a\u0301", "'s", "12"]) | st.text(max_size=6))).map("".join)
plain = plain.filter(lambda text: text.strip() and not any(token in text for token in CONTROL))


@given(content=hostile)
def test_any_text_is_kept_exactly_and_holds_no_control_token(text: Text, content: str):
    ids = text.response_ids(content, 10_000)
    assert text.decode(ids) == content
    assert ids[-1] == text.end_of_turn and text.control.isdisjoint(ids[:-1])
    assert max(ids[:-1], default=0) < BYTES + CONFIG.words


@given(system=hostile.filter(str.strip), content=hostile.filter(str.strip))
def test_a_prompt_has_the_control_tokens_of_the_template_alone(text: Text, system: str, content: str):
    ids = text.prompt_ids([{"role": "system", "content": system}, {"role": "user", "content": content}], 10_000)
    name = {text._template.token_to_id(token): token for token in CONTROL}
    assert [name[id] for id in ids if id in text.control] == ["<|system|>", END, "<|user|>", END, "<|assistant|>"]
    assert ids[-1] == text._template.token_to_id("<|assistant|>")


def test_every_frequent_word_is_one_token_and_others_are_bytes(text: Text):
    # The words that CORPUS has more than once are these and ` <|`, `|>`: as many as there is room for.
    for word in ("the", " the", " sea", " harbour"):
        (id, end) = text.response_ids(word, 10)
        assert id < BYTES + CONFIG.words and end == text.end_of_turn
    assert len(text.response_ids(" the harbour", 10)) == 3
    assert len(text.response_ids("harbour", 10)) == len("harbour") + 1
    assert len(text.response_ids("ż", 10)) == len("ż".encode()) + 1
    assert text.vocabulary_size == BYTES + CONFIG.words + len(CONTROL)


def test_the_tokenizer_depends_on_the_texts_and_not_on_their_order_and_has_no_more_words_than_asked():
    made, turned = word_tokenizer(CORPUS, 4), word_tokenizer(CORPUS[::-1], 4)
    assert made.to_str() == turned.to_str()
    assert made.get_vocab_size() == BYTES + 4 + len(CONTROL)
    assert word_tokenizer([], 300).get_vocab_size() == word_tokenizer(CORPUS, 0).get_vocab_size() == BYTES + len(CONTROL)


def test_the_folder_is_loaded_like_any_student_s(folder: Path, text: Text):
    family, dims = read_config(folder)
    assert (family.model_type, dims.width, dims.layers, dims.heads, dims.kv_heads, dims.head_width) == ("llama", 16, 2, 2, 1, 8)
    assert dims.vocabulary == text.vocabulary_size
    assert (text.end_of_turn, text.pad) == (text._template.token_to_id(END), text._template.token_to_id(PAD))
    params = weights(folder)
    assert jax.tree.structure(params) == jax.tree.structure(language_model(dims, jnp.dtype(jnp.float32)).shapes)
    embedding = np.asarray(params["trunk"]["embedding"])
    assert abs(embedding.std() / dims.init_std - 1) < 0.05 and len(np.unique(embedding)) > embedding.size // 2
    query = np.asarray(params["trunk"]["blocks"]["query"])
    assert not np.array_equal(query[0], query[1])


def test_auto_tokenizer_takes_the_tokenizer_as_it_is(auto: Any, text: Text):
    assert auto.backend_tokenizer.to_str() == text._template.to_str()
    assert (auto.eos_token, auto.pad_token, auto.chat_template) == (END, PAD, TEMPLATE)


@given(content=plain)
def test_auto_tokenizer_gives_the_same_ids_and_texts(auto: Any, text: Text, content: str):
    turns: list[Message] = [{"role": "system", "content": "the sea"}, {"role": "user", "content": content}]
    assert auto.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == list(text.prompt_ids(turns, 10_000))
    ids = auto(content)["input_ids"]
    assert (*ids, text.end_of_turn) == text.response_ids(content, 10_000)
    assert auto.decode(ids) == content


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_folder_depends_on_texts_and_seed_alone(folder: Path, tmp_path: Path):
    write_fresh(tmp_path / "again", CONFIG, CORPUS, seed=1)
    assert files(tmp_path / "again") == files(folder)
    write_fresh(tmp_path / "other", CONFIG, CORPUS, seed=2)
    changed = {name for name, content in files(tmp_path / "other").items() if content != files(folder)[name]}
    assert changed == {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}


@pytest.mark.parametrize("broken", ["save_file", "json.dumps", "Path.write_bytes", "Path.rename"])
def test_the_folder_is_there_whole_or_not_at_all(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(f"gadjax.models.checkpoint.{broken}", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_fresh(tmp_path / "student", CONFIG, CORPUS, seed=1)
    assert not (tmp_path / "student").exists()
    write_fresh(tmp_path / "student", CONFIG, CORPUS, seed=1)
    Text.load(str(tmp_path / "student"))
    weights(tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"heads": 4, "kv_heads": 3}, {"width": 20, "heads": 4}])
def test_heads_that_do_not_divide_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="`heads` must divide half of `width`, and `kv_heads` must divide `heads`"):
        FreshConfig(**wrong)
