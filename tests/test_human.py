"""Human evaluation: blind pairs, votes that are kept, what comes out of them, and the page in a browser."""

import http.client
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gadjax.errors import UserError
from gadjax.evaluation.ballots import BallotBox, Pair, Vote, alpha, count, in_order
from gadjax.human import Poll, _Listener, judge_by_people, pairs_of
from gadjax.records import Prompt
from tests.browser import chromium, complaints
from tests.test_judge import Court, court  # noqa: F401 (a fixture)

PAIRS = [Pair(Prompt.of(f"question {number}"), f"ours {number}", f"theirs {number}") for number in range(40)]

# --- ballots ---------------------------------------------------------------------------------------------------------


def test_sides_are_drawn_by_lot_and_stay():
    turned = [pair.turned("ada") for pair in PAIRS]
    assert 8 < sum(turned) < 32
    assert turned == [pair.turned("ada") for pair in PAIRS]
    assert turned != [pair.turned("bob") for pair in PAIRS]


def test_a_choice_of_a_side_is_a_vote_for_whose_text_was_there():
    for pair in PAIRS:
        ballot = pair.ballot("ada")
        side = "left" if ballot["left"] == pair.stage else "right"
        assert ballot[side] == pair.stage
        assert pair.vote("ada", side) == "stage"
        assert pair.vote("ada", "right" if side == "left" else "left") == "other"
        assert pair.vote("ada", "tie") == "tie"


def test_one_order_is_everybody_s(tmp_path: Path):
    assert sorted(pair.key for pair in in_order(PAIRS)) == sorted(pair.key for pair in PAIRS)
    assert in_order(PAIRS) == in_order(PAIRS[::-1]) != PAIRS
    with BallotBox(tmp_path / "votes.sqlite") as box:
        poll, voted = Poll(PAIRS, box), dict[str, list[str]]()
        for name, votes in (("ada", 7), ("bob", 4)):
            said = poll.do("/next", json.dumps({"annotator": name}).encode())
            for _ in range(votes):
                pair = said["ballot"]["pair"]
                voted.setdefault(name, []).append(pair)
                said = poll.do("/vote", json.dumps({"annotator": name, "pair": pair, "choice": "tie"}).encode())
    assert voted["ada"][:4] == voted["bob"]  # who stops early has voted on what the others began with


def test_a_ballot_does_not_say_whose_texts_they_are():
    assert PAIRS[0].ballot("ada").keys() == {"pair", "messages", "left", "right"}


def test_votes_outlive_the_process(tmp_path: Path):
    with BallotBox(tmp_path / "votes.sqlite") as box:
        box.cast(PAIRS[0].key, "ada", "stage")
        box.cast(PAIRS[1].key, "ada", "tie")
        box.cast(PAIRS[1].key, "bob", "other")
        box.cast(PAIRS[0].key, "ada", "other")  # changed her mind
    with BallotBox(tmp_path / "votes.sqlite") as box:
        keys = [pair.key for pair in PAIRS]
        assert set(box.votes(keys)) == {(keys[0], "ada", "other"), (keys[1], "ada", "tie"), (keys[1], "bob", "other")}
        assert box.votes(keys[5:]) == []
        box.take_back("ada", keys[1:])  # the last one on these
        assert set(box.votes(keys)) == {(keys[0], "ada", "other"), (keys[1], "bob", "other")}
        box.take_back("eve", keys)
        assert len(box.votes(keys)) == 2


def test_what_comes_out():
    votes = [
        Vote("a", "ada", "stage"),
        Vote("a", "bob", "stage"),
        Vote("b", "ada", "tie"),
        Vote("b", "bob", "other"),
        Vote("c", "ada", "stage"),
    ]
    result = count(votes)
    assert result is not None
    assert result.wins.mean == pytest.approx((1 + 0.25 + 1) / 3)
    assert result.by_annotator == {"ada": (2.5 / 3, 3), "bob": (0.5, 2)}
    assert result.counts == {"stage": 3, "tie": 1, "other": 1}
    assert result.agreement == 0.5
    assert count([]) is None
    alone = count(votes[:1])
    assert alone is not None and alone.wins.mean == 1 and math.isnan(alone.wins.low), "one ballot has no interval"


def test_equal_answers_are_ties_in_proportion():
    pairs = [*PAIRS[:4], *(Pair(pair.prompt, "alike", " alike\n") for pair in PAIRS[4:8])]
    result = count([Vote(pair.key, "ada", "stage") for pair in PAIRS[:4]], pairs)
    assert result is not None
    assert (result.wins.mean, result.same, result.by_annotator) == (0.75, 4, {"ada": (1.0, 4)})
    half = count([Vote(pair.key, "ada", "stage") for pair in PAIRS[:2]], pairs)
    assert half is not None and half.wins.mean == 0.75


def test_alpha_is_krippendorff_s():
    # Worked by hand. 4 shared ballots, values a a, a b, b b, b b: n = 8, of them a 3, b 5; expected 8² - 9 - 25 = 30, observed 2.
    assert alpha([["a", "a"], ["a", "b"], ["b", "b"], ["b", "b"], ["a"]]) == pytest.approx(1 - 7 * 2 / 30)
    assert alpha([["a", "a"], ["b", "b"]]) == 1
    assert alpha([["a", "a"], ["a", "a"]]) is None
    assert alpha([["a"], ["b"]]) is None


# --- the run's pairs -------------------------------------------------------------------------------------------------


def test_the_answers_of_a_run_are_paired(court: Court):  # noqa: F811
    first = pairs_of(court.run, "gad", "teacher")[0]
    assert (first.stage, first.other) == ("question 0: by gad", "question 0: by teacher")
    court.write("gad", {"question 0": "question 0: by seqkd"})
    pairs = pairs_of(court.run, "gad", "seqkd")
    assert sum(pair.same for pair in pairs) == 1
    with BallotBox(court.folder / "votes.sqlite") as box:
        assert Poll(pairs, box).total == 5  # nobody is asked to choose between equals
    with pytest.raises(UserError, match="word for word"):
        pairs_of(court.run, "gad", "gad")
    with pytest.raises(UserError, match="has no answers yet"):
        pairs_of(court.run, "gad", "seqkd@7")


def test_what_is_no_stage_or_answered_other_prompts_is_refused(court: Court):  # noqa: F811
    """Nobody votes against a text that is not there."""
    court.tests("vicuna")
    assert len(pairs_of(court.run, "gad", "teacher", "vicuna")) == 2
    with pytest.raises(UserError, match=r"^--split: 'dolly' is no split that is evaluated; use validation or vicuna$"):
        pairs_of(court.run, "gad", "teacher", "dolly")
    for against in ("vicuna/gad", "nobody"):
        with pytest.raises(UserError, match=rf"^--against: '{against}' is no stage of the run; use teacher or student or seqkd or gad, "):
            pairs_of(court.run, "gad", against)
    shutil.copy(court.folder / "evaluation" / "vicuna" / "seqkd.jsonl", court.folder / "evaluation")
    with pytest.raises(UserError, match=r"^seqkd: has no answer to 4 of the prompts that gad answered; run `gadjax evaluate`"):
        pairs_of(court.run, "gad", "seqkd")


def test_results_are_told_and_written(court: Court, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    (court.folder / "stages" / "gad" / "checkpoints" / "1").mkdir(parents=True)
    court.write("gad", {"question 5": "question 5: by seqkd"})
    pairs = [pair for pair in pairs_of(court.run, "gad", "seqkd") if not pair.same]
    with BallotBox(court.folder / "evaluation" / "human.sqlite") as box:
        for pair in pairs:
            box.cast(pair.key, "=ada\x1b[2J", "stage")
    judge_by_people(f"{court.folder}/gad", "seqkd", "validation", 0, True, True)
    out, told = capsys.readouterr()
    assert json.loads(out)["wins"]["mean"] == pytest.approx(5.5 / 6)
    assert "gad is better than seqkd on 91.7% [75.0%, 100.0%] of the prompts" in told
    assert "prompts with twice the same answer: 1, ties" in told
    assert "\x1b" not in told
    assert (court.folder / "evaluation" / "human_gad_seqkd.csv").read_text().splitlines()[1] == f"{pairs[0].key},'=ada\x1b[2J,stage"


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[_Listener]:
    with BallotBox(tmp_path / "votes.sqlite") as box, _Listener(0, Poll(PAIRS[:3], box)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(listener: _Listener, path: str, content: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", listener.server_port, timeout=10)
    try:
        body = content if isinstance(content, str) else json.dumps(content)
        connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_a_poll_from_its_beginning_to_its_end(listener: _Listener):
    status, said = asked(listener, "/next", {"annotator": " ada "})
    assert (status, said["done"], said["total"]) == (200, 0, 3)
    first = said["ballot"]["pair"]
    _, said = asked(listener, "/vote", {"annotator": "ada", "pair": first, "choice": "left"})
    assert said["done"] == 1
    assert said["ballot"]["pair"] != first
    assert asked(listener, "/back", {"annotator": "ada"})[1]["ballot"]["pair"] == first
    for _ in range(3):
        pair = asked(listener, "/next", {"annotator": "ada"})[1]["ballot"]["pair"]
        _, said = asked(listener, "/vote", {"annotator": "ada", "pair": pair, "choice": "tie"})
    assert said == {"ballot": None, "done": 3, "total": 3}
    assert asked(listener, "/next", {"annotator": "bob"})[1]["done"] == 0


@pytest.mark.parametrize(
    ("path", "content", "headers", "status"),
    [
        ("/vote", {"annotator": "ada", "pair": "none", "choice": "left"}, {}, 400),
        ("/vote", {"annotator": "ada", "pair": PAIRS[0].key, "choice": "middle"}, {}, 400),
        ("/vote", {"annotator": "", "pair": PAIRS[0].key, "choice": "left"}, {}, 400),
        ("/vote", "{", {}, 400),
        ("/next", {"annotator": "a" * 61}, {}, 400),
        ("/next", {"annotator": "a" * 5000}, {}, 413),
        ("/other", {}, {}, 404),
        ("/next", {"annotator": "ada"}, {"Content-Type": "text/plain"}, 415),  # another site's form
        ("/next", {"annotator": "ada"}, {"Host": "evil.example:80"}, 404),  # a name that was made to lead here
    ],
)
def test_what_is_no_vote_is_refused(listener: _Listener, path: str, content: Any, headers: dict[str, str], status: int):
    found, said = asked(listener, path, content, **headers)
    assert found == status
    assert said["error"]
    assert listener.poll.result() is None


def test_it_listens_to_this_machine_only(listener: _Listener):
    assert listener.server_address[0] == "127.0.0.1"


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_page_is_driven_by_the_keyboard(listener: _Listener, tmp_path: Path):
    with chromium(tmp_path / "profile") as page:

        def waits(text: str) -> None:
            WebDriverWait(page, 10).until(lambda _: page.find_element(By.ID, "progress").text == text)

        def begins(name: str) -> None:
            page.get(f"http://127.0.0.1:{listener.server_port}/")
            page.find_element(By.ID, "name").send_keys(name, Keys.ENTER)

        def presses(*keys: str) -> None:
            page.find_element(By.TAG_NAME, "body").send_keys(*keys)

        begins("ada")
        waits("ada: 0 of 3")
        assert page.find_element(By.ID, "left").text in {text for pair in PAIRS[:3] for text in (pair.stage, pair.other)}
        presses(Keys.ARROW_DOWN)  # scrolls
        presses(Keys.ARROW_LEFT)
        waits("ada: 1 of 3")
        presses("u")
        waits("ada: 0 of 3")
        for key, told in ((Keys.ARROW_RIGHT, "ada: 1 of 3"), ("n", "ada: 2 of 3")):
            presses(key)
            waits(told)
        begins("bob")  # a second one, on the same machine
        waits("bob: 0 of 3")
        presses(Keys.ARROW_LEFT)
        waits("bob: 1 of 3")
        begins("ada")  # goes on where she was
        waits("ada: 2 of 3")
        presses(Keys.ARROW_LEFT)
        waits("ada: 3 of 3")
        assert page.find_element(By.ID, "done").is_displayed()
        assert complaints(page) == []
    result = listener.poll.result()
    assert result is not None
    assert {name: number for name, (_, number) in result.by_annotator.items()} == {"ada": 3, "bob": 1}
    assert result.counts["tie"] == 1
    assert result.agreement is not None, "they have voted on a pair in common"


@pytest.mark.browser
def test_typing_a_name_after_a_failed_request_is_no_vote(listener: _Listener, tmp_path: Path):
    """The server is away for the first request; what is typed then is text, and no key takes a vote back."""
    with chromium(tmp_path / "profile") as page:
        page.get(f"http://127.0.0.1:{listener.server_port}/")
        asked(listener, "/vote", {"annotator": "ada", "pair": PAIRS[0].key, "choice": "tie"})
        page.execute_script("window.fetch_ = window.fetch; window.fetch = () => Promise.reject(new Error('away'))")
        name = page.find_element(By.ID, "name")
        name.send_keys("ada", Keys.ENTER)
        WebDriverWait(page, 10).until(lambda _: page.find_element(By.ID, "problem").is_displayed())
        page.execute_script("window.fetch = window.fetch_")
        name.send_keys("u", Keys.BACKSPACE, Keys.ENTER)
        WebDriverWait(page, 10).until(lambda _: page.find_element(By.ID, "progress").text == "ada: 1 of 3")
