"""The paper's experiments fit the chips that they are meant for: every program of a step, by the compiler of those chips.

It takes a quarter of an hour and needs the extra `tpu`, but no TPU: `pytest -m slow tests/test_paper.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPOLOGIES = {  # the smallest that is meant to do
    "qwen2.5-3b": "v5e:4x4",
    "llama-3.2-3b": "v5e:4x4",
    "qwen2.5-7b": "v6e:4x4",
    "llama-3.1-8b": "v6e:4x4",
    "qwen2.5-14b": "v5p:2x2x4",
    "qwen2.5-7b-adapters": "v5e:4x4",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
@pytest.mark.parametrize("student", TOPOLOGIES)
def test_the_whole_cycle_fits(student: str):
    command = [sys.executable, "-c", "from gadjax.cli import main; main()", "plan", f"configs/paper/{student}.yaml"]
    options = ["--topology", TOPOLOGIES[student], "--json"]
    found = subprocess.run([*command, *options], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=True)
    made = json.loads(found.stdout)
    assert made["fits"], made.get("why")
    assert list(made["steps"]) == ["prefill", "decode", "discriminator", "student"]
