"""Rollouts by another engine, before a loopback server that answers as vLLM does."""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gadjax.config import make_config
from gadjax.errors import UserError
from gadjax.models.checkpoint import FAMILIES, load
from gadjax.rollout.config import RemoteConfig
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.remote import Remote
from gadjax.types import Rollout
from tests.test_engine import NETWORK, params

PLAN = SamplingPlan(samples=3, response_tokens=4, temperature=0.8, end_of_turn=5, top_k=7)
PROMPTS = [(1, 2, 3), (4,)]
KEY = jax.random.key(0)
LIMITS = np.array([[4, 1, 2], [4, 4, 3]], np.int32)


class Fake:
    """A server. A sample is of its seed's length, and ends if that is less than its limit."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda choice: {"choices": [choice]}
        self.status, self.packed = 200, False

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((path, body))
        if path != "/v1/completions":
            return {}
        wanted = 1 + body["seed"] % 5
        ids = [body["prompt"][-1]] * (wanted - 1) + body["stop_token_ids"]
        ids, ended = ids[: body["max_tokens"]], wanted <= body["max_tokens"]
        logps = [-0.5 * (1 + place) for place in range(len(ids))]
        return self.change({"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": "stop" if ended else "length"})


@contextmanager
def listening(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            told = json.dumps(fake.answer(self.path, body)).encode()
            self.send_response(fake.status)
            if fake.packed:
                told = gzip.compress(told)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(told)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[Fake, Remote]]:
    made = Fake()
    with listening(made) as url:
        remote = Remote(NETWORK, PLAN, RemoteConfig(url=url, weights=tmp_path, model="student", connections=4, seconds=20.0))
        yield made, remote
        remote._client.close()


def sampled(remote: Remote, step: int = 0) -> Rollout:
    with jax.transfer_guard("disallow"):  # as in the training loop
        return remote.generate(PROMPTS, KEY, step, LIMITS)


def test_samples_are_what_the_server_says_and_carry_the_version(fake):
    server, remote = fake
    remote.update(params(), 7)
    made = sampled(remote)
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    assert len(asked) == 6 and len({body["seed"] for body in asked}) == 6
    assert all((body["temperature"], body["top_k"], body["stop_token_ids"]) == (0.8, 7, [5]) for body in asked)
    by_prompt = {tuple(prompt): sorted(body["max_tokens"] for body in asked if body["prompt"] == list(prompt)) for prompt in PROMPTS}
    assert by_prompt == {(1, 2, 3): [1, 2, 4], (4,): [3, 4, 4]}
    assert set(made.ended_BN.ravel().tolist()) == {True, False}
    np.testing.assert_array_equal(made.versions_BN, np.full((2, 3), 7))
    for group, sample in np.ndindex(2, 3):
        tokens, length, ended = made.tokens_BNR[group, sample], made.lengths_BN[group, sample], int(made.ended_BN[group, sample])
        assert ended or length == LIMITS[group, sample]
        content = [PROMPTS[group][-1]] * (length - ended) + [5] * ended
        np.testing.assert_array_equal(tokens, content + [0] * (4 - length))
        np.testing.assert_allclose(made.logps_BNR[group, sample], [-0.5, -1.0, -1.5, -2.0][:length] + [0.0] * (4 - length))


def test_a_sample_s_stream_depends_on_key_step_group_and_sample_alone(fake):
    server, remote = fake

    def seeds(step: int) -> dict[tuple[int, ...], list[int]]:
        server.asked.clear()
        sampled(remote, step)
        return {prompt: sorted(body["seed"] for _, body in server.asked if tuple(body["prompt"]) == prompt) for prompt in PROMPTS}

    first = seeds(0)
    assert seeds(0) == first and not set(first[1, 2, 3]) & set(seeds(1)[1, 2, 3])


def test_weights_are_replaced_in_the_server_s_folder_and_then_read(fake, tmp_path):
    server, remote = fake
    for old in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (tmp_path / old).write_text("old")
    student = params()
    with jax.transfer_guard("disallow"):  # as in the training loop
        remote.update(student, 1)
    assert [path for path, _ in server.asked] == ["/collective_rpc", "/reset_prefix_cache"]
    assert server.asked[0][1] == {"method": "reload_weights"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    there = load_file(tmp_path / "model.safetensors")
    assert there["model.embed_tokens.weight"].shape == (24, 16)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), NETWORK.shapes)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, FAMILIES["qwen2"], shapes), params())


def faults() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "no ids": lambda choice: {"choices": [choice | {"token_ids": None}]},
        "no log-probabilities": lambda choice: {"choices": [choice | {"logprobs": None}]},
        "two samples": lambda choice: {"choices": [choice, choice]},
        "an end in the middle": lambda choice: {"choices": [choice | {"token_ids": [5, *choice["token_ids"][1:], 5]}]},
        "no end": lambda choice: {"choices": [choice | {"token_ids": [9] * len(choice["token_ids"]), "finish_reason": "stop"}]},
        "too long": lambda choice: {"choices": [choice | {"token_ids": [9] * 9, "logprobs": {"token_logprobs": [0.0] * 9}}]},
        "nothing": lambda choice: {"choices": [choice | {"token_ids": [], "logprobs": {"token_logprobs": []}}]},
    }


@pytest.mark.parametrize("fault", faults())
def test_what_a_server_says_wrong_is_told_in_one_line(fake, fault):
    server, remote = fake
    server.change = faults()[fault]
    with pytest.raises(UserError, match=r"^rollout\.remote\.url: [^\n]+; [^\n]+$"):
        sampled(remote)


def test_a_reply_is_read_up_to_its_cap_and_is_not_unpacked(fake, monkeypatch):
    server, remote = fake
    read, whole = list[int](), remote._client.post
    monkeypatch.setattr(remote._client, "post", lambda *a, **k: (reply := whole(*a, **k), read.append(len(reply.content)))[0])
    server.change = lambda choice: {"choices": [choice], "more": "x" * 2**22}
    with pytest.raises(UserError, match=r"^rollout\.remote\.url: a reply of http://127\.0\.0\.1:\d+ has more than 1052672 bytes; "):
        sampled(remote)
    assert set(read) == {2**20 + 4 * 1024 + 1}
    assert len(server.asked) <= 6, "nothing is asked again"
    server.packed = True
    with pytest.raises(UserError, match="the reply has no token ids"):
        sampled(remote)


def test_a_server_that_refuses_or_is_not_there_is_told_in_one_line(fake, monkeypatch):
    server, remote = fake
    server.status = 404
    with pytest.raises(UserError, match=r"^rollout\.remote\.url: http://127\.0\.0\.1:\d+ does not answer as it should \(NotFoundError\)"):
        remote.update(params(), 1)
    nobody = RemoteConfig(url="http://127.0.0.1:9", weights=remote._config.weights, seconds=5.0)
    monkeypatch.setattr("gadjax.rollout.remote.TRIES", 0)
    with pytest.raises(UserError, match="APIConnectionError"):
        Remote(NETWORK, PLAN, nobody).generate(PROMPTS, KEY, 0)
    with pytest.raises(UserError, match=r"rollout\.remote\.weights: .* is no folder"):
        Remote(NETWORK, PLAN, nobody.model_copy(update={"weights": Path("nowhere")})).update(params(), 0)


def test_a_config_chooses_it_and_must_weigh_its_samples():
    rollout = {"backend": "remote", "remote": {"url": "http://127.0.0.1:8000", "weights": "served"}}
    with pytest.raises(UserError, match=r"stages\.gad\.importance_cap"):
        make_config({"rollout": rollout})
    stages = {"gad": {"algorithm": "gad", "from": "student", "importance_cap": 2.0}}
    assert make_config({"rollout": rollout, "stages": stages}).rollout.backend == "remote"
    for half in ({"backend": "remote"}, {"remote": rollout["remote"]}):
        with pytest.raises(UserError, match="belong together"):
            make_config({"rollout": half})
