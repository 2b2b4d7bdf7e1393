"""A Hugging Face folder to parameters and back.

Tensors are read one at a time from safetensors files and placed as the caller shards them. A folder is written beside and
renamed, so that it is there whole or not at all.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gadjax.errors import UserError
from gadjax.models import qwen2
from gadjax.models.decoder import DecoderConfig
from gadjax.models.hugging_face import Family, Tensor
from gadjax.types import Params

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen2.FAMILY,)}

WHERE = "student.path"
# What a tokenizer consists of in a folder; copied as it is from the student to an export.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt")


def read_config(folder: Path) -> tuple[Family, DecoderConfig]:
    """The family and dimensions of the model in a folder.

    Raises:
        UserError: there is no such folder, no config.json in it, or it is of another architecture.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(WHERE, f"there is no folder {folder}", "name a Hugging Face folder, or `random: {}` for a small fresh student")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"cannot be read ({error})", "name a folder that transformers wrote") from error
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(str(file), f"model_type {config.get('model_type')!r} is not supported", f"take one of {known}")
    try:
        return family, family.read(config)
    except KeyError as error:
        raise UserError(str(file), f"has no field {error}", "name a folder that transformers wrote") from error
    except ValueError as error:
        raise UserError(str(file), str(error), "take a model without it") from error


def _open_files(folder: Path) -> dict[str, Any]:
    """Tensor name -> the open safetensors file that holds it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(str(folder), "has no *.safetensors file", "save the model with safetensors (save_pretrained does)")
    handles: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="numpy")
        except SafetensorError as error:
            raise UserError(str(file), f"is no safetensors file ({error})", "save the model again") from error
        handles |= dict.fromkeys(handle.keys(), handle)
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


def load(folder: Path, family: Family, shapes: Params, place: Callable[[np.ndarray, Any], jax.Array]) -> Params:
    """Reads a model's parameters.

    Args:
        folder: the Hugging Face folder.
        family: as `read_config` says.
        shapes: the network's, nested dicts of ShapeDtypeStruct.
        place: (float32 array, its leaf of `shapes`) -> array on the devices.

    Raises:
        UserError: a file is no safetensors file, or a tensor is missing or of another shape than config.json says.
    """
    handles = _open_files(folder)

    def read(tensor: Tensor, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in handles:
            raise UserError(str(folder), f"has no tensor {name}", "name a folder whose weights belong to its config.json")
        array = handles[name].get_tensor(name)
        if array.shape != tensor.shape_there(shape):
            wanted = list(tensor.shape_there(shape))
            raise UserError(str(folder), f"tensor {name} is {list(array.shape)}, config.json makes it {wanted}", "mend one of the two")
        return tensor.to_ours(array.astype(np.float32), shape)

    params: Params = {}
    for tensor, leaf in _leaves(family, shapes):
        if tensor.stacked:
            layers = [read(tensor, tensor.name.format(layer), leaf.shape[1:]) for layer in range(leaf.shape[0])]
            _put(params, tensor.path, place(np.stack(layers), leaf))
        else:
            _put(params, tensor.path, place(read(tensor, tensor.name, leaf.shape), leaf))
    return params


def save(folder: Path, family: Family, config: DecoderConfig, params: Params, tokens: dict[str, int], tokenizer: Path | None) -> None:
    """Writes parameters as a folder that transformers loads.

    Args:
        folder: where; must not exist.
        family: which.
        config: the dimensions.
        params: float32 parameters.
        tokens: `eos_token_id` and `pad_token_id` for config.json and generation_config.json.
        tokenizer: the folder whose tokenizer files are copied, if any.
    """
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    for tensor, leaf in _leaves(family, params):
        array = np.asarray(leaf)
        if tensor.stacked:
            tensors |= {tensor.name.format(layer): tensor.to_theirs(array[layer]) for layer in range(len(array))}
        else:
            tensors[tensor.name] = tensor.to_theirs(array)
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    described = (
        {"model_type": family.model_type, "architectures": [family.architecture], "dtype": "float32"} | family.write(config) | tokens
    )
    (beside / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (beside / "generation_config.json").write_text(json.dumps({"do_sample": False} | tokens, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, beside / name)
    beside.rename(folder)
