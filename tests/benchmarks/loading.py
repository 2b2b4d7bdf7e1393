"""Host memory that loading weights takes beside the arrays on the devices: written to a folder at random, read onto 8 CPU devices.

    python tests/benchmarks/loading.py FOLDER [LAYERS WIDTH FEED_FORWARD VOCABULARY]      # by default Qwen2.5-3B, 6.2 GB of files

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

from gadjax.models import checkpoint
from gadjax.models.checkpoint import load
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.models.qwen2 import FAMILY
from gadjax.sharding import MeshConfig, make_mesh, named_sharding

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


def main(folder: Path, layers: int = 36, width: int = 2048, feed_forward: int = 11008, vocabulary: int = 151936) -> None:
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
    largest = write(folder, config)
    network, mesh = language_model(config, jnp.dtype(jnp.bfloat16)), make_mesh(MeshConfig(fsdp=4, tensor=2))

    def placed(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(axes, leaf.shape, mesh))

    abstract = jax.tree.map(placed, network.shapes, network.axes)
    jax.block_until_ready(jnp.zeros(8) + 1)
    before, most, over, given = anonymous(), 0, threading.Event(), list[jax.Array]()
    place = checkpoint._placed

    def placed_in(whole: jax.Array, layers: jax.Array, first: int) -> jax.Array:
        given.append(whole)
        try:
            return place(whole, layers, first)
        finally:
            given.clear()

    checkpoint._placed = placed_in

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            away = sum(array.nbytes for array in given.copy() if array.is_deleted())
            most = max(most, anonymous() - before - on_devices() - away)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    params = jax.block_until_ready(load(folder, FAMILY, abstract))
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        json.dumps(
            {
                "parameters": arrays // 4,
                "arrays_gb": arrays / GB,
                "largest_tensor_gb": largest / GB,
                "host_gb": most / GB,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
