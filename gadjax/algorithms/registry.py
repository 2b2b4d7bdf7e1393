"""The algorithms by name. A new one is a file beside this and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gadjax.algorithms import gad, seqkd, warmup
from gadjax.algorithms.stage import Algorithm, StageConfig


@dataclass(frozen=True)
class Entry:
    """An algorithm's config class and what builds it from (config, optimizer by learning rate, student, discriminator)."""

    config: type[StageConfig]
    build: Callable[[Any, Any, Any, Any], Algorithm]


ALGORITHMS: dict[str, Entry] = {
    "seqkd": Entry(seqkd.SeqkdConfig, seqkd.build),
    "warmup": Entry(warmup.WarmupConfig, warmup.build),
    "gad": Entry(gad.GadConfig, gad.build),
}
