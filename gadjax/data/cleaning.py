"""The config section `cleaning`: which of the teacher's answers are not trained on, and how many that are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, field_validator

from gadjax.data.languages import UNKNOWN, check_installed, language
from gadjax.data.words import copies, near_copies, overlapping, words
from gadjax.errors import UserError
from gadjax.moderation import Flagged, ModerationConfig
from gadjax.records import Answer, Prompt
from gadjax.section import Section


class CleaningConfig(Section):
    """What is left out of the data. Every reason is told with its count.

    Attributes:
        duplicates: training prompts with the same words as an earlier one.
        near_duplicates: training prompts whose similarity to an earlier one (of 0 to 1) reaches this; null keeps them.
        overlap: training prompts that share so many words in a row with a held-out prompt; null keeps them.
        truncated: answers that the length limit cut off, in both splits.
        long_prompts: prompts of more than `data.max_prompt_tokens`, in both splits; `cut` takes the end of their last text.
        languages: of prompts and answers, as ISO 639-1 codes; others are left out in both splits, null keeps all. Texts too short to
            tell are kept.
        moderation: asks an endpoint about prompts and answers of both splits; null does not.
    """

    duplicates: bool = True
    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    overlap: int | None = Field(default=13, ge=1)
    truncated: Literal["drop", "keep"] = "drop"
    long_prompts: Literal["cut", "drop"] = "cut"
    languages: list[str] | None = Field(default=None, min_length=1)
    moderation: ModerationConfig | None = None

    @field_validator("languages")
    @classmethod
    def _can_be_told(cls, languages: list[str] | None) -> list[str] | None:
        if languages is not None:
            check_installed("cleaning.languages")
        return languages


TRAIN = ("train",)


@dataclass
class Cleaned:
    """The answers that are left of each split, and how many were left out for each reason."""

    answers: dict[str, list[Answer]]
    left_out: dict[str, int] = field(default_factory=dict)

    def drop(self, field: str, reason: str, splits: Sequence[str], faulty: Callable[[list[Answer]], Iterable[bool]]) -> None:
        """Leaves out and counts what `faulty` says of the splits' answers.

        Raises:
            UserError: nothing is left of a split; names the field.
        """
        for split in splits:
            found = self.answers[split]
            kept = [answer for answer, bad in zip(found, faulty(found), strict=True) if not bad]
            if found and not kept:
                raise UserError(f"cleaning.{field}", f"leaves nothing of prompts.{split} ({reason})", "change it, or the prompts")
            self.left_out[reason] = self.left_out.get(reason, 0) + len(found) - len(kept)
            self.answers[split] = kept


def clean(
    answers: Mapping[str, Sequence[Answer]], prompts: Mapping[str, Prompt], config: CleaningConfig, flagged: Flagged | None = None
) -> Cleaned:
    """Leaves answers out, reason by reason; a later reason is counted among what the earlier ones left.

    Args:
        answers: of the splits: `train`, `validation` and the test sets.
        prompts: by their ids.
        config: the reasons.
        flagged: the moderation's verdict on texts.

    Raises:
        UserError: nothing is left of a split; names the reason's field.
    """
    cleaned, every = Cleaned({split: list(found) for split, found in answers.items()}), [*answers]
    if config.truncated == "drop":
        cleaned.drop("truncated", "cut off by the teacher's length limit", every, lambda found: (answer.truncated for answer in found))
    if config.languages is not None:
        spoken = {*config.languages, UNKNOWN}
        cleaned.drop("languages", "in other languages", every, lambda found: (not _languages(each, prompts) <= spoken for each in found))
    _drop_copies(cleaned, prompts, config)
    if flagged is not None:
        cleaned.drop("moderation", "flagged by the moderation", every, lambda found: _either_flagged(found, prompts, flagged))
    return cleaned


def _drop_copies(cleaned: Cleaned, prompts: Mapping[str, Prompt], config: CleaningConfig) -> None:
    """Leaves out training prompts that are too much like others."""

    def by_prompt(judge: Callable[[list[list[str]]], Iterable[bool]]) -> Callable[[list[Answer]], list[bool]]:
        """A prompt's verdict for all answers to it."""

        def verdicts(found: list[Answer]) -> list[bool]:
            names = list(dict.fromkeys(answer.prompt_id for answer in found))
            bad = dict(zip(names, judge([_words(prompts[name]) for name in names]), strict=True))
            return [bad[answer.prompt_id] for answer in found]

        return verdicts

    if config.duplicates:
        cleaned.drop("duplicates", "copies of earlier prompts", TRAIN, by_prompt(copies))
    if (similarity := config.near_duplicates) is not None:
        judged = by_prompt(lambda texts: near_copies(texts, similarity))
        cleaned.drop("near_duplicates", "near copies of earlier prompts", TRAIN, judged)
    if (n := config.overlap) is not None:
        others = [answer for split, found in cleaned.answers.items() if split not in TRAIN for answer in found]
        held_out = [_words(prompts[answer.prompt_id]) for answer in others]
        judged = by_prompt(lambda texts: overlapping(texts, held_out, n))
        cleaned.drop("overlap", f"share {n} words in a row with a held-out prompt", TRAIN, judged)


def _words(prompt: Prompt) -> list[str]:
    """Of the conversation; a system message is often that of all prompts."""
    return words("\n".join(message["content"] for message in prompt.messages if message["role"] != "system"))


def _languages(answer: Answer, prompts: Mapping[str, Prompt]) -> set[str]:
    return {language(prompts[answer.prompt_id].text), language(answer.text)}


def _either_flagged(found: Sequence[Answer], prompts: Mapping[str, Prompt], flagged: Flagged) -> list[bool]:
    asked = flagged([prompts[answer.prompt_id].text for answer in found])
    return [one or other for one, other in zip(asked, flagged([answer.text for answer in found]), strict=True)]
