"""`gadjax judge RUN`: what a judge says of the stages' greedy answers to the held-out prompts.

The judge is asked like a teacher: within its budget, many requests at once, every verdict kept in `judge.sqlite` and asked for once;
a reply that is no verdict is asked for again the next time. It goes some prompts at a time, so that whatever stops it leaves those
complete. Only prompts on which there is a verdict for every stage count, so that the stages are compared on the same prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gadjax.errors import UserError
from gadjax.evaluate import evaluation_folder
from gadjax.evaluation.answers import read_answers
from gadjax.evaluation.judge import (
    Better,
    JudgeConfig,
    Pair,
    Points,
    Shares,
    better_pair,
    points_pair,
    read_verdict,
    reference_request,
    shares,
)
from gadjax.evaluation.measure import Metric
from gadjax.evaluation.statistics import bootstrap
from gadjax.evaluation.summary import HELD_OUT, merged, summarise, to_table
from gadjax.evaluation.table import print_tables
from gadjax.files import replace_file, to_csv, to_json
from gadjax.human import TEACHER, judge_by_people
from gadjax.records import Prompt
from gadjax.report.page import read_summary
from gadjax.runs import Run
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import BACKENDS
from gadjax.teachers.dispatch import OnProgress
from gadjax.teachers.requests import Request
from gadjax.terminal import console, say, track

CACHE = "judge.sqlite"
SETTINGS = "judge.json"  # of the judge whose verdicts are in the summary: it may have been named on the command line alone
POINTS = "judge_points"
PORTION = 32  # prompts that are judged for all stages before others are


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


class Case(NamedTuple):
    """A stage's answer to a prompt, of which the judge is asked for two verdicts, one in each order."""

    prompt: str
    metric: str
    stage: str
    pair: Pair

    @property
    def kind(self) -> type[Points] | type[Better]:
        """Of the verdicts."""
        return Points if self.metric == POINTS else Better


@dataclass(frozen=True)
class Found:
    """What the judge has said.

    Attributes:
        metrics: `judge_points` and `wins_<other>` of each stage, over the prompts that count.
        verdicts: all there are, of prompts that do not count, too.
    """

    metrics: Mapping[str, Mapping[str, Metric]]
    verdicts: Sequence[tuple[Case, Shares]]


def judge(place: str, overrides: list[str], by_people: tuple[str, str, int, bool] | None, as_json: bool) -> None:
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
    """Asks for what is missing and adds all verdicts to `summary.json`, also when it is stopped; returns their own summary."""
    try:
        for split in _splits(run):
            ask(run, config, split)
    finally:
        summary = _write(run, config)
    return summary


def _write(run: Run, config: JudgeConfig) -> dict[str, Any]:
    found = _found(run, config)
    summary = _summary(found)
    rows = [row for each in found.values() for row in _rows(each.verdicts)]
    if not rows:
        return summary
    replace_file(run.folder / SETTINGS, config.model_dump_json(by_alias=True, indent=2))
    file = run.folder / "summary.json"
    if (before := read_summary(file)) is not None:
        whole = merged(before, summary)
        replace_file(file, to_json(whole, indent=2))
        replace_file(file.with_suffix(".csv"), to_table(whole))
    table = run.folder / "evaluation" / "judge.csv"
    replace_file(table, to_csv(("stage", "metric", "prompt", "place", "value"), rows))
    favour = [_wins(share if place == "first" else 1 - share) for _, _, _, place, share in rows]
    say(f"judge: {sum(favour) / len(favour):.1%} of {len(favour)} verdicts are for the answer in the first place, a tie counting one half")
    say(f"judge: every verdict is in {table}")
    return summary


def _rows(verdicts: Sequence[tuple[Case, Shares]]) -> Iterator[tuple[str, str, str, str, float]]:
    """A verdict's stage, metric and prompt, the place of the stage's answer, and its share."""
    for case, found in verdicts:
        for place, share in found._asdict().items():
            if share is not None:
                yield case.stage, case.metric, case.prompt, place, share


def _wins(share: float) -> float:
    return 0.5 if share == 0.5 else float(share > 0.5)


def verdicts_so_far(run: Run) -> dict[str, Any]:
    """The summary of what the judge that was asked last, if one was, has said of the answers as they are now."""
    file, nothing = run.folder / SETTINGS, {HELD_OUT: Found({}, ())}
    if not file.exists() or not (run.folder / CACHE).exists():
        return _summary(nothing)
    try:
        return _summary(_found(run, JudgeConfig.model_validate_json(file.read_text(encoding="utf-8"))))
    except (ValidationError, UserError) as error:  # a run that it was compared with may be gone
        reason = error if isinstance(error, UserError) else f"{file} is not what `gadjax judge` wrote"
        say(f"judge: its verdicts are left out of the summary until it is asked again: {reason}")
        return _summary(nothing)


def _splits(run: Run) -> list[str]:
    return [HELD_OUT, *run.config.prompts.tests]


def _found(run: Run, config: JudgeConfig) -> dict[str, Found]:
    return {split: read(run, gather(run, config, split), config) for split in _splits(run)}


def _summary(found: Mapping[str, Found]) -> dict[str, Any]:
    return summarise({split: each.metrics for split, each in found.items()}, 0.0)


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


def ask(run: Run, config: JudgeConfig, split: str) -> None:
    """Asks the judge for what is not in the cache: of some prompts after the other, first for its own answers, then for verdicts."""
    answers = gather(run, config, split)
    names = list(answers.prompts)
    portion = PORTION if config.batch is None else len(names)  # a batch takes hours, however small
    with TeacherCache(run.folder / CACHE) as cache, track(f"judge: {split}", len(names)) as advance:
        for start in range(0, len(names), portion):
            some = names[start : start + portion]

            def told(what: str, before: int = start) -> OnProgress:
                return lambda done, total: advance(before, f"{what} {done}/{total}")

            _collect([reference_request(answers.prompts[name], config) for name in some], config, cache, told("references"))
            cases = _cases(config, answers, cache, some)
            _reopen(cases, cache)
            requests = {request.key: request for case in cases for request in case.pair}
            _collect(list(requests.values()), config, cache, told("verdicts"))
            advance(start + len(some), "")


def _collect(requests: Sequence[Request], config: JudgeConfig, cache: TeacherCache, on_progress: OnProgress) -> None:
    try:
        BACKENDS[config.backend](requests, config, cache, on_progress)
    except UserError as error:
        raise UserError(error.where.replace("teacher", "evaluation.judge", 1), error.what, error.mend) from error


def _reopen(cases: Sequence[Case], cache: TeacherCache) -> None:
    """Replies that are no verdicts count as failed from now on, so that they are asked for again; what they cost is kept."""
    kinds = {request.key: (request, case.kind) for case in cases for request in case.pair}
    wrong = []
    for key, outcome in cache.outcomes(kinds).items():
        request, kind = kinds[key]
        if outcome.state == "ok" and read_verdict(kind, outcome.text) is None:
            wrong.append((request, replace(outcome, state="failed", error="the reply is no verdict")))
    cache.record(wrong, replace=True)


def _cases(config: JudgeConfig, answers: Answers, cache: TeacherCache, names: Sequence[str]) -> list[Case]:
    """All that is to be judged, prompt by prompt. One that the judge did not answer has no points."""
    wanted = {name: reference_request(answers.prompts[name], config).key for name in names}
    outcomes = cache.outcomes(wanted.values())
    references = {name: outcomes[key].text for name, key in wanted.items() if key in outcomes and outcomes[key].state == "ok"}
    found = list[Case]()
    for name in names:
        for stage, text in ((stage, ours[name]) for stage, ours in answers.stages.items() if name in ours):
            if name in references:
                found.append(Case(name, POINTS, stage, points_pair(answers.prompts[name], text, references[name], config)))
            for other, theirs in answers.others.items():
                if other != stage and name in theirs:
                    found.append(Case(name, f"wins_{other}", stage, better_pair(answers.prompts[name], text, theirs[name], config)))
    return found


def read(run: Run, answers: Answers, config: JudgeConfig) -> Found:
    """What the judge has said. Asks nothing."""
    with TeacherCache(run.folder / CACHE) as cache:
        cases = _cases(config, answers, cache, list(answers.prompts))
        outcomes = cache.outcomes({request.key for case in cases for request in case.pair})
    verdicts = [(case, shares(case.kind, case.pair, outcomes)) for case in cases]
    metrics: dict[str, dict[str, Metric]] = {stage: {} for stage in answers.stages}
    counts = dict[str, int]()
    for metric in (POINTS, *(f"wins_{name}" for name in answers.others)):
        values: dict[str, dict[str, float]] = {stage: {} for stage in answers.stages if metric != f"wins_{stage}"}
        for case, found in verdicts:
            if case.metric == metric and (mean := found.mean) is not None:
                values[case.stage][case.prompt] = 100 * mean if metric == POINTS else mean
        common = [name for name in answers.prompts if all(name in those for those in values.values())]
        for stage, those in values.items() if common else ():
            kept = {name: those[name] for name in common}
            metrics[stage][metric] = Metric(sum(kept.values()) / len(kept), kept, bootstrap)
        counts[metric] = len(common)
    if outcomes and any(count < len(answers.prompts) for count in counts.values()):
        shown = ", ".join(f"{metric} {count}" for metric, count in counts.items())
        say(f"judge: of {len(answers.prompts)} prompts only those with a verdict for every stage count: {shown}")
    return Found(metrics, verdicts)
