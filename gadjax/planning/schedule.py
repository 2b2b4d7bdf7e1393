"""How long a run takes and what its teacher costs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from gadjax.config import Config
from gadjax.data.pipeline import steps
from gadjax.planning.compiled import Measured
from gadjax.planning.flops import matrix_flops
from gadjax.planning.programs import Traced
from gadjax.planning.topology import Topology
from gadjax.planning.workload import Workload
from gadjax.steps import Models, Programs
from gadjax.teachers.batch import batch_price
from gadjax.teachers.config import PRICES, Price, TeacherConfig

EFFICIENCY = 0.5  # share of the roofline that programs reach; a guess until it is measured
WRITTEN = 1e9  # bytes a second that a host writes of a checkpoint; as much of a guess
UNKNOWN = Price.model_construct(input=math.nan, output=math.nan)


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        steps: of training.
        seconds_per_step: at `EFFICIENCY` of the roofline.
        hours: of all its steps.
        chip_hours: times the chips.
    """

    steps: int
    seconds_per_step: float
    hours: float
    chip_hours: float


@dataclass(frozen=True)
class Teacher:
    """What is asked of the teacher.

    Attributes:
        calls: requests.
        dollars: their price; None where it is not known.
    """

    calls: int
    dollars: float | None


def seconds_of(measured: dict[str, Measured]) -> float:
    """Seconds of one step of the stage whose programs these are."""
    return sum(each.roofline_seconds * each.times for each in measured.values()) / EFFICIENCY


def stages_of(
    config: Config, models: Models, topology: Topology, work: Workload, measured: dict[str, Measured], prompts: int
) -> dict[str, StagePlan]:
    """All stages. Their rollouts and discriminators' steps are those measured; a student's step takes what its own FLOPs take in the
    measured one.
    """
    student_step = measured["student"]
    judged = seconds_of({name: each for name, each in measured.items() if name != "student"})
    found: dict[str, StagePlan] = {}
    for name, stage in config.stages.items():
        programs = Programs.of(config, name, 1, models, 1)
        own = Workload(stage.batch_groups, programs.samples, config.data, work.prompt_tokens, work.mean_response)
        step = Traced(name, programs, own, topology.platform).student()
        flops = matrix_flops(step.traced.jaxpr.jaxpr, step.trips)
        student = flops / student_step.flops * student_step.roofline_seconds / EFFICIENCY
        share = stage.batch_groups * programs.samples / (work.groups * work.samples) if work.samples else 0.0
        seconds = student + judged * share
        count = min(steps(prompts, stage.batch_groups, stage.epochs), stage.max_steps or 2**62)
        hours = count * seconds / 3600
        found[name] = StagePlan(count, seconds, hours, hours * topology.chips)
    return found


def teacher_of(config: Config, work: Workload, prompts: int) -> Teacher:
    """Every prompt is asked for each teacher's `samples` answers of the mean length."""
    teachers = [teacher for teacher in config.all_teachers.values() if teacher.backend == "openai"]
    dollars = sum(prompts * teacher.samples * _price(teacher).cost(work.prompt_tokens, work.mean_response) for teacher in teachers)
    return Teacher(prompts * sum(teacher.samples for teacher in teachers), None if math.isnan(dollars) else dollars)


def _price(teacher: TeacherConfig) -> Price:
    """NaN where it is not known."""
    price = teacher.price or PRICES.get(teacher.model) or UNKNOWN
    return price if teacher.batch is None else batch_price(price)


def told(stages: dict[str, StagePlan]) -> dict[str, Any]:
    """For JSON."""
    return {name: asdict(stage) for name, stage in stages.items()}
