"""Seconds that the host takes to pack a batch of the paper's size: 256 groups of a prompt, a teacher's answer and 8 samples.

python tests/benchmarks/packing.py
"""

import json
import time

import numpy as np

from gadjax.bench import lengths_of
from gadjax.data.packing import RowShape, pack

GROUPS, RESPONSES, PROMPT, RESPONSE = 256, 9, 2048, 1536


def main() -> None:
    """Packs, and tells the seconds without and with the sampler's log-probabilities."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 1000, length).tolist() for length in rng.integers(50, PROMPT, GROUPS)]
    lengths = np.reshape(lengths_of(GROUPS * RESPONSES, RESPONSE, 0), (GROUPS, RESPONSES))
    responses = [[tuple(rng.integers(2, 1000, length).tolist()) for length in row] for row in lengths]
    logps = [[[0.0] * length for length in row] for row in lengths]
    row = PROMPT + RESPONSES * RESPONSE
    shape = RowShape.holding(GROUPS, RESPONSES, prompt_tokens=PROMPT, response_tokens=RESPONSE, rows=16, length=row)
    seconds = []
    for known in (None, logps):
        start = time.perf_counter()
        pack(prompts, responses, shape, known)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"tokens": int(lengths.sum()) + sum(map(len, prompts)), "seconds": seconds[0], "seconds_with_logps": seconds[1]}))


if __name__ == "__main__":
    main()
