"""Notebooks executed as tests: plan (which, with what), kernels (run one), runner (the verb), report (HTML).

Beside them workshop: the notebooks without their solutions, to be handed out.

Imported at first use, because `vitdemo doctor` has to list the notebooks also where papermill is missing.
"""

from importlib import import_module

_HOME = {
    "choose_notebooks": "notebooks",
    "parse_parameter": "notebooks",
    "RunReport": "runner",
    "run_notebooks": "runner",
    "write_workshop": "workshop",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'vitdemo.course' has no attribute {name!r}")
    return getattr(import_module(f"vitdemo.course.{_HOME[name]}"), name)
