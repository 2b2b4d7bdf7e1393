"""Host memory that loading weights, and restoring them from a checkpoint, takes beside the arrays on the devices.

    python tests/benchmarks/loading.py FOLDER [LAYERS WIDTH FEED_FORWARD VOCABULARY] [--restore]   # default: Qwen2.5-3B, 6.2 GB of files

Weights are written to the folder at random and read onto 8 CPU devices; with --restore, they are saved as a checkpoint too, and restored.

On the CPU the devices' arrays are host memory too. What is told is the most that the process had at any time (anonymous memory: not
the files' pages, which the system may drop) over what it had before and over the arrays that were alive on the devices then. An array
that is given to a program to be changed in place counts as alive while the program has it.
"""

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gadjax.checkpointing import Checkpoints
from gadjax.models import checkpoint
from gadjax.models.checkpoint import load
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.models.qwen2 import FAMILY
from gadjax.sharding import MeshConfig, make_mesh, named_sharding
from gadjax.types import Role, TrainState

GB = 1e9


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def on_devices() -> int:
    """Bytes of the arrays that are alive, on all devices."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize * len(array.sharding.addressable_devices)
        for array in jax.live_arrays()
    )


class Watched:
    """What the process has at most beside the arrays on the devices, in `most`, while the context is open; and its seconds.

    Args:
        given: arrays that are given to a program just now.
    """

    def __init__(self, given: list[jax.Array]):
        self.most, self.seconds = 0, 0.0
        self._given, self._over = given, threading.Event()

    def __enter__(self) -> "Watched":
        self._before, self._start = anonymous() - on_devices(), time.perf_counter()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        last = 0
        while not self._over.is_set():
            away = sum(array.nbytes for array in self._given.copy() if array.is_deleted())
            now = anonymous() - self._before - on_devices() - away
            # What is seen once only is an array that went from one name to another between the lines above.
            self.most, last = max(self.most, min(last, now)), now
            time.sleep(0.01)


def write(folder: Path, config: DecoderConfig) -> int:
    """Random bfloat16 weights, a file for each layer; returns the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16)
    shapes, largest = language_model(config, jnp.dtype(jnp.bfloat16)).shapes, 0
    files: dict[str, dict[str, np.ndarray]] = {}
    names: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in FAMILY.tensors:
        leaf: Any = shapes
        for key in tensor.path:
            leaf = leaf.get(key, {})
        if not leaf:
            continue
        shape = leaf.shape[1:] if tensor.stacked else leaf.shape
        for layer, name in enumerate(tensor.names(leaf.shape[0])):
            names.setdefault(f"{layer:03}" if tensor.stacked else "rest", {})[name] = tensor.shape_there(shape)
    for file, tensors in names.items():
        files[file] = {name: np.resize(noise, shape) for name, shape in tensors.items()}
        largest = max(largest, *(array.nbytes for array in files[file].values()))
        save_file(files.pop(file), folder / f"{file}.safetensors")
    return largest


def main(folder: Path, restores: bool, layers: int = 36, width: int = 2048, feed_forward: int = 11008, vocabulary: int = 151936) -> None:
    """Writes, reads, tells."""
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=width // 128,
        kv_heads=2,
        head_width=128,
        feed_forward=feed_forward,
    )
    largest = write(folder / "weights", config)
    network, mesh = language_model(config, jnp.dtype(jnp.bfloat16)), make_mesh(MeshConfig(fsdp=4, tensor=2))

    def placed(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(axes, leaf.shape, mesh))

    abstract = jax.tree.map(placed, network.shapes, network.axes)
    jax.block_until_ready(jnp.zeros(8) + 1)
    given = list[jax.Array]()
    place = checkpoint._placed

    def placed_in(whole: jax.Array, layers: jax.Array, first: int) -> jax.Array:
        given.append(whole)
        try:
            return place(whole, layers, first)
        finally:
            given.clear()

    checkpoint._placed = placed_in
    with Watched(given) as loaded:
        params = jax.block_until_ready(load(folder / "weights", FAMILY, abstract))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    told = {"parameters": arrays // 4, "arrays_gb": arrays / GB, "largest_tensor_gb": largest / GB}
    told |= {"host_gb": loaded.most / GB, "seconds": loaded.seconds}
    if restores:
        state = TrainState(Role(params, ()), None)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(1, state, {})
        del params, state
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints, Watched([]) as restored:
            kept = jax.block_until_ready(checkpoints.restore_role(1, "student", Role(abstract, ())))
        assert kept  # alive until now: memory is given back later than arrays are deleted
        told |= {"restored_host_gb": restored.most / GB, "restored_seconds": restored.seconds}
    print(json.dumps(told))


if __name__ == "__main__":
    restores = "--restore" in sys.argv
    where, *sizes = (each for each in sys.argv[1:] if each != "--restore")
    main(Path(where), restores, *map(int, sizes))
