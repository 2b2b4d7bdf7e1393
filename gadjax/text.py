"""Text <-> token ids of the student: chat template, safe encoding of foreign text, end of turn.

What users and teachers write never becomes a control token: the template is rendered with marks in place of the contents,
and each content is encoded on its own by the same tokenizer without its added tokens. (Rendering and encoding the whole
conversation would turn `<|im_end|>` in a content into the end of a turn.)
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from gadjax.errors import UserError, first_line
from gadjax.prompts import checked_messages
from gadjax.records import Message

WHERE = "student.path"
# Templates strip ordinary white space off a content; whether they do is seen by these two being gone.
EDGE = "\u2003"
# Templates that print today's date (Llama 3.2) would give another prompt every day: they get the date that Llama 3.1's has.
DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


class PromptTooLong(UserError):
    """A prompt has no place even without the user's last text."""

    def __init__(self) -> None:
        super().__init__("data.max_prompt_tokens", "has no place for the prompts even without their last text", "raise it")


class Text:
    """A student's tokenizer and chat template.

    Attributes:
        end_of_turn: the id that ends an assistant's response in the chat template.
        pad: the id that fills unused places; the end of turn where the tokenizer has none.
        control: the ids of all added tokens (`<|im_end|>`, `<think>`); no content is ever encoded to one of them.
        vocabulary_size: the largest id + 1. A model's embedding may have more rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any] | None = None):
        self._tokenizer, self._arguments = tokenizer, dict(arguments or {})
        self._template: Tokenizer = tokenizer.backend_tokenizer
        self.control = frozenset(self._template.get_added_tokens_decoder())
        self._content = _without_added_tokens(self._template)
        self._source = DATE + tokenizer.get_chat_template()
        self._nonce = secrets.token_hex(16)
        self.end_of_turn = self._find_end_of_turn()
        pad = cast(int | None, tokenizer.pad_token_id)
        self.pad = self.end_of_turn if pad is None else pad
        self.vocabulary_size = max(self._template.get_vocab(with_added_tokens=True).values()) + 1
        self._check_exact()

    @classmethod
    def load(cls, path: str, arguments: Mapping[str, Any] | None = None) -> "Text":
        """Reads the tokenizer of a Hugging Face folder or hub name; runs no code of its. `arguments` are the chat template's.

        Raises:
            UserError: there is none, or it lacks a chat template or an end-of-turn token.
        """
        # Not AutoTokenizer: for a known model_type it replaces tokenizer.json's own normalizer and pre-tokenizer.
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises a bare Exception for a broken tokenizer.json
            reason = first_line(error)
            raise UserError(
                WHERE, f"no tokenizer in {path} ({reason})", "name a folder with tokenizer.json or a Hugging Face model"
            ) from error
        if not tokenizer.chat_template:
            raise UserError(WHERE, f"the tokenizer of {path} has no chat template", "take an instruct model or add chat_template.jinja")
        return cls(tokenizer, arguments)

    def prompt_ids(self, messages: Iterable[Message], max_tokens: int) -> tuple[int, ...]:
        """The ids of `fitted_prompt`."""
        return self.fitted_prompt(messages, max_tokens)[0]

    def fitted_prompt(self, messages: Iterable[Message], max_tokens: int) -> tuple[tuple[int, ...], bool]:
        """The ids of the rendered conversation, the assistant's header included, 1 to `max_tokens` of them, and whether it was cut.

        Where they are too many, the user's last text is cut on the right, at a character; the template's tail stays.

        Raises:
            PromptTooLong: it is so even without the user's last text.
            UserError: the prompt is empty, or the template refuses it.
        """
        turns = checked_messages(list(messages), "prompt")
        pieces = self._render(turns, header=True)
        last = max((place for place, (_, turn) in enumerate(pieces) if turn == len(turns) - 1), default=None)
        if last is None:
            raise UserError(WHERE, "its chat template leaves the user's last text out", "give the student a chat template that shows it")
        ids = [self._encode_template(text) if turn is None else self._encode(text) for text, turn in pieces]
        excess = sum(map(len, ids)) - max_tokens
        if excess > 0:
            ids[last] = self._cut(pieces[last][0], len(ids[last]) - excess)
        return tuple(id for piece in ids for id in piece), excess > 0

    def response_ids(self, text: str, max_tokens: int, truncated: bool = False) -> tuple[int, ...]:
        """The ids of a response: its text and one end of turn, which a response that is truncated or cut here lacks."""
        ids = self._encode(text)
        ending = [] if truncated else [self.end_of_turn]
        return tuple([*ids, *ending] if len(ids) + len(ending) <= max_tokens else ids[:max_tokens])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a response up to its end of turn, without any control token."""
        kept = takewhile(lambda id: id != self.end_of_turn, map(int, ids))
        return self._content.decode(list(kept), skip_special_tokens=False)  # which knows no control token and leaves them out

    def _render(self, turns: list[Message], header: bool) -> list[tuple[str, int | None]]:
        """The rendered conversation in pieces: template text (None), or a content with the index of its message."""
        marked = [{**turn, "content": f"{EDGE}{self._nonce}:{index}:{EDGE}"} for index, turn in enumerate(turns)]
        try:
            rendered = self._tokenizer.apply_chat_template(
                marked, chat_template=self._source, tokenize=False, add_generation_prompt=header, **self._arguments
            )
        except Exception as error:  # a stranger's template, in the sandbox that transformers puts it in, raises what it likes
            raise UserError(WHERE, f"its chat template refuses the messages ({error})", "leave such prompts out") from error
        head, *parts = re.split(f"({EDGE}?){self._nonce}:([0-9]+):({EDGE}?)", cast(str, rendered))
        pieces: list[tuple[str, int | None]] = [(head, None)]
        for left, index, right, template in zip(parts[0::4], parts[1::4], parts[2::4], parts[3::4], strict=True):
            content = turns[int(index)]["content"]
            content = content if left else content.lstrip()
            content = content if right else content.rstrip()
            pieces += [(content, int(index)), (template, None)]
        return pieces

    def _encode(self, text: str) -> list[int]:
        return self._content.encode(text, add_special_tokens=False).ids

    def _encode_template(self, text: str) -> list[int]:
        return self._template.encode(text, add_special_tokens=False).ids

    def _cut(self, text: str, tokens: int) -> list[int]:
        """The first `tokens` ids of a text, fewer where that would leave a part of a character."""
        encoding = self._content.encode(text, add_special_tokens=False)
        while 0 < tokens < len(encoding) and encoding.offsets[tokens][0] < encoding.offsets[tokens - 1][1]:
            tokens -= 1
        if tokens < 1:
            raise PromptTooLong
        return encoding.ids[:tokens]

    def _find_end_of_turn(self) -> int:
        """The first control token that the template writes after an assistant's content; else the tokenizer's end of sequence."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        tail, _ = self._render(turns, header=False)[-1]
        ids = [id for id in self._encode_template(tail) if id in self.control]
        found = ids[0] if ids else cast(int | None, self._tokenizer.eos_token_id)
        if found is None:
            raise UserError(WHERE, "neither chat template nor tokenizer names an end of turn", "set eos_token in tokenizer_config.json")
        return found

    def _check_exact(self) -> None:
        """Refuses a tokenizer that changes text, as those without byte-level BPE do."""
        controls = "".join(self._tokenizer.convert_ids_to_tokens(sorted(self.control)))
        probe = f"a  b\n\n\t Zażółć 漢字 🙂 \x00 {controls}"
        ids = self._encode(probe)
        if not self.control.isdisjoint(ids) or self._content.decode(ids, skip_special_tokens=False) != probe:
            raise UserError(
                WHERE, "its tokenizer does not keep text exactly", "take a student with byte-level BPE: Qwen2.5, Qwen3 or Llama 3"
            )


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, for which `<|im_end|>` is but ten characters."""
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    added = {token["content"] for token in description["added_tokens"]}
    description["added_tokens"] = []
    model = description["model"]
    if isinstance(model.get("vocab"), dict):  # with `ignore_merges`, a word that is in the vocabulary needs no merge to become its id
        model["vocab"] = {word: id for word, id in model["vocab"].items() if word not in added}
    return Tokenizer.from_str(json.dumps(description))
