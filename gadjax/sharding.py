"""The mesh and who lives where on it. The only file that names mesh axes.

Every array's dimensions have logical names ("embed", "mlp", "rows", ...); `RULES` says which mesh axes each is divided
over. Axis types are Auto: the compiler propagates shardings from parameters, batches and a few constraints.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import Field, field_validator

from gadjax.errors import UserError
from gadjax.section import Section

AXES = ("data", "fsdp", "tensor")

# Products with gathered weights stay whole: as loops over the devices they take twice as long to compile and more memory.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

RULES: dict[str | None, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # packed rows of a micro-batch
    "groups": ("data", "fsdp"),  # prompts of a rollout
    "slots": ("data", "fsdp"),  # samples that a rollout decodes at once
    "tokens": ("tensor",),  # of a row, between layers
    "embed": ("fsdp",),
    "vocabulary": ("tensor",),
    "words": AXES,  # the vocabulary while logits are made
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # not divided: the scanned layers, the head width, and what is too small to be worth it
    "layers": (),
    "head": (),
    "norm": (),
    None: (),
}


class MeshConfig(Section):
    """How many devices lie along each axis; -1 for `fsdp` takes what the other two leave.

    Attributes:
        data: copies of the parameters, each with its own rows.
        fsdp: parts into which the parameters and the rows are divided.
        tensor: parts into which heads, vocabulary and the feed-forward width are divided.
    """

    data: int = Field(default=1, ge=1)
    fsdp: int = Field(default=-1)
    tensor: int = Field(default=1, ge=1)

    @field_validator("fsdp")
    @classmethod
    def _positive_or_rest(cls, fsdp: int) -> int:
        if fsdp == -1 or fsdp >= 1:
            return fsdp
        raise ValueError("must be -1 (all the devices that are left) or at least 1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over `devices` (all of them by default). A mesh that they do not fill is a UserError."""
    devices = jax.devices() if devices is None else devices
    fsdp = max(1, len(devices) // (config.data * config.tensor)) if config.fsdp == -1 else config.fsdp
    sizes = (config.data, fsdp, config.tensor)
    if config.data * fsdp * config.tensor != len(devices):
        taken = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError("mesh", f"{taken} does not make {len(devices)} devices", "choose sizes whose product is the number of devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices))


def row_multiple(mesh: Mesh | AbstractMesh) -> int:
    """What the number of rows, and of groups, must be a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_shards() -> int:
    """Over how many devices of the mesh in scope (`jax.set_mesh`) rows are divided; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_multiple(mesh)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array with these logical names; a dimension that its axes do not divide is not divided."""
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        axes = RULES[name]
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        spec.append(axes if axes and size % parts == 0 else None)
    used = [axis for axes in spec if axes for axis in axes]
    assert len(used) == len(set(used)), f"{names} divides one mesh axis twice"
    return PartitionSpec(*spec)


def named_sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`partition` on its mesh."""
    return NamedSharding(mesh, partition(names, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def jit_on(mesh: Mesh, function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
    """`jax.jit` with a mesh in scope, so that the constraints inside (`constrain`) hold."""

    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    if mesh.devices.flat[0].platform == "tpu":
        options["compiler_options"] = TPU_OPTIONS
    return jax.jit(on_mesh, **options)


def constrain(array: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay `array` out by its logical names on the mesh in scope (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition(names, array.shape, mesh))


def parts_of(name: str, size: int) -> int:
    """Into how many parts the mesh in scope divides a dimension of this logical name and size."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])
    return 1 if size % parts else parts


def on_shards(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], names: Sequence[Sequence[str | None]]) -> jax.Array:
    """`function` of every device's own parts of `arrays`, which are laid out by their logical names as is the result by the first's.

    For kernels, which the compiler cannot divide. Without a mesh in scope it is `function` of the whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    specs = tuple(partition(each, array.shape, mesh) for array, each in zip(arrays, names, strict=True))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
