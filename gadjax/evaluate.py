"""Every stage measured the same way on the held-out prompts: greedy, and one sample at T = 0.8 and at 1.0."""

from gadjax.checkpointing import checkpoint_digest
from gadjax.config import UNTOUCHED
from gadjax.evaluation.answers import read_answers, write_answers
from gadjax.evaluation.measure import Metric, measure
from gadjax.evaluation.samples import MODES, Samples
from gadjax.files import replace_file, to_json
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.sharding import agreed, is_first
from gadjax.terminal import track


def evaluated_stages(run: Run) -> list[str]:
    """The stages in the table, the untouched student first."""
    config = run.config
    return [UNTOUCHED, *(config.evaluation.stages if config.evaluation.stages is not None else config.stages)]


def _origin(session: Session, name: str) -> str:
    """What a stage's answers come from, as JSON: the data, and the final checkpoint or the section of the untouched student."""
    config = session.run.config
    if name == UNTOUCHED:
        weights: object = {"student": config.student.model_dump(), "seed": config.run.seed}
    else:
        weights = {"checkpoint": checkpoint_digest(session.run.checkpoints(name), session.total_steps(name))}
    return to_json({"data": session.snapshot.digest, "weights": weights}, indent=1)


def evaluate_stages(session: Session) -> dict[str, dict[str, Metric]]:
    """Measures every stage; answers that were written already are read, unless the weights or the data are others now.

    All processes answer; process 0 measures, the others return nothing.
    """
    examples = [session.snapshot.validation[index] for index in range(len(session.snapshot.validation))]
    names = evaluated_stages(session.run)
    measured: dict[str, dict[str, Metric]] = {}
    with track("evaluate", len(names) * len(MODES)) as advance:
        for index, name in enumerate(names):
            file = session.run.folder / "evaluation" / f"{name}.jsonl"
            mark, origin = file.with_suffix(".origin.json"), _origin(session, name)
            if not agreed(file.exists() and mark.exists() and mark.read_text(encoding="utf-8") == origin):
                params = session.student_params(name)
                answers: dict[str, Samples] = {}
                for number, mode in enumerate(MODES):
                    answers[mode] = session.answerer.answer(params, examples, mode)
                    advance(index * len(MODES) + number, name)
                if is_first():
                    write_answers(file, answers, session.tutored is not None)
                    replace_file(mark, origin)
                    session.run.push()
            if is_first():
                measured[name] = measure(read_answers(file), session.run.config.evaluation.metrics, session.tutored)
            advance((index + 1) * len(MODES), name)
    return measured
