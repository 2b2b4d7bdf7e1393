"""The chat in the terminal: through pipes and through a terminal, with hostile answers, one stage or two."""

import io
import os
import pty
import re
import threading
from collections.abc import Generator

import pytest
from rich.console import Console

from gadjax import cli
from gadjax.chat import Chat
from gadjax.completions import Ask, Piece
from gadjax.errors import UserError
from gadjax.foreign import harmless
from tests import tiny

HOSTILE = "a\x1b[2Jb\x07\r\x9b5n\u202e\x00\x7f 漢字\n\tz"
SHOWN = "a␛[2Jb␇␍\ufffd5n\ufffd␀␡ 漢字\n\tz"


def test_foreign_text_is_harmless():
    assert harmless(HOSTILE) == SHOWN
    assert harmless("[bold]x[/bold] é 🙂 \ud800") == "[bold]x[/bold] é 🙂 \ufffd"


class Parrot:
    """Speaks like a `Speaker`; remembers what it was asked, and has room for three messages."""

    def __init__(self, answer: str):
        self.answer, self.asked = answer, list[Ask]()

    def fits(self, messages: list[dict[str, str]]) -> bool:
        return len(messages) <= 3

    def complete(self, ask: Ask) -> Generator[Piece, None, None]:
        self.asked.append(ask)
        for character in self.answer:
            yield Piece(text=character, prompt_tokens=1, completion_tokens=1)
        yield Piece(text="", finish="length", prompt_tokens=1, completion_tokens=0, score=-1.25)


def talk(console: Console, questions: list[str], **parrots: Parrot) -> Chat:
    chat = Chat(parrots, console, lambda messages: Ask(messages=tuple(messages)))  # type: ignore[arg-type]
    for question in questions:
        chat.answer(question)
    return chat


def test_answers_are_shown_with_their_scores_and_nothing_reaches_the_terminal():
    out = io.StringIO()
    talk(Console(file=out, highlight=False, soft_wrap=True), ["hi"], gad=Parrot(HOSTILE))
    assert out.getvalue() == f"gad: {SHOWN}\n  score -1.250, cut by its length\n"


def test_a_question_that_is_refused_leaves_no_name_behind(capsys: pytest.CaptureFixture[str]):
    class Refusing(Parrot):
        def complete(self, ask: Ask) -> Generator[Piece, None, None]:
            raise UserError("messages", "have more than 16 tokens", "shorten them")
            yield

    out = io.StringIO()
    talk(Console(file=out), ["hi"], gad=Refusing(""))
    assert out.getvalue() == ""
    assert "have more than 16 tokens" in capsys.readouterr().err


def test_two_stages_stand_side_by_side_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, highlight=False)
    talk(console, ["hi"], gad=Parrot("left\x1b]0;title\x07[red]"), seqkd=Parrot("right"))
    assert re.search(r"left␛\]0;title␇\[red\] +│ right", out.getvalue())
    assert not re.search(r"\x1b\]|\x07", out.getvalue())
    assert re.search(r"[┃│] gad +[┃│] seqkd", re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()))
    assert len(re.findall(r"score -1\.250", out.getvalue().rpartition("score")[0])) >= 1


def test_each_stage_hears_its_own_answers_and_old_ones_are_forgotten(capsys: pytest.CaptureFixture[str]):
    left, right, silent = Parrot("l"), Parrot("r"), Parrot("")
    chat = talk(Console(file=io.StringIO()), ["one", "two", "three"], left=left, right=right, silent=silent)
    said = [[(message["role"], message["content"]) for message in ask.messages] for ask in left.asked]
    assert said == [
        [("user", "one")],
        [("user", "one"), ("assistant", "l"), ("user", "two")],
        [("user", "two"), ("assistant", "l"), ("user", "three")],
    ]
    assert right.asked[1].messages[1]["content"] == "r"
    assert [len(ask.messages) for ask in silent.asked] == [1, 1, 1], "an empty answer is no turn"
    chat.begin_anew()
    chat.answer("four")
    assert len(left.asked[-1].messages) == 1


@pytest.mark.timeout(600)  # it may wait for a whole run
def test_a_trained_stage_talks_in_a_terminal(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    ours, theirs = pty.openpty()
    shown = list[bytes]()

    def listen() -> None:
        while b"(the end)" not in b"".join(shown[-3:]):
            shown.append(os.read(ours, 4096))

    with open(theirs, encoding="utf-8") as read, open(os.dup(theirs), "w", encoding="utf-8") as write:
        monkeypatch.setattr("sys.stdin", read)
        monkeypatch.setattr("sys.stdout", write)
        listener = threading.Thread(target=listen)
        listener.start()
        os.write(ours, b"Ben asks Olga for two pints\n/new\nagain\n\x04")
        arguments = ["chat", str(experiment.run / "gad"), "--against", "student", "--seed", "1", "--best-of", "2"]
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--prompt-tokens", "64"])
        write.write("(the end)")
        write.flush()
        listener.join(10)
    os.close(ours)
    assert stop.value.code == 0
    text = b"".join(shown).decode(errors="replace")
    assert len(re.findall(r"score [+-]\d+\.\d{3}", text)) >= 4
    assert re.search(r"[┃│] gad +[┃│] student", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["nowhere/gad"], "is no run"), (["tiny/mad"], "has no stage mad"), (["tiny/gad", "--against", "mad"], "has no stage mad")],
)
def test_a_stage_that_is_not_there_is_told(
    arguments: list[str],
    told: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    experiment, _ = tiny.finished(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(experiment.run.parent)
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat", *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
