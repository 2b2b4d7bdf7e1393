"""The commands that make a run: each part by name, and all of it in one go. Every one goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from gadjax.collecting import check_teacher, collect_answers
from gadjax.errors import UserError
from gadjax.evaluate import evaluate_stages, evaluated_stages
from gadjax.evaluation.summary import summarise
from gadjax.evaluation.table import print_table
from gadjax.export import export_discriminator, export_stage
from gadjax.files import replace_file, to_json
from gadjax.prepare import check_devices, check_student, prepare_data, student_folder
from gadjax.report.audit import write_audit
from gadjax.report.page import write_report
from gadjax.runs import Clock, Run
from gadjax.session import Session
from gadjax.terminal import console, say
from gadjax.train import train_stage


def run(config: Path, overrides: list[str]) -> None:
    """Everything: collect, prepare, train, evaluate, report, export."""
    with _begun(config, overrides, check_teacher, check_devices, check_student) as (opened, clock):
        collect_answers(opened)
        session = _session(opened)
        _train(session)
        _evaluate(session, clock)
        _report(opened)
        name = opened.config.evaluation.export or list(opened.config.stages)[-1]
        say(f"export: {export_stage(session, name)}")


def prepare(config: Path, overrides: list[str]) -> None:
    """The frozen data; needs no device, so that it can be made elsewhere than where it is trained on."""
    with _begun(config, overrides, check_student) as (opened, _):
        prepare_data(opened)


def train(config: Path, overrides: list[str]) -> None:
    """All stages."""
    with _begun(config, overrides, check_devices, check_student) as (opened, _):
        _train(_session(opened))


def evaluate(config: Path, overrides: list[str]) -> None:
    """The table of all stages."""
    with _begun(config, overrides, check_devices, check_student) as (opened, clock):
        _evaluate(_session(opened), clock)


def report(config: Path, overrides: list[str]) -> None:
    """The page."""
    opened = Run.open(config, overrides)
    opened.fetch()
    _report(opened)


def export(stage: str, discriminator: bool = False, dtype: str = "float32") -> None:
    """A stage's student of a run, `RUN` or `RUN/STAGE`, or its discriminator, as a Hugging Face folder."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError("--dtype", f"{dtype} is not offered", "use float32 or bfloat16")
    opened, name = Run.find(stage)
    with opened.locked():
        session = Session.open(opened, student_folder(opened, ()))  # the answers are not needed any more
        write = export_discriminator if discriminator else export_stage
        say(f"export: {write(session, name, dtype)}")


@contextmanager
def _begun(config: Path, overrides: list[str], *checks: Callable[[Run], None]) -> Iterator[tuple[Run, Clock]]:
    """A run that no other process writes to; its folder is made, or taken up, when nothing is wrong."""
    opened = Run.open(config, overrides)
    opened.fetch()
    for check in checks:
        check(opened)
    with opened.begin() as clock:
        yield opened, clock
        opened.push()


def _session(opened: Run) -> Session:
    return Session.open(opened, prepare_data(opened))


def _train(session: Session) -> None:
    for name in session.run.config.stages:
        train_stage(session, name, partial(_show, session.run, name))
    _show(session.run)


def _show(opened: Run, under_way: str | None = None) -> None:
    """Brings the report up to date while the run goes on. What hinders that is told when the report is made for good."""
    with suppress(UserError):
        write_report(opened.folder, evaluated_stages(opened), under_way)


def _evaluate(session: Session, clock: Clock) -> None:
    """Measures, prints the table and writes summary.json, unless it holds these numbers already."""
    measured = evaluate_stages(session)
    file = session.run.folder / "summary.json"
    summary = summarise(measured, clock.seconds)
    before = json.loads(file.read_text()) if file.exists() else {}
    if summary != before | {"seconds": summary["seconds"]}:
        replace_file(file, to_json(summary, indent=2))
    print_table(summary, console)


def _report(opened: Run) -> None:
    stages = evaluated_stages(opened)
    write_audit(opened.folder, stages)
    say(f"report: {write_report(opened.folder, stages)}")
