"""The summary as one table for the terminal; on a file or a pipe it is a plain Markdown table."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 240  # a file has no width; no row is broken


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the stages side by side: a row of values per metric, then its row of paired differences from the baseline.

    A difference whose 95 % interval leaves out 0 has a star.

    Args:
        summary: what `summarise` returned, or `summary.json`.
        console: where to.
    """
    plain = not console.is_terminal
    stages, baseline = summary["stages"], summary["baseline"]
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    table.add_column("metric")
    for stage in stages:
        table.add_column(Text(stage), justify="right", no_wrap=True)
    for name in dict.fromkeys(name for metrics in stages.values() for name in metrics):
        table.add_row(Text(name), *(_value(summary, stage, name) for stage in stages))
        if any(name in summary["differences"].get(stage, {}) for stage in stages):
            table.add_row(Text(f"  minus {baseline}"), *(_difference(summary, stage, name) for stage in stages), style="dim")
    console.print(table, width=PLAIN_WIDTH if plain else None)
    caption = f"{summary['prompts']} prompts, 95 % intervals; * = the interval of the paired difference leaves out 0"
    console.print(Text(caption), soft_wrap=True)


def _places(summary: Mapping[str, Any], name: str) -> int:
    """The decimal places of a row."""
    largest = max(abs(metrics.get(name) or 0) for metrics in summary["stages"].values())
    return 3 if largest < 10 else 2 if largest < 100 else 1


def _value(summary: Mapping[str, Any], stage: str, name: str) -> Text:
    value, places = summary["stages"][stage].get(name), _places(summary, name)
    if value is None:
        return Text("-")
    low, high = summary["intervals"].get(stage, {}).get(name, (None, None))
    return Text(f"{value:.{places}f}" + ("" if low is None or high is None else f" ± {(high - low) / 2:.{places}f}"))


def _difference(summary: Mapping[str, Any], stage: str, name: str) -> Text:
    found, places = summary["differences"].get(stage, {}).get(name), _places(summary, name)
    if not found:
        return Text("")
    if found["low"] is None:
        return Text(f"{found['mean']:+.{places}f}")
    sure = found["low"] > 0 or found["high"] < 0
    return Text(f"{found['mean']:+.{places}f} ± {(found['high'] - found['low']) / 2:.{places}f}{' *' if sure else ''}")
