"""Decoding for conversations: what a slot says does not depend on the others, and is what a rollout samples."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.rollout.config import RolloutConfig
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.engine import Engine
from gadjax.rollout.live import STEPS, Heard, Live, Slots, Wish, sample_each
from gadjax.rollout.sampling import sample
from gadjax.sharding import MeshConfig, make_mesh
from tests.test_engine import NETWORK, PROMPTS, P, R, params

END, G, N = 5, 3, 2
GREEDY = Wish(key=(0, 0), temperature=0.0, top_p=1.0, limit=R, tells=True)
WISHES = [Wish(key=(1, n), temperature=0.9, top_p=0.8 if n else 1.0, limit=R) for n in range(N)]


@cache
def live(devices: int = 1) -> Live:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2) if devices == 8 else MeshConfig(), jax.devices()[:devices])
    return Live(NETWORK, mesh, params(), END, lengths=(P, R), places=G, samples=N)


def spoken(live: Live, asked: dict[int, list[Wish]], later: dict[int, list[Wish]] | None = None) -> dict[tuple[int, int], list[Heard]]:
    """What is said to some prompts, by prompt and sample; `later` come when the first have spoken for a while. One place each."""
    said: dict[tuple[int, int], list[Heard]] = {}
    owners: dict[int, tuple[int, int]] = {}

    def admit(prompts: dict[int, list[Wish]], first: int) -> None:
        for place, (prompt, wishes) in enumerate(prompts.items(), first):
            live.admit(place, PROMPTS[prompt], wishes)
            owners.update({place * N + n: (prompt, n) for n in range(len(wishes))})

    admit(asked, 0)
    while live.going or later:
        for slot, heard in live.hear().items():
            said.setdefault(owners[slot], []).append(heard)
        if later:
            admit(later, len(asked))
            later = None
    return said


def joined(heard: list[Heard]) -> list[int]:
    return [token for each in heard for token in each.tokens]


def test_greedy_answers_and_their_log_probabilities_are_the_engine_s():
    plan = SamplingPlan(samples=1, response_tokens=R, temperature=0.0, end_of_turn=END)
    engine = Engine(NETWORK, make_mesh(MeshConfig(), jax.devices()[:1]), plan, P, RolloutConfig())
    engine.update(params(), 0)
    rollout = engine.generate(PROMPTS[:3], jax.random.key(0), 0)
    said = spoken(live(), {0: [GREEDY], 1: [GREEDY]}, {2: [GREEDY, GREEDY]})
    for prompt in range(3):
        count = int(rollout.lengths_BN[prompt, 0])
        heard = said[prompt, 0]
        assert joined(heard) == rollout.tokens_BNR[prompt, 0, :count].tolist()
        np.testing.assert_allclose([logp for each in heard for logp in each.logps], rollout.logps_BNR[prompt, 0, :count], atol=1e-5)
        assert heard[-1].ended == ("stop" if rollout.ended_BN[prompt, 0] else "length")
        assert all(each.ended is None and len(each.tokens) == STEPS for each in heard[:-1])
        likeliest = [top[0] for each in heard for top in each.top]
        assert [token for token, _ in likeliest] == joined(heard)
    assert joined(said[2, 1]) == joined(said[2, 0])


def test_a_sample_does_not_depend_on_who_else_speaks_nor_on_the_devices():
    alone = spoken(live(), {3: WISHES})
    among = spoken(live(8), {0: [GREEDY], 4: WISHES}, {3: WISHES})
    assert [joined(among[3, n]) for n in range(N)] == [joined(alone[3, n]) for n in range(N)]
    assert joined(alone[3, 0]) != joined(alone[3, 1])
    assert not alone[3, 0][0].top[0]


def test_limits_hold_and_what_is_dropped_says_no_more():
    short = Wish(key=(0, 0), temperature=0.0, top_p=1.0, limit=3)
    (heard,) = spoken(live(), {3: [short]})[3, 0]
    assert (len(heard.tokens), heard.ended) == (3, "length")
    live().admit(0, PROMPTS[3], [GREEDY])
    live().drop(0)
    assert not live().going


def test_every_slot_draws_as_it_asks():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    data = np.arange(8, dtype=np.uint32).reshape(4, 2)
    temperatures, shares, positions = np.array([0.5, 1.0, 1.5, 0.0], np.float32), np.array([1.0, 0.5, 0.9, 0.3], np.float32), np.arange(4)
    tokens, logps = jax.jit(sample_each)(jnp.asarray(logits), Slots(None, None, positions, None, None, data, temperatures, shares, None))
    keys = jax.random.wrap_key_data(jnp.asarray(data))
    for slot in range(4):
        one = slice(slot, slot + 1)
        expected, _ = sample(
            jnp.asarray(logits[one]), keys[one], jnp.array(positions[one]), float(temperatures[slot]), None, float(shares[slot])
        )
        assert tokens[slot] == expected[0]
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits), atol=1e-5)
