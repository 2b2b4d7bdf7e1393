"""The paper's experiments fit the chips that they are meant for: every program of a step, by the compiler of those chips.

It needs the extra `tpu`, but no TPU. A small student takes a few minutes, `pytest -m slow tests/test_paper.py -k small`; the paper's take
half an hour on two cores, `pytest -m slow tests/test_paper.py -k whole`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TOPOLOGIES = {  # the smallest of v5e:4x4, v6e:4x4, v5e:8x8 and v5p:2x2x4, by memory, that will do
    "qwen2.5-3b": "v5e:4x4",
    "llama-3.2-3b": "v5e:4x4",
    "qwen2.5-7b": "v6e:4x4",
    "llama-3.1-8b": "v6e:4x4",
    "qwen2.5-14b": "v5p:2x2x4",
    "qwen2.5-7b-adapters": "v5e:4x4",
}
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
    "v5p:2x2x1": [],  # decoding divides the heads
    "v5e:2x2": ["mesh={fsdp: 1, context: 2, tensor: 2}", "rollout.mesh={data: 2, fsdp: 2}"],  # all key/value heads on every chip
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`"),
]


def planned(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from gadjax.cli import main; main()", "plan", "--json", *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    made = json.loads(found.stdout)
    assert made["fits"], made.get("why")
    assert list(made["steps"]) == ["loading", "weights", "prefill", "decode", "discriminator", "student"]
    return made


@pytest.mark.parametrize("topology", LAYOUTS)
def test_a_small_student_compiles(tmp_path: Path, topology: str):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    made = planned(str(file), *LAYOUTS[topology], "--topology", topology)
    assert made["chips"] == 4 and all(step["memory_gib"] > 0 for step in made["steps"].values())
    assert made["steps"]["student"]["collectives"]
    caches = made["arithmetic"]["rollout"]["caches"]
    assert made["steps"]["decode"]["temporaries_gib"] < 0.75 * caches, "decoding copies its caches"


@pytest.mark.parametrize("student", TOPOLOGIES)
def test_the_whole_cycle_fits(student: str):
    made = planned(f"configs/paper/{student}.yaml", "--topology", TOPOLOGIES[student])
    assert max(step["needed_gib"] for step in made["steps"].values()) < made["memory_gib"]
