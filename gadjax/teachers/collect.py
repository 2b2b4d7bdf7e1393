"""Collecting: prompts in, the teacher's answers in the cache. Needs no student, no tokenizer and no device.

train, validation = load_prompts(config.prompts, config.teacher, seed)            # teachers/sources.py
with TeacherCache(folder / "teacher.sqlite") as cache:
    summary = collect([*train, *validation], config.teacher, cache)
    training = answers(train, config.teacher, cache)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gadjax.errors import UserError
from gadjax.records import Answer, Prompt
from gadjax.teachers.batch import collect_in_batches
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.dispatch import OnProgress
from gadjax.teachers.file import collect_from_file
from gadjax.teachers.openai import collect_from_endpoint
from gadjax.teachers.requests import Request
from gadjax.teachers.tutor import collect_from_tutor


def collect_from_openai(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    """At once, or in batches."""
    if config.batch is not None:
        collect_in_batches(requests, config, cache, on_progress)
    elif cache.open_batches(config.provider):
        raise UserError("teacher.batch", "is left out while answers are under way in a batch", "write `batch: {}` until they are read")
    else:
        collect_from_endpoint(requests, config, cache, on_progress)


# Brings every request to an outcome in the cache, asking for nothing that has an answer or a refusal there.
Backend = Callable[[Sequence[Request], TeacherConfig, TeacherCache, OnProgress], None]
BACKENDS: dict[str, Backend] = {"openai": collect_from_openai, "tutor": collect_from_tutor, "file": collect_from_file}


@dataclass(frozen=True)
class Summary:
    """What a cache holds for the prompts of a collection.

    Attributes:
        wanted: answers that the config asks for; equal prompts share theirs.
        ok, refused, failed: their outcomes.
        truncated: how many of the `ok` ones were cut off by the length limit.
        cost: US dollars, all runs together.
    """

    wanted: int
    ok: int
    refused: int
    failed: int
    truncated: int
    cost: float


def collect(
    prompts: Iterable[Prompt],
    config: TeacherConfig,
    cache: TeacherCache,
    on_progress: OnProgress = lambda done, total: None,
    limit: int | None = None,
) -> Summary:
    """Brings the teacher's answers to all prompts into the cache; what is there already is not asked again.

    It may be interrupted at any point and called again. A request that failed is tried again by the next call. Ctrl-C waits
    for the answers that are under way and keeps them; a second one does not.

    Args:
        prompts: equal ones are asked once.
        config: whom to ask, and how.
        cache: where the answers go.
        on_progress: called with the number of answers that are committed and of those that are wanted.
        limit: only so many of all requests, drawn by lot; the same ones every time.

    Raises:
        UserError: the teacher cannot be asked, answers nothing, or may cost more than allowed. What was collected is kept.
    """
    requests = all_requests(prompts, config)
    if limit is not None:
        requests = sorted(requests, key=lambda request: request.key)[:limit]  # keys are hashes
    BACKENDS[config.backend](requests, config, cache, on_progress)
    summary = summarize(requests, cache)
    if requests and not summary.ok:
        outcome = next(iter(cache.outcomes([requests[0].key]).values()), None)
        reason = outcome.error if outcome else "no reply"
        raise UserError("teacher", f"gave no answer to any of {len(requests)} requests, the first of which met: {reason}", "mend the cause")
    return summary


def summarize(requests: Sequence[Request], cache: TeacherCache) -> Summary:
    """Counts the outcomes."""
    tally = cache.tally(request.key for request in requests)
    counts = {name: sum(number for state, _, number, _ in tally if state == name) for name in ("ok", "refused", "failed")}
    truncated = sum(number for state, reason, number, _ in tally if (state, reason) == ("ok", "length"))
    return Summary(wanted=len(requests), **counts, truncated=truncated, cost=sum(cost for *_, cost in tally))


def all_requests(prompts: Iterable[Prompt], config: TeacherConfig) -> list[Request]:
    """Everything that is wanted of a teacher, each once."""
    return list({request.key: request for prompt in prompts for request in requests_for(prompt, config)}.values())


def answers(prompts: Sequence[Prompt], config: TeacherConfig, cache: TeacherCache) -> list[Answer]:
    """The teacher's answers to the prompts, in their order, up to `config.samples` to each; refusals and failures are left out."""
    wanted = [(prompt, request.key) for prompt in prompts for request in requests_for(prompt, config)]
    found = cache.outcomes({key for _, key in wanted})
    kept = [(prompt, found[key]) for prompt, key in wanted if key in found and found[key].state == "ok"]
    return [Answer(prompt.id, outcome.text, truncated=outcome.finish_reason == "length") for prompt, outcome in kept]


def requests_for(prompt: Prompt, config: TeacherConfig) -> list[Request]:
    """The requests for all samples of a prompt, as the cache keys them."""
    return [request_for(prompt, config, sample) for sample in range(config.samples)]


def request_for(prompt: Prompt, config: TeacherConfig, sample: int) -> Request:
    """The request for one answer to a prompt."""
    return Request(config.provider, config.asked_model, prompt.messages, _parameters(config, sample), sample)


def _parameters(config: TeacherConfig, sample: int) -> dict[str, float | int]:
    """The sampling parameters: none for a file; the tutor answers by its seed, so that it answers alike in every order."""
    if config.backend == "file":
        return {}
    parameters: dict[str, float | int] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    return parameters | {"seed": sample} if config.backend == "tutor" else parameters
