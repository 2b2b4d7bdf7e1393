"""What to change in a config so that it fits: changes are made and counted by arithmetic before they are named."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from gadjax.config import Config
from gadjax.errors import UserError
from gadjax.models.rematerialisation import KEPT
from gadjax.planning.budget import Budget, Moment
from gadjax.planning.suggest import ROW_TOKENS
from gadjax.rollout.engine import FEWEST, SLOTS

Change = tuple[str, str, Any]  # section, field, value
RANK = 64
MORE = "more chips, as many as divide the width of the student's layers"


def knob(config: Config, limit: float, budget_of: Callable[[Config], Budget], over: Mapping[Moment, float] | None = None) -> str:
    """The changes, as the command line takes them, and what is needed then; or that no change is enough.

    Args:
        limit: GiB that a chip has.
        budget_of: the arithmetic of a config.
        over: GiB that the compiler has found beyond arithmetic, where it has been asked.
    """
    if found := _enough(config, limit, budget_of, over or {}):
        return found
    if config.adapters is None:
        with suppress(UserError):  # there are students and discriminators that stand on no base
            on_one_base = Config.model_validate(config.model_dump(by_alias=True) | {"adapters": {"rank": RANK}})
            if found := _enough(on_one_base, limit, budget_of, over or {}):
                return f"adapters.rank={RANK} {found}"
    return MORE


def _enough(config: Config, limit: float, budget_of: Callable[[Config], Budget], over: Mapping[Moment, float]) -> str | None:
    """One change after another, of what is too large, until all fits."""
    changes: dict[Moment, Iterator[Change]] = {"loading": iter(()), "rollout": _fewer_slots(config), "step": _smaller_steps(config)}
    made: dict[str, str] = {}
    while True:
        budget = budget_of(config)
        needed = {moment: budget.during(moment) + over.get(moment, 0.0) for moment in changes}
        large: Moment | None = next((moment for moment in changes if needed[moment] > limit), None)
        if large is None:
            return " ".join([*made.values(), f"(then {max(needed.values()):.1f} GiB by arithmetic)"])
        change = next(changes[large], None)
        if change is None:
            return None
        section, field, value = change
        made[field] = f"{section}.{field}={str(value).lower()}"
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})


def _smaller_steps(config: Config) -> Iterator[Change]:
    """Products made again first: shorter rows stay half empty more often."""
    levels = sorted(KEPT, key=lambda again: -len(KEPT[again]))
    for again in levels[levels.index(config.student.rematerialise) + 1 :]:
        yield "student", "rematerialise", again
    data = config.data
    shortest = data.max_prompt_tokens + data.max_response_tokens
    for length in sorted({*ROW_TOKENS, shortest}, reverse=True):
        if shortest <= length < (data.row_tokens or ROW_TOKENS[-1]):
            yield "data", "row_tokens", length


def _fewer_slots(config: Config) -> Iterator[Change]:
    slots = config.rollout.slots or SLOTS
    while slots // 2 >= FEWEST:
        slots //= 2
        yield "rollout", "slots", slots
