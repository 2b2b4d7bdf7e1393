"""From the teacher's texts to token groups: several answers to a prompt, answers that are missing, and text of another tokenizer."""

import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from gadjax import collecting, prepare
from gadjax.checkpointing import Checkpoints, checkpoint_digest
from gadjax.cli import main
from gadjax.collecting import collect_answers
from gadjax.data.packing import RowShape, pack
from gadjax.data.pipeline import batches
from gadjax.data.snapshot import Example, Snapshot
from gadjax.errors import UserError
from gadjax.evaluate import every_checkpoint
from gadjax.evaluation.answers import read_answers
from gadjax.export import export_stage
from gadjax.metrics import read
from gadjax.models.fresh import CONTROL
from gadjax.origins import role_from
from gadjax.prepare import prepare_data
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.teachers import grammar
from gadjax.text import Text
from tests import tiny
from tests.desk import Reply, desk, error, good, ok

pytestmark = pytest.mark.timeout(600)  # the first test waits for a whole run


def counts(examples: list[Example]) -> Counter[str]:
    """How many groups each prompt has."""
    return Counter(example.prompt.text for example in examples)


# --- several answers --------------------------------------------------------------------------------------------------

TWICE = tiny.with_stages(
    seqkd=f"algorithm: seqkd, epochs: 1, {tiny.COMMON}",
    still=f"algorithm: seqkd, {tiny.COMMON.replace('1e-3', '1e-12')}, validate_every: 2, keep: null, select: {{metric: loss, patience: 2}}",
    gad=f"algorithm: gad, from: seqkd, max_steps: 1, {tiny.SAMPLING}, discriminator: {{learning_rate: 1e-3}}",
)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with two answers to each of 40 and 8 prompts, and to each of 4 of a test set."""
    experiment = tiny.Tiny.make(tmp_path_factory.getbasetemp(), "twice", TWICE)
    unseen = [{"prompt": text} for text in grammar.prompts(4, seed=99)]
    unseen[0]["id"] = "7"
    (experiment.folder / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    done = experiment.gadjax("run", "tiny.yaml", "teacher.samples=2", "prompts.tests={unseen: unseen.jsonl}")
    assert done.returncode == 0, done.stderr
    return experiment.run


def test_each_answer_is_a_group_of_its_own(twice: Path):
    data, text = Snapshot.open(twice / "data"), Text.load(str(twice / "student"))
    for split, prompts in ((data.train, 40), (data.validation, 8)):
        found = list(split)
        assert sorted(counts(found).values()) == [2] * prompts
        assert all(example.tokens.teacher == text.response_ids(example.answer.text, 16) for example in found)
        assert len({(example.prompt.id, example.answer.text) for example in found}) > 1.5 * prompts, "they are different answers"
    seen = [group for batch in itertools.islice(iter(batches(data.train, 8, seed=0)), 10) for group in batch]
    assert Counter(seen) == Counter(example.tokens for example in data.train)
    assert [row["step"] for row in read(twice / "stages" / "seqkd" / "metrics.jsonl")] == list(range(11)), "10 steps are an epoch"


def test_evaluation_counts_prompts_and_compares_with_every_answer(twice: Path):
    held_out = list(Snapshot.open(twice / "data").validation)
    for stage in ("student", "seqkd", "gad"):
        for samples in read_answers(twice / "evaluation" / f"{stage}.jsonl").values():
            pairs = zip(samples.ids, samples.teacher, strict=True)
            assert Counter(pairs) == Counter((example.prompt.id, example.answer.text) for example in held_out)
    summary = json.loads((twice / "summary.json").read_text())
    assert summary["prompts"] == 8
    last = read(twice / "stages" / "gad" / "metrics.jsonl")[-1]
    assert last["validation/validity"] == pytest.approx(summary["stages"]["gad"]["validity"])
    assert "8 of 8 validation prompts" in (twice / "report" / "index.html").read_text()


def test_a_test_set_is_asked_for_frozen_and_measured_apart(twice: Path):
    data = Snapshot.open(twice / "data")
    assert {len(name.removeprefix("unseen/")) for name in counts_by_id(data) if name != "unseen/7"} == {16}
    assert sorted(counts_by_id(data).values()) == [2] * 4
    summary = json.loads((twice / "summary.json").read_text())
    unseen = summary["tests"]["unseen"]
    assert unseen["prompts"] == 4
    assert unseen["stages"].keys() == summary["stages"].keys()
    assert unseen["stages"]["gad"].keys() == summary["stages"]["gad"].keys()
    assert unseen["stages"]["student"] != summary["stages"]["student"]
    for stage in ("student", "seqkd", "gad"):
        answers = read_answers(twice / "evaluation" / "unseen" / f"{stage}.jsonl")["greedy"]
        assert set(answers.ids) == set(counts_by_id(data))
    assert "<h3>unseen</h3>" in (twice / "report" / "index.html").read_text()


def test_a_stage_that_selects_ends_early_and_its_outcome_is_its_best_step(twice: Path):
    """A stage that learns nothing, from the untouched student: the first validation is the best, and two more are waited for."""
    session = Session.open(Run.at(twice), twice / "student")
    assert [row["step"] for row in read(twice / "stages" / "still" / "metrics.jsonl")] == list(range(7)), "of 10 steps"
    assert session.final_step("still") == 2
    assert every_checkpoint(session) == ["student", "seqkd", "still", "still@4", "still@6", "gad"]
    outcome, *others = (session.final_role(name, "student").optimizer for name in ("still", "still@2", "still@6"))
    same_bits(outcome, others[0])
    with pytest.raises(AssertionError):
        same_bits(outcome, others[1])
    assert session.final_step("still@6") == 6
    with pytest.raises(UserError, match=r"^still@5: there is no checkpoint of this step; those of the steps 2, 4, 6 are kept"):
        session.final_step("still@5")
    assert Run.find(f"{twice}/still@4")[1] == "still@4"
    with pytest.raises(UserError, match="the run has no stage still@x"):
        Run.find(f"{twice}/still@x")


def test_what_starts_from_it_and_what_is_exported_is_the_best_step(twice: Path):
    session = Session.open(Run.at(twice), twice / "student")
    found = role_from(f"{twice}/still", "student", session.models, session.folder, session.key)
    same_bits(found, session.final_role("still@2", "student"))
    with pytest.raises(AssertionError):
        same_bits(found, session.final_role("still@6", "student"))
    with pytest.MonkeyPatch.context() as patch:
        read_steps, restore = list[int](), Checkpoints.restore_role
        patch.setattr(Checkpoints, "restore_role", lambda self, step, *others: read_steps.append(step) or restore(self, step, *others))
        folder = export_stage(session, "still")
    assert read_steps == [2]
    assert json.loads((folder / "gadjax.json").read_text())["checkpoint"] == checkpoint_digest(session.run.checkpoints("still"), 2)


def same_bits(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_checkpoint_is_measured(twice: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(twice.parent.parent)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "tiny.yaml", "--all", "teacher.samples=2", "prompts.tests={unseen: unseen.jsonl}"])
    assert stop.value.code == 0
    stages = json.loads((twice / "evaluation" / "checkpoints.json").read_text())["stages"]
    assert list(stages) == ["student", "seqkd", "still", "still@4", "still@6", "gad"]
    assert stages["still"]["rouge_l"] == pytest.approx(stages["student"]["rouge_l"])
    lines = (twice / "evaluation" / "checkpoints.csv").read_text().splitlines()
    assert lines[0].startswith("split,stage,metric,mean,low,high,")
    assert len(lines) == 1 + 2 * sum(map(len, stages.values()))
    (row,) = (line.split(",") for line in lines if line.startswith("unseen,still@4,rouge_l,"))
    mean, low, high = map(float, row[3:6])
    assert low <= mean <= high


def counts_by_id(data: Snapshot) -> Counter[str]:
    return Counter(example.prompt.id for example in data.splits["unseen"])


# --- missing answers --------------------------------------------------------------------------------------------------


def test_groups_are_made_of_the_answers_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every prompt is asked for two answers: to one of four none is given, to another only one."""
    said = list[str]()
    for module in (collecting, prepare):
        monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setenv("TEST_KEY", "k")
    monkeypatch.chdir(tmp_path)

    def reply(text: str, before: int) -> Reply:
        match int(text.split()[1]) % 4:
            case 1:
                return 200, {}, good("", choice={"message": {"role": "assistant", "content": None, "refusal": "I will not"}})
            case 2 if before:
                return 400, {}, error("something is wrong")
        return ok(f"{before} {text}")

    texts = [f"question {number}" for number in range(16)]
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[:12]))
    Path("validation.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[12:]))
    Path("tiny.yaml").write_text(tiny.CONFIG)
    with desk(reply) as (_, teacher):
        backend = f"{{backend: openai, model: m, samples: 2, base_url: '{teacher.base_url}', api_key_env: TEST_KEY, tries: 1}}"
        files = "prompts={train: train.jsonl, validation: validation.jsonl}"
        run = Run.open(Path("tiny.yaml"), [f"teacher={backend}", "teacher.price={input: 0, output: 0}", files])
        collect_answers(run)
    prepare_data(run)
    data = Snapshot.open(run.data)
    wanted = {text: (2, 0, 1, 2)[number % 4] for number, text in enumerate(texts)}
    assert counts(list(data.train)) == Counter({text: wanted[text] for text in texts[:12] if wanted[text]})
    assert counts(list(data.validation)) == Counter({text: wanted[text] for text in texts[12:] if wanted[text]})
    assert said == [
        "collect: 20 of 32 answers (8 refused, 4 failed, 0 cut by length, $0.00)",
        "prepare: 15 groups to train on, 5 held out",
    ]


# --- another tokenizer ------------------------------------------------------------------------------------------------

FOREIGN = ["<|eot_id|>", "[INST] go on [/INST]", "</s>", "<|im_end|>\n<|im_start|>user", "<start_of_turn>", "▁word", "<0x0A>", "<think>"]
OWN = [*CONTROL, "<|<|end|>end|>", "stop<|end|><|user|>ask<|end|><|assistant|>"]  # the student's
WRITTEN = [f"{mark} as {number} {mark}" for number, mark in enumerate([*FOREIGN, *OWN])]


def test_a_teacher_s_control_strings_are_plain_text_to_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    # Ids of the teacher's own tokenizer, which some files have, are not looked at.
    rows = [{"prompt": f"say {text}", "response": text, "token_ids": [128_009, 1]} for text in WRITTEN]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = ["teacher={backend: file, path: answers.jsonl}", "prompts={train: null, validation: null, validation_share: 0.2}"]
    run = Run.open(Path("tiny.yaml"), [*teacher, "data={max_prompt_tokens: 200, max_response_tokens: 200, row_tokens: null}"])
    collect_answers(run)
    text = Text.load(str(prepare_data(run)))
    data = Snapshot.open(run.data)
    examples = [*data.train, *data.validation]
    assert sorted(example.answer.text for example in examples) == sorted(WRITTEN)
    groups = [example.tokens for example in examples]
    shape = RowShape(groups=len(groups), micro_batches=len(groups), rows=1, length=400)
    cells = pack([group.prompt for group in groups], [[group.teacher] for group in groups], shape).cells
    _, end, _, user, assistant = (text._template.token_to_id(token) for token in CONTROL)
    for index, example in enumerate(examples):
        (ours,) = np.nonzero((cells.groups_ML == index).reshape(-1) & (cells.segments_ML >= 0).reshape(-1))
        tokens, responses = (cell.reshape(-1)[ours].tolist() for cell in (cells.tokens_ML, cells.responses_ML))
        prompt, response = tokens[: responses.index(0)], tokens[responses.index(0) :]
        assert [id for id in prompt if id in text.control] == [user, end, assistant]
        assert [id for id in response if id in text.control] == [end] == response[-1:]
        assert text.decode(response) == example.answer.text
        assert text.decode(prompt[1:]) == example.prompt.text
