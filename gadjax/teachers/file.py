"""The teacher's answers that exist already, in a file; they go through the same cache as any others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gadjax.errors import UserError
from gadjax.prompts import checked_text, make_prompt
from gadjax.records import Prompt
from gadjax.rows import read_rows
from gadjax.teachers.cache import Outcome, Request, TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.dispatch import OnProgress

WHERE = "teacher.path"
PAIRS = (("prompt", "response"), ("content", "teacher_response"))
CHUNK = 1000  # rows a transaction


def read_pairs(path: str) -> Iterator[tuple[str, Prompt, Outcome]]:
    """The place, the prompt and the answer of each row of a file.

    A row is {"prompt", "response"}, {"content", "teacher_response"} (the prompt is a text or a list of messages), or
    {"messages"} that end with the assistant's answer; with an optional "id" and an optional "finish_reason" ("length" for
    an answer that was cut off).

    Raises:
        UserError: a row is none of these, or its prompt or answer is empty; names the line.
    """
    for place, row in read_rows(path, WHERE):
        content, response = _parts(row, place)
        answer = checked_text(response, place)
        if not answer.strip():
            raise UserError(place, "the answer is empty", "leave the row out")
        yield place, make_prompt(content, row.get("id"), place), Outcome("ok", answer, str(row.get("finish_reason") or "stop"))


def _parts(row: Mapping[str, object], place: str) -> tuple[object, object]:
    """The prompt and the answer of a row, not yet checked."""
    for prompt, response in PAIRS:
        if prompt in row and response in row:
            return row[prompt], row[response]
    match row.get("messages"):
        case [*messages, {"role": "assistant", "content": response}]:
            return messages, response
    names = ", ".join("/".join(pair) for pair in PAIRS)
    raise UserError(place, f"has none of {names} or messages that end with the assistant's", "name the columns so")


def collect_from_file(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    """Copies the answers to `requests` into the cache. The n-th row of the same messages is their n-th sample.

    Raises:
        UserError: the file is broken, or has no answer to one of the requests.
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
