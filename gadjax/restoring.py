"""Reading a saved model and its optimizer onto the devices with little of it on the host at once.

Orbax reads the parts of all arrays at the same time, up to a number of bytes: 96 GB if it is not told, which is everything. A part that
is larger than that number is refused, so it has to be known how large they are.
"""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


def restored(folder: epath.Path, abstract: Any) -> Any:
    """The tree of arrays that was saved in `folder`, laid out as the shardings in `abstract` say."""
    limit = 1 + int(_largest(ocp.StandardCheckpointHandler().metadata(folder), abstract) / 1e9)  # GB, more than that of the largest part
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(restore_concurrent_gb=limit)) as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.StandardRestore(abstract))


def _largest(stored: Any, abstract: Any) -> int:
    """Bytes of the largest part that is read at once. What was saved in other parts is read in whole ones of those."""
    found, wanted = (ocp.tree.to_flat_dict(tree, sep=".") for tree in (stored.tree, abstract))
    return max(_bytes(found.get(name), leaf) for name, leaf in wanted.items())


def _bytes(stored: Any, leaf: jax.ShapeDtypeStruct) -> int:
    part = leaf.sharding.shard_shape(leaf.shape)
    if stored is None:  # Orbax tells what is missing
        return math.prod(part) * leaf.dtype.itemsize
    return math.prod(map(_covering, part, stored.storage.chunk_shape)) * stored.dtype.itemsize


def _covering(size: int, chunk: int) -> int:
    """How much of a dimension the whole chunks have that cover a part of this size, wherever it begins."""
    return chunk * (-(-size // chunk) + (1 if max(size, chunk) % min(size, chunk) else 0))
