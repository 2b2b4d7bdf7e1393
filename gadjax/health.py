"""What the numbers of a stage say of its health, in words: pure functions over the rows of `metrics.jsonl`.

A finding tells what is seen, what it means, and which knob to turn. Most look at the mean of the last `WINDOW` steps, and compare it,
where a drift is meant, with that of the first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

WINDOW = 20  # steps
BLIND, TOO_STRONG = 0.55, 0.95  # accuracies between which the discriminator's scores teach
COLLAPSED = 0.01  # of the first spread of rewards
PROBE_GAP = 1e-2  # what bfloat16 may round; 0 is right
LONGER = 1.5  # than the first responses; or shorter by the same factor
LITTLE_ENTROPY = 0.3  # of the first
WITHOUT_SPREAD = 0.5  # share of the groups
FAR_KL = 0.5  # nats a token


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a stage.

    Attributes:
        name: its kind.
        seen: what is seen and what it means.
        knob: what to change; `STAGE` stands for `stages.<name of the stage>`.
    """

    name: str
    seen: str
    knob: str

    def told(self, stage: str) -> str:
        """One line to the user."""
        return f"{self.seen}. {self.knob.replace('STAGE', f'stages.{stage}')}"


@dataclass(frozen=True)
class Episode:
    """A finding and the steps of which it was true, from the first to the last; `finding` is as it was in the last."""

    finding: Finding
    first: int
    last: int


def findings(rows: Sequence[Row]) -> list[Finding]:
    """What is wrong after these steps of a stage; nothing where all is well, or where there is too little to tell."""
    return [finding for check in CHECKS if (finding := check(rows))]


def episodes(rows: Sequence[Row], looks: int = 200) -> list[Episode]:
    """What was wrong over a stage, in the order in which it began; the stage is looked at so many times."""
    found: dict[str, Episode] = {}
    past: list[Episode] = []
    every = max(1, math.ceil(len(rows) / looks))
    ends = [*range(every, len(rows), every), len(rows)] if rows else []
    for end in ends:
        step, now = int(rows[end - 1]["step"]), findings(rows[:end])
        kinds = {finding.name for finding in now}
        past += [found.pop(name) for name in [*found] if name not in kinds]
        for finding in now:
            before = found.get(finding.name)
            found[finding.name] = Episode(finding, before.first if before else step, step)
    return sorted([*past, *found.values()], key=lambda episode: episode.first)


class Watch:
    """Tells of a stage that goes on what is new: a finding when it begins, and that all is well again when it ends.

    Args:
        stage: its name.
        rows: of the steps before.
    """

    def __init__(self, stage: str, rows: Iterable[Row] = ()):
        self._stage, self._rows = stage, [*rows]
        self._known = {finding.name for finding in findings(self._rows)}

    def see(self, row: Row) -> list[str]:
        """The news after one more step, a line each."""
        self._rows.append(row)
        now = {finding.name: finding for finding in findings(self._rows)}
        news = [f"{self._stage}: {finding.told(self._stage)}" for name, finding in now.items() if name not in self._known]
        news += [f"{self._stage}: no longer: {name}" for name in sorted(self._known - now.keys())]
        self._known = set(now)
        return news


def _values(rows: Iterable[Row], name: str) -> Iterator[float]:
    return (value for row in rows if (value := row.get(name)) is not None and math.isfinite(value))


def _mean(rows: Sequence[Row], name: str, last: bool = True) -> float | None:
    """The mean over the last or the first steps that have the metric; None where there are not two windows of them."""
    found: list[float] = []
    for value in _values(reversed(rows) if last else rows, name):
        found.append(value)
        if len(found) == WINDOW:
            return sum(found) / WINDOW
    return None


def _latest(rows: Sequence[Row], name: str) -> float | None:
    return next(_values(reversed(rows), name), None)


def _drift(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """The means of the first and of the last steps, where the two do not overlap."""
    first, last = _mean(rows, name, last=False), _mean(rows, name)
    count = sum(1 for _ in _values(rows, name))
    return None if first is None or last is None or count < 2 * WINDOW else (first, last)


def _rewards(rows: Sequence[Row]) -> bool:
    """Whether the student learns from the discriminator's scores: in a warm-up these may still say nothing."""
    return next(_values(rows, "student/reward_std"), None) is not None


def _blind(rows: Sequence[Row]) -> Finding | None:
    accuracy = _latest(rows, "validation/discriminator_accuracy")
    if accuracy is None or accuracy >= BLIND or not _rewards(rows):
        return None
    seen = f"the discriminator is right on only {accuracy:.2f} of the held-out pairs (0.5 is chance): its rewards are mostly noise"
    return Finding("blind", seen, "Raise STAGE.discriminator.learning_rate or give the warm-up more steps; or stop here")


def _too_strong(rows: Sequence[Row]) -> Finding | None:
    accuracy = _mean(rows, "discriminator/accuracy")
    if accuracy is None or accuracy <= TOO_STRONG:
        return None
    seen = f"the discriminator is right on {accuracy:.2f} of the pairs for {WINDOW} steps: it tells the two apart at a glance"
    knobs = "Lower STAGE.discriminator.learning_rate, set STAGE.discriminator.label_smoothing"
    return Finding("too strong", seen, f"{knobs}{', or bound it by STAGE.balance.accuracy_band' if _rewards(rows) else ''}")


def _collapsed(rows: Sequence[Row]) -> Finding | None:
    drift = _drift(rows, "student/reward_std")
    if drift is None or drift[1] >= COLLAPSED * drift[0]:
        return None
    seen = f"the discriminator gives all answers nearly the same score (spread {drift[1]:.2g}, at first {drift[0]:.2g}): it has collapsed"
    return Finding("collapsed", seen, "Lower STAGE.discriminator.learning_rate and go on from an earlier checkpoint")


def _unfair(rows: Sequence[Row]) -> Finding | None:
    gap = _latest(rows, "discriminator/probe_gap")
    if gap is None or gap <= PROBE_GAP:
        return None
    seen = f"one text gets scores that differ by {gap:.2g} as the teacher's and as the student's: the discriminator sees who speaks"
    return Finding("probe gap", seen, "This is a fault of the code, not of a knob: please report it with the config")


def _length(rows: Sequence[Row]) -> Finding | None:
    drift = _drift(rows, "rollout/length_mean")
    if drift is None or 1 / LONGER <= drift[1] / max(drift[0], 1.0) <= LONGER:
        return None
    seen = f"responses have {drift[1]:.0f} tokens, at first {drift[0]:.0f}: the length may be what the reward is hacked by"
    if not _rewards(rows):
        return Finding("length", seen, "Lower STAGE.learning_rate")
    return Finding("length", seen, "Set STAGE.balance.length_weight, or raise STAGE.kl_weight")


def _entropy(rows: Sequence[Row]) -> Finding | None:
    drift = _drift(rows, "student/entropy")
    if drift is None or drift[1] >= LITTLE_ENTROPY * drift[0] or not _rewards(rows):
        return None
    seen = f"the entropy fell from {drift[0]:.2f} to {drift[1]:.2f} nats a token: the student says the same again and again (mode collapse)"
    return Finding("entropy", seen, "Raise STAGE.temperature or STAGE.kl_weight, or lower STAGE.learning_rate")


def _spread(rows: Sequence[Row]) -> Finding | None:
    share = _mean(rows, "rollout/zero_std_fraction")
    if share is None or share <= WITHOUT_SPREAD:
        return None
    seen = f"in {share:.0%} of the groups all responses have the same reward: nothing is learned from them"
    return Finding("no spread", seen, "Raise STAGE.temperature or STAGE.group_size")


def _kl(rows: Sequence[Row]) -> Finding | None:
    drift = _drift(rows, "student/kl")
    if drift is None or drift[1] <= FAR_KL or drift[1] <= drift[0]:
        return None
    seen = f"the student is {drift[1]:.2f} nats a token away from where the stage began, and was {drift[0]:.2f}: it runs away"
    return Finding("KL", seen, "Raise STAGE.kl_weight or lower STAGE.learning_rate")


CHECKS: tuple[Callable[[Sequence[Row]], Finding | None], ...] = (
    _blind,
    _too_strong,
    _collapsed,
    _unfair,
    _length,
    _entropy,
    _spread,
    _kl,
)
