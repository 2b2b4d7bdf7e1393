"""Several runs on one page, and in one table: their metrics, the settings in which they differ, their curves over each other."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gadjax.errors import UserError
from gadjax.metrics import read
from gadjax.report.charts import COLOURS
from gadjax.report.curves import overlaid_charts, validation_charts
from gadjax.report.page import read_summary, table_of, write_page

ABSENT = "–"


def compare_runs(runs: Mapping[str, Path], stage: str | None = None) -> dict[str, Any]:
    """One summary of several runs, as `gadjax.evaluation.summary` makes it of one; its stages are called RUN/STAGE.

    Args:
        runs: their folders by name.
        stage: the one to compare; by default the last that each run has evaluated.

    Raises:
        UserError: a run has no summary, or no such stage in it.
    """
    merged: dict[str, Any] = {"stages": {}, "intervals": {}, "differences": {}, "baseline": "", "prompts": 0, "seconds": 0.0}
    for name, folder in runs.items():
        summary = read_summary(folder / "summary.json")
        if summary is None:
            raise UserError(str(folder), "is no run that was evaluated", "run `gadjax run` or `gadjax evaluate` with its config first")
        chosen = stage or list(summary["stages"])[-1]
        if chosen not in summary["stages"]:
            raise UserError(str(folder), f"has not evaluated a stage {chosen}", f"use one of {', '.join(summary['stages'])}")
        merged["stages"][f"{name}/{chosen}"] = summary["stages"][chosen]
        merged["intervals"][f"{name}/{chosen}"] = summary["intervals"].get(chosen, {})
        merged["prompts"] = max(merged["prompts"], summary["prompts"])
        merged["seconds"] += summary["seconds"]
    return merged


def settings(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The fields in which configs differ, with the value in each; their names apart."""
    flat = [dict(_fields("", config)) for config in configs.values()]
    names = dict.fromkeys(field for fields in flat for field in fields if field not in ("run.name", "run.folder"))
    rows = [(name, [fields.get(name, ABSENT) for fields in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def write_comparison(path: Path, runs: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Writes the page: the table of `summary`, which `compare_runs` made, the settings in which the runs' `configs` differ, and curves."""
    colours = {name: 1 + index % (COLOURS - 1) for index, name in enumerate(runs)}
    stages = dict.fromkeys(stage for config in configs.values() for stage in config.get("stages") or {})
    rows = {stage: _rows(runs, stage) for stage in stages}
    training = [{"name": stage, "steps": _steps(found), "charts": _charts(found, colours)} for stage, found in rows.items() if found]
    write_page(
        path,
        name=" and ".join(runs),
        facts=[f"{len(runs)} runs"],
        table=table_of(summary),
        settings={"runs": list(runs), "rows": settings(configs)},
        training=training,
    )


def _charts(found: Mapping[str, Sequence[Any]], colours: Mapping[str, int]) -> list[Any]:
    runs = {name: [rows] for name, rows in found.items()}
    return [*overlaid_charts(runs, colours), *validation_charts(runs, colours)]


def _rows(runs: Mapping[str, Path], stage: str) -> dict[str, list[Any]]:
    found = {name: read(folder / "stages" / stage / "metrics.jsonl") for name, folder in runs.items()}
    return {name: rows for name, rows in found.items() if rows}


def _steps(found: Mapping[str, Sequence[Any]]) -> int:
    return max(int(rows[-1]["step"]) for rows in found.values())


def _fields(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _fields(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, str(value)
