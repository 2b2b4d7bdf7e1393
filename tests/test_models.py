"""The models against PyTorch's numbers (tests/goldens), and Hugging Face folders read and written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gadjax.config import make_config
from gadjax.errors import UserError
from gadjax.export import export_discriminator
from gadjax.models import checkpoint
from gadjax.models.cache_attention import prefill
from gadjax.models.checkpoint import FAMILIES, load, read_config, save, tokenizer_files
from gadjax.models.decoder import (
    DecoderConfig,
    Network,
    RopeScaling,
    discriminator,
    discriminator_params,
    language_model,
    rotary_frequencies,
)
from gadjax.models.fresh import CONTROL, END, PAD, FreshConfig, write_fresh
from gadjax.models.hugging_face import Tensor
from gadjax.session import Session
from gadjax.sharding import MeshConfig, make_mesh, named_sharding
from gadjax.text import Text
from gadjax.types import Params

GOLDENS = Path(__file__).parent / "goldens"
NAMES = {"tied": "qwen2", "untied": "qwen2", "qwen3": "qwen3", "llama3": "llama"}  # golden -> model_type
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
TOKENS = {"eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def read(folder: Path, network: Network | None = None) -> Params:
    family, dims = read_config(folder)
    shapes = (network or language_model(dims, F32)).shapes
    return load(folder, family, shapes)


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
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        hidden, _ = model.trunk(jnp.asarray(tokens), positions, prefill)
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
    dims = {name: golden(name)[0] for name in NAMES}
    assert {name for name in NAMES if dims[name].tied} == {"tied", "llama3"} and dims["tied"].rope_theta == 1e6
    assert {name: dims[name].heads // dims[name].kv_heads for name in NAMES} == {"tied": 1, "untied": 2, "qwen3": 2, "llama3": 4}
    assert {name: dims[name].head_width for name in NAMES} == {"tied": 8, "untied": 8, "qwen3": 16, "llama3": 16}
    special = {"tied": ("query_bias", "key_bias", "value_bias"), "qwen3": ("query_norm", "key_norm"), "llama3": ()}
    for name, weights in special.items():
        blocks = golden(name)[1]["trunk"]["blocks"]
        assert {other for other in blocks if "bias" in other or "_norm" in other} == {*weights, "attention_norm", "mlp_norm"}
        assert all(np.std(blocks[weight]) > 0.1 for weight in (*weights, "attention_norm"))


def test_rotary_waves_are_stretched_as_llama_3_does():
    dims = replace(golden("llama3")[0], rope_theta=500_000.0, head_width=128)
    scaled = replace(dims, rope_scaling=RopeScaling(factor=8.0, low=1.0, high=4.0, context=8192))
    plain, stretched = (np.asarray(rotary_frequencies(each)) for each in (replace(dims, rope_scaling=None), scaled))
    np.testing.assert_allclose(plain, 500_000.0 ** (-np.arange(64) / 64), rtol=1e-5)
    waves = 8192 * plain / (2 * np.pi)
    short, long = waves > 4, waves < 1
    np.testing.assert_allclose(stretched[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(stretched[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert np.sum(between) > 3 and np.all(np.diff(stretched) < 0)
    smooth = (waves[between] - 1) / 3
    np.testing.assert_allclose(stretched[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_has_the_same_tensors_to_the_bit(name: str, tmp_path: Path):
    dims, params, _ = golden(name)
    family = FAMILIES[NAMES[name]]
    save(tmp_path / "saved", family, dims, params, TOKENS, {})
    theirs, ours = load_file(GOLDENS / name / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, array in theirs.items():
        assert ours[tensor].dtype == array.dtype
        np.testing.assert_array_equal(ours[tensor], array, err_msg=tensor)
    assert read_config(tmp_path / "saved") == read_config(GOLDENS / name) == (family, dims)


@pytest.mark.parametrize("name", NAMES)
def test_a_large_model_is_saved_in_several_files_with_an_index(name: str, tmp_path: Path):
    dims, params, _ = golden(name)
    family = FAMILIES[NAMES[name]]
    save(tmp_path / "saved", family, dims, params, TOKENS, {}, shard_bytes=4000)
    files = sorted(tmp_path.glob("saved/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    tensors = [load_file(file) for file in files]
    assert all(len(held) == 1 or sum(array.nbytes for array in held.values()) <= 4000 for held in tensors)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: file.name for file, held in zip(files, tensors, strict=True) for tensor in held}
    assert index["metadata"]["total_size"] == sum(array.nbytes for held in tensors for array in held.values())
    shapes = language_model(dims, F32).shapes
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "saved", family, shapes), params)


def test_weights_can_be_saved_as_bfloat16(tmp_path: Path):
    dims, params, _ = golden(next(iter(NAMES)))
    family = FAMILIES[NAMES[next(iter(NAMES))]]
    save(tmp_path / "saved", family, dims, params, TOKENS, {}, dtype="bfloat16")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {array.dtype for array in load_file(tmp_path / "saved" / "model.safetensors").values()} == {jnp.dtype(jnp.bfloat16)}
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16).astype(np.float32), params)
    shapes = language_model(dims, F32).shapes
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "saved", family, shapes), rounded)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_says_what_transformers_reads(name: str, tmp_path: Path):
    dims, params, _ = golden(name)
    save(tmp_path / "a" / "saved", FAMILIES[NAMES[name]], dims, params, TOKENS, {"tokenizer.json": b"its content"})
    saved = tmp_path / "a" / "saved"
    config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (saved, GOLDENS / name))
    assert {name: config[name] for name in TOKENS} == TOKENS
    different = {"pad_token_id", "transformers_version", "use_cache", "attention_dropout", "pretraining_tp"}
    different |= {"layer_types", "max_window_layers", "sliding_window"}
    assert {field: config[field] for field in theirs.keys() - different} == {field: theirs[field] for field in theirs.keys() - different}
    # What transformers 4 reads.
    assert config["rope_theta"] == theirs["rope_parameters"]["rope_theta"]
    assert {"rope_type": "default"} | (config["rope_scaling"] or {}) | {"rope_theta": config["rope_theta"]} == theirs["rope_parameters"]
    assert json.loads((saved / "generation_config.json").read_text()) == {"do_sample": False} | TOKENS
    assert {file.name for file in saved.iterdir()} == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert (saved / "tokenizer.json").read_text() == "its content"
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_discriminator_is_a_classifier_with_one_label(name: str, tmp_path: Path):
    dims, student, _ = golden(name)
    network = discriminator(dims, F32)
    params = discriminator_params(network, student, jax.random.key(0))
    family = FAMILIES[NAMES[name]]
    save(tmp_path / "saved", family, dims, params, TOKENS, {})
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    classes = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
    assert config["architectures"] == [f"{classes[NAMES[name]]}ForSequenceClassification"]
    assert (config["id2label"], config["label2id"], config["problem_type"]) == ({"0": "score"}, {"score": 0}, "regression")
    tensors, trunk = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", GOLDENS / name))
    assert tensors.keys() == trunk.keys() - {"lm_head.weight"} | {"score.weight"}
    np.testing.assert_array_equal(tensors["score.weight"], np.asarray(params["head"])[None])
    again = load(tmp_path / "saved", family, network.shapes)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(UserError, match=rf"architectures .* is not supported; take a {classes[NAMES[name]]}ForCausalLM"):
        read_config(tmp_path / "saved")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with jax.numpy_dtype_promotion("strict"):
        write_fresh(
            folder := tmp_path_factory.mktemp("fresh") / "student", FreshConfig(width=8, layers=1, heads=1, kv_heads=1), ["words"], 0
        )
    return folder


def session(folder: Path, student: Path, dtype: str = "float32") -> tuple[Session, Params]:
    """As much of a run's session as an export of its discriminator needs, and that discriminator."""
    family, dims = read_config(student)
    network = discriminator(dims, F32)
    params = discriminator_params(network, read(student), jax.random.key(0))
    stages = {"seqkd": {"algorithm": "seqkd"}, "gad": {"algorithm": "gad", "from": "seqkd"}}
    config = make_config({"prompts": {"train": "tutor:2"}, "stages": stages, "student": {"compute_dtype": dtype}})
    run = SimpleNamespace(folder=folder, config=config, checkpoints=lambda name: folder / name)
    snapshot = SimpleNamespace(train=[], validation=[], digest="none")
    parts = {"final_step": lambda name: 1, "folder": student, "text": Text.load(str(student)), "family": family, "dims": dims}
    return cast(Session, SimpleNamespace(run=run, snapshot=snapshot, merged=lambda *_: params, **parts)), params


@pytest.mark.parametrize("pad", [PAD, END, None])
def test_an_exported_discriminator_is_padded_with_what_ends_no_response(pad: str | None, fresh: Path, tmp_path: Path):
    student = Path(shutil.copytree(fresh, tmp_path / "student"))
    tokenizer = json.loads((student / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (student / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (student / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    opened, params = session(tmp_path / "run", student)
    folder = export_discriminator(opened, "gad")
    assert folder == tmp_path / "run" / "export" / "gad-discriminator"
    config, text = json.loads((folder / "config.json").read_text()), Text.load(str(folder))
    assert config["pad_token_id"] == text.pad == text._template.token_to_id(PAD if pad == PAD else CONTROL[-1])
    assert config["eos_token_id"] == text.end_of_turn == text._template.token_to_id(END)
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["score.weight"][0], params["head"])
    pads = {json.loads((folder / name).read_text())["pad_token"] for name in ("tokenizer_config.json", "special_tokens_map.json")}
    assert pads == {PAD if pad == PAD else CONTROL[-1]}
    assert (folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_written_as_the_run_computes_unless_told_otherwise(fresh: Path, tmp_path: Path, dtype: str):
    opened, _ = session(tmp_path, fresh, dtype)
    for told, written in ((None, dtype), ("float32", "float32")):
        folder = export_discriminator(opened, "gad", told)
        assert {str(array.dtype) for array in load_file(folder / "model.safetensors").values()} == {written}
        assert json.loads((folder / "config.json").read_text())["dtype"] == written


def test_a_discriminator_that_is_exported_is_kept_and_a_stage_without_one_is_told(fresh: Path, tmp_path: Path):
    opened, _ = session(tmp_path, fresh)
    folder = export_discriminator(opened, "gad")
    (folder / "config.json").write_text("a user's change")
    assert export_discriminator(opened, "gad") == folder and (folder / "config.json").read_text() == "a user's change"
    with pytest.raises(UserError, match=r"^stages.seqkd: has no discriminator; name a stage of algorithm warmup or gad$"):
        export_discriminator(opened, "seqkd")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["gad-discriminator"]


def test_the_tokenizer_s_files_are_those_that_are_there(tmp_path: Path):
    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (tmp_path / name).write_text(f"of {name}")
    assert tokenizer_files(tmp_path) == {name: f"of {name}".encode() for name in ("tokenizer.json", "chat_template.jinja")}


def test_a_save_that_fails_leaves_no_folder_and_does_not_hinder_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dims, params, _ = golden("tied")
    with monkeypatch.context() as patch:
        patch.setattr("gadjax.models.checkpoint.json.dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path / "saved", FAMILIES["qwen2"], dims, params, TOKENS, {})
    assert not (tmp_path / "saved").exists()
    save(tmp_path / "saved", FAMILIES["qwen2"], dims, params, TOKENS, {})
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


def test_every_array_is_read_in_float32():
    family, dims = read_config(GOLDENS / "untied")
    shapes = language_model(dims, F32).shapes
    params = load(GOLDENS / "untied", family, shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("together", [1, 1 << 26], ids=["layer by layer", "all layers at once"])
def test_arrays_are_read_into_their_shardings(monkeypatch: pytest.MonkeyPatch, together: int):
    monkeypatch.setattr(checkpoint, "TOGETHER", together)
    family, dims = read_config(GOLDENS / "qwen3")
    network = language_model(dims, F32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

    def placed(leaf: Any, axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(axes, leaf.shape, mesh))

    abstract = jax.tree.map(placed, network.shapes, network.axes)
    params = load(GOLDENS / "qwen3", family, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, golden("qwen3")[1])
    jax.tree.map(
        lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim) or pytest.fail(str(leaf)), params, abstract
    )
    assert params["trunk"]["blocks"]["query"].sharding.shard_shape((2, 32, 4, 16)) == (2, 8, 2, 16)
    assert params["trunk"]["blocks"]["query_norm"].sharding.shard_shape((2, 16)) == (2, 16)


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


def write_config(folder: Path, golden: str = "tied", **changes: Any) -> Path:
    """A golden's config.json with changes; None takes a field away."""
    config = json.loads((GOLDENS / golden / "config.json").read_text()) | changes
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
    assert "head_dim" not in five and wanted.head_width == wanted.width // wanted.heads


@pytest.mark.parametrize("rope_type", ["rope_type", "type"])
def test_stretched_waves_as_transformers_4_and_5_write_them_read_alike(rope_type: str, tmp_path: Path):
    wanted = DecoderConfig(
        vocabulary=64, width=32, layers=2, heads=4, kv_heads=1, head_width=16, feed_forward=48, rope_theta=1e4, norm_epsilon=1e-5,
        rope_scaling=RopeScaling(factor=8.0, low=1.0, high=4.0, context=64), tied=True, qkv_bias=False, init_std=0.02, context=512,
    )  # fmt: skip
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    four = write_config(tmp_path, "llama3", rope_parameters=None, rope_theta=1e4, rope_scaling=scaling | {rope_type: "llama3"})
    assert read_config(GOLDENS / "llama3")[1] == read_config(four)[1] == wanted


LONG = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
SLIDING = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("golden", "changes", "message"),
    [
        ("tied", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported; take one of llama, qwen2, qwen3"),
        ("tied", {"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ("tied", {"model_type": None}, "model_type None is not supported"),
        (
            "tied",
            {"architectures": ["Qwen2ForRewardModel"]},
            "architectures ['Qwen2ForRewardModel'] is not supported; take a Qwen2ForCausalLM",
        ),
        ("tied", {"num_hidden_layers": None}, "has no field 'num_hidden_layers'"),
        ("tied", {"rope_parameters": LONG}, "rope_type 'yarn' is not supported; take a model without it"),
        ("tied", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ("tied", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ("tied", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("qwen3", {"layer_types": SLIDING}, "layer_types sliding_attention is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama3", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama3", {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no field 'low_freq_factor'"),
        ("llama3", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ("tied", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(golden: str, changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(f"config.json: {message}")):
        read_config(write_config(tmp_path, golden, **changes))


def test_no_folder_and_no_or_a_broken_config_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"student.path: there is no folder .*nowhere; name a Hugging Face folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json: cannot be read .*transformers wrote"):
        read_config(tmp_path)
    for broken in ("{", "[1]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UserError, match=r"config.json: cannot be read .*transformers wrote"):
            read_config(tmp_path)


def test_broken_weights_are_told_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_config(tmp_path / "broken")
    family, dims = read_config(folder)

    def told(folder: Path) -> str:
        monkeypatch.setattr(checkpoint, "put_parts", lambda *_: pytest.fail("a tensor was read"))
        with pytest.raises(UserError) as stop:
            load(folder, family, language_model(dims, F32).shapes)
        return str(stop.value)

    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert told(folder) == f"{folder}: has no *.safetensors file; save the model with safetensors (save_pretrained does)"
    file = folder / "model.safetensors"
    tensors = load_file(GOLDENS / "tied" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({other: array for other, array in tensors.items() if other != name}, file)
    assert told(folder) == f"{folder}: has no tensor {name}; take a whole folder, its weights and config.json of one model"
    save_file(tensors | {name: np.zeros((32, 48), np.float32)}, file)
    assert told(folder) == f"{file}: tensor {name} is [32, 48], config.json makes it [48, 32]; mend one of the two"
    file.write_bytes(file.read_bytes()[:1000])
    assert re.fullmatch(rf"{file}: is no safetensors file \(.*\); save the model again", told(folder))


@pytest.mark.parametrize(
    ("inputs", "shape", "parts"), [(None, (8, 6), (4, 3)), (0, (4, 6), (2, 1)), (1, (8, 4, 6), (4, 2, 1)), (2, (4, 6, 8), (2, 1, 4))]
)
def test_a_part_is_the_same_part_of_the_whole(inputs: int | None, shape: tuple[int, ...], parts: tuple[int, ...]):
    tensor, ours = Tensor(("w",), "w", inputs), np.arange(np.prod(shape)).reshape(shape)
    theirs = tensor.to_theirs(ours)
    assert theirs.shape == tensor.shape_there(shape)
    for which in np.ndindex(*parts):
        index = tuple(slice(i * n // k, (i + 1) * n // k) for i, n, k in zip(which, shape, parts, strict=True))
        np.testing.assert_array_equal(tensor.part(theirs, index, shape), ours[index])


@pytest.mark.slow
def test_the_host_holds_a_few_tensors_while_weights_are_loaded(tmp_path: Path):
    layers, width, feed_forward = 96, 512, 4096
    measure = [sys.executable, "tests/benchmarks/loading.py", str(tmp_path / "random"), *map(str, (layers, width, feed_forward, 8000))]
    done = subprocess.run(measure, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    # Most of it is what compiling takes, whatever the size. One parameter of all layers would be more.
    assert found["host_gb"] < 4 * layers * width * feed_forward / 1e9 < 0.35 * found["arrays_gb"]
