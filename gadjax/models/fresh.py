"""A fresh student for trials: a small random model whose tokenizer knows the teacher's words.

It is written as a Hugging Face folder and goes the way of every other student from there. Its tokenizer is byte-level, so
it keeps every text exactly, and has one token for each frequent word (with the space before it); what it does not know
is spelled in bytes.

It is a Llama: for a Qwen2 model AutoTokenizer puts Qwen2's own normalizer and pre-tokenizer in place of tokenizer.json's.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from gadjax.models import llama3
from gadjax.models.checkpoint import save
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.section import Section

PAD, END = "<|pad|>", "<|end|>"
CONTROL = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # which keeps tokenizer.json as it is, in transformers 4 and 5
    "eos_token": END,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
}


class SizeConfig(Section):
    """The dimensions of a fresh model; its weights are drawn with `run.seed`.

    Attributes:
        width: D.
        layers: blocks.
        heads: query heads; divides `width`.
        kv_heads: key/value heads; divides `heads`.
        feed_forward: width of the feed-forward layers.
    """

    width: int = Field(default=96, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=2, ge=1)
    feed_forward: int = Field(default=256, ge=8)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("`heads` must divide half of `width`, and `kv_heads` must divide `heads`")
        return self


class FreshConfig(SizeConfig):
    """A fresh student.

    Attributes:
        words: how many of the most frequent words have a token of their own, beside the 256 bytes.
    """

    words: int = Field(default=300, ge=0)


def word_tokenizer(texts: Iterable[str], words: int) -> Tokenizer:
    """Bytes, and one token for each of the most frequent words of `texts`; control tokens lie beyond them."""
    pieces = ByteLevel(add_prefix_space=False)
    counts = Counter(piece for text in texts for piece, _ in pieces.pre_tokenize_str(text))
    alphabet = sorted(ByteLevel.alphabet())
    # Ties in frequency are broken by the word itself, so that the tokenizer depends on the texts alone.
    frequent = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:words]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *sorted(frequent)])}
    # Without merges but with `ignore_merges`, a word is either one token of the vocabulary or its bytes.
    tokenizer = Tokenizer(BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return tokenizer


def fresh_dims(config: SizeConfig, vocabulary: int) -> DecoderConfig:
    """The dimensions of a fresh model with so many tokens."""
    return DecoderConfig(
        vocabulary=vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.width // config.heads,
        feed_forward=config.feed_forward,
        qkv_bias=False,
        init_std=config.width**-0.5 / 2,
    )


def write_fresh(folder: Path, config: FreshConfig, texts: Iterable[str], seed: int) -> None:
    """Writes the student's folder; it is there whole or not at all."""
    tokenizer = word_tokenizer(texts, config.words)
    ids = tokenizer.get_vocab()
    dims = fresh_dims(config, len(ids))
    params = language_model(dims, jnp.dtype(jnp.float32)).init(jax.random.key(seed))
    tokens = {"eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "chat_template.jinja": TEMPLATE,
    }
    save(folder, llama3.FAMILY, dims, params, tokens, {name: text.encode() for name, text in files.items()})
