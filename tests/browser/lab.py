"""JupyterLab as a process that leaves nothing behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from itertools import takewhile
from pathlib import Path

import nbformat
import psutil

from vitdemo.course.kernels import MARK, end_processes, marked_processes
from vitdemo.course.notebooks import NOTEBOOKS, PROFILES, read_notebook

START_S = 120  # a cold disk and a busy machine
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # What is scrolled out of sight is drawn too, so that all of a notebook can be looked at.
    "notebook-extension/tracker": {"windowingMode": "none"},
}


class Lab:
    """JupyterLab on a copy of the notebooks in ``folder``, on a free port, with a token; a context manager.

    Nothing of the machine's own Jupyter is read or written, and nothing is fetched from the network.
    """

    def __init__(self, folder: Path):
        self.folder, self.results = folder / "notebooks", folder / "results"
        shutil.copytree(NOTEBOOKS, self.folder)
        self.results.mkdir()
        self.token, self.mark = uuid.uuid4().hex, uuid.uuid4().hex
        for name, values in SETTINGS.items():
            settings = folder / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
            settings.parent.mkdir(parents=True)
            settings.write_text(json.dumps(values))
        self._environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {
            MARK: self.mark,
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "IPYTHONDIR": str(folder / "ipython"),
        }
        self._log = folder / "lab.log"

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": self.url.rpartition(":")[2],
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.folder,
            "ServerApp.allow_root": True,
            "ServerApp.open_browser": False,
            "IdentityProvider.token": self.token,
        }
        command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
        with open(self._log, "w") as log:
            self._server = subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self._ask("GET", "status")
            except OSError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"JupyterLab did not start:\n{self._log.read_text()[-2000:]}") from None
                time.sleep(0.1)

    def __exit__(self, *exception):
        self._server.terminate()  # it ends its kernels and then itself
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
        finally:
            end_processes(self.mark)

    def _ask(self, method: str, what: str) -> object:
        request = urllib.request.Request(
            f"{self.url}/api/{what}", method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def processes(self) -> list[psutil.Process]:
        """What lives of the server, its kernels and all that they have started."""
        return marked_processes(self.mark)

    def end_kernels(self) -> None:
        """Shut every kernel down, as closing a notebook's tab alone does not."""
        for session in self._ask("GET", "sessions"):
            self._ask("DELETE", f"sessions/{session['id']}")

    def copy(self, name: str, before: str | None = None, **values) -> str:
        """Give a copy of notebook ``name`` the values of a smoke run, solved, or these; return its file's name.

        before: words of the first cell that the copy does not have any more.
        Whenever its parameters are set, its results go to another new folder ``results/NAME-…``.
        """
        known = read_notebook(NOTEBOOKS / f"{name}.ipynb").parameters
        values = {"solve": True} | PROFILES["smoke"] | values
        values = {key: value for key, value in values.items() if key in known}
        content = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        lines = [f"{key} = {value!r}" for key, value in values.items()]
        lines.append(f"import tempfile; out = tempfile.mkdtemp(prefix='{name}-', dir={str(self.results)!r})")
        cell.source = "\n".join([cell.source, *lines])
        if before:
            content.cells = list(takewhile(lambda cell: before not in cell.source, content.cells))
        nbformat.write(content, self.folder / f"{name}.ipynb")
        return f"{name}.ipynb"
