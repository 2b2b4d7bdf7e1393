"""The mesh and who lives where on it, on one host or on many. The only file that names mesh axes.

Every array's dimensions have logical names ("embed", "mlp", "rows", ...); `RULES` says which mesh axes each is divided
over. Axis types are Auto: the compiler propagates shardings from parameters, batches and a few constraints.

On many hosts every host runs the same program on the same batches (`jax.distributed`) and gives its own devices their part of each
array. What is no work of the devices, such as asking the teacher or writing files, is done by process 0. So elsewhere in the package:

    put, put_parts         onto the devices             never `device_put`
    gathered               the whole of a divided array  `np.asarray` does for what is on every device
    is_first, by_first     what one process does        files that are written, the teacher, what is said
    agreed                 what all must decide alike   whether a file is there, which checkpoint is the last
    on_any                 what one process must hear   SIGTERM has come to another one
"""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from orbax.checkpoint.multihost import get_barrier_sync_fn
from pydantic import Field, field_validator

from gadjax.errors import Passing, UserError
from gadjax.section import Section

AXES = ("data", "fsdp", "context", "tensor")
AUTO = (AxisType.Auto,) * len(AXES)

# Products with gathered weights stay whole: as loops over the devices they take twice as long to compile and more memory.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

RULES: dict[str | None, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # packed rows of a micro-batch
    "groups": ("data", "fsdp", "context"),  # prompts of a rollout
    "slots": ("data", "fsdp", "context"),  # samples that a rollout decodes at once
    "tokens": ("context", "tensor"),  # of a row, between layers
    "queries": ("context",),  # of a row, in attention: keys and values travel, and are whole on every device
    "embed": ("fsdp", "context"),
    "vocabulary": ("tensor",),
    "words": AXES,  # the vocabulary while logits are made
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": ("fsdp",),  # of adapters
    # not divided: the scanned layers, the head width, and what is too small to be worth it
    "layers": (),
    "head": (),
    "norm": (),
    None: (),
}


class MeshConfig(Section):
    """How many devices lie along each axis; -1 for `fsdp` takes what the others leave.

    Attributes:
        data: copies of the parameters, each with its own rows.
        fsdp: parts into which the parameters and the rows are divided.
        context: parts into which the tokens of each row are divided, and the parameters once more: for rows so long, or devices so many,
            that one row a device is too much.
        tensor: parts into which heads, vocabulary and the feed-forward width are divided.
    """

    data: int = Field(default=1, ge=1)
    fsdp: int = Field(default=-1)
    context: int = Field(default=1, ge=1)
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
    if devices[0].platform == "tpu" and len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        raise UserError("mesh", "does not reach over several slices", "take one slice with more chips")
    # `jax.make_mesh` would have no 8 x 2 of a torus of 4 x 4 chips, whose own axes it does not divide.
    return Mesh(create_device_mesh(_sizes(config, len(devices)), devices, allow_split_physical_axes=True), AXES, axis_types=AUTO)


def reshaped(mesh: Mesh, config: MeshConfig) -> Mesh:
    """The devices of a mesh, in their order, along the axes of another config: one program may take arrays that lie on either."""
    return Mesh(mesh.devices.reshape(_sizes(config, mesh.size)), AXES, axis_types=AUTO)


def for_decoding(mesh: Mesh, kv_heads: int) -> Mesh:
    """The devices of a mesh, of which `tensor` takes as many from the others but `data` as there are key/value heads for.

    What a step of decoding makes of few tokens with parts of a weight's rows has to be summed over the devices, wide vectors of each. With
    parts of its heads and of the feed-forward width the sums are narrow and the caches no larger than before (docs/log.md has the
    figures). A vocabulary or feed-forward width that `tensor` does not divide lies on the devices in fewer parts.
    """
    data, fsdp, context, tensor = (mesh.shape[axis] for axis in AXES)
    others = fsdp * context  # there are no rows whose tokens could be divided
    taken = 1 if kv_heads % tensor else math.gcd(others, kv_heads // tensor)
    return Mesh(mesh.devices.reshape(data, others // taken, 1, tensor * taken), AXES, axis_types=AUTO)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    others = config.data * config.context * config.tensor
    fsdp = max(1, devices // others) if config.fsdp == -1 else config.fsdp
    sizes = (config.data, fsdp, config.context, config.tensor)
    if math.prod(sizes) != devices:
        taken = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError("mesh", f"{taken} does not make {devices} devices", "choose sizes whose product is the number of devices")
    return sizes


def multiple_of(name: str, mesh: Mesh | AbstractMesh) -> int:
    """What a dimension of this logical name must be a multiple of to be divided."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def row_multiple(mesh: Mesh | AbstractMesh) -> int:
    """What the number of rows must be a multiple of."""
    return multiple_of("rows", mesh)


def row_shards() -> int:
    """Over how many devices of the mesh in scope (`jax.set_mesh`) rows are divided; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_multiple(mesh)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array with these logical names; a dimension that its axes do not divide is not divided."""
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
        spec.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
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
    parts = 1 if mesh.empty else multiple_of(name, mesh)
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


def put(array: Any, sharding: Sharding) -> jax.Array:
    """A host array onto the devices. Every process gives the same array and copies what its own devices hold of it."""
    array = np.asarray(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return put_parts(array.shape, sharding, array.__getitem__)  # device_put would compare the processes' arrays each time


def put_parts(shape: Sequence[int], sharding: Sharding | None, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """An array onto the devices, of which `read(index)` gives a part. A process asks for those of its own devices, each once."""
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if str(index) not in parts:
            parts[str(index)] = read(index)
        return parts[str(index)]

    with jax.transfer_guard("allow"):  # it is explicit
        return jax.make_array_from_callback(tuple(shape), sharding, part)


def gathered(array: Any) -> np.ndarray:
    """The whole array on the host, wherever its parts are; of one that is spread over hosts a call of all processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


PATIENCE = 7 * 24 * 3600  # seconds that the others wait for process 0, which may be asking the teacher

DONE, REFUSED, FAILED = range(3)  # how process 0 has ended what the others wait for
Result = TypeVar("Result")
_numbers = itertools.count()  # of barriers; every process counts the same ones


def is_first() -> bool:
    """Whether this is process 0, which alone writes files, asks the teacher and speaks."""
    return jax.process_index() == 0


def by_first(work: Callable[[], Result]) -> Result | None:
    """What `work` returns on process 0, which does it while the others wait; None there. It fails for all if it fails.

    Raises:
        UserError: on the other processes, where process 0 has met one; a `Passing` where it has failed otherwise.
    """
    if not jax.distributed.is_initialized():
        return work()
    result, ended = None, FAILED
    try:
        if is_first():
            result = work()
        ended = DONE
    except UserError as error:
        ended = FAILED if isinstance(error, Passing) else REFUSED
        raise
    finally:
        wait_for_all()
        ended = agreed(ended)
    if ended != DONE:
        raise (UserError if ended == REFUSED else Passing)("process 0", "has failed", "see what it says")
    return result


def wait_for_all() -> None:
    """Waits until every process is here."""
    if jax.distributed.is_initialized():
        get_barrier_sync_fn()(key=f"gadjax {next(_numbers)}", timeout_ms=PATIENCE * 1000)


def agreed(value: int) -> int:
    """Process 0's value, on all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def least(value: int) -> int:
    """The least of all processes' values, on all processes."""
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))


def on_any(flag: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """A function that says whether `flag` was set on any process, the same on all of them.

    Of several processes it is asked now and answered by the devices, when they have done what they were given before: whoever waits
    for that anyway waits for nothing else.
    """
    if jax.process_count() == 1:
        return flag
    mine = np.array([flag()])
    found = _any_of(mesh)(put_parts((mesh.size,), NamedSharding(mesh, PartitionSpec(AXES)), lambda _: mine))
    return lambda: bool(np.asarray(found))


@cache
def _any_of(mesh: Mesh) -> jax.stages.Wrapped:
    return jit_on(mesh, jnp.any, out_shardings=replicated(mesh))


def check_same(text: str, what: str) -> None:
    """Tells that processes were started on different things.

    Raises:
        UserError: on every process, where `text` is not the same on all.
    """
    if len(np.unique(multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode()))))) > 1:
        raise UserError("the processes of this run", f"have different {what}", "give all of them the same files and command line")
