"""From a config to what runs on the devices: networks, shardings, row shapes and the jitted steps of a stage.

`gadjax.train` runs them; nothing here holds data or parameters.

Letters: B groups, J = 1 + N responses with the teacher's first, P prompt tokens, R response tokens, L tokens of a row.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gadjax.algorithms import gad, seqkd
from gadjax.algorithms.registry import ALGORITHMS
from gadjax.algorithms.stage import Algorithm, SamplingStageConfig, StageConfig
from gadjax.config import Config
from gadjax.data.config import DataConfig
from gadjax.data.packing import RowShape
from gadjax.errors import UserError
from gadjax.models.adapters import united, within, without
from gadjax.models.checkpoint import load
from gadjax.models.decoder import DecoderConfig, Network, discriminator, language_model
from gadjax.models.hugging_face import Family
from gadjax.models.row_attention import automatic
from gadjax.optimizer import make_optimizer
from gadjax.rollout.backend import RolloutBackend
from gadjax.rollout.config import RolloutConfig
from gadjax.rollout.decode import SamplingPlan
from gadjax.rollout.engine import Engine
from gadjax.rollout.remote import Remote
from gadjax.sharding import jit_on, make_mesh, multiple_of, named_sharding, put, replicated, row_multiple
from gadjax.types import Cells, PackedRows, Params, Role, Rollout, TrainState

ROW_MULTIPLE = 8  # rows are a multiple of this long


def row_shape(data: DataConfig, mesh: Mesh, groups: int, responses: int, together: bool = False) -> RowShape:
    """The rows for any batch of `groups` groups of `responses` responses; `together` as in `RowShape`.

    Raises:
        UserError: a row cannot hold a prompt and a response.
    """
    lengths = {"prompt_tokens": data.max_prompt_tokens, "response_tokens": data.max_response_tokens}
    shortest, largest = sum(lengths.values()), data.max_prompt_tokens + responses * data.max_response_tokens
    divided = math.lcm(1 if data.row_tokens else ROW_MULTIPLE, multiple_of("tokens", mesh))
    length = -(-(data.row_tokens or largest) // divided) * divided
    if length < shortest:
        raise UserError("data.row_tokens", f"{length} is less than a prompt and a response", f"make it at least {shortest}")
    multiple = row_multiple(mesh)
    rows = max(data.rows or 1, RowShape.rows_of_largest(responses, length=length, **lengths) if together else 1)
    return RowShape.holding(
        groups, responses, rows=-(-rows // multiple) * multiple, length=length, together=together, widths=data.row_widths, **lengths
    )


@dataclass(frozen=True)
class Models:
    """The two networks of a run on its mesh.

    Attributes:
        mesh: the devices.
        student: the student's network.
        discriminator: the discriminator's.
        optimizer: structure of both optimizers' states, which does not depend on the learning rate's schedule.
        rollout: how rollouts are laid out.
        base: with adapters, the frozen parameters on which both networks stand: one copy, in the compute dtype, abstract until it is
            read. Without, nothing. A role's parameters, here and everywhere, are those beside the base.
    """

    mesh: Mesh
    student: Network
    discriminator: Network
    optimizer: optax.GradientTransformation
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    base: Params = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, dims: DecoderConfig, devices: Sequence[Any] | None = None) -> "Models":
        """The models of a config for a student of these dimensions, on `devices` (all there are by default)."""
        how = (jnp.dtype(config.student.compute_dtype), config.student.rematerialise)
        mesh = make_mesh(config.mesh, devices)
        attend = automatic(config.data.max_prompt_tokens, config.data.max_response_tokens, mesh.devices.flat[0])
        optimizer = make_optimizer(config.optimizer, optax.constant_schedule(1.0))
        with_adapters = dims.adapted(config.adapters)
        student, judge = language_model(with_adapters, *how, attend), discriminator(with_adapters, *how, attend)
        models = cls(mesh, student, judge, optimizer, config.rollout)
        if config.adapters is None:
            return models
        frozen = language_model(dims, *how).shapes
        return replace(models, base=models.laid_out(student, jax.eval_shape(student.in_compute_dtype, frozen)))

    def jit(self, function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
        """`jax.jit` with this mesh in scope, so that the constraints inside (`gadjax.sharding.constrain`) hold."""
        return jit_on(self.mesh, function, **options)

    def standing(self, folder: Path, family: Family) -> "Models":
        """The same with the base read from a student's folder."""
        return replace(self, base=load(folder, family, self.base))

    def judged_by(self, dims: DecoderConfig) -> "Models":
        """The same with a discriminator of these dimensions, which are not the student's."""
        trunk = self.student.bind(self.student.shapes).trunk
        return replace(self, discriminator=discriminator(dims, trunk.dtype, trunk.rematerialise, self.student.attend))

    @cached_property
    def mark(self) -> str | None:
        """What tells the base from another one, however it is laid out; None where there is none."""
        if not self.base:
            return None
        sums = self.jit(lambda base: jax.tree.map(_sum_of_bits, base), out_shardings=replicated(self.mesh))(self.base)
        return hashlib.sha256(repr(jax.tree.map(int, jax.device_get(sums))).encode()).hexdigest()

    def program(self, make: Callable[[Network, Network], Callable[..., Any]], donates: bool = False, **options: Any) -> "Program":
        """`jit` of what `make(student, discriminator)` makes of the networks on their base. `donates`: its first argument."""

        def run(base: Params, *arguments: Any) -> Any:
            return make(self.student.on(base), self.discriminator.on(base))(*arguments)

        return Program(self.jit(run, donate_argnums=(1,) if donates else (), **options), self.base)

    def whole(self, network: Network, params: Params) -> Params:
        """All of a network's parameters, the base's and these; nothing is copied."""
        return network.on(self.base).whole(params)

    def trained(self, network: Network) -> Params:
        """Shapes of what is trained of a network."""
        return without(network.shapes, self.base)

    def laid_out(self, network: Network, shapes: Params) -> Params:
        """Shapes, of some of a network's parameters, with where each lives."""
        return jax.tree.map(
            lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(axes, leaf.shape, self.mesh)),
            shapes,
            within(network.axes, shapes),
        )

    def params_shardings(self, network: Network) -> Params:
        """Where each parameter that is trained lives."""
        return shardings_of(self.laid_out(network, self.trained(network)))

    def abstract_role(self, network: Network) -> Role:
        """Shapes and shardings of a role: moments lie where their parameters do."""
        params = self.laid_out(network, self.trained(network))
        state = jax.eval_shape(self.optimizer.init, params)

        def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def everywhere(leaf: Any) -> jax.ShapeDtypeStruct:
            return placed(leaf, replicated(self.mesh))

        with jax.transfer_guard("allow"):  # optax makes real counters on the way
            moments = optax.tree_utils.tree_map_params(self.optimizer, placed, state, shardings_of(params), transform_non_params=everywhere)
        return Role(params, moments)

    def abstract_reference(self) -> Params:
        """Shapes and shardings of a reference student, which only computes: in the compute dtype."""
        return self.laid_out(self.student, jax.eval_shape(self.student.in_compute_dtype, self.trained(self.student)))

    def reference(self, params: Params) -> Params:
        """A student that only computes, as its parameters are now. They are copied, for steps donate what they are given."""
        shardings = shardings_of(self.abstract_reference())
        return self.jit(lambda params: jax.tree.map(jnp.copy, self.student.in_compute_dtype(params)), out_shardings=shardings)(params)

    def abstract_state(self, with_discriminator: bool) -> TrainState:
        """Shapes and shardings of the whole training state."""
        return TrainState(self.abstract_role(self.student), self.abstract_role(self.discriminator) if with_discriminator else None)

    def place(self, array: np.ndarray, *names: str | None) -> jax.Array:
        """A host array onto the devices by its logical names."""
        return put(array, named_sharding(names, array.shape, self.mesh))

    def place_key(self, data: np.ndarray) -> jax.Array:
        """The random key of this data, on every device."""
        return jax.random.wrap_key_data(put(data.astype(np.uint32), replicated(self.mesh)))

    def place_params(self, network: Network, params: Params) -> Params:
        """Parameters of this host onto the devices."""
        return jax.tree.map(put, params, self.params_shardings(network))

    def read(self, network: Network, folder: Path, family: Family) -> Params:
        """What is trained of a network from a Hugging Face folder onto the devices; adapters are not in it."""
        return load(folder, family, self.laid_out(network, self.trained(network)))

    def completed(self, network: Network, params: Params, key: jax.Array) -> Params:
        """What is trained of a network, of which `params` has some or all; the rest, adapters, is drawn."""
        missing = without(self.laid_out(network, self.trained(network)), params)
        if not missing:
            return params
        drawn = self.jit(lambda key: within(network.init(key), missing), out_shardings=shardings_of(missing))(key)
        return united(params, drawn)

    def place_rows(self, rows: PackedRows) -> PackedRows:
        """Packed rows onto the devices."""
        cells = Cells(*(self.place(np.asarray(cell), None, "rows", None) for cell in rows.cells))
        whole = {name: put(getattr(rows, name), replicated(self.mesh)) for name in PackedRows._fields if name != "cells"}
        return PackedRows(cells=cells, **whole)

    def fresh_role(self, network: Network, params: Params) -> Role:
        """A role with an optimizer that has seen nothing; the parameters are copied, for steps donate what they are given."""
        return self.fresh(network)(params)

    def fresh(self, network: Network) -> jax.stages.Wrapped:
        """The program of `fresh_role`."""
        shardings = shardings_of(self.abstract_role(network))
        return self.jit(lambda params: Role(jax.tree.map(jnp.copy, params), self.optimizer.init(params)), out_shardings=shardings)


def _sum_of_bits(array: jax.Array) -> jax.Array:
    """Modulo 2³², so that the order does not matter."""
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def shardings_of(abstract: Any) -> Any:
    """The shardings in a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


@dataclass(frozen=True)
class Program:
    """A jitted function whose first argument, which the caller does not see, is the base on which the networks stand."""

    jitted: jax.stages.Wrapped
    base: Params

    def __call__(self, *arguments: Any) -> Any:
        return self.jitted(self.base, *arguments)

    def trace(self, *arguments: Any) -> Any:
        """As of a jitted function."""
        return self.jitted.trace(self.base, *arguments)


@dataclass(frozen=True)
class Programs:
    """The compiled side of one stage. Every program compiles when first called.

    Attributes:
        models: the networks.
        build: student and discriminator -> the steps as pure functions.
        stage: the stage's config.
        data: lengths and rows.
        end_of_turn: the id that ends a response.
    """

    models: Models
    build: Callable[[Network, Network], Algorithm]
    stage: StageConfig
    data: DataConfig
    end_of_turn: int

    @classmethod
    def of(cls, config: Config, name: str, steps: int, models: Models, end_of_turn: int) -> "Programs":
        """The programs of stage `name`, which has so many steps."""
        stage = config.stages[name]

        def optimizer_at(rate: float, updates: int = 1) -> optax.GradientTransformation:
            return make_optimizer(config.optimizer, stage.schedule.of(rate, steps, updates))

        return cls(models, partial(ALGORITHMS[stage.algorithm].build, stage, optimizer_at), stage, config.data, end_of_turn)

    @cached_property
    def algorithm(self) -> Algorithm:
        """What the loop knows of the algorithm."""
        return self.build(self.models.student, self.models.discriminator)

    @property
    def samples(self) -> int:
        """N; 0 in a stage that samples nothing."""
        return self.stage.group_size if isinstance(self.stage, SamplingStageConfig) else 0

    def rows(self, responses: int, groups: int | None = None) -> RowShape:
        """The row shape of the student's steps, for batches with this many responses per group."""
        return row_shape(self.data, self.models.mesh, groups or self.stage.batch_groups, responses)

    def discriminator_rows(self, groups: int | None = None) -> RowShape:
        """The row shape of the discriminator's steps: the teacher's response and N samples."""
        return row_shape(self.data, self.models.mesh, groups or self.stage.batch_groups, 1 + self.samples, together=True)

    @cached_property
    def student_step(self) -> Program:
        """(student, rows, guidance) -> (student, metrics); the student is donated."""
        out = (shardings_of(self.models.abstract_role(self.models.student)), replicated(self.models.mesh))
        return self.models.program(lambda *networks: self.build(*networks).student, donates=True, out_shardings=out)

    @cached_property
    def discriminator_step(self) -> Program:
        """(discriminator, rows[, rate]) -> (discriminator, scores_BJ, metrics); the discriminator is donated."""

        def step(*networks: Network) -> Callable[..., Any]:
            made = self.build(*networks).discriminator
            assert made is not None
            return made

        return self._of_discriminator(step)

    @cached_property
    def scores_step(self) -> Program:
        """The same without an update."""
        assert isinstance(self.stage, SamplingStageConfig)
        frozen, optimizer = self.stage.discriminator.model_copy(update={"train": False}), self.models.optimizer
        return self._of_discriminator(lambda _, judge: gad.make_discriminator_step(judge, optimizer, frozen))

    def _of_discriminator(self, make: Callable[[Network, Network], Callable[..., Any]]) -> Program:
        everywhere = replicated(self.models.mesh)
        role = shardings_of(self.models.abstract_role(self.models.discriminator))
        return self.models.program(make, donates=True, out_shardings=(role, everywhere, everywhere))

    @cached_property
    def score(self) -> Program:
        """(discriminator's parameters, rows) -> scores_BJ."""
        return self.models.program(lambda _, judge: gad.make_score(judge), out_shardings=replicated(self.models.mesh))

    @cached_property
    def finite(self) -> Callable[[TrainState], jax.Array]:
        """(state) -> whether every number in it is finite."""

        def finite(state: TrainState) -> jax.Array:
            return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]))

        return self.models.jit(finite, out_shardings=replicated(self.models.mesh))

    @cached_property
    def teacher_loss(self) -> Program:
        """(student's parameters, rows) -> cross entropy in nats a token."""
        return self.models.program(lambda student, _: seqkd.make_loss(student), out_shardings=replicated(self.models.mesh))

    @property
    def sampling_plan(self) -> SamplingPlan:
        """What its rollouts are compiled for."""
        assert isinstance(self.stage, SamplingStageConfig)
        stage = self.stage
        return SamplingPlan(
            samples=stage.group_size,
            response_tokens=self.data.max_response_tokens,
            temperature=stage.temperature,
            end_of_turn=self.end_of_turn,
            top_k=stage.top_k,
            top_p=stage.top_p,
        )

    @cached_property
    def sampler(self) -> "Sampler":
        """The stage's rollouts."""
        return Sampler(self.models, self.data, self.sampling_plan)


class Sampler:
    """Responses to prompts under one sampling plan, from whatever parameters they are asked of; for batches of any number of groups."""

    def __init__(self, models: Models, data: DataConfig, plan: SamplingPlan):
        self._models = models
        self._backend: RolloutBackend
        if (remote := models.rollout.remote) is not None:
            self._backend = Remote(models.student, plan, remote)
        else:
            self._backend = Engine(models.student, models.mesh, plan, data.max_prompt_tokens, models.rollout)

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], key: jax.Array, step: int, limits_BN: np.ndarray | None = None
    ) -> Rollout:
        """Samples for B prompts from a student of `step` steps. The streams depend on (key, step, group, sample, position).

        Returns:
            a Rollout of NumPy arrays.
        """
        self._backend.update(self._models.whole(self._models.student, params), step)
        return self._backend.generate(prompts, key, step, limits_BN)


def responses_of(rollout: Rollout) -> tuple[list[list[tuple[int, ...]]], list[list[list[float]]]]:
    """The sampled ids and log-probabilities of each group's responses, without padding."""
    ids: list[list[tuple[int, ...]]] = []
    logps: list[list[list[float]]] = []
    for tokens_NR, logps_NR, lengths_N in zip(rollout.tokens_BNR, rollout.logps_BNR, rollout.lengths_BN, strict=True):
        ids.append([tuple(tokens[:length].tolist()) for tokens, length in zip(tokens_NR, lengths_N, strict=True)])
        logps.append([values[:length].tolist() for values, length in zip(logps_NR, lengths_N, strict=True)])
    return ids, logps
