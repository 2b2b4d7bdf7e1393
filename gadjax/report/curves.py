"""Which metrics are drawn, in which chart, under which title and unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gadjax.evaluation.seeds import spread
from gadjax.metrics import Row
from gadjax.report.charts import SMOOTHED, Chart, Series, line_chart, running_mean


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
    Panel("Discriminator's loss", "nats, of the loss that each stage has", {"discriminator/loss": "loss"}),
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


LOSSES = {"bradley_terry": "Bradley-Terry", "cross_entropy": "cross entropy"}


class Meaning(NamedTuple):
    """What a metric counts, and of what: one after the other they are a phrase."""

    unit: str
    what: str


MEANINGS = {
    "rouge_l": Meaning("F1", "of the longest common subsequence with the teacher's text"),
    "overlap_1": Meaning("F1", "of the words shared with the teacher's text"),
    "overlap_2": Meaning("F1", "of the word pairs shared with it"),
    "overlap_3": Meaning("F1", "of three words in a row"),
    "overlap_4": Meaning("F1", "of four words in a row"),
    "distinct_1": Meaning("share", "of different words among all words"),
    "distinct_2": Meaning("share", "of different word pairs among all word pairs"),
    "distinct_3": Meaning("share", "of different runs of three words among all"),
    "distinct_4": Meaning("share", "of different runs of four words among all"),
    "length_mean": Meaning("tokens", "per answer"),
    "discriminator_accuracy": Meaning("share", "of pairs, on held-out prompts"),
    "margin": Meaning("logit", "of the teacher's answer minus that of the student's, on held-out prompts"),
    "validity": Meaning("share", "of answers in one of the tutor's forms, T = 0.8"),
    "greedy_validity": Meaning("share", "of answers in one of the tutor's forms, greedy"),
    "correctness": Meaning("share", "of answers with the right items, T = 0.8"),
    "best_of_rouge_l": Meaning("F1", "as rouge_l, of the discriminator's choice among several samples"),
    "best_of_validity": Meaning("share", "of valid answers among the discriminator's choices"),
    "best_of_correctness": Meaning("share", "of correct answers among the discriminator's choices"),
    "best_of_length_mean": Meaning("tokens", "of the discriminator's choice"),
    "judge_points": Meaning("points", "of 100: student / (student + the judge's own answer)"),
    "wins_teacher": Meaning("share", "of prompts on which the judge finds it better than the teacher's; a tie counts one half"),
    "referee_wins": Meaning("share", "of prompts on which another run's discriminator prefers it to the teacher's; a tie counts one half"),
    "referee_score": Meaning("logit", "of another run's discriminator"),
    "reverse_kl": Meaning("nats", "per answer, from the tutor; uniform text scores low, too"),
    "loss": Meaning("nats", "per token of the teacher's answers"),
}


def meant(name: str) -> Meaning:
    """The meaning of a metric, both parts empty for an unknown one; the judge's win rates are named by whom they are against."""
    other = name.removeprefix("wins_")
    wins = Meaning("share", f"of prompts on which the judge finds it better than {other}; a tie counts one half")
    return MEANINGS.get(name, wins if other != name else Meaning("", ""))


def meaning(name: str) -> str:
    """What stands beside a metric's name in tables and charts."""
    return " ".join(meant(name)).strip()


Runs = Sequence[Sequence[Row]]  # the metrics of one stage in one run, or in a run of each seed


def stage_charts(rows: Sequence[Row], loss: str | None = None) -> list[Chart]:
    """The charts of one stage's training, those that it has metrics for; `loss` is the discriminator's, by its name in a config."""
    charts = []
    for panel in PANELS:
        lines = [_series(label, [rows], name, colour) for colour, (name, label) in enumerate(panel.lines.items(), 1)]
        lines = [line for line in lines if line.x]
        if lines:
            unit = f"{LOSSES[loss]}, nats" if loss and "discriminator/loss" in panel.lines else panel.unit
            charts.append(line_chart(panel.title, unit, lines, panel.from_zero))
    return charts


def overlaid_charts(stages: Mapping[str, Runs], colours: Mapping[str, int]) -> list[Chart]:
    """The charts of several stages, or of one stage in several runs: one per metric, with a line for each that has it."""
    charts = []
    for panel in PANELS:
        for name, label in panel.lines.items():
            lines = [_series(stage, runs, name, colours[stage]) for stage, runs in stages.items()]
            if lines := [line for line in lines if line.x]:
                title = panel.title if len(panel.lines) == 1 else f"{panel.title}: {label}"
                charts.append(line_chart(title, panel.unit, lines, panel.from_zero))
    return charts


def validation_charts(stages: Mapping[str, Runs], colours: Mapping[str, int]) -> list[Chart]:
    """One chart per metric of the validation, with a line for each stage."""
    found = {name for runs in stages.values() for rows in runs for row in rows for name in row if name.startswith("validation/")}
    names = [key for name in MEANINGS if (key := f"validation/{name}") in found]
    charts = []
    for key in [*names, *sorted(found.difference(names))]:
        name = key.removeprefix("validation/")
        lines = [_series(stage, runs, key, colours[stage]) for stage, runs in stages.items()]
        charts.append(line_chart(name, meaning(name), [line for line in lines if line.x]))
    return charts


def _series(label: str, runs: Runs, name: str, colour: int) -> Series:
    """The line of a metric. Of several runs it is their mean at the steps that all have, with its 95 % band; of many steps each run's
    running mean is taken, so that the band is that of the lines which an eye follows.
    """
    points = [{row["step"]: row[name] for row in rows if name in row} for rows in runs]
    x = [step for step in points[0] if all(step in each for each in points)]
    lines = [[each[step] for step in x] for each in points]
    if len(lines) == 1:
        return Series(label, x, lines[0], colour)
    mean, half = spread([running_mean(line) for line in lines] if len(x) >= SMOOTHED else lines)
    return Series(label, x, mean.tolist(), colour, (mean - half).tolist(), (mean + half).tolist())
