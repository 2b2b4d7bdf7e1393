"""The discriminator's choice in the evaluation."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gadjax.answering import Answerer
from gadjax.config import Config, make_config
from gadjax.errors import UserError
from gadjax.evaluate import evaluate_stages
from gadjax.evaluation.answers import read_answers
from gadjax.evaluation.samples import BEST_OF, Samples
from gadjax.referee import Referee
from gadjax.runs import Run
from gadjax.scoring import Scorer
from gadjax.session import Session
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # it may wait for a whole run

COUNT = 3


def configured(config: Config, **evaluation: object) -> Config:
    values = config.model_dump(by_alias=True)
    return make_config(values | {"evaluation": values["evaluation"] | evaluation})


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Of a copy of the finished run, which is to be measured so."""
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    folder = Path(shutil.copytree(experiment.run, tmp_path_factory.mktemp("chosen") / "tiny"))
    run = Run.at(folder)
    return Session.open(replace(run, config=configured(run.config, best_of=COUNT, stages=["gad"])), folder / "student")


def test_the_favourite_of_several_samples_is_measured(session: Session):
    """A scorer that likes length gets the longest answer of each group; nothing else of that answer is another's."""
    examples, seen = list(session.snapshot.validation), list[list[int]]()

    def by_length(prompts: Sequence[object], responses: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
        seen.extend([len(answer) for answer in own] for own in responses)
        return [[float(len(answer)) for answer in own] for own in responses]

    params = session.student_params("gad")
    longest = session.answerer.answer(params, examples, BEST_OF, by_length)  # type: ignore[arg-type]
    assert all(len(lengths) == COUNT for lengths in seen)
    np.testing.assert_array_equal(longest.lengths, [max(lengths) for lengths in seen[: len(examples)]])
    assert all(length == 16 for length, cut in zip(longest.lengths, longest.truncated, strict=True) if cut)
    assert np.all(longest.log_probs < 0) and np.std(longest.log_probs) > 0


def test_the_discriminator_chooses_in_the_evaluation(session: Session, monkeypatch: pytest.MonkeyPatch):
    old, answer = read_answers(session.run.folder / "evaluation" / "gad.jsonl"), Answerer.answer

    def chosen_anew(answerer: Answerer, params: object, examples: object, mode: str, scorer: object) -> Samples:
        return answer(answerer, params, examples, mode, scorer) if mode == BEST_OF else old[mode]  # type: ignore[arg-type]

    monkeypatch.setattr(Answerer, "answer", chosen_anew)
    measured = evaluate_stages(session)["validation"]
    names = {f"best_of_{name}" for name in ("rouge_l", "validity", "correctness", "length_mean")}
    assert all(names <= measured[stage].keys() for stage in ("student", "gad"))
    file = session.run.folder / "evaluation" / "gad.jsonl"
    assert len(read_answers(file)[BEST_OF].texts) == len(session.snapshot.validation)
    written = file.stat().st_mtime_ns
    evaluate_stages(session)
    assert file.stat().st_mtime_ns == written, "answers are kept"
    plain = replace(session, run=replace(session.run, config=configured(session.run.config, best_of=1)))
    assert not names & evaluate_stages(plain)["validation"]["gad"].keys()


def test_somebody_must_be_there_to_choose():
    stages = {"seqkd": {"algorithm": "seqkd"}}
    with pytest.raises(UserError, match=r"evaluation.best_of: no stage has a discriminator"):
        make_config({"stages": stages, "evaluation": {"best_of": 2}})
    with pytest.raises(UserError, match=r"evaluation.discriminator: 'seqkd' is not a stage that has one"):
        make_config({"evaluation": {"best_of": 2, "discriminator": "seqkd"}})


def test_a_referee_s_wins_are_those_of_its_scores_one_by_one(session: Session):
    folder = session.run.folder
    config = configured(session.run.config, referee=str(folder / "warmup"))
    measured = evaluate_stages(replace(session, run=replace(session.run, config=config)), ["gad"])["validation"]["gad"]
    samples = read_answers(folder / "evaluation" / "gad.jsonl")["greedy"]
    alone = Scorer(session.models, session.final_role("warmup", "discriminator").params, config.data, 1)
    scored = dict[str, tuple[float, float]]()
    for prompt, teacher, text, cut in zip(samples.prompts, samples.teacher, samples.texts, samples.truncated, strict=True):
        ids = session.text.prompt_ids(prompt.messages, 16)
        answers = [session.text.response_ids(teacher, 16)], [session.text.response_ids(text, 16, cut) or (session.text.end_of_turn,)]
        (of_teacher,), (own,) = alone([ids, ids], answers)
        scored[prompt.id] = of_teacher, own
    wins, scores = measured["referee_wins"], measured["referee_score"]
    assert wins.by_prompt == {name: 0.5 * (1 + np.sign(own - teacher)) for name, (teacher, own) in scored.items()}
    assert 0 < wins.value < 1, "it prefers some and not others"
    assert scores.by_prompt == pytest.approx({name: own for name, (_, own) in scored.items()}, abs=1e-5)
    copied = Referee.of(str(folder / "warmup"), 8).measure(replace(samples, texts=samples.teacher, truncated=samples.truncated & False))
    assert copied["referee_wins"].value == 0.5
