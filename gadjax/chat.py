"""A conversation in the terminal with one stage of a run, or with two side by side, and the discriminator's score beside each answer."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text as Shown

from gadjax.completions import Ask, Piece
from gadjax.config import UNTOUCHED
from gadjax.errors import UserError
from gadjax.foreign import harmless
from gadjax.moderation import Flagged, Moderator, moderated, moderation_of
from gadjax.prepare import student_folder
from gadjax.records import Message
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.speaking import Room, Speaker, discriminator_of, scorer_of, speaker_of
from gadjax.terminal import say

NEW = "/new"
ENDS = {"length": "cut by its length", "content_filter": "withheld by the moderation"}
Wish = Callable[[list[Message]], Ask]


class Chat:
    """The conversations with each stage; they hear the same questions, and each its own answers.

    Args:
        speakers: by the names of their stages.
        console: where the answers are shown.
        wish: what is wanted of an answer.
        flagged: the moderation, by which no answer comes that it has not seen.
    """

    def __init__(self, speakers: Mapping[str, Speaker], console: Console, wish: Wish, flagged: Flagged | None = None):
        self._speakers, self._console, self._wish, self._flagged = speakers, console, wish, flagged
        self._heard: dict[str, list[Message]] = {name: [] for name in speakers}

    def begin_anew(self) -> None:
        """Forgets what was said."""
        for heard in self._heard.values():
            heard.clear()

    def answer(self, question: str) -> None:
        """Asks every stage and shows what they say, as they say it."""
        for name, speaker in self._speakers.items():
            heard = self._heard[name]
            heard.append({"role": "user", "content": question})
            while len(heard) > 1 and not speaker.fits(heard):
                del heard[:2]
                say(f"{name}: the conversation is too long; its first question and answer are forgotten")
        try:
            said = self._side_by_side() if self._console.is_terminal and len(self._speakers) > 1 else self._one_after_another()
        except UserError as mistake:
            said = {}
            say(str(mistake))
        for name, heard in self._heard.items():
            if said.get(name):
                heard.append({"role": "assistant", "content": said[name]})
            else:  # a conversation has no empty answers
                del heard[-1]

    def _pieces(self, name: str) -> Iterator[Piece]:
        complete = self._speakers[name].complete
        return (moderated(complete, self._flagged) if self._flagged else complete)(self._wish([*self._heard[name]]))

    def _one_after_another(self) -> dict[str, str]:
        said = {}
        for name in self._speakers:
            stream, pieces = self._pieces(name), list[Piece]()
            first = next(stream)  # a question that is refused leaves no name behind
            self._console.print(Shown(f"{name}: "), end="", style="bold")
            for piece in chain((first,), stream):
                pieces.append(piece)
                self._console.file.write(harmless(piece.text))  # as it is: nothing is markup, a tab stays a tab
                self._console.file.flush()
            said[name] = "".join(piece.text for piece in pieces)
            self._console.print(Shown(f"\n  {_verdict(pieces[-1])}", style="dim"))
        return said

    def _side_by_side(self) -> dict[str, str]:
        said, verdicts = dict.fromkeys(self._speakers, ""), dict.fromkeys(self._speakers, "")
        under_way = {name: self._pieces(name) for name in self._speakers}
        with Live(console=self._console, refresh_per_second=12) as shown:
            while under_way:
                for name in [*under_way]:
                    piece = next(under_way[name], None)
                    if piece is None:
                        del under_way[name]
                        continue
                    said[name] += piece.text
                    verdicts[name] = _verdict(piece) if piece.finish else ""
                shown.update(_columns(said, verdicts))
        return said


def _columns(said: Mapping[str, str], verdicts: Mapping[str, str]) -> Table:
    table = Table(expand=True)
    for name in said:
        table.add_column(Shown(name), ratio=1)
    table.add_row(*(Shown(harmless(text)) for text in said.values()))
    table.add_row(*(Shown(verdict, style="dim") for verdict in verdicts.values()))
    return table


def _verdict(last: Piece) -> str:
    """What stands beside an answer."""
    score = "" if last.score is None else f"score {last.score:+.3f}"
    return ", ".join(part for part in (score, ENDS.get(last.finish or "", "")) if part)


def chat(
    stage: str,
    against: str | None,
    temperature: float,
    seed: int | None,
    best_of: int,
    prompt_tokens: int | None,
    response_tokens: int | None,
    moderation: str | None = None,
) -> None:
    """Reads questions, a line each, until the end of the input or Ctrl-C.

    Raises:
        UserError: a stage is not trained, there is no discriminator to choose the best answer, or no key of the moderation.
    """
    run, name = Run.find(stage)
    moderator = Moderator(moderation_of(run.config.cleaning.moderation, moderation)) if moderation else None
    if against is not None and against != UNTOUCHED:
        _, against = Run.find(f"{run.folder}/{against}")
    session = Session.open(run, student_folder(run))
    room = Room(prompt_tokens=prompt_tokens, response_tokens=response_tokens, places=1, best_of=best_of)
    judge = discriminator_of(session, name)
    scorer = scorer_of(session, name, room) if judge or best_of > 1 else None

    def wish(messages: list[Message]) -> Ask:
        return Ask(messages=tuple(messages), temperature=temperature, seed=seed)

    with ExitStack() as stack:
        names = [name, *([against] if against and against != name else [])]
        speakers = {each: stack.enter_context(speaker_of(session, each, room, scorer)) for each in names}
        say(f"chat: {' and '.join(names)}" + (f"; scores are by the discriminator of {judge}" if judge else ""))
        say(f"chat: a line is a question; {NEW} begins anew, the end of the input (Ctrl-D) ends")
        flagged = stack.enter_context(moderator).flagged if moderator else None
        _converse(Chat(speakers, Console(highlight=False, soft_wrap=True), wish, flagged))


def _converse(chat: Chat) -> None:
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        while True:
            question = (input("> ") if asks else input()).strip()
            if question == NEW:
                chat.begin_anew()
            elif question:
                chat.answer(question)
    except (EOFError, KeyboardInterrupt):
        say("")
