"""The commands that make a run: each part by name, and all of it in one go. Every one goes on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from gadjax.collecting import check_teacher, collect_unless_frozen
from gadjax.config import dump_config
from gadjax.errors import UserError
from gadjax.evaluate import evaluate_stages, every_checkpoint
from gadjax.evaluation.summary import merged, summarise, to_table
from gadjax.evaluation.table import print_tables
from gadjax.export import export_discriminator, export_stage
from gadjax.files import replace_file, to_json
from gadjax.judging import judge_run, verdicts_so_far
from gadjax.prepare import check_devices, check_student, prepare_data, student_folder
from gadjax.processes import start_processes
from gadjax.report.audit import write_audit
from gadjax.report.page import write_report
from gadjax.runs import Clock, Run
from gadjax.session import Session
from gadjax.sharding import by_first, check_same, is_first, wait_for_all
from gadjax.teachers.openai import has_key
from gadjax.terminal import console, say
from gadjax.train import train_stage

Result = TypeVar("Result")


def run(config: Path, overrides: list[str]) -> None:
    """Everything: collect, prepare, train, evaluate, report, export."""
    start_processes()
    with _begun(config, overrides, check_teacher, check_devices, check_student) as (opened, clock):
        by_first(lambda: collect_unless_frozen(opened))
        session = _session(opened)
        _train(session)
        _evaluate(session, clock)
        by_first(lambda: _report(opened))
        name = opened.config.evaluation.export or list(opened.config.stages)[-1]
        say(f"export: {export_stage(session, name)}")
        by_first(lambda: _judge(opened))


def prepare(config: Path, overrides: list[str]) -> None:
    """The frozen data; needs no device, so that it can be made elsewhere than where it is trained on, and one process."""
    with _begun(config, overrides, check_student) as (opened, _):
        prepare_data(opened)


def train(config: Path, overrides: list[str]) -> None:
    """All stages."""
    start_processes()
    with _begun(config, overrides, check_devices, check_student) as (opened, _):
        _train(_session(opened))


def evaluate(config: Path, overrides: list[str], every: bool) -> None:
    """The table of all stages; with `every`, also one of every checkpoint that is kept."""
    start_processes()
    with _begun(config, overrides, check_devices, check_student) as (opened, clock):
        session = _session(opened)
        _evaluate(session, clock)
        if every:
            _sweep(session, clock)


def report(config: Path, overrides: list[str]) -> None:
    """The page."""
    opened = Run.open(config, overrides)
    opened.fetch()
    _report(opened)


def export(stage: str, discriminator: bool = False, dtype: str | None = None) -> None:
    """A stage's student of a run, `RUN` or `RUN/STAGE`, or its discriminator, as a Hugging Face folder."""
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError("--dtype", f"{dtype} is not offered", "use float32 or bfloat16")
    opened, name = Run.find(stage)
    start_processes()
    with _together(opened.locked):
        session = Session.open(opened, student_folder(opened))
        write = export_discriminator if discriminator else export_stage
        say(f"export: {write(session, name, dtype)}")


@contextmanager
def _begun(config: Path, overrides: list[str], *checks: Callable[[Run], None]) -> Iterator[tuple[Run, Clock | None]]:
    """A run that nothing else writes to, and process 0's clock; its folder is made, or taken up, when nothing is wrong."""
    opened = Run.open(config, overrides)
    opened.fetch()
    for check in checks:
        check(opened)
    with _together(opened.begin) as clock:
        yield opened, clock
        opened.push()


@contextmanager
def _together(context: Callable[[], AbstractContextManager[Result]]) -> Iterator[Result | None]:
    """What process 0 enters, with all processes in it until the last is done."""
    with ExitStack() as stack:
        yield by_first(lambda: stack.enter_context(context()))
        wait_for_all()


def _session(opened: Run) -> Session:
    by_first(lambda: prepare_data(opened))
    check_same(dump_config(opened.config), "configs")
    session = Session.open(opened, student_folder(opened))
    check_same(session.snapshot.digest, "data")
    return session


def _train(session: Session) -> None:
    for name in session.run.config.stages:
        train_stage(session, name, partial(_show, session.run, name))
    _show(session.run)


def _show(opened: Run, under_way: str | None = None) -> None:
    """Brings the report up to date while the run goes on. What hinders that is told when the report is made for good."""
    if is_first():
        with suppress(UserError):
            write_report(opened.folder, opened.config.evaluated, under_way, opened.config.discriminator_losses)


def _evaluate(session: Session, clock: Clock | None) -> None:
    """Measures, prints the table and writes summary.csv, and summary.json unless it holds these numbers; `clock` is that of process 0."""
    measured = evaluate_stages(session)
    if clock is None:
        return
    file = session.run.folder / "summary.json"
    summary = merged(summarise(measured, clock.seconds), verdicts_so_far(session.run))
    before = json.loads(file.read_text()) if file.exists() else {}
    if summary != before | {"seconds": summary["seconds"]}:
        replace_file(file, to_json(summary, indent=2))
    replace_file(file.with_suffix(".csv"), to_table(summary))
    print_tables(summary, console)


def _sweep(session: Session, clock: Clock | None) -> None:
    """Measures every checkpoint that is kept, beside the stages' ends; writes `evaluation/checkpoints.json` and `.csv`."""
    measured = evaluate_stages(session, every_checkpoint(session))
    if clock is None:
        return
    summary, file = summarise(measured, clock.seconds), session.run.folder / "evaluation" / "checkpoints.csv"
    replace_file(file.with_suffix(".json"), to_json(summary, indent=2))
    replace_file(file, to_table(summary))
    print_tables(summary, console)
    say(f"evaluate: every checkpoint is in {file}")


def _judge(opened: Run) -> None:
    """Last, and after all else is safe: the judge may refuse, and where models are trained there may be no key to ask it with."""
    judge = opened.config.evaluation.judge
    if judge is None:
        return
    opened.push()
    if has_key(judge):
        print_tables(judge_run(opened, judge), console)
        _report(opened)
    else:
        say(f"judge: {judge.api_key_env} is not set here; where it is, ask with `gadjax judge {opened.folder}`")


def _report(opened: Run) -> None:
    stages = opened.config.evaluated
    write_audit(opened.folder, stages)
    say(f"report: {write_report(opened.folder, stages, losses=opened.config.discriminator_losses)}")
