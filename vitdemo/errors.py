"""The one exception for what a user can put right, and the system's refusals turned into it."""

import errno
from contextlib import contextmanager
from pathlib import Path

CURES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "no permission; change it with chmod, or work as a user who has it",
    errno.ENOSPC: "the disk is full; make room and run again (evaluate and benchmark with --resume)",
}


class VitdemoError(Exception):
    """Bad input. The message is one line: what is wrong, the file's or option's name, what to do.

    The command line prints it as it is and ends with exit code 2.
    """


def reason_of(error: BaseException) -> str:
    """Others' errors in one line: the first one of what they say, or else their kind."""
    kind, said = type(error).__name__, str(error).strip()
    memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"  # torch has its own, and Ray too
    if memory or "can't allocate memory" in said:
        return "out of memory; take a smaller batch or model, or close other programs"
    if isinstance(error, KeyError):  # says nothing but the key
        return f"{kind}: {said}"
    return said.split("\n")[0] or kind


def check_whole(**values: int | None) -> None:
    """Raise VitdemoError, which names it, for a value that is neither None nor a whole number of at least 1."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")


@contextmanager
def named_errors(path: Path | str):
    """Turn the system's refusals inside the block into one line that names the file, ``path`` if none is known."""
    try:
        yield
    except OSError as error:
        cure = CURES.get(error.errno, f"{error.strerror or error}; put that right and run again")
        raise VitdemoError(f"{error.filename or path}: {cure}") from None
