"""The config: files and overrides in, frozen classes out, and what is told where they are wrong."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
import pytest

from gadjax.algorithms.gad import GadConfig
from gadjax.algorithms.registry import ALGORITHMS
from gadjax.algorithms.seqkd import SeqkdConfig
from gadjax.algorithms.warmup import WarmupConfig
from gadjax.config import Config, dump_config, load_config, make_config, parse_yaml
from gadjax.errors import UserError
from gadjax.models.decoder import DecoderConfig
from gadjax.section import Section
from gadjax.sharding import MeshConfig, make_mesh
from gadjax.steps import Models, Programs

SHIPPED = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
DIMS = DecoderConfig(vocabulary=64, width=16, layers=1, heads=2, kv_heads=1, head_width=8, feed_forward=32)

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a config file with this text."""
    monkeypatch.chdir(tmp_path)

    def load(text: str = "", *overrides: str) -> Config:
        Path("c.yaml").write_text(text)
        return load_config(Path("c.yaml"), list(overrides))

    return load


def told(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as mistake:
        load(text, *overrides)
    return str(mistake.value)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_is_built(file: Path):
    config = load_config(file, []).model_copy(update={"mesh": MeshConfig()})  # its own may want other devices than there are
    models = Models.of(config, replace(DIMS, width=128))  # wider than adapters are
    assert config.stages
    for name in config.stages:
        programs = Programs.of(config, name, 100, models, end_of_turn=1)
        state = models.abstract_state(programs.algorithm.discriminator is not None)
        assert programs.discriminator_rows().groups == config.stages[name].batch_groups
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.student.params))


def test_defaults_that_others_rely_on(load: Load):
    config = load()
    assert (config.run.name, config.run.folder, config.run.seed) == ("quickstart", "runs", 0)
    teacher = config.teacher
    assert (teacher.backend, teacher.model, teacher.base_url, teacher.api_key_env) == ("openai", "gpt-5-chat", None, "OPENAI_API_KEY")
    assert (teacher.temperature, teacher.samples, teacher.concurrency, teacher.max_cost) == (1.0, 1, 16, 20.0)
    assert (config.prompts.train, config.prompts.validation) == (None, None)
    assert config.student.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (2048, 1536)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, -1, 1)
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 0.01, 0.2)


def test_default_stages_are_the_papers(load: Load):
    stages = load().stages
    assert list(stages) == ["seqkd", "warmup", "gad"]
    seqkd, warmup, gad = stages.values()
    assert isinstance(seqkd, SeqkdConfig) and isinstance(warmup, WarmupConfig) and isinstance(gad, GadConfig)
    assert (seqkd.from_, seqkd.epochs, seqkd.learning_rate) == ("student", 3, 5e-6)
    assert (warmup.from_, warmup.epochs, warmup.learning_rate) == ("student", 1, 5e-6)
    assert (warmup.discriminator.learning_rate, warmup.discriminator.only_first_steps) == (1e-6, 10)
    assert (gad.from_, gad.epochs, gad.max_steps, gad.batch_groups, gad.group_size) == ("warmup", 2, None, 256, 8)
    assert (gad.temperature, gad.learning_rate, gad.kl_weight) == (0.8, 1e-6, 0.001)
    assert (gad.discriminator.learning_rate, gad.discriminator.train) == (1e-6, True)


def test_a_stage_that_says_no_more_than_its_algorithm_is_the_papers(load: Load):
    stages = load("stages: {s: {algorithm: seqkd}, w: {algorithm: warmup}, g: {algorithm: gad}}").stages
    assert [(stage.epochs, stage.learning_rate) for name, stage in stages.items() if name in "swg"] == [(3, 5e-6), (1, 5e-6), (2, 1e-6)]


def test_a_config_survives_being_written(load: Load):
    stages = "stages: {w: {algorithm: warmup, max_steps: 3}, g: {algorithm: gad, from: w, discriminator: {train: false, from: student}}}"
    config = load(f"student: {{random: {{width: 16}}}}\nteacher: {{price: {{input: 1, output: 2}}}}\n{stages}")
    text = dump_config(config)
    assert load(text) == config
    assert "from: w\n" in text and "from_" not in text
    assert dump_config(load(text)) == text


@pytest.mark.parametrize(
    ("text", "field", "mend"),
    [
        ("runn: {}", "runn", "did you mean `run`?"),
        ("zzz: 1", "zzz", "known are run, teacher, "),
        ("teacher: {modle: x}", "teacher.modle", "did you mean `model`?"),
        ("teacher: {price: {imput: 1, output: 1}}", "teacher.price.imput", "did you mean `input`?"),
        ("student: {random: {witdh: 8}}", "student.random.witdh", "did you mean `width`?"),
        ("stages: {s: {algorithm: seqkd, fron: student}}", "stages.s.fron", "did you mean `from`?"),
        ("stages: {s: {algorithm: seqkd, group_size: 2}}", "stages.s.group_size", "known are "),
        ("stages: {g: {algorithm: gad, discriminator: {trian: true}}}", "stages.g.discriminator.trian", "did you mean `train`?"),
        (
            "stages: {w: {algorithm: warmup, discriminator: {only_first_step: 1}}}",
            "stages.w.discriminator.only_first_step",
            "did you mean `only_first_steps`?",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(load: Load, text: str, field: str, mend: str):
    message = told(load, text)
    assert message.startswith(f"{field}: there is no such field; ")
    assert mend in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: one}", "run.seed: must be a valid integer (it is 'one'); "),
        ("run: {seed: 1.5}", "run.seed: "),
        (f"run: {{seed: {'x' * 1000}}}", "run.seed: must be a valid integer (it is 'xxxxxxxxxxxx...xxxxxxxxxxxxx'); "),
        ("run: {seed: true}", "run.seed: must be a valid integer (it is True); "),
        ("run: {seed: -1}", "run.seed: must be greater than or equal to 0 (it is -1); "),
        ("run: {name: no}", "run.name: must be a text (it is False); write it in quotes"),
        ("run: {name: 2026-01-31}", "run.name: must be a text (it is datetime.date(2026, 1, 31)); write it in quotes"),
        ("run: 5", "run: must be a section (it is 5); write its fields, as `key: value`"),
        ("run: [1]", "run: must be a section; "),
        ("student: {random: 3}", "student.random: must be a section (it is 3); "),
        ("teacher: {backend: opnai}", "teacher.backend: must be 'openai', 'tutor' or 'file' (it is 'opnai'); "),
        ("teacher: {price: {input: 1}}", "teacher.price.output: is missing; give it"),
        ("mesh: {fsdp: 0}", "mesh.fsdp: must be -1 (all the devices that are left) or at least 1 (it is 0); "),
        ("stages: {g: {algorithm: gad, group_size: 1}}", "stages.g.group_size: must be greater than or equal to 2 (it is 1); "),
        ("stages: {g: {algorithm: gad, learning_rate: '1'}}", "stages.g.learning_rate: must be a valid number (it is '1'); "),
        ("stages: {g: {algorithm: gad, learning_rate: .nan}}", "stages.g.learning_rate: "),
        ("stages: {g: {algorithm: gad, discriminator: {train: 1}}}", "stages.g.discriminator.train: must be a valid boolean (it is 1); "),
        ("stages: {g: {algorithm: gda}}", "stages.g.algorithm: 'gda' is no algorithm; use one of seqkd, warmup, gad"),
        ("stages: {g: {epochs: 1}}", "stages.g.algorithm: must name an algorithm; use one of seqkd, warmup, gad"),
        ("stages: {g: {algorithm: [gad]}}", "stages.g.algorithm: must name an algorithm; "),
        ("stages: {g: null}", "stages.g: must be a section (it is None); "),
        ("teachers: {mini: {modle: x}}", "teachers.mini.modle: there is no such field; did you mean `model`?"),
        ("stages: []", "stages: must be a section; "),
        ("stages: {}", "stages: there are none; "),
        (
            "data: {max_prompt_tokens: 8, max_response_tokens: 8, row_tokens: 15}",
            "data.row_tokens: 15 is less than a prompt and a response; ",
        ),
    ],
)
def test_a_wrong_value_names_its_field(load: Load, text: str, message: str):
    assert told(load, text).startswith(message)


def numbers(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of a section, and of those in it, that hold a number."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if isinstance(kind, type)]
        here = (*path, field.alias or name)
        if get_origin(field.annotation) is dict:
            here = (*here, "mini")
        if {int, float} & {*kinds}:
            yield here
        for kind in kinds:
            if issubclass(kind, Section):
                yield from numbers(kind, here)


OF_STAGES = [("stages", name, *path) for name, entry in ALGORITHMS.items() for path in numbers(entry.config)]
PRICED = {"price": {"input": 1.0, "output": 1.0}}
NEEDED = {
    "teacher": PRICED,
    "teachers": {"mini": copy.deepcopy(PRICED)},
    "stages": {name: {"algorithm": name, "select": {"metric": "loss"}} for name in ALGORITHMS},
    "evaluation": {"judge": copy.deepcopy(PRICED)},
}


@pytest.mark.parametrize("path", [*numbers(Config), *OF_STAGES], ids=".".join)
def test_no_number_may_be_negative(path: tuple[str, ...]):
    values = copy.deepcopy(NEEDED)
    *sections, name = path
    section: dict[str, Any] = values
    for key in sections:
        section = section.setdefault(key, {})
    section[name] = -2
    with pytest.raises(UserError, match=rf"^{'.'.join(path)}: must be .* \(it is -2\); mend it in the config or on the command line"):
        make_config(values)


def test_the_numbers_are_found():
    paths = {".".join(path) for path in [*numbers(Config), *OF_STAGES]}
    assert {"run.seed", "data.row_tokens", "student.random.width", "mesh.fsdp", "teacher.price.input", "optimizer.clip_norm"} <= paths
    assert {"stages.gad.group_size", "stages.warmup.discriminator.only_first_steps", "stages.seqkd.schedule.floor"} <= paths
    assert len(paths) > 60


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", ".", "..", "", "-x", "a b", "a\\b", "a\n"])
def test_a_runs_name_is_no_path(load: Load, name: str):
    with pytest.raises(UserError, match=r"^run\.name: must be a plain name"):
        make_config({"run": {"name": name}})
    with pytest.raises(UserError, match=r"^stages: .* is no name for a stage"):
        make_config({"stages": {name: {"algorithm": "seqkd"}}})


def test_a_run_lies_in_its_folder(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("run: {name: a, folder: some/where}").run.path == Path("some/where/a")
    assert load("run: {name: a, folder: ~/runs}").run.path == tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{g: {algorithm: gad, from: warmup}}", "stages.g.from: 'warmup' is not an earlier stage; use student"),
        ("{g: {algorithm: gad, from: g}}", "stages.g.from: 'g' is not an earlier stage; use student"),
        (
            "{g: {algorithm: gad, from: w}, w: {algorithm: warmup}}",
            "stages.g.from: 'w' is not an earlier stage; use student",
        ),
        (
            "{s: {algorithm: seqkd}, g: {algorithm: gad, from: s, discriminator: {from: s}}}",
            "stages.g.discriminator.from: 's' is not an earlier stage that has one; use student",
        ),
        (
            "{w: {algorithm: warmup}, g: {algorithm: gad, discriminator: {from: v}}}",
            "stages.g.discriminator.from: 'v' is not an earlier stage that has one; use student or w",
        ),
        ("{student: {algorithm: seqkd}}", "stages: 'student' is no name for a stage; "),
        ("{1: {algorithm: seqkd}}", "stages.1.[key]: must be a text"),
    ],
)
def test_stages_start_from_earlier_ones(load: Load, stages: str, message: str):
    assert told(load, f"stages: {stages}").startswith(message)


def test_the_evaluation_names_stages(load: Load):
    message = "evaluation.export: 'gda' is not a stage; use seqkd or warmup or gad"
    assert told(load, "evaluation: {export: gda}") == message
    assert load("evaluation: {export: seqkd}").evaluation.export == "seqkd"


def test_a_student_is_given_or_made(load: Load):
    assert load("student: {path: some/folder}").student.path == "some/folder"
    made = load("student: {random: {width: 16}}").student
    assert made.path is None and made.random is not None and made.random.width == 16
    assert load("student: {path: null, random: {}}").student.random is not None
    assert told(load, "student: {path: a, random: {}}").startswith("student: has both `path` and `random`: leave one out")
    assert told(load, "student: {path: null}").startswith("student: has neither `path` nor `random`; ")


def test_a_mesh_that_does_not_fill_the_devices():
    with pytest.raises(UserError, match=r"^mesh: data 3 x fsdp 2 x context 1 x tensor 1 does not make 8 devices; choose sizes"):
        make_mesh(make_config({"mesh": {"data": 3}}).mesh)
    with pytest.raises(UserError, match=r"^mesh: data 1 x fsdp 1 x context 1 x tensor 16 does not make 8 devices"):
        make_mesh(make_config({"mesh": {"tensor": 16}}).mesh)
    assert make_mesh(make_config({"mesh": {"data": 2, "tensor": 2}}).mesh).shape == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_0e1", 100.0),
        ("10", 10),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: Any):
    found = parse_yaml(text, "")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1", "c.yaml, line 1: is not YAML ("),
        ("run:\n  seed: 1\n name: a", "c.yaml, line 3: is not YAML ("),
        ("run: {}\nrun: {}", "c.yaml, line 1: is not YAML (`run` is there twice); "),
        ("stages:\n  g: {algorithm: gad}\n  g: {algorithm: gad}", "c.yaml, line 2: is not YAML (`g` is there twice); "),
        ("run: {name: 2026-13-01}", "c.yaml: is not YAML (month must be in 1..12); "),
        ("run: !!python/object/apply:os.getcwd []", "c.yaml, line 1: is not YAML (could not determine a constructor"),
        ("[" * 5000, "c.yaml: is not YAML ("),
        ("\x00", "c.yaml: is not YAML ("),
        ("- run", "c.yaml: is not a mapping of sections; "),
        ("run", "c.yaml: is not a mapping of sections; "),
    ],
    ids=range(10),
)
def test_what_is_no_config_names_the_file(load: Load, text: str, message: str):
    found = told(load, text)
    assert found.startswith(message)
    assert "\n" not in found and len(found) < 300


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); name a config file"):
        load_config(tmp_path / "missing.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(UserError, match=r"binary.yaml cannot be read \('utf-8' codec"):
        load_config(tmp_path / "binary.yaml", [])


PLACES = ["run: {}", "zzz: {}", "run: {{name: {}}}", "stages: {{g: {{algorithm: {}}}}}", "evaluation: {{export: {}}}", "extends: {}"]


@pytest.mark.parametrize("place", PLACES)
def test_aliases_that_multiply_are_told_in_a_short_line(load: Load, place: str):
    text = "1"
    for level in range(12):  # each level holds the one before nine times: written out the last has some terabytes
        text = f"[&l{level} {text}{f', *l{level}' * 8}]"
    assert len(told(load, place.format(text))) < 300


# --- extends and overrides --------------------------------------------------------------------------------------------


def test_extends_merges_values_section_by_section(load: Load, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text(
        "extends: root.yaml\nrun: {name: base}\nmesh: {tensor: 2}\nstages: {g: {algorithm: gad, epochs: 7}}"
    )
    (tmp_path / "sub" / "root.yaml").write_text("run: {name: root, seed: 5}\nteacher: {model: m}")
    config = load("extends: sub/base.yaml\nrun: {name: mine}\nstages: {g: {group_size: 4}}")
    assert (config.run.name, config.run.seed, config.teacher.model, config.mesh.tensor) == ("mine", 5, "m", 2)
    gad = config.stages["g"]
    assert isinstance(gad, GadConfig) and (gad.epochs, gad.group_size) == (7, 4)
    assert list(config.stages) == ["g"]


def test_extends_refuses_circles(load: Load, tmp_path: Path):
    assert told(load, "extends: c.yaml") == "c.yaml: extends: c.yaml extends this file, itself or by others; break the circle"
    (tmp_path / "b.yaml").write_text("extends: c.yaml")
    assert told(load, "extends: b.yaml").endswith("b.yaml: extends: c.yaml extends this file, itself or by others; break the circle")


def test_extends_names_the_file_that_asks_for_a_missing_one(load: Load, tmp_path: Path):
    assert told(load, "extends: missing.yaml").startswith(
        f"{tmp_path}/c.yaml: extends: {tmp_path}/missing.yaml cannot be read (No such file"
    )


def test_overrides_are_typed_nested_and_last(load: Load):
    text = "run: {seed: 1}\nstages: {g: {algorithm: gad}}"
    overrides = [
        "run.seed=2",
        "run.seed=3",
        "stages.g.learning_rate=1e-5",
        "stages.g.discriminator.train=false",
        "prompts.validation=",
        "mesh={data: 2}",
    ]
    config = load(text, *overrides, "run.name=a_b", "teacher.base_url=http://127.0.0.1:1/v1")
    gad = config.stages["g"]
    assert isinstance(gad, GadConfig)
    assert (config.run.seed, gad.learning_rate, gad.discriminator.train) == (3, 1e-5, False)
    assert (config.prompts.validation, config.mesh.data, config.run.name) == (None, 2, "a_b")
    assert config.teacher.base_url == "http://127.0.0.1:1/v1"


def test_overrides_reach_the_default_stages(load: Load):
    stages = load("", "stages.gad.max_steps=100").stages
    assert list(stages) == ["seqkd", "warmup", "gad"]
    assert (stages["gad"].max_steps, stages["gad"].from_, stages["seqkd"].max_steps) == (100, "warmup", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "run.seed: is not an override; write key.path=value, for example run.seed=1"),
        ("=5", "=5: is not an override; "),
        ("run.sed=5", "run.sed: there is no such field; did you mean `seed`?"),
        ("run.seed=x", "run.seed: must be a valid integer (it is 'x'); "),
        ("run.name=[", "run.name=[, line 1: is not YAML ("),
        ("run..seed=5", "run.: there is no such field; "),
        ("extends=other.yaml", "extends: there is no such field; "),
    ],
)
def test_a_malformed_override(load: Load, override: str, message: str):
    assert told(load, "", override).startswith(message)
