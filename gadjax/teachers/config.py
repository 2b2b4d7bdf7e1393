"""The config section `teacher`: whom to ask, how, and for how much."""

from functools import partial
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gadjax.foreign import check_address, check_variable
from gadjax.section import Section

OPENAI = "https://api.openai.com/v1"


class Price(Section):
    """US dollars per million tokens.

    Attributes:
        input: of the requests.
        output: of the answers.
    """

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for one request."""
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


FREE = Price(input=0.0, output=0.0)
PRICES = {
    "gpt-5-chat": Price(input=1.25, output=10.0),
    "gpt-5-chat-latest": Price(input=1.25, output=10.0),
    "gpt-5": Price(input=1.25, output=10.0),
    "gpt-5-mini": Price(input=0.25, output=2.0),
    "gpt-4.1": Price(input=2.0, output=8.0),
    "gpt-4.1-mini": Price(input=0.4, output=1.6),
    "gpt-4o": Price(input=2.5, output=10.0),
    "gpt-4o-mini": Price(input=0.15, output=0.6),
}


class BatchConfig(Section):
    """The Batch API: answers within a day, for half the price.

    Attributes:
        requests: in one batch, at most.
        poll_seconds: between looks at a batch.
    """

    requests: int = Field(default=10_000, ge=1, le=50_000)
    poll_seconds: float = Field(default=60.0, gt=0)


class TeacherConfig(Section):
    """The teacher.

    Attributes:
        backend: `openai` (any OpenAI-compatible endpoint), `tutor` (the built-in teacher) or `file` (answers that exist already).
        model: the name that the endpoint knows the teacher by.
        base_url: the endpoint; null is OpenAI's own.
        api_key_env: the environment variable that holds the key.
        temperature: of the teacher's sampling.
        max_tokens: the longest answer; one that reaches it is marked as truncated.
        samples: answers to each prompt.
        concurrency: requests under way at once.
        requests_per_minute: at most so many are sent by all who collect with this cache; null is as many as the endpoint takes.
        tokens_per_minute: the same of tokens, prompts and answers together.
        max_cost: US dollars that all answers of the cache may cost together, whoever collects them; what a reply that was lost may
            have cost counts.
        price: US dollars per million tokens, for a model that the built-in table lacks.
        batch: `{}` asks through the Batch API, at half the price; null asks at once.
        timeout: seconds for one request, from connecting to the last byte.
        tries: times that a request is sent before its answer counts as failed.
        retry_wait: seconds before the second try; the wait doubles from try to try.
        path: with `backend: file`, the file (or folder, or data set) of the answers, which are those of `model`.
    """

    backend: Literal["openai", "tutor", "file"] = "openai"
    model: str = "gpt-5-chat"
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: int = Field(default=2048, ge=1)
    samples: int = Field(default=1, ge=1)
    concurrency: int = Field(default=16, ge=1, le=256)
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    max_cost: float = Field(default=20.0, ge=0)
    price: Price | None = None
    batch: BatchConfig | None = None
    timeout: float = Field(default=120.0, gt=0)
    tries: int = Field(default=6, ge=1)
    retry_wait: float = Field(default=1.0, ge=0)
    path: str | None = None

    _may_be_sent_to = field_validator("base_url")(partial(check_address, "teacher.base_url"))
    _is_no_key = field_validator("api_key_env")(partial(check_variable, "teacher.api_key_env"))

    @model_validator(mode="after")
    def _is_whole(self) -> "TeacherConfig":
        if self.backend == "file" and self.path is None:
            raise ValueError("backend: file needs `path`, the file of the teacher's answers")
        return self

    @property
    def address(self) -> str:
        """The endpoint, OpenAI's own where none is given."""
        return self.base_url or OPENAI

    @property
    def provider(self) -> str:
        """Where the answers come from, as the cache's keys say it: no port, no secret."""
        if self.backend != "openai" or self.base_url is None:
            return self.backend
        address = urlsplit(self.base_url)
        return f"openai:{address.hostname}{address.path.rstrip('/')}"

    @property
    def asked_model(self) -> str:
        """The model's name, as the cache's keys say it."""
        return "tutor" if self.backend == "tutor" else self.model
