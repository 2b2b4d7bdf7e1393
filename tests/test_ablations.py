"""The paper's ablations, each a value of the config: a frozen discriminator, no warm-up of the student, none of the discriminator.

And several updates on one rollout, far enough that the clipping bites.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gadjax.config import Config, make_config
from gadjax.export import export_discriminator
from gadjax.metrics import Row, read
from gadjax.runs import Run
from gadjax.session import Session
from gadjax.types import Params
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # the first test waits for a whole run

LEARNS = "discriminator: {learning_rate: 1e-3}"
LARGE = "{width: 24, layers: 2, heads: 2, kv_heads: 1, feed_forward: 32}"
GAD = f"algorithm: gad, max_steps: 2, {tiny.SAMPLING}"
CONFIG = tiny.with_stages(
    seqkd=f"algorithm: seqkd, max_steps: 2, {tiny.COMMON}",
    judge=f"algorithm: warmup, max_steps: 3, {tiny.SAMPLING}, discriminator: {{learning_rate: 1e-3, only_first_steps: 3}}",
    cold=f"{GAD}, from: judge, {LEARNS}",
    frozen=f"{GAD}, from: judge, discriminator: {{train: false}}",
    fresh=f"{GAD}, from: seqkd, {LEARNS}",
    larger=f"{GAD}, from: seqkd, discriminator: {{learning_rate: 1e-3, loss: cross_entropy, random: {LARGE}}}",
    often=f"{GAD.replace('1e-3', '0.1')}, from: judge, updates_per_rollout: 2, {LEARNS}",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of all of them, evaluation, report and export included."""
    experiment = tiny.Tiny.make(tmp_path_factory.getbasetemp(), "ablations", CONFIG)
    done = experiment.gadjax("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    return experiment.run


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return Session.open(Run.at(run), run / "student")


def rows(run: Path, stage: str) -> list[Row]:
    """The metrics of a stage's steps, without those before the first."""
    return read(run / "stages" / stage / "metrics.jsonl")[1:]


def params(session: Session, stage: str, role: str) -> Params:
    return session.final_role(stage, role).params


def same(one: object, other: object) -> bool:
    """Whether two trees have the same bits."""
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_frozen_discriminator_scores_and_stays(run: Path, session: Session):
    assert same(params(session, "frozen", "discriminator"), params(session, "judge", "discriminator"))
    assert not same(params(session, "frozen", "student"), params(session, "judge", "student"))
    first, second = rows(run, "frozen")
    learning = rows(run, "cold")
    # The first rewards come from the same discriminator, the second ones do not.
    assert first["student/reward_mean"] == learning[0]["student/reward_mean"]
    assert second["student/reward_mean"] != learning[1]["student/reward_mean"]
    assert second["student/reward_std"] > 0 and "discriminator/loss" in second and "discriminator/grad_norm" not in second


def test_a_warm_up_of_the_discriminator_alone_leaves_the_student_as_it_came(run: Path, session: Session):
    assert same(params(session, "judge", "student"), session.untouched())
    found = rows(run, "judge")
    assert [row["step"] for row in found] == [1, 2, 3]
    assert not [name for row in found for name in row if name.startswith("student/")]
    assert all(row["discriminator/grad_norm"] > 0 for row in found)
    begun = session.first_state("cold")
    assert same(begun.student.params, session.untouched())
    assert same(begun.student.optimizer, session.first_state("seqkd").student.optimizer), "it has seen nothing"
    assert begun.discriminator is not None and same(begun.discriminator.params, params(session, "judge", "discriminator"))
    assert not same(params(session, "cold", "student"), session.untouched())
    assert not same(params(session, "cold", "discriminator"), params(session, "judge", "discriminator"))


@pytest.mark.parametrize(("origin", "given"), [("seqkd", {}), ("seqkd", {"from": "student"}), ("judge", {"from": "student"})])
def test_without_its_warm_up_the_discriminator_is_the_student_with_a_fresh_head(session: Session, origin: str, given: dict[str, str]):
    config = with_stage(session.run.config, {"algorithm": "gad", "from": origin, "discriminator": given})
    found = replace(session, run=replace(session.run, config=config)).first_state("next")
    student = session.final_role(origin, "student")
    assert same(found.student.params, student.params)
    assert found.discriminator is not None
    assert same(found.discriminator.params["trunk"], student.params["trunk"])
    head = np.asarray(found.discriminator.params["head"])
    assert head.shape == (16,) and 0.005 < np.std(head) < 0.05  # drawn with 0.02
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.discriminator.optimizer)), "it has seen nothing"


def with_stage(config: Config, stage: object) -> Config:
    values = config.model_dump(by_alias=True)
    return make_config(values | {"stages": values["stages"] | {"next": stage}})


def test_a_gad_stage_trains_a_fresh_discriminator(run: Path, session: Session):
    begun = session.first_state("fresh").discriminator
    assert begun is not None and not same(params(session, "fresh", "discriminator"), begun.params)
    assert not same(params(session, "fresh", "student"), params(session, "seqkd", "student"))
    assert all(row["discriminator/grad_norm"] > 0 for row in rows(run, "fresh"))


def test_a_discriminator_of_another_size_and_loss_is_trained_handed_on_and_exported(run: Path, session: Session):
    judge = params(session, "larger", "discriminator")
    assert judge["trunk"]["blocks"]["gate"].shape[:2] == (2, 24)
    assert not same(params(session, "larger", "student"), params(session, "seqkd", "student"))
    for row in rows(run, "larger"):
        assert 0.5 < row["discriminator/loss"] < 1 and row["discriminator/grad_norm"] > 0  # at chance log 2
    for origin in ("larger", str(export_discriminator(session, "larger"))):
        config = with_stage(session.run.config, {"algorithm": "gad", "from": "seqkd", "discriminator": {"from": origin}})
        found = replace(session, run=replace(session.run, config=config)).first_state("next").discriminator
        assert found is not None and same(found.params, judge)


def test_a_second_update_on_a_rollout_is_clipped(run: Path):
    assert all(row["student/clip_fraction"] == 0 for stage in ("cold", "frozen", "fresh") for row in rows(run, stage))
    assert all(0 < row["student/clip_fraction"] < 1 and row["rollout/logp_gap"] < 1e-5 for row in rows(run, "often"))


def test_evaluation_and_report_show_them_all(run: Path):
    page = (run / "report" / "index.html").read_text()
    for stage in ("judge", "cold", "frozen", "fresh", "larger", "often"):
        assert f">{stage}<" in page
        assert (run / "evaluation" / f"{stage}.jsonl").is_file()
