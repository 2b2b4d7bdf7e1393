"""What a stage may start from outside of its run: a Hugging Face folder, or a stage of another run, RUN/STAGE.

In a config both are paths with a slash: `from: runs/first/warmup`, `from: ./models/mine`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.checkpointing import Checkpoints
from gadjax.config import UNTOUCHED, Config, is_elsewhere, stage_of
from gadjax.errors import UserError
from gadjax.models.checkpoint import is_classifier, load, read_config, same_tokenizer
from gadjax.models.decoder import DecoderConfig, Network
from gadjax.models.fresh import fresh_dims
from gadjax.runs import CONFIG, Run
from gadjax.steps import Models
from gadjax.types import Params, Role


def check_origins(config: Config) -> None:
    """Tells which origin outside of the run, or which referee, is not there, or has other adapters.

    Raises:
        UserError: names the field.
    """
    if (referee := config.evaluation.referee) is not None and not (is_elsewhere(referee) and _has_discriminator(config, referee)):
        mend = "name RUN/STAGE, a warmup or gad stage of another run"
        raise UserError("evaluation.referee", f"{referee} is no trained stage with a discriminator", mend)
    for name, stage in config.stages.items():
        named = {"from": stage.from_}
        if isinstance(stage, SamplingStageConfig) and stage.discriminator.from_:
            named["discriminator.from"] = stage.discriminator.from_
        for field, origin in named.items():
            if is_elsewhere(origin) and not _is_model(origin) and not (_stage_of(origin)):
                what = f"{origin} is neither a Hugging Face folder nor a trained stage of a run"
                raise UserError(f"stages.{name}.{field}", what, "name a folder with config.json, or RUN/STAGE")
            if is_elsewhere(origin):
                _check_adapters(f"stages.{name}.{field}", origin, config)


def _check_adapters(field: str, origin: str, config: Config) -> None:
    """Adapters stand on the base that they were trained on, and nothing else stands beside it."""
    run = _stage_of(origin)
    theirs, ours = run.config.adapters if run else None, config.adapters
    if theirs != ours:
        told = [f"adapters of rank {each.rank} and scale {each.scale:g}" if each else "no adapters" for each in (theirs, ours)]
        mend = "give both the same, or export that stage and start from it as student.path"
        raise UserError(field, f"{origin} has {told[0]}, this config {told[1]}", mend)


def check_base(models: Models, host: Mapping[str, Any], where: str) -> None:
    """Tells that a checkpoint's adapters were trained on other weights than those that are here; `host` is what it says of itself.

    Raises:
        UserError: they were.
    """
    if host.get("base") != models.mark:
        what = "was trained as adapters of other weights than this run's student has"
        raise UserError(where, what, "bring the student's weights back as they were, with the same student.compute_dtype")


def discriminator_origin(config: Config, stage: SamplingStageConfig) -> str:
    """Where a stage's discriminator comes from, unless it is random: what its config says, or the default of that."""
    return stage.discriminator.from_ or (stage.from_ if _has_discriminator(config, stage.from_) else UNTOUCHED)


def _has_discriminator(config: Config, origin: str) -> bool:
    if is_elsewhere(origin):
        run = _stage_of(origin)
        return run is not None and isinstance(run.config.stages[Path(origin).name], SamplingStageConfig)
    return origin != UNTOUCHED and isinstance(config.stages[origin], SamplingStageConfig)


def discriminator_dims(config: Config, name: str, student: DecoderConfig) -> DecoderConfig:
    """The dimensions of the discriminator of stage `name`: by default those of the student."""
    stage = config.stages[stage_of(name)]
    if not isinstance(stage, SamplingStageConfig):
        return student
    if stage.discriminator.random is not None:
        return fresh_dims(stage.discriminator.random, student.vocabulary)
    origin = discriminator_origin(config, stage)
    if origin == UNTOUCHED:
        return student
    if not is_elsewhere(origin):
        return discriminator_dims(config, origin, student)
    if _is_model(origin):
        folder = Path(origin).expanduser()
        return read_config(folder, classifier=is_classifier(folder))[1]
    run = _stage_of(origin)
    return discriminator_dims(run.config, Path(origin).name, student) if run else student


def role_from(origin: str, role: str, models: Models, student: Path, key: jax.Array) -> Role:
    """`student` or `discriminator` from outside of the run; a stage of a run gives its optimizer's moments too.

    Args:
        origin: a folder, or RUN/STAGE.
        role: which.
        models: of the stage.
        student: the folder of the run's student.
        key: draws the head of a discriminator that begins as a language model.

    Raises:
        UserError: it is no student of the same family and dimensions, or no discriminator with the same tokenizer.
    """
    network: Network = models.student if role == "student" else models.discriminator
    mend = "name a model of the student's own family and size"
    if _is_model(origin):
        folder = Path(origin).expanduser()
        if role == "discriminator":
            return models.fresh_role(network, _discriminator_in(folder, models, student, key))
        if (found := read_config(folder)) != read_config(student):
            raise UserError(origin, "is another model than the student", mend)
        return models.fresh_role(network, models.read(network, folder, found[0]))
    run = _stage_of(origin)
    if run is None:
        raise UserError(origin, "is not there any more", "bring it back")
    with Checkpoints(run.checkpoints(Path(origin).name), read_only=True) as checkpoints:
        step = checkpoints.latest or 0
        if run.config.stages[Path(origin).name].select is not None:
            step = checkpoints.restore_host(step)["selection"]["best"] or step
        check_base(models, checkpoints.restore_host(step), origin)
        try:
            return checkpoints.restore_role(step, role, models.abstract_role(network))
        except (ValueError, KeyError, FileNotFoundError) as error:  # Orbax: there is none, or the trees or the shapes differ
            raise UserError(origin, f"has no {role} like this run's", mend) from error


def _discriminator_in(folder: Path, models: Models, student: Path, key: jax.Array) -> Params:
    """The discriminator in a folder; of a language model's folder the trunk, and a fresh head."""
    headed, network = is_classifier(folder), models.discriminator
    family, _ = read_config(folder, classifier=headed)
    if not same_tokenizer(folder, student):
        raise UserError(str(folder), "has another tokenizer than the student", "name a model that reads the student's tokens")
    there = network.shapes if headed else {"trunk": network.shapes["trunk"]}
    return models.completed(network, load(folder, family, models.laid_out(network, there)), key)


def _is_model(origin: str) -> bool:
    return (Path(origin).expanduser() / "config.json").is_file()


def _stage_of(origin: str) -> Run | None:
    """The other run, if `origin` is a stage of one that has a checkpoint."""
    folder = Path(origin).expanduser()
    if not (folder.parent / CONFIG).is_file():
        return None
    run = Run.at(folder.parent)
    return run if folder.name in run.config.stages and run.begun(folder.name) else None
