"""Text: what is written by users and teachers stays text, whatever it says; the template alone makes control tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gadjax.errors import UserError
from gadjax.text import Text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_CONTROLS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "user assistant system im_start im_end think endoftext <| |>"] * 4


def byte_level(controls: list[str], size: int = 320) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=controls, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(["<think>"])  # added, yet not special
    return tokenizer


def wrapped(tokenizer: Tokenizer, template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def chatml() -> Text:
    return Text(wrapped(byte_level(CHATML_CONTROLS), eos_token="<|endoftext|>", pad_token="<|endoftext|>"))


TEXT = chatml()
IDS = {word: TEXT._template.get_vocab()[word] for word in [*CHATML_CONTROLS, "<think>"]}
hostile = st.lists(st.sampled_from([*IDS, "<|im_", "end|>", "<|", "|>", "<thi", "nk>", "<|im_<|im_end|>end|>"]) | st.text(max_size=4)).map(
    "".join
)
nonempty = hostile.filter(str.strip)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def read(text: Text, ids: tuple[int, ...]) -> str:
    return text._template.decode(list(ids), skip_special_tokens=False)


@given(hostile)
def test_a_response_round_trips_and_has_one_control_token(content: str) -> None:
    ids = TEXT.response_ids(content, 10_000)
    assert TEXT.decode(ids) == content
    assert [id for id in ids if id in IDS.values()] == [IDS["<|im_end|>"]] == [ids[-1]]


@given(nonempty, nonempty)
def test_a_prompt_shows_its_contents_and_has_the_template_s_control_tokens_only(system: str, content: str) -> None:
    ids = TEXT.prompt_ids([{"role": "system", "content": system}, *user(content)], 10_000)
    start, end = IDS["<|im_start|>"], IDS["<|im_end|>"]
    assert [id for id in ids if id in IDS.values()] == [start, end, start, end, start]
    assert read(TEXT, ids) == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@given(nonempty, st.integers(1, 80))
def test_a_long_prompt_is_cut_on_the_right_of_the_user_s_text_only(content: str, room: int) -> None:
    header, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    frame = len(TEXT.prompt_ids(user("x"), 10_000)) - 1
    whole = len(TEXT.prompt_ids(user(content), 10_000))
    try:
        ids = TEXT.prompt_ids(user(content), frame + room)
    except UserError:
        assert room < 4  # the first character alone may need more bytes than that
        return
    shown = read(TEXT, ids)
    assert shown.startswith(header) and shown.endswith(tail)
    assert content.startswith(shown.removeprefix(header).removesuffix(tail))
    assert min(whole, frame + room) - 3 <= len(ids) <= frame + room  # at most the bytes of one character are given up


def test_a_cut_never_leaves_half_a_character() -> None:
    frame = len(TEXT.prompt_ids(user("x"), 1000)) - 1
    assert "<|im_start|>user\n🙂<|im_end|>" in read(TEXT, TEXT.prompt_ids(user("🙂🙂"), frame + 7))
    with pytest.raises(UserError, match="data.max_prompt_tokens"):
        TEXT.prompt_ids(user("🙂🙂"), frame + 3)


def test_the_last_user_text_is_the_one_that_is_cut() -> None:
    talk = [*user("first " * 20), {"role": "assistant", "content": "second " * 20}, *user("third " * 20)]
    ids = TEXT.prompt_ids(talk, len(TEXT.prompt_ids(talk, 10_000)) - 30)
    shown = read(TEXT, ids)
    assert "first " * 20 + "<|im_end|>" in shown and "second " * 20 + "<|im_end|>" in shown
    assert "third " * 20 not in shown and shown.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("content", ["", " \n\t"])
def test_an_empty_prompt_is_refused(content: str) -> None:
    with pytest.raises(UserError, match="empty"):
        TEXT.prompt_ids(user(content), 100)


def test_a_role_cannot_carry_control_tokens() -> None:
    with pytest.raises(UserError, match="role"):
        TEXT.prompt_ids([{"role": "user<|im_end|>", "content": "x"}], 100)


def test_a_response_is_cut_and_truncated_without_an_end_of_turn() -> None:
    whole = TEXT.response_ids("the quick brown fox", 100)
    content = whole[:-1]
    assert whole[-1] == TEXT.end_of_turn
    assert TEXT.response_ids("the quick brown fox", len(whole)) == whole
    assert TEXT.response_ids("the quick brown fox", len(content)) == content
    assert TEXT.response_ids("the quick brown fox", 2) == content[:2]
    assert TEXT.response_ids("the quick brown fox", 100, truncated=True) == content


def test_decode_stops_at_the_end_of_turn_and_skips_control_tokens() -> None:
    ids = TEXT.response_ids("a b", 100)
    assert TEXT.decode([IDS["<think>"], *ids, *ids]) == "a b"
    assert TEXT.decode([*ids[:-1], TEXT.pad, TEXT.vocabulary_size + 5]) == "a b"  # rows of the embedding beyond the vocabulary


def test_sizes_and_pad() -> None:
    assert TEXT.vocabulary_size == max(IDS.values()) + 1 == IDS["<think>"] + 1
    assert (TEXT.end_of_turn, TEXT.pad) == (IDS["<|im_end|>"], IDS["<|endoftext|>"])


def test_a_llama_template_ends_turns_with_eot_trims_and_lacks_a_pad() -> None:
    text = Text(wrapped(byte_level(LLAMA_CONTROLS), LLAMA, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"))
    assert text.end_of_turn == text.pad == text._template.token_to_id("<|eot_id|>")
    shown = read(text, text.prompt_ids(user(" \nhi <|eot_id|> "), 100))
    user_turn = "<|start_header_id|>user<|end_header_id|>\n\nhi <|eot_id|><|eot_id|>"
    assert shown == f"<|begin_of_text|>{user_turn}<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_the_end_of_sequence_ends_turns_where_the_template_writes_none() -> None:
    template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    text = Text(wrapped(byte_level(CHATML_CONTROLS), template, eos_token="<|endoftext|>"))
    assert text.end_of_turn == IDS["<|endoftext|>"]
    with pytest.raises(UserError, match="end of turn"):
        Text(wrapped(byte_level(CHATML_CONTROLS), template))


def test_a_control_word_of_the_base_vocabulary_is_not_reached_by_ignore_merges() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {word: id for id, word in enumerate([*sorted(alphabet), *CHATML_CONTROLS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CHATML_CONTROLS)
    ids = Text(wrapped(tokenizer)).response_ids("<|im_end|>", 100)
    assert len(ids) == len("<|im_end|>") + 1


def test_a_tokenizer_that_changes_text_is_refused() -> None:
    tokenizer = byte_level(CHATML_CONTROLS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="keep text exactly"):
        Text(wrapped(tokenizer))


def test_a_template_s_refusal_and_omission_are_told() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="no system"):
        Text(wrapped(byte_level(CHATML_CONTROLS), refusing)).prompt_ids([{"role": "system", "content": "s"}, *user("x")], 100)
    omitting = "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}<|im_end|>"
    with pytest.raises(UserError, match="leaves the user's last text out"):
        Text(wrapped(byte_level(CHATML_CONTROLS), omitting)).prompt_ids(user("x"), 100)


def test_a_template_that_prints_the_date_prints_the_same_every_day() -> None:
    text = Text(wrapped(byte_level(CHATML_CONTROLS), "{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert read(text, text.prompt_ids(user("x"), 100)).startswith("26 Jul 2024<|im_start|>")


def test_load_reads_tokenizer_json_as_it_is(tmp_path: Path) -> None:
    wrapped(byte_level(CHATML_CONTROLS), eos_token="<|endoftext|>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # AutoTokenizer would put Qwen2's own normalizer in
    text = Text.load(str(tmp_path))
    content = "e\u0301 2024"
    assert text.decode(text.response_ids(content, 100)) == content
    assert text.response_ids(content, 100) == TEXT.response_ids(content, 100)


def test_load_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^student.path: no tokenizer in /no/such/folder"):
        Text.load("/no/such/folder")
    with pytest.raises(UserError, match="no tokenizer"):
        Text.load(str(tmp_path))
    wrapped(byte_level(CHATML_CONTROLS), template=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        Text.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer"):
        Text.load(str(tmp_path))


def test_the_template_s_arguments_are_given_to_it() -> None:
    template = CHATML + "{% if thinking is defined and not thinking %}quiet{% endif %}"
    tokenizer = wrapped(byte_level(CHATML_CONTROLS), template, eos_token="<|endoftext|>")
    talk = [{"role": "user", "content": "hello"}]
    plain, quiet = (Text(tokenizer, arguments) for arguments in (None, {"thinking": False}))
    shown = quiet._template.decode(list(quiet.prompt_ids(talk, 100)), skip_special_tokens=False)
    assert shown == plain._template.decode(list(plain.prompt_ids(talk, 100)), skip_special_tokens=False) + "quiet"
