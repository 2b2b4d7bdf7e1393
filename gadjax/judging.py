"""`gadjax judge RUN`: what a judge says of the stages' greedy answers to the held-out prompts.

The judge is asked like a teacher: within its budget, many requests at once, every verdict kept in `judge.sqlite` and asked for once.
Only prompts on which there is a verdict for every stage count, so that the stages are compared on the same prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadjax.errors import UserError
from gadjax.evaluate import evaluation_folder
from gadjax.evaluation.answers import read_answers
from gadjax.evaluation.judge import JudgeConfig, Pair, better_pair, points_pair, reference_request, share_of_points, share_of_wins
from gadjax.evaluation.measure import Metric
from gadjax.evaluation.statistics import bootstrap
from gadjax.evaluation.summary import HELD_OUT, merged, summarise
from gadjax.evaluation.table import print_tables
from gadjax.files import replace_file, to_csv, to_json
from gadjax.human import TEACHER, judge_by_people
from gadjax.records import Prompt
from gadjax.report.page import read_summary
from gadjax.runs import Run
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import BACKENDS
from gadjax.teachers.requests import Outcome, Request
from gadjax.terminal import console, say, track

CACHE = "judge.sqlite"


@dataclass(frozen=True)
class Answers:
    """The greedy answers that are judged.

    Attributes:
        prompts: by their ids.
        stages: of each stage, the answer to each prompt.
        others: the same of those whom stages are compared with.
    """

    prompts: Mapping[str, Prompt]
    stages: Mapping[str, Mapping[str, str]]
    others: Mapping[str, Mapping[str, str]]


def judge(place: str, overrides: list[str], by_people: tuple[str, int, bool] | None, as_json: bool) -> None:
    """Asks for the verdicts that are missing, shows all, and adds them to the run's summary; or lets people vote.

    Args:
        place: the run's folder; with `by_people` it may name a stage.
        overrides: of its config, for example `evaluation.judge.model=gpt-4o`.
        by_people: what `judge_by_people` is told.
        as_json: one JSON object on stdout.

    Raises:
        UserError: the run has no answers or no judge, or the judge cannot be asked. Verdicts that were paid for are kept.
    """
    if by_people is not None:
        judge_by_people(place, *by_people, as_json)
        return
    run = Run.at(Path(place).expanduser(), overrides)
    config = run.config.evaluation.judge
    if config is None:
        raise UserError("evaluation.judge", "the run has no judge", "add evaluation.judge.model=gpt-4o, or another model, to the command")
    with run.locked(alone=False):
        summary = judge_run(run, config)
    if as_json:
        print(to_json(summary))
    else:
        print_tables(summary, console)


def judge_run(run: Run, config: JudgeConfig) -> dict[str, Any]:
    """Asks for what is missing and adds all verdicts to `summary.json`; returns their own summary."""
    for split in _splits(run):
        ask(run, config, gather(run, config, split))
    found = _verdicts(run, config)
    summary = _summary(found)
    file = run.folder / "summary.json"
    if (before := read_summary(file)) is not None:
        replace_file(file, to_json(merged(before, summary), indent=2))
    rows = (
        (stage, name, prompt, value)
        for stages in found.values()
        for stage, metrics in stages.items()
        for name, metric in metrics.items()
        for prompt, value in (metric.by_prompt or {}).items()
    )
    table = run.folder / "evaluation" / "judge.csv"
    replace_file(table, to_csv(("stage", "metric", "prompt", "value"), rows))
    say(f"judge: every verdict is in {table}")
    return summary


def verdicts_so_far(run: Run) -> dict[str, Any]:
    """The summary of what the run's judge, if it has one, has said of the answers as they are now."""
    config = run.config.evaluation.judge
    return _summary(_verdicts(run, config) if config and (run.folder / CACHE).exists() else {HELD_OUT: {}})


def _splits(run: Run) -> list[str]:
    return [HELD_OUT, *run.config.prompts.tests]


def _verdicts(run: Run, config: JudgeConfig) -> dict[str, dict[str, dict[str, Metric]]]:
    return {split: verdicts(run, config, gather(run, config, split)) for split in _splits(run)}


def _summary(found: Mapping[str, Mapping[str, Mapping[str, Metric]]]) -> dict[str, Any]:
    return summarise(found[HELD_OUT], 0.0, {split: stages for split, stages in found.items() if split != HELD_OUT})


def gather(run: Run, config: JudgeConfig, split: str = HELD_OUT) -> Answers:
    """The answers of all stages that were evaluated to a split's prompts, and of those they are compared with."""
    folder = evaluation_folder(run, split)
    greedy = {stage: read_answers(folder / f"{stage}.jsonl")["greedy"] for stage in run.config.evaluated}
    first = next(iter(greedy.values()))
    prompts = dict(list({prompt.id: prompt for prompt in first.prompts}.items())[: config.prompts])
    stages = {stage: _by_id(prompts, samples.ids, samples.texts) for stage, samples in greedy.items()}
    others: dict[str, Mapping[str, str]] = {}
    for name in config.against:
        if name == TEACHER:
            others[name] = _by_id(prompts, first.ids, first.teacher)
        elif name in stages:
            others[name] = stages[name]
        else:
            elsewhere, stage = Run.find(name)
            samples = read_answers(evaluation_folder(elsewhere, split) / f"{stage}.jsonl")["greedy"]
            others[name] = _by_id(prompts, samples.ids, samples.texts)
            if not others[name]:
                what = f"{name} answered none of this run's prompts"
                raise UserError("evaluation.judge.against", what, "name a run with the same prompts")
    return Answers(prompts, stages, others)


def _by_id(prompts: Mapping[str, Prompt], ids: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """The first answer to each of the prompts."""
    return {name: text for name, text in reversed(list(zip(ids, texts, strict=True))) if name in prompts}


def ask(run: Run, config: JudgeConfig, answers: Answers) -> None:
    """Asks the judge for what is not in the cache: first for its own answers, then for verdicts."""
    with TeacherCache(run.folder / CACHE) as cache:
        references = [reference_request(prompt, config) for prompt in answers.prompts.values()]
        _collect("judge: references", references, config, cache)
        requests = {request.key: request for request in _requests(_pairs(config, answers, cache))}
        _collect("judge: verdicts", list(requests.values()), config, cache)


def _collect(title: str, requests: Sequence[Request], config: JudgeConfig, cache: TeacherCache) -> None:
    try:
        with track(title, len(requests)) as advance:
            BACKENDS[config.backend](requests, config, cache, lambda done, _: advance(done, ""))
    except UserError as error:
        raise UserError(error.where.replace("teacher", "evaluation.judge", 1), error.what, error.mend) from error


MakePair = Callable[[Prompt, str, str, JudgeConfig], Pair]
Share = Callable[[Pair, Mapping[str, Outcome]], float | None]
Pairs = dict[str, dict[str, dict[str, Pair]]]  # of a stage, of a metric, of a prompt


def _pairs(config: JudgeConfig, answers: Answers, cache: TeacherCache) -> Pairs:
    """All that is to be judged. A prompt that the judge did not answer has no points."""
    wanted = {name: reference_request(prompt, config).key for name, prompt in answers.prompts.items()}
    outcomes = cache.outcomes(wanted.values())
    references = {name: outcomes[key].text for name, key in wanted.items() if key in outcomes and outcomes[key].state == "ok"}

    def paired(make: MakePair, ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, Pair]:
        return {name: make(answers.prompts[name], text, theirs[name], config) for name, text in ours.items() if name in theirs}

    return {
        stage: {"judge_points": paired(points_pair, ours, references)}
        | {f"wins_{name}": paired(better_pair, ours, theirs) for name, theirs in answers.others.items() if name != stage}
        for stage, ours in answers.stages.items()
    }


def _requests(pairs: Pairs) -> Iterator[Request]:
    return (request for metrics in pairs.values() for wanted in metrics.values() for pair in wanted.values() for request in pair)


def verdicts(run: Run, config: JudgeConfig, answers: Answers) -> dict[str, dict[str, Metric]]:
    """What the judge has said, as metrics of the stages: `judge_points` and `wins_<other>`. Asks nothing."""
    with TeacherCache(run.folder / CACHE) as cache:
        pairs = _pairs(config, answers, cache)
        outcomes = cache.outcomes({request.key for request in _requests(pairs)})
    read: dict[str, dict[str, dict[str, float]]] = {}
    for stage, metrics in pairs.items():
        for metric, wanted in metrics.items():
            read.setdefault(metric, {})[stage] = _read(share_of_points if metric == "judge_points" else share_of_wins, wanted, outcomes)
    found: dict[str, dict[str, Metric]] = {stage: {} for stage in answers.stages}
    for metric, by_stage in read.items():
        common = [name for name in answers.prompts if all(name in values for values in by_stage.values())]
        if left_out := len(answers.prompts) - len(common):
            say(f"judge: {metric}: {left_out} of {len(answers.prompts)} prompts are left out, for some stage has no verdict there")
        for stage, values in by_stage.items():
            if common:
                kept = {name: values[name] for name in common}
                found[stage][metric] = Metric(sum(kept.values()) / len(kept), kept, bootstrap)
    return found


def _read(share: Share, pairs: Mapping[str, Pair], outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    shares = {name: share(pair, outcomes) for name, pair in pairs.items()}
    return {name: value for name, value in shares.items() if value is not None}
