"""The paper's experiments fit the chips that they are meant for: every program of a step, by the compiler of those chips.

It needs the extras `tpu` and `cuda`, but no TPU and no GPU. A small student takes a few minutes, `pytest -m slow tests/test_paper.py -k
small`; the paper's take half an hour on two cores, `pytest -m slow tests/test_paper.py -k whole`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gadjax.cli import COMPILE_ONLY

ROOT = Path(__file__).parent.parent
WHOLE = [  # on the smallest of v5e:4x4, v6e:4x4, v5e:8x8 and v5p:2x2x4, by memory, that will do; and on GPUs
    ("qwen2.5-3b", "v5e:4x4"),
    ("llama-3.2-3b", "v5e:4x4"),
    ("qwen2.5-7b", "v6e:4x4"),
    ("llama-3.1-8b", "v6e:4x4"),
    ("qwen2.5-14b", "v5p:2x2x4"),
    ("qwen2.5-7b-adapters", "v5e:4x4"),
    ("one-gpu", "h100"),
    ("qwen2.5-7b", "h100:8"),
    ("qwen2.5-14b", "h100:8", "mesh.context=2", "student.rematerialise=true"),
]
SMALL = """
teacher: {backend: tutor, model: tutor}
prompts: {train: "tutor:40", validation: "tutor:8"}
student:
  random: {width: 1024, layers: 5, heads: 8, kv_heads: 4, feed_forward: 2048}
  compute_dtype: bfloat16
  rematerialise: true
data: {max_prompt_tokens: 256, max_response_tokens: 1024, row_tokens: 1536}
stages: {gad: {algorithm: gad, from: student, batch_groups: 16, group_size: 8}}
"""
LAYOUTS = {  # of the small student
    "h100": [],
    "a100:4": ["mesh={fsdp: 2, tensor: 2}"],
    "v5p:2x2x1": [],  # decoding divides the heads
    "v5e:2x2": ["mesh={fsdp: 1, context: 2, tensor: 2}", "rollout.mesh={data: 2, fsdp: 2}"],  # all key/value heads on every chip
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def compiler_for(topology: str) -> None:
    plugin, extra = ("libtpu", "tpu") if topology.startswith("v") else ("jax_plugins.xla_cuda13", "cuda")
    if importlib.util.find_spec(plugin.split(".")[0]) is None or importlib.util.find_spec(plugin) is None:
        pytest.skip(f"needs the extra `{extra}`")


def planned(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from gadjax.cli import main; main()", "plan", "--json", *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(line.startswith("compiling ") for line in found.stderr.splitlines()), found.stderr
    made = json.loads(found.stdout)
    assert made["fits"], made.get("why")
    assert list(made["steps"]) == ["loading", "weights", "prefill", "decode", "discriminator", "student"]
    return made


@pytest.mark.parametrize("topology", LAYOUTS)
def test_a_small_student_compiles(tmp_path: Path, topology: str):
    compiler_for(topology)
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    made = planned(str(file), *LAYOUTS[topology], "--topology", topology)
    assert made["chips"] == (1 if topology == "h100" else 4) and all(step["memory_gib"] > 0 for step in made["steps"].values())
    assert bool(made["steps"]["student"]["collectives"]) == (topology != "h100")
    caches = made["arithmetic"]["rollout"]["caches"]
    assert made["steps"]["decode"]["temporaries_gib"] < 0.75 * caches, "decoding copies its caches"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_small_quickstart_compiles_for_a_gpu(dtype: str):
    compiler_for("h100")
    planned("configs/quickstart.yaml", f"student.compute_dtype={dtype}", "--topology", "h100")


@pytest.mark.parametrize("sizes", [(1, 8, 2, 1), (1, 2, 2, 4), (2, 1, 8, 1)])
def test_a_small_torus_has_every_mesh(sizes: tuple[int, ...]):
    compiler_for("v6e:4x4")
    code = (
        "from gadjax.planning.topology import topology_of; from gadjax.sharding import AXES, MeshConfig, make_mesh;"
        f"print(make_mesh(MeshConfig(**dict(zip(AXES, {sizes}))), topology_of('v6e:4x4').devices).devices.shape)"
    )
    environment = os.environ | COMPILE_ONLY | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout.strip() == str(sizes)


def test_hosts_are_those_of_cloud_tpu_and_nothing_else_is_said():
    compiler_for("v5e:1x1")
    hosts = {"v5e:1x1": 1, "v5e:2x4": 1, "v6e:2x4": 1, "v5e:4x4": 4, "v5p:2x2x4": 4, "v4:2x2x2": 2}
    code = f"from gadjax.planning.topology import topology_of; print([topology_of(name).hosts for name in {list(hosts)}])"
    environment = os.environ | COMPILE_ONLY | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    assert found.stdout == f"{list(hosts.values())}\n"


@pytest.mark.parametrize("whole", WHOLE, ids="-".join)
def test_the_whole_cycle_fits(whole: tuple[str, ...]):
    student, topology, *overrides = whole
    compiler_for(topology)
    made = planned(f"configs/paper/{student}.yaml", *overrides, "--topology", topology)
    assert max(step["needed_gib"] for step in made["steps"].values()) < made["memory_gib"]
