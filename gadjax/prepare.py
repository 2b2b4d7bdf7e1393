"""From collected answers to frozen data: the student's folder found or made, token groups frozen."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp

from gadjax.config import Config
from gadjax.data.cleaning import clean
from gadjax.data.snapshot import Example, Snapshot, freeze
from gadjax.errors import UserError
from gadjax.hub import fetched
from gadjax.models.checkpoint import TOKENIZER_FILES, open_weights
from gadjax.models.decoder import language_model
from gadjax.models.fresh import fresh_dims, write_fresh
from gadjax.moderation import Moderator
from gadjax.origins import check_origins
from gadjax.records import Answer, Prompt, TokenGroup
from gadjax.runs import Run
from gadjax.session import read_student
from gadjax.sharding import make_mesh
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import answers
from gadjax.terminal import say
from gadjax.text import PromptTooLong, Text
from gadjax.weights_and_biases import check_installed

WEIGHTS = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]  # what is fetched of a hub repository


def check_devices(run: Run) -> None:
    """Tells whether the mesh fits the devices that are here, and the packages that the run needs are there, too."""
    check_installed(run.config.run.wandb)
    make_mesh(run.config.mesh)


def check_student(run: Run) -> None:
    """Tells what is wrong with the student, its adapters, the stages' origins and the room for prompts.

    A student of the hub is fetched for that.
    """
    check_origins(run.config)
    if (fresh := run.config.student.random) is not None:
        fresh_dims(fresh, fresh.words).adapted(run.config.adapters)
    if run.config.student.path is not None:
        folder = given_student(run.config.student.path)
        text, family, dims = read_student(folder, run.config.student)
        dims.adapted(run.config.adapters)
        open_weights(folder, family, language_model(dims, jnp.dtype(jnp.float32)).shapes)
        if not any(_has_place(text, prompt, run.config.data.max_prompt_tokens) for prompt in itertools.chain(*run.prompts.values())):
            raise PromptTooLong


def _has_place(text: Text, prompt: Prompt, max_tokens: int) -> bool:
    try:
        return bool(text.prompt_ids(prompt.messages, max_tokens))
    except PromptTooLong:
        return False


def prepare_data(run: Run) -> Path:
    """Freezes the cached answers as token groups, once, and returns the student's folder.

    Data that a stage has begun to train on is kept as it is, whatever was collected since.
    """
    config, prompts = run.config, {prompt.id: prompt for prompt in itertools.chain(*run.prompts.values())}
    answered = _answers(run)
    folder = _made_student(run, [text for answer in answered["train"] for text in (prompts[answer.prompt_id].text, answer.text)])
    fingerprint = _fingerprint(config, folder, answered)
    if run.data.exists():
        if Snapshot.open(run.data).fingerprint == fingerprint:
            return folder
        if run.begun():
            say(f"prepare: other answers or another tokenizer than in {run.data}; the stages go on with the data that they began with")
            return folder
    text = Text.load(str(folder), config.student.template)
    fitting = _Fitting(config.data.max_prompt_tokens, config.cleaning.long_prompts == "cut")
    cleaned = _cleaned(run, answered, prompts)
    freeze(run.data, {split: _examples(text, config, prompts, found, fitting) for split, found in cleaned.items()}, fingerprint)
    fitting.tell()
    groups = {split: sum(answer.prompt_id not in fitting.left_out for answer in found) for split, found in cleaned.items()}
    tests = "".join(f", {groups[name]} in {name}" for name in groups if name not in ("train", "validation"))
    say(f"prepare: {groups['train']} groups to train on, {groups['validation']} held out{tests}")
    return folder


@dataclass
class _Fitting:
    """The prompts that are longer than `max_tokens`: ids of those that were cut, if they may be, and of those left out."""

    max_tokens: int
    cuts: bool
    cut: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)

    def tell(self) -> None:
        """Says how many there are."""
        if self.cut:
            say(f"prepare: {len(self.cut)} prompts lose the end of their last text (data.max_prompt_tokens is {self.max_tokens})")
        if self.left_out:
            even = " even without their last text" if self.cuts else ""
            say(f"prepare: {len(self.left_out)} prompts are left out: too long for data.max_prompt_tokens{even}")


def _answers(run: Run) -> dict[str, list[Answer]]:
    """The cached answers to the prompts of each split, of the teachers and as many as the data's settings say; some to both."""
    answered: dict[str, list[Answer]] = {}
    if run.cache.exists():
        with TeacherCache(run.cache, read_only=True) as cache:
            answered = {split: _of_teachers(prompts, run.config, cache) for split, prompts in run.prompts.items()}
    if not any(answered.values()):
        raise UserError(str(run.cache), "holds no answers to the prompts", "run `gadjax collect` first")
    for split, found in answered.items():
        if not found:
            raise UserError(
                f"prompts.{split}", "no prompt has an answer of the teacher", "add prompts, or see what `gadjax collect` refused"
            )
    return answered


def _cleaned(run: Run, answered: dict[str, list[Answer]], prompts: Mapping[str, Prompt]) -> dict[str, list[Answer]]:
    """What the cleaning leaves of the answers; how many it leaves out is told for each reason."""
    config = run.config.cleaning
    if config.moderation is None:
        cleaned = clean(answered, prompts, config)
    else:
        with Moderator(config.moderation, run.folder / "moderation.sqlite") as moderator:
            cleaned = clean(answered, prompts, config, moderator.flagged)
    for reason, count in cleaned.left_out.items():
        if count:
            say(f"prepare: {count} answers are left out: {reason}")
    return cleaned.answers


def _of_teachers(prompts: Sequence[Prompt], config: Config, cache: TeacherCache) -> list[Answer]:
    """In the prompts' order; to one prompt, in the order of the teachers."""
    found: dict[str, list[Answer]] = {prompt.id: [] for prompt in prompts}
    for name in config.data.teachers or config.all_teachers:
        teacher = config.all_teachers[name]
        used = teacher.model_copy(update={"samples": min(teacher.samples, config.data.samples or teacher.samples)})
        for answer in answers(prompts, used, cache):
            found[answer.prompt_id].append(answer)
    return list(itertools.chain.from_iterable(found.values()))


def student_folder(run: Run) -> Path:
    """The student's Hugging Face folder: the config's, or the run's own, where `prepare_data` puts a fresh student."""
    return given_student(str(run.config.student.path)) if run.config.student.random is None else run.folder / "student"


def _made_student(run: Run, texts: Sequence[str]) -> Path:
    """The student's folder; a fresh student is made from the teacher's words if it is not there."""
    fresh, folder = run.config.student.random, student_folder(run)
    if fresh is not None:
        if not run.begun():
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            write_fresh(folder, fresh, texts, run.config.run.seed)
    return folder


def given_student(path: str) -> Path:
    """A student that exists already: a folder, or a model of the hub, which is fetched."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    what = f"{path} is neither a folder nor a model that the hub gives"
    return fetched(path, "student.path", what, "name a Hugging Face folder or hub model", WEIGHTS)


def _examples(text: Text, config: Config, prompts: dict[str, Prompt], found: Sequence[Answer], fitting: _Fitting) -> Iterator[Example]:
    """The answers as examples; those to prompts that cannot be shortened enough are left out."""
    for answer in found:
        prompt = prompts[answer.prompt_id]
        try:
            ids, cut = text.fitted_prompt(prompt.messages, fitting.max_tokens)
        except PromptTooLong:
            fitting.left_out.add(prompt.id)
            continue
        if cut and not fitting.cuts:
            fitting.left_out.add(prompt.id)
            continue
        if cut:
            fitting.cut.add(prompt.id)
        response = text.response_ids(answer.text, config.data.max_response_tokens, answer.truncated)
        yield Example(prompt, answer, TokenGroup(prompt.id, ids, response))
    if all(answer.prompt_id in fitting.left_out for answer in found):
        raise PromptTooLong


def _fingerprint(config: Config, folder: Path, answered: dict[str, list[Answer]]) -> dict[str, str]:
    """All that the frozen tokens depend on."""
    tokenizer = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            tokenizer.update(name.encode() + (folder / name).read_bytes())
    texts = hashlib.sha256(repr(answered).encode())
    cleaning = config.cleaning.model_dump_json()
    lengths = f"{config.data.max_prompt_tokens}, {config.data.max_response_tokens}"
    tokenizer.update(repr(sorted(config.student.template.items())).encode())
    return {"tokenizer": tokenizer.hexdigest(), "answers": texts.hexdigest(), "lengths": lengths, "cleaning": cleaning}
