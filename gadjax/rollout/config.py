"""How a rollout is laid out on the devices: nothing here changes what is sampled, but for ties that rounding decides."""

from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gadjax.foreign import check_address, check_variable
from gadjax.section import Section
from gadjax.sharding import MeshConfig


class RemoteConfig(Section):
    """A server of vLLM that samples (`gadjax.rollout.remote`).

    Attributes:
        connections: samples that are asked for at once.
        seconds: after which it counts as dead.
        url: where, without /v1.
        weights: the folder that it serves, which both see; its weights are replaced for every rollout.
        model: the name under which it serves them; by default the folder's.
        api_key_env: the environment variable that holds its key, if it has one.
    """

    connections: int = Field(default=256, ge=1)
    seconds: float = Field(default=600.0, gt=0)
    url: str
    weights: Path = Field(strict=False)
    model: str | None = None
    api_key_env: str = "VLLM_API_KEY"

    _may_be_sent_to = field_validator("url")(partial(check_address, "rollout.remote.url"))
    _is_no_key = field_validator("api_key_env")(partial(check_variable, "rollout.remote.api_key_env"))


class RolloutConfig(Section):
    """What samples, and the size of the decode loop.

    Attributes:
        backend: "ours", or "remote": the server of `remote`.
        remote: that server; for the other backend nothing.
        slots: S, samples that are decoded at once; by default 512, or all where there are fewer.
        prompts: G, prompts that are at hand at once; by default twice as many as the slots' samples have, or all.
        look_every: steps after which prompts whose samples have all ended give their places to the next ones.
        halvings: how often half of the slots are given up at the end, where no sample waits for them; by default twice where
            responses may be so long that it pays for the compilation. 0: a sample's bits do not depend on the lengths of others
            even where a matrix product's rounding depends on its number of rows.
        mesh: how weights, prompts and slots lie on the devices while they decode; by default as in training, but that `tensor` takes as
            many devices from `fsdp` and `context` as there are key/value heads for. They are laid out anew on the devices themselves.
    """

    backend: Literal["ours", "remote"] = "ours"
    remote: RemoteConfig | None = None
    slots: int | None = Field(default=None, ge=1)
    prompts: int | None = Field(default=None, ge=1)
    look_every: int = Field(default=32, ge=1)
    halvings: int | None = Field(default=None, ge=0)
    mesh: MeshConfig | None = None

    @model_validator(mode="after")
    def _a_server_for_remote(self) -> Self:
        if (self.backend == "remote") != (self.remote is not None):
            raise ValueError("backend `remote` and the section `remote` belong together: give both or none")
        return self
