"""What a stage is trained with, kept in its checkpoints: it goes on with the same config, model, tokenizer, template and data only.

The run's config.yaml says so too; but files of a student can change behind one name, and a file that is kept can be edited.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from gadjax.config import dump_config
from gadjax.errors import UserError
from gadjax.models.checkpoint import TOKENIZER_FILES
from gadjax.runs import refuse_changes
from gadjax.session import Session

ENDS = 2**20  # bytes that are read at both ends of a file of weights: all of it would take as long as loading it


def lineage(session: Session, name: str) -> dict[str, Any]:
    """What stage `name` is trained with, for JSON."""
    config: dict[str, Any] = yaml.safe_load(dump_config(session.run.config))
    kept = {section: config[section] for section in ("student", "data", "optimizer")}
    kept |= {"run": {"seed": config["run"]["seed"]}, "stages": {name: config["stages"][name]}}
    return {"config": kept, "files": _files(session.folder), "snapshot": session.snapshot.digest}


def check_lineage(session: Session, name: str, before: dict[str, Any]) -> None:
    """Refuses to go on with a stage that was trained with something else.

    Raises:
        UserError: names the field or the file that has changed.
    """
    now, where = lineage(session, name), session.run.checkpoints(name)
    refuse_changes(before["config"], now["config"], where)
    for file in sorted(before["files"].keys() | now["files"].keys()):
        if before["files"].get(file) != now["files"].get(file):
            what = f"is not what stages.{name} was trained with"
            raise UserError(str(session.folder / file), what, "bring it back, or choose another run.name")
    session.snapshot.check_origin(before["snapshot"], where)


def _files(folder: Path) -> dict[str, str]:
    """What names the content of a student's config, tokenizer, template and weights."""
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    whole = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return whole | {path.name: _of_ends(path) for path in sorted(folder.glob("*.safetensors"))}


def _of_ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return hashlib.sha256(first + file.read() + str(size).encode()).hexdigest()
