"""A student that answers conversations: several at once, text as it comes, and the discriminator's opinion of what was said."""

import hashlib
import queue
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.completions import Ask, Finish, Piece, Token
from gadjax.config import stage_of
from gadjax.data.config import DataConfig
from gadjax.errors import UserError
from gadjax.records import Message
from gadjax.rollout.live import Heard, Live, Wish
from gadjax.scoring import Scorer, best
from gadjax.session import Session
from gadjax.text import PromptTooLong, Text

COLD = 1e-3  # a temperature below is greedy: logits over it would not be finite
PART_OF_A_CHARACTER = "\ufffd"  # what bytes without the rest of their character decode to


class Utterance:
    """One answer as text: whole characters only, nothing from a stop string on, and nothing that may be the beginning of one."""

    def __init__(self, text: Text, ask: Ask, choice: int, prompt_tokens: int):
        self.ids: list[int] = []
        self._text, self._stop, self._tells, self._choice, self._prompt_tokens = text, ask.stop, ask.top, choice, prompt_tokens
        self._undecoded: list[int] = []
        self._held = ""  # decoded and not said yet
        self._decoded = 0  # characters of the whole answer
        self._tokens: list[tuple[int, Token]] = []  # not said yet, and where in the answer they begin
        self._cost = 0  # tokens since the last piece

    def hear(self, heard: Heard) -> Piece | None:
        """What can be said of it now; None: nothing yet."""
        self.ids += heard.tokens
        self._cost += len(heard.tokens)
        for token, log_prob, top in zip(heard.tokens, heard.logps, heard.top, strict=True):
            if token == self._text.end_of_turn:
                break
            if self._tells is not None:
                likeliest = tuple((self._text.decode([other]), value) for other, value in top[: self._tells])
                self._tokens.append((self._decoded, Token(self._text.decode([token]), log_prob, likeliest)))
            self._undecoded.append(token)
            self._decode(whole=False)
        if heard.ended is not None:
            self._decode(whole=True)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return self._say(min(found), "stop")
        return self._say(len(self._held) if heard.ended else len(self._held) - self._begun_stop(), heard.ended)

    def _decode(self, whole: bool) -> None:
        text = self._text.decode(self._undecoded)
        if whole or not text.endswith(PART_OF_A_CHARACTER):
            self._held, self._decoded, self._undecoded = self._held + text, self._decoded + len(text), []

    def _begun_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        sizes = (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return max(sizes, default=0)

    def _say(self, count: int, finish: Finish | None) -> Piece | None:
        if not (count or finish):
            return None
        end, whole = self._decoded - len(self._held) + count, finish and count == len(self._held)
        said, self._held = self._held[:count], self._held[count:]
        tokens = tuple(token for start, token in self._tokens if start < end or whole)  # at the end, with those that have no text
        self._tokens = [(start, token) for start, token in self._tokens if start >= end]
        cost, self._cost = self._cost, 0
        return Piece(
            choice=self._choice,
            text=said,
            tokens=tokens,
            finish=finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=cost,
        )


@dataclass
class _Talk:
    """An `Ask` under way: what the decoder's thread has for it, and the answers that are wanted no longer."""

    heard: "queue.SimpleQueue[tuple[int, Heard] | BaseException]" = field(default_factory=queue.SimpleQueue)
    over: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Job:
    """A prompt for one place, and the first of the answers to it."""

    talk: _Talk
    prompt: tuple[int, ...]
    first: int
    wishes: Sequence[Wish]


class Speaker:
    """Answers conversations between `start` and `stop`, or within a `with` block. A thread of its own decodes for all of them.

    Args:
        live: the student's places and slots.
        text: its tokenizer.
        prompt_tokens: P.
        scorer: the discriminator, where its opinion is wanted.
        best_of: so many answers are sampled where fewer are asked for, and the discriminator's favourites are given.
    """

    def __init__(self, live: Live, text: Text, prompt_tokens: int, scorer: Scorer | None = None, best_of: int = 1):
        self._live, self._text, self._prompt_tokens, self._scorer, self._best_of = live, text, prompt_tokens, scorer, best_of
        self._wake = threading.Condition()
        self._waiting: list[_Job] = []
        self._owners: dict[int, tuple[_Talk, int]] = {}  # by slot; the thread's own
        self._stopped = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="gadjax-speaker", daemon=True)

    def complete(self, ask: Ask) -> Generator[Piece, None, None]:
        """A `gadjax.completions.Complete`.

        Raises:
            UserError: the conversation has more than P tokens.
        """
        prompt, count = self._prompt(ask), max(ask.n, self._best_of)
        utterances = [Utterance(self._text, ask, choice, len(prompt)) for choice in range(count)]
        pieces = self._pieces(ask, prompt, utterances)
        if self._best_of > 1:
            yield from self._favourites(ask.n, prompt, utterances, list(pieces))
            return
        for piece in pieces:
            yield replace(piece, score=self._scores(prompt, [utterances[piece.choice]])[0]) if piece.finish and self._scorer else piece

    def _favourites(self, count: int, prompt: tuple[int, ...], utterances: Sequence[Utterance], pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The whole answers that the discriminator likes best, a piece each."""
        scores = self._scores(prompt, utterances)
        for choice, favourite in enumerate(best(scores)[:count]):
            own = [piece for piece in pieces if piece.choice == favourite]
            yield replace(
                own[-1],
                choice=choice,
                text="".join(piece.text for piece in own),
                tokens=tuple(token for piece in own for token in piece.tokens),
                completion_tokens=sum(piece.completion_tokens for piece in own),
                score=scores[favourite],
            )

    def _scores(self, prompt: tuple[int, ...], utterances: Sequence[Utterance]) -> list[float]:
        assert self._scorer is not None
        return self._scorer([prompt], [[tuple(utterance.ids) for utterance in utterances]])[0]

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation has no more than P tokens."""
        try:
            return not self._text.fitted_prompt(messages, self._prompt_tokens)[1]
        except PromptTooLong:
            return False

    def _prompt(self, ask: Ask) -> tuple[int, ...]:
        if not self.fits(ask.messages):
            raise UserError("messages", f"have more than {self._prompt_tokens} tokens", "shorten them, or start with more --prompt-tokens")
        return self._text.prompt_ids(ask.messages, self._prompt_tokens)

    def _pieces(self, ask: Ask, prompt: tuple[int, ...], utterances: Sequence[Utterance]) -> Iterator[Piece]:
        """The pieces of all answers as they come."""
        talk = self._begin(ask, prompt, len(utterances))
        try:
            open_answers = set(range(len(utterances)))
            while open_answers:
                found = talk.heard.get()
                if isinstance(found, BaseException):
                    raise RuntimeError("the decoder failed") from found
                choice, heard = found
                if choice not in open_answers:
                    continue
                if (piece := utterances[choice].hear(heard)) is None:
                    continue
                if piece.finish:
                    open_answers.remove(choice)
                    talk.over.add(choice)
                yield piece
        finally:
            talk.over |= set(range(len(utterances)))

    def _begin(self, ask: Ask, prompt: tuple[int, ...], count: int) -> _Talk:
        talk, seed, together = _Talk(), secrets.randbits(64) if ask.seed is None else ask.seed, self._live.samples
        temperature = ask.temperature if ask.temperature >= COLD else 0.0
        limit = min(ask.max_tokens or self._live.response_tokens, self._live.response_tokens)
        wishes = [
            Wish(key=_stream(seed, choice), temperature=temperature, top_p=ask.top_p, limit=limit, tells=bool(ask.top))
            for choice in range(count)
        ]
        with self._wake:
            if self._stopped:
                raise RuntimeError("the decoder has ended") from self._fault
            self._waiting += [_Job(talk, prompt, first, wishes[first : first + together]) for first in range(0, count, together)]
            self._wake.notify()
        return talk

    def _work(self) -> None:
        """The decoder's thread."""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopped or self._waiting or self._live.going)
                    if self._stopped:
                        break
                    self._admit()
                for slot, heard in self._live.hear().items():
                    talk, choice = self._owners[slot]
                    talk.heard.put((choice, heard))
                    if choice in talk.over:
                        self._live.drop(slot)
        except BaseException as error:  # told to those who wait, in their own threads
            self._fault = error
        with self._wake:
            self._stopped = True
            talks = [*(job.talk for job in self._waiting), *(talk for talk, _ in self._owners.values())]
        for talk in talks:
            talk.heard.put(self._fault or RuntimeError("stopped"))

    def _admit(self) -> None:
        """Gives the free places to those who wait."""
        together = self._live.samples
        for place in range(self._live.places):
            while self._waiting and self._waiting[0].first in self._waiting[0].talk.over:
                del self._waiting[0]  # the client has gone
            if self._waiting and self._live.is_free(place):
                job = self._waiting.pop(0)
                self._live.admit(place, job.prompt, job.wishes)
                self._owners |= {place * together + n: (job.talk, job.first + n) for n in range(len(job.wishes))}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread; answers that are under way fail."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()


def _stream(seed: int, choice: int) -> tuple[int, int]:
    """The random stream of an answer."""
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much a speaker has room for.

    Attributes:
        prompt_tokens, response_tokens: the longest conversation and answer; by default the run's.
        places: conversations at once.
        best_of: answers sampled for each that is given.
    """

    prompt_tokens: int | None = None
    response_tokens: int | None = None
    places: int = 8
    best_of: int = 1

    def data(self, data: DataConfig) -> DataConfig:
        """The run's lengths with these in their place."""
        if self.prompt_tokens is None and self.response_tokens is None:
            return data
        lengths = (self.prompt_tokens or data.max_prompt_tokens, self.response_tokens or data.max_response_tokens)
        return DataConfig(max_prompt_tokens=lengths[0], max_response_tokens=lengths[1])


def discriminator_of(session: Session, stage: str) -> str | None:
    """The stage whose discriminator judges the answers of `stage`: its own, else that of the run's last trained stage that has one."""
    stages = session.run.config.stages
    others = [name for name in reversed(stages) if session.run.begun(name)]
    return next((name for name in (stage_of(stage), *others) if isinstance(stages.get(name), SamplingStageConfig)), None)


def scorer_of(session: Session, stage: str, room: Room) -> Scorer:
    """The discriminator that judges the answers of `stage`.

    Raises:
        UserError: no trained stage of the run has one.
    """
    judge = discriminator_of(session, stage)
    if judge is None:
        raise UserError(str(session.run.folder), "no trained stage has a discriminator", "train a stage of algorithm warmup or gad")
    params = session.final_role(judge, "discriminator").params
    return Scorer(session.models_of(judge), params, room.data(session.run.config.data), responses=room.best_of)


def speaker_of(session: Session, stage: str, room: Room, scorer: Scorer | None) -> Speaker:
    """The student of a stage, ready to speak: what can be compiled before a request comes is."""
    data = room.data(session.run.config.data)
    live = Live(
        session.models.student,
        session.models.mesh,
        session.models.whole(session.models.student, session.student_params(stage)),
        session.text.end_of_turn,
        lengths=(data.max_prompt_tokens, data.max_response_tokens),
        places=room.places,
        samples=room.best_of,
    )
    live.admit(0, [session.text.end_of_turn], [Wish(key=(0, 0), temperature=0.0, top_p=1.0, limit=1)])
    live.hear()
    return Speaker(live, session.text, data.max_prompt_tokens, scorer, room.best_of)
