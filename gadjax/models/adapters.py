"""Low-rank adapters (LoRA, arXiv 2106.09685): one frozen base for student, discriminator and reference, which differ by these and the head.

    x W  becomes  x W + (alpha / rank) (x A) B            A ~ N(0, 1 / inputs), B = 0

W is never changed, nor is W + A B ever made but for an export: what is trained, and kept by optimizers and checkpoints, is A and B.
A model's parameters are nested dicts, and so are those of the base and those beside it: together they make the whole.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from pydantic import Field

from gadjax.section import Section
from gadjax.types import Params

ADAPTED = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}  # a block's matrices: how many dimensions go in


class AdaptersConfig(Section):
    """Adapters of every matrix in every block; without this section all parameters are trained.

    Attributes:
        rank: columns of A, rows of B.
        alpha: over `rank` it is what the adapters' part is multiplied by. By default twice the rank, so that the factor is 2 whatever
            the rank: a higher one adds room and leaves the size of a step as it is.
    """

    rank: int = Field(default=64, ge=1)
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def beside(weight: nnx.Param[jax.Array], inputs: int, rank: int, rngs: nnx.Rngs) -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array]]:
    """A and B for the matrices of all layers, [layers, inputs..., outputs...]: [layers, inputs..., rank] and [layers, rank, outputs...].

    Each has the logical axes of its own side. The rank is divided only where the width is not: both lie on the same devices.
    """
    axes, shape = weight.get_metadata()["axes"], weight[...].shape
    ins, outs = slice(1, 1 + inputs), slice(1 + inputs, None)
    a = jax.random.normal(rngs.params(), (shape[0], *shape[ins], rank), jnp.float32) * math.prod(shape[ins]) ** -0.5
    b = jnp.zeros((shape[0], rank, *shape[outs]), jnp.float32)
    whole_a, whole_b = "embed" in axes[ins], "embed" in axes[outs]
    return (
        nnx.Param(a, axes=(axes[0], *axes[ins], None if whole_a else "rank")),
        nnx.Param(b, axes=(axes[0], None if whole_b else "rank", *axes[outs])),
    )


def united(*trees: Params) -> Params:
    """One tree with the leaves of all; of those at one place, the last."""
    return unflatten_dict({path: leaf for tree in trees for path, leaf in flatten_dict(tree).items()})


def within(tree: Params, other: Params) -> Params:
    """The leaves of `tree` at places where `other` has one."""
    places = flatten_dict(other)
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if path in places})


def without(tree: Params, other: Params) -> Params:
    """The leaves of `tree` at places where `other` has none."""
    places = flatten_dict(other)
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if path not in places})


def folded(params: Params, adapters: AdaptersConfig | None) -> Params:
    """All of a model's parameters with the adapters in its matrices, W + scale A B in float32."""
    if adapters is None:
        return params
    blocks: dict[str, Any] = dict(params["trunk"]["blocks"])
    for name in ADAPTED:
        blocks[name] = _fold(blocks[name], blocks.pop(f"{name}_a"), blocks.pop(f"{name}_b"), adapters.scale)
    return params | {"trunk": params["trunk"] | {"blocks": blocks}}


@jax.jit
def _fold(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Of all layers: a is [layers, ..., rank], b [layers, rank, ...]."""
    layers, rank = a.shape[0], a.shape[-1]
    product = jnp.einsum("lir,lro->lio", a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision="highest")
    return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)
