"""What training, evaluation and export need of a run whose data is ready: text, data, models and where stages come from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.answering import Answerer
from gadjax.checkpointing import Checkpoints
from gadjax.config import UNTOUCHED, StudentConfig, is_elsewhere, stage_of
from gadjax.data.pipeline import steps
from gadjax.data.snapshot import Snapshot
from gadjax.errors import UserError
from gadjax.models.adapters import folded
from gadjax.models.checkpoint import read_config
from gadjax.models.decoder import DecoderConfig, discriminator_params
from gadjax.models.hugging_face import Family
from gadjax.optimizer import restart_schedule
from gadjax.origins import check_base, discriminator_dims, discriminator_origin, role_from
from gadjax.runs import Run
from gadjax.steps import Models
from gadjax.text import Text
from gadjax.types import Params, Role, TrainState

HEAD_STREAM, ADAPTERS_STREAM = 1, 2  # of the run's key


def read_student(folder: Path, config: StudentConfig) -> tuple[Text, Family, DecoderConfig]:
    """The tokenizer, family and dimensions of the student in a folder.

    Raises:
        UserError: the folder holds no student that can be used.
    """
    family, dims = read_config(folder)
    text = Text.load(str(folder), config.template)
    if dims.vocabulary < text.vocabulary_size:
        raise UserError(
            str(folder), f"embeds {dims.vocabulary} tokens, its tokenizer has {text.vocabulary_size}", "use the model's own tokenizer"
        )
    return text, family, dims


@dataclass(frozen=True)
class Session:
    """A run with its models on the devices' mesh.

    Attributes:
        run: config and folder.
        folder: the student's Hugging Face folder.
        text: its tokenizer.
        snapshot: the frozen data.
        family: the student's model family.
        dims: its dimensions.
        models: the networks.
    """

    run: Run
    folder: Path
    text: Text
    snapshot: Snapshot
    family: Family
    dims: DecoderConfig
    models: Models

    @classmethod
    def open(cls, run: Run, folder: Path) -> "Session":
        """Opens a run whose data is frozen; `folder` is the student's."""
        text, family, dims = read_student(folder, run.config.student)
        models = Models.of(run.config, dims).standing(folder, family)
        return cls(run, folder, text, Snapshot.open(run.data), family, dims, models)

    @cached_property
    def key(self) -> jax.Array:
        """The run's random key, on every device."""
        return self.models.place_key(np.asarray(jax.random.key_data(jax.random.key(self.run.config.run.seed))))

    @cached_property
    def answerer(self) -> Answerer:
        """What answers held-out prompts."""
        return Answerer(self.run.config, self.models, self.text, self.key)

    @property
    def tutored(self) -> int | None:
        """With the tutor as the teacher, which can be asked for probabilities, the size of the vocabulary; else None."""
        return self.dims.vocabulary if self.run.config.teacher.backend == "tutor" else None

    def untouched(self) -> Params:
        """The student's parameters as they came: its weights, or fresh adapters beside them."""
        models, key = self.models, jax.random.fold_in(self.key, ADAPTERS_STREAM)
        return models.completed(models.student, models.read(models.student, self.folder, self.family), key)

    def total_steps(self, name: str) -> int:
        """The steps of a stage."""
        stage = self.run.config.stages[name]
        wanted = steps(len(self.snapshot.train), stage.batch_groups, stage.epochs)
        return min(wanted, stage.max_steps or wanted)

    def final_step(self, name: str) -> int:
        """The step that is a stage's outcome: its last, or the best one where it selects. `gad@50` is a stage's step 50.

        Raises:
            UserError: the stage is not finished, or has no checkpoint of that step.
        """
        stage, step = stage_of(name), name.partition("@")[2]
        folder, selects = self.run.checkpoints(stage), self.run.config.stages[stage].select is not None
        if folder.is_dir():
            with Checkpoints(folder, read_only=True) as checkpoints:
                if step:
                    if int(step) in checkpoints.steps:
                        return int(step)
                    kept = ", ".join(map(str, checkpoints.steps))
                    raise UserError(name, "there is no checkpoint of this step", f"those of the steps {kept} are kept")
                latest = checkpoints.latest or 0
                selection = checkpoints.restore_host(latest)["selection"] if latest and selects else {"best": latest, "stops": False}
                if latest == self.total_steps(stage) or selection["stops"]:
                    return selection["best"]
        raise UserError(f"stages.{stage}", "is not trained yet", "run `gadjax train` with this config first")

    def final_role(self, name: str, role: str) -> Role:
        """`student` or `discriminator` of a finished stage, or of one of its steps, as `final_step` has it.

        Raises:
            UserError: there is none, or it stands on another base.
        """
        models, step = self.models_of(name), self.final_step(name)
        network = models.student if role == "student" else models.discriminator
        with Checkpoints(self.run.checkpoints(name), read_only=True) as checkpoints:
            check_base(models, checkpoints.restore_host(step), str(self.run.checkpoints(name)))
            return checkpoints.restore_role(step, role, models.abstract_role(network))

    def student_params(self, name: str) -> Params:
        """The student's parameters after stage `name`; `student` is the untouched one."""
        return self.untouched() if name == UNTOUCHED else self.final_role(name, "student").params

    def merged(self, name: str, role: str) -> Params:
        """All parameters of `student` or `discriminator` of a finished stage, adapters in the matrices that they adapt."""
        models = self.models_of(name)
        network = models.student if role == "student" else models.discriminator
        return folded(models.whole(network, self.final_role(name, role).params), self.run.config.adapters)

    def models_of(self, name: str) -> Models:
        """The models with the discriminator that stage `name` has."""
        dims = discriminator_dims(self.run.config, name, self.dims)
        return self.models if dims == self.dims else self.models.judged_by(dims)

    def first_state(self, name: str) -> TrainState:
        """The state in which stage `name` starts. Optimizers go on where the earlier stage left them."""
        stage, models = self.run.config.stages[name], self.models_of(name)
        head_key = jax.random.fold_in(self.key, HEAD_STREAM)

        def inherited(origin: str, role: str) -> Role:
            """Of where the stage starts from: moments kept, schedule restarted."""
            elsewhere = is_elsewhere(origin)
            found = role_from(origin, role, models, self.folder, head_key) if elsewhere else self.final_role(origin, role)
            return found._replace(optimizer=restart_schedule(found.optimizer))

        student = inherited(stage.from_, "student") if stage.from_ != UNTOUCHED else models.fresh_role(models.student, self.untouched())
        if not isinstance(stage, SamplingStageConfig):
            return TrainState(student, None)
        if stage.discriminator.random is not None:
            return TrainState(student, models.fresh_role(models.discriminator, models.completed(models.discriminator, {}, head_key)))
        origin = discriminator_origin(self.run.config, stage)
        if origin != UNTOUCHED:
            return TrainState(student, inherited(origin, "discriminator"))
        params = discriminator_params(models.discriminator, student.params, head_key)
        return TrainState(student, models.fresh_role(models.discriminator, params))
