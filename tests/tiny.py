"""A whole experiment that takes seconds, for the tests of runs: the tutor's answers to 48 prompts, a student of one layer."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Programs that stages share are written alike (equal sizes and learning rates), so that they compile once.
CONFIG = """
run: {name: tiny}
teacher: {backend: tutor, model: tutor}
prompts: {train: "tutor:40", validation: "tutor:8"}
student:
  random: {width: 16, layers: 1, heads: 2, kv_heads: 1, feed_forward: 32, words: 60}
  compute_dtype: float32
data: {max_prompt_tokens: 16, max_response_tokens: 16, row_tokens: 64}
stages:
  seqkd: {algorithm: seqkd, max_steps: 3, batch_groups: 8, learning_rate: 1e-3}
  warmup:
    {algorithm: warmup, epochs: 2, max_steps: 6, batch_groups: 8, group_size: 2, learning_rate: 1e-3, checkpoint_every: 2,
     validate_every: 3, discriminator: {only_first_steps: 2, learning_rate: 1e-3}}
  gad:
    {algorithm: gad, from: warmup, epochs: 2, max_steps: 6, batch_groups: 8, group_size: 2, learning_rate: 1e-3, checkpoint_every: 2,
     validate_every: 3, discriminator: {learning_rate: 1e-3}}
evaluation: {validation_groups: 8, batch_groups: 8}
"""
# In the environment of every process that a test starts; to be found nowhere else.
SECRETS = {name: f"sk-marked-{name.lower()}-3f9a" for name in ("OPENAI_API_KEY", "HF_TOKEN", "GADJAX_TOKEN")}
STEPS = {"seqkd": 3, "warmup": 6, "gad": 6}
COMMON = "batch_groups: 8, learning_rate: 1e-3"  # what the stages of `with_stages` are written with to be compiled once
SAMPLING = f"{COMMON}, group_size: 2"
MAIN = "from gadjax.cli import main; main()"


def on_devices(count: int) -> str:
    """XLA's flags for a process with so many devices, of which the last word counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"


def with_stages(**stages: str) -> str:
    """The config with other stages, each as YAML's `key: value, ...`."""
    before, after = CONFIG.index("stages:"), CONFIG.index("evaluation:")
    return CONFIG[:before] + "stages:\n" + "".join(f"  {name}: {{{stage}}}\n" for name, stage in stages.items()) + CONFIG[after:]


@dataclass(frozen=True)
class Tiny:
    """An experiment in a folder of its own.

    Attributes:
        folder: where gadjax is started.
        compiled: the compiler's cache, which experiments of one test run share.
    """

    folder: Path
    compiled: Path

    @classmethod
    def make(cls, base: Path, name: str, config: str = CONFIG) -> "Tiny":
        folder = base / name
        folder.mkdir()
        (folder / "tiny.yaml").write_text(config)
        return cls(folder, base / "compiled")

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process of its own: two devices, and what was compiled before."""
        return (
            os.environ
            | SECRETS
            | {
                "XLA_FLAGS": on_devices(2),
                "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(Path(__file__).parent.parent),
            }
        )

    def gadjax(self, *arguments: str, program: str = MAIN) -> subprocess.CompletedProcess[str]:
        """`gadjax ARGUMENTS` in a process of its own."""
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300)


@cache
def finished(base: Path) -> tuple[Tiny, subprocess.CompletedProcess[str]]:
    """The experiment, run from its beginning to its end without interruption; one for all tests, which leave it as it is.

    Args:
        base: the folder of all temporary folders of this test process; where there are several, the first to come here makes the
            run, and each takes a copy of it and of what was compiled.
    """
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    told = shared / "pristine.json"
    with (shared / "pristine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            (shared / "pristine").mkdir()
            done = Tiny.make(shared / "pristine", "finished").gadjax("run", "tiny.yaml")
            told.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    shutil.copytree(shared / "pristine", base, dirs_exist_ok=True)
    return Tiny(base / "finished", base / "compiled"), subprocess.CompletedProcess(*json.loads(told.read_text()))
