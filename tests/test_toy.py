"""The toy experiment: what its students are, and that the two methods end as the paper says."""

import json
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

from gadjax import toy


def test_a_student_is_a_gaussian_over_the_outcomes():
    logp_K = toy.log_probs({"mean": jnp.array(5.0), "log_width": jnp.log(2.0)})
    np.testing.assert_allclose(jnp.exp(logp_K).sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(logp_K[5] - logp_K[9], 2.0, atol=1e-5)  # (4 / 2)² / 2


def test_settled_is_near_one_mode_and_narrow():
    teacher_K = np.asarray(toy.teacher_log_probs(0.7))
    found = {
        place: toy.describe(
            0, "gad", np.asarray(toy.log_probs({"mean": jnp.array(place[0]), "log_width": jnp.log(place[1])})), teacher_K
        ).mode
        for place in ((9.2, 0.7), (9.0, 4.0), (12.0, 0.7))
    }
    assert found == {(9.2, 0.7): 9.0, (9.0, 4.0): None, (12.0, 0.7): None}


def test_the_teacher_has_no_divergence_from_itself():
    teacher_K = np.asarray(toy.teacher_log_probs(0.7))
    itself = toy.describe(0, "gad", teacher_K, teacher_K)
    assert (itself.reverse_kl, itself.forward_kl) == (0.0, 0.0)


def test_means_are_told_with_their_intervals():
    teacher_K = np.asarray(toy.teacher_log_probs(0.7))
    outcomes = [toy.Outcome(seed, name, 3.0, 1.0 + seed, 0.5, 0.25, 3.0) for name in toy.METHODS for seed in (0, 1)]
    assert toy.sentences(outcomes, toy.summarise(outcomes, teacher_K))[1] == (
        "seqkd, standard deviation 1.500 ± 6.353, reverse KL 0.500 ± 0.000, forward KL 0.250 ± 0.000 nats; "
        "2 of 2 starts settled on one mode"
    )
    assert "standard deviation 1.000, reverse KL 0.500, " in toy.sentences(outcomes[::2], toy.summarise(outcomes[::2], teacher_K))[1]


def test_seqkd_covers_all_modes_and_gad_seeks_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    toy.toy(tmp_path, seeds=8, width=0.7, start_width=1.0, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["seqkd"]["settled"] == 0
    assert told["gad"]["settled"] >= 4
    assert told["gad"]["reverse_kl"] < told["seqkd"]["reverse_kl"]
    assert told["seqkd"]["forward_kl"] < told["gad"]["forward_kl"]
    low, high = told["gad"]["intervals"]["reverse_kl"]
    found = [outcome["reverse_kl"] for outcome in told["outcomes"] if outcome["method"] == "gad"]
    half = 2.3646243 * np.std(found, ddof=1) / 8**0.5  # Student's t with seven degrees of freedom
    assert (low, high) == pytest.approx((told["gad"]["reverse_kl"] - half, told["gad"]["reverse_kl"] + half), abs=1e-6)
    assert told == json.loads((tmp_path / "toy.json").read_text())
    assert len((tmp_path / "toy.csv").read_text().splitlines()) == 1 + 2 * 8
    drawing = (tmp_path / "toy.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert all(name in drawing for name in ("teacher", "seqkd", "gad", "outcome"))
