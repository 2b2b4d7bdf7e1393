"""Every stage measured the same way on the held-out prompts: greedy, and one sample at T = 0.8 and at 1.0."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gadjax.algorithms.seqkd import make_sequence_log_probs
from gadjax.checkpointing import checkpoint_digest
from gadjax.config import UNTOUCHED
from gadjax.data.packing import Ids, pack
from gadjax.data.snapshot import Example
from gadjax.evaluation.answers import read_answers, write_answers
from gadjax.evaluation.measure import Metric, measure
from gadjax.evaluation.samples import MODES, Samples
from gadjax.files import replace_file, to_json
from gadjax.rollout.engine import SamplingPlan
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.sharding import replicated
from gadjax.steps import Sampler, responses_of, row_shape
from gadjax.terminal import track
from gadjax.types import Params


def evaluated_stages(run: Run) -> list[str]:
    """The stages in the table, the untouched student first."""
    config = run.config
    return [UNTOUCHED, *(config.evaluation.stages if config.evaluation.stages is not None else config.stages)]


class Answerer:
    """Answers prompts with any stage's parameters, in every way of decoding; compiled once for all stages."""

    def __init__(self, session: Session):
        self._session, self._models = session, session.models
        data, end = session.run.config.data, session.text.end_of_turn
        self._batch = session.run.config.evaluation.batch_groups
        plan = SamplingPlan(samples=1, response_tokens=data.max_response_tokens, temperature=0.0, end_of_turn=end)
        self._samplers = {
            mode: Sampler(session.models, data, replace(plan, temperature=temperature)) for mode, temperature in MODES.items()
        }
        self._log_probs = session.models.jit(make_sequence_log_probs(session.models.student), out_shardings=replicated(session.models.mesh))
        self._shape = row_shape(data, session.models.mesh, self._batch, 1)

    def answer(self, params: Params, examples: Sequence[Example], mode: str) -> Samples:
        """One answer to each example's prompt."""
        ids: list[tuple[int, ...]] = []
        log_probs: list[float] = []
        ended: list[bool] = []
        for start in range(0, len(examples), self._batch):
            prompts = [example.tokens.prompt for example in examples[start : start + self._batch]]
            # The last batch is filled up, so that every program compiles for one shape.
            full = [*prompts, *[prompts[0]] * (self._batch - len(prompts))]
            rollout = self._samplers[mode](params, full, self._session.key, start)
            sampled, _ = responses_of(rollout)
            ids += [answers[0] for answers in sampled[: len(prompts)]]
            log_probs += self._score(params, full, sampled)[: len(prompts)]
            ended += rollout.ended_BN[: len(prompts), 0].tolist()
        return Samples(
            prompts=tuple(example.prompt for example in examples),
            teacher=tuple(example.answer.text for example in examples),
            texts=tuple(self._session.text.decode(answer) for answer in ids),
            log_probs=np.array(log_probs, np.float64),
            lengths=np.array([len(answer) for answer in ids]),
            truncated=~np.array(ended),
        )

    def _score(self, params: Params, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> list[float]:
        rows = self._models.place_rows(pack(prompts, responses, self._shape))
        return np.asarray(self._log_probs(params, rows))[:, 0].tolist()


def _origin(session: Session, name: str) -> str:
    """What a stage's answers come from, as JSON: the data, and the final checkpoint or the section of the untouched student."""
    config = session.run.config
    if name == UNTOUCHED:
        weights: object = {"student": config.student.model_dump(), "seed": config.run.seed}
    else:
        weights = {"checkpoint": checkpoint_digest(session.run.checkpoints(name), session.total_steps(name))}
    return to_json({"data": session.snapshot.digest, "weights": weights}, indent=1)


def evaluate_stages(session: Session) -> dict[str, dict[str, Metric]]:
    """Measures every stage; answers that were written already are read, unless the weights or the data are others now."""
    examples = [session.snapshot.validation[index] for index in range(len(session.snapshot.validation))]
    tutor = session.run.config.teacher.backend == "tutor"
    vocabulary = session.dims.vocabulary if tutor else None
    names, answerer = evaluated_stages(session.run), Answerer(session)
    measured: dict[str, dict[str, Metric]] = {}
    with track("evaluate", len(names) * len(MODES)) as advance:
        for index, name in enumerate(names):
            file = session.run.folder / "evaluation" / f"{name}.jsonl"
            mark, origin = file.with_suffix(".origin.json"), _origin(session, name)
            if not (file.exists() and mark.exists() and mark.read_text(encoding="utf-8") == origin):
                params = session.student_params(name)
                answers: dict[str, Samples] = {}
                for number, mode in enumerate(MODES):
                    answers[mode] = answerer.answer(params, examples, mode)
                    advance(index * len(MODES) + number, name)
                write_answers(file, answers, tutor)
                replace_file(mark, origin)
            measured[name] = measure(read_answers(file), session.run.config.evaluation.metrics, vocabulary)
            advance((index + 1) * len(MODES), name)
    return measured
