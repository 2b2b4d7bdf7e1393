"""The base class of every config section: frozen, keyword-only, and closed to unknown keys.

A section's class lives beside the part that it configures; `gadjax.config` puts the sections together.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, immutable part of the config. Unknown keys and values of the wrong type are refused when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, populate_by_name=True)
