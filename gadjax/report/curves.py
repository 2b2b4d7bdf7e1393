"""Which metrics are drawn, in which chart, under which title and unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gadjax.metrics import Row
from gadjax.report.charts import Chart, Series, line_chart


@dataclass(frozen=True)
class Panel:
    """A chart of one stage: metrics (as `metrics.jsonl` names them) and the label of each line."""

    title: str
    unit: str
    lines: Mapping[str, str]
    from_zero: bool = False


PANELS = (
    Panel("Scores", "discriminator's logit", {"discriminator/teacher_score": "teacher", "discriminator/student_score": "student"}),
    Panel("Margin", "teacher's minus student's score", {"discriminator/margin": "margin"}),
    Panel("Discriminator's accuracy", "share of pairs", {"discriminator/accuracy": "accuracy"}),
    Panel("Discriminator's loss", "Bradley-Terry, nats", {"discriminator/loss": "loss"}),
    Panel("Student's loss", "nats per token; in gad the surrogate", {"student/loss": "loss"}),
    Panel("Reward", "discriminator's logit", {"student/reward_mean": "mean", "student/reward_std": "std in the group"}),
    Panel("KL from the reference", "k3, nats per token", {"student/kl": "KL"}),
    Panel("Entropy", "nats per token", {"student/entropy": "entropy"}),
    Panel("Length of responses", "tokens", {"rollout/length_mean": "mean length"}),
    Panel(
        "Truncated, without spread, clipped",
        "share",
        {
            "rollout/truncated_fraction": "truncated responses",
            "rollout/zero_std_fraction": "groups of equal rewards",
            "student/clip_fraction": "clipped tokens",
        },
        from_zero=True,
    ),
    Panel(
        "Gradient norms",
        "before clipping",
        {"student/grad_norm": "student", "discriminator/grad_norm": "discriminator"},
        from_zero=True,
    ),
    Panel("Sampler against trainer", "nats per token", {"rollout/logp_gap": "difference of log-probabilities"}),
    Panel("Probe", "score of a text against itself", {"discriminator/probe_gap": "gap"}),
    Panel("Rollout speed", "tokens per second", {"rollout/tokens_per_second": "speed"}, from_zero=True),
    Panel("Idle devices", "share of a step in which they wait for the host", {"time/idle_fraction": "idle"}, from_zero=True),
    Panel(
        "Time of a step",
        "seconds",
        {
            "time/rollout_seconds": "rollout",
            "time/discriminator_seconds": "discriminator",
            "time/student_seconds": "student",
            "time/data_seconds": "data",
        },
        from_zero=True,
    ),
)

# Metrics of the validation: what stands beside the name in tables and charts.
MEANINGS = {
    "rouge_l": "F1 of the longest common subsequence with the teacher's text",
    "overlap_1": "F1 of the words shared with the teacher's text",
    "overlap_2": "F1 of the word pairs shared with it",
    "overlap_3": "F1 of three words in a row",
    "overlap_4": "F1 of four words in a row",
    "distinct_2": "different word pairs over all word pairs",
    "length_mean": "tokens per answer",
    "discriminator_accuracy": "share of pairs, on held-out prompts",
    "margin": "teacher's minus student's score, on held-out prompts",
    "validity": "share of answers in one of the tutor's forms, T = 0.8",
    "greedy_validity": "the same, greedy",
    "correctness": "share of answers with the right items, T = 0.8",
    "best_of_rouge_l": "rouge_l of the discriminator's choice among several samples",
    "best_of_validity": "validity of the discriminator's choice",
    "best_of_correctness": "correctness of the discriminator's choice",
    "best_of_length_mean": "tokens of the discriminator's choice",
    "judge_points": "100 · student / (student + the judge's own answer)",
    "wins_teacher": "share of prompts on which the judge finds it better than the teacher's; a tie counts one half",
    "reverse_kl": "from the tutor, nats per answer; uniform text scores low, too",
}


def stage_charts(rows: Sequence[Row]) -> list[Chart]:
    """The charts of one stage's training, those that it has metrics for."""
    charts = []
    for panel in PANELS:
        lines = [_series(label, rows, name, colour) for colour, (name, label) in enumerate(panel.lines.items(), 1)]
        lines = [line for line in lines if line.x]
        if lines:
            charts.append(line_chart(panel.title, panel.unit, lines, panel.from_zero))
    return charts


def overlaid_charts(runs: Mapping[str, Sequence[Row]], colours: Mapping[str, int]) -> list[Chart]:
    """The charts of one stage in several runs: one per metric, with a line for each run that has it."""
    charts = []
    for panel in PANELS:
        for name, label in panel.lines.items():
            lines = [_series(run, rows, name, colours[run]) for run, rows in runs.items()]
            if lines := [line for line in lines if line.x]:
                title = panel.title if len(panel.lines) == 1 else f"{panel.title}: {label}"
                charts.append(line_chart(title, panel.unit, lines, panel.from_zero))
    return charts


def validation_charts(stages: Mapping[str, Sequence[Row]], colours: Mapping[str, int]) -> list[Chart]:
    """One chart per metric of the validation, with a line for each stage."""
    found = {name for rows in stages.values() for row in rows for name in row if name.startswith("validation/")}
    names = [name for name in MEANINGS if f"validation/{name}" in found]
    names += sorted(found - {f"validation/{name}" for name in names})
    charts = []
    for name in names:
        key = name if name in found else f"validation/{name}"
        lines = [_series(stage, rows, key, colours[stage]) for stage, rows in stages.items()]
        charts.append(line_chart(key.removeprefix("validation/"), MEANINGS.get(name, ""), [line for line in lines if line.x]))
    return charts


def _series(label: str, rows: Sequence[Row], name: str, colour: int) -> Series:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return Series(label, [x for x, _ in points], [y for _, y in points], colour)
