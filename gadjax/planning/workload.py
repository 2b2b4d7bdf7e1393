"""What a plan supposes of the texts: how long they are, and what that makes of a batch.

Letters: B groups, N responses per group, P and R the longest prompt and response, C prompts prefilled together, S decode slots.
"""

from dataclasses import dataclass
from functools import cache

from gadjax.bench import lengths_of
from gadjax.data.config import DataConfig
from gadjax.data.packing import RowShape, pack


@dataclass(frozen=True)
class Workload:
    """Batches of one stage.

    Attributes:
        groups: B.
        samples: N; 0 in a stage that samples nothing.
        data: P and R.
        prompt_tokens: of every prompt.
        mean_response: tokens of a response in the mean; log-normal and cut at R.
    """

    groups: int
    samples: int
    data: DataConfig
    prompt_tokens: int
    mean_response: int

    def lengths(self, each: int) -> list[list[int]]:
        """The lengths of `each` responses to every prompt."""
        return _lengths(self.groups, each, self.data.max_response_tokens, self.mean_response)

    def response_tokens(self, each: int) -> int:
        """Tokens of all of them."""
        return sum(map(sum, self.lengths(each)))

    def rows_used(self, shape: RowShape, each: int) -> int:
        """Micro-batches that the batch fills, packed as in training."""
        responses = [[range(length) for length in row] for row in self.lengths(each)]
        return int(pack([range(self.prompt_tokens)] * self.groups, responses, shape).used)

    def prefills(self, together: int) -> int:
        """Prefills of a rollout."""
        return -(-self.groups // together)

    def decode_steps(self, slots: int) -> float:
        """Steps of the decode loop: slots are refilled while samples wait, and then the longest response is waited for."""
        each = self.response_tokens(self.samples) / (self.groups * self.samples)
        waiting = max(0, self.groups * self.samples - slots) * each / slots
        return waiting + self.data.max_response_tokens


@cache
def _lengths(groups: int, each: int, longest: int, mean: int) -> list[list[int]]:
    flat = lengths_of(groups * each, longest, 0, mean / longest)
    return [flat[at : at + each] for at in range(0, len(flat), each)]
