"""What `gadjax bench` reports; how fast anything is, no test says."""

import json
from pathlib import Path

import jax
import pytest

from gadjax import bench as benched
from gadjax.bench import Bench, bench, lengths_of
from gadjax.chips import CHIPS
from gadjax.config import load_config
from gadjax.errors import UserError
from gadjax.models.decoder import DecoderConfig
from tests import tiny

PEERS = Path(__file__).parent / "benchmarks" / "peers.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny.CONFIG)
    return file


def test_the_peers_lengths():
    lengths = lengths_of(32, 256, 0)
    assert (sum(lengths), max(lengths), lengths[:4]) == (3026, 256, [147, 36, 56, 104])  # as the peers were measured with


def test_useful_tokens_and_needed_products_are_those_counted_by_hand(config: Path):
    dims = DecoderConfig(vocabulary=7, width=4, layers=2, heads=2, kv_heads=1, head_width=3, feed_forward=5)
    made = Bench(load_config(config, []), "gad", dims, repeats=1)
    # 8 prompts of 16 tokens and 10 response tokens; a layer: 4 x 3 x (2 + 1 + 1 + 2) for attention's projections, 3 x 4 x 5
    assert made.forward_flops(10, 10) == 2 * (8 * 16 + 10) * 2 * (4 * 3 * 6 + 3 * 4 * 5) + 2 * 10 * 7 * 4
    assert sum(len(answer) for answers in made.responses(2) for answer in answers) == sum(lengths_of(16, 16, 0))


def test_every_part_is_measured(config: Path, capsys: pytest.CaptureFixture[str]):
    bench(["student.random.words=20"], config, 1, True)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["rollout", "student", "discriminator", "step"]
    samples, teacher = sum(lengths_of(16, 16, 0)), sum(lengths_of(8, 16, 0))
    responses = {"rollout": samples, "student": samples, "discriminator": sum(lengths_of(24, 16, 0)), "step": 3 * samples + teacher}
    prompts = {"rollout": 0, "student": 16 * 16, "discriminator": 24 * 16, "step": 40 * 16}  # padded implementations repeat them
    for part, values in found.items():
        assert values["useful_tokens"] == responses[part] + prompts[part]
        assert values["useful_tokens_per_second"] == pytest.approx(values["useful_tokens"] / values["seconds"])
        assert values["needed_gflops_per_second"] > 0 and 0.1 < values["peak_gib"] < 50
        assert "mfu" not in values  # of a CPU no peak is known
    assert 0 < found["step"]["idle_fraction"] < 1


def test_of_a_known_chip_the_share_of_its_peak_is_told(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benched, "chip_of", lambda _: CHIPS["v5e"])
    made = Bench(
        load_config(config, []), "gad", DecoderConfig(vocabulary=7, width=4, layers=2, heads=2, kv_heads=1, head_width=3, feed_forward=5), 1
    )
    assert made.told(2.0, 10, 197e12)["mfu"] == pytest.approx(1 / 2 / jax.device_count())


def test_a_part_that_is_not_there(config: Path):
    with pytest.raises(UserError, match=r"^bench: there is no part speed; use some of rollout, student, discriminator, step"):
        bench(["speed"], config, 1, True)


def test_a_config_without_samples(config: Path):
    config.write_text("stages: {seqkd: {algorithm: seqkd}}")
    with pytest.raises(UserError, match="^stages: none of them samples"):
        bench([], config, 1, True)
