"""All metrics of one stage from its answers, by the names that `summary.json` has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gadjax.evaluation.config import TextMetric
from gadjax.evaluation.samples import BEST_OF, Samples
from gadjax.evaluation.statistics import Estimate, by_prompt, estimate
from gadjax.evaluation.texts import distinct, overlap, rouge_l
from gadjax.evaluation.tutor import reverse_kl, verdicts


@dataclass(frozen=True)
class Metric:
    """A metric of a stage: its value, and where it is a mean over prompts, each prompt's own and how its interval is found."""

    value: float
    by_prompt: Mapping[str, float] | None = None
    interval: Callable[[Iterable[float]], Estimate] = estimate


def measure(answers: Mapping[str, Samples], texts: Sequence[TextMetric], vocabulary: int | None = None) -> dict[str, Metric]:
    """The metrics that the given ways of decoding allow.

    Args:
        answers: a stage's samples by the name of the way of decoding, of `MODES`.
        texts: how they are compared with the teacher's.
        vocabulary: with the tutor as the teacher, the size of the vocabulary; None with any other teacher.

    Returns:
        of `greedy`: rouge_l, overlap_1 to overlap_4 as `texts` says, distinct_1 to distinct_4, length_mean (tokens) and, with the tutor,
        greedy_validity;
        with the tutor, of `sampled_0_8`: validity, correctness; of `sampled_1_0`: reverse_kl (nats);
        of `best_of`: best_of_rouge_l as `texts` says, best_of_length_mean and, with the tutor, best_of_validity, best_of_correctness.
    """
    found: dict[str, Metric] = {}
    for mode, samples in answers.items():
        if mode == "greedy":
            found |= _texts(samples, texts)
        if mode == BEST_OF:
            found |= _best(samples, texts, tutor=vocabulary is not None)
        elif vocabulary is not None:
            found |= _tutor(mode, samples, vocabulary)
    return found


def _texts(samples: Samples, wanted: Sequence[TextMetric]) -> dict[str, Metric]:
    values: dict[str, list[float]] = {}
    if "rouge_l" in wanted:
        values["rouge_l"] = rouge_l(samples.texts, samples.teacher)
    if "overlap" in wanted:
        values |= {f"overlap_{n}": overlap(samples.texts, samples.teacher, n) for n in (1, 2, 3, 4)}
    metrics = {name: _mean(samples, column) for name, column in values.items()}
    metrics |= {f"distinct_{n}": Metric(distinct(samples.texts, n)) for n in (1, 2, 3, 4)}
    return metrics | {"length_mean": _mean(samples, samples.lengths)}


def _best(samples: Samples, wanted: Sequence[TextMetric], tutor: bool) -> dict[str, Metric]:
    found = {f"{BEST_OF}_rouge_l": _mean(samples, rouge_l(samples.texts, samples.teacher))} if "rouge_l" in wanted else {}
    found |= {f"{BEST_OF}_{name}": metric for name, metric in _tutor("sampled_0_8", samples, 0).items()} if tutor else {}
    return found | {f"{BEST_OF}_length_mean": _mean(samples, samples.lengths)}


def _tutor(mode: str, samples: Samples, vocabulary: int) -> dict[str, Metric]:
    match mode:
        case "greedy":
            return {"greedy_validity": _mean(samples, [verdict.valid for verdict in verdicts(samples)])}
        case "sampled_0_8":
            found = verdicts(samples)
            return {"validity": _mean(samples, [v.valid for v in found]), "correctness": _mean(samples, [v.correct for v in found])}
        case "sampled_1_0":
            return {"reverse_kl": _mean(samples, reverse_kl(samples, vocabulary))}
    raise ValueError(f"no way of decoding is called {mode!r}")


def _mean(samples: Samples, values: Sequence[float] | np.ndarray) -> Metric:
    prompts = by_prompt(samples.ids, values)
    return Metric(sum(prompts.values()) / len(prompts), prompts)
