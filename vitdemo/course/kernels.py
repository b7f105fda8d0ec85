"""One notebook, executed by papermill in a kernel of this interpreter that leaves no process behind."""

import logging
import shutil
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import papermill
import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError
from papermill.exceptions import PapermillExecutionError

from vitdemo.course.notebooks import Notebook, heading
from vitdemo.errors import reason_of
from vitdemo.paths import data_root

KERNEL_START_S = 120  # a cold disk and a busy machine
LAST_OUTPUT_S = 60  # papermill's 4 s for a finished cell's last output are too few on a loaded machine

# Every process that descends from our kernels carries this in its environment: a process group would miss
# what starts its own session, a list of children what has lost its parent (Ray's daemons do both).
MARK = "VITDEMO_RUN"
TOKEN = uuid.uuid4().hex


class OwnKernel(AsyncKernelManager):
    """A kernel of the running interpreter, whatever the machine's kernelspec "python3" starts."""

    environment: ClassVar[dict[str, str]] = {}

    @property
    def kernel_spec(self) -> KernelSpec:
        # The kernel's own log would write across the progress line; what a cell raises comes back anyway.
        quiet = get_kernel_dict(extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        return KernelSpec(resource_dir=RESOURCES, env=self.environment, **quiet)


class Progress:
    """Says on stderr which cell runs: on a terminal in one line, elsewhere in a line for each heading."""

    def __init__(self, label: str, notebook_cells: int):
        self.label, self.cells, self.cell, self.heading = label, notebook_cells, 0, ""
        self.terminal = sys.stderr.isatty()

    def cell_start(self, cell, cell_index: int) -> None:
        """papermill's hook, called before each cell, also the markdown ones."""
        found = heading(cell)
        is_code = cell.cell_type == "code"
        self.cell += is_code
        self.heading = found or self.heading
        if (is_code and self.terminal) or found:
            number = self.cell if is_code else min(self.cell + 1, self.cells)  # text belongs to the cell below it
            self.show(f"cell {number}/{self.cells}  {self.heading}")

    def show(self, text: str) -> None:
        line = f"{self.label}  {text}"
        if self.terminal:
            line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        say(line, end="" if self.terminal else "\n")

    def close(self, text: str) -> None:
        """The notebook's last line, which stays."""
        say(("\r\x1b[K" if self.terminal else "") + f"{self.label}  {text}")


def say(text: str, end: str = "\n") -> None:
    """On stderr, if there still is one: after a hang-up the terminal is gone, and the work goes to its end."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def execute(
    notebook: Notebook, executed: Path, parameters: dict[str, object], progress: Progress, cell_timeout_s: int | None
) -> str:
    """Run every cell of a notebook; "" or, in one line, what went wrong where.

    No process that a cell started is left, whatever happens.

    Args:
        notebook: what to run.
        executed: the file that holds what was done at any time, also after a KeyboardInterrupt.
        parameters: their values by name.
        progress: says which cell runs.
        cell_timeout_s: a cell that takes longer went wrong; None is no such limit.
    """
    OwnKernel.environment = {
        MARK: TOKEN,
        # Figures belong into the notebook, also where the shell has set a backend for scripts.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # A relative folder is the shell's; the kernel starts in notebooks/.
        "VITDEMO_DATA": str(data_root().resolve()),
    }
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the line returned here says it already
    try:
        done = papermill.execute_notebook(
            _verbatim(notebook.path),
            _verbatim(executed),
            parameters,
            cwd=notebook.path.parent,
            kernel_name="python3",
            language="python",
            kernel_manager_class=OwnKernel,
            progress_bar=False,
            on_cell_start=progress.cell_start,
            start_timeout=KERNEL_START_S,
            execution_timeout=cell_timeout_s,
            iopub_timeout=LAST_OUTPUT_S,
        )
    except PapermillExecutionError as error:
        what = error.evalue.strip().splitlines() or [""]
        return f"cell {progress.cell}: {error.ename}: {what[-1]}"
    except CellTimeoutError as error:
        return f"cell {progress.cell}: {str(error).splitlines()[0]}"
    except OSError as error:  # the executed copy could not be written
        return f"cell {progress.cell}: {error.filename or executed}: {error.strerror or reason_of(error)}"
    except RuntimeError as error:  # the kernel died, or never came up
        return f"cell {progress.cell}: {error} (out of memory?)"
    finally:
        end_processes()
    # papermill takes sys.exit(0) for success and leaves the cells below unexecuted.
    return f"cell {progress.cell}: left early by SystemExit" if done.metadata.papermill.exception else ""


def _verbatim(path: Path) -> str:
    """papermill fills parameters into the braces of a path; these are part of its name."""
    return str(path).replace("{", "{{").replace("}", "}}")


def end_processes(token: str = TOKEN) -> None:
    """Kill whatever our kernels started that still lives; twice, for what was being started meanwhile."""
    for _ in range(2):
        alive = marked_processes(token)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def marked_processes(token: str = TOKEN) -> list[psutil.Process]:
    """The living processes whose environment has MARK with the value ``token``."""
    living = psutil.process_iter(["environ"])  # which is None for a zombie, and for another user's process
    return [process for process in living if (process.info["environ"] or {}).get(MARK) == token]
