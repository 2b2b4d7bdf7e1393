"""Moderation: an endpoint that says of texts whether they are not to be used. For data here; for a student's own output, too.

with Moderator(config, folder / "moderation.sqlite") as moderator:
    flagged = moderator.flagged(["a text", "another"])        # [False, False]
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import httpx2
from openai import APIError, OpenAI
from pydantic import BaseModel, ConfigDict, ValidationError

from gadjax.errors import UserError
from gadjax.section import Section

AT_ONCE = 32  # texts a request
TRIES = 5
SECONDS = 60.0
OPENAI = "https://api.openai.com/v1"
SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, flagged INTEGER NOT NULL) STRICT"


class ModerationConfig(Section):
    """An endpoint with OpenAI's /moderations, whose own is free of charge.

    Attributes:
        model: the moderating model.
        base_url: the endpoint; null is OpenAI's.
        api_key_env: the environment variable that holds the key.
    """

    model: str = "omni-moderation-latest"
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"


class _Verdict(BaseModel):
    model_config = ConfigDict(strict=True)
    flagged: bool


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)
    results: list[_Verdict]


class Moderator:
    """Asks about every text once: verdicts are kept in a file.

    Args:
        config: the endpoint.
        path: the file; None keeps them for this object only.

    Raises:
        UserError: there is no key.
    """

    def __init__(self, config: ModerationConfig, path: Path | None = None):
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            where = "cleaning.moderation.api_key_env"
            raise UserError(where, f"the environment variable {config.api_key_env} is not set", "export it with the API key")
        self._config, address = config, config.base_url or OPENAI
        local = (urlsplit(address).hostname or "") in ("127.0.0.1", "localhost", "::1")
        http_client = httpx2.Client(timeout=SECONDS, follow_redirects=False, trust_env=not local)
        self._client = OpenAI(api_key=key, base_url=address, max_retries=TRIES, http_client=http_client)  # a text may be asked about twice
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        self._db.execute(SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._db.close()

    def flagged(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts are not to be used.

        Raises:
            UserError: the endpoint does not answer. What it answered before is kept.
        """
        keys = {text: hashlib.sha256(f"{self._config.model}\0{text}".encode()).digest() for text in texts}
        unknown = [text for text, key in keys.items() if self._known(key) is None]
        for chunk in _chunks(unknown):
            verdicts = self._ask(chunk)
            rows = [(keys[text], verdict) for text, verdict in zip(chunk, verdicts, strict=True)]
            self._db.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
        return [bool(self._known(keys[text])) for text in texts]

    def _known(self, key: bytes) -> int | None:
        row = self._db.execute("SELECT flagged FROM verdicts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _ask(self, texts: Sequence[str]) -> list[bool]:
        try:
            body = {"model": self._config.model, "input": list(texts)}
            reply = self._client.post("/moderations", cast_to=httpx2.Response, body=body)
            results = _Reply.model_validate_json(reply.content).results
        except (APIError, ValidationError) as error:
            what = f"the endpoint does not answer ({type(error).__name__})"
            raise UserError("cleaning.moderation", what, "run the same command again, or leave it out") from error
        if len(results) != len(texts):
            what = f"the endpoint gave {len(results)} verdicts on {len(texts)} texts"
            raise UserError("cleaning.moderation", what, "name an endpoint that serves OpenAI's /moderations")
        return [result.flagged for result in results]


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
