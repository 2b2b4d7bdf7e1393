"""The whole config: the sections of the parts, put together; YAML and overrides in, frozen classes out."""

import difflib
import math
import re
import reprlib
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from gadjax.algorithms.gad import GadConfig
from gadjax.algorithms.registry import ALGORITHMS
from gadjax.algorithms.seqkd import SeqkdConfig
from gadjax.algorithms.stage import SamplingStageConfig, StageConfig
from gadjax.algorithms.warmup import WarmupConfig
from gadjax.data.cleaning import CleaningConfig
from gadjax.data.config import DataConfig
from gadjax.errors import UserError
from gadjax.evaluation.config import EvaluationConfig
from gadjax.foreign import read_whole
from gadjax.models.adapters import AdaptersConfig
from gadjax.models.fresh import FreshConfig
from gadjax.models.rematerialisation import Rematerialise
from gadjax.optimizer import OptimizerConfig
from gadjax.prompts import PromptsConfig
from gadjax.rollout.config import RolloutConfig
from gadjax.section import Section
from gadjax.sharding import MeshConfig
from gadjax.teachers.config import TeacherConfig

FIRST_TEACHER = "teacher"  # what the section `teacher` is called among all teachers
UNTOUCHED = "student"  # what `from` says for the student as it came
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a run and of a stage: a folder has it


class RunConfig(Section):
    """Where a run lives.

    Attributes:
        name: of the run's folder, below `folder`.
        folder: holds the runs.
        bucket: `gs://bucket/folder` (or a folder that outlives the machine): checkpoints are written there, and the rest is copied there.
        seed: of everything random.
        nonfinite: what NaN or infinity in a step does: `stop`, or `skip` its updates and go on, but not more than ten times in a row.
        wandb: a project of Weights & Biases that is shown the metrics too (the extra `wandb`).
    """

    name: str = "quickstart"
    folder: str = "runs"
    bucket: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    nonfinite: Literal["stop", "skip"] = "stop"
    wandb: str | None = None

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if NAME.fullmatch(name):
            return name
        raise ValueError("must be a plain name of letters, digits, `.`, `_` and `-`; where it lies says `run.folder`")

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder).expanduser() / self.name


class StudentConfig(Section):
    """The model that learns.

    Attributes:
        path: a Hugging Face folder or hub name.
        random: a small fresh model instead, with a tokenizer made from the teacher's words.
        compute_dtype: of activations; parameters and optimizers are float32.
        rematerialise: what gradients compute again instead of keeping it. true: of each layer all but its input and what its attention
            kernel gave; feed_forward: the feed-forward layer, its wider part; false: no product with weights. The less, the more memory.
        template: arguments of the chat template, the same for teacher's and student's side: `{enable_thinking: false}` for Qwen3.
    """

    path: str | None = "Qwen/Qwen2.5-7B-Instruct"
    random: FreshConfig | None = None
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rematerialise: Rematerialise = False
    template: dict[str, bool | int | str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _path_or_random(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        path, random = values.get("path", cls.model_fields["path"].default), values.get("random")
        if random is None and not path:
            raise ValueError("has neither `path` nor `random`")
        if random is not None and values.get("path"):
            raise ValueError("has both `path` and `random`: leave one out or set it to null")
        return values | {"path": None if random is not None else path}


def _default_stages() -> dict[str, StageConfig]:
    return {"seqkd": SeqkdConfig(), "warmup": WarmupConfig(), "gad": GadConfig.model_validate({"from": "warmup"})}


class Config(Section):
    """One experiment.

    Attributes:
        teachers: further teachers by name, who are asked the same prompts; `data.teachers` says whose answers are used.
        adapters: low-rank adapters on a frozen base, which student, discriminator and reference share; null: everything is trained.
    """

    run: RunConfig = RunConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    prompts: PromptsConfig = PromptsConfig()
    student: StudentConfig = StudentConfig()
    adapters: AdaptersConfig | None = None
    data: DataConfig = DataConfig()
    cleaning: CleaningConfig = CleaningConfig()
    mesh: MeshConfig = MeshConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    stages: dict[str, SerializeAsAny[StageConfig]] = Field(default_factory=_default_stages)
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("stages", mode="before")
    @classmethod
    def _by_algorithm(cls, stages: Any) -> Any:
        """Each stage into the class of its algorithm."""
        if not isinstance(stages, dict):
            return stages
        made = {}
        for name, stage in stages.items():
            if isinstance(stage, dict):
                algorithm = stage.get("algorithm")
                entry = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
                if entry is None:
                    what = f"{algorithm!r} is no algorithm" if isinstance(algorithm, str) else "must name an algorithm"
                    raise UserError(f"stages.{name}.algorithm", what, f"use one of {', '.join(ALGORITHMS)}")
                try:
                    stage = entry.config.model_validate(stage)
                except ValidationError as error:
                    raise _at(f"stages.{name}", error, entry.config) from error
            made[name] = stage
        return made

    @property
    def evaluated(self) -> list[str]:
        """The stages in the table, the untouched student first."""
        return [UNTOUCHED, *(self.stages if self.evaluation.stages is None else self.evaluation.stages)]

    @property
    def discriminator_losses(self) -> dict[str, str]:
        """Of each stage that has a discriminator the name of its loss."""
        return {name: stage.discriminator.loss for name, stage in self.stages.items() if isinstance(stage, SamplingStageConfig)}

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; the one of the section `teacher` is called so."""
        return {FIRST_TEACHER: self.teacher, **self.teachers}

    @model_validator(mode="after")
    def _teachers_fit(self) -> "Config":
        """Teachers are told apart, and the data names some that are there."""
        for name in self.teachers:
            if not NAME.fullmatch(name) or name == FIRST_TEACHER:
                mend = f"use letters, digits, `.`, `_` and `-`, and not `{FIRST_TEACHER}`"
                raise UserError("teachers", f"{name!r} is no name for a further teacher", mend)
        asked = [(each.provider, each.asked_model, each.temperature, each.max_tokens) for each in self.all_teachers.values()]
        if len(set(asked)) < len(asked):
            raise UserError("teachers", "two of them would be asked the same", "give one another model, or raise its `samples`")
        for name in self.data.teachers or ():
            _check_among("data.teachers", name, [*self.all_teachers], "a teacher")
        return self

    @model_validator(mode="after")
    def _inexact_samples_are_weighed(self) -> "Config":
        for name, stage in self.stages.items():
            if self.rollout.backend == "remote" and isinstance(stage, GadConfig) and stage.importance_cap is None:
                where, what = f"stages.{name}.importance_cap", "a remote backend's log-probabilities are not the trainer's"
                raise UserError(where, what, "give a cap for the samples' weights, such as 2.0")
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> "Config":
        """Stages start from earlier ones, and the evaluation names stages that are there."""
        if not self.stages:
            raise UserError("stages", "there are none", "name a stage, or leave `stages` out for the paper's three")
        students, discriminators = [UNTOUCHED], [UNTOUCHED]
        for name, stage in self.stages.items():
            if not NAME.fullmatch(name) or name == UNTOUCHED:
                raise UserError(
                    "stages", f"{name!r} is no name for a stage", f"use letters, digits, `.`, `_` and `-`, and not `{UNTOUCHED}`"
                )
            if not is_elsewhere(stage.from_):
                _check_among(f"stages.{name}.from", stage.from_, students, "an earlier stage")
            if isinstance(stage, SamplingStageConfig):
                origin = stage.discriminator.from_
                if stage.discriminator.random is not None and self.adapters is not None:
                    where, what = f"stages.{name}.discriminator.random", "adapters stand on the student's base, and it has none"
                    raise UserError(where, what, "leave it or `adapters` out")
                if origin is not None and not is_elsewhere(origin):
                    _check_among(f"stages.{name}.discriminator.from", origin, discriminators, "an earlier stage that has one")
                discriminators.append(name)
            students.append(name)
        for name in self.evaluation.stages or ():
            _check_among("evaluation.stages", name, [*self.stages], "a stage")
        chooser = self.evaluation.discriminator
        if self.evaluation.best_of > 1 and not discriminators[1:]:
            raise UserError(
                "evaluation.best_of", "no stage has a discriminator that could choose", "add a warmup or gad stage, or set it to 1"
            )
        _check_among("evaluation.discriminator", chooser, discriminators[1:], "a stage that has one")
        _check_among("evaluation.export", self.evaluation.export, [*self.stages], "a stage")
        return self


def stage_of(name: str) -> str:
    """The stage of which `name` names a step, as `gad@50` does; other names are stages themselves."""
    return name.partition("@")[0]


def is_elsewhere(origin: str) -> bool:
    """Whether a stage's `from` names something outside of the run, by a path."""
    return "/" in origin


def _check_among(field: str, name: str | None, known: list[str], what: str) -> None:
    if name is not None and name not in known:
        raise UserError(field, f"{name!r} is not {what}", f"use {' or '.join(known)}")


MOST_VALUES = 10_000
LONGEST = 2**20  # bytes


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number, as YAML 1.2 and people do, and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"`{twice}` is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        """The text's node, unless its aliases, written out, make more values of it than a config has: a short text makes billions."""
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_VALUES} values", problem_mark=node.start_mark)
        return node


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has with its aliases written out; no end of them where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is not known: who asks meanwhile lies within
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values(each, known) for each in inner) if isinstance(node, yaml.CollectionNode) else 1
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$", re.I
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML to plain values; what is broken is a UserError with its line."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: an impossible date, brackets without an end
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise UserError(place, f"is not YAML ({getattr(error, 'problem', None) or error})", "mend it there") from error


def read_values(file: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file's values as they stand there, over those of the file that it extends. `heirs` extend this file."""
    try:
        values = parse_yaml(read_whole(file, "name a config file", LONGEST), str(file))
    except (OSError, UnicodeDecodeError) as error:
        where, mend = (f"{heirs[-1]}: extends", "name a config file beside it") if heirs else ("CONFIG", "name a config file")
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(where, f"{file} cannot be read ({reason})", mend) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(str(file), "is not a mapping of sections", "write sections such as `run:` and `teacher:`")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{file}: extends", "must be a text", "name one config file")
    base = (file.parent / parent).resolve()
    if base in (file.resolve(), *heirs):
        raise UserError(f"{file}: extends", f"{parent} extends this file, itself or by others", "break the circle")
    return _merge(read_values(base, (*heirs, file.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Applies `key.path=value`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(override, "is not an override", "write key.path=value, for example run.seed=1")
    nested: Any = parse_yaml(text, override)
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return _merge(values, nested)


KINDS = {  # pydantic's kinds of mistakes that are better said in our words
    "missing": ("is missing", "give it"),
    "string_type": ("must be a text", "write it in quotes"),
    "model_type": ("must be a section", "write its fields, as `key: value`"),
    "dict_type": ("must be a section", "write its fields, as `key: value`"),
}


def _nearest(section: type[Section], key: str) -> str:
    """The mend for an unknown key."""
    known = [field.alias or name for name, field in section.model_fields.items()]
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"


def _section_at(root: type[Section], path: tuple[Any, ...]) -> type[Section] | None:
    """The section class that holds the last key of `path`."""
    section, keys = root, iter(path[:-1])
    for key in keys:
        field = section.model_fields.get(str(key))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)
        if section is None:
            return None
        if field and get_origin(field.annotation) is dict:
            next(keys, None)  # the section's name
    return section


def _at(prefix: str, error: ValidationError, root: type[Section]) -> UserError:
    """One of pydantic's complaints as ours: the field by its dotted name, what is wrong, and the mend."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # a misspelt key is missing, too
    where = ".".join([prefix, *map(str, first["loc"])] if prefix else map(str, first["loc"])) or "config"
    if first["type"] == "extra_forbidden":
        section = _section_at(root, first["loc"])
        return UserError(where, "there is no such field", _nearest(section, str(first["loc"][-1])) if section else "leave it out")
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    what, mend = KINDS.get(first["type"], (said, "mend it in the config or on the command line"))
    # A list or mapping is not shown: YAML's aliases make gigabytes of a line.
    shown = "" if isinstance(first["input"], dict | list) else f" (it is {reprlib.repr(first['input'])})"
    return UserError(where, what + shown, mend)


def make_config(values: dict[str, Any]) -> Config:
    """Plain values to a config.

    Raises:
        UserError: a field is unknown or of the wrong type, or fields do not fit each other.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _at("", error, Config) from error


def load_config(file: Path, overrides: list[str]) -> Config:
    """Reads a config file, what it extends, and the overrides of the command line."""
    # Overrides reach into the default stages too.
    values = {"stages": Config().model_dump(by_alias=True)["stages"]} | read_values(file)
    for override in overrides:
        values = _override(values, override)
    return make_config(values)


def dump_config(config: Config) -> str:
    """The resolved config as YAML. It holds no secret: keys are named by their environment variable."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
