"""What a stage may start from outside of its run: a Hugging Face folder, or a stage of another run, RUN/STAGE.

In a config both are paths with a slash: `from: runs/first/warmup`, `from: ./models/mine`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.checkpointing import Checkpoints
from gadjax.config import Config, is_elsewhere
from gadjax.errors import UserError
from gadjax.models.checkpoint import read_config
from gadjax.models.decoder import DecoderConfig, Network
from gadjax.models.hugging_face import Family
from gadjax.runs import CONFIG, Run
from gadjax.steps import Models
from gadjax.types import Role


def check_origins(config: Config) -> None:
    """Tells which origin outside of the run is not there, or has other adapters.

    Raises:
        UserError: names the stage's field.
    """
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


def has_discriminator(origin: str) -> bool:
    """Whether an origin is a stage of another run that has a discriminator."""
    run = _stage_of(origin)
    return run is not None and isinstance(run.config.stages[Path(origin).name], SamplingStageConfig)


def role_from(origin: str, role: str, models: Models, family: Family, dims: DecoderConfig) -> Role:
    """`student` or `discriminator` from outside of the run; a stage of a run gives its optimizer's moments too.

    Raises:
        UserError: it is a model of another family or of other dimensions.
    """
    network: Network = models.student if role == "student" else models.discriminator
    mend = "name a model of the student's own family and size"
    if _is_model(origin):
        folder = Path(origin).expanduser()
        if read_config(folder, classifier=role == "discriminator") != (family, dims):
            raise UserError(origin, "is another model than the student", mend)
        return models.fresh_role(network, models.read(network, folder, family))
    run = _stage_of(origin)
    if run is None:
        raise UserError(origin, "is not there any more", "bring it back")
    with Checkpoints(run.checkpoints(Path(origin).name), read_only=True) as checkpoints:
        step = checkpoints.latest or 0
        check_base(models, checkpoints.restore_host(step), origin)
        try:
            return checkpoints.restore_role(step, role, models.abstract_role(network))
        except (ValueError, KeyError) as error:  # Orbax: the trees or the shapes differ
            raise UserError(origin, f"has no {role} like this run's", mend) from error


def _is_model(origin: str) -> bool:
    return (Path(origin).expanduser() / "config.json").is_file()


def _stage_of(origin: str) -> Run | None:
    """The other run, if `origin` is a stage of one that has a checkpoint."""
    folder = Path(origin).expanduser()
    if not (folder.parent / CONFIG).is_file():
        return None
    run = Run.at(folder.parent)
    return run if folder.name in run.config.stages and run.begun(folder.name) else None
