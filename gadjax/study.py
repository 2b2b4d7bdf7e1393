"""A study: one config run with several seeds, its stages compared over them.

The arms of a study are stages of one config, so that they share the teacher's answers, SeqKD and the warm-up. The seed is the unit of the
intervals (Student's t), and differences from the baseline are taken within a seed.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gadjax.config import UNTOUCHED, load_config
from gadjax.errors import UserError
from gadjax.evaluation.statistics import Estimate
from gadjax.evaluation.summary import COLUMNS, HELD_OUT, by_split, rows
from gadjax.evaluation.table import print_tables
from gadjax.files import finite, replace_file, to_csv, to_json
from gadjax.metrics import Row, read
from gadjax.report.charts import WIDTH, bar_chart, figure
from gadjax.report.curves import overlaid_charts
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
    found = over_seeds([json.loads((folder / "summary.json").read_text()) for folder in folders], baseline)
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


def interval(values: Sequence[float]) -> Estimate:
    """The mean of the seeds' values with its 95 % interval by Student's t; without one (NaN) for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def over_seeds(summaries: Summaries, baseline: str | None = None) -> dict[str, Any]:
    """The summaries of several seeds as one of the same form, test sets included; metrics that a seed lacks are left out.

    Args:
        summaries: one of each seed.
        baseline: the stage from which differences are taken; by default that of the summaries.
    """
    splits = [by_split(summary) for summary in summaries]
    pooled = {name: _pooled([each[name] for each in splits], baseline) for name in splits[0] if all(name in each for each in splits)}
    found = pooled.pop(HELD_OUT)
    return finite(found | ({"tests": pooled} if pooled else {}))


def _pooled(summaries: Summaries, wanted: str | None) -> dict[str, Any]:
    """The same of one split."""
    first = summaries[0]
    baseline = wanted or first["baseline"]
    cells = {
        stage: {name: values for name in metrics if None not in (values := [each["stages"][stage].get(name) for each in summaries])}
        for stage, metrics in first["stages"].items()
    }
    pooled = {stage: {name: interval(values) for name, values in metrics.items()} for stage, metrics in cells.items()}
    differences = {
        stage: {
            name: vars(interval(np.subtract(values, cells[baseline][name]).tolist()))
            for name, values in metrics.items()
            if name in cells[baseline]
        }
        for stage, metrics in cells.items()
        if baseline in cells and stage not in (baseline, UNTOUCHED)
    }
    return {
        "stages": {stage: {name: value.mean for name, value in metrics.items()} for stage, metrics in pooled.items()},
        "intervals": {stage: {name: [value.low, value.high] for name, value in metrics.items()} for stage, metrics in pooled.items()},
        "differences": differences,
        "baseline": baseline,
        "prompts": first["prompts"],
        "seeds": len(summaries),
        "values": cells,
    }


def figures(found: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, str]:
    """Each metric's means as bars, and the curves of every stage that samples, a line for each (means over the seeds)."""
    colours = {stage: number for number, stage in enumerate(found["stages"])}
    drawings = {}
    for name in dict.fromkeys(name for metrics in found["stages"].values() for name in metrics):
        values = {stage: [metrics[name]] for stage, metrics in found["stages"].items() if metrics.get(name) is not None}
        spans = {stage: [(low, high)] for stage in values for low, high in [found["intervals"][stage][name]] if low is not None}
        unit = "mean over seeds with 95 % interval" if spans else "mean over seeds"
        chart = bar_chart(name, unit, [""], values, colours, spans)
        drawings[f"means-{name}"] = figure(chart, 2 * WIDTH)
    curves = {
        stage: mean_rows([read(folder / "stages" / stage / "metrics.jsonl") for folder in folders])
        for stage in colours
        if stage != "student"
    }
    for chart in overlaid_charts(curves, colours):
        drawings["curve-" + "".join(letter if letter.isalnum() else "-" for letter in chart.title.lower())] = figure(chart)
    return drawings


def mean_rows(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One stage's metrics step by step, averaged over runs; what a run lacks at a step is left out there."""
    by_step = [{row["step"]: row for row in rows} for rows in runs]
    steps = [step for step in by_step[0] if all(step in rows for rows in by_step)]
    return [
        {
            name: float(np.mean([rows[step][name] for rows in by_step]))
            for name in by_step[0][step]
            if all(name in rows[step] for rows in by_step)
        }
        for step in steps
    ]
