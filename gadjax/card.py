"""The model card of an exported folder: what the model was made of, how it was measured, and whose terms hold."""

import json
from pathlib import Path
from typing import Any

import yaml

from gadjax.config import Config, dump_config, stage_of
from gadjax.report.curves import meaning

FILE = "README.md"
TERMS = """The student was trained on text of the teacher. Whoever offers the teacher may restrict what its text is used for, such as
training models that compete with it; the model that the student started from and the prompts have licenses of their own. Read these terms
before you use or publish this model."""


def model_card(run: Path, config: Config, stage: str, role: str, data: dict[str, Any]) -> str:
    """The card, in Markdown with the head that hubs read.

    Args:
        run: the run's folder, whose `summary.json` gives the metrics, if the stage was evaluated.
        config: of the run.
        stage: what is exported.
        role: `student` or `discriminator`.
        data: facts of the data by name.
    """
    base, algorithm = config.student.path, config.stages[stage_of(stage)].algorithm
    head = {"library_name": "transformers", "tags": ["gadjax", "distillation", algorithm]}
    head |= {"pipeline_tag": "text-generation" if role == "student" else "text-classification"} | ({"base_model": base} if base else {})
    origin = base or "a small fresh student"
    what = "The student" if role == "student" else "The discriminator, which scores how much a response is like the teacher's,"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_plain(run.resolve().name)}/{stage}",
        f"{what} of stage `{stage}` (algorithm `{algorithm}`), started from `{_plain(origin)}` and distilled with"
        " gadjax by the text of a teacher (GAD, arXiv 2511.10643).",
        f"## Teacher\n\n`{_plain(config.teacher.model)}`, asked through `{_plain(config.teacher.provider)}`.\n\n{TERMS}",
        "## Data\n\n" + "\n".join(f"- {name}: {value}" for name, value in data.items()),
        f"## Metrics\n\n{_metrics(run, stage)}",
        f"## Config\n\n```yaml\n{dump_config(config).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(run: Path, stage: str) -> str:
    file = run / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"stages": {}}
    if stage not in summary["stages"]:
        return "Not measured yet: `gadjax evaluate` does it."
    lines = ["| metric | value | 95 % interval | |", "|---|---|---|---|"]
    for name, value in summary["stages"][stage].items():
        low, high = summary["intervals"].get(stage, {}).get(name, (None, None))
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {name} | {'–' if value is None else f'{value:.4g}'} | {interval} | {meaning(name)} |")
    return "\n".join([f"On {summary['prompts']} held-out prompts:", "", *lines])


def _plain(text: str) -> str:
    """A user's word for a line of Markdown."""
    return " ".join(text.replace("`", "'").split())
