"""Prompts: what their files may hold, what is refused and where, and how they are split."""

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gadjax import prompts
from gadjax.errors import UserError
from gadjax.prompts import PromptsConfig, checked_messages, read_prompts
from gadjax.records import Prompt
from gadjax.rows import read_rows
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.sources import hold_out, load_prompts, load_tests, without

TUTOR = TeacherConfig(backend="tutor")
ROWS: list[dict[str, Any]] = [
    {"prompt": "one\u2028 é"},
    {"id": "b", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two", "name": "x"}]},
    {"id": 3, "prompt": "three"},
]
MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
SCHEMA = pyarrow.schema([("id", pyarrow.string()), ("prompt", pyarrow.string()), ("messages", MESSAGES)])


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_both_kinds_of_rows_are_read(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.jsonl", *ROWS, "\n"), "prompts.train") == [
        Prompt.of("one\u2028 é"),
        Prompt("b", ({"role": "system", "content": "s"}, {"role": "user", "content": "two"})),
        Prompt.of("three", "3"),
    ]


def test_compressed_files_and_parquet_hold_the_same_prompts(tmp_path: Path) -> None:
    expected = read_prompts(write(tmp_path / "a.jsonl", *ROWS), "prompts.train")
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    with pyarrow.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as stream:
        stream.write(content)
    rows = [{**row, "id": str(row["id"]) if "id" in row else None} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), tmp_path / "a.parquet")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert read_prompts(str(tmp_path / name), "prompts.train") == expected


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    with pyarrow.output_stream(path, compression="gzip" if suffix == "gz" else "zstd") as stream:
        stream.write(json.dumps(ROWS[0]).encode() + b"\n")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cannot be read after line"):
        read_prompts(str(path), "prompts.train")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "x"\n', "is not JSON"),
        ("[" * 100_000 + "\n", "is not JSON"),
        ("[1]\n", "is not a JSON object"),
        ({"text": "x"}, "neither `prompt` nor `messages`"),
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": 3}, "not a list of messages"),
        ({"messages": []}, "neither `prompt` nor `messages`"),
        ({"messages": [{"role": "user"}]}, "not a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no role out of"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "the last message is the assistant's"),
        ('{"prompt": "\\ud800"}\n', "not valid Unicode"),
        ({"prompt": "other", "id": "b"}, r"its id 'b' is that of .*a.jsonl, line 2"),
    ],
)
def test_a_broken_row_is_told_with_its_line(tmp_path: Path, row: object, what: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "first"}, {"prompt": "second", "id": "b"}, row)
    with pytest.raises(UserError, match=what) as told:
        read_prompts(path, "prompts.train")
    assert told.value.where == f"{path}, line 3"


def test_a_prompt_that_is_there_again_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(prompts, "say", said.append)
    rows = [{"prompt": "one", "id": 1}, {"prompt": "two"}, {"prompt": "two"}, {"prompt": "one", "id": 1}, {"prompt": "one", "id": 2}]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "two", "id": "x"})
    assert read_prompts(path, "prompts.train") == [Prompt.of("one", "1"), Prompt.of("two")]
    assert said == [f"prompts.train: 4 rows of {path} are left out: their prompts stand in earlier rows"]
    read_prompts(write(tmp_path / "b.jsonl", *rows[:2]), "prompts.train")
    assert len(said) == 1


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_prompts(str(tmp_path / "none.jsonl"), "prompts.train")
    with pytest.raises(UserError, match="is none of"):
        read_prompts("prompts.csv", "prompts.train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(tmp_path / "latin.jsonl"), "prompts.train")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "a.parquet"), "prompts.train")


def test_a_conversation_may_not_be_a_string() -> None:
    with pytest.raises(UserError, match="not a list"):
        checked_messages("user", "messages")


def test_the_tutor_s_prompts_are_split_without_overlap() -> None:
    train, validation = load_prompts(PromptsConfig(train="tutor:40", validation="tutor:10"), TUTOR, seed=1)
    assert (len(train), len(validation)) == (40, 10)
    assert len({prompt.text for prompt in [*train, *validation]}) == 50
    assert (train, validation) == load_prompts(PromptsConfig(train="tutor:40", validation="tutor:10"), TUTOR, seed=1)
    assert train != load_prompts(PromptsConfig(train="tutor:40", validation="tutor:10"), TUTOR, seed=2)[0]


def test_a_share_is_held_out_where_no_validation_is_given() -> None:
    everything = [Prompt.of(text) for text in "abcdefghijklmnopqrst"]
    train, validation = hold_out(everything, 0.1, seed=0)
    assert (len(train), len(validation)) == (18, 2)
    assert train == [prompt for prompt in everything if prompt not in validation]  # the order stays
    assert hold_out(everything[::-1], 0.1, seed=0)[1] == validation[::-1]  # the choice is by id, not by place
    assert hold_out(everything, 0.1, seed=1)[1] != validation
    split = load_prompts(PromptsConfig(train="tutor:40", validation_share=0.1), TUTOR, seed=0)
    assert list(map(len, split)) == [36, 4]


def test_a_validation_prompt_of_the_training_set_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", {"prompt": "same", "id": "a"}, {"prompt": "x"})
    validation = write(tmp_path / "validation.jsonl", {"prompt": "same", "id": "b"})
    with pytest.raises(UserError, match=r"^prompts.validation: has b"):
        load_prompts(PromptsConfig(train=train, validation=validation), TUTOR, seed=0)


def test_a_source_is_needed() -> None:
    with pytest.raises(UserError, match=r"^prompts.train: is not given"):
        load_prompts(PromptsConfig(), TUTOR, seed=0)
    with pytest.raises(UserError, match="too few"):
        load_prompts(PromptsConfig(train="tutor:1"), TUTOR, seed=0)


def test_a_file_of_answers_gives_its_prompts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"p{i % 10}", "response": f"r{i}"} for i in range(20)))
    teacher = TeacherConfig(backend="file", path=path)
    train, validation = load_prompts(PromptsConfig(), teacher, seed=0)
    assert sorted(prompt.text for prompt in [*train, *validation]) == [f"p{i}" for i in range(10)]
    assert len(validation) == 1


# --- tables ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, columns: dict[str, pyarrow.Array]) -> str:
    """As .parquet, or as `save_to_disk` of `datasets` writes it; the folder or the file."""
    made = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path)
        return str(path)
    path.parent.mkdir()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as stream:
        stream.write_table(made)
    return str(path.parent)


@pytest.mark.parametrize("name", ["a.parquet", "saved/data-0.arrow"])
def test_a_row_of_a_table_unpacks_to_no_more_than_a_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """One long text, or many of them; a column of repeated texts is read as what it says."""
    monkeypatch.setattr("gadjax.rows.MAX_LINE", 1000)
    texts = [f"question {number}" for number in range(200)]
    kinds = pyarrow.array(["a" * 90, "b"] * 100).dictionary_encode()
    source = write_table(tmp_path / name, {"prompt": pyarrow.array(texts), "kind": kinds, "tags": pyarrow.array([[]] * 200)})
    assert [(row["prompt"], row["kind"]) for _, row in read_rows(source, "x")] == [*zip(texts, ["a" * 90, "b"] * 100, strict=True)]
    long = [{"prompt": pyarrow.array([*texts[:150], "x" * 1001, *texts[151:]])}]
    long += [{"prompt": pyarrow.array(texts), "notes": pyarrow.array([*[["y"]] * 150, ["y" * 500] * 3, *[["y"]] * 49])}]
    long += [{"prompt": pyarrow.array(texts), "kind": pyarrow.array([*texts[:150], "x" * 1001, *texts[151:]]).dictionary_encode()}]
    for number, columns in enumerate(long):
        (tmp_path / f"{number}").mkdir()
        read = read_rows(write_table(tmp_path / f"{number}" / name, columns), "x")
        with pytest.raises(UserError, match=rf"{Path(name).name}, row 151: has more than 1000 bytes"):
            list(read)


def test_a_text_that_rows_have_in_common_is_unpacked_for_one_at_a_time(tmp_path: Path):
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), pyarrow.array(["x" * 2**20]))
    source = write_table(tmp_path / "saved/data-0.arrow", {"prompt": shared})
    tracemalloc.start()
    try:
        assert sum(len(row["prompt"]) for _, row in read_rows(source, "x")) == 64 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_table_whose_rows_share_texts_without_end_is_refused(tmp_path: Path):
    """A list of a million times one text of a dictionary is a file of nothing."""
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), pyarrow.array(["x" * 99]))
    source = write_table(tmp_path / "saved/data-0.arrow", {"prompt": pyarrow.ListArray.from_arrays([0, 100], shared)})
    with pytest.raises(UserError, match=r"data-0.arrow: its column prompt is a list<item: dictionary<.*; write it as plain texts"):
        list(read_rows(source, "x"))


# --- test sets -------------------------------------------------------------------------------------------------------


def rows(path: Path, *objects: dict[str, str]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in objects))
    return str(path)


def test_test_sets_have_their_names_before_their_prompts_ids(tmp_path: Path):
    source = rows(tmp_path / "mine.jsonl", {"prompt": "one", "id": "1"}, {"instruction": "Sum up.", "input": "A text.", "output": "x"})
    found = load_tests(PromptsConfig(tests={"mine": source, "more": source}))
    assert found["mine"][0].id == "mine/1"
    assert found["mine"][1].text == "Sum up.\n\nA text."
    assert not {prompt.id for prompt in found["mine"]} & {prompt.id for prompt in found["more"]}


def test_known_sets_are_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sets = ("vicuna", "selfinstruct", "koala")
    alpaca = [{"dataset": name, "instruction": f"{name} {number}", "output": "x"} for name in sets for number in range(3)]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(alpaca))
    dolly = [{"instruction": f"task {n}", "context": "" if n % 2 else "about this", "response": "x"} for n in range(600)]
    rows(tmp_path / "databricks-dolly-15k.jsonl", *dolly)
    (tmp_path / "alpaca_eval_annotations.json").write_text("annotations")
    for split in ("train", "test"):
        rows(tmp_path / f"LMSYS-Chat-GPT-5-Chat-Response-{split}.jsonl", {"content": f"to {split}", "teacher_response": "x"})
    asked = list[tuple[str, list[str]]]()

    def fetched(name: str, *, repo_type: str, allow_patterns: list[str]) -> Path:
        assert repo_type == "dataset"
        asked.append((name, allow_patterns))
        folder = tmp_path / name.partition("/")[2]
        folder.mkdir(exist_ok=True)
        for file in tmp_path.glob(f"{folder.name}*.json*"):
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        return folder

    monkeypatch.setattr("gadjax.hub.snapshot_download", fetched)
    found = load_tests(PromptsConfig(tests={name: name for name in ("vicuna", "selfinst", "dolly", "lmsys")}))
    assert [prompt.text for prompt in found["lmsys"]] == ["to test"]
    assert [prompt.text for prompt in found["vicuna"]] == ["vicuna 0", "vicuna 1", "vicuna 2"]
    assert [prompt.text for prompt in found["selfinst"]] == ["selfinstruct 0", "selfinstruct 1", "selfinstruct 2"]
    assert len(found["dolly"]) == 500
    assert found["dolly"] == load_tests(PromptsConfig(tests={"dolly": "dolly"}))["dolly"]
    assert {text.endswith("\n\nabout this") for text in (prompt.text for prompt in found["dolly"])} == {True, False}
    sets, files = zip(*asked[:4], strict=True)
    assert sets == (*["tatsu-lab/alpaca_eval"] * 2, "databricks/databricks-dolly-15k", "ytz20/LMSYS-Chat-GPT-5-Chat-Response")
    assert files[:2] == (["alpaca_eval.json"], ["alpaca_eval.json"])  # of seven, with answers and annotations


@pytest.mark.parametrize("name", ["train", "validation", "a/b", "", "..", "a-b"])
def test_a_test_set_has_a_plain_name(name: str):
    with pytest.raises(UserError, match=r"^prompts\.tests: .* is no name for a test set"):
        load_tests(PromptsConfig(tests={name: "vicuna"}))


def test_an_empty_test_set_is_told(tmp_path: Path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"^prompts\.tests\.mine: .* has no prompts"):
        load_tests(PromptsConfig(tests={"mine": str(tmp_path / "none.jsonl")}))


def test_no_training_prompt_is_in_a_test_set():
    train = [Prompt.of("one"), Prompt.of("two")]
    assert without(train, [Prompt.of("two", id="vicuna/7")]) == train[:1]


@pytest.mark.parametrize("text", ["{}", "[1]", "[", '{"prompt": "x"}\n{"prompt": "y"}'])
def test_a_json_file_is_an_array_of_objects(tmp_path: Path, text: str):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match="mine.json: is not"):
        list(read_rows(str(tmp_path / "mine.json"), "prompts.train"))
