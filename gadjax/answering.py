"""Answers to held-out prompts from any parameters, in every way of decoding: what validation and evaluation measure."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from gadjax.algorithms.seqkd import make_sequence_log_probs
from gadjax.config import Config
from gadjax.data.packing import Ids, pack
from gadjax.data.snapshot import Example
from gadjax.evaluation.samples import BEST_OF, BEST_OF_TEMPERATURE, MODES, Samples
from gadjax.rollout.decode import SamplingPlan
from gadjax.scoring import Scorer, best
from gadjax.sharding import replicated
from gadjax.steps import Models, Sampler, responses_of, row_shape
from gadjax.text import Text
from gadjax.types import Params


class Answerer:
    """Answers prompts with any parameters of the student; every program is compiled once for all stages."""

    def __init__(self, config: Config, models: Models, text: Text, key: jax.Array):
        self._models, self._text, self._batch = models, text, config.evaluation.batch_groups
        self._key = key
        plan = SamplingPlan(samples=1, response_tokens=config.data.max_response_tokens, temperature=0.0, end_of_turn=text.end_of_turn)
        self._samplers = {mode: Sampler(models, config.data, replace(plan, temperature=temperature)) for mode, temperature in MODES.items()}
        several = replace(plan, samples=config.evaluation.best_of, temperature=BEST_OF_TEMPERATURE)
        self._samplers[BEST_OF] = Sampler(models, config.data, several)
        self._log_probs = models.program(lambda student, _: make_sequence_log_probs(student), out_shardings=replicated(models.mesh))
        self._shape = row_shape(config.data, models.mesh, self._batch, 1)

    def answer(self, params: Params, examples: Sequence[Example], mode: str, scorer: Scorer | None = None) -> Samples:
        """One answer to each example's prompt. `mode` is one of `MODES`, or `BEST_OF` with the discriminator that chooses."""
        ids: list[tuple[int, ...]] = []
        log_probs: list[float] = []
        ended: list[bool] = []
        for start in range(0, len(examples), self._batch):
            prompts = [example.tokens.prompt for example in examples[start : start + self._batch]]
            # The last batch is filled up, so that every program compiles for one shape.
            full = [*prompts, *[prompts[0]] * (self._batch - len(prompts))]
            rollout = self._samplers[mode](params, full, self._key, start)
            sampled, _ = responses_of(rollout)
            chosen = [best(scores)[0] for scores in scorer(full, sampled)] if scorer else [0] * len(full)
            answers = [own[choice] for own, choice in zip(sampled, chosen, strict=True)]
            ids += answers[: len(prompts)]
            log_probs += self._score(params, full, [[answer] for answer in answers])[: len(prompts)]
            ended += np.asarray(rollout.ended_BN)[range(len(full)), chosen][: len(prompts)].tolist()
        return Samples(
            prompts=tuple(example.prompt for example in examples),
            teacher=tuple(example.answer.text for example in examples),
            texts=tuple(self._text.decode(answer) for answer in ids),
            log_probs=np.array(log_probs, np.float64),
            lengths=np.array([len(answer) for answer in ids]),
            truncated=~np.array(ended),
        )

    def _score(self, params: Params, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> list[float]:
        rows = self._models.place_rows(pack(prompts, responses, self._shape))
        return np.asarray(self._log_probs(params, rows))[:, 0].tolist()
