"""The programs of a stage, traced with abstract states: what train runs, without an array.

Letters: B groups, J responses per group, A micro-batches, M rows of a micro-batch, L tokens of a row.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.algorithms.forward import columns
from gadjax.algorithms.stage import Guidance
from gadjax.data.packing import RowShape
from gadjax.models.adapters import without
from gadjax.models.cache_attention import RESPONSE_BLOCK, RESPONSE_BLOCKS
from gadjax.models.cudnn_attention import serves
from gadjax.models.decoder import DecoderConfig, Trunk
from gadjax.models.rematerialisation import KEPT
from gadjax.models.splash_attention import ATTENDED
from gadjax.planning.flops import Trips
from gadjax.planning.workload import Workload
from gadjax.rollout.decode import bucket
from gadjax.rollout.engine import Engine
from gadjax.sharding import multiple_of, named_sharding
from gadjax.steps import Programs
from gadjax.types import Cells, PackedRows, Params


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: as in the plan.
        traced: gives what it computes and can be compiled.
        trips: how often its loops run that depend on data.
        times: how often it runs in a step of training; 0 for what runs once before the first one. Of prefills, which are compiled for the
            longest prompts, as many of these as take the time of all, if time goes with tokens (weights are read for short ones too).
        beside: what lies on the devices beside its arguments, a tree of abstract arrays.
    """

    name: str
    traced: Any
    trips: Trips
    times: float
    beside: Any


def rows_of(programs: Programs, shape: RowShape, responses: int) -> PackedRows:
    """Abstract rows of a batch."""

    def array(size: tuple[int, ...], dtype: Any, *names: str | None) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=named_sharding(names, size, programs.models.mesh))

    sizes, pairs = (shape.micro_batches, shape.rows, shape.length), (shape.groups, responses)
    cells = [array(sizes, jnp.float32 if name == "logps_ML" else jnp.int32, None, "rows", None) for name in Cells._fields]
    of_groups = [array(pairs, jnp.int32, None, None) for _ in range(3)]
    fits = array((shape.micro_batches, shape.widths), jnp.bool_, None, None)
    return PackedRows(Cells(*cells), *of_groups, fits_AW=fits, used=array((), jnp.int32), total=array((), jnp.float32))


def bytes_on_chip(tree: Any) -> float:
    """What abstract arrays take on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return float(sum(_size(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


@dataclass(frozen=True)
class Traced:
    """A stage's programs and what is on the devices when they run.

    Attributes:
        stage: its name.
        programs: the stage's.
        work: what its batches hold.
        platform: of the chips, which may not be that of the devices: "cpu", "gpu" or "tpu".
    """

    stage: str
    programs: Programs
    work: Workload
    platform: str

    @property
    def dims(self) -> DecoderConfig:
        """The student's."""
        return self._trunk.config

    @property
    def judges(self) -> bool:
        """Whether there is a discriminator, and samples for it to judge."""
        return self.programs.algorithm.discriminator is not None

    @property
    def fused(self) -> bool:
        """Whether attention in rows is a kernel, which keeps no scores."""
        return self.platform == "tpu" or (self.platform == "gpu" and serves(self._trunk.dtype, self.dims.head_width))

    @property
    def kept(self) -> int:
        """How many numbers of the compute dtype gradients keep of a token in a layer: its input and what is not computed again."""
        dims = self.dims
        queries, keys = dims.heads * dims.head_width, dims.kv_heads * dims.head_width
        widths = {"query": queries, "key": keys, "value": keys, "output": dims.width, "gate": dims.feed_forward, "up": dims.feed_forward}
        widths[ATTENDED] = (queries + 2 * dims.heads) if self.fused else 0  # and of each head a float32
        return dims.width + sum(widths[name] for name in KEPT[self._trunk.rematerialise])

    @property
    def rows_parts(self) -> int:
        """Over how many devices rows are divided."""
        return multiple_of("rows", self.programs.models.mesh)

    @property
    def tokens_parts(self) -> int:
        """Over how many devices what a gradient keeps of a row's tokens is divided."""
        return self.rows_parts * multiple_of("tokens", self.programs.models.mesh)

    @property
    def _trunk(self) -> Trunk:
        network = self.programs.models.student
        return network.bind(network.shapes).trunk

    @property
    def engine(self) -> Engine:
        """What samples."""
        programs, models = self.programs, self.programs.models
        return Engine(models.student, models.mesh, programs.sampling_plan, programs.data.max_prompt_tokens, models.rollout)

    @property
    def reference(self) -> Params | None:
        """The reference student, if the stage has one."""
        models = self.programs.models
        return models.abstract_reference() if self.programs.algorithm.needs_reference else None

    def trips(self, micro_batches: int, shape: RowShape, response_tokens: int) -> Trips:
        """Of a step's loops: micro-batches, and in them the chunks of the projection."""
        models = self.programs.models
        with jax.sharding.use_abstract_mesh(models.mesh.abstract_mesh):
            chunk = columns((shape.rows, shape.length), self.dims.vocabulary)
        chunks = response_tokens / (micro_batches * shape.rows * chunk)
        return lambda depth: (micro_batches, max(1.0, chunks), 1.0)[min(depth, 2)]

    def student(self) -> Step:
        """The student's step."""
        programs, each = self.programs, self.programs.samples if self.programs.algorithm.student_reads == "samples" else 1
        models, shape = programs.models, programs.rows(each)
        scores: Any = jax.ShapeDtypeStruct(
            (shape.groups, 1 + each), jnp.float32, sharding=named_sharding((None, None), (1, 1), models.mesh)
        )
        guidance = Guidance(self.reference, scores)
        traced = programs.student_step.trace(models.abstract_role(models.student), rows_of(programs, shape, each), guidance)
        used, tokens = self.work.rows_used(shape, each), self.work.response_tokens(each)
        judge = models.abstract_role(models.discriminator) if self.judges else None
        return Step("student", traced, self.trips(used, shape, tokens), 1.0, judge)

    def discriminator(self) -> Step:
        """The discriminator's step."""
        programs, each = self.programs, 1 + self.programs.samples
        models, shape = programs.models, programs.discriminator_rows()
        traced = programs.discriminator_step.trace(models.abstract_role(models.discriminator), rows_of(programs, shape, each))
        beside = (models.abstract_role(models.student), self.reference, without(models.base, models.discriminator.shapes))
        return Step("discriminator", traced, self.trips(self.work.rows_used(shape, each), shape, 0), 1.0, beside)

    def rollout(self) -> list[Step]:
        """The programs of a rollout, by the engine's own names; of the decode loop all of its steps together."""
        models = self.programs.models
        engine, student = self.engine, models.abstract_role(models.student)
        judge = models.abstract_role(models.discriminator)
        held = engine.resident(self.work.groups)
        programs = engine.traced(models.whole(models.student, student.params), held)
        weights = next(arguments[0] for name, _, arguments in programs if name == "decode")
        everything = (models.base, student, judge, self.reference, held, weights)
        _, slots, together = engine.sizes(self.work.groups)
        # The longest is compiled, for its memory; what most take in time, as prompts are, is a part of that.
        longest = self.programs.data.max_prompt_tokens
        share = bucket(self.work.prompt_tokens, longest) / longest
        prefills, steps = self.work.prefills(together) * share, self.work.decode_steps(slots)
        blocks = min(RESPONSE_BLOCKS, -(-self.programs.data.max_response_tokens // RESPONSE_BLOCK))
        return [
            Step(
                name,
                traced,
                lambda depth: steps if depth == 0 else blocks,
                prefills if name == "prefill" else 1.0,
                _without(everything, (arguments, weights) if name == "weights" else arguments),
            )
            for name, traced, arguments in programs
        ]

    def loading(self) -> Step:
        """The last part of loading: a model's weights get their optimizer. Where there is a discriminator it is that, whose weights were
        copied, and the student is there with its own.
        """
        models = self.programs.models
        last, beside = (models.discriminator, models.abstract_role(models.student)) if self.judges else (models.student, None)
        return Step("loading", models.fresh(last).trace(models.abstract_role(last).params), lambda _: 1.0, 0.0, (models.base, beside))

    def all(self) -> list[Step]:
        """Everything that runs, in its order."""
        judging = [*self.rollout(), self.discriminator()] if self.judges else []
        return [self.loading(), *judging, self.student()]


def _without(tree: Any, arguments: Any) -> Any:
    """The leaves of `tree` that are not among the arguments."""
    taken = {id(leaf) for leaf in jax.tree.leaves(arguments)}
    return [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in taken]
