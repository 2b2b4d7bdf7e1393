"""The mesh, its rules, and that 8 devices compute what 1 does."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gadjax.algorithms import gad, seqkd
from gadjax.algorithms.gad import GadConfig
from gadjax.algorithms.stage import Algorithm, Guidance
from gadjax.data.config import DataConfig
from gadjax.data.packing import pack
from gadjax.errors import UserError
from gadjax.models.decoder import DecoderConfig, discriminator, discriminator_params, language_model
from gadjax.rollout.config import RolloutConfig
from gadjax.sharding import MeshConfig, for_decoding, make_mesh, partition, row_multiple
from gadjax.steps import Models, Programs, responses_of

DIMS = DecoderConfig(vocabulary=16, width=16, layers=1, heads=4, kv_heads=2, head_width=4, feed_forward=32, init_std=0.3)
DATA = DataConfig(max_prompt_tokens=4, max_response_tokens=5, row_tokens=24, rows=1)
STAGE = GadConfig(group_size=2, batch_groups=5)
PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8), (9, 1), (3, 3)]
TEACHER = [[(2, 3, 12)], [(4, 4, 4, 4, 12)], [(11, 12)], [(12,)], [(7, 12)]]


def test_fsdp_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(data=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert row_multiple(make_mesh(MeshConfig(tensor=2))) == 4


@pytest.mark.parametrize("config", [MeshConfig(tensor=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16)])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(config):
    with pytest.raises(UserError, match=r"mesh: .*does not make 8 devices; choose sizes whose product"):
        make_mesh(config)


def test_dimensions_are_divided_by_their_rule_where_it_divides_them():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    assert partition(("layers", "embed", "heads", "head"), (3, 16, 4, 8), mesh) == P(None, ("fsdp",), ("tensor",), None)
    assert partition(("embed", "kv_heads"), (16, 3), mesh) == P(("fsdp",), None)
    assert partition(("rows", None), (8, 5), mesh) == P(("data", "fsdp"), None)
    long_rows = make_mesh(MeshConfig(context=4))
    assert partition(("rows", "queries", "heads", "head"), (2, 24, 4, 8), long_rows) == P(("fsdp",), ("context",), None, None)
    assert partition(("layers", "embed", "mlp"), (3, 16, 4), long_rows) == P(None, ("fsdp", "context"), None)


def test_several_slices_are_refused():
    devices = [SimpleNamespace(platform="tpu", slice_index=index % 2) for index in range(4)]
    with pytest.raises(UserError, match=r"^mesh: does not reach over several slices; take one slice with more chips$"):
        make_mesh(MeshConfig(), devices)


def test_one_mesh_axis_divides_an_array_once():
    with pytest.raises(AssertionError, match="twice"):
        partition(("heads", "mlp"), (4, 4), make_mesh(MeshConfig(tensor=2)))


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "decoding"),
    [
        (MeshConfig(), 2, (1, 4, 1, 2)),
        (MeshConfig(), 8, (1, 1, 1, 8)),
        (MeshConfig(), 3, (1, 8, 1, 1)),
        (MeshConfig(data=2, tensor=2), 4, (2, 1, 1, 4)),
        (MeshConfig(fsdp=2, tensor=4), 2, (1, 2, 1, 4)),  # the heads are on every device of `tensor` as it is
        (MeshConfig(context=2), 2, (1, 4, 1, 2)),
        (MeshConfig(fsdp=2, context=4), 4, (1, 2, 1, 4)),
    ],
)
def test_decoding_divides_the_heads(mesh: MeshConfig, kv_heads: int, decoding: tuple[int, ...]):
    training = make_mesh(mesh)
    found = for_decoding(training, kv_heads)
    assert found.devices.shape == decoding and found.axis_names == training.axis_names
    assert list(found.devices.flat) == list(training.devices.flat)


def cycle(mesh: MeshConfig, devices: int, rollout_mesh: MeshConfig | None = None) -> dict[str, np.ndarray]:
    """A rollout, a discriminator step on it, a student step by the scores, and a SeqKD step, under plain gradient descent."""
    student, judge = language_model(DIMS, jnp.dtype(jnp.float32)), discriminator(DIMS, jnp.dtype(jnp.float32))
    models = Models(make_mesh(mesh, jax.devices()[:devices]), student, judge, optax.sgd(0.1), RolloutConfig(mesh=rollout_mesh))
    algorithm = Algorithm(
        student=gad.make_student_step(student, models.optimizer, temperature=0.8, kl_weight=0.1),
        discriminator=gad.make_discriminator_step(judge, models.optimizer),
    )
    programs = Programs(models, lambda *_: algorithm, STAGE, DATA, end_of_turn=12)
    params = student.init(jax.random.key(0))
    reference = models.place_params(student, params)
    student_role = models.fresh_role(student, reference)
    judge_role = models.fresh_role(judge, models.place_params(judge, discriminator_params(judge, params, jax.random.key(1))))
    key = jax.device_put(jax.random.key(2), jax.sharding.NamedSharding(models.mesh, P()))
    with jax.transfer_guard("disallow"):
        rollout = programs.sampler(student_role.params, PROMPTS, key, 3)
        ids, logps = responses_of(rollout)
        both = models.place_rows(pack(PROMPTS, [a + b for a, b in zip(TEACHER, ids, strict=True)], programs.discriminator_rows()))
        judge_role, scores, judged = programs.discriminator_step(judge_role, both)
        own = models.place_rows(pack(PROMPTS, ids, programs.rows(2), logps))
        student_role, learned = programs.student_step(student_role, own, Guidance(reference, scores))
        supervised = models.jit(seqkd.make_student_step(student, models.optimizer))
        student_role, taught = supervised(student_role, models.place_rows(pack(PROMPTS, TEACHER, programs.rows(1))), Guidance(None, None))
    results = {"tokens": rollout.tokens_BNR, "scores": scores, "student": student_role.params, "discriminator": judge_role.params}
    return jax.device_get(results | judged | learned | {f"seqkd {name}": value for name, value in taught.items()})


@pytest.fixture(scope="module")
def one() -> dict[str, np.ndarray]:
    return cycle(MeshConfig(), 1)


@pytest.mark.parametrize(
    ("mesh", "rollout_mesh"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), None),
        (MeshConfig(data=2), None),  # decoding divides the heads
        (MeshConfig(fsdp=2, tensor=4), None),  # which does not divide the two key/value heads: they are on every device
        (MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(data=2, tensor=4)),  # a row's tokens on four devices; decoding laid out anew
    ],
)
def test_eight_devices_compute_what_one_does(one: dict[str, np.ndarray], mesh: MeshConfig, rollout_mesh: MeshConfig | None):
    eight = cycle(mesh, 8, rollout_mesh)
    np.testing.assert_array_equal(one["tokens"], eight["tokens"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, eight)
    assert one["rollout/logp_gap"] < 1e-5, "the sampler's log-probabilities are not the trainer's"
    assert one["student/grad_norm"] > 0.01


def test_parameters_and_moments_lie_on_the_mesh_as_their_axes_say():
    dims = language_model(DIMS, jnp.dtype(jnp.float32))
    optimizer = optax.adamw(1e-3)
    models = Models(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), dims, discriminator(DIMS, jnp.dtype(jnp.float32)), optimizer)
    role = models.fresh_role(dims, models.place_params(dims, dims.init(jax.random.key(0))))
    gate = role.params["trunk"]["blocks"]["gate"]
    assert gate.sharding.spec == P(None, ("fsdp",), ("tensor",))
    assert gate.addressable_shards[0].data.shape == (1, 8, 16)
    moment = role.optimizer[0].mu["trunk"]["blocks"]["gate"]
    assert moment.sharding == gate.sharding
