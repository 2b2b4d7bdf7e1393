"""The order in which training sees the data: batches of token groups, shuffled anew every epoch, without an end.

The k-th batch depends on the data, `batch_groups` and the seed alone. So the iterator's whole state is k, its restore is
exact, and it does not depend on the number of hosts: every host walks through the same batches, packs all of a batch in the same way
and gives its devices their rows, some of them empty. (256 groups of the paper's lengths take 0.2 to 0.5 s to pack, by
tests/benchmarks/packing.py. Hosts that dealt the groups among them would save most of that, but had to agree on the number of rows in
every step.)
"""

import math

import grain

from gadjax.data.snapshot import Split
from gadjax.records import TokenGroup


def batches(split: Split, batch_groups: int, seed: int) -> grain.IterDataset[list[TokenGroup]]:
    """The endless sequence of batches, each a list of exactly `batch_groups` groups.

    An epoch is one pass over the split in an order of its own. Where `batch_groups` does not divide it, the last batch of
    an epoch is completed with the first groups of the next one: no group is dropped and all batches have the same shape.

    `iter()` of it has `get_state()` (a small dict that JSON can hold, for the checkpoint) and `set_state(state)`. It reads
    in the caller's thread: a batch of 256 groups takes some 40 ms, a step of that size many seconds.
    """
    return (
        grain.MapDataset.source(split)
        .seed(seed)
        .shuffle()
        .map(lambda example: example.tokens)
        .repeat()
        .batch(batch_groups, drop_remainder=True, batch_fn=list)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def steps(groups: int, batch_groups: int, epochs: float) -> int:
    """The batches after which every group was seen at least `epochs` times."""
    return math.ceil(groups * epochs / batch_groups)
