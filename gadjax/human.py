"""`gadjax judge --human RUN`: people vote on pairs of answers, in a page that this machine serves to itself."""

import http
import json
import math
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from gadjax.config import UNTOUCHED, stage_of
from gadjax.errors import UserError
from gadjax.evaluate import HELD_OUT, evaluation_folder
from gadjax.evaluation.answers import read_answers
from gadjax.evaluation.ballots import BallotBox, Choice, Pair, Result, count, in_order
from gadjax.files import replace_file, to_csv, to_json
from gadjax.foreign import harmless
from gadjax.runs import Run
from gadjax.terminal import say

TEACHER = "teacher"  # for the stage that is compared with
HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("human.html").read_text(encoding="utf-8")
MAX_BODY = 4096  # bytes
VOTES = "human.sqlite"


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", str_strip_whitespace=True)
    annotator: Annotated[str, StringConstraints(min_length=1, max_length=60)]


class _Next(_Message):
    pass


class _Back(_Message):
    pass


class _Vote(_Message):
    pair: str
    choice: Literal["left", "right", "tie"]


def pairs_of(run: Run, stage: str, against: str, split: str = HELD_OUT) -> list[Pair]:
    """A stage's greedy answers to a split's prompts, each with another's.

    Args:
        run: it was evaluated.
        stage: of the run.
        against: `teacher`, `student`, or another stage.
        split: `validation`, or a test set.

    Raises:
        UserError: one of them is unknown or has no answers, or there is nothing to choose between.
    """
    known = [HELD_OUT, *run.config.prompts.tests]
    if split not in known:
        raise UserError("--split", f"{split!r} is no split that is evaluated", f"use {' or '.join(known)}")
    stages = [TEACHER, UNTOUCHED, *run.config.stages]
    if against != TEACHER and stage_of(against) not in stages:
        raise UserError("--against", f"{against!r} is no stage of the run", f"use {' or '.join(stages)}, and --split for a test set")
    folder = evaluation_folder(run, split)
    answers = read_answers(folder / f"{stage}.jsonl")["greedy"]
    texts = answers.teacher
    if against != TEACHER:
        other = read_answers(folder / f"{against}.jsonl")["greedy"]
        found = dict(zip(other.ids, other.texts, strict=True))
        if missing := {*answers.ids} - found.keys():
            what = f"has no answer to {len(missing)} of the prompts that {stage} answered"
            raise UserError(against, what, "run `gadjax evaluate`, so that both are evaluated on the same data")
        texts = tuple(found[name] for name in answers.ids)
    pairs = {prompt.id: Pair(prompt, ours, theirs) for prompt, ours, theirs in zip(answers.prompts, answers.texts, texts, strict=True)}
    if all(pair.same for pair in pairs.values()):
        raise UserError(stage, f"answers as {against} does, word for word", "compare it with another stage")
    return list(pairs.values())


class Poll:
    """The pairs and their votes: what the page asks for. Nobody is asked to choose between equals."""

    def __init__(self, pairs: Sequence[Pair], box: BallotBox):
        self._pairs = {pair.key: pair for pair in in_order(pairs) if not pair.same}
        self.total, self._all, self._box, self._lock = len(self._pairs), pairs, box, threading.Lock()
        self.actions: Mapping[str, tuple[type[_Message], Callable[[Any], None]]] = {
            "/next": (_Next, lambda _: None),
            "/vote": (_Vote, self._vote),
            "/back": (_Back, lambda message: box.take_back(message.annotator, self._pairs)),
        }

    def do(self, path: str, content: bytes) -> dict[str, Any]:
        """One action, and what the annotator sees next.

        Raises:
            ValueError: the request is none.
        """
        kind, act = self.actions[path]
        message = kind.model_validate_json(content)
        with self._lock:
            act(message)
            return self._next(message.annotator)

    def _vote(self, message: _Vote) -> None:
        if message.pair not in self._pairs:
            raise ValueError("there is no such pair")
        choice: Choice = message.choice
        self._box.cast(message.pair, message.annotator, self._pairs[message.pair].vote(message.annotator, choice))

    def _next(self, annotator: str) -> dict[str, Any]:
        done = {vote.pair for vote in self._box.votes(self._pairs) if vote.annotator == annotator}
        first = next((pair for key, pair in self._pairs.items() if key not in done), None)
        return {"ballot": first and first.ballot(annotator), "done": len(done), "total": self.total}

    def result(self) -> Result | None:
        """What came out so far."""
        with self._lock:
            return count(self._box.votes(self._pairs), self._all)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, poll: Poll):
        self.poll = poll
        super().__init__((HOST, port), _Handler)
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: _Listener  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self._is_for_us() and self.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
            self._send(http.HTTPStatus.OK, "text/html; charset=utf-8", PAGE.replace("NONCE", nonce), policy)
        else:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_for_us() or self.path not in self.server.poll.actions:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is no such page")
        elif self.headers.get_content_type() != "application/json":  # what another site's form could send
            self._refuse(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request is not JSON")
        elif not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY:
            self._refuse(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MAX_BODY} bytes")
        else:
            try:
                self._send(http.HTTPStatus.OK, "application/json", json.dumps(self.server.poll.do(self.path, self.rfile.read(int(length)))))
            except ValidationError:
                self._refuse(http.HTTPStatus.BAD_REQUEST, "the request has not the fields that it should have")
            except ValueError as error:
                self._refuse(http.HTTPStatus.BAD_REQUEST, str(error))

    def _is_for_us(self) -> bool:
        """Not under another name, by which a site could make a browser read this page for it."""
        return self.headers.get("Host") in self.server.names

    def _refuse(self, status: http.HTTPStatus, reason: str) -> None:
        self._send(status, "application/json", json.dumps({"error": reason}))

    def _send(self, status: http.HTTPStatus, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the terminal is for results."""


def judge_by_people(place: str, against: str, split: str, port: int, results: bool, as_json: bool) -> None:
    """Serves the page until Ctrl-C, then tells what came out; or only tells it.

    Args:
        place: `RUN` or `RUN/STAGE`.
        against: `teacher`, or another stage of the run.
        split: `validation`, or a test set.
        port: 0 takes a free one.
        results: only what came out so far.
        as_json: that as one JSON object on stdout.

    Raises:
        UserError: there are no answers, or the port is taken.
    """
    run, stage = Run.find(place)
    pairs = pairs_of(run, stage, against, split)
    with BallotBox(run.folder / "evaluation" / VOTES) as box:
        if not results:
            _serve(Poll(pairs, box), port)
        votes = box.votes(pair.key for pair in pairs)
    table = evaluation_folder(run, split) / f"human_{stage}_{against}.csv"
    replace_file(table, to_csv(("pair", "annotator", "vote"), votes))
    result = count(votes, pairs)
    _tell(result, stage, against, table)
    if as_json:
        print(to_json(asdict(result) if result else None))


def _serve(poll: Poll, port: int) -> None:
    try:
        listener = _Listener(port, poll)
    except OSError as error:
        raise UserError("--port", f"{HOST}:{port} cannot be listened at ({error.strerror})", "name another port") from error
    with listener:
        where = f"http://{HOST}:{listener.server_port}/"
        say(f"judge: {poll.total} pairs at {where}, for any number of people; Ctrl-C ends it, nothing is lost")
        try:
            listener.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass


def _tell(result: Result | None, stage: str, against: str, table: Path) -> None:
    if result is None:
        say("judge: there are no votes yet")
        return
    wins, counts = result.wins, result.counts
    interval = f"{wins.mean:.1%}" + ("" if math.isnan(wins.low) else f" [{wins.low:.1%}, {wins.high:.1%}]")
    say(f"judge: {stage} is better than {against} on {interval} of the prompts, a tie counting one half")
    if result.same:
        say(f"  prompts with twice the same answer: {result.same}, ties that nobody was asked for, in proportion to the others voted on")
    say(f"  votes: {counts['stage']} for {stage}, {counts['other']} for {against}, {counts['tie']} ties")
    for name, (share, number) in result.by_annotator.items():
        say(f"  {harmless(name)}: {share:.1%} of {number}")
    if result.agreement is not None:
        shown = "" if result.alpha is None else f", Krippendorff's alpha {result.alpha:.2f}"
        say(f"  annotators agree on {result.agreement:.1%} of the pairs of votes{shown}")
    say(f"judge: every vote is in {table}")
