"""The commands about the teacher's answers: collect them, look at what is there, estimate the rest, import what exists already."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from gadjax.errors import UserError
from gadjax.records import Prompt
from gadjax.runs import Run
from gadjax.teachers import grammar
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import all_requests, collect, request_for
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.estimate import Estimate, estimate
from gadjax.teachers.file import Fields, read_pairs
from gadjax.teachers.openai import api_key, has_key, price_of
from gadjax.teachers.requests import Outcome, Request
from gadjax.terminal import say, track

CHUNK = 1000  # imported rows a transaction


def check_teacher(run: Run) -> None:
    """Tells what is wrong with the prompts, and what a first request would be refused for."""
    if not all(run.prompts.values()):
        raise UserError("prompts", "there are none to train on, or none held out", "give more prompts")
    for teacher in run.config.all_teachers.values():
        match teacher.backend:
            case "openai" if not run.cache.exists():
                api_key(teacher)
                price_of(teacher)
            case "file" if not run.cache.exists():
                next(read_pairs(str(teacher.path)), None)
            case "tutor":
                for prompt in itertools.chain(*run.prompts.values()):
                    grammar.check(prompt.messages[-1]["content"])


def collect_answers(run: Run, limit: int | None = None) -> None:
    """The answers of all teachers to all prompts into the run's cache; of each teacher only `limit`, where it is given."""
    prompts = [*itertools.chain(*run.prompts.values())]
    teachers = run.config.all_teachers
    for name, teacher in teachers.items():
        title = "collect" if len(teachers) == 1 else f"collect {name}"
        wanted = len(prompts) * teacher.samples
        with TeacherCache(run.cache) as cache, track(title, min(wanted, limit or wanted)) as advance:
            summary = collect(prompts, teacher, cache, lambda done, _, advance=advance: advance(done, ""), limit)
        if summary.refused or summary.failed or summary.truncated or summary.cost:
            told = f"{summary.refused} refused, {summary.failed} failed, {summary.truncated} cut by length, ${summary.cost:.2f}"
            say(f"{title}: {summary.ok} of {summary.wanted} answers ({told})")


def collect_unless_frozen(run: Run) -> None:
    """The same for a run that trains. Where its data is frozen and a key is not here, as on rented chips, no teacher is needed."""
    if run.data.exists() and not all(map(has_key, run.config.all_teachers.values())):
        say("collect: the data is frozen, and no key is here: nothing more is asked")
    else:
        collect_answers(run)


def collect_command(config: Path, overrides: list[str], show_status: bool, dry_run: bool, limit: int | None, as_json: bool) -> None:
    """Collects; or only tells what is there, or what it would take. Needs no student, tokenizer or device."""
    run = Run.open(config, overrides)
    if show_status:
        _tell(status(run), as_json, "status")
    elif dry_run:
        _tell(_estimate(run, limit), as_json, "dry run")
    else:
        run.fetch()
        check_teacher(run)
        with run.begin(alone=False):
            collect_answers(run, limit)
            run.push()
        if as_json:
            _tell(status(run), as_json, "status")


def status(run: Run) -> dict[str, float]:
    """How many of the wanted answers have which outcome, all teachers together, and the dollars that all of the cache has cost."""
    prompts = [*itertools.chain(*run.prompts.values())]
    keys = {request.key for teacher in run.config.all_teachers.values() for request in all_requests(prompts, teacher)}
    counts, cost = Counter[str](), 0.0
    if run.cache.exists():
        with TeacherCache(run.cache, read_only=True) as cache:
            for state, _, number, _ in cache.tally(keys):
                counts[state] += number
            cost = cache.cost()
    outcomes = {name: counts[name] for name in ("ok", "refused", "failed")}
    return {**outcomes, "pending": len(keys) - sum(outcomes.values()), "cost": cost}


def _estimate(run: Run, limit: int | None) -> dict[str, float]:
    """What is still to be asked of all teachers together."""
    prompts = [*itertools.chain(*run.prompts.values())]
    found = list[Estimate]()
    for name, teacher in run.config.all_teachers.items():
        requests = sorted(all_requests(prompts, teacher), key=lambda request: request.key)[:limit]
        if run.cache.exists():
            with TeacherCache(run.cache, read_only=True) as cache:
                found.append(estimate(requests, teacher, cache))
        else:
            found.append(estimate(requests, teacher, None))
        if found[-1].calls and not found[-1].based_on and teacher.backend == "openai":
            say(f"{name}: no answer is known yet, so each counts as teacher.max_tokens; `gadjax collect --limit 100` mends it")
    sums = {name: sum(asdict(each)[name] for each in found) for name in ("calls", "prompt_tokens", "completion_tokens", "cost", "based_on")}
    return sums | {"error": max(each.error for each in found)}


def _tell(facts: dict[str, float], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        shown = (f"{name.replace('_', ' ')} {_number(name, value)}" for name, value in facts.items())
        print(f"{title}: {', '.join(shown)}")


def _number(name: str, value: float) -> str:
    return f"${value:.2f}" if name == "cost" else f"{value:.1%}" if name == "error" else f"{value:,}"


def import_command(
    source: str, into: Path, overrides: list[str], fields: tuple[str | None, ...], teacher: str, replace: bool, as_json: bool
) -> None:
    """Takes answers that exist already into a run's cache, as those of one of its teachers.

    Args:
        source: what `gadjax.rows.read_rows` reads.
        into: the config.
        overrides: its overrides.
        fields: the names of the rows' fields: the prompt's, the answer's, the conversation's.
        teacher: `teacher`, or one of the further `teachers` by its name.
        replace: answers that are there already give way to those of the source.
        as_json: print the counts as JSON.
    """
    run = Run.open(into, overrides)
    config = run.config.all_teachers.get(teacher)
    if config is None:
        raise UserError("--teacher", f"the config has no teacher {teacher!r}", f"use one of {', '.join(run.config.all_teachers)}")
    run.fetch()
    pairs = read_pairs(source, Fields(*fields), "import")
    first = next(pairs, None)  # before anything is made
    if first is None:
        raise UserError(source, "has no rows", "name another file")
    with run.begin():
        with TeacherCache(run.cache) as cache:
            counts = import_answers(itertools.chain([first], pairs), config, cache, replace)
        run.push()  # of the closed cache: an open one has a part of it in another file
    if as_json:
        print(json.dumps(counts))
    unused = counts["unused"]
    say(f"import: {counts['new']} answers taken, {counts['known']} were there, {counts['empty']} of all are empty")
    if unused:
        say(f"import: {unused} answers wait: they are further ones to their prompts, and teacher.samples is {config.samples}")


def import_answers(
    pairs: Iterator[tuple[str, Prompt, Outcome]], config: TeacherConfig, cache: TeacherCache, replace: bool = False
) -> dict[str, int]:
    """The answers into the cache, as those that `config` asks for. The n-th answer to the same messages is their n-th sample.

    Returns:
        How many are `new`, were `known`, are `empty` (which counts as a refusal), and are `unused`: more than `config.samples`.
    """
    seen = Counter[str]()
    counts = {"new": 0, "known": 0, "empty": 0, "unused": 0}
    while chunk := list(itertools.islice(pairs, CHUNK)):
        wanted = list[tuple[Request, Outcome]]()
        for _, prompt, outcome in chunk:
            messages = str(prompt.messages)
            wanted.append((request_for(prompt, config, seen[messages]), outcome))
            counts["empty"] += outcome.state == "refused"
            counts["unused"] += seen[messages] >= config.samples
            seen[messages] += 1
        known = cache.answered(request.key for request, _ in wanted)
        counts["known"] += len(known)
        counts["new"] += len(wanted) - len(known)
        cache.record(wanted, replace)
    return counts
