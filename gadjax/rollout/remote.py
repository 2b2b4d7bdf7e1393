"""Rollouts by another engine: a vLLM server that answers token ids with token ids, and reads the student's weights from a folder.

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs

It must be trusted, and trust us: the development mode lets anybody who reaches the port reload its weights. Its log-probabilities
come from other kernels, and from other words where top-k or top-p leave some out, so training weighs the samples.

Letters: B groups, N samples of each, R response tokens.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import httpx2
import jax
import numpy as np
from openai import APIError, OpenAI
from pydantic import BaseModel, ConfigDict, ValidationError

from gadjax.errors import UserError
from gadjax.models.adapters import folded
from gadjax.models.checkpoint import family_of, save_tensors
from gadjax.models.decoder import Network
from gadjax.rollout.config import RemoteConfig
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.sampling import stream_keys
from gadjax.types import Params, Rollout

WHERE = "rollout.remote"
TRIES = 5
REPLY_BYTES, TOKEN_BYTES = 2**20, 1024  # of a reply, at most: what surrounds a response (the prompt's ids, too), and each of its tokens
BESIDE = ".gadjax"  # in the folder, while weights are being written


class _Logprobs(BaseModel):
    model_config = ConfigDict(strict=True)
    token_logprobs: list[float]


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: Literal["stop", "length"]


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)
    choices: list[_Choice]


class Remote:
    """A `RolloutBackend`; for one process. A sample's seed depends on (key, step, group, sample) alone."""

    exact = False

    def __init__(self, network: Network, plan: SamplingPlan, config: RemoteConfig):
        if jax.process_count() > 1:
            raise UserError("rollout.backend", "a remote one serves a single process", "run on one host, or set it to ours")
        self._network, self._plan, self._config, self._version = network, plan, config, 0
        self._root = config.url.rstrip("/")
        local = (urlsplit(self._root).hostname or "") in ("127.0.0.1", "localhost", "::1")
        self._most = REPLY_BYTES + TOKEN_BYTES * plan.response_tokens
        headers, hooks = {"Accept-Encoding": "identity"}, {"response": [self._guard]}
        self._http = httpx2.Client(timeout=config.seconds, follow_redirects=False, trust_env=not local, headers=headers, event_hooks=hooks)
        key = os.environ.get(config.api_key_env, "").strip() or "none"
        self._client = OpenAI(api_key=key, base_url=f"{self._root}/v1", max_retries=TRIES, http_client=self._http)

    def update(self, params: Params, step: int) -> None:
        """See `RolloutBackend`. Writes the weights into the server's folder and has it read them.

        Raises:
            UserError: there is no such folder, or the server does not take them.
        """
        folder = self._config.weights
        if not folder.is_dir():
            raise UserError(f"{WHERE}.weights", f"{folder} is no folder", "name the one that vllm serve was started with")
        beside = folder / BESIDE
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        trunk = self._network.bind(self._network.shapes).trunk
        with jax.transfer_guard("allow"):  # the training loop allows none; here the weights are meant to leave the devices
            save_tensors(beside, family_of(trunk.config), folded(params, trunk.config.adapters), trunk.dtype)
        for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            old.unlink()
        for new in beside.iterdir():
            new.replace(folder / new.name)
        beside.rmdir()
        self._ask(f"{self._root}/collective_rpc", {"method": "reload_weights"})
        self._ask(f"{self._root}/reset_prefix_cache", {})
        self._version = step

    def generate(self, prompts: Sequence[Sequence[int]], key: jax.Array, step: int, limits_BN: np.ndarray | None = None) -> Rollout:
        """See `RolloutBackend`.

        Raises:
            UserError: the server does not answer, or not as it should.
        """
        plan, shape = self._plan, (len(prompts), self._plan.samples)
        with jax.transfer_guard("allow"):  # a number for each request
            keys_BN = stream_keys(jax.random.fold_in(key, step), *shape)
            seeds_BN = np.asarray(jax.device_get(jax.random.key_data(keys_BN)), np.uint64)
        seeds_BN = (seeds_BN[..., 0] << np.uint64(31)) ^ seeds_BN[..., 1]
        limits = np.full(shape, plan.response_tokens)
        limits = limits if limits_BN is None else np.minimum(limits_BN, limits)

        def ask(index: tuple[int, ...]) -> _Choice:
            return self._sampled(prompts[index[0]], int(seeds_BN[index]), int(limits[index]))

        with ThreadPoolExecutor(self._config.connections) as pool:
            choices = list(pool.map(ask, np.ndindex(shape)))
        tokens, logps = np.zeros((len(choices), plan.response_tokens), np.int32), np.zeros((len(choices), plan.response_tokens), np.float32)
        for row, choice in enumerate(choices):
            tokens[row, : len(choice.token_ids)] = choice.token_ids
            logps[row, : len(choice.token_ids)] = choice.logprobs.token_logprobs
        lengths = np.array([len(choice.token_ids) for choice in choices], np.int32).reshape(shape)
        ended = np.array([choice.finish_reason == "stop" for choice in choices]).reshape(shape)
        versions = np.full(shape, self._version, np.int32)
        made: Any = (tokens.reshape(*shape, -1), logps.reshape(*shape, -1), lengths, ended, versions)
        return Rollout(*made)

    def _sampled(self, prompt: Sequence[int], seed: int, limit: int) -> _Choice:
        plan = self._plan
        body = {
            "model": self._config.model or str(self._config.weights),
            "prompt": list(prompt),
            "max_tokens": limit,
            "temperature": plan.temperature,
            "top_k": plan.top_k or 0,
            "top_p": plan.top_p,
            "seed": seed,
            "stop_token_ids": [plan.end_of_turn],
            "logprobs": 0,
            "return_token_ids": True,
        }
        try:
            (choice,) = _Reply.model_validate_json(self._ask("/completions", body)).choices
        except (ValidationError, ValueError) as error:
            mend = "start a vLLM that knows return_token_ids"
            raise UserError(f"{WHERE}.url", "the reply has no token ids and log-probabilities of one sample", mend) from error
        ids, ended = choice.token_ids, choice.finish_reason == "stop"
        whole = 0 < len(ids) == len(choice.logprobs.token_logprobs) <= limit
        if not whole or plan.end_of_turn in ids[:-1] or (ids[-1] == plan.end_of_turn) != ended:
            raise UserError(f"{WHERE}.url", "a response does not go up to its end of turn, or to its limit", "serve this student")
        return choice

    def _ask(self, address: str, body: dict[str, Any]) -> bytes:
        try:
            content = self._client.post(address, cast_to=httpx2.Response, body=body).content
        except APIError as error:
            what = f"{self._root} does not answer as it should ({type(error).__name__})"
            raise UserError(f"{WHERE}.url", what, "see what the server says; the same command goes on from the last checkpoint") from error
        if len(content) > self._most:
            raise UserError(f"{WHERE}.url", f"a reply of {self._root} has more than {self._most} bytes", "see what is listening there")
        return content

    def _guard(self, response: httpx2.Response) -> None:
        """Before a reply's body is read: nothing is unpacked that was not asked for packed, and nothing is read beyond the cap."""
        response.headers.pop("Content-Encoding", None)
        response.stream = _Capped(cast(httpx2.SyncByteStream, response.stream), self._most + 1)


class _Capped(httpx2.SyncByteStream):
    """The first `most` bytes of a reply. Told by their number: an error here would be taken for the network's, and tried again."""

    def __init__(self, stream: httpx2.SyncByteStream, most: int):
        self._stream, self._most = stream, most

    def __iter__(self) -> Iterator[bytes]:
        left = self._most
        for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    def close(self) -> None:
        self._stream.close()
