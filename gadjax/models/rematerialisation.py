"""What a gradient keeps of each layer, and what it computes again.

Whatever is kept beside a layer's input costs memory, and spares one of two things: a product with weights, which takes D multiply-adds
for each number, or the attention kernel, which takes as many as there are keys. So the kernel's result is always kept, and of the products
the attention's before the feed-forward layer's, which are many times as wide.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from gadjax.models.cudnn_attention import KERNEL
from gadjax.models.splash_attention import ATTENDED

Rematerialise = Literal[True, False, "feed_forward"]

# By what is computed again: the results that are kept, by the names of a layer's matrices. That of "down" no gradient needs.
KEPT: dict[Rematerialise, tuple[str, ...]] = {
    True: (ATTENDED,),
    "feed_forward": (ATTENDED, "query", "key", "value", "output"),
    False: (ATTENDED, "query", "key", "value", "output", "gate", "up"),
}


def policy_of(rematerialise: Rematerialise) -> Callable[..., bool]:
    """For `jax.checkpoint` of a layer, in which results have names. All that has none is cheap, and memory traffic is not."""
    named = jax.checkpoint_policies.save_only_these_names(*KEPT[rematerialise])

    def keeps(primitive: Any, *operands: Any, **parameters: Any) -> bool:
        return primitive.name == KERNEL or named(primitive, *operands, **parameters)

    return keeps
