"""Where the time of a run went: the parts of its stages' steps as a table, and a step of each stage as it runs."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from gadjax.metrics import Row
from gadjax.report.charts import Chart, Span, span_chart

PART = re.compile(r"time/(\w+)_seconds")
STEP = ("rollout", "data", "discriminator", "student")  # the parts of a step, one after the other; of these colours
COLOURS = {part: colour for colour, part in enumerate(STEP, 1)}
DEVICES, HOST = "devices", "host"


def where_the_time_went(rows: Mapping[str, Sequence[Row]], seconds: float | None) -> dict[str, Any] | None:
    """What the page shows of the time; None where no stage has told any.

    Args:
        rows: the stages' metrics.
        seconds: of the whole run, where it is over.
    """
    spent: dict[str, dict[str, float]] = {}
    for stage, found in rows.items():
        own = defaultdict[str, float](float)
        for name, value in (item for row in found for item in row.items()):
            if (part := PART.fullmatch(name)) and math.isfinite(value):
                own[part[1]] += value
        if sum(own.values()):
            spent[stage] = own
    parts = sorted({part for own in spent.values() for part in own}, key=lambda part: (COLOURS.get(part, len(STEP) + 1), part))
    if not parts:
        return None
    totals = {stage: sum(own.values()) for stage, own in spent.items()}
    rest = seconds - sum(totals.values()) if seconds else 0.0
    colours = {part: COLOURS.get(part, len(STEP) + 1) for part in parts}
    return {
        "parts": list(colours.items()),
        "stages": [{"name": stage, "total": duration(totals[stage]), "parts": _shares(own, colours)} for stage, own in spent.items()],
        "rest": duration(rest) if rest > 0 else None,
        "steps": [step for stage, found in rows.items() if (step := timeline(stage, found))],
    }


def _shares(spent: Mapping[str, float], colours: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Of each part: its duration, its share, and its colour."""
    whole = sum(spent.values())
    return [(duration(spent.get(part, 0.0)), f"{spent.get(part, 0.0) / whole:.1%}", colour) for part, colour in colours.items()]


def timeline(stage: str, rows: Sequence[Row]) -> Chart | None:
    """A step of a stage: what the devices do and what the host does, each part as long as its median. None without a student's step.

    Of a stage that samples, the devices wait while the host reads the answers and packs them for the discriminator. The student's rows are
    packed while the discriminator is at work, the last step's metrics are written while the student is.
    """
    parts = {part: _median(rows, f"time/{part}_seconds") for part in STEP}
    host = {part: _median(rows, f"time/host/{part}_seconds") for part in ("answers", "packing", "metrics")}
    if not parts["student"]:
        return None
    samples = parts["rollout"] > 0
    sampled = parts["rollout"] - host["answers"]
    judged = parts["rollout"] + parts["data"] if samples else 0.0  # without samples the rows were packed beside the step before
    trained = judged + parts["discriminator"]
    end = trained + parts["student"]
    packing = judged if samples else host["metrics"]
    spans = [
        Span(DEVICES, "rollout", 0.0, sampled, COLOURS["rollout"]),
        Span(DEVICES, "discriminator", judged, trained, COLOURS["discriminator"]),
        Span(DEVICES, "student", trained, end, COLOURS["student"]),
        Span(HOST, "answers read", sampled, parts["rollout"], 5),
        Span(HOST, "packing", parts["rollout"], judged, COLOURS["data"]),
        Span(HOST, "packing", packing, packing + host["packing"], COLOURS["data"]),
        Span(HOST, "metrics", trained, trained + host["metrics"], 6),
    ]
    idle = (judged - sampled) / end
    unit = f"seconds, medians; the devices wait for the host {idle:.1%} of it" if samples else "seconds, medians"
    return span_chart(f"A step of {stage}", unit, [span for span in spans if span.end > span.start])


def _median(rows: Sequence[Row], name: str) -> float:
    found = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    return median(found) if found else 0.0


def duration(seconds: float) -> str:
    """Seconds as a page tells them."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds % 60:.0f} s"
