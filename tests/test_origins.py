"""Stages that start from another run's stage or from a Hugging Face folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.config import Config, make_config
from gadjax.errors import UserError
from gadjax.export import export_discriminator
from gadjax.models.checkpoint import save
from gadjax.models.decoder import language_model
from gadjax.origins import check_origins, discriminator_dims, role_from
from gadjax.runs import Run
from gadjax.session import Session
from tests import tiny

SMALL = {"width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "feed_forward": 16}
pytestmark = pytest.mark.timeout(600)  # the first test may wait for a whole run


@pytest.fixture
def session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Session:
    """The finished experiment's."""
    experiment, _ = tiny.finished(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(experiment.folder)
    run = Path("runs/tiny")
    return Session.open(Run.at(run), run / "student")


def with_stage(session: Session, **stage: object) -> Session:
    values = session.run.config.model_dump(by_alias=True) | {"stages": {"next": {"algorithm": "gad"} | stage}}
    values["evaluation"] = {}
    return replace(session, run=replace(session.run, config=make_config(values)))


def assert_same(one: object, two: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_stage_of_another_run_gives_both_models_and_their_moments(session: Session):
    state = with_stage(session, **{"from": "runs/tiny/warmup"}).first_state("next")
    for role, found in state._asdict().items():
        there = session.final_role("warmup", role)
        assert_same(found.params, there.params)
        assert_same(found.optimizer[1][0], there.optimizer[1][0])  # Adam's
        assert (found.optimizer[1][2].count, there.optimizer[1][2].count) == (0, {"student": 4, "discriminator": 6}[role])


def test_a_stage_without_discriminator_gives_a_fresh_one(session: Session):
    other = with_stage(session, **{"from": "runs/tiny/seqkd"})
    state = other.first_state("next")
    assert state.discriminator is not None
    assert_same(state.discriminator.params["trunk"], state.student.params["trunk"])


def test_exported_folders_give_both_models(session: Session):
    export_discriminator(session, "gad")
    origins = {"from": "runs/tiny/export/gad", "discriminator": {"from": "runs/tiny/export/gad-discriminator"}}
    state = with_stage(session, **origins).first_state("next")
    assert_same(state.student.params, session.student_params("gad"))
    assert state.discriminator is not None
    assert_same(state.discriminator.params, session.final_role("gad", "discriminator").params)
    assert state.student.optimizer[1][0].count == 0
    shutil.rmtree("runs/tiny/export/gad-discriminator")


def config_from(origin: str) -> Config:
    return make_config({"stages": {"one": {"algorithm": "gad", "discriminator": {"from": origin}}}})


@pytest.mark.parametrize("origin", ["runs/tiny/wramup", "runs/tniy/warmup", "./nowhere", "runs/tiny/export"])
def test_an_origin_that_is_not_there_is_told_at_once(session: Session, origin: str):
    with pytest.raises(UserError, match=f"^stages.one.discriminator.from: {origin} is neither a Hugging Face folder nor a trained stage"):
        check_origins(config_from(origin))
    check_origins(config_from("runs/tiny/gad"))


@pytest.mark.parametrize("referee", ["runs/tiny/seqkd", "runs/tiny/export/gad", "runs/tiny", "gad"])
def test_a_referee_without_a_discriminator_is_told_at_once(session: Session, referee: str):
    with pytest.raises(UserError, match=f"^evaluation.referee: {referee} is no trained stage with a discriminator; name RUN/STAGE"):
        check_origins(make_config({"evaluation": {"referee": referee}}))
    check_origins(make_config({"evaluation": {"referee": "runs/tiny/gad"}}))


def test_another_model_is_refused(session: Session, tmp_path: Path):
    folder = tmp_path / "other"
    shutil.copytree("runs/tiny/export/gad", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert text != (folder / "config.json").read_text()
    with pytest.raises(UserError, match="is another model than the student; name a model of the student's own family and size"):
        with_stage(session, **{"from": str(folder)}).first_state("next")
    small = with_stage(session, **{"from": "runs/tiny/seqkd", "discriminator": {"from": "runs/tiny/seqkd"}})
    with pytest.raises(UserError, match="runs/tiny/seqkd: has no discriminator like this run's"):
        small.first_state("next")


def test_a_discriminator_may_be_of_another_size(session: Session, tmp_path: Path):
    """A fresh one; a folder of any size, whose trunk it is; never one that reads other tokens."""
    fresh = with_stage(session, **{"from": "runs/tiny/seqkd", "discriminator": {"random": SMALL}})
    state = fresh.first_state("next")
    assert state.discriminator is not None
    assert state.discriminator.params["head"].shape == (8,) and float(np.abs(state.discriminator.params["head"]).max()) > 0
    assert state.discriminator.params["trunk"]["embedding"].shape == (session.dims.vocabulary, 8)
    folder = tmp_path / "small"
    dims = discriminator_dims(fresh.run.config, "next", session.dims)
    network, tokenizer = language_model(dims, jnp.dtype(jnp.float32)), (session.folder / "tokenizer.json").read_bytes()
    params = jax.jit(network.init)(jax.random.key(1))
    save(folder, session.family, dims, params, {"eos_token_id": 1, "pad_token_id": 0}, {"tokenizer.json": tokenizer})
    read = with_stage(session, **{"from": "runs/tiny/seqkd", "discriminator": {"from": str(folder)}})
    assert discriminator_dims(read.run.config, "next", session.dims) == dims
    begun = read.first_state("next").discriminator
    assert begun is not None
    assert_same(begun.params["trunk"], params["trunk"])
    assert begun.params["head"].shape == (8,)
    assert b"zadar" in tokenizer
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b"zadar", b"radaz"))
    with pytest.raises(UserError, match="has another tokenizer than the student"):
        role_from(str(folder), "discriminator", session.models, session.folder, session.key)


def test_a_discriminator_has_one_origin_and_no_adapters_beside_it():
    stage = {"algorithm": "gad", "discriminator": {"random": SMALL, "from": "student"}}
    with pytest.raises(UserError, match="has both `from` and `random`: leave one out"):
        make_config({"stages": {"one": stage}})
    stage["discriminator"] = {"random": SMALL}
    assert make_config({"stages": {"one": stage}}).stages
    with pytest.raises(UserError, match="^stages.one.discriminator.random: adapters stand on the student's base"):
        make_config({"adapters": {}, "stages": {"one": stage}})
