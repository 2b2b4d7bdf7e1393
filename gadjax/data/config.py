"""The config section `data`."""

from pydantic import Field, model_validator

from gadjax.errors import UserError
from gadjax.section import Section


class DataConfig(Section):
    """Lengths and rows.

    Attributes:
        max_prompt_tokens: P; longer prompts lose the end of the user's text.
        max_response_tokens: R; longer responses are cut and have no end of turn.
        row_tokens: L, tokens of a packed row, rounded up to what the mesh divides; by default the largest group.
        rows: M, packed rows of a micro-batch; by default one per data-parallel device.
        row_widths: for how many widths of rows the steps are compiled, from half of `row_tokens` up: a micro-batch whose rows are not full
            takes the least that holds them. Worth the compilation where a row has room for hardly more than one group.
        teachers: whose answers are used, by name: `teacher`, or one of `teachers`; null: those of all.
        samples: how many answers of each teacher to a prompt are used; null: as many as it was asked for.
    """

    max_prompt_tokens: int = Field(default=2048, ge=1)
    max_response_tokens: int = Field(default=1536, ge=1)
    row_tokens: int | None = Field(default=None, ge=2)
    rows: int | None = Field(default=None, ge=1)
    row_widths: int = Field(default=1, ge=1, le=8)
    teachers: list[str] | None = Field(default=None, min_length=1)
    samples: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _a_row_holds_a_response(self) -> "DataConfig":
        shortest = self.max_prompt_tokens + self.max_response_tokens
        if self.row_tokens is not None and self.row_tokens < shortest:
            raise UserError("data.row_tokens", f"{self.row_tokens} is less than a prompt and a response", f"make it at least {shortest}")
        return self
