"""`gadjax plan` on devices at hand; what it counts, against what is counted by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from gadjax import plan as planned
from gadjax.chips import CHIPS, GIB, GPUS
from gadjax.cli import main
from gadjax.config import Config, StudentConfig, load_config
from gadjax.errors import UserError
from gadjax.models.decoder import language_model
from gadjax.models.rematerialisation import KEPT
from gadjax.plan import Supposed, plan, plan_of, traced_of
from gadjax.planning import compiled, suggest, topology
from gadjax.planning.budget import Budget, budget_of
from gadjax.planning.compiled import Measured, Refused
from gadjax.planning.flops import matrix_flops
from gadjax.planning.gpus import OF, target_of
from gadjax.planning.hlo import moved
from gadjax.planning.programs import Step, bytes_on_chip, rows_of
from gadjax.planning.schedule import Teacher, teacher_of
from gadjax.planning.student import dims_of, known, known_names
from gadjax.planning.suggest import as_written
from gadjax.planning.topology import Topology, topology_of
from gadjax.planning.workload import Workload
from gadjax.sharding import MeshConfig, make_mesh
from tests import tiny

# Parameters, as the models' cards tell them.
SIZES = {
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
}
TEXTS = Supposed(prompts=100, response_tokens=8)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny.CONFIG)
    return file


def of_memory(found: Topology, memory: float) -> Topology:
    return replace(found, chip=replace(found.chip, memory=memory))


def test_the_shipped_dimensions_are_those_of_the_models():
    assert known_names() == sorted(SIZES)
    for name, size in SIZES.items():
        shapes = language_model(known(name), jnp.dtype("bfloat16")).shapes
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == size, name


def test_a_student_by_its_hub_name_or_not_at_all():
    assert dims_of(StudentConfig(path="meta-llama/Llama-3.2-1B-Instruct")).head_width == 64
    with pytest.raises(UserError, match=r"^student.path: nobody/nothing is no folder, and its dimensions are not known; download it, or"):
        dims_of(StudentConfig(path="nobody/nothing"))


def test_products_in_loops_count_as_often_as_they_run():
    def work(x: jax.Array, times: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)
        x = jax.lax.fori_loop(0, times, lambda _, x: jax.lax.fori_loop(0, times, lambda _, x: x @ x, x @ x), x)
        return jax.lax.cond(times > 3, lambda x: x @ x @ x, lambda x: x, x)

    jaxpr = jax.jit(work).trace(jnp.zeros((4, 4)), 3).jaxpr.jaxpr
    product = 2 * 4**3
    assert matrix_flops(jaxpr, lambda depth: (10, 100)[depth]) == product * (5 + 10 * (1 + 100) + 2)


def test_what_a_gradient_computes_again_counts_again():
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x))

    jaxpr = jax.jit(jax.value_and_grad(loss)).trace(jnp.zeros((4, 4)), jnp.zeros((4, 4))).jaxpr.jaxpr
    forward, again, back = 2, 1, 2  # the last product need not be made again
    assert matrix_flops(jaxpr, lambda _: 1) == 2 * 4**3 * (forward + again + back)


def test_bytes_between_devices_count_as_often_as_they_travel():
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])

    def work(x: jax.Array) -> jax.Array:
        def turn(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(jax.lax.psum(x, "fsdp"))

        return jax.lax.fori_loop(0, 6, turn, x)

    shared = jax.shard_map(work, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)
    text = jax.jit(shared).lower(jnp.zeros((8, 1000))).compile().as_text()
    found = moved(str(text), lambda _: 1)
    assert found.counts == {"all-reduce": 6}
    assert found.links == {"all-reduce": 6 * 2 * 4000}
    assert 6 * 2 * 4000 <= found.memory <= 6 * 8 * 4000


def test_a_collective_that_goes_on_beside_other_work_counts_once():
    text = """
%started (given: bf16[10]) -> (bf16[10], bf16[80]) {
  %given = bf16[10]{0} parameter(0)
  %gathered.1 = bf16[80]{0} all-gather(%given), channel_id=7, dimensions={0}
  ROOT %begun = (bf16[10]{0}, bf16[80]{0}) custom-call(%given, %gathered.1)
}

%ended (given.1: bf16[10]) -> bf16[80] {
  %given.1 = bf16[10]{0} parameter(0)
  ROOT %gathered.2 = bf16[80]{0} all-gather(%given.1), channel_id=7, dimensions={0}
}

ENTRY %main (x: bf16[10]) -> bf16[80] {
  %x = bf16[10]{0} parameter(0)
  %a = (bf16[10]{0}, bf16[80]{0}) fusion(%x), kind=kCustom, calls=%started
  ROOT %b = bf16[80]{0} fusion(%x), kind=kCustom, calls=%ended
}
"""
    assert moved(text, lambda _: 1).links == {"all-gather": 160}


def test_a_scattered_sum_sends_what_it_reads():
    text = """
ENTRY %main (x: f32[160]) -> f32[10] {
  %x = f32[160]{0} parameter(0)
  ROOT %a = f32[10]{0} reduce-scatter(%x), channel_id=1, dimensions={0}, to_apply=%sum
}
"""
    assert moved(text, lambda _: 1).links == {"reduce-scatter": 640}


def test_a_scattered_sum_of_a_tpu_is_a_fusion_of_that_name():
    text = """
%all-reduce-scatter.1 (input: f32[160]) -> f32[10] {
  %input = f32[160]{0} parameter(0)
  %summed = f32[160]{0} all-reduce(%input), channel_id=1, to_apply=%sum
  ROOT %part = f32[10]{0} dynamic-slice(%summed)
}

ENTRY %main (x: f32[160]) -> f32[10] {
  %x = f32[160]{0} parameter(0)
  ROOT %a = f32[10]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = moved(text, lambda _: 1)
    assert found.links == {"reduce-scatter": 640}
    assert found.counts == {"reduce-scatter": 1}


def test_of_a_conditional_the_dearest_branch_counts():
    text = """
%nothing (x.1: f32[100]) -> f32[100] {
  ROOT %x.1 = f32[100]{0} parameter(0)
}

%work (x.2: f32[100]) -> f32[100] {
  %x.2 = f32[100]{0} parameter(0)
  ROOT %y = f32[100]{0} negate(%x.2)
}

ENTRY %main (which: s32[], x: f32[100]) -> f32[100] {
  %which = s32[] parameter(0)
  %x = f32[100]{0} parameter(1)
  ROOT %a = f32[100]{0} conditional(%which, %x, %x), BRANCHES
}
"""
    for branches in ("branch_computations={%nothing, %work}", "true_computation=%work, false_computation=%nothing"):
        assert moved(text.replace("BRANCHES", branches), lambda _: 1).memory == 800


def test_a_slice_is_read_and_an_update_written_in_place():
    def work(stack: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 50, lambda i, out: out.at[i].set(jnp.sin(stack[i])), out)

    text = jax.jit(work, donate_argnums=1).lower(jnp.zeros((50, 1000)), jnp.zeros((50, 1000))).compile().as_text()
    assert moved(str(text), lambda _: 1).memory < 50 * 10 * 4000  # and not 50 times the whole stack


def test_the_plan_of_devices_at_hand(config: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(config), "--topology", "local", "--prompts", "100", "--response-tokens", "8", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert (made["fits"], made["topology"], made["chips"]) == (True, "local", len(jax.devices()))
    assert list(made["steps"]) == ["loading", "weights", "prefill", "decode", "discriminator", "student"]
    for name, step in made["steps"].items():
        assert (step["flops"] > 0) == (name not in ("loading", "weights"))
        assert step["memory_gib"] > 0 and step["roofline_seconds"] > 0 and step["bound"] in ("FLOPs", "memory", "links")
        assert step["needed_gib"] >= step["peak_gib"] > step["arguments_gib"]
    assert made["steps"]["loading"]["times"] == 0  # it costs no step any time
    stages = made["run"]["stages"]
    assert {name: stage["steps"] for name, stage in stages.items()} == {"seqkd": 3, "warmup": 6, "gad": 6}
    assert made["run"]["teacher"] == {"calls": 0, "dollars": 0.0}  # the tutor's answers cost nothing
    assert made["run"]["largest_batch_groups"] > 8


def test_what_cannot_fit_is_told_before_anything_is_compiled(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planned, "measure", lambda *_: pytest.fail("compiled"))
    small = of_memory(topology_of("local"), 1000)
    made = plan_of(load_config(config, ["student.random.words=20"]), small, TEXTS)
    assert not made["fits"] and made["steps"] == {}
    assert "by arithmetic" in made["why"] and made["knob"].startswith("more chips")


def no_compiler(*_: Any) -> Any:
    raise RuntimeError("Unknown backend cuda\nand more")


@pytest.mark.parametrize(("student", "fits"), [("qwen2.5-7b", False), ("one-gpu", True)])
def test_one_gpu_is_planned_for_by_arithmetic_and_adapters_make_it_enough(
    student: str, fits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(planned, "measure", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(topology, "gpus", no_compiler)
    file = Path(__file__).parent.parent / "configs" / "paper" / f"{student}.yaml"
    plan(file, ["mesh.context=1"], "h100", (100, 100, 400), False, False)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "h100, 1 chips of 74.5 GiB: fits; by arithmetic" in said
    ) == fits and "nothing is compiled for it (Unknown backend cuda; gadjax[cuda] brings the compiler)" in said
    assert ("; try adapters.rank=64 " in said) != fits
    arithmetic = plan_of(load_config(file, ["mesh.context=1"]), topology_of("h100"), TEXTS)["arithmetic"]
    residents = arithmetic["residents"]
    assert arithmetic["step"]["attention"] == 0, "a kernel keeps no scores"
    base, own = (2 * 7.615e9, 12 * 161.5e6) if fits else (0, 12 * 7.615e9)  # bytes: of the base; of what is trained and its moments
    assert residents["base"] == pytest.approx(base / 2**30, rel=1e-3)
    assert residents["student"] == pytest.approx(own / 2**30, rel=1e-3)
    with pytest.raises(UserError, match=r"^--suggest: compiles, and for h100 nothing can be"):
        plan(file, ["mesh.context=1"], "h100", (100, 100, 400), True, False)


def test_the_benchmark_for_one_gpu_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology, "gpus", no_compiler)
    made = plan_of(load_config(Path(__file__).parent / "benchmarks" / "gpu.yaml", []), topology_of("h100"), TEXTS)
    assert made["fits"] and made["arithmetic"]["residents"]["student"] == pytest.approx(12 * 1.5437e9 / GIB, rel=1e-3)


def tight(config: Path, share: float, *overrides: str) -> tuple[Config, Topology, Budget]:
    """A config, chips with room for what lies there and this share of what comes beside it, and the arithmetic."""
    loaded, found = load_config(config, ["student.random.words=20", *overrides]), topology_of("local")
    counted = budget_of(traced_of(loaded, found, TEXTS))
    beside = max(sum(counted.rollout.values()), sum(counted.step.values()))
    return loaded, of_memory(found, (sum(counted.residents.values()) + share * beside) * GIB), counted


@pytest.mark.parametrize(
    ("share", "overrides", "turned"),
    [
        (0.9, ("data.max_response_tokens=200", "data.row_tokens=4096"), ["student.rematerialise=feed_forward"]),
        (0.5, ("data.max_response_tokens=200", "data.row_tokens=4096"), ["student.rematerialise=true"]),
        (0.9, ("data.row_tokens=40000", "student.rematerialise=true"), ["data.row_tokens=16384"]),
        (0.2, ("data.row_tokens=40000", "student.rematerialise=true"), ["data.row_tokens=6144"]),
        (0.2, ("data.row_tokens=16384", "student.rematerialise=feed_forward"), ["student.rematerialise=true", "data.row_tokens=12288"]),
        (0.9, ("data.max_response_tokens=1000", "data.row_tokens=1016", "student.rematerialise=true"), ["rollout.slots=8"]),
    ],
)
def test_the_knob_makes_it_fit(config: Path, share: float, overrides: tuple[str, ...], turned: list[str]):
    loaded, small, _ = tight(config, share, *overrides)
    made = plan_of(loaded, small, TEXTS)
    told, _, then = made["knob"].partition(" (then ")
    assert not made["fits"] and told.split() == turned
    _, _, counted = tight(config, share, *overrides, *turned)
    assert counted.needed * GIB <= small.chip.memory and then == f"{counted.needed:.1f} GiB by arithmetic)"


def test_the_knob_names_no_config_that_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A discriminator with weights of its own has no base to stand on."""
    monkeypatch.setattr(topology, "gpus", no_compiler)
    file, own = Path(__file__).parent.parent / "configs" / "paper" / "qwen2.5-7b.yaml", "stages.gad.discriminator.random={width: 64}"
    knobs = [plan_of(load_config(file, ["mesh.context=1", *more]), topology_of("h100"), TEXTS)["knob"] for more in ([], [own])]
    assert knobs[0].startswith("adapters.rank=64 ") and knobs[1].startswith("more chips")


def test_what_the_compiler_finds_beyond_arithmetic_counts_for_the_knob(config: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, chips, counted = tight(config, 1.1, "data.max_response_tokens=200", "data.row_tokens=4096")
    limit, needs = chips.chip.memory / GIB, dict[str, float]()

    def measure(step: Any, _: Topology) -> Measured:
        return Measured(0, 0, needs.get(step.name, 0.0), 0, 1, 0, {}, {}, 1, "FLOPs", 0, step.times)

    monkeypatch.setattr(planned, "measure", measure)
    assert plan_of(loaded, chips, TEXTS)["fits"]
    lower = {again: counted_with(loaded, rematerialise=again) for again in ("feed_forward", True)}
    for beyond, turned in (
        (limit - counted.during("step") + 1e-7, "student.rematerialise=feed_forward"),
        (limit - lower["feed_forward"] + 1e-7, "student.rematerialise=true"),
    ):
        needs.update(student=counted.during("step") + beyond)
        made = plan_of(loaded, chips, TEXTS)
        assert not made["fits"] and made["why"].startswith("student needs") and made["knob"].startswith(f"{turned} (then ")
    needs.clear()
    needs.update(decode=limit + 1e-7)
    assert plan_of(loaded, chips, TEXTS)["knob"].startswith("rollout.slots=8 (then ")
    needs.clear()
    needs.update(loading=limit + 1)
    assert plan_of(loaded, chips, TEXTS)["knob"].startswith("more chips")


def counted_with(config: Config, rematerialise: Any) -> float:
    changed = config.model_copy(update={"student": config.student.model_copy(update={"rematerialise": rematerialise})})
    return budget_of(traced_of(changed, topology_of("local"), TEXTS)).during("step")


@pytest.mark.parametrize(
    ("told", "knob"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.", 1.5),
        ("RESOURCE_EXHAUSTED: Used 15.78G of 15.75G hbm. Exceeded hbm capacity by 30.01M.\nand more", 30.01 / 1024),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", 0.1),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Exceeded vmem capacity by 4.10M.", None),
        ("UNIMPLEMENTED: Encountered AllReduce fusion with 5 sized replica_groups", None),
    ],
)
def test_what_the_compiler_refuses_is_told(config: Path, monkeypatch: pytest.MonkeyPatch, told: str, knob: float | None):
    loaded, chips, counted = tight(config, 1.1)
    asked: list[Any] = []
    monkeypatch.setattr(compiled, "_compiled", lambda _: (_ for _ in ()).throw(jax.errors.JaxRuntimeError(told)))
    monkeypatch.setattr(planned, "knob", lambda *arguments: asked.append(arguments[-1]) or "turned")
    made = plan_of(loaded, chips, TEXTS)
    assert not made["fits"] and made["why"] == f"loading: {told.splitlines()[0]}"
    if knob is None:
        assert made["knob"].startswith("another mesh or number of chips") and not asked
    else:
        room = chips.chip.memory / GIB - counted.during("loading")
        assert made["knob"] == "turned" and asked == [{"loading": pytest.approx(room + knob)}]


def test_a_fault_of_the_compiler_goes_through(config: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, chips, _ = tight(config, 1.1)
    monkeypatch.setattr(compiled, "_compiled", lambda _: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: broken")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan_of(loaded, chips, TEXTS)


def test_several_gpus_need_their_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology, "gpus", no_compiler)
    with pytest.raises(UserError, match=r"^--topology: h100:8 cannot be compiled for \(Unknown backend cuda\); install gadjax\[cuda\]$"):
        topology_of("h100:8")
    for name in ("h100:99", "v5e:4x4x4", "v5p:4x4", "v6e:"):
        with pytest.raises(UserError, match=rf"^--topology: {name} is not known; write CHIP:SHAPE as v5p:2x2x4"):
            topology_of(name)
    with pytest.raises(UserError, match=r"^--topology: h100:many is not known; write CHIP:SHAPE"):
        topology_of("h100:many")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(topology, "gpus", lambda *told: asked.append(told) or jax.devices()[: told[2]])
    found = topology_of("a100:4")
    assert asked == [("a100", GPUS["a100"], 4)] and found.compiles and found.chips == 4 and found.platform == "gpu"


@pytest.mark.parametrize(("limit", "memory"), [(75e9, 75e9), (90e9, 80e9), (None, 80e9)])
def test_a_device_at_hand_may_have_less_memory_than_its_kind(limit: float | None, memory: float, monkeypatch: pytest.MonkeyPatch):
    stats = {"bytes_limit": limit} if limit else None
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert topology_of("local").chip == replace(GPUS["h100"], memory=memory)


def test_a_gpu_is_told_of_in_words():
    told = target_of(OF["h100"], GPUS["h100"])
    assert "core_count: 132 " in told and "device_memory_size: 80000000000 " in told
    assert "shared_memory_per_block_optin: 232448 " in told and "cuda_compute_capability { major: 9 minor: 0 }" in told
    assert OF.keys() == GPUS.keys()


@pytest.mark.parametrize(("again", "kept"), [("true", 0), ("feed_forward", 1), ("false", 1 + 2)])
def test_what_gradients_keep_is_budgeted(again: str, kept: int, config: Path):
    traced = traced_of(load_config(config, ["student.random.words=20", f"student.rematerialise={again}"]), topology_of("local"), TEXTS)
    dims = traced.dims
    attention = dims.heads * dims.head_width + 2 * dims.kv_heads * dims.head_width + dims.width
    assert traced.kept == dims.width + min(kept, 1) * attention + (2 * dims.feed_forward if kept > 1 else 0)
    on_a_tpu = replace(traced, platform="tpu").kept - traced.kept
    assert on_a_tpu == dims.heads * (dims.head_width + 2), "its output and, of each head, a float32"


def test_mistakes_are_told(config: Path):
    with pytest.raises(UserError, match=r"^--topology: v9:2x2 is not known; write CHIP:SHAPE"):
        plan(config, [], "v9:2x2", (1, 1, 1), False, False)


def test_a_baseline_alone_is_planned_too(config: Path):
    loaded = load_config(config, ["student.random.words=20"])
    only = loaded.model_copy(update={"stages": {"seqkd": loaded.stages["seqkd"]}})
    made = plan_of(only, topology_of("local"), TEXTS)
    assert made["fits"] and list(made["steps"]) == ["loading", "student"]
    run = made["run"]
    assert run["stages"]["seqkd"]["seconds_per_step"] == pytest.approx(run["seconds_per_step"])
    assert run["residents_gib"].keys() == {"base", "student", "discriminator", "reference"} and run["residents_gib"]["discriminator"] == 0
    both = plan_of(loaded, topology_of("local"), TEXTS)["run"]
    assert run["checkpoint_gib"] < both["checkpoint_gib"] and both["stages"].keys() == {"seqkd", "warmup", "gad"}
    assert both["stages"]["gad"]["seconds_per_step"] == pytest.approx(both["seconds_per_step"])


def test_every_teacher_is_paid_and_a_batch_half(config: Path):
    work = Workload(groups=8, samples=2, data=load_config(config, []).data, prompt_tokens=100, mean_response=400)
    paid = "{backend: openai, model: gpt-4o, samples: 2}"  # 2.5 and 10 dollars a million tokens
    others = "{other: {backend: openai, model: gpt-4o-mini, batch: {}}, free: {backend: tutor}}"  # 0.15 and 0.6, in a batch half of it
    asked = load_config(config, [f"teacher={paid}", f"teachers={others}"])
    dollars = (2 * 1000 * (100 * 2.5 + 400 * 10) + 1000 * (100 * 0.15 + 400 * 0.6) / 2) / 1e6
    found = teacher_of(asked, work, prompts=1000)
    assert found.calls == 3000 and found.dollars == pytest.approx(dollars)
    unknown = load_config(config, ["teacher={backend: openai, model: nobody-knows}", f"teachers={others}"])
    assert teacher_of(unknown, work, prompts=1000) == Teacher(2000, None)


def test_a_chip_may_be_several_devices(config: Path):
    found = replace(topology_of("local"), chip=CHIPS["tpu7x"])
    assert (found.chips, len(found.devices)) == (4, 8)
    made = plan_of(load_config(config, ["student.random.words=20"]), replace(found, missing="no compiler"), TEXTS)
    assert (made["chips"], made["devices"]) == (4, 8)


def test_the_stage_that_needs_the_most_is_planned(config: Path):
    place = topology_of("local")

    def stage(*overrides: str) -> str:
        return traced_of(load_config(config, ["student.random.words=20", *overrides]), place, TEXTS).stage

    assert stage() == "gad"  # it has a reference
    assert stage("stages.warmup.group_size=64", "stages.warmup.batch_groups=64", "rollout.slots=4096") == "warmup"
    assert stage("stages.gad.kl_weight=0") == "gad"  # as much as warmup: the last


def test_the_largest_batch_is_what_its_groups_take(config: Path):
    """And no larger than all prompts."""
    loaded, place = load_config(config, ["student.random.words=20"]), topology_of("local")

    def batch(texts: Supposed, memory: float) -> dict[str, Any]:
        return plan_of(loaded, of_memory(place, memory), texts)

    needed = max(step["needed_gib"] for step in batch(TEXTS, 2.0**34)["steps"].values())
    room = 2.0**20
    found = batch(Supposed(10**9, response_tokens=8), needed * GIB + room)["run"]["largest_batch_groups"]
    traced = traced_of(loaded, place, TEXTS)

    def takes(groups: int) -> float:
        more = traced_of(load_config(config, ["student.random.words=20", f"stages.gad.batch_groups={groups}"]), place, TEXTS)
        rows = [rows_of(more.programs, more.programs.rows(2), 2), rows_of(more.programs, more.programs.discriminator_rows(), 3)]
        return bytes_on_chip(rows)

    each = (takes(160) - takes(80)) / 80
    assert 8 + 0.5 * room / each < found <= 8 + room / each
    assert batch(TEXTS, 2.0**34)["run"]["largest_batch_groups"] == TEXTS.prompts
    assert traced.stage == "gad"


def test_the_decode_loop_waits_for_the_longest(config: Path):
    work = Workload(groups=8, samples=2, data=load_config(config, []).data, prompt_tokens=16, mean_response=8)
    each = work.response_tokens(2) / 16
    assert work.decode_steps(slots=16) == 16  # all at once: the longest response
    assert work.decode_steps(slots=4) == 12 * each / 4 + 16


def test_short_prompts_are_prefilled_as_such(config: Path):
    def times(prompt_tokens: int) -> float:
        texts = Supposed(100, prompt_tokens, 8)
        traced = traced_of(load_config(config, ["data.max_prompt_tokens=256", "data.row_tokens=512"]), topology_of("local"), texts)
        return next(step.times for step in traced.rollout() if step.name == "prefill")

    assert times(65) == times(128) == times(256) / 2 == 2 * times(20)


def test_what_the_compiler_refuses_is_not_suggested(config: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, place = load_config(config, ["student.random.words=20"]), topology_of("local")
    others = {step.name for step in planned.traced_of(loaded, place, TEXTS).all()} - {"student", "discriminator"}
    # What candidate after candidate needs: shares of what there is; None: refused.
    needs = {"student": iter([None, 2.0, 0.5, 0.75, 0.5]), "discriminator": iter([None, 0.5, 0.25])}
    asked: list[str] = []

    def measure(step: Step, topology: Topology) -> Any:
        asked.append(step.name)
        if (share := next(needs.get(step.name, iter([0.125])))) is None:
            raise Refused(RuntimeError("RESOURCE_EXHAUSTED: ran out of memory"))
        return SimpleNamespace(needed_gib=share * topology.chip.memory / GIB, roofline_seconds=share, times=step.times)

    monkeypatch.setattr(suggest, "measure", measure)
    monkeypatch.setattr(suggest, "COMPILED", 2)
    monkeypatch.setattr(suggest, "CONTEXTS", (1,))
    monkeypatch.setattr(suggest, "TENSORS", (1, 2))
    monkeypatch.setattr(suggest, "ROWS", (1,))
    found = suggest.suggest(loaded, place, lambda each: planned.traced_of(each, place, TEXTS))
    assert [each["needed_gib"] * GIB / place.chip.memory for each in found] == [0.5, 0.75], "the second that fits has the shorter step"
    meshes = {each["settings"]["mesh.tensor"] for each in found}
    assert all(asked.count(name) == len(meshes) for name in others), "what does not depend on the rows is compiled once for a mesh"
    monkeypatch.setattr(suggest, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        suggest.suggest(loaded, place, lambda each: planned.traced_of(each, place, TEXTS))


def test_suggestions_are_compiled_and_ranked_by_a_whole_step(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(suggest, "COMPILED", 2)
    monkeypatch.setattr(suggest, "ROWS", (1,))
    monkeypatch.setattr(suggest, "KEPT", {True: KEPT[True]})
    plan(config, ["student.random.words=20"], "local", (100, 8, 8), True, True)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2
    assert [each["seconds_per_step"] for each in found] == sorted(each["seconds_per_step"] for each in found)
    settings = found[0]["settings"]
    assert settings["mesh.fsdp"] * settings["mesh.context"] * settings["mesh.tensor"] == len(jax.devices())
    assert settings["data.rows"] % settings["mesh.fsdp"] == 0
    # Taken as they are written, they give the plan that was suggested.
    made = planned.plan_of(
        load_config(config, ["student.random.words=20", *as_written(settings).split()]), topology_of("local"), Supposed(100, 8, 8)
    )
    assert made["run"]["seconds_per_step"] == pytest.approx(found[0]["seconds_per_step"])
    assert max(step["needed_gib"] for step in made["steps"].values()) == pytest.approx(found[0]["needed_gib"])
