"""The summary as one table for the terminal; on a file or a pipe it is a plain Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNBOUNDED = 10_000  # characters: more than any table has


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the stages side by side: a row of values per metric, then its row of paired differences from the baseline.

    A difference whose 95 % interval leaves out 0 has a star. Stages that do not fit beside each other stand in a table below,
    with the same rows.

    Args:
        summary: what `summarise` returned, or `summary.json`.
        console: where to; its width holds for a file, too.
    """
    stages = list(summary["stages"])
    while stages:
        tables = {count: _table(summary, stages[:count], plain=not console.is_terminal) for count in range(len(stages), 0, -1)}
        count = next((count for count, table in tables.items() if _width(table, console) <= console.width), 1)
        console.print(tables[count])
        stages = stages[count:]
    caption = f"{summary['prompts']} prompts, 95 % intervals; * = the interval of the paired difference leaves out 0"
    console.print(Text(caption), soft_wrap=True)


def print_tables(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the table of the held-out prompts, then that of each test set under its name."""
    print_table(summary, console)
    for name, found in summary.get("tests", {}).items():
        console.print(Text(f"\n{name}:"))
        print_table(found, console)


def _table(summary: Mapping[str, Any], stages: Sequence[str], plain: bool) -> Table:
    """The columns of some stages, with all rows."""
    every, baseline = summary["stages"], summary["baseline"]
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    table.add_column("metric")
    for stage in stages:
        table.add_column(Text(stage), justify="right", no_wrap=True)
    for name in dict.fromkeys(name for metrics in every.values() for name in metrics):
        table.add_row(Text(name), *(_value(summary, stage, name) for stage in stages))
        if any(name in summary["differences"].get(stage, {}) for stage in every):
            table.add_row(Text(f"  minus {baseline}"), *(_difference(summary, stage, name) for stage in stages), style="dim")
    return table


def _width(table: Table, console: Console) -> int:
    """The columns of characters that a table takes where nothing in it is cut."""
    return console.measure(table, options=console.options.update_width(UNBOUNDED)).maximum


def _places(summary: Mapping[str, Any], name: str) -> int:
    """The decimal places of a row."""
    largest = max(abs(metrics.get(name) or 0) for metrics in summary["stages"].values())
    return 3 if largest < 10 else 2 if largest < 100 else 1


def _value(summary: Mapping[str, Any], stage: str, name: str) -> Text:
    value, places = summary["stages"][stage].get(name), _places(summary, name)
    if value is None:
        return Text("-")
    low, high = summary["intervals"].get(stage, {}).get(name, (None, None))
    return Text(f"{value:.{places}f} {interval_text(value, low, high, places)}".rstrip())


def _difference(summary: Mapping[str, Any], stage: str, name: str) -> Text:
    found, places = summary["differences"].get(stage, {}).get(name), _places(summary, name)
    if not found:
        return Text("")
    if found["low"] is None:
        return Text(f"{found['mean']:+.{places}f}")
    sure = found["low"] > 0 or found["high"] < 0
    return Text(f"{found['mean']:+.{places}f} {interval_text(**found, places=places, sign='+')}{' *' if sure else ''}")


def interval_text(mean: float | None, low: float | None, high: float | None, places: int, sign: str = "") -> str:
    """What stands beside a mean: half its interval's width, or both ends where the mean is not in the middle, as of the bootstrap."""
    if mean is None or low is None or high is None:
        return ""
    if abs((high - mean) - (mean - low)) < 10.0**-places:
        return f"± {(high - low) / 2:.{places}f}"
    return f"[{low:{sign}.{places}f}, {high:{sign}.{places}f}]"
