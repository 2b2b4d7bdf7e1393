"""A Hugging Face folder to parameters and back.

Tensors are read from safetensors files a few at a time, and of each what the devices of this host hold. A folder is written beside and
renamed, so that it is there whole or not at all.
"""

import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gadjax.errors import UserError
from gadjax.files import flush, told_where
from gadjax.foreign import LARGEST, read_whole
from gadjax.models import llama3, qwen2, qwen3
from gadjax.models.decoder import DecoderConfig
from gadjax.models.hugging_face import Family, Tensor
from gadjax.sharding import gathered, is_first, put_parts
from gadjax.types import Params

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen2.FAMILY, qwen3.FAMILY, llama3.FAMILY)}

WHERE = "student.path"
WHOLE_FOLDER = "name a folder that transformers wrote"  # the mend of many a mistake
DTYPES = ("F32", "F16", "BF16", "F64")  # as safetensors names them
SHARD_BYTES = 5_000_000_000  # of one file of weights, as transformers splits them
TOGETHER = 1 << 26  # bytes of a parameter that are read at once, if one layer is not more
# What a tokenizer consists of in a folder; copied as it is from the student to an export.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt")

# One label whose logit is the score as it is.
SCORE = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}


def family_of(config: DecoderConfig) -> Family:
    """The family whose decoders are like this one."""
    return next(each for each in FAMILIES.values() if (each.qkv_bias, each.qk_norm) == (config.qkv_bias, config.qk_norm))


def read_config(folder: Path, *, classifier: bool = False) -> tuple[Family, DecoderConfig]:
    """The family and dimensions of the language model, or sequence classifier, in a folder.

    Raises:
        UserError: there is no such folder, no config.json in it, or it is of another architecture.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(WHERE, f"there is no folder {folder}", "name a Hugging Face folder, or `random: {}` for a small fresh student")
    try:
        config: dict[str, Any] = dict(json.loads(read_whole(file, WHOLE_FOLDER)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(str(file), f"cannot be read ({error})", WHOLE_FOLDER) from error
    _check_sizes(folder)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(str(file), f"model_type {config.get('model_type')!r} is not supported", f"take one of {known}")
    wanted = family.classifier if classifier else family.language_model
    architectures = config.get("architectures") or [wanted]
    if wanted not in architectures:
        raise UserError(str(file), f"architectures {architectures!r} is not supported", f"take a {wanted}")
    try:
        return family, family.read(config)
    except KeyError as error:
        raise UserError(str(file), f"has no field {error}", WHOLE_FOLDER) from error
    except ValueError as error:
        raise UserError(str(file), str(error), "take a model without it") from error


def _check_sizes(folder: Path) -> None:
    """Refuses files of tokenizer and template that no library should be made to read."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.stat().st_size > LARGEST:
            raise UserError(str(file), f"has more than {LARGEST} bytes", WHOLE_FOLDER)


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a sequence classifier, as an exported discriminator is, and no language model."""
    try:
        architectures = json.loads(read_whole(folder / "config.json", WHOLE_FOLDER)).get("architectures") or []
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # `read_config` tells what is wrong with it
    return any(str(name).endswith("ForSequenceClassification") for name in architectures)


def same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether texts have the same tokens in both folders; a folder without a tokenizer has no other one."""
    files = [path / "tokenizer.json" for path in (folder, other)]
    if not all(file.is_file() for file in files):
        return True
    one, two = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return all(one.get(part) == two.get(part) for part in ("model", "normalizer", "pre_tokenizer", "added_tokens"))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's tokenizer."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _open_files(folder: Path) -> dict[str, tuple[Path, Any]]:
    """Tensor name -> the safetensors file that holds it, and that file opened."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(str(folder), "has no *.safetensors file", "save the model with safetensors (save_pretrained does)")
    handles: dict[str, tuple[Path, Any]] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="numpy")
        except SafetensorError as error:
            raise UserError(str(file), f"is no safetensors file ({error})", "save the model again") from error
        handles |= dict.fromkeys(handle.keys(), (file, handle))
    return handles


def _leaves(family: Family, shapes: Params) -> Iterator[tuple[Tensor, Any]]:
    """The family's tensors that the model has, with their leaf in `shapes`."""
    for tensor in family.tensors:
        leaf: Any = shapes
        for name in tensor.path:
            leaf = leaf.get(name) if isinstance(leaf, dict) else None
        if leaf is not None:
            yield tensor, leaf


def _put(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def open_weights(folder: Path, family: Family, shapes: Params) -> dict[str, Any]:
    """Opens a folder's weights and sees by the files' headers alone that they are those of the network.

    Args:
        folder: the Hugging Face folder.
        family: as `read_config` says.
        shapes: the network's, nested dicts of ShapeDtypeStruct.

    Returns:
        tensor name -> the open file that holds it.

    Raises:
        UserError: a file is no safetensors file, or a tensor is missing or of another shape than config.json says.
    """
    handles = _open_files(folder)
    for tensor, leaf in _leaves(family, shapes):
        wanted = list(tensor.shape_there(leaf.shape[1:] if tensor.stacked else leaf.shape))
        for name in tensor.names(leaf.shape[0]):
            if name not in handles:
                raise UserError(str(folder), f"has no tensor {name}", "take a whole folder, its weights and config.json of one model")
            file, handle = handles[name]
            found = handle.get_slice(name).get_shape()
            kind = handle.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise UserError(str(file), f"tensor {name} is of type {kind}", f"take a model whose weights are {', '.join(DTYPES)}")
            if found != wanted:
                raise UserError(str(file), f"tensor {name} is {found}, config.json makes it {wanted}", "mend one of the two")
    return {name: handle for name, (_, handle) in handles.items()}


def load(folder: Path, family: Family, shapes: Params) -> Params:
    """Reads a model's parameters onto the devices. Each process reads what its own devices hold, and holds no more than one layer's
    share of one parameter on the host, or `TOGETHER` bytes of several layers'.

    Args:
        folder: the Hugging Face folder.
        family: as `read_config` says.
        shapes: the network's, nested dicts of ShapeDtypeStruct, with the shardings to read them into; without any they go to the
            default device.

    Returns:
        The parameters, in the dtypes of `shapes`.

    Raises:
        UserError: as `open_weights`; or a weight is NaN or infinite.
    """
    handles = open_weights(folder, family, shapes)
    params: Params = {}
    for tensor, leaf in _leaves(family, shapes):
        slices = [handles[name].get_slice(name) for name in tensor.names(leaf.shape[0])]
        array = _read_layers(tensor, leaf, slices) if tensor.stacked else _read(tensor, leaf, slices[0])
        if not _finite(array):  # the first loss would be none, after hours of rollouts
            name = tensor.name.format("*")
            raise UserError(str(folder), f"tensor {name} has values that are no finite numbers", "take a whole copy of the model")
        _put(params, tensor.path, jax.block_until_ready(array))
    return params


def _read(tensor: Tensor, leaf: Any, there: Any) -> jax.Array:
    array = put_parts(leaf.shape, leaf.sharding, lambda index: tensor.part(there, index, leaf.shape))
    return array.astype(leaf.dtype)  # on the devices: the host has it as it is in the file


def _read_layers(tensor: Tensor, leaf: Any, slices: Sequence[Any]) -> jax.Array:
    """All layers of a parameter: a few are read at once and go to their place on the devices."""
    together = max(1, TOGETHER * len(slices) // (leaf.size * leaf.dtype.itemsize))
    whole = None
    for first in range(0, len(slices), together):
        some = slices[first : first + together]

        def part(index: tuple[slice, ...], some: Sequence[Any] = some) -> np.ndarray:
            return np.stack([tensor.part(there, index[1:], leaf.shape[1:]) for there in some[index[0]]])

        layers = put_parts((len(some), *leaf.shape[1:]), leaf.sharding, part).astype(leaf.dtype)
        if len(some) == len(slices):
            return layers
        whole = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) if whole is None else whole
        whole = jax.block_until_ready(_placed(whole, layers, first))  # else reading runs ahead, and the host holds it all
    assert whole is not None
    return whole


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@partial(jax.jit, donate_argnums=0)
def _placed(whole: jax.Array, layers: jax.Array, first: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, layers, first, axis=0)


def save(
    folder: Path,
    family: Family,
    config: DecoderConfig,
    params: Params,
    tokens: dict[str, int],
    files: Mapping[str, bytes],
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters as a folder that transformers loads: a student's as a causal language model, a discriminator's as a
    sequence classifier with one label, the score.

    Args:
        folder: where; one that is there gives way when this one is whole.
        family: which.
        config: the dimensions.
        params: float32 parameters, on the host or on the devices; those of one file are copied at a time. Where they are spread over
            several hosts all processes call this, and process 0 writes.
        tokens: `eos_token_id` and `pad_token_id` for config.json and generation_config.json.
        files: what else belongs into it, by name: the tokenizer.
        dtype: of the written tensors, "float32" or "bfloat16".
        shard_bytes: the most that one file holds, as long as one tensor does not.

    Raises:
        OSError: the disk is full, for one; then nothing of it is left.
    """
    beside = folder.with_name(folder.name + ".partial")
    if is_first():
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        save_tensors(beside, family, params, jnp.dtype(dtype), shard_bytes)
        if is_first():
            _describe(beside, family, config, "head" in params, tokens, files, dtype)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)


def _describe(
    folder: Path, family: Family, config: DecoderConfig, classifier: bool, tokens: dict[str, int], files: Mapping[str, bytes], dtype: str
) -> None:
    """Writes what stands beside the weights."""
    described = {"dtype": dtype} | family.write(config) | tokens
    if classifier:
        described |= {"architectures": [family.classifier]} | SCORE
    else:
        described |= {"architectures": [family.language_model]}
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": False} | tokens, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    for name, content in files.items():
        with told_where(folder / name):
            (folder / name).write_bytes(content)
    for file in folder.iterdir():
        flush(file)  # before the folder has its name


def _write(arrays: dict[str, np.ndarray], file: Path) -> None:
    try:
        save_file(arrays, file, metadata={"format": "pt"})
    except SafetensorError as error:  # which tells in words what the system has said
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
        raise


def save_tensors(folder: Path, family: Family, params: Params, dtype: np.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or several files and their index as transformers has them."""
    shards: list[list[tuple[str, Tensor, Callable[[], Any]]]] = [[]]
    sizes = [0]
    for tensor, leaf in _leaves(family, params):
        for layer, name in enumerate(tensor.names(leaf.shape[0])):
            size = leaf.size // (leaf.shape[0] if tensor.stacked else 1) * dtype.itemsize
            if shards[-1] and sizes[-1] + size > shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, tensor, partial(operator.getitem, leaf, layer if tensor.stacked else ...)))
            sizes[-1] += size
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        arrays: dict[str, np.ndarray] = {}
        for name, tensor, read in shard:
            whole = gathered(read())
            if is_first():
                arrays[name] = tensor.to_theirs(whole).astype(dtype)
        if is_first():
            _write(arrays, folder / file)
    if is_first() and len(files) > 1:
        index = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
        described = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(described, indent=2) + "\n")
