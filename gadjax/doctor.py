"""What this machine has, and what a config would need of it. Says of a key whether it is set, and never its value."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.checkpointing import KEEP
from gadjax.config import Config, load_config
from gadjax.errors import UserError
from gadjax.files import to_json
from gadjax.models.checkpoint import read_config
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.models.fresh import fresh_dims
from gadjax.serve import TOKEN
from gadjax.teachers.openai import price_of
from gadjax.teachers.sources import load_prompts, load_tests

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "grain", "openai", "numpy")
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", TOKEN)
TRAINED, COPY = 12, 2  # bytes a parameter: float32 with two moments; a bfloat16 copy
GB = 1e9

Facts = dict[str, Any]


def machine() -> Facts:
    """What this machine has."""
    devices = jax.devices()
    memory = [stats["bytes_limit"] / GB for device in devices if (stats := device.memory_stats()) and "bytes_limit" in stats]
    return {
        "gadjax": metadata.version("gadjax"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB,
        "disk_free_gb": _disk_free(Path.cwd()) / GB,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "device_memory_gb": sum(memory) if memory else None,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "keys_set": {name: bool(os.environ.get(name)) for name in KEYS},
    }


def needs(config: Config) -> Facts:
    """What a config needs, by the rules of thumb of full training: parameters with their moments, copies, checkpoints."""
    judged = any(isinstance(stage, SamplingStageConfig) for stage in config.stages.values())
    found: Facts = {"disk_free_gb": _disk_free(config.run.path) / GB}
    found |= _prompts(config) | _teacher(config)
    dims = _dims(config)
    if dims is None:
        return found | {"parameters": None}
    count = sum(leaf.size for leaf in jax.tree.leaves(language_model(dims, jnp.dtype(jnp.float32)).shapes))
    roles = 2 if judged else 1
    return found | {
        "parameters": count,
        "device_memory_gb": count * (roles * TRAINED + (2 * COPY if judged else 0)) / GB,
        "disk_gb": count * roles * TRAINED * KEEP * len(config.stages) / GB,
    }


def _dims(config: Config) -> DecoderConfig | None:
    """The student's dimensions; None for one that must be fetched first."""
    if config.student.random is not None:
        return fresh_dims(config.student.random, config.student.random.words)
    folder = Path(str(config.student.path)).expanduser()
    return read_config(folder)[1] if folder.is_dir() else None


def _prompts(config: Config) -> Facts:
    try:
        splits = [*load_prompts(config.prompts, config.teacher, config.run.seed), *load_tests(config.prompts).values()]
    except UserError as mistake:
        return {"prompts": None, "prompts_mend": str(mistake)}
    return {"prompts": sum(map(len, splits))}


def _teacher(config: Config) -> Facts:
    teacher = config.teacher
    if teacher.backend != "openai":
        return {"teacher": teacher.backend}
    key = {"teacher": teacher.model, "teacher_key": teacher.api_key_env, "teacher_key_set": bool(os.environ.get(teacher.api_key_env))}
    try:
        price_of(teacher)
    except UserError as mistake:
        return key | {"teacher_mend": str(mistake)}
    return key | {"teacher_cost_at_most": teacher.max_cost}


def _disk_free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def complaints(has: Facts, wants: Facts) -> Iterator[str]:
    """What is missing, with the mend."""
    if wants.get("teacher_key_set") is False:
        yield f"teacher.api_key_env: the environment variable {wants['teacher_key']} is not set; export it with the API key"
    yield from (wants[name] for name in ("prompts_mend", "teacher_mend") if name in wants)
    if wants["parameters"] is None:
        yield "student.path: is no folder here; it is fetched from the hub when a run begins, and its needs are known then"
        return
    room = has["device_memory_gb"] or has["memory_gb"]
    if wants["device_memory_gb"] > room:
        need = f"{wants['device_memory_gb']:.1f} GB for parameters, moments and copies alone"
        yield f"mesh: the devices have {room:.1f} GB, training needs {need}; take more devices or a smaller student"
    if wants["disk_gb"] > wants["disk_free_gb"]:
        said = f"checkpoints may need {wants['disk_gb']:.1f} GB, {wants['disk_free_gb']:.1f} are free"
        yield f"run.folder: {said}; choose another folder"


def doctor(config: Path | None, overrides: list[str], as_json: bool) -> None:
    """Prints it all; a machine that lacks something is told so, and is no mistake."""
    has = machine()
    wants = needs(load_config(config, overrides)) if config else None
    missing = list(complaints(has, wants)) if wants else []
    if as_json:
        print(to_json({"machine": has, "config": wants, "missing": missing}))
        return
    for title, facts in (("this machine", has), (str(config), wants or {})):
        if facts:
            print(title)
            for name, value in facts.items():
                print(f"  {name.replace('_', ' ')}: {_shown(value)}")
    for complaint in missing:
        print(f"missing: {complaint}")
    if wants and not missing:
        print("nothing that the config needs is missing")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not known"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
