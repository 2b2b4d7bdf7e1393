"""Group attention: every response of a packed row is computed as if it stood alone after its prompt.

The oracle is the plain way: each response alone behind its own copy of the prompt, under an ordinary causal mask.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.algorithms.forward import hidden_states, response_log_probs
from gadjax.data.packing import RowShape, pack
from gadjax.models.attention import Memory
from gadjax.models.decoder import DecoderConfig, language_model
from gadjax.types import Cells, Params

DIMS = DecoderConfig(vocabulary=40, width=32, layers=2, heads=4, kv_heads=2, head_width=12, feed_forward=48, tied=False, qk_norm=True)
NETWORK = language_model(DIMS, jnp.dtype(jnp.float32))
ROW = 24
ALONE = 16  # tokens of the longest prompt and response

Ids = tuple[int, ...]


def ids(length: int, seed: int) -> Ids:
    return tuple(np.random.default_rng(seed).integers(0, DIMS.vocabulary, length).tolist())


# Group 2 is longer than a row and is split over two; group 1 goes to what is left of the second one.
PROMPTS = [ids(5, 1), ids(3, 2), ids(6, 3)]
LENGTHS = [(3, 4, 2), (2, 2, 1), (7, 6, 8)]
RESPONSES = [[ids(length, 10 * group + index + 10) for index, length in enumerate(lengths)] for group, lengths in enumerate(LENGTHS)]
SHAPE = RowShape(groups=3, micro_batches=1, rows=4, length=ROW)


@cache
def params() -> Params:
    """Weights of which none is constant, the biases and norms included. NumPy: to compile jax's normal for every shape takes seconds."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.Array:
        return jnp.asarray(float(axes[-1] == "norm") + 0.2 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, NETWORK.shapes, NETWORK.axes)


def rows(prompts: list[Ids] = PROMPTS, responses: list[list[Ids]] = RESPONSES) -> Cells:
    return jax.tree.map(lambda cell: cell[0], pack(prompts, responses, SHAPE).cells)


@jax.jit
def hidden_in_rows(params: Params, cells: Cells) -> jax.Array:
    return hidden_states(NETWORK, NETWORK.bind(params), cells)


def in_rows(params: Params, cells: Cells) -> np.ndarray:
    return np.asarray(hidden_in_rows(params, cells))


def spans(cells: Cells) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(group, response) -> (row, column) of its tokens; response -1 is the prompt, of which the first copy is taken."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    pieces: dict[tuple[int, int], int] = {}
    for row, column in np.argwhere(np.asarray(cells.segments_ML) >= 0).tolist():
        name = int(cells.groups_ML[row, column]), int(cells.responses_ML[row, column])
        if pieces.setdefault(name, row) == row:
            found.setdefault(name, []).append((row, column))
    return found


def valid(cells: Cells) -> np.ndarray:
    return np.asarray(cells.segments_ML) >= 0


def own(cells: Cells, group: int) -> np.ndarray:
    return (np.asarray(cells.groups_ML) == group) & valid(cells)


def at(array_ML: Any, span: list[tuple[int, int]]) -> np.ndarray:
    return np.stack([np.asarray(array_ML)[place] for place in span])


def causal(query: jax.Array, key: jax.Array, value: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
    """The textbook's attention over [S, L] sequences: key/value heads repeated, scores, mask, softmax, values."""
    heads = query.reshape(*query.shape[:2], DIMS.heads, DIMS.head_width)
    keys, values = (jnp.repeat(each, DIMS.heads // DIMS.kv_heads, axis=2) for each in (key, value))
    scores = jnp.einsum("sqnh,sknh->snqk", heads, keys) / np.float32(np.sqrt(DIMS.head_width))
    seen = jnp.tril(jnp.ones((scores.shape[-1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("snqk,sknh->sqnh", weights, values).reshape(query.shape), memory


PAIRS = [(group, index) for group, lengths in enumerate(LENGTHS) for index in range(len(lengths))]
SEQUENCES = np.array([(*PROMPTS[g], *RESPONSES[g][i], *[0] * (ALONE - len(PROMPTS[g]) - len(RESPONSES[g][i]))) for g, i in PAIRS])


@jax.jit
def alone(params: Params) -> jax.Array:
    """[S, ALONE, D]: a sequence for every response. What follows a sequence cannot be seen from it."""
    tokens = jnp.asarray(SEQUENCES, jnp.int32)
    hidden, _ = NETWORK.bind(params).trunk(tokens, jnp.broadcast_to(jnp.arange(ALONE), tokens.shape), causal)
    return hidden


def alone_span(pair: int) -> slice:
    group, index = PAIRS[pair]
    return slice(len(PROMPTS[group]), len(PROMPTS[group]) + len(RESPONSES[group][index]))


def test_the_rows_have_two_groups_in_one_row_a_group_in_two_rows_and_padding():
    cells = rows()
    rows_of_group = [set(np.argwhere(own(cells, group))[:, 0]) for group in range(3)]
    assert len(rows_of_group[2]) == 2 and rows_of_group[1] < rows_of_group[2]
    assert np.sum(~valid(cells)) > ROW


def test_hidden_states_are_those_of_prompt_and_response_alone():
    cells = rows()
    packed, wanted, places = in_rows(params(), cells), np.asarray(alone(params())), spans(cells)
    for pair, (group, index) in enumerate(PAIRS):
        np.testing.assert_allclose(at(packed, places[group, index]), wanted[pair, alone_span(pair)], rtol=0, atol=1e-5)
        np.testing.assert_allclose(at(packed, places[group, -1]), wanted[pair, : len(PROMPTS[group])], rtol=0, atol=1e-5)


def test_gradients_are_those_of_prompt_and_response_alone():
    cells = rows()
    places = spans(cells)
    probes_ALONE, probes_ML = (np.zeros((*shape, DIMS.width), np.float32) for shape in (SEQUENCES.shape, cells.tokens_ML.shape))
    for pair, name in enumerate(PAIRS):
        probes = np.random.default_rng(pair).standard_normal((len(places[name]), DIMS.width), np.float32)
        probes_ALONE[pair, alone_span(pair)] = probes
        probes_ML[tuple(np.transpose(places[name]))] = probes
    wanted = jax.jit(jax.grad(lambda params: jnp.sum(alone(params) * probes_ALONE)))(params())
    found = jax.jit(jax.grad(lambda params: jnp.sum(hidden_in_rows(params, cells) * probes_ML)))(params())
    for ours, theirs in zip(*map(jax.tree.leaves, jax.device_get((found["trunk"], wanted["trunk"]))), strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0.1
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def test_log_probabilities_are_read_one_token_before_and_the_first_at_the_prompt_s_end():
    cells = rows()
    logp, entropy = map(np.asarray, jax.jit(lambda params, cells: response_log_probs(NETWORK, params, cells, 0.7))(params(), cells))
    logits = np.asarray(alone(params())) @ np.asarray(params()["unembedding"]).T / 0.7
    log_probs, places = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)), spans(cells)
    for pair, (group, index) in enumerate(PAIRS):
        span = alone_span(pair)
        before = log_probs[pair, span.start - 1 : span.stop - 1]
        wanted = before[np.arange(len(before)), RESPONSES[group][index]]
        np.testing.assert_allclose(at(logp, places[group, index]), wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(at(entropy, places[group, index]), -np.sum(np.exp(before) * before, axis=-1), rtol=0, atol=1e-5)
    outside = ~valid(cells) | (cells.responses_ML < 0)
    assert not np.any(logp[outside]) and not np.any(entropy[outside])


def test_padding_influences_nothing():
    cells = rows()
    empty = ~valid(cells)
    noise = np.random.default_rng(3).integers(1, DIMS.vocabulary, empty.shape, np.int32)
    noisy = cells._replace(
        tokens_ML=np.where(empty, noise, cells.tokens_ML),
        positions_ML=np.where(empty, noise, cells.positions_ML),
        responses_ML=np.where(empty, noise % 3 - 1, cells.responses_ML),
    )
    clean, changed = in_rows(params(), cells), in_rows(params(), noisy)
    assert not np.array_equal(clean[empty], changed[empty])
    np.testing.assert_array_equal(clean[~empty], changed[~empty])


@pytest.mark.parametrize(("group", "index"), [(0, 1), (1, 0), (2, 2)])
def test_a_response_is_seen_by_nothing_but_its_own_later_tokens(group: int, index: int):
    cells = rows()
    changed = [[*answers] for answers in RESPONSES]
    first, *rest = changed[group][index]
    changed[group][index] = ((first + 1) % DIMS.vocabulary, *rest)
    place, *later = spans(cells)[group, index]
    seeing = np.zeros(cells.tokens_ML.shape, bool)
    seeing[tuple(np.transpose([place, *later]))] = True
    before, after = in_rows(params(), cells), in_rows(params(), rows(responses=changed))
    np.testing.assert_array_equal(np.any(before != after, axis=-1) & valid(cells), seeing)


def test_a_prompt_is_seen_by_its_own_group_alone():
    cells = rows()
    for group in range(3):
        prompts = [*PROMPTS]
        prompts[group] = ((prompts[group][0] + 1) % DIMS.vocabulary, *prompts[group][1:])
        before, after = in_rows(params(), cells), in_rows(params(), rows(prompts=prompts))
        np.testing.assert_array_equal(np.any(before != after, axis=-1) & valid(cells), own(cells, group))


def test_the_order_of_the_responses_does_not_matter():
    turned = [[answers[2], answers[0], answers[1]] for answers in RESPONSES]
    straight, other = rows(), rows(responses=turned)
    before, after = in_rows(params(), straight), in_rows(params(), other)
    for group in range(3):
        for index in range(3):
            now = spans(other)[group, (index + 1) % 3]
            np.testing.assert_allclose(at(before, spans(straight)[group, index]), at(after, now), rtol=0, atol=1e-5)
