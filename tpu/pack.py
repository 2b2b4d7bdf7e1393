"""Packs what a worker needs into one archive: `python tpu/pack.py runs/NAME code.tar`.

The code as it is committed; the run's resolved config, as run.yaml; and the files of prompts and answers that it names.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

from gadjax.config import is_elsewhere
from gadjax.errors import UserError
from gadjax.runs import CONFIG, Run


def inputs(run: Run) -> list[Path]:
    """The files that the config names and a worker must have at the same place.

    Raises:
        UserError: one of them lies outside of the repository, or is too large to be packed.
    """
    config = run.config
    named = {"prompts.train": config.prompts.train, "prompts.validation": config.prompts.validation, "teacher.path": config.teacher.path}
    files = {field: Path(path) for field, path in named.items() if path and Path(path).expanduser().is_file()}
    for field, path in files.items():
        if path.is_absolute() or ".." in path.parts or str(path).startswith("~"):
            raise UserError(field, f"{path} would not be there on a TPU", "give the path of a file inside the repository, from its root")
    student = Path(config.student.path or "")
    if config.student.path and student.expanduser().is_dir() and not student.is_relative_to(run.folder):
        raise UserError("student.path", f"{student} would not be there on a TPU", f"name a hub model, or move it below {run.folder}")
    for name, stage in config.stages.items():
        if is_elsewhere(stage.from_) and not Path(stage.from_).is_relative_to(run.folder):
            mend = f"name a stage of this run, or a folder below {run.folder}"
            raise UserError(f"stages.{name}.from", f"{stage.from_} would not be there on a TPU", mend)
    return list(files.values())


def pack(run: Run, archive: Path) -> None:
    """Writes the archive."""
    if subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True).stdout:
        print("pack.py: what is not committed stays here", file=sys.stderr)
    subprocess.run(["git", "archive", "--output", str(archive), "--format=tar", "HEAD"], check=True)
    with tarfile.open(archive, "a") as tar:
        tar.add(run.folder / CONFIG, "run.yaml")
        for path in inputs(run):
            tar.add(path)


if __name__ == "__main__":
    try:
        pack(Run.at(Path(sys.argv[1])), Path(sys.argv[2]))
    except UserError as mistake:
        print(f"pack.py: {mistake}", file=sys.stderr)
        sys.exit(2)
