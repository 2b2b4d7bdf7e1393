"""`report/index.html`: one self-contained page about a run, made from the files in its folder. It loads nothing and runs no script."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gadjax.errors import UserError
from gadjax.evaluation.table import interval_text
from gadjax.files import replace_file
from gadjax.health import episodes
from gadjax.metrics import Row, read
from gadjax.report.answers import Answers, evolution, examples, read_answers, styles
from gadjax.report.charts import COLOURS
from gadjax.report.curves import MEANINGS, meaning, stage_charts, validation_charts
from gadjax.report.templates import STYLE, TEMPLATES
from gadjax.report.timeline import duration, where_the_time_went


def write_report(run: Path, stages: Sequence[str], under_way: str | None = None, losses: Mapping[str, str] | None = None) -> Path:
    """Writes the page from what is there: a run that is under way has a report too.

    Reads `summary.json`, `stages/<name>/metrics.jsonl` and `evaluation/<name>.jsonl`. All text in them, answers above all,
    is escaped: it cannot become markup.

    Args:
        run: the run's folder; its name is the page's title.
        stages: names of the stages in the order in which they are shown, `student` included where it was evaluated.
        under_way: what is being done; the page then loads itself anew every half minute.
        losses: of the discriminators, by stage: names of a config.

    Returns:
        the page's path.

    Raises:
        UserError: there is no such run, or a file in it is broken.
    """
    if not run.is_dir():
        raise UserError(str(run), "there is no such run", "run `gadjax run CONFIG` first")
    colours = {"teacher": 0} | {stage: 1 + i % (COLOURS - 1) for i, stage in enumerate(stages)}
    rows = {stage: found for stage in stages if (found := read(run / "stages" / stage / "metrics.jsonl"))}
    answers = read_answers(run / "evaluation", stages)
    summary = read_summary(run / "summary.json")
    training = [
        {"name": stage, "steps": int(found[-1]["step"]), "charts": stage_charts(found, (losses or {}).get(stage))}
        for stage, found in rows.items()
    ]
    path = run / "report" / "index.html"
    write_page(
        path,
        name=run.resolve().name,
        data=(run / "report" / "data.html").exists(),
        facts=_facts(summary, list(rows)) + ([f"under way: {under_way}"] if under_way else []),
        reload=under_way is not None,
        health=[{"stage": stage, "episodes": _episodes(stage, found)} for stage, found in rows.items()],
        table=table_of(summary) if summary else None,
        tests=[(name, table_of(found)) for name, found in summary.get("tests", {}).items()] if summary else [],
        time=where_the_time_went(rows, summary["seconds"] if summary else None),
        styles=styles(answers, colours),
        evolution=evolution(run, {stage: [int(row["step"]) for row in found] for stage, found in rows.items()}, colours),
        examples=examples(answers, colours),
        prompts=_prompts(answers),
        validation=validation_charts({stage: [found] for stage, found in rows.items()}, colours),
        training=[stage for stage in training if stage["charts"]],
    )
    return path


def write_page(path: Path, **sections: Any) -> None:
    """Writes a page of those of the sections of `page.html` that are given."""
    nothing = {"table": None, "time": None, "settings": None, "reload": False, "data": False, "prompts": 0}
    lists = {name: [] for name in ("health", "tests", "styles", "evolution", "examples", "validation", "training")}
    replace_file(path, TEMPLATES.get_template("page.html").render(nothing | lists | {"style": Markup(STYLE)} | sections))


def read_summary(path: Path) -> dict[str, Any] | None:
    """A run's `summary.json`, where there is one."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(str(path), "is not JSON", "delete it and run `gadjax evaluate`") from None


def _prompts(answers: Answers) -> int:
    return max((len(rows) for rows in answers.values()), default=0)


def _facts(summary: Mapping[str, Any] | None, trained: Sequence[str]) -> list[str]:
    facts = [f"stages trained: {', '.join(trained)}"] if trained else []
    if summary:
        facts.append(f"{summary['prompts']} validation prompts")
        facts.append(f"{duration(summary['seconds'])} in all")
    return facts


def _episodes(stage: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was wrong in a stage, as the page tells it."""
    last = int(rows[-1]["step"])
    return [
        {
            "steps": f"from step {each.first} on" if each.last == last else f"steps {each.first} to {each.last}",
            "told": each.finding.told(stage),
            "over": each.last < last,
        }
        for each in episodes(rows)
    ]


def table_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a summary."""
    stages = summary["stages"]
    names = dict.fromkeys(name for metrics in stages.values() for name in metrics)
    ordered = [name for name in MEANINGS if name in names] + [name for name in names if name not in MEANINGS]
    return {"stages": list(stages), "baseline": summary["baseline"], "rows": [_row(summary, name) for name in ordered]}


def _row(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    largest = max(abs(metrics.get(name) or 0) for metrics in summary["stages"].values())
    places = 3 if largest < 10 else 2 if largest < 100 else 1
    return {"name": name, "meaning": meaning(name), "cells": [_cell(summary, stage, name, places) for stage in summary["stages"]]}


def _cell(summary: Mapping[str, Any], stage: str, name: str, places: int) -> dict[str, Any]:
    value = summary["stages"][stage].get(name)
    low, high = summary["intervals"].get(stage, {}).get(name, (None, None))
    cell = {"value": "–" if value is None else f"{value:.{places}f}", "interval": interval_text(value, low, high, places)}
    difference = summary["differences"].get(stage, {}).get(name)
    if not difference or difference["low"] is None:
        return cell | {"difference": "", "sure": False}
    shown = f"{difference['mean']:+.{places}f} {interval_text(**difference, places=places, sign='+')}"
    return cell | {"difference": shown, "sure": difference["low"] > 0 or difference["high"] < 0}
