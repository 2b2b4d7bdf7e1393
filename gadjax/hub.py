"""Repositories of the Hugging Face hub, fetched; a mistake of the user told apart from what may pass by itself."""

from collections.abc import Sequence
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from gadjax.errors import Passing, UserError

BUSY = (408, 429)  # statuses that pass, besides those of the server's own faults


def fetched(name: str, where: str, what: str, mend: str, patterns: Sequence[str], kind: str | None = None) -> Path:
    """The folder of a repository's files that fit the patterns; what is at hand already is not fetched again.

    Args:
        name: of the repository.
        where: the config field that names it.
        what: is wrong if the hub has no such repository for us.
        mend: what to do then.
        patterns: of files, as in a shell.
        kind: "dataset"; by default a model.

    Raises:
        UserError: the hub does not give it.
        Passing: the hub is not there, or busy.
    """
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, httpx2.TransportError, OSError) as error:
        told = f"{what} ({type(error).__name__})"
        if _passes(error) or _passes(error.__cause__):  # of a file that is not at hand the cause tells why it could not be fetched
            raise Passing(where, told, "the hub was not to be had: try again") from error
        raise UserError(where, told, mend) from error


def _passes(error: BaseException | None) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in BUSY
    return isinstance(error, httpx2.TransportError)
