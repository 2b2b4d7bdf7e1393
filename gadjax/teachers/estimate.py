"""What a collection will take, before it is paid for: calls, tokens and dollars."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gadjax.teachers.batch import batch_price
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import FREE, TeacherConfig
from gadjax.teachers.openai import price_of
from gadjax.teachers.requests import Outcome, Request
from gadjax.teachers.tutor import answer

SAMPLE = 2000  # known answers that are looked at
TUTOR_SAMPLE = 300  # answers that the tutor, who is free, gives for the estimate
BYTES_A_TOKEN = 4.0  # of English
MESSAGE_BYTES = 16  # what a message's frame counts for, in bytes of text


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked.

    Attributes:
        calls: requests without an answer.
        prompt_tokens, completion_tokens: of all of them.
        cost: US dollars.
        based_on: known answers that the tokens are estimated from; 0: `completion_tokens` is the most that they can be.
        error: half of the 95 % interval of `completion_tokens`, as a share of them; 0 where nothing is known.
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    based_on: int
    error: float


def estimate(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache | None) -> Estimate:
    """Estimates from the answers that the cache has already; for the tutor, from some that it gives for this.

    Prompts: tokens per byte of what is known. Answers: the mean length of what is known, which should be drawn by lot.

    Args:
        requests: all that is wanted.
        config: of whom.
        cache: what is there already; None where nothing is.
    """
    keys = [request.key for request in requests]
    answered = cache.answered(keys) if cache else set[str]()
    open_ones = [request for request in requests if request.key not in answered]
    if config.backend == "file" or not open_ones:
        return Estimate(len(open_ones), 0, 0, 0.0, 0, 0.0)
    known = _pilot(open_ones) if config.backend == "tutor" else cache.replies(keys, SAMPLE) if cache else []
    size = sum(map(_bytes, open_ones))
    if known:
        lengths = [outcome.completion_tokens for _, outcome in known]
        mean, spread = statistics.fmean(lengths), statistics.stdev(lengths) if len(lengths) > 1 else math.inf
        error = 1.96 * spread / math.sqrt(len(lengths)) / mean if mean else 0.0
        prompt_tokens = size * sum(outcome.prompt_tokens for _, outcome in known) / sum(_bytes(request) for request, _ in known)
    else:
        mean, error, prompt_tokens = config.max_tokens, 0.0, size / BYTES_A_TOKEN
    tokens = round(prompt_tokens), round(mean * len(open_ones))
    price = FREE if config.backend == "tutor" else price_of(config) if config.batch is None else batch_price(price_of(config))
    return Estimate(len(open_ones), *tokens, price.cost(*tokens), len(known), error)


def _bytes(request: Request) -> int:
    return sum(MESSAGE_BYTES + len(message["content"].encode()) for message in request.messages)


def _pilot(requests: Sequence[Request]) -> list[tuple[Request, Outcome]]:
    chosen = sorted(requests, key=lambda request: request.key)[:TUTOR_SAMPLE]
    given = [(request, answer(request)) for request in chosen]
    return [(request, Outcome("ok", prompt_tokens=each.prompt_tokens, completion_tokens=each.completion_tokens)) for request, each in given]
