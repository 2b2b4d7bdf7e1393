"""The discriminator's opinion of answers, and the best of several."""

from collections.abc import Sequence

import jax
import numpy as np

from gadjax.algorithms import gad
from gadjax.data.config import DataConfig
from gadjax.data.packing import Ids, pack
from gadjax.sharding import replicated
from gadjax.steps import Models, row_shape
from gadjax.types import Params


class Scorer:
    """Scores responses with a discriminator; compiled once, for batches of any size.

    Args:
        models: the networks.
        params: the discriminator's parameters.
        data: the longest prompt and response.
        responses: J, scored together for one prompt; others are scored in portions.
        groups: B, prompts in one call of the device; others are scored in portions.
    """

    def __init__(self, models: Models, params: Params, data: DataConfig, responses: int, groups: int = 1):
        self._models, self._params, self._responses, self._groups = models, params, responses, groups
        self._shape = row_shape(data, models.mesh, groups, responses, together=True)
        self._score = models.program(lambda _, judge: gad.make_score(judge), out_shardings=replicated(models.mesh))

    def __call__(self, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """D(x, y) of the responses to each prompt; a response that ends by itself has its end of turn."""
        portions = [(index, first) for index, own in enumerate(responses) for first in range(0, len(own), self._responses)]
        scores: list[list[float]] = [[] for _ in prompts]
        for start in range(0, len(portions), self._groups):
            now = portions[start : start + self._groups]
            full = [*now, *[now[0]] * (self._groups - len(now))]  # filled up: one shape is compiled
            texts = [self._filled(responses[index][first : first + self._responses]) for index, first in full]
            rows = self._models.place_rows(pack([prompts[index] for index, _ in full], texts, self._shape))
            found = np.asarray(jax.device_get(self._score(self._params, rows)))
            for (index, first), row in zip(now, found, strict=False):
                scores[index] += row[: len(responses[index]) - first].tolist()
        return scores

    def _filled(self, responses: Sequence[Ids]) -> list[Ids]:
        return [*responses, *[responses[0]] * (self._responses - len(responses))]


def best(scores: Sequence[float]) -> list[int]:
    """The places of the scores, the highest first; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])
