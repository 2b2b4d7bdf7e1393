"""Every program of a stage compiles in its first steps, and never again, whatever the lengths of what is sampled."""

import re

from tests.tiny import MAIN, Tiny

COUNTED = f"""
import jax
from gadjax import train
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
step = train.Stage.step
def counted(self, index, groups):
    before = [event for event in compiled if event.endswith("backend_compile_duration")]
    pending = step(self, index, groups)
    after = [event for event in compiled if event.endswith("backend_compile_duration")]
    print("compiled", self.name, index, len(after) - len(before))
    return pending
train.Stage.step = counted
{MAIN}
"""


def test_nothing_compiles_after_the_first_steps(tmp_path):
    tiny = Tiny.make(tmp_path, "counted")
    for part in ("collect", "prepare", "train"):
        told = tiny.gadjax(part, "tiny.yaml", program=COUNTED)
        assert told.returncode == 0, told.stderr
    lines = re.findall(r"^compiled (\w+) (\d+) (\d+)$", told.stdout, re.MULTILINE)
    found = {(name, int(index)): int(count) for name, index, count in lines}
    # In warm-up the student begins to learn after two steps.
    late = {(name, index): count for (name, index), count in found.items() if index > {"warmup": 2}.get(name, 0)}
    assert [name for name, _ in late] == ["seqkd"] * 2 + ["warmup"] * 3 + ["gad"] * 5
    assert found["warmup", 0] > 0 and found["warmup", 2] > 0 and found["gad", 0] > 0, "what is counted are compilations"
    assert not any(late.values()), late
