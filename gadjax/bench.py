"""Speed of a config's parts on this machine: made-up groups, random weights, the real programs.

Useful tokens are what a padded implementation must compute, every response with its own prompt: prompts x N + responses in
the steps, responses in a rollout. Needed FLOPs are those of matrix products over the tokens that there are, each prompt once,
2 per multiply-add, 3 times the forward for a gradient; logits of response tokens only, attention left out.

Letters: B groups, N responses per group, P prompt tokens, R response tokens.
"""

import math
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.algorithms.stage import Guidance, SamplingStageConfig
from gadjax.chips import GIB, chip_of
from gadjax.config import Config, load_config
from gadjax.data.packing import pack
from gadjax.errors import UserError
from gadjax.files import to_json
from gadjax.models.adapters import within
from gadjax.models.checkpoint import read_config
from gadjax.models.decoder import DecoderConfig, Network
from gadjax.models.fresh import fresh_dims
from gadjax.steps import Models, Programs, responses_of, shardings_of
from gadjax.terminal import say
from gadjax.types import Params, Role, Rollout

END = 1  # the id that stands for the end of a turn
NEVER = -1  # the same where lengths are given: no token ends a response
SIGMA = 0.6  # of the log-normal lengths of responses
MEAN = 100 / 256  # their mean before they are cut, as a share of R


def lengths_of(count: int, longest: int, seed: int, mean: float = MEAN) -> list[int]:
    """Lengths of responses as chats have them: log-normal, cut at `longest`; `mean` is a share of it."""
    rng, centre = random.Random(seed), math.log(mean * longest) - SIGMA**2 / 2
    return [max(1, min(longest, round(math.exp(rng.gauss(centre, SIGMA))))) for _ in range(count)]


@dataclass(frozen=True)
class Bench:
    """One stage of a config, to be measured.

    Attributes:
        config: the experiment; its teacher, prompts and data are not touched.
        name: the stage.
        dims: the student's.
        repeats: how often each part runs after it was compiled.
    """

    config: Config
    name: str
    dims: DecoderConfig
    repeats: int

    @cached_property
    def programs(self) -> Programs:
        """What the stage compiles."""
        models = Models.of(self.config, self.dims)
        return Programs.of(self.config, self.name, 1, replace(models, base=_drawn(models, models.student, models.base)), END)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """B prompts of P tokens."""
        rng, groups = np.random.default_rng(1), self.programs.stage.batch_groups
        return rng.integers(2, self.dims.vocabulary, (groups, self.config.data.max_prompt_tokens)).tolist()

    def limits(self, each: int) -> np.ndarray:
        """[B, each] lengths of responses."""
        return np.array(lengths_of(len(self.prompts) * each, self.config.data.max_response_tokens, 0)).reshape(-1, each)

    def responses(self, each: int) -> list[list[list[int]]]:
        """`each` responses to every prompt, each with its end of turn."""
        rng = np.random.default_rng(2)
        return [[[*rng.integers(2, self.dims.vocabulary, length - 1).tolist(), END] for length in row] for row in self.limits(each)]

    def role(self, network: Network) -> Role:
        """A model with random weights."""
        return self.programs.models.fresh_role(network, self.params(network))

    def params(self, network: Network) -> Params:
        """Random weights where training would have them."""
        models = self.programs.models
        return _drawn(models, network, models.abstract_role(network).params)

    def reference(self) -> Params | None:
        """Random weights of the reference, where the stage has one."""
        return self.params(self.programs.models.student) if self.programs.algorithm.needs_reference else None

    def timed(self, work: Callable[[], Any]) -> float:
        """Median seconds of a call after the first one."""
        jax.block_until_ready(work())
        seconds: list[float] = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            jax.block_until_ready(work())
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def sampled(self) -> Callable[[Params], Rollout]:
        """Rollouts of made-up lengths, each a step on."""
        sampler, limits, steps = replace(self.programs, end_of_turn=NEVER).sampler, self.limits(self.programs.samples), count()
        return lambda params: sampler(params, self.prompts, jax.random.key(0), next(steps), limits)

    def rollout(self) -> dict[str, float]:
        """Samples for a batch of prompts. An ideal engine computes what is needed: each token once, with its logits."""
        params, sampled, tokens = self.params(self.programs.models.student), self.sampled(), int(self.limits(self.programs.samples).sum())
        return self.told(self.timed(lambda: sampled(params)), tokens, self.forward_flops(tokens, tokens))

    def step(self) -> dict[str, float]:
        """A whole step of GAD: samples, rows, discriminator, student. Beside it, the share in which the devices wait for the host."""
        programs, each, idle = self.programs, self.programs.samples, list[float]()
        student, discriminator = self.role(programs.models.student), self.role(programs.models.discriminator)
        reference, sampled, teacher = self.reference(), self.sampled(), self.responses(1)

        def packed(responses: list[Any], *shape_and_logps: Any) -> tuple[Any, float]:
            start = time.perf_counter()
            rows = jax.block_until_ready(programs.models.place_rows(pack(self.prompts, responses, *shape_and_logps)))
            return rows, time.perf_counter() - start

        def step() -> Any:
            nonlocal student, discriminator
            start = time.perf_counter()
            samples, logps = responses_of(sampled(student.params))
            both = [own + others for own, others in zip(teacher, samples, strict=True)]
            rows, waited = packed(both, programs.discriminator_rows())
            discriminator, scores, _ = programs.discriminator_step(discriminator, rows)
            rows, _ = packed(samples, programs.rows(each), logps)  # the device has the discriminator to do
            student, metrics = programs.student_step(student, rows, Guidance(reference, scores))
            jax.block_until_ready(metrics)
            idle.append(waited / (time.perf_counter() - start))
            return metrics

        tokens, ours = int(self.limits(each).sum()), _tokens(teacher)
        prompts = sum(map(len, self.prompts))
        useful = (2 * each + 1) * prompts + 3 * tokens + ours
        flops = (4 + programs.algorithm.needs_reference) * self.forward_flops(tokens, tokens) + 3 * self.forward_flops(tokens + ours, 0)
        return self.told(self.timed(step), useful, flops) | {"idle_fraction": statistics.median(idle[1:])}

    def student(self) -> dict[str, float]:
        """The student's step on samples: log-probabilities of student and reference, gradient, update."""
        programs, each = self.programs, self.programs.samples
        responses = self.responses(each)
        rows = programs.models.place_rows(pack(self.prompts, responses, programs.rows(each), _zeros(responses)))
        role, reference = self.role(programs.models.student), self.reference()
        scores = programs.models.place(np.random.default_rng(3).standard_normal((len(responses), 1 + each)).astype(np.float32), None, None)

        def step() -> Any:
            nonlocal role
            role, metrics = programs.student_step(role, rows, Guidance(reference, scores))
            return metrics

        tokens = _tokens(responses)
        flops = (3 + programs.algorithm.needs_reference) * self.forward_flops(tokens, tokens)
        return self.told(self.timed(step), len(self.prompts) * each * self.config.data.max_prompt_tokens + tokens, flops)

    def discriminator(self) -> dict[str, float]:
        """The discriminator's step on teacher and samples: scores, gradient, update."""
        programs, each = self.programs, 1 + self.programs.samples
        responses = self.responses(each)
        rows = programs.models.place_rows(pack(self.prompts, responses, programs.discriminator_rows()))
        role = self.role(programs.models.discriminator)

        def step() -> Any:
            nonlocal role
            role, *rest = programs.discriminator_step(role, rows)
            return rest

        tokens = _tokens(responses)
        useful = len(self.prompts) * each * self.config.data.max_prompt_tokens + tokens
        return self.told(self.timed(step), useful, 3 * self.forward_flops(tokens, 0))

    def forward_flops(self, response_tokens: int, projected: int) -> float:
        """Matrix products of one forward over the batch."""
        d = self.dims
        layer = d.width * d.head_width * (2 * d.heads + 2 * d.kv_heads) + 3 * d.width * d.feed_forward
        tokens = sum(map(len, self.prompts)) + response_tokens
        return 2.0 * d.layers * layer * tokens + 2.0 * d.vocabulary * d.width * projected

    def told(self, seconds: float, useful: int, flops: float) -> dict[str, float]:
        """What is reported of a part. `mfu`, where the chip is known, is the share of its bfloat16 peak that needed FLOPs take. Peaks are
        the process's so far: of a part alone where it is measured alone.
        """
        device = jax.devices()[0]
        told = {
            "seconds": seconds,
            "useful_tokens": useful,
            "useful_tokens_per_second": useful / seconds,
            "needed_gflops_per_second": flops / seconds / 1e9,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if chip := chip_of(device):
            told["mfu"] = flops / seconds / jax.device_count() / chip.flops
        if peak := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            told["device_peak_gib"] = peak / GIB
        return told


def _drawn(models: Models, network: Network, wanted: Params) -> Params:
    """Random weights of a network, as many as `wanted` has, in its dtypes and shardings."""

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), within(network.init(key), wanted), wanted)

    return models.jit(draw, out_shardings=shardings_of(wanted))(jax.random.key(0))


def _tokens(responses: list[list[list[int]]]) -> int:
    return sum(len(answer) for answers in responses for answer in answers)


def _zeros(responses: list[list[list[int]]]) -> list[list[list[float]]]:
    return [[[0.0] * len(answer) for answer in answers] for answers in responses]


PARTS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "rollout": Bench.rollout,
    "student": Bench.student,
    "discriminator": Bench.discriminator,
    "step": Bench.step,
}


def stage_to_measure(config: Config) -> tuple[Config, str, DecoderConfig]:
    """A config, its last stage that samples, and the student's dimensions.

    Raises:
        UserError: there is no such stage.
    """
    stage = next((name for name, stage in reversed(config.stages.items()) if isinstance(stage, SamplingStageConfig)), None)
    if stage is None:
        raise UserError("stages", "none of them samples", "give a warmup or gad stage")
    student = config.student
    return config, stage, fresh_dims(student.random, student.random.words) if student.random else read_config(Path(str(student.path)))[1]


def bench(words: list[str], config: Path, repeats: int, as_json: bool) -> None:
    """Measures parts, by default all, of a config's last stage that samples.

    Args:
        words: parts, and overrides of the config.
        config: the experiment.
        repeats: how often each part runs after it was compiled.
        as_json: one JSON object on stdout.

    Raises:
        UserError: there is no such part, or no stage that samples.
    """
    parts, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    for part in parts:
        if part not in PARTS:
            raise UserError("bench", f"there is no part {part}", f"use some of {', '.join(PARTS)}")
    made = Bench(*stage_to_measure(load_config(config, overrides)), repeats)
    found = {name: PARTS[name](made) for name in (parts or PARTS)}
    if as_json:
        print(to_json(found))
        return
    for name, values in found.items():
        say(f"{name}: " + ", ".join(f"{key} {value:,.3g}" for key, value in values.items()))
