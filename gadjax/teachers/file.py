"""The teacher's answers that exist already, in a file; they go through the same cache as any others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gadjax.errors import UserError
from gadjax.prompts import checked_text, make_prompt
from gadjax.records import Prompt
from gadjax.rows import read_rows
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.dispatch import OnProgress
from gadjax.teachers.requests import Outcome, Request

WHERE = "teacher.path"
PAIRS = (("prompt", "response"), ("content", "teacher_response"))
CHUNK = 1000  # rows a transaction


@dataclass(frozen=True)
class Fields:
    """The names of a row's fields; those of None are found by what the row has.

    Attributes:
        prompt, response: of the prompt (a text or a list of messages) and of the answer.
        messages: of a list of messages that ends with the answer.
    """

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None


FOUND = Fields()


def read_pairs(path: str, fields: Fields = FOUND, where: str = WHERE) -> Iterator[tuple[str, Prompt, Outcome]]:
    """The place, the prompt and the answer of each row of a file, a folder or a data set.

    A row is {"prompt", "response"}, {"content", "teacher_response"} (the prompt is a text or a list of messages), or
    {"messages"} that end with the assistant's answer; with an optional "id" and an optional "finish_reason" ("length" for
    an answer that was cut off). An answer without any text counts as a refusal, as an endpoint's does.

    Raises:
        UserError: a row is none of these, or its prompt is empty; names the line.
    """
    for place, row in read_rows(path, where):
        content, response = _parts(row, place, fields)
        answer = checked_text(response, place)
        prompt = make_prompt(content, row.get("id"), place)
        if answer.strip():
            yield place, prompt, Outcome("ok", answer, str(row.get("finish_reason") or "stop"))
        else:
            yield place, prompt, Outcome("refused", answer, error="the answer is empty")


def _parts(row: Mapping[str, object], place: str, fields: Fields) -> tuple[object, object]:
    """The prompt and the answer of a row, not yet checked."""
    if fields.prompt or fields.response:
        pairs = [(fields.prompt or "prompt", fields.response or "response")]
    else:
        pairs = [] if fields.messages else list(PAIRS)
    for prompt, response in pairs:
        if prompt in row and response in row:
            return row[prompt], row[response]
    talk = fields.messages or "messages"
    match row.get(talk) if fields.messages or not (fields.prompt or fields.response) else None:
        case [*messages, {"role": "assistant", "content": response}]:
            return messages, response
    names = ", ".join("/".join(pair) for pair in pairs)
    what = " or ".join(filter(None, [names, f"`{talk}` that end with the assistant's" if fields == FOUND or fields.messages else ""]))
    raise UserError(place, f"has none of {what}; its fields are {', '.join(row)}", "name the columns so, or import it by their names")


def collect_from_file(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    """Copies the answers to `requests` into the cache. The n-th row of the same messages is their n-th sample.

    Raises:
        UserError: the file is broken, or has no row to one of the requests.
    """
    wanted = {(str(request.messages), request.sample): request for request in requests}
    total, seen, batch = len(wanted), Counter[str](), list[tuple[Request, Outcome]]()
    for _, prompt, outcome in read_pairs(str(config.path)):
        messages = str(prompt.messages)
        request = wanted.pop((messages, seen[messages]), None)
        seen[messages] += 1
        if request:
            batch.append((request, outcome))
        if len(batch) == CHUNK:
            cache.record(batch, replace=True)  # the file may have been mended since
            on_progress(total - len(wanted), total)
            batch = []
    cache.record(batch, replace=True)
    on_progress(total - len(wanted), total)
    if wanted:
        (_, sample), request = next(iter(wanted.items()))
        what = f"{config.path} lacks {len(wanted)} answers, the first being number {sample + 1} to {request.messages[-1]['content'][:60]!r}"
        raise UserError(WHERE, what, "add them, leave these prompts out or lower teacher.samples")
