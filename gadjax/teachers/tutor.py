"""The tutor: a teacher of known distribution (teachers/grammar.py), asked over HTTP on this machine like any other."""

import hashlib
import json
import random
from collections.abc import Sequence

from gadjax.records import Message
from gadjax.server import Completion, Server
from gadjax.teachers import grammar
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import FREE, TeacherConfig
from gadjax.teachers.dispatch import OnProgress
from gadjax.teachers.openai import collect_from_endpoint
from gadjax.teachers.requests import Request

CONCURRENCY = 16  # more brings nothing: server and client share this process


def complete(messages: Sequence[Message], *, temperature: float, max_tokens: int | None, seed: int | None, n: int) -> Sequence[Completion]:
    """Answers the last message. The same messages and seed get the same answers, whatever was asked before.

    The temperature is not heeded: the tutor speaks from its grammar. Its tokens are words.
    """
    digest = hashlib.sha256(json.dumps([*messages, seed], sort_keys=True).encode()).digest()
    rng = random.Random(int.from_bytes(digest))
    prompt = messages[-1]["content"]
    return [_completion(prompt, grammar.sample(prompt, rng), max_tokens) for _ in range(n)]


def answer(request: Request) -> Completion:
    """What the tutor will answer to a request."""
    given = dict(request.parameters)
    seed, max_tokens = int(given["seed"]), int(given["max_tokens"])
    return complete(request.messages, temperature=given["temperature"], max_tokens=max_tokens, seed=seed, n=1)[0]


def _completion(prompt: str, answer: str, max_tokens: int | None) -> Completion:
    words = answer.split(" ")
    kept = words[:max_tokens]
    return Completion(" ".join(kept), len(kept) < len(words), len(prompt.split(" ")), len(kept))


def collect_from_tutor(requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    """Starts the tutor's server for as long as there is something to ask. Needs no key and costs nothing."""
    with Server(complete, model="tutor") as server:
        concurrency = min(config.concurrency, CONCURRENCY)
        endpoint = config.model_copy(update={"backend": "openai", "base_url": server.address, "price": FREE, "concurrency": concurrency})
        collect_from_endpoint(requests, endpoint, cache, on_progress, key="no-key-is-needed")
