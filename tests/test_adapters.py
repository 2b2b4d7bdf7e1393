"""Adapters: one frozen base for student, discriminator and reference. As a model, as a run on 8 devices, as an exported folder."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gadjax.algorithms.forward import response_log_probs, response_scores
from gadjax.algorithms.gad import make_score
from gadjax.algorithms.seqkd import make_sequence_log_probs
from gadjax.completions import Ask
from gadjax.config import Config, make_config
from gadjax.data.packing import RowShape, pack
from gadjax.data.pipeline import batches
from gadjax.errors import UserError
from gadjax.export import export_discriminator, export_stage
from gadjax.metrics import read
from gadjax.models.adapters import ADAPTED, AdaptersConfig, folded, without
from gadjax.models.checkpoint import load, read_config
from gadjax.models.decoder import DecoderConfig, discriminator, discriminator_params, language_model
from gadjax.origins import check_origins
from gadjax.prepare import check_student
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.speaking import Room, scorer_of, speaker_of
from gadjax.steps import Models
from gadjax.train import open_stage, train_stage
from gadjax.types import MicroBatch, Params
from tests import tiny

pytestmark = pytest.mark.timeout(600)

F32 = jnp.dtype(jnp.float32)
DIMS = DecoderConfig(vocabulary=13, width=16, layers=2, heads=4, kv_heads=2, head_width=4, feed_forward=24, init_std=0.3, tied=False)
ADAPTERS = AdaptersConfig(rank=4)
PLAIN, STUDENT, JUDGE = language_model(DIMS, F32), language_model(DIMS.adapted(ADAPTERS), F32), discriminator(DIMS.adapted(ADAPTERS), F32)
BASE = jax.jit(PLAIN.init)(jax.random.key(0))
FRESH = without(jax.jit(STUDENT.init)(jax.random.key(1)), BASE)
PROMPTS, SAMPLES = [[1, 2, 3], [4]], [[[2, 3, 12], [5, 12]], [[4, 4, 4, 12], [6, 7, 8]]]
ONE_EACH = RowShape(groups=2, micro_batches=1, rows=4, length=32)
ROWS = pack(PROMPTS, SAMPLES, RowShape(groups=2, micro_batches=1, rows=2, length=10))
MICRO = MicroBatch(jax.tree.map(lambda cell: cell[0], ROWS.cells), jnp.ones((2, 2), bool), ROWS.ends_BJ, ROWS.total)


def moved(params: Params, seed: int, by: float = 0.1) -> Params:
    """Other parameters near these."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + by * rng.standard_normal(leaf.shape).astype(np.float32), params)


@jax.jit
def log_probs(base: Params, params: Params) -> jax.Array:
    return response_log_probs(STUDENT.on(base), params, MICRO.cells, 0.8)[0]


def assert_same(one: object, two: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_close(one: object, two: object, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, two)


# --- as a model -------------------------------------------------------------------------------------------------------


def test_fresh_adapters_leave_the_base_as_it_is_bit_for_bit():
    assert {name[:-2] for name in FRESH["trunk"]["blocks"]} == set(ADAPTED), "every matrix of a block, and nothing else"
    assert not any(np.any(leaf) for name, leaf in FRESH["trunk"]["blocks"].items() if name.endswith("_b"))
    plain = jax.jit(lambda base: response_log_probs(PLAIN, base, MICRO.cells, 0.8)[0])(BASE)
    np.testing.assert_array_equal(log_probs(BASE, FRESH), plain)
    np.testing.assert_array_equal(log_probs(BASE, moved(FRESH, 0)) == plain, np.asarray(plain) == 0)  # trained ones do not


def test_a_is_drawn_so_that_what_comes_out_is_as_large_as_what_goes_in():
    wide = jax.jit(language_model(replace(DIMS, width=64).adapted(ADAPTERS), F32).init)(jax.random.key(0))["trunk"]["blocks"]
    for name, inputs in ADAPTED.items():
        weight, a, b = wide[name], wide[f"{name}_a"], wide[f"{name}_b"]
        ins, outs = weight.shape[1 : 1 + inputs], weight.shape[1 + inputs :]
        assert a.shape == (2, *ins, 4) and b.shape == (2, 4, *outs)
        assert np.std(a) == pytest.approx(math.prod(ins) ** -0.5, rel=0.2)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_adapters_are_what_they_are_in_the_matrices(alpha: float | None, scale: float):
    adapters = AdaptersConfig(rank=4, alpha=alpha)
    assert adapters.scale == scale
    network, own = language_model(DIMS.adapted(adapters), F32).on(BASE), moved(FRESH, 2)
    merged = folded(network.whole(own), adapters)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, BASE)
    assert float(np.abs(merged["trunk"]["blocks"]["down"] - BASE["trunk"]["blocks"]["down"]).max()) > 0.01
    one = jax.jit(lambda params: response_log_probs(network, params, MICRO.cells, 0.8)[0])(own)
    two = jax.jit(lambda params: response_log_probs(PLAIN, params, MICRO.cells, 0.8)[0])(merged)
    assert_close(one, two)


def test_gradients_are_those_of_the_adapters_alone():
    """What is differentiated is what a role holds; the base is an argument of the step like the rows."""

    def loss(base: Params, own: Params) -> jax.Array:
        return jnp.sum(response_scores(JUDGE.on(base), own, MICRO))

    judge = discriminator_params(JUDGE, moved(FRESH, 3), jax.random.key(4))
    assert set(judge) == {"trunk", "head"} and set(judge["trunk"]) == {"blocks"}
    grads = jax.jit(jax.grad(loss, argnums=1))(BASE, judge)
    assert jax.tree.structure(grads) == jax.tree.structure(judge)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "adapters", [{"rank": 0}, {"rank": 4, "alpha": 0}, {"rank": 4, "alpha": float("inf")}, {"rnak": 4}, {"rank": 2.5}, 64]
)
def test_nonsense_is_refused_in_one_line(adapters: object):
    with pytest.raises(UserError, match=r"^adapters[^\n]*; [^\n]*$"):
        make_config({"adapters": adapters})


def test_adapters_as_wide_as_the_student_are_refused_before_anything_is_paid():
    config = make_config({"student": {"random": {"width": 16, "heads": 2, "kv_heads": 1}}, "adapters": {"rank": 16}})
    with pytest.raises(UserError, match=r"^adapters.rank: 16 is not less than the student's width, 16; make it smaller$"):
        check_student(Run(config, Path("runs/nowhere")))


# --- on the devices ---------------------------------------------------------------------------------------------------


def test_they_lie_on_the_mesh_as_their_matrix_does_and_each_base_once():
    config = make_config({"student": {"compute_dtype": "bfloat16"}, "mesh": {"data": 2, "tensor": 2}, "adapters": {"rank": 4}})
    models = Models.of(config, DIMS)
    blocks = models.abstract_role(models.student).params["trunk"]["blocks"]
    assert {name: blocks[name].sharding.spec for name in ("gate_a", "gate_b", "down_a", "down_b")} == {
        "gate_a": PartitionSpec(None, ("fsdp",), None),
        "gate_b": PartitionSpec(None, ("fsdp",), ("tensor",)),
        "down_a": PartitionSpec(None, ("tensor",), ("fsdp",)),
        "down_b": PartitionSpec(None, None, ("fsdp",)),
    }
    assert set(models.abstract_role(models.discriminator).params) == {"trunk", "head"}
    assert set(models.base) == {"trunk", "unembedding"}
    assert {leaf.dtype for leaf in jax.tree.leaves(models.base["trunk"]["blocks"]["gate"])} == {jnp.dtype("bfloat16")}
    moments = models.abstract_role(models.student).optimizer[1][0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(models.abstract_reference()) == jax.tree.structure(FRESH)
    for network in (models.student, models.discriminator):
        whole = models.whole(network, models.abstract_role(network).params)
        assert whole["trunk"]["embedding"] is models.base["trunk"]["embedding"]
        assert whole["trunk"]["blocks"]["gate"] is models.base["trunk"]["blocks"]["gate"]


# --- as a run ---------------------------------------------------------------------------------------------------------

CONFIG = """
run: {name: tiny}
teacher: {backend: file, path: answers.jsonl}
student: {random: {width: 16, layers: 1, heads: 2, kv_heads: 1, feed_forward: 32, words: 60}, compute_dtype: float32}
adapters: {rank: 4}
data: {max_prompt_tokens: 16, max_response_tokens: 16, row_tokens: 64}
mesh: {data: 2, fsdp: 2, tensor: 2}
stages:
  seqkd: {algorithm: seqkd, max_steps: 2, batch_groups: 8, learning_rate: 1e-3}
  warmup:
    {algorithm: warmup, max_steps: 3, batch_groups: 8, group_size: 2, learning_rate: 1e-3,
     discriminator: {only_first_steps: 1, learning_rate: 1e-3}}
  gad:
    {algorithm: gad, from: warmup, max_steps: 4, batch_groups: 8, group_size: 2, learning_rate: 1e-3, checkpoint_every: 2,
     discriminator: {learning_rate: 1e-3}}
evaluation: {validation_groups: 8, batch_groups: 8}
"""
# Trained; what came of it set aside; and trained again from the checkpoint before the last.
AGAIN = """
import shutil
from gadjax.cli import main

def gadjax(part):
    try:
        main([part, "tiny.yaml"])
    except SystemExit as ended:
        if ended.code:
            raise

gadjax("collect")
gadjax("train")
shutil.copytree("runs/tiny", "whole")
shutil.rmtree("runs/tiny/stages/gad/checkpoints/4")
gadjax("train")
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """All three stages with adapters on 8 devices, in `whole`; in `run` the same, taken up again after step 2 of gad."""
    made = tiny.Tiny.make(tmp_path_factory.getbasetemp(), "adapters", CONFIG)
    texts = [{"prompt": f"say {number}", "response": "so " * (number % 5) + str(number)} for number in range(48)]
    (made.folder / "answers.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    environment = made.environment | {"XLA_FLAGS": tiny.on_devices(8)}
    done = subprocess.run([sys.executable, "-c", AGAIN], cwd=made.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gad: goes on after step 2" in done.stderr
    return made


@pytest.fixture(scope="module")
def session(experiment: tiny.Tiny) -> Session:
    return session_at(experiment.folder / "whole")


def session_at(run: Path, **overrides: object) -> Session:
    opened = Run.at(run)
    config = make_config(opened.config.model_dump(by_alias=True) | overrides)
    return Session.open(replace(opened, config=config), run / "student")


def test_a_run_taken_up_again_ends_with_the_same_bits(experiment: tiny.Tiny, session: Session):
    again = session_at(experiment.run)
    for role in ("student", "discriminator"):
        assert_same(again.final_role("gad", role), session.final_role("gad", role))


def test_checkpoints_hold_adapters_heads_and_their_optimizers(session: Session):
    for role, extra in (("student", set()), ("discriminator", {("head",)})):
        folder = session.run.checkpoints("gad") / "4" / role
        saved = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
        paths = {tuple(key["key"] for key in each["key_metadata"]) for each in saved}
        names = {path[-1] for path in paths if path[-2:-1] == ("blocks",)}
        assert names == {f"{name}_{side}" for name in ADAPTED for side in "ab"}
        assert {path[1:] for path in paths if path[0] == "params" and "blocks" not in path} == extra


def test_every_stage_stands_on_the_same_base(session: Session):
    base = load(session.folder, session.family, language_model(session.dims, F32).shapes)
    assert_same(session.models.base, base)  # nothing has changed it, and there is no other one
    first = session.first_state("warmup")
    assert first.discriminator is not None
    assert_same(first.discriminator.params["trunk"], first.student.params["trunk"])
    assert not any(np.any(leaf) for name, leaf in first.student.params["trunk"]["blocks"].items() if name.endswith("_b"))
    assert (
        session.models.whole(session.models.student, first.student.params)["trunk"]["embedding"]
        is session.models.base["trunk"]["embedding"]
    )
    assert_same(session.first_state("seqkd").student.params, first.student.params)


def test_the_reference_is_the_warmed_up_student(session: Session):
    stage, warmed = open_stage(session, "gad"), session.final_role("warmup", "student").params
    assert stage.reference is not None
    assert_same(stage.reference, warmed)
    assert any(np.any(leaf) for name, leaf in warmed["trunk"]["blocks"].items() if name.endswith("_b")), "it has learned"
    rows = read(session.run.stage("gad") / "metrics.jsonl")
    assert rows[1]["student/kl"] < 1e-12 < 1e-7 < rows[-1]["student/kl"]
    assert all(row["rollout/logp_gap"] < 1e-5 for row in rows[1:]), "the sampler's log-probabilities are not the trainer's"
    assert rows[0]["discriminator/probe_gap"] < 1e-5


def test_one_device_computes_what_eight_do(session: Session):
    config = make_config(session.run.config.model_dump(by_alias=True) | {"mesh": {}})
    models = Models.of(config, session.dims, jax.devices()[:1]).standing(session.folder, session.family)
    stage = open_stage(replace(session, run=replace(session.run, config=config), models=models), "gad")
    data = iter(batches(session.snapshot.train, 8, 0))
    for row in read(session.run.stage("gad") / "metrics.jsonl")[1:3]:
        found = stage.step(int(row["step"]) - 1, next(data)).fetch()
        names = [name for name in found if name.startswith(("student/", "discriminator/")) or name == "rollout/length_mean"]
        assert len(names) > 10
        assert_close({name: found[name] for name in names}, {name: row[name] for name in names})


def test_exports_have_the_adapters_in_their_matrices(session: Session, tmp_path: Path):
    prompts = [session.snapshot.validation[index].tokens.prompt for index in range(2)]
    rows = pack(prompts, [[session.snapshot.validation[index].tokens.teacher] for index in range(2)], ONE_EACH)
    models, plain = session.models, {"student": language_model, "discriminator": discriminator}
    programs = {
        "student": models.program(lambda student, _: make_sequence_log_probs(student)),
        "discriminator": models.program(lambda _, judge: make_score(judge)),
    }
    for role, export in (("student", export_stage), ("discriminator", export_discriminator)):
        folder = export(session, "warmup")
        family, dims = read_config(folder, classifier=role == "discriminator")
        assert dims == session.dims, "no adapter is told of"
        network = plain[role](dims, F32)
        make = make_sequence_log_probs if role == "student" else make_score
        merged = jax.jit(make(network))(load(folder, family, network.shapes), rows)
        unmerged = programs[role](session.final_role("warmup", role).params, models.place_rows(rows))
        assert_close(merged, unmerged)
        fresh = programs[role](jax.tree.map(jnp.zeros_like, session.final_role("warmup", role).params), models.place_rows(rows))
        assert float(np.abs(np.asarray(merged) - np.asarray(fresh)).max()) > 1e-3, "the adapters say something"


@pytest.mark.slow
def test_the_whole_command_runs_and_what_came_out_speaks_and_chooses(tmp_path: Path):
    made = tiny.Tiny.make(tmp_path, "adapted", tiny.CONFIG + "adapters: {rank: 4}\n")
    done = made.gadjax("run", "tiny.yaml", "evaluation.best_of=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((made.run / "summary.json").read_text())
    assert list(summary["stages"]) == ["student", "seqkd", "warmup", "gad"]
    assert (made.run / "export" / "gad" / "model.safetensors").is_file()
    opened, room = session_at(made.run), Room(prompt_tokens=16, response_tokens=8, places=1, best_of=2)
    with speaker_of(opened, "gad", room, scorer_of(opened, "gad", room)) as speaker:
        (piece,) = speaker.complete(Ask(messages=({"role": "user", "content": "a"},), temperature=1.0, seed=0))
    assert piece.finish and piece.score is not None and math.isfinite(piece.score)


# --- what it may start from -------------------------------------------------------------------------------------------


def with_stage(session: Session, origin: str, **sections: object) -> Config:
    return make_config(
        session.run.config.model_dump(by_alias=True) | {"stages": {"next": {"algorithm": "seqkd", "from": origin}}} | sections
    )


def test_a_stage_of_another_run_gives_its_adapters(session: Session):
    origin = str(session.run.folder / "gad")
    config = with_stage(session, origin)
    check_origins(config)
    state = replace(session, run=replace(session.run, config=config)).first_state("next")
    assert_same(state.student.params, session.final_role("gad", "student").params)


def test_what_has_other_adapters_or_none_is_refused_with_the_mend(session: Session):
    stage, folder = str(session.run.folder / "gad"), str(session.folder)
    mend = r"; give both the same, or export that stage and start from it as student\.path$"
    for origin, adapters, told in (
        (stage, None, "has adapters of rank 4 and scale 2, this config no adapters"),
        (stage, {"rank": 8}, "has adapters of rank 4 and scale 2, this config adapters of rank 8 and scale 2"),
        (stage, {"rank": 4, "alpha": 4.0}, "has adapters of rank 4 and scale 2, this config adapters of rank 4 and scale 1"),
        (folder, {"rank": 4}, "has no adapters, this config adapters of rank 4 and scale 2"),
    ):
        with pytest.raises(UserError, match=rf"^stages\.next\.from: {origin} {told}{mend}"):
            check_origins(with_stage(session, origin, adapters=adapters))


def test_adapters_of_other_weights_are_refused(session: Session, tmp_path: Path):
    copy = Path(shutil.copytree(session.run.folder, tmp_path / "copy"))
    shutil.rmtree(copy / "student")
    export_stage(session, "seqkd").rename(copy / "student")
    other = session_at(copy)
    told = r"was trained as adapters of other weights than this run's student has; bring the student's weights back"
    with pytest.raises(UserError, match=told):
        other.student_params("gad")
    shutil.rmtree(copy / "stages" / "gad" / "checkpoints" / "4")
    with pytest.raises(UserError, match="student"):
        train_stage(other, "gad")
    config = with_stage(session, str(session.run.folder / "gad"))
    with pytest.raises(UserError, match=told):
        replace(other, run=replace(other.run, config=config)).first_state("next")


def unfinished(config: Config) -> Config:
    return config.model_copy(update={"stages": config.stages | {"gad": config.stages["gad"].model_copy(update={"max_steps": 5})}})
