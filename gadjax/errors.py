"""The ways in which gadjax stops: the user's mistake, what may pass by itself, and everything else.

A `UserError` is told in one line that names the field or file and the mend, without a traceback, and ends the
process with status 2; one that may pass, a `Passing`, with status 1: whoever started the process may start it again.
Any other exception is a fault of ours: traceback, status 1.
"""

import errno
import sqlite3

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        where: the config field (`stages.gad.group_size`), file or environment variable that is at fault.
        what: what is wrong with it.
        mend: what to write or do instead.
    """

    def __init__(self, where: str, what: str, mend: str):
        super().__init__(f"{where}: {what}; {mend}")
        self.where, self.what, self.mend = where, what, mend

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # always one line


class Passing(UserError):
    """What may be over when the same command is started again: somebody else's server does not answer."""


def first_line(error: Exception) -> str:
    """Of what a library says in many, or the error's kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def no_room(error: OSError | sqlite3.Error) -> bool:
    """Whether the disk is full or may not be written to, which is not our fault."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
