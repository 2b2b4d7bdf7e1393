"""A trained student as a Hugging Face folder."""

from pathlib import Path

import jax

from gadjax.models.checkpoint import save
from gadjax.session import Session


def export_stage(session: Session, name: str) -> Path:
    """Writes the student of stage `name` to the run's `export/<stage>` and returns the folder. One that is there is kept."""
    folder = session.run.folder / "export" / name
    if folder.exists():
        return folder
    params = session.student_params(name)
    tokens = {"eos_token_id": session.text.end_of_turn, "pad_token_id": session.text.pad}
    save(folder, session.family, session.dims, jax.device_get(params), tokens, session.folder)
    return folder
