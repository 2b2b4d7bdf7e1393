"""The commands about the teacher's answers: status, estimates, imports, several teachers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gadjax import cli, hub
from gadjax.collecting import collect_answers, import_answers
from gadjax.data.snapshot import Snapshot
from gadjax.prepare import prepare_data
from gadjax.records import Prompt
from gadjax.runs import Run
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import all_requests, answers
from gadjax.teachers.config import Price, TeacherConfig
from gadjax.teachers.estimate import estimate
from gadjax.teachers.requests import Outcome
from tests import tiny
from tests.desk import KEY, PROMPTS, Reply, desk, error, good, ok

CONFIG = """
run: {name: mine, folder: here}
teacher: {model: gpt-5-chat, api_key_env: TEST_KEY, base_url: %s, tries: 2, retry_wait: 0.01}
prompts: {train: prompts.jsonl}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", KEY)
    write_rows("prompts.jsonl", [{"prompt": prompt.text} for prompt in PROMPTS])


def write_rows(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gadjax(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What `gadjax ARGUMENTS --json` prints."""

    def call(*arguments: str) -> Any:
        assert gadjax(*arguments, "--json") == 0
        return json.loads(capfd.readouterr().out)

    return call


# --- status and estimate ---------------------------------------------------------------------------------------------


def test_status_counts_what_is_there_and_makes_nothing(told: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    def reply(text: str, before: int) -> Reply:
        number = int(text.split()[1])
        return (400, {}, error("too long")) if number < 2 else (400, {}, error("no", "content_filter")) if number < 5 else ok(text)

    with desk(reply) as (_, teacher):
        Path("mine.yaml").write_text(CONFIG % teacher.base_url)
        assert told("collect", "mine.yaml", "--status") == {"ok": 0, "refused": 0, "failed": 0, "pending": 40, "cost": 0.0}
        assert not Path("here").exists()
        part = told("collect", "mine.yaml", "--limit", "30")
        assert sum(part[state] for state in ("ok", "refused", "failed")) == 30 and part["pending"] == 10
        assert gadjax("collect", "mine.yaml") == 0
        capfd.readouterr()
        whole = told("collect", "mine.yaml", "--status")
        assert whole == {"ok": 35, "refused": 3, "failed": 2, "pending": 0, "cost": pytest.approx(35 * (10 * 1.25e-6 + 20 * 10e-6))}
    assert gadjax("collect", "mine.yaml", "--status") == 0
    assert capfd.readouterr().out == "status: ok 35, refused 3, failed 2, pending 0, cost $0.01\n"


def test_status_is_told_while_another_collects(told: Callable[..., Any]) -> None:
    with desk(lambda text, before: ok(text)) as (_, teacher):
        Path("mine.yaml").write_text(CONFIG % teacher.base_url)
        run = Run.open(Path("mine.yaml"), [])
        with run.begin(alone=False):
            assert told("collect", "mine.yaml", "--status")["pending"] == 40
            assert told("collect", "mine.yaml")["ok"] == 40  # a second collector is no hindrance
            with pytest.raises(SystemExit):  # a trainer is
                cli.main(["import", "prompts.jsonl", "--into", "mine.yaml", "--prompt", "prompt", "--response", "prompt"])
        with run.begin():
            assert gadjax("collect", "mine.yaml") == 2


def test_the_tutor_s_estimate_is_within_ten_per_cent_of_its_counts(told: Callable[..., Any]) -> None:
    Path("tutor.yaml").write_text("{run: {folder: here}, teacher: {backend: tutor, samples: 2}, prompts: {train: 'tutor:600'}}")
    guess = told("collect", "tutor.yaml", "--dry-run")
    assert not Path("here").exists()
    assert told("collect", "tutor.yaml")["ok"] == 1200 == guess["calls"]
    run = Run.open(Path("tutor.yaml"), [])
    with TeacherCache(run.cache, read_only=True) as cache:
        real = [cache._db.execute(f"SELECT sum({name}) FROM answers").fetchone()[0] for name in ("prompt_tokens", "completion_tokens")]
    assert [guess["prompt_tokens"], guess["completion_tokens"]] == pytest.approx(real, rel=0.1)
    assert 0 < guess["error"] < 0.1
    assert told("collect", "tutor.yaml", "--dry-run")["calls"] == 0


def test_an_endpoint_s_estimate_goes_by_the_answers_that_are_there(told: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    def reply(text: str, before: int) -> Reply:
        number = int(text.split()[1])
        return 200, {}, good(text, usage={"prompt_tokens": 40 + len(text), "completion_tokens": 100 + 10 * (number % 7)})

    write_rows("prompts.jsonl", [{"prompt": f"question {number}"} for number in range(400)])
    with desk(reply) as (server, teacher):
        Path("mine.yaml").write_text(CONFIG % teacher.base_url)
        most = told("collect", "mine.yaml", "--dry-run")
        assert (most["calls"], most["completion_tokens"], most["based_on"]) == (400, 400 * 2048, 0)
        assert not server.asked
        first = told("collect", "mine.yaml", "--limit", "60")["cost"]
        guess = told("collect", "mine.yaml", "--dry-run")
        assert (guess["calls"], guess["based_on"]) == (340, 60)
        assert told("collect", "mine.yaml")["cost"] - first == pytest.approx(guess["cost"], rel=0.1)
    tokens = [sum(40 + len(text) for text in server.asked), sum(100 + 10 * (int(text.split()[1]) % 7) for text in server.asked)]
    assert tokens == pytest.approx([guess["prompt_tokens"] * 400 / 340, guess["completion_tokens"] * 400 / 340], rel=0.1)


def test_an_estimate_of_nothing(tmp_path: Path) -> None:
    teacher = TeacherConfig(price=Price(input=1.0, output=1.0))
    with TeacherCache(tmp_path / "c.sqlite") as cache:
        cache.record((request, Outcome("ok", "x")) for request in all_requests(PROMPTS, teacher))
        assert estimate(all_requests(PROMPTS, teacher), teacher, cache).calls == 0


# --- import ----------------------------------------------------------------------------------------------------------

PUBLISHED = [
    {"content": [{"role": "user", "content": f"question {number}"}], "teacher_response": f"answer {number}", "model": "x"}
    for number in range(30)
]
MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


def table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(rows, pyarrow.schema([("content", MESSAGES), ("teacher_response", pyarrow.string())]))


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file as `save_to_disk` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = table(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as stream:
        stream.write_table(made, max_chunksize=7)


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return write_rows("a.jsonl", rows)


def as_compressed(rows: list[dict[str, Any]]) -> str:
    with pyarrow.output_stream("a.jsonl.zst", compression="zstd") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return "a.jsonl.zst"


def as_parquet(rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(table(rows), "a.parquet")
    return "a.parquet"


def as_saved(rows: list[dict[str, Any]]) -> str:
    write_arrow(Path("saved/data-00000-of-00002.arrow"), rows[:20])
    write_arrow(Path("saved/data-00001-of-00002.arrow"), rows[20:])
    write_arrow(Path("saved/cache-123.arrow"), rows[:1])
    Path("saved/state.json").write_text("{}")
    return "saved"


def as_saved_splits(rows: list[dict[str, Any]]) -> str:
    write_arrow(Path("splits/train/data-00000-of-00001.arrow"), rows)
    write_arrow(Path("splits/test/data-00000-of-00001.arrow"), [PUBLISHED[0] | {"teacher_response": "of the test"}])
    Path("splits/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return "splits"


@pytest.mark.parametrize("kind", [as_jsonl, as_compressed, as_parquet, as_saved, as_saved_splits])
def test_answers_are_imported_and_asked_for_no_more(kind: Callable[..., str], told: Callable[..., Any]) -> None:
    with desk(lambda text, before: ok(text)) as (server, teacher):
        Path("mine.yaml").write_text(CONFIG % teacher.base_url)
        source = kind(PUBLISHED)
        assert told("import", source, "--into", "mine.yaml") == {"new": 30, "known": 0, "empty": 0, "unused": 0}
        assert told("import", source, "--into", "mine.yaml") == {"new": 0, "known": 30, "empty": 0, "unused": 0}
        assert told("collect", "mine.yaml", "--status")["pending"] == 10
        assert told("collect", "mine.yaml")["ok"] == 40
    assert sorted(server.asked) == sorted(prompt.text for prompt in PROMPTS[30:])
    with TeacherCache("here/mine/teacher.sqlite", read_only=True) as cache:
        found = answers(PROMPTS, Run.open(Path("mine.yaml"), []).config.teacher, cache)
    assert [answer.text for answer in found[:30]] == [f"answer {number}" for number in range(30)]


def test_without_prompts_those_that_were_imported_are_the_run_s(told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    Path("mine.yaml").write_text(CONFIG.replace("prompts.jsonl", "null") % "null")
    assert gadjax("collect", "mine.yaml", "--status") == 2
    told("import", as_saved_splits(PUBLISHED), "--into", "mine.yaml")
    assert told("collect", "mine.yaml") == {"ok": 30, "refused": 0, "failed": 0, "pending": 0, "cost": 0.0}
    train, held_out = Run.open(Path("mine.yaml"), ["prompts.validation_share=0.2"]).prompts.values()
    assert (len(train), len(held_out)) == (24, 6)
    train, held_out = Run.open(Path("mine.yaml"), ["prompts.validation=splits:test"]).prompts.values()
    assert (len(train), [prompt.text for prompt in held_out]) == (29, ["question 0"])


def test_fields_are_named_and_answers_of_one_prompt_are_its_samples(told: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "second"}]
    Path("mine.yaml").write_text(CONFIG % "null")
    first = write_rows("a.jsonl", [{"q": "question 0", "a": "first"}, {"q": "question 1", "a": " "}])
    assert told("import", first, "--into", "mine.yaml", "--prompt", "q", "--response", "a")["empty"] == 1
    both = write_rows("b.jsonl", [{"talk": talk}, {"talk": [talk[0], {"role": "assistant", "content": "third"}]}])
    assert told("import", both, "--into", "mine.yaml", "--messages", "talk") == {"new": 1, "known": 1, "empty": 0, "unused": 1}
    run = Run.open(Path("mine.yaml"), ["teacher.samples=2"])
    with TeacherCache(run.cache, read_only=True) as cache:
        assert [answer.text for answer in answers(PROMPTS[:1], run.config.teacher, cache)] == ["first", "third"]
    assert told("import", both, "--into", "mine.yaml", "--messages", "talk", "--replace")["known"] == 2
    with TeacherCache(run.cache, read_only=True) as cache:
        assert [answer.text for answer in answers(PROMPTS[:1], run.config.teacher, cache)] == ["second", "third"]
    assert gadjax("import", first, "--into", "mine.yaml") == 2
    assert "a.jsonl, line 1: has none of prompt/response" in capfd.readouterr().err


def test_a_data_set_of_the_hub_is_fetched_without_its_code(told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()

    def fetch(name: str, **options: Any) -> str:
        asked.append({"name": name} | options)
        folder = Path("hub") / name
        (folder / "data").mkdir(parents=True)
        pyarrow.parquet.write_table(table(PUBLISHED), folder / "data/train-00000-of-00001.parquet")
        pyarrow.parquet.write_table(table(PUBLISHED[:3]), folder / "data/test-00000-of-00001.parquet")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    Path("mine.yaml").write_text(CONFIG % "null")
    assert told("import", "some/LMSYS-Chat-GPT-5-Chat-Response", "--into", "mine.yaml")["new"] == 30
    kinds = ["*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.json"]
    assert asked == [{"name": "some/LMSYS-Chat-GPT-5-Chat-Response", "repo_type": "dataset", "allow_patterns": kinds}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "import: there is no file missing.jsonl"),
        ("some/thing", "import: some/thing is neither a file nor a folder nor a data set that the hub gives"),
        ("prompts.txt", "import: prompts.txt is none of .jsonl"),
        ("empty", "import: empty holds no file of .jsonl"),
        ("splits:dev", "import: splits holds no file of .jsonl, .jsonl.gz, .jsonl.zst, .parquet of a split 'dev'"),
        ("broken", "broken/data-0.arrow: cannot be read after row 0"),
        ("prompts.jsonl", "prompts.jsonl, line 1: has none of prompt/response"),
        ("none.jsonl", "none.jsonl: has no rows"),
    ],
)
def test_what_cannot_be_imported_is_told_and_nothing_is_made(source: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    as_saved_splits(PUBLISHED)
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("broken/data-0.arrow").write_bytes(b"no arrow")
    Path("none.jsonl").write_text("")
    Path("mine.yaml").write_text(CONFIG % "null")
    assert gadjax("import", source, "--into", "mine.yaml") == 2
    assert message in capfd.readouterr().err
    assert not Path("here").exists()


def test_an_import_goes_to_one_of_several_teachers(told: Callable[..., Any]) -> None:
    Path("mine.yaml").write_text(CONFIG % "null" + "teachers: {mini: {model: gpt-5-mini}}\n")
    assert told("import", as_jsonl(PUBLISHED), "--into", "mine.yaml", "--teacher", "mini")["new"] == 30
    run = Run.open(Path("mine.yaml"), [])
    with TeacherCache(run.cache, read_only=True) as cache:
        found = {name: len(answers(PROMPTS, teacher, cache)) for name, teacher in run.config.all_teachers.items()}
    assert found == {"teacher": 0, "mini": 30}
    assert gadjax("import", "a.jsonl", "--into", "mine.yaml", "--teacher", "nobody") == 2


def test_a_large_import_is_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadjax.collecting.CHUNK", 7)
    pairs = ((f"line {number}", Prompt.of(f"question {number % 25}"), Outcome("ok", str(number), "stop")) for number in range(50))
    with TeacherCache(tmp_path / "c.sqlite") as cache:
        two = TeacherConfig(samples=2)
        assert import_answers(pairs, two, cache) == {"new": 50, "known": 0, "empty": 0, "unused": 0}
        assert [answer.text for answer in answers([Prompt.of("question 3")], two, cache)] == ["3", "28"]


# --- several teachers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.teachers=null", ["a0", "a1", "b0", "b1"]),
        ("data.teachers=[second]", ["b0", "b1"]),
        ("data={teachers: [second, teacher], samples: 1}", ["b0", "a0"]),
    ],
)
def test_the_data_s_settings_say_whose_answers_are_used(setting: str, expected: list[str]) -> None:
    for name in "ab":
        write_rows(f"{name}.jsonl", [{"prompt": f"question {i}", "response": f"{name}{n}"} for i in range(4) for n in range(2)])
    teachers = (
        "teacher: {backend: file, path: a.jsonl, samples: 2}\nteachers: {second: {backend: file, path: b.jsonl, samples: 2, model: b}}"
    )
    Path("tiny.yaml").write_text(tiny.CONFIG.replace("teacher: {backend: tutor, model: tutor}", teachers))
    prompts = "prompts={train: null, validation: null, validation_share: 0.3}"
    run = Run.open(Path("tiny.yaml"), [prompts, setting])
    collect_answers(run)
    prepare_data(run)
    found = list(Snapshot.open(run.data).train)
    first = found[0].prompt.id
    assert [example.answer.text for example in found if example.prompt.id == first] == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("teachers: {teacher: {model: b}}", "teachers: 'teacher' is no name for a further teacher"),
        ("teachers: {b: {samples: 2}}", "teachers: two of them would be asked the same"),
        ("data: {teachers: [c]}", "data.teachers: 'c' is not a teacher; use teacher"),
        ("data: {teachers: []}", "data.teachers: "),
    ],
)
def test_teachers_that_do_not_fit_are_told(lines: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(lines)
    assert gadjax("collect", "mine.yaml", "--status") == 2
    assert message in capfd.readouterr().err
