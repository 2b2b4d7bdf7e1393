"""The dimensions of a config's student without its weights: models of the paper and their relatives are known by name."""

import json
from importlib import resources
from pathlib import Path

from gadjax.config import StudentConfig
from gadjax.errors import UserError
from gadjax.models.checkpoint import FAMILIES, read_config
from gadjax.models.decoder import DecoderConfig
from gadjax.models.fresh import fresh_dims

KNOWN = resources.files("gadjax.planning") / "students"


def known_names() -> list[str]:
    """The models whose dimensions are shipped, by their names without the owner."""
    return sorted(file.name.removesuffix(".json") for file in KNOWN.iterdir())


def known(name: str) -> DecoderConfig:
    """The dimensions of one of `known_names`."""
    described = json.loads((KNOWN / f"{name}.json").read_text())
    return FAMILIES[described["model_type"]].read(described)


def dims_of(student: StudentConfig) -> DecoderConfig:
    """The dimensions of a config's student: a folder's if there is one, else those shipped for its name.

    Raises:
        UserError: neither a folder nor a name that is known. Nothing is downloaded.
    """
    if student.random is not None:
        return fresh_dims(student.random, student.random.words)
    path = str(student.path)
    if Path(path).expanduser().is_dir():
        return read_config(Path(path).expanduser())[1]
    name = path.rpartition("/")[2]
    if name not in known_names():
        what = f"{path} is no folder, and its dimensions are not known"
        raise UserError("student.path", what, f"download it, or take one of {', '.join(known_names())}")
    return known(name)
