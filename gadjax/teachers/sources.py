"""Where the prompts come from: a file, the tutor, or the file of the teacher's answers."""

import hashlib
import re
from collections.abc import Iterable

from gadjax.errors import UserError
from gadjax.prompts import PromptsConfig, distinct, read_prompts
from gadjax.records import Prompt
from gadjax.teachers import grammar
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.file import read_pairs

TUTOR = re.compile(r"tutor:([1-9][0-9]{0,6})")


def load_prompts(prompts: PromptsConfig, teacher: TeacherConfig, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The training prompts and the validation prompts; no prompt is in both.

    Args:
        seed: of the tutor's prompts, and of the choice of those held out.

    Raises:
        UserError: no source is given, or it is broken.
    """
    if prompts.train is None and teacher.backend != "file":
        raise UserError("prompts.train", "is not given", "name a .jsonl file, or tutor:6000 for prompts that the tutor makes")
    made = iter(_tutor_prompts(prompts, seed))
    if prompts.train is None:
        train = _file_prompts(str(teacher.path))
    else:
        train = _load(prompts.train, "prompts.train", made)
    if prompts.validation is None:
        return hold_out(train, prompts.validation_share, seed)
    validation = _load(prompts.validation, "prompts.validation", made)
    shared = {prompt.messages[-1]["content"] for prompt in train} 
    return train, validation
