"""The paper's toy experiment: a teacher with several modes, a student that can have one.

The teacher is a mixture of three Gaussians over K discrete outcomes, of which only samples are seen; the student a single
Gaussian over them, with a mean and a width. SeqKD, cross entropy on the teacher's samples, spreads over all modes; GAD, with the
losses and the order of updates that `gadjax.algorithms.gad` has, may settle on one that the student can reach. There is one prompt: a
step's B groups differ by their samples alone. The discriminator is a table of K scores.

Letters: B groups, N student responses per group, K outcomes, S seeds.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gadjax import losses
from gadjax.evaluation.seeds import over_seeds
from gadjax.files import replace_file, to_csv, to_json
from gadjax.report.charts import Series, figure, line_chart
from gadjax.terminal import say

K, B, N = 20, 32, 8
MODES, WEIGHTS = (3.0, 9.0, 15.0), (0.35, 0.3, 0.35)
NEAR, NARROW = 1.0, 2.0  # settled on a mode: the mean within NEAR of it, the deviation at most NARROW
STEPS = 3000
RATE, DISCRIMINATOR_RATE = 0.01, 0.03

Student = dict[str, jax.Array]  # "mean" and "log_width", of outcomes
Method = Callable[[Student, jax.Array, jax.Array], Student]


class Outcome(NamedTuple):
    """Where one start of one method ended; `mode` is that on which it settled, or None. Divergences are in nats."""

    seed: int
    method: str
    mean: float
    deviation: float
    reverse_kl: float
    forward_kl: float
    mode: float | None


def log_probs(student: Student) -> jax.Array:
    """The student's log-probabilities, [K]: a Gaussian at the outcomes, normalised over them."""
    distance_K = (jnp.arange(K) - student["mean"]) / jnp.exp(student["log_width"])
    return jax.nn.log_softmax(-0.5 * distance_K**2)


def teacher_log_probs(width: float) -> jax.Array:
    """The teacher's log-probabilities, [K]; each of its modes is a Gaussian of this width."""
    modes_K = [jnp.log(w) + log_probs({"mean": jnp.array(m), "log_width": jnp.log(width)}) for m, w in zip(MODES, WEIGHTS, strict=True)]
    return jax.nn.logsumexp(jnp.stack(modes_K), axis=0)


def start(key: jax.Array, width: jax.Array) -> Student:
    """A student of this width somewhere among the outcomes."""
    return {"mean": jax.random.uniform(key, (), minval=0.0, maxval=K - 1.0), "log_width": jnp.log(width)}


def seqkd(student: Student, teacher_K: jax.Array, key: jax.Array) -> Student:
    """The student trained on the teacher's samples by cross entropy."""
    optimizer = optax.adam(RATE)

    def loss(student: Student, teacher_B: jax.Array) -> jax.Array:
        return -jnp.mean(log_probs(student)[teacher_B])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        student, state = carry
        grads = jax.grad(loss)(student, jax.random.categorical(key, teacher_K, shape=(B,)))
        updates, state = optimizer.update(grads, state)
        return (_applied(student, updates), state), None

    return _trained((student, optimizer.init(student)), step, key)


def gad(student: Student, teacher_K: jax.Array, key: jax.Array) -> Student:
    """The student trained on the scores of a discriminator that learns along with it."""
    optimizer, judge = optax.adam(RATE), optax.adam(DISCRIMINATOR_RATE)

    def discriminator_loss(scores_K: jax.Array, teacher_B: jax.Array, student_BN: jax.Array) -> jax.Array:
        return jnp.mean(losses.bradley_terry(scores_K[teacher_B], scores_K[student_BN]))

    def student_loss(student: Student, student_BN: jax.Array, advantages_BN: jax.Array) -> jax.Array:
        logp_BN = log_probs(student)[student_BN]
        return jnp.mean(losses.clipped_surrogate(logp_BN - jax.lax.stop_gradient(logp_BN), advantages_BN)[0])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        student, state, scores_K, judge_state = carry
        for_teacher, for_student = jax.random.split(key)
        teacher_B = jax.random.categorical(for_teacher, teacher_K, shape=(B,))
        student_BN = jax.random.categorical(for_student, log_probs(student), shape=(B, N))
        advantages_BN = losses.group_advantages(scores_K[student_BN])  # of the scores before the discriminator's update
        updates, judge_state = judge.update(jax.grad(discriminator_loss)(scores_K, teacher_B, student_BN), judge_state)
        scores_K = scores_K + jnp.asarray(updates)
        updates, state = optimizer.update(jax.grad(student_loss)(student, student_BN, advantages_BN), state)
        return (_applied(student, updates), state, scores_K, judge_state), None

    scores_K = jnp.zeros(K)
    return _trained((student, optimizer.init(student), scores_K, judge.init(scores_K)), step, key)


METHODS: Mapping[str, Method] = {"seqkd": seqkd, "gad": gad}


def toy(out: Path, seeds: int, width: float, start_width: float, as_json: bool) -> None:
    """Trains both methods from `seeds` starts on a teacher with modes of this width; writes toy.csv, toy.json
    and toy.svg (the first seed) into `out`.
    """
    begun = time.perf_counter()
    keys_S = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    at_K = teacher_log_probs(width)
    students = {name: jax.device_get(log_probs_after(method)(keys_S, at_K, jnp.asarray(start_width))) for name, method in METHODS.items()}
    teacher_K = np.asarray(at_K)
    outcomes = [describe(seed, name, logp_SK[seed], teacher_K) for name, logp_SK in students.items() for seed in range(seeds)]
    replace_file(out / "toy.csv", to_csv(Outcome._fields, outcomes))
    summary = summarise(outcomes, teacher_K)
    replace_file(out / "toy.json", to_json(summary, indent=2))
    curves = {"teacher": teacher_K} | {name: logp_SK[0] for name, logp_SK in students.items()}
    series = [Series(name, range(K), np.exp(logp_K).tolist(), colour) for colour, (name, logp_K) in enumerate(curves.items())]
    chart = line_chart("One Gaussian for three, seed 0", "probability", series, from_zero=True, x_label="outcome")
    replace_file(out / "toy.svg", figure(chart))
    if as_json:
        print(to_json(summary))
        return
    for line in sentences(outcomes, summary):
        say(f"toy: {line}")
    say(f"toy: means over {seeds} starts, with 95 % intervals by Student's t; {time.perf_counter() - begun:.0f} s")
    say(f"toy: {out / 'toy.svg'}, toy.csv, toy.json")


def log_probs_after(method: Method) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`f(keys_S, teacher_K, width)`: the log-probabilities of a student after `method`, from a start of this width for each key, [S, K]."""

    def one(key: jax.Array, teacher_K: jax.Array, width: jax.Array) -> jax.Array:
        for_start, for_steps = jax.random.split(key)
        return log_probs(method(start(for_start, width), teacher_K, for_steps))

    return jax.jit(jax.vmap(one, (0, None, None)))


def describe(seed: int, method: str, logp_K: np.ndarray, teacher_K: np.ndarray) -> Outcome:
    """What a student's distribution amounts to, beside the teacher's; both are log-probabilities, [K]."""
    mean, deviation = moments(logp_K)
    near = min(MODES, key=lambda mode: abs(mode - mean))
    settled = abs(near - mean) <= NEAR and deviation <= NARROW
    return Outcome(seed, method, mean, deviation, _kl(logp_K, teacher_K), _kl(teacher_K, logp_K), near if settled else None)


def moments(logp_K: np.ndarray) -> tuple[float, float]:
    """The mean and the standard deviation of log-probabilities, [K]."""
    outcomes_K, p_K = np.arange(K), np.exp(logp_K)
    mean = float(p_K @ outcomes_K)
    return mean, float(np.sqrt(p_K @ (outcomes_K - mean) ** 2))


def summarise(outcomes: list[Outcome], teacher_K: np.ndarray) -> dict[str, Any]:
    """The means of each method over its starts with their 95 % intervals (Student's t), how many settled on a mode, and every start."""
    found: dict[str, Any] = {"teacher": {"deviation": moments(teacher_K)[1]}}
    for name in METHODS:
        own = [outcome for outcome in outcomes if outcome.method == name]
        means = {field: over_seeds([getattr(outcome, field) for outcome in own]) for field in ("deviation", "reverse_kl", "forward_kl")}
        intervals = {field: [each.low, each.high] for field, each in means.items()}
        settled = {"settled": sum(outcome.mode is not None for outcome in own), "starts": len(own)}
        found[name] = {field: each.mean for field, each in means.items()} | {"intervals": intervals} | settled
    return found | {"outcomes": [outcome._asdict() for outcome in outcomes]}


def sentences(outcomes: list[Outcome], summary: Mapping[str, Any]) -> list[str]:
    """Each method's means, and each start that settled nowhere."""
    lines = [f"teacher, standard deviation {summary['teacher']['deviation']:.3f}"]
    for name in METHODS:
        told = {field: _told(summary[name], field) for field in ("deviation", "reverse_kl", "forward_kl")}
        settled = f"{summary[name]['settled']} of {summary[name]['starts']} starts settled on one mode"
        divergence = f"reverse KL {told['reverse_kl']}, forward KL {told['forward_kl']} nats"
        lines.append(f"{name}, standard deviation {told['deviation']}, {divergence}; {settled}")
    lost = [str(outcome.seed) for outcome in outcomes if outcome.method == "gad" and outcome.mode is None]
    return [*lines, f"gad settled on no mode from seeds {', '.join(lost)}"] if lost else lines


def _told(found: Mapping[str, Any], field: str) -> str:
    """A mean with half its interval's width, if it has one."""
    low, high = found["intervals"][field]
    return f"{found[field]:.3f}" + ("" if math.isnan(low) else f" ± {(high - low) / 2:.3f}")


def _applied(student: Student, updates: optax.Updates) -> Student:
    return jax.tree.map(jnp.add, student, updates)


def _trained(carry: Any, step: Callable[..., Any], key: jax.Array) -> Student:
    """The student, first of what is carried, after STEPS of `step`, each with a key of its own."""
    return jax.lax.scan(step, carry, jax.random.split(key, STEPS))[0][0]


def _kl(logp_K: np.ndarray, logq_K: np.ndarray) -> float:
    return float(np.exp(logp_K) @ (logp_K - logq_K))
