"""Prompts: the config section `prompts`, the files they are read from, and the checks that every conversation passes."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from gadjax.errors import UserError
from gadjax.records import Message, Prompt
from gadjax.rows import read_rows
from gadjax.section import Section
from gadjax.terminal import say

ROLES = ("system", "user", "assistant")


class PromptsConfig(Section):
    """What the teacher is asked.

    Attributes:
        train: a .jsonl file (.gz, .zst and .parquet are read too), a folder, or a data set's name on the hub, each with an optional
            `:split`; rows are {"prompt": text} or {"messages": [...]} with an optional "id". Or `tutor:6000` for 6000 prompts that
            the tutor makes. Null: the prompts of `teacher.path`, or of the answers that were imported.
        validation: the same; null holds a share of the training prompts out.
        validation_share: that share.
        tests: further prompts that are held out, by a name of your own: the teacher is asked for them, and every stage is evaluated on
            each set apart. A source as above, or one of the paper's test sets: `lmsys`, `dolly`, `selfinst`, `vicuna`.
    """

    train: str | None = None
    validation: str | None = None
    validation_share: float = Field(default=0.05, gt=0, lt=1)
    tests: dict[str, str] = Field(default_factory=dict)


def read_prompts(path: str, where: str) -> list[Prompt]:
    """The prompts of a file, in its order, each once: rows with the same messages as an earlier one are left out, which is said.

    Raises:
        UserError: a row is broken, holds no prompt, or has the id of another prompt; names the line.
    """
    rows = [(place, prompt_of(row, place)) for place, row in read_rows(path, where)]
    prompts = distinct(rows)
    if len(prompts) < len(rows):
        say(f"{where}: {len(rows) - len(prompts)} rows of {path} are left out: their prompts stand in earlier rows")
    return prompts


def distinct(prompts: Iterable[tuple[str, Prompt]]) -> list[Prompt]:
    """The first prompt of all with the same messages; each comes with its place for the error.

    Raises:
        UserError: two prompts have the same id and other messages.
    """
    places, found = dict[str, str](), dict[str, Prompt]()
    for place, prompt in prompts:
        messages = str(prompt.messages)
        if messages in found:
            continue
        if prompt.id in places:
            raise UserError(place, f"its id {prompt.id!r} is that of {places[prompt.id]}", "give every prompt an id of its own, or none")
        places[prompt.id], found[messages] = place, prompt
    return list(found.values())


def prompt_of(row: Mapping[str, object], place: str) -> Prompt:
    """The prompt of a row {"prompt": text}, {"content": text or messages} or {"messages": [...]} with an optional "id".

    Also {"instruction": text} with an optional text in "input" or "context" that it is about, which follows it.
    """
    content = row.get("messages") or row.get("prompt")
    if content is None:
        content = row.get("content")
    if content is None and isinstance(row.get("instruction"), str):
        content = "\n\n".join(str(row[name]) for name in ("instruction", "input", "context") if row.get(name))
    if content is None:
        raise UserError(place, "has neither `prompt` nor `messages`", 'write {"prompt": "..."}')
    return make_prompt(content, row.get("id"), place)


def make_prompt(content: object, id: object, place: str) -> Prompt:
    """The prompt of a text or a list of messages, checked."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return Prompt.of(checked_messages(messages, place), checked_text(str(id), place) if id is not None else None)


def checked_messages(messages: object, where: str) -> list[Message]:
    """The conversation as plain role and content pairs, ready to be rendered or sent.

    Args:
        messages: what a file, a request or a caller gave; keys other than role and content are dropped.
        where: names the place in the error.

    Raises:
        UserError: it is not a list of messages, a role is unknown, text is not valid Unicode, or it does not end with a user's text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(where, "`messages` is not a list of messages", 'write [{"role": "user", "content": "..."}]')
    turns = [_checked_message(message, where) for message in messages]
    if turns[-1]["role"] != "user":
        raise UserError(where, f"the last message is the {turns[-1]['role']}'s", "end the messages with the user's turn")
    if not turns[-1]["content"].strip():
        raise UserError(where, "the prompt is empty", "give the last user message a text or leave the prompt out")
    return turns


def _checked_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise UserError(where, f"a message has no role out of {', '.join(ROLES)}", "give every message one of these roles")
    return {"role": message["role"], "content": checked_text(message.get("content"), where)}


def checked_text(text: object, where: str) -> str:
    """The text itself, once it is known to be a string that UTF-8 can write (no lone surrogates)."""
    if not isinstance(text, str):
        raise UserError(where, "a text is not a string", "write it as a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(where, f"the text is not valid Unicode ({error.reason})", "remove the broken characters") from error
    return text
