"""Half of the system at a time, really learning: the student by an exact reward, the discriminator from text of known faults.

A wrong sign, a shifted mask or a misplaced reward passes many tests of form; it does not pass these. They compute rather than compile:
JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest -m slow tests/test_learning.py
"""

import random
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from gadjax.algorithms.stage import Guidance
from gadjax.config import Config, make_config
from gadjax.data.packing import pack
from gadjax.models.checkpoint import load, read_config
from gadjax.models.decoder import discriminator_params
from gadjax.models.fresh import write_fresh
from gadjax.steps import Models, Programs, responses_of
from gadjax.teachers import grammar
from gadjax.text import Text
from gadjax.types import PackedRows, Params, Role

pytestmark = pytest.mark.slow

TRAIN, HELD_OUT = 2000, 256
ORACLE_STEPS = 60
GAIN = 0.1  # of validity by the exact reward, fixed before the test was first run
ACCURACY = 0.95
FLOOR = -60.0  # far below any answer that the tutor gives

Ids = tuple[int, ...]


def config_of(stages: dict) -> Config:
    return make_config(
        {
            "teacher": {"backend": "tutor"},
            "student": {"random": {"width": 64, "layers": 2, "feed_forward": 128}, "compute_dtype": "float32"},
            "data": {"max_prompt_tokens": 16, "max_response_tokens": 32, "row_tokens": 128, "rows": 8},
            "stages": stages,
        }
    )


CONFIG = config_of(
    {
        "seqkd": {"algorithm": "seqkd", "batch_groups": 64, "learning_rate": 3e-3},
        "gad": {
            "algorithm": "gad",
            "from": "seqkd",
            "batch_groups": 32,
            "learning_rate": 3e-4,
            "discriminator": {"learning_rate": 1e-3},
        },
    }
)


@dataclass
class Lab:
    """A student that imitates the tutor half well, and what it learned from.

    Attributes:
        text: its tokenizer.
        models: the networks.
        prompts: training prompts and held-out ones, as the tutor wrote them.
        answers: the tutor's answers to them.
        params: the student's.
    """

    text: Text
    models: Models
    prompts: list[str]
    answers: list[str]
    params: Params

    def prompt(self, index: int) -> Ids:
        return self.text.prompt_ids([{"role": "user", "content": self.prompts[index]}], 16)

    def response(self, text: str) -> Ids:
        return self.text.response_ids(text, 32)

    def programs(self, stage: str) -> Programs:
        return Programs.of(CONFIG, stage, 1000, self.models, self.text.end_of_turn)

    def validity(self, programs: Programs, params: Params) -> float:
        """The share of valid answers to the held-out prompts, one sample each at T = 0.8."""
        indices = range(TRAIN, TRAIN + HELD_OUT)
        rollout = programs.sampler(params, [self.prompt(i) for i in indices], jax.random.key(9), 10**6)
        sampled, _ = responses_of(rollout)
        texts = [self.text.decode(answers[0]) for answers in sampled]
        return float(np.mean([grammar.judge(self.prompts[i], text).valid for i, text in zip(indices, texts, strict=True)]))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    prompts = grammar.prompts(TRAIN + HELD_OUT, 0)
    answers = [grammar.sample(prompt, random.Random(index)) for index, prompt in enumerate(prompts)]
    folder: Path = tmp_path_factory.mktemp("learning") / "student"
    assert CONFIG.student.random is not None
    write_fresh(folder, CONFIG.student.random, [*prompts[:TRAIN], *answers[:TRAIN]], 0)
    family, dims = read_config(folder)
    models = Models.of(CONFIG, dims)
    params = models.place_params(models.student, load(folder, family, models.student.shapes))
    made = Lab(Text.load(str(folder)), models, prompts, answers, params)
    programs, role = made.programs("seqkd"), models.fresh_role(models.student, params)
    order = np.random.default_rng(0)
    for _ in range(250):
        batch = order.choice(TRAIN, 64, replace=False)
        rows = pack([made.prompt(i) for i in batch], [[made.response(answers[i])] for i in batch], programs.rows(1))
        role, _ = programs.student_step(role, models.place_rows(rows), Guidance(None, None))
    made.params = role.params
    return made


def oracle_reward(lab: Lab, prompt: str, response: Ids) -> float:
    """The tutor's own log-probability of the answer, bounded below where it is impossible."""
    if response[-1] != lab.text.end_of_turn:
        return FLOOR
    return max(FLOOR, grammar.log_prob(prompt, lab.text.decode(response)))


def test_the_tutors_own_log_probability_as_reward_makes_the_student_valid(lab):
    programs, models = lab.programs("gad"), lab.models
    role, reference = models.fresh_role(models.student, lab.params), lab.params
    before = lab.validity(programs, lab.params)
    order = np.random.default_rng(1)
    for step in range(ORACLE_STEPS):
        batch = order.choice(TRAIN, 32, replace=False)
        prompts = [lab.prompt(i) for i in batch]
        sampled, logps = responses_of(programs.sampler(role.params, prompts, jax.random.key(0), step))
        rewards = [[oracle_reward(lab, lab.prompts[i], answer) for answer in group] for i, group in zip(batch, sampled, strict=True)]
        scores = np.pad(np.array(rewards, np.float32), ((0, 0), (1, 0)))  # the teacher's place, which the student does not read
        rows = models.place_rows(pack(prompts, sampled, programs.rows(8), logps))
        role, metrics = programs.student_step(role, rows, Guidance(reference, models.place(scores, None, None)))
        assert metrics["rollout/logp_gap"] < 1e-5
    after = lab.validity(programs, role.params)
    assert 0.1 < before < 0.9, f"the student begins at a validity of {before:.2f}, where little can be gained or lost"
    assert after > before + GAIN, f"validity went from {before:.3f} to {after:.3f}"


def test_the_discriminator_tells_broken_text_from_the_teachers(lab):
    programs, models = lab.programs("gad"), lab.models
    judge = discriminator_params(models.discriminator, lab.params, jax.random.key(1))
    order = np.random.default_rng(2)

    def broken(answer: str) -> str:
        words = answer.split(" ")
        order.shuffle(words)
        return " ".join(words)

    def rows_of_batch() -> PackedRows:
        batch = order.choice(TRAIN, 32, replace=False)
        groups = [[lab.response(lab.answers[i]), *(lab.response(broken(lab.answers[i])) for _ in range(8))] for i in batch]
        return models.place_rows(pack([lab.prompt(i) for i in batch], groups, programs.discriminator_rows()))

    scores = np.asarray(programs.score(judge, rows_of_batch()))
    if np.mean(scores[:, :1] > scores[:, 1:]) > 0.5:  # a fresh head is right or wrong by chance: begin with one that is wrong
        judge = judge | {"head": -judge["head"]}
    role: Role = models.fresh_role(models.discriminator, judge)
    accuracies = []
    for _ in range(60):
        role, _, metrics = programs.discriminator_step(role, rows_of_batch())
        accuracies.append(float(metrics["discriminator/accuracy"]))
    assert accuracies[0] < 0.6
    assert np.mean(accuracies[-5:]) > ACCURACY, f"accuracy ended at {np.mean(accuracies[-5:]):.3f}"
