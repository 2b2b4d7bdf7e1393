"""What only the tutor can tell: whether an answer is valid and correct, and how likely the teacher itself is to say it."""

import numpy as np

from gadjax.evaluation.samples import Samples
from gadjax.teachers.grammar import Verdict, judge, log_prob

SMOOTHING = 0.001  # the share of uniformly random tokens in the teacher that the reverse KL is measured against


def verdicts(samples: Samples) -> list[Verdict]:
    """The grammar's verdict on every answer. An answer that was cut off is neither valid nor correct: it has no end."""
    found = [judge(prompt.text, text) for prompt, text in zip(samples.prompts, samples.texts, strict=True)]
    return [Verdict(False, False, v.style) if cut else v for v, cut in zip(found, samples.truncated, strict=True)]


def reverse_kl(samples: Samples, vocabulary: int) -> np.ndarray:
    """Terms whose mean over answers y ~ q(·|x) at temperature 1 estimates the student's reverse KL from the smoothed teacher.

        log q(y|x) - log( (1-ε) p(y|x) + ε V^-len(y) )

    p is the grammar's exact probability, 0 for what it cannot say and for what was cut off; V the vocabulary's size; the
    length counts tokens with the end of turn. Without the smoothing one impossible answer would make it infinite; with it uniform
    text costs no more than log(1/ε), so that stages compare only where they answer at all.

    Returns:
        f64[n], in nats.
    """
    p = [log_prob(prompt.text, text) for prompt, text in zip(samples.prompts, samples.texts, strict=True)]
    log_p = np.where(samples.truncated, -np.inf, np.asarray(p, np.float64))
    log_u = -np.asarray(samples.lengths, np.float64) * np.log(vocabulary)
    return np.asarray(samples.log_probs, np.float64) - np.logaddexp(np.log1p(-SMOOTHING) + log_p, np.log(SMOOTHING) + log_u)
