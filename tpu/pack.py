"""Packs what a worker needs into one archive: `python tpu/pack.py runs/NAME code.tar`.

The code as it is committed; the run's resolved config, as run.yaml; and the files and folders of prompts and answers that it names.
"""

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gadjax.algorithms.stage import SamplingStageConfig
from gadjax.config import Config, is_elsewhere
from gadjax.errors import UserError
from gadjax.runs import CONFIG, Run
from gadjax.teachers.sources import TEST_SETS

NOT_THERE = "would not be there on a TPU"


def sources(config: Config) -> Iterator[tuple[str, str | None]]:
    """What the config reads prompts and answers from, by the names of its fields."""
    yield "prompts.train", config.prompts.train
    yield "prompts.validation", config.prompts.validation
    yield from ((f"prompts.tests.{name}", source) for name, source in config.prompts.tests.items() if source not in TEST_SETS)
    for name, teacher in config.all_teachers.items():
        yield "teacher.path" if teacher is config.teacher else f"teachers.{name}.path", teacher.path


def origins(config: Config) -> Iterator[tuple[str, str | None]]:
    """The models that the config names, by the names of its fields."""
    for name, stage in config.stages.items():
        yield f"stages.{name}.from", stage.from_ if is_elsewhere(stage.from_) else None
        if isinstance(stage, SamplingStageConfig) and is_elsewhere(stage.discriminator.from_ or ""):
            yield f"stages.{name}.discriminator.from", stage.discriminator.from_
    student = config.student.path
    yield "student.path", student if student and Path(student).expanduser().is_dir() else None


def others(config: Config) -> Iterator[tuple[str, str | None, str]]:
    """What else of this machine the config needs while it trains and evaluates, and what to do without."""
    later = "leave it out, and score the answers later, where both runs are"
    yield "evaluation.referee", config.evaluation.referee, later
    yield "run.wandb", config.run.wandb and "its key", "leave it out: the report and TensorBoard have the same numbers"
    yield "rollout.remote", config.rollout.remote and f"the folder {config.rollout.remote.weights}", "leave it and `backend: remote` out"


def inputs(run: Run) -> list[Path]:
    """The files and folders that the config names and a worker must have at the same place. What lies below the run's folder travels
    through the bucket.

    Raises:
        UserError: a worker would lack what the config names, which would be seen when the chips are paid for.
    """
    found = list[Path]()
    for field, source in sources(run.config):
        names = (source, source.partition(":")[0]) if source else ()  # a folder may have `:split` behind it
        path = next((Path(name) for name in names if Path(name).expanduser().exists()), None)
        if path is None or _is_below(path, run.folder):
            continue
        if not _is_below(path, Path()):
            raise UserError(field, f"{path} {NOT_THERE}", "give the path of a file or folder inside the repository, from its root")
        found.append(path)
    for field, origin in origins(run.config):
        if origin and not _is_below(Path(origin), run.folder):
            mend = "name a hub model" if field == "student.path" else "name a stage of this run"
            raise UserError(field, f"{origin} {NOT_THERE}", f"{mend}, or move it below {run.folder}")
    for field, named, mend in others(run.config):
        if named:
            raise UserError(field, f"{named} {NOT_THERE}", mend)
    return list(dict.fromkeys(found))


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, from where gadjax is started and without a way round."""
    return path.is_relative_to(folder) and path != folder and ".." not in path.parts and path.parts[0] != "~"


def pack(run: Run, archive: Path) -> None:
    """Writes the archive."""
    if subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True).stdout:
        print("pack.py: what is not committed stays here", file=sys.stderr)
    subprocess.run(["git", "archive", "--output", str(archive), "--format=tar", "HEAD"], check=True)
    with tarfile.open(archive, "a", dereference=True) as tar:  # a link may lead to where a worker has nothing
        tar.add(run.folder / CONFIG, "run.yaml")
        for path in inputs(run):
            tar.add(path, filter=partial(_unhidden, path))


def _unhidden(root: Path, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Hidden files of a folder are not read as prompts, and may hold a key."""
    name = Path(member.name)
    return None if name.name.startswith(".") and name != root else member


if __name__ == "__main__":
    try:
        pack(Run.at(Path(sys.argv[1])), Path(sys.argv[2]))
    except UserError as mistake:
        print(f"pack.py: {mistake}", file=sys.stderr)
        sys.exit(2)
