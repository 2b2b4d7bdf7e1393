"""A study: one config run with several seeds, its stages compared over them.

The arms of a study are stages of one config, so that they share the teacher's answers, SeqKD and the warm-up. The seed is the unit of the
intervals (Student's t), and differences from the baseline are taken within a seed.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.config import UNTOUCHED, load_config
from gadjax.errors import UserError
from gadjax.evaluation.seeds import over_seeds
from gadjax.evaluation.statistics import Estimate
from gadjax.evaluation.summary import COLUMNS, HELD_OUT, by_split, rows
from gadjax.evaluation.table import print_tables
from gadjax.files import finite, replace_file, to_csv, to_json
from gadjax.metrics import read
from gadjax.report.charts import figure, mean_chart
from gadjax.report.curves import meaning, meant, overlaid_charts, validation_charts
from gadjax.terminal import console, say

Summaries = Sequence[Mapping[str, Any]]
RUN = (sys.executable, "-c", "from gadjax.cli import main; main()", "run")  # each seed has a process, and the devices, to itself


def study(config: Path, overrides: list[str], seeds: int, baseline: str | None, as_json: bool) -> None:
    """Runs the config with the seeds 0, 1, ...; writes study.json, study.csv and figures into RUNS/NAME-study.

    Goes on where it stopped, as each of its runs does.

    Args:
        config: the YAML file.
        overrides: `key.path=value`; neither the seed nor, of each run, the name.
        seeds: how many.
        baseline: the stage from which differences are taken within a seed; by default that of the runs, `seqkd`. Finished runs are not run
            again for another one.
        as_json: whether the table is printed as JSON.

    Raises:
        UserError: the seed is given, or no such stage is evaluated.
        SystemExit: a run failed; the status is its own.
    """
    if any(override.startswith("run.seed=") for override in overrides):
        raise UserError("run.seed", "is what a study varies", "leave it out, and say how many with --seeds")
    wanted = load_config(config, overrides)
    if baseline is not None and baseline not in wanted.evaluated:
        raise UserError("--baseline", f"{baseline} is not evaluated", f"use one of {', '.join(wanted.evaluated)}")
    settings = wanted.run
    folders = [settings.path.with_name(f"{settings.name}-seed{seed}") for seed in range(seeds)]
    for seed, folder in enumerate(folders):
        say(f"study: seed {seed}, {folder}")
        done = subprocess.run([*RUN, str(config), *overrides, f"run.seed={seed}", f"run.name={folder.name}"], check=False)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    found = pooled([json.loads((folder / "summary.json").read_text()) for folder in folders], baseline)
    out = settings.path.with_name(f"{settings.name}-study")
    replace_file(out / "study.json", to_json(found, indent=2))
    replace_file(out / "study.csv", to_csv((*COLUMNS, "seeds"), ([*row, seeds] for row in rows(found))))
    for name, drawing in figures(found, folders).items():
        replace_file(out / f"{name}.svg", drawing)
    if as_json:
        print(to_json(found))
    else:
        print_tables(found, console)
        say(f"study: {seeds} seeds; intervals are over them, Student's t")
    say(f"study: {out}")


def pooled(summaries: Summaries, baseline: str | None = None) -> dict[str, Any]:
    """The summaries of several seeds as one of the same form, test sets included; metrics that a seed lacks are left out.

    Args:
        summaries: one of each seed.
        baseline: the stage from which differences are taken; by default that of the summaries.
    """
    splits = [by_split(summary) for summary in summaries]
    shared = [name for name in splits[0] if all(name in each for each in splits)]
    found = {name: _pooled([each[name] for each in splits], baseline) for name in shared}
    tests = {name: part for name, part in found.items() if name != HELD_OUT}
    return finite(found[HELD_OUT] | ({"tests": tests} if tests else {}))


def _pooled(summaries: Summaries, wanted: str | None) -> dict[str, Any]:
    """The same of one split."""
    first = summaries[0]
    baseline = wanted or first["baseline"]
    cells = {
        stage: {name: values for name in metrics if None not in (values := [each["stages"][stage].get(name) for each in summaries])}
        for stage, metrics in first["stages"].items()
    }
    means = {stage: {name: over_seeds(values) for name, values in metrics.items()} for stage, metrics in cells.items()}
    differences = {
        stage: {
            name: vars(over_seeds(np.subtract(values, cells[baseline][name])))
            for name, values in metrics.items()
            if name in cells[baseline]
        }
        for stage, metrics in cells.items()
        if baseline in cells and stage not in (baseline, UNTOUCHED)
    }
    return {
        "stages": {stage: {name: value.mean for name, value in metrics.items()} for stage, metrics in means.items()},
        "intervals": {stage: {name: [value.low, value.high] for name, value in metrics.items()} for stage, metrics in means.items()},
        "differences": differences,
        "baseline": baseline,
        "prompts": first["prompts"],
        "seeds": len(summaries),
        "values": cells,
    }


def figures(found: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, str]:
    """By their names: each metric's means as bars, and curves of training and of validation, a line for each stage with its band."""
    seeds = found["seeds"]
    bars, curves = (f"mean over {seeds} seeds with 95 % {kind}" if seeds > 1 else "one seed" for kind in ("interval", "band"))
    colours = {stage: number for number, stage in enumerate(found["stages"])}
    drawings = {}
    for split, part in by_split(found).items():
        for name in dict.fromkeys(name for metrics in part["stages"].values() for name in metrics):
            where = [] if split == HELD_OUT else [split]
            chart = mean_chart(", ".join([*where, _titled(name)]), meant(name).unit, _means(part, name), colours)
            drawings[_named("means", "-".join([*where, name]))] = figure(chart, bars)
    trained = [stage for stage in colours if stage != UNTOUCHED]
    runs = {stage: [read(folder / "stages" / stage / "metrics.jsonl") for folder in folders] for stage in trained}
    for chart in overlaid_charts(runs, colours):
        drawings[_named("curve", chart.title)] = figure(chart, curves)
    for chart in validation_charts(runs, colours):
        told = replace(chart, title=_titled(chart.title), unit=meant(chart.title).unit)
        drawings[_named("validation", chart.title)] = figure(told, curves)
    return drawings


def _means(part: Mapping[str, Any], name: str) -> dict[str, Estimate]:
    """Of the stages that have the metric."""
    ends = {stage: metrics[name] for stage, metrics in part["intervals"].items() if part["stages"][stage].get(name) is not None}
    return {
        stage: Estimate(part["stages"][stage][name], *(math.nan if end is None else end for end in both)) for stage, both in ends.items()
    }


def _titled(name: str) -> str:
    return ": ".join(filter(None, (name, meaning(name))))


def _named(kind: str, title: str) -> str:
    return f"{kind}-" + "".join(letter if letter.isalnum() or letter == "_" else "-" for letter in title.lower())
