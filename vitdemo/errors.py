"""Two exceptions, for errors that the user can correct and for engines that break; one-line messages for OSErrors."""

import errno
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

CURES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "no permission; change it with chmod, or work as a user who has it",
    errno.EROFS: "on a read-only disk; choose a place on another disk",
    errno.ENOTDIR: "is not a folder; check the path",
    errno.ENOSPC: "the disk is full; make room and run again (evaluate with --resume)",
}


class VitdemoError(Exception):
    """Bad input. The message is one line: the name of the file or option, what is wrong, and what to do.

    The command line prints the message unchanged and ends with exit code 2.
    """


class EngineFailure(RuntimeError):
    """An engine broke while running, so its run is invalid. The command line ends with exit code 1."""


def at_least_1(**values: object) -> None:
    """Refuse values that are not whole numbers of at least 1.

    Args:
        values: the values by the names of their options; None is an option that was left out.

    Raises:
        VitdemoError: for the first such value.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")


def reason_of(error: BaseException) -> str:
    """Another library's error as one line: the first line of its message, or its type where the message is empty."""
    kind, said = type(error).__name__, str(error).strip()
    memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"  # torch and Ray have their own types
    if memory or "can't allocate memory" in said:
        return "out of memory; take a smaller batch or model, or close other programs"
    if isinstance(error, KeyError):  # its message is the key alone
        return f"{kind}: {said}"
    return said.split("\n")[0] or kind


@contextmanager
def named_errors(path: Path | str, instead: str = ""):
    """Turn an OSError inside the block into a VitdemoError of one line.

    Args:
        path: the path to name where the OSError names no file.
        instead: a second remedy, appended to the usual one.
    """
    try:
        yield
    except OSError as error:
        cure = CURES.get(error.errno, f"{error.strerror or error}; correct that and run again")
        raise VitdemoError(f"{error.filename or path}: {cure}{instead}") from None


@contextmanager
def terminate_as_interrupt():
    """Within the block, raise KeyboardInterrupt on SIGTERM and on SIGHUP (the terminal was closed), as on Ctrl-C.

    All three then end in the same clean-up. ``nohup`` stays in force.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    others = (signal.SIG_IGN, None)  # the signal is ignored, or its handler is not Python's
    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(kind) not in others]
    before = {kind: signal.signal(kind, interrupt) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
