"""How steady each `gad` stage of a run was: `python tests/benchmarks/balance.py runs/balance` prints docs/balance.md's table.

Of the validations in the stage's second half: the mean of the validity, its lowest, how far it moves from one to the next, and the range of
the discriminator's accuracy on held-out pairs. Of the last 20 steps: length, entropy and KL. Then what the evaluation says of the end.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from gadjax.health import WINDOW
from gadjax.metrics import Row, read

COLUMNS = ("stage", "validity", "lowest", "moves by", "held-out accuracy", "tokens", "entropy", "KL", "end: validity", "end: correctness")


def column(rows: list[Row], name: str) -> list[float]:
    """The values of a metric, where it was measured."""
    return [row[name] for row in rows if name in row]


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def line(run: Path, stage: str, summary: dict) -> list[str]:
    """The cells of a stage."""
    rows = read(run / "stages" / stage / "metrics.jsonl")
    late = rows[len(rows) // 2 :]
    validity, accuracy = column(late, "validation/validity"), column(late, "validation/discriminator_accuracy")
    moves = mean([abs(after - before) for before, after in pairwise(validity)])
    ends = [mean(column(rows, name)[-WINDOW:]) for name in ("rollout/length_mean", "student/entropy", "student/kl")]
    end = summary["stages"].get(stage, {})
    low_high = [summary["intervals"][stage][name] for name in ("validity", "correctness")] if end else []
    told = [f"{end[name]:.3f} ± {(high - low) / 2:.3f}" for name, (low, high) in zip(("validity", "correctness"), low_high, strict=False)]
    return [
        f"`{stage}`",
        *(f"{value:.3f}" for value in (mean(validity), min(validity), moves)),
        f"{min(accuracy):.2f} to {max(accuracy):.2f}",
        *(f"{value:.{places}f}" for value, places in zip(ends, (1, 2, 3), strict=True)),
        *told,
    ]


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {"stages": {}}
        names = [path.name for path in sorted((run / "stages").iterdir(), key=lambda path: (path / "metrics.jsonl").stat().st_mtime)]
        print(f"{run}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for name in names:
            if column(read(run / "stages" / name / "metrics.jsonl"), "student/kl"):
                print(f"| {' | '.join(line(run, name, summary))} |")
