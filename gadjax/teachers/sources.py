"""Where the prompts come from: a file or data set, the tutor, the file of the teacher's answers, or what was imported."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gadjax.errors import UserError
from gadjax.prompts import PromptsConfig, distinct, make_prompt, prompt_of, read_prompts
from gadjax.records import Prompt
from gadjax.rows import read_rows
from gadjax.teachers import grammar
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.file import read_pairs

TEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")  # the name of a test set: a split and a folder have it
TUTOR = re.compile(r"tutor:([1-9][0-9]{0,6})")


def load_prompts(prompts: PromptsConfig, teacher: TeacherConfig, seed: int, cache: Path | None = None) -> tuple[list[Prompt], list[Prompt]]:
    """The training prompts and the validation prompts; no prompt is in both.

    Args:
        prompts: the sources.
        teacher: whose file of answers gives the prompts where no source does.
        seed: of the tutor's prompts, and of the choice of those held out.
        cache: the run's cache, whose prompts are taken where there is no other source: they were imported.

    Raises:
        UserError: no source is given, or it is broken.
    """
    made = _tutor_prompts(prompts, seed)
    if prompts.train is not None:
        train = _load(prompts.train, "prompts.train", made)
    elif teacher.backend == "file":
        train = _prompts_of_answers(str(teacher.path))
    elif not (train := _prompts_of_cache(cache, teacher)):
        mend = "name a .jsonl file, tutor:6000 for prompts that the tutor makes, or `gadjax import` answers with their prompts"
        raise UserError("prompts.train", "is not given", mend)
    if prompts.validation is None:
        return hold_out(train, prompts.validation_share, seed)
    validation = _load(prompts.validation, "prompts.validation", made)
    if prompts.train is None and teacher.backend != "file":
        held = {str(prompt.messages) for prompt in validation}  # they were asked as well
        train = [prompt for prompt in train if str(prompt.messages) not in held]
    _check_disjoint(train, validation)
    return train, validation


class TestSet(NamedTuple):
    """A set of prompts that the literature reports on.

    Attributes:
        source: on the hub.
        file: the one that has them, where the set has others that do not.
        subset: of its rows, those with this value of the field `dataset`.
        sample: so many of them, drawn by lot, the same ones every time.
    """

    source: str
    file: str | None = None
    subset: str | None = None
    sample: int | None = None


# The test sets of arXiv 2511.10643, section 3. Of Dolly it takes 500 prompts; which is not published with the set, so these are others.
TEST_SETS = {
    "lmsys": TestSet("ytz20/LMSYS-Chat-GPT-5-Chat-Response:test"),
    "dolly": TestSet("databricks/databricks-dolly-15k", sample=500),
    "selfinst": TestSet("tatsu-lab/alpaca_eval", "alpaca_eval.json", subset="selfinstruct"),
    "vicuna": TestSet("tatsu-lab/alpaca_eval", "alpaca_eval.json", subset="vicuna"),
}


def load_tests(prompts: PromptsConfig) -> dict[str, list[Prompt]]:
    """The prompts of the test sets by their names, which stand before the prompts' ids: `vicuna/17`.

    Raises:
        UserError: a name is none, or a source is broken or empty.
    """
    found: dict[str, list[Prompt]] = {}
    for name, source in prompts.tests.items():
        where = f"prompts.tests.{name}"
        if not TEST.fullmatch(name) or name in ("train", "validation"):
            mend = "use letters, digits and `_`, and neither train nor validation"
            raise UserError("prompts.tests", f"{name!r} is no name for a test set", mend)
        known = TEST_SETS.get(source, TestSet(source))
        rows = ((place, row) for place, row in read_rows(known.source, where, known.file) if known.subset in (None, row.get("dataset")))
        read = distinct((place, prompt_of(row, place)) for place, row in rows)
        if known.sample is not None:
            read = sorted(read, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())[: known.sample]
        if not read:
            raise UserError(where, f"{source} has no prompts", "name another source")
        found[name] = [Prompt(f"{name}/{prompt.id}", prompt.messages) for prompt in read]
    return found


def without(train: list[Prompt], tests: Iterable[Prompt]) -> list[Prompt]:
    """The training prompts but for those that are in a test set too."""
    held = {str(prompt.messages) for prompt in tests}
    return [prompt for prompt in train if str(prompt.messages) not in held]


def hold_out(prompts: list[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts but for a share of them, and that share: at least one prompt, the same for the same ids and seed."""
    if len(prompts) < 2:
        raise UserError("prompts.train", "has too few prompts to hold one out", "give more, or prompts.validation")
    by_lot = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest())
    held = {prompt.id for prompt in by_lot[: max(1, round(share * len(prompts)))]}
    return [prompt for prompt in prompts if prompt.id not in held], [prompt for prompt in prompts if prompt.id in held]


def _load(source: str, where: str, made: Iterator[Prompt]) -> list[Prompt]:
    count = _tutor_count(source)
    return list(islice(made, count)) if count else read_prompts(source, where)


def _tutor_prompts(prompts: PromptsConfig, seed: int) -> Iterator[Prompt]:
    """As many prompts as both sources want of the tutor, drawn at once so that none comes twice."""
    count = _tutor_count(prompts.train) + _tutor_count(prompts.validation)
    return (Prompt.of(text) for text in grammar.prompts(count, seed))


def _tutor_count(source: str | None) -> int:
    match = TUTOR.fullmatch(source or "")
    return int(match[1]) if match else 0


def _prompts_of_answers(path: str) -> list[Prompt]:
    """The prompts of a file of answers, each once, however many answers it has."""
    return distinct((place, prompt) for place, prompt, _ in read_pairs(path))


def _prompts_of_cache(path: Path | None, teacher: TeacherConfig) -> list[Prompt]:
    if path is None or not path.exists():
        return []
    with TeacherCache(path, read_only=True) as cache:
        return [make_prompt(list(messages), None, str(path)) for messages in cache.conversations(teacher.provider, teacher.asked_model)]


def _check_disjoint(train: list[Prompt], validation: list[Prompt]) -> None:
    ids, texts = {prompt.id for prompt in train}, {str(prompt.messages) for prompt in train}
    for prompt in validation:
        if prompt.id in ids or str(prompt.messages) in texts:
            raise UserError(
                "prompts.validation", f"has {prompt.id} ({prompt.text[:60]!r}) of prompts.train", "remove it from one of the two"
            )
