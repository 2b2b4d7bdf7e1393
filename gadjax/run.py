"""The commands that make a run: each part by name, and all of it in one go. Every one goes on where it stopped."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from gadjax.errors import UserError
from gadjax.evaluate import evaluate_stages, evaluated_stages
from gadjax.evaluation.summary import summarise
from gadjax.evaluation.table import print_table
from gadjax.export import export_stage
from gadjax.files import replace_file, to_json
from gadjax.prepare import check_student, check_teacher, collect_answers, prepare_data, student_folder
from gadjax.report.page import write_report
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.terminal import console, say
from gadjax.train import train_stage


def run(config: Path, overrides: list[str]) -> None:
    """Everything: collect, prepare, train, evaluate, report, export."""
    started = time.monotonic()
    opened = _begin(config, overrides, check_teacher, check_student)
    collect_answers(opened)
    session = _session(opened)
    _train(session)
    _evaluate(session, started)
    _report(opened)
    name = opened.config.evaluation.export or list(opened.config.stages)[-1]
    say(f"export: {export_stage(session, name)}")


def collect(config: Path, overrides: list[str]) -> None:
    """The teacher's answers; needs no student, tokenizer or device."""
    collect_answers(_begin(config, overrides, check_teacher))


def prepare(config: Path, overrides: list[str]) -> None:
    """The frozen data."""
    prepare_data(_begin(config, overrides, check_student))


def train(config: Path, overrides: list[str]) -> None:
    """All stages."""
    _train(_session(_begin(config, overrides, check_student)))


def evaluate(config: Path, overrides: list[str]) -> None:
    """The table of all stages."""
    _evaluate(_session(_begin(config, overrides, check_student)), time.monotonic())


def report(config: Path, overrides: list[str]) -> None:
    """The page."""
    _report(Run.open(config, overrides))


def export(stage: str) -> None:
    """A stage of a run, `RUN` or `RUN/STAGE`, as a Hugging Face folder."""
    folder, name = Path(stage), None
    if not (folder / "config.yaml").is_file():
        folder, name = folder.parent, folder.name
    if not (folder / "config.yaml").is_file():
        raise UserError(stage, "is no run", "name a run's folder, or a stage of it: runs/quickstart/gad")
    opened = Run.at(folder)
    names = list(opened.config.stages)
    if name is not None and name not in names:
        raise UserError(stage, f"the run has no stage {name}", f"use one of {', '.join(names)}")
    if not opened.begun(name or names[-1]):
        raise UserError(stage, "is not trained yet", "run `gadjax train` with its config first")
    session = Session.open(opened, student_folder(opened, ()))  # the answers are not needed any more
    say(f"export: {export_stage(session, name or names[-1])}")


def _begin(config: Path, overrides: list[str], *checks: Callable[[Run], None]) -> Run:
    """Opens a run; its folder is made, or taken up, when nothing is wrong."""
    opened = Run.open(config, overrides)
    for check in checks:
        check(opened)
    opened.begin()
    return opened


def _session(opened: Run) -> Session:
    return Session.open(opened, prepare_data(opened))


def _train(session: Session) -> None:
    for name in session.run.config.stages:
        train_stage(session, name)


def _evaluate(session: Session, started: float) -> None:
    """Measures, prints the table and writes summary.json; its seconds stay those of the call that measured first."""
    measured = evaluate_stages(session)
    file = session.run.folder / "summary.json"
    before = json.loads(file.read_text()) if file.exists() else None
    seconds = before["seconds"] if before else time.monotonic() - started
    summary = summarise(measured, seconds)
    replace_file(file, to_json(summary, indent=2))
    print_table(summary, console)


def _report(opened: Run) -> None:
    say(f"report: {write_report(opened.folder, evaluated_stages(opened))}")
