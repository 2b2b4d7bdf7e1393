"""The models against PyTorch's numbers (tests/goldens), and Hugging Face folders read and written."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gadjax.errors import UserError
from gadjax.models.attention import packed
from gadjax.models.checkpoint import FAMILIES, load, read_config, save
from gadjax.models.decoder import DecoderConfig, Network, discriminator, discriminator_params, language_model
from gadjax.types import Params

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("tied", "untied")
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
TOKENS = {"eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def read(folder: Path, network: Network | None = None) -> Params:
    family, dims = read_config(folder)
    shapes = (network or language_model(dims, F32)).shapes
    return load(folder, family, shapes, lambda array, _: jnp.asarray(array))


@cache
def golden(name: str) -> tuple[DecoderConfig, Params, list[dict[str, np.ndarray]]]:
    """Dimensions, parameters, and the stored sequences: `tokens`, `hidden`, `logits`."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        sequences = [{key: arrays[f"{key}_{index}"] for key in ("tokens", "hidden", "logits")} for index in range(len(arrays) // 3)]
    return read_config(GOLDENS / name)[1], read(GOLDENS / name), sequences


def run(network: Network, params: Params, sequences: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of all sequences at once, one a row, padded."""
    lengths = np.array([len(sequence["tokens"]) for sequence in sequences])
    valid = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(valid.shape, np.int32)
    tokens[valid] = np.concatenate([sequence["tokens"] for sequence in sequences])

    @jax.jit
    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        model = network.bind(params)
        attend = packed(jnp.where(valid, 0, -1), jnp.full(valid.shape, -1))
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        hidden, _ = model.trunk(jnp.asarray(tokens), positions, attend)
        return hidden, model.logits(hidden)

    hidden, logits = forward(params)
    return np.asarray(hidden[valid]), np.asarray(logits[valid])


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_are_those_of_pytorch(name: str):
    dims, params, sequences = golden(name)
    hidden, logits = run(language_model(dims, F32), params, sequences)
    assert hidden.shape == (sum(len(sequence["tokens"]) for sequence in sequences), dims.width)
    np.testing.assert_allclose(hidden, np.concatenate([sequence["hidden"] for sequence in sequences]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, np.concatenate([sequence["logits"] for sequence in sequences]), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_logits_are_float32_and_near():
    dims, params, sequences = golden("untied")
    hidden, logits = run(language_model(dims, BF16), params, sequences)
    wanted = np.concatenate([sequence["logits"] for sequence in sequences])
    assert (hidden.dtype, logits.dtype) == (BF16, np.float32)
    assert 1e-3 < np.sqrt(np.mean((logits - wanted) ** 2) / np.mean(wanted**2)) < 0.03


def test_the_goldens_cover_the_layouts():
    (tied, params, _), (untied, _, _) = golden("tied"), golden("untied")
    assert tied.tied and not untied.tied and tied.rope_theta == untied.rope_theta == 1e6
    assert untied.kv_heads < untied.heads
    assert all(np.std(params["trunk"]["blocks"][name]) > 0.1 for name in ("query_bias", "key_bias", "value_bias", "attention_norm"))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_has_the_same_tensors_to_the_bit(name: str, tmp_path: Path):
    dims, params, _ = golden(name)
    save(tmp_path / "saved", FAMILIES["qwen2"], dims, params, TOKENS, None)
    theirs, ours = load_file(GOLDENS / name / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, array in theirs.items():
        assert ours[tensor].dtype == array.dtype
        np.testing.assert_array_equal(ours[tensor], array, err_msg=tensor)
    assert read_config(tmp_path / "saved") == (FAMILIES["qwen2"], dims)


def test_a_saved_folder_says_what_transformers_reads_and_takes_the_tokenizer_along(tmp_path: Path):
    dims, params, _ = golden("tied")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "tokenizer.json").write_text("its content")
    (tmp_path / "student" / "notes.txt").write_text("not a part of it")
    save(tmp_path / "a" / "saved", FAMILIES["qwen2"], dims, params, TOKENS, tmp_path / "student")
    saved = tmp_path / "a" / "saved"
    config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (saved, GOLDENS / "tied"))
    assert {name: config[name] for name in TOKENS} == TOKENS
    same = ("model_type", "architectures", "dtype", "rope_parameters", "vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps")
    assert {name: config[name] for name in same} == {name: theirs[name] for name in same}
    assert json.loads((saved / "generation_config.json").read_text()) == {"do_sample": False} | TOKENS
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert {file.name for file in saved.iterdir()} == names
    assert (saved / "tokenizer.json").read_text() == "its content"
    assert list(saved.parent.iterdir()) == [saved]


def test_a_save_that_fails_leaves_no_folder_and_does_not_hinder_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dims, params, _ = golden("tied")
    with monkeypatch.context() as patch:
        patch.setattr("gadjax.models.checkpoint.json.dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path / "saved", FAMILIES["qwen2"], dims, params, TOKENS, None)
    assert not (tmp_path / "saved").exists()
    save(tmp_path / "saved", FAMILIES["qwen2"], dims, params, TOKENS, None)
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_tensors_in_several_files_and_in_bfloat16_are_read(tmp_path: Path):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(GOLDENS / "untied" / "model.safetensors").items()}
    shutil.copy(GOLDENS / "untied" / "config.json", tmp_path)
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for index, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, tmp_path / f"model-{index + 1:05}-of-00002.safetensors")
    _, whole, _ = golden("untied")
    for ours, wanted in zip(jax.tree.leaves(read(tmp_path)), jax.tree.leaves(whole), strict=True):
        assert ours.dtype == F32
        np.testing.assert_array_equal(ours, wanted.astype(BF16).astype(F32))


def test_every_array_is_placed_once_in_float32_with_its_leaf():
    family, dims = read_config(GOLDENS / "untied")
    shapes = language_model(dims, F32).shapes
    placed: list[Any] = []

    def place(array: np.ndarray, leaf: Any) -> jax.Array:
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        placed.append(leaf)
        return jnp.asarray(array)

    params = load(GOLDENS / "untied", family, shapes, place)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert {id(leaf) for leaf in placed} == {id(leaf) for leaf in jax.tree.leaves(shapes)} and len(placed) == len(jax.tree.leaves(shapes))


def test_a_discriminator_reads_the_trunk_of_the_same_folder_and_scores_by_a_scalar_head():
    dims, student, sequences = golden("untied")
    network = discriminator(dims, F32)
    params = discriminator_params(network, student, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, network.shapes)
    hidden = jnp.asarray(sequences[2]["hidden"])
    scores = network.bind(params).scores(hidden)
    np.testing.assert_allclose(scores, sequences[2]["hidden"] @ np.asarray(params["head"]), rtol=1e-5, atol=1e-6)
    many = discriminator(replace(dims, width=4096), F32)
    head = discriminator_params(many, {"trunk": {}}, jax.random.key(1))["head"]
    assert abs(float(jnp.std(head)) / 0.02 - 1) < 0.05 and abs(float(jnp.mean(head))) < 0.002


def write_config(folder: Path, **changes: Any) -> Path:
    """The tied golden's config.json with changes; None takes a field away."""
    config = json.loads((GOLDENS / "tied" / "config.json").read_text()) | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_configs_of_transformers_4_and_5_read_alike(tmp_path: Path):
    wanted = DecoderConfig(
        vocabulary=64, width=32, layers=2, heads=4, kv_heads=4, head_width=8, feed_forward=48, rope_theta=1e6, norm_epsilon=1e-6,
        tied=True, qkv_bias=True, init_std=0.02,
    )  # fmt: skip
    five = json.loads((GOLDENS / "tied" / "config.json").read_text())
    assert five["rope_parameters"]["rope_theta"] == 1e6 and "rope_theta" not in five
    four = write_config(tmp_path, rope_parameters=None, rope_theta=1e6, dtype=None, torch_dtype="bfloat16")
    assert read_config(GOLDENS / "tied")[1] == read_config(four)[1] == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported; take one of qwen2"),
        ({"model_type": None}, "config.json: model_type None is not supported"),
        ({"num_hidden_layers": None}, "config.json: has no field 'num_hidden_layers'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "config.json: rope_type 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "config.json: rope_type 'yarn' is not supported"),
        ({"use_sliding_window": True}, "config.json: use_sliding_window True is not supported"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' is not supported"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read_config(write_config(tmp_path, **changes))


def test_no_folder_and_no_or_a_broken_config_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"student.path: there is no folder .*nowhere; name a Hugging Face folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json: cannot be read .*transformers wrote"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read .*transformers wrote"):
        read_config(tmp_path)


def test_broken_weights_are_told(tmp_path: Path):
    folder = write_config(tmp_path / "broken")
    with pytest.raises(UserError, match=r"broken: has no \*.safetensors file; save the model with safetensors"):
        read(folder)
    file = folder / "model.safetensors"
    tensors = load_file(GOLDENS / "tied" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({other: array for other, array in tensors.items() if other != name}, file)
    with pytest.raises(UserError, match=f"broken: has no tensor {name}; "):
        read(folder)
    save_file(tensors | {name: np.zeros((32, 48), np.float32)}, file)
    with pytest.raises(UserError, match=rf"broken: tensor {name} is \[32, 48\], config.json makes it \[48, 32\]; "):
        read(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors: is no safetensors file .*; save the model again"):
        read(folder)
