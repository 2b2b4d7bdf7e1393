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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.algorithms.stage import Guidance, SamplingStageConfig
from gadjax.config import Config, load_config
from gadjax.data.packing import pack
from gadjax.errors import UserError
from gadjax.files import to_json
from gadjax.models.checkpoint import read_config
from gadjax.models.decoder import DecoderConfig, Network
from gadjax.models.fresh import fresh_dims
from gadjax.steps import Models, Programs
from gadjax.terminal import say
from gadjax.types import Params, Role

END = 1  # the id that stands for the end of a turn
SIGMA = 0.6  # of the log-normal lengths of responses
MEAN = 100 / 256  # their mean before they are cut, as a share of R


def lengths_of(count: int, longest: int, seed: int) -> list[int]:
    """Lengths of responses as chats have them: log-normal, cut at `longest`."""
    rng, centre = random.Random(seed), math.log(MEAN * longest) - SIGMA**2 / 2
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
        return Programs.of(self.config, self.name, 1, Models.of(self.config, self.dims), END)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """B prompts of P tokens."""
        rng, count = np.random.default_rng(1), self.programs.stage.batch_groups
        return rng.integers(2, self.dims.vocabulary, (count, self.config.data.max_prompt_tokens)).tolist()

    def responses(self, each: int) -> list[list[list[int]]]:
        """`each` responses to every prompt, each with its end of turn."""
        rng, longest = np.random.default_rng(2), self.config.data.max_response_tokens
        lengths = np.array(lengths_of(len(self.prompts) * each, longest, 0)).reshape(-1, each)
        return [[[*rng.integers(2, self.dims.vocabulary, length - 1).tolist(), END] for length in row] for row in lengths]

    def role(self, network: Network) -> Role:
        """A model with random weights."""
        return self.programs.models.fresh_role(network, self.params(network))

    def params(self, network: Network) -> Params:
        """Random weights where training would have them."""
        models = self.programs.models
        return models.jit(network.init, out_shardings=models.params_shardings(network))(jax.random.key(0))

    def timed(self, work: Callable[[], Any]) -> float:
        """Median seconds of a call after the first one."""
        jax.block_until_ready(work())
        seconds: list[float] = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            jax.block_until_ready(work())
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def student(self) -> dict[str, float]:
        """The student's step on samples: log-probabilities of student and reference, gradient, update."""
        programs, each = self.programs, self.programs.samples
        responses = self.responses(each)
        rows = programs.models.place_rows(pack(self.prompts, responses, programs.rows(each), _zeros(responses)))
        role, reference = self.role(programs.models.student), self.params(programs.models.student)
        scores = programs.models.place(np.random.default_rng(3).standard_normal((len(responses), 1 + each)).astype(np.float32), None, None)

        def step() -> Any:
            nonlocal role
            role, metrics = programs.student_step(role, rows, Guidance(reference, scores))
            return metrics

        tokens = _tokens(responses)
        forward = self.forward_flops(tokens, tokens)
        return self.told(self.timed(step), len(self.prompts) * each * self.config.data.max_prompt_tokens + tokens, 4 * forward)

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
        """What is reported of a part."""
        return {
            "seconds": seconds,
            "useful_tokens": useful,
            "useful_tokens_per_second": useful / seconds,
            "needed_gflops_per_second": flops / seconds / 1e9,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def _tokens(responses: list[list[list[int]]]) -> int:
    return sum(len(answer) for answers in responses for answer in answers)


def _zeros(responses: list[list[list[int]]]) -> list[list[list[float]]]:
    return [[[0.0] * len(answer) for answer in answers] for answers in responses]


PARTS: dict[str, Callable[[Bench], dict[str, float]]] = {"student": Bench.student, "discriminator": Bench.discriminator}


def bench(part: str | None, config: Path, overrides: list[str], repeats: int, as_json: bool) -> None:
    """Measures one part, or all, of a config's last stage that samples.

    Raises:
        UserError: there is no such part, or no such stage.
    """
    if part is not None and part not in PARTS:
        raise UserError("--part", f"there is no {part}", f"use one of {', '.join(PARTS)}")
    loaded = load_config(config, overrides)
    stage = next((name for name, stage in reversed(loaded.stages.items()) if isinstance(stage, SamplingStageConfig)), None)
    if stage is None:
        raise UserError("stages", "none of them samples", "give a warmup or gad stage")
    student = loaded.student
    dims = fresh_dims(student.random, student.random.words) if student.random else read_config(Path(str(student.path)))[1]
    made = Bench(loaded, stage, dims, repeats)
    found = {name: PARTS[name](made) for name in ([part] if part else PARTS)}
    if as_json:
        print(to_json(found))
        return
    for name, values in found.items():
        say(f"{name}: " + ", ".join(f"{key} {value:,.3g}" for key, value in values.items()))
