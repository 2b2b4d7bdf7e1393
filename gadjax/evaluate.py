"""Every stage measured the same way on the held-out prompts and the test sets: greedy, and one sample at T = 0.8 and at 1.0."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.checkpointing import Checkpoints, checkpoint_digest
from gadjax.config import UNTOUCHED
from gadjax.evaluation.answers import read_answers, write_answers
from gadjax.evaluation.measure import Metric, measure
from gadjax.evaluation.samples import BEST_OF, MODES, Samples
from gadjax.evaluation.summary import HELD_OUT
from gadjax.files import replace_file, to_json
from gadjax.referee import Referee
from gadjax.runs import Run
from gadjax.scoring import Scorer
from gadjax.session import Session
from gadjax.sharding import agreed, is_first
from gadjax.terminal import track


def _chooser(session: Session) -> str | None:
    """The stage whose discriminator chooses among several answers, if it is to."""
    wanted, stages = session.run.config.evaluation, session.run.config.stages
    with_one = [name for name, stage in stages.items() if isinstance(stage, SamplingStageConfig)]
    return (wanted.discriminator or with_one[-1]) if wanted.best_of > 1 else None


def _scorer(session: Session) -> Scorer | None:
    wanted, chooser = session.run.config.evaluation, _chooser(session)
    if chooser is None:
        return None
    params = session.final_role(chooser, "discriminator").params
    return Scorer(session.models_of(chooser), params, session.run.config.data, wanted.best_of, wanted.batch_groups)


def _origin(session: Session, name: str) -> str:
    """What a stage's answers come from, as JSON: the data, the final checkpoint or the section of the untouched student, and who chose."""
    config = session.run.config
    if name == UNTOUCHED:
        weights: object = {"student": config.student.model_dump(), "seed": config.run.seed}
    else:
        weights = {"checkpoint": checkpoint_digest(session.run.checkpoints(name), session.final_step(name))}
    chooser, best_of = _chooser(session), session.run.config.evaluation.best_of
    digest = chooser and checkpoint_digest(session.run.checkpoints(chooser), session.final_step(chooser))
    choice = {"best_of": best_of, "discriminator": digest} if chooser else {}
    return to_json({"data": session.snapshot.digest, "weights": weights} | choice, indent=1)


def evaluation_folder(run: Run, split: str = HELD_OUT) -> Path:
    """Where the answers to a split's prompts are: those of a test set in a folder of its name."""
    return run.folder / "evaluation" / ("" if split == HELD_OUT else split)


Measured = dict[str, dict[str, dict[str, Metric]]]  # of a split, of a stage


def every_checkpoint(session: Session) -> list[str]:
    """All checkpoints that are kept, in the order of training, after the untouched student: `gad@50`, and `gad` for its outcome."""
    names = [UNTOUCHED]
    for name in session.run.config.stages:
        final = session.final_step(name)
        with Checkpoints(session.run.checkpoints(name), read_only=True) as checkpoints:
            names += [name if step == final else f"{name}@{step}" for step in checkpoints.steps]
    return names


def evaluate_stages(session: Session, names: Sequence[str] = ()) -> Measured:
    """Measures stages, or steps of them, on the held-out prompts and on the test sets; answers that were written already are read,
    unless the weights or the data are others now. By default the stages of the table.

    All processes answer; process 0 measures, the others return nothing.
    """
    names, wanted = names or session.run.config.evaluated, session.run.config.evaluation
    splits = [name for name in session.snapshot.splits if name != "train"]
    modes = [*MODES, *[BEST_OF] * (wanted.best_of > 1)]
    measured: Measured = {split: {} for split in splits}
    referee = Referee.of(wanted.referee, wanted.batch_groups) if wanted.referee else None
    scorer, total = None, len(names) * len(splits) * len(modes)
    with track("evaluate", total) as advance:
        for index, (name, split) in enumerate(itertools.product(names, splits)):
            file = evaluation_folder(session.run, split) / f"{name}.jsonl"
            mark, origin = file.with_suffix(".origin.json"), _origin(session, name)
            if not agreed(file.exists() and mark.exists() and mark.read_text(encoding="utf-8") == origin):
                params, scorer = session.student_params(name), scorer or _scorer(session)
                examples, answers = [*session.snapshot.splits[split]], dict[str, Samples]()
                for number, mode in enumerate(modes):
                    answers[mode] = session.answerer.answer(params, examples, mode, scorer if mode == BEST_OF else None)
                    advance(index * len(modes) + number, name)
                if is_first():
                    write_answers(file, answers, session.tutored is not None)
                    replace_file(mark, origin)
                    session.run.push()
            if is_first():
                answers = read_answers(file)
                judged = referee.measure(answers["greedy"]) if referee else {}
                measured[split][name] = measure(answers, wanted.metrics, session.tutored) | judged
            advance((index + 1) * len(modes), name)
    return measured
