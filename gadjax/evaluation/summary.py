"""`summary.json`: the stages side by side.

    {"stages": {"student": {"rouge_l": 0.21, ...}, "seqkd": {...}, "gad": {...}},
     "intervals": {"student": {"rouge_l": [0.19, 0.23], ...}, ...},                        95 %, where the metric is a mean over prompts
     "differences": {"gad": {"rouge_l": {"mean": 0.02, "low": 0.01, "high": 0.03}, ...}},   from the baseline, prompt by prompt
     "baseline": "seqkd", "prompts": 200, "seconds": 812.5,
     "tests": {"vicuna": {"stages": ..., "intervals": ..., "differences": ..., "baseline": ..., "prompts": 80}}}            test sets

`seconds` is the wall time that all commands on the run had taken together when these numbers were found, those included that were
interrupted. A number that is not finite is null.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gadjax.evaluation.measure import Metric
from gadjax.evaluation.statistics import paired_difference
from gadjax.files import finite, to_csv

Stages = Mapping[str, Mapping[str, Metric]]
HELD_OUT = "validation"  # the split that a summary is of; those of the test sets are in it
COLUMNS = ("split", "stage", "metric", "mean", "low", "high", "minus_baseline", "difference_low", "difference_high")


def summarise(splits: Mapping[str, Stages], seconds: float, baseline: str = "seqkd") -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        splits: the metrics of each stage on the held-out prompts and on each test set, in the order in which they are to be shown.
        seconds: wall time of all commands on the run until now.
        baseline: the stage that the others are compared with; without such a stage there are no differences.

    Raises:
        ValueError: two stages answered different prompts.
    """
    found = {name: _compared(stages, baseline) for name, stages in splits.items()}
    summary = found.pop(HELD_OUT) | {"seconds": seconds}
    return finite(summary | ({"tests": found} if found else {}))


def _compared(stages: Stages, baseline: str) -> dict[str, Any]:
    prompts = {len(metric.by_prompt) for metrics in stages.values() for metric in metrics.values() if metric.by_prompt}
    return {
        "stages": {stage: {name: metric.value for name, metric in metrics.items()} for stage, metrics in stages.items()},
        "intervals": {stage: _intervals(metrics) for stage, metrics in stages.items()},
        "differences": {
            stage: _differences(metrics, stages[baseline]) for stage, metrics in stages.items() if baseline in stages and stage != baseline
        },
        "baseline": baseline,
        "prompts": max(prompts, default=0),
    }


def _intervals(metrics: Mapping[str, Metric]) -> dict[str, list[float]]:
    found = {name: metric.interval(metric.by_prompt.values()) for name, metric in metrics.items() if metric.by_prompt}
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _differences(metrics: Mapping[str, Metric], baseline: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    pairs = ((name, metric.by_prompt, baseline[name].by_prompt) for name, metric in metrics.items() if name in baseline)
    return {name: vars(paired_difference(ours, theirs, metrics[name].interval)) for name, ours, theirs in pairs if ours and theirs}


def merged(summary: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with the metrics of another one of the same run added, stage by stage and test set by test set."""
    parts, tests = ("stages", "intervals", "differences"), other.get("tests", {})
    added = {part: {stage: found | other[part].get(stage, {}) for stage, found in summary[part].items()} for part in parts}
    if "tests" in summary:
        added["tests"] = {name: merged(found, tests[name]) if name in tests else found for name, found in summary["tests"].items()}
    return {**summary, **added}


def by_split(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The summary of the held-out prompts and of each test set, by the split's name."""
    return {HELD_OUT: summary, **summary.get("tests", {})}


def rows(summary: Mapping[str, Any]) -> Iterator[list[object]]:
    """The summary of all splits as a table with `COLUMNS`; None where there is no interval or difference."""
    for split, found in by_split(summary).items():
        for stage, metrics in found["stages"].items():
            for name, mean in metrics.items():
                ends = found["intervals"].get(stage, {}).get(name, (None, None))
                gap = found["differences"].get(stage, {}).get(name, {})
                yield [split, stage, name, mean, *ends, *(gap.get(key) for key in ("mean", "low", "high"))]


def to_table(summary: Mapping[str, Any]) -> str:
    """`rows` as CSV."""
    return to_csv(COLUMNS, rows(summary))
