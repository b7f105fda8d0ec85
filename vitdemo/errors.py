"""What a user can put right and what an engine breaks on, as two exceptions; the system's refusals as the first."""

import errno
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

CURES = {
    errno.ENOENT: "no such file or folder; check the path",
    errno.EACCES: "no permission; change it with chmod, or work as a user who has it",
    errno.EROFS: "on a disk that is read-only; choose a place on another",
    errno.ENOTDIR: "is no folder; check the path",
    errno.ENOSPC: "the disk is full; make room and run again (evaluate with --resume)",
}


class VitdemoError(Exception):
    """Bad input. The message is one line: what is wrong, the file's or option's name, what to do.

    The command line prints it as it is and ends with exit code 2.
    """


class EngineFailure(RuntimeError):
    """An engine broke while running: the run it was part of is invalid. The command line ends with exit code 1."""


def at_least_1(**values: object) -> None:
    """Refuse what is no whole number from 1 up.

    Args:
        values: by their options' names; None is an option that was left out.

    Raises:
        VitdemoError: for the first that is none.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise VitdemoError(f"{name} {value!r}: must be a whole number of at least 1")


def reason_of(error: BaseException) -> str:
    """Others' errors in one line: the first one of what they say, or else their kind."""
    kind, said = type(error).__name__, str(error).strip()
    memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"  # torch has its own, and Ray too
    if memory or "can't allocate memory" in said:
        return "out of memory; take a smaller batch or model, or close other programs"
    if isinstance(error, KeyError):  # says nothing but the key
        return f"{kind}: {said}"
    return said.split("\n")[0] or kind


@contextmanager
def named_errors(path: Path | str, instead: str = ""):
    """Turn the system's refusals inside the block into one line.

    Args:
        path: is named where the system names no file.
        instead: what else the user can do, after the usual cure.
    """
    try:
        yield
    except OSError as error:
        cure = CURES.get(error.errno, f"{error.strerror or error}; put that right and run again")
        raise VitdemoError(f"{error.filename or path}: {cure}{instead}") from None


@contextmanager
def terminate_as_interrupt():
    """Within the block SIGTERM, and SIGHUP of a terminal that goes, raise KeyboardInterrupt, as Ctrl-C does: all end in
    the same clean-up. ``nohup`` stays in force."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # no other may handle signals
    others = (signal.SIG_IGN, None)  # ignored, or handled by what is not Python
    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(kind) not in others]
    before = {kind: signal.signal(kind, interrupt) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
