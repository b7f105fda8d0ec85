"""The paths of data, cache, runs and bundled items; output folders; and writing files whole or not at all."""

import os
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from vitdemo.errors import VitdemoError

PART = ".part"  # the suffix of a file or folder that is not complete yet

REPOSITORY = Path(__file__).resolve().parent.parent
IN_A_CLONE = (REPOSITORY / "pyproject.toml").exists()  # False after installing a wheel, which has no data or notebooks


def user_path(path: Path | str) -> Path:
    """Expand a leading ``~`` as the shell does; ``~name`` of an unknown user stays unchanged."""
    return Path(os.path.expanduser(path))


def data_root() -> Path:
    """The folder of the bundled data: ``VITDEMO_DATA``, or ``data/`` of the clone."""
    return user_path(os.environ.get("VITDEMO_DATA") or REPOSITORY / "data")


def cache_root() -> Path:
    """The folder for files that can be built again at any time: ``VITDEMO_CACHE``, or ``~/.cache/vitdemo``."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get("VITDEMO_CACHE") or Path(cache_home) / "vitdemo")


def runs_root() -> Path:
    """The folder for executed notebooks and their results: ``VITDEMO_RUNS``, or ``runs/`` of the clone."""
    own = REPOSITORY if IN_A_CLONE else Path.cwd()
    return user_path(os.environ.get("VITDEMO_RUNS") or own / "runs").absolute()


def data_path(name: str) -> Path:
    """The path of one bundled item, e.g. ``data_path("shapes20")``, from any working folder.

    Raises VitdemoError when there is no such item.
    """
    path = data_root() / name
    if not path.exists():
        raise VitdemoError(f"{path}: no such bundled data; set VITDEMO_DATA to the data folder of a clone of vitdemo")
    return path


# Names that the file systems and file viewers of Synology, macOS, Linux and Windows add to people's folders.
SYSTEM = {"@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}


def is_system(name: str) -> bool:
    """Whether a file or folder with this base name is hidden, or was added by an operating system."""
    return name in SYSTEM or (name.startswith(".") and name not in (".", ".."))


def claim_folder(path: Path | str) -> Path:
    """Create the folder ``path`` for results, or take an existing empty folder.

    Raises VitdemoError when the folder already holds something: results are never mixed or overwritten.
    """
    path = user_path(path)
    try:
        if path.exists() and (not path.is_dir() or not all(is_system(entry.name) for entry in path.iterdir())):
            raise VitdemoError(f"{path}: already holds something; give another output folder or empty this one")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cure = "set VITDEMO_RUNS to another place" if path.is_relative_to(runs_root()) else "give another"
        raise VitdemoError(f"{path}: cannot be an output folder ({error.strerror}); {cure}") from None
    return path


def results_folder(name: str, out: Path | str = "") -> Path:
    """A folder for one notebook's results: ``out``, or a new ``runs/interactive/<name>_<time>`` where ``out`` is ""."""
    return claim_folder(out or runs_root() / "interactive" / f"{name}_{datetime.now():%Y-%m-%d_%H%M%S}")


@contextmanager
def replacing(path: Path | str, mode: str = "w"):
    """Open a temporary file next to ``path``, and rename it to ``path`` only when the block has succeeded.

    A reader therefore sees the old file or the whole new one, never a part. On any error the
    temporary file is removed and ``path`` stays unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove the temporary files that ``replacing`` left in ``folder`` for ``names`` when its process was killed."""
    for name in names:
        for path in folder.glob(f".{name}.*.part"):
            path.unlink(missing_ok=True)


SHAPES20 = "shapes20"  # drawn images, in the exact format of ILSVRC2012
VAL_TAR, DEVKIT = f"{SHAPES20}/shapes20_img_val.tar", f"{SHAPES20}/shapes20_devkit.tar.gz"
MODELS = {"vit_shapes20": f"{SHAPES20}/vit_shapes20"}  # name of the model -> folder
CALIBRATIONS = {"vit_shapes20": f"{SHAPES20}/shapes20_calib.tar"}  # name of the model -> calibration images for int8
