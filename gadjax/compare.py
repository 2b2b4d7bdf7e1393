"""Several runs side by side: a table in the terminal, and a page."""

from pathlib import Path

from gadjax.config import read_values
from gadjax.errors import UserError
from gadjax.evaluation.table import print_table
from gadjax.files import to_json
from gadjax.report.comparison import compare_runs, write_comparison
from gadjax.runs import CONFIG
from gadjax.terminal import console, say


def compare(runs: list[Path], stage: str | None, out: Path, as_json: bool) -> None:
    """Compares what runs have evaluated.

    Raises:
        UserError: a run is none, was not evaluated, or is named twice.
    """
    folders = {folder.resolve().name: folder for folder in runs}
    if len(folders) < len(runs):  # they lie in different folders
        folders = {str(folder): folder for folder in runs}
    if len(folders) < 2:
        raise UserError("RUN", "one run cannot be compared", "name two or more folders of runs")
    for folder in runs:
        if not (folder / CONFIG).is_file():
            raise UserError(str(folder), "is no run", "`gadjax run` makes one; name its folder, as in runs/quickstart")
    summary = compare_runs(folders, stage)
    write_comparison(out, folders, {name: read_values(folder / CONFIG) for name, folder in folders.items()}, summary)
    if as_json:
        print(to_json(summary))
    else:
        print_table(summary, console)
    say(f"compare: {out}")
