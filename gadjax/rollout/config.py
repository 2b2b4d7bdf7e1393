"""How a rollout is laid out on the devices: nothing here changes what is sampled, but for ties that rounding decides."""

from pydantic import Field

from gadjax.section import Section
from gadjax.sharding import MeshConfig


class RolloutConfig(Section):
    """The size of the decode loop.

    Attributes:
        slots: S, samples that are decoded at once; by default 512, or all where there are fewer.
        prompts: G, prompts that are at hand at once; by default twice as many as the slots' samples have, or all.
        look_every: steps after which prompts whose samples have all ended give their places to the next ones.
        halvings: how often half of the slots are given up at the end, where no sample waits for them; by default twice where
            responses may be so long that it pays for the compilation. 0: a sample's bits do not depend on the lengths of others
            even where a matrix product's rounding depends on its number of rows.
        mesh: how weights, prompts and slots lie on the devices while they decode; by default as in training. They are laid out anew on the
            devices themselves.
    """

    slots: int | None = Field(default=None, ge=1)
    prompts: int | None = Field(default=None, ge=1)
    look_every: int = Field(default=32, ge=1)
    halvings: int | None = Field(default=None, ge=0)
    mesh: MeshConfig | None = None
