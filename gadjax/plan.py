"""`gadjax plan`: what a config needs on a topology, how long it takes and what it costs, without an accelerator, weights or data.

Memory is told by arithmetic first. What can fit is compiled, every program of a step of the stage that needs the most of it, by the
compiler of those chips. FLOPs are counted as `gadjax.planning.flops` says, bytes as `gadjax.planning.hlo` does; a
roofline time is the longest of FLOPs, memory and links at the chip's limits, and hours suppose that programs reach half of it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from gadjax.chips import GIB
from gadjax.config import Config, load_config
from gadjax.errors import UserError
from gadjax.files import to_json
from gadjax.origins import discriminator_dims
from gadjax.planning.budget import WHEN, Budget, Moment, budget_of
from gadjax.planning.compiled import Measured, Refused, measure
from gadjax.planning.knob import knob
from gadjax.planning.programs import Traced, bytes_on_chip, rows_of
from gadjax.planning.schedule import EFFICIENCY, WRITTEN, seconds_of, stages_of, teacher_of, told
from gadjax.planning.student import dims_of
from gadjax.planning.suggest import as_written, suggest
from gadjax.planning.topology import LOCAL, Topology, topology_of
from gadjax.planning.workload import Workload
from gadjax.steps import Models, Programs
from gadjax.terminal import PLAIN_WIDTH, say


@dataclass(frozen=True)
class Supposed:
    """What the texts are supposed to be. Memory does not depend on it: there is room for the longest.

    Attributes:
        prompts: how many there are.
        prompt_tokens: of each, or the longest allowed if that is less. People's turns in LMSYS-Chat-1M have 70 in the mean (arXiv
            2309.11998, table 1); a chat template adds some.
        response_tokens: in the mean.
    """

    prompts: int = 200_000
    prompt_tokens: int = 100
    response_tokens: int = 400


def plan(config: Path, overrides: list[str], topology: str, supposed: tuple[int, int, int], suggests: bool, as_json: bool) -> None:
    """Plans a config's run; see the module. Exits with status 0 whether it fits or not, which the first line and `--json` tell.

    Raises:
        UserError: the topology or the student is not known.
    """
    loaded, place, texts = load_config(config, overrides), topology_of(topology), Supposed(*supposed)
    if suggests and not place.compiles:
        raise UserError("--suggest", f"compiles, and for {place.name} nothing can be ({place.missing})", "plan it without")
    if suggests:
        stage = traced_of(loaded, place, texts).stage
        found = suggest(loaded, place, lambda each: traced_stage(each, stage, place, texts))
        print(to_json(found)) if as_json else _show_suggestions(found)
        return
    made = plan_of(loaded, place, texts)
    print(to_json(made)) if as_json else _show(made)


def traced_of(config: Config, topology: Topology, texts: Supposed) -> Traced:
    """The stage that needs the most memory by arithmetic, on the topology's devices; of equal ones the last."""
    stages = [traced_stage(config, name, topology, texts) for name in config.stages]
    return max(reversed(stages), key=lambda stage: budget_of(stage, topology.compiles).needed)


def traced_stage(config: Config, name: str, topology: Topology, texts: Supposed) -> Traced:
    """One stage on the topology's devices."""
    dims = dims_of(config.student)
    models, judge = Models.of(config, dims, topology.devices), discriminator_dims(config, name, dims)
    models = models if judge == dims else models.judged_by(judge)
    programs = Programs.of(config, name, 1, models, 1)
    longest = config.data.max_prompt_tokens
    mean = min(texts.response_tokens, config.data.max_response_tokens)
    work = Workload(programs.stage.batch_groups, programs.samples, config.data, min(texts.prompt_tokens, longest), mean)
    return Traced(name, programs, work, topology.platform)


def plan_of(config: Config, topology: Topology, texts: Supposed) -> dict[str, Any]:
    """The plan, as `--json` prints it."""
    traced, limit = traced_of(config, topology, texts), topology.chip.memory / GIB
    counted = budget_of(traced, topology.compiles)

    def budget(changed: Config) -> Budget:
        return budget_of(traced_of(changed, topology, texts), topology.compiles)

    made: dict[str, Any] = {"fits": False, "topology": topology.name, "chips": topology.chips, "devices": len(topology.devices)}
    made |= {"stage": traced.stage, "memory_gib": limit, "compiled": topology.compiles, "missing": topology.missing, "counted": COUNTED}
    made |= {"arithmetic": asdict(counted) | {"needed_gib": counted.needed}, "steps": {}, "run": {}}
    if counted.needed > limit:
        why = f"{traced.stage} needs {counted.needed:.1f} GiB a chip by arithmetic, which has {limit:.1f}"
        return made | {"why": why, "knob": knob(config, limit, budget)}
    if not topology.compiles:
        return made | {"fits": True}
    measured: dict[str, Measured] = {}
    for step in traced.all():
        if topology.name != LOCAL:
            say(f"compiling {step.name}")
        try:
            measured[step.name] = measure(step, topology)
        except Refused as refused:
            turn = MESH if refused.over is None else knob(config, limit, budget, _beyond(counted, step.name, limit + refused.over))
            return made | {"why": f"{step.name}: {refused}", "knob": turn}
        made["steps"][step.name] = measured[step.name].told()
    worst = max(measured, key=lambda name: measured[name].needed_gib)
    made["run"] = _run(config, topology, texts, traced, counted, measured)
    if (needed := measured[worst].needed_gib) > limit:
        why = f"{worst} needs {needed:.1f} GiB a chip, which has {limit:.1f}"
        return made | {"why": why, "knob": knob(config, limit, budget, _beyond(counted, worst, needed))}
    return made | {"fits": True}


def _beyond(counted: Budget, program: str, needed: float) -> dict[Moment, float]:
    """What the compiler has found that a program needs beyond arithmetic."""
    moment = WHEN.get(program, "rollout")
    return {moment: max(needed - counted.during(moment), 0.0)}


def _run(
    config: Config, topology: Topology, texts: Supposed, traced: Traced, budget: Budget, measured: dict[str, Measured]
) -> dict[str, Any]:
    models, work = traced.programs.models, traced.work
    stages = stages_of(config, models, topology, work, measured, texts.prompts)
    state = models.abstract_state(traced.judges)
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    room = topology.chip.memory - max(each.needed_gib for each in measured.values()) * GIB
    return {
        "supposed": asdict(replace(texts, prompt_tokens=work.prompt_tokens, response_tokens=work.mean_response)),
        "residents_gib": budget.residents | {f"rollout {name}": size for name, size in budget.rollout.items()},
        "largest_batch_groups": min(work.groups + int(room / _bytes_per_group(traced)), texts.prompts) if room >= 0 else None,
        "seconds_per_step": seconds_of(measured),
        "efficiency": EFFICIENCY,
        "stages": told(stages),
        "hours": sum(stage.hours for stage in stages.values()),
        "chip_hours": sum(stage.chip_hours for stage in stages.values()),
        "checkpoint_gib": checkpoint / GIB,
        "checkpoint_seconds": checkpoint / topology.hosts / WRITTEN,
        "teacher": asdict(teacher_of(config, work, texts.prompts)),
    }


MESH = "another mesh or number of chips, a power of two say: the compiler cannot do this one"
COUNTED = (
    "FLOPs: 2 x multiply-adds of matrix products over all chips; a scan's body x its length, a loop's x its expected trips; what is "
    "computed again counts again, of a TPU's attention the blocks that causality leaves. Roofline: the longest of FLOPs / chips / peak, "
    "bytes of a chip / its memory's bandwidth, bytes that a chip sends / its links'."
)


def _bytes_per_group(traced: Traced) -> float:
    """What one more group of a batch takes on a chip: its responses and its share of the rows of both steps."""
    programs, work = traced.programs, traced.work
    each = work.samples if traced.judges else 1
    held: list[Any] = [rows_of(programs, programs.rows(each), each)]
    if traced.judges:
        order, _, state = traced.engine.resident(work.groups)
        held += [rows_of(programs, programs.discriminator_rows(), 1 + each), order, state.responses]
    return bytes_on_chip(held) / work.groups


def _show(made: dict[str, Any]) -> None:
    console = Console(highlight=False, width=PLAIN_WIDTH)
    verdict = "fits" if made["fits"] else f"does not fit: {made['why']}; try {made['knob']}"
    if not made["compiled"]:
        verdict += f"; by arithmetic alone ({made['arithmetic']['needed_gib']:.1f} GiB): nothing is compiled for it ({made['missing']})"
    chips = f"{made['chips']} chips" + ("" if made["devices"] == made["chips"] else f", {made['devices']} devices")
    console.print(f"{made['topology']}, {chips} of {made['memory_gib']:.1f} GiB: {verdict}", markup=False)
    console.print(f"of its stages {made['stage']} needs the most; what follows is of it", markup=False)
    for part in ("residents", "rollout", "step"):
        sizes = ", ".join(f"{name} {size:.2f}" for name, size in made["arithmetic"][part].items())
        console.print(f"{part} (GiB a chip, by arithmetic): {sizes}", markup=False)
    if made["steps"]:
        console.print(_table(made["steps"]))
        console.print(made["counted"], markup=False)
    for name, stage in made["run"].get("stages", {}).items():
        time = f"{stage['hours']:.1f} h, {stage['chip_hours']:.0f} chip-hours"
        console.print(f"{name}: {stage['steps']} steps of {stage['seconds_per_step']:.1f} s, {time}", markup=False)
    if run := made["run"]:
        teacher = run["teacher"]
        price = "price not known" if teacher["dollars"] is None else f"{teacher['dollars']:,.2f} dollars"
        console.print(
            f"teacher: {teacher['calls']} calls, {price}; a checkpoint: {run['checkpoint_gib']:.0f} GiB, "
            f"{run['checkpoint_seconds']:.0f} s at {WRITTEN / 1e9:g} GB/s a host",
            markup=False,
        )
        if run["largest_batch_groups"]:
            console.print(f"largest batch that fits, by arithmetic: {run['largest_batch_groups']} groups", markup=False)
        console.print(f"supposed: {run['supposed']}; programs reach {run['efficiency']:.0%} of their roofline", markup=False)
        console.print("hours are of training's steps alone; validation, checkpoints and evaluation come on top", markup=False)


def _table(steps: dict[str, dict[str, Any]]) -> Table:
    table = Table("program", *COLUMNS, "bound by", "collectives, GiB sent")
    for name, step in steps.items():
        sent = ", ".join(f"{count:.0f} {kind}, {step['links_gib'][kind]:.4g}" for kind, count in step["collectives"].items())
        table.add_row(name, *(f"{step[key] * scale:.4g}" for key, scale in COLUMNS.values()), step["bound"], sent)
    return table


COLUMNS = {  # heading -> key and scale
    "arguments GiB": ("arguments_gib", 1.0),
    "temporaries GiB": ("temporaries_gib", 1.0),
    "peak GiB": ("peak_gib", 1.0),
    "with the rest GiB": ("needed_gib", 1.0),
    "TFLOP": ("flops", 1e-12),
    "memory GiB": ("memory_gib", 1.0),
    "roofline s": ("roofline_seconds", 1.0),
    "times": ("times", 1.0),
    "compile s": ("compile_seconds", 1.0),
}


def _show_suggestions(found: list[dict[str, Any]]) -> None:
    if not found:
        say("nothing that was tried fits; `gadjax plan` without --suggest tells what to change")
    for each in found:
        takes = f"{each['needed_gib']:.3g} GiB a chip, {each['seconds_per_step']:.3g} s a step at {EFFICIENCY:.0%} of the roofline"
        Console(highlight=False, width=PLAIN_WIDTH).print(f"{as_written(each['settings'])}: {takes}", markup=False)
