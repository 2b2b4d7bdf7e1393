"""The tutor: a teacher of known distribution (teachers/grammar.py), asked over HTTP on this machine like any other."""

import hashlib
import json
import random
from collections.abc import Generator, Sequence

from gadjax.completions import Ask, Piece
from gadjax.server import Server
from gadjax.teachers import grammar
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import FREE, TeacherConfig
from gadjax.teachers.dispatch import OnProgress
from gadjax.teachers.openai import collect_from_endpoint
from gadjax.teachers.requests import Request

CONCURRENCY = 16  # more brings nothing: server and client share this process


def complete(ask: Ask) -> Generator[Piece, None, None]:
    """Answers the last message. The same messages and seed get the same answers, whatever was asked before.

    Temperature and top-p are not heeded: the tutor speaks from its grammar. Its tokens are words.
    """
    digest = hashlib.sha256(json.dumps([*ask.messages, ask.seed], sort_keys=True).encode()).digest()
    rng = random.Random(int.from_bytes(digest))
    prompt = ask.messages[-1]["content"]
    for choice in range(ask.n):
        words = grammar.sample(prompt, rng).split(" ")
        kept = words[: ask.max_tokens]
        yield Piece(
            choice=choice,
            text=" ".join(kept),
            finish="length" if len(kept) < len(words) else "stop",
            prompt_tokens=len(prompt.split(" ")),
            completion_tokens=len(kept),
        )


def answer(request: Request) -> Piece:
    """What the tutor will answer to a request."""
    given = dict(request.parameters)
    asked = Ask(messages=request.messages, temperature=given["temperature"], max_tokens=int(given["max_tokens"]), seed=int(given["seed"]))
    return next(complete(asked))


def collect_from_tutor(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    """Starts the tutor's server for as long as there is something to ask. Needs no key and costs nothing."""
    with Server(complete, model="tutor") as server:
        concurrency = min(config.concurrency, CONCURRENCY)
        endpoint = config.model_copy(update={"backend": "openai", "base_url": server.address, "price": FREE, "concurrency": concurrency})
        collect_from_endpoint(requests, endpoint, cache, on_progress, key="no-key-is-needed")
