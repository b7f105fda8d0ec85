"""vitdemo: from a folder of images and a Vision Transformer's weights to fast, verified inference.

The names below are the public ones. ``vitdemo.imagenet``, ``vitdemo.plots`` and ``vitdemo.course`` hold the names that
only some notebooks need; the notebooks use no others. Each name is imported at its first use, because a worker must
be able to set its CPU affinity after ``import vitdemo`` and before torch is loaded.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec


def front(package: str, names_of: dict[str, str]) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """The ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names are imported at their first use.

    Args:
        package: the package's dotted name, for errors.
        names_of: for each file below ``vitdemo``, the public names in it, separated by blanks.
    """
    home = {name: file for file, names in names_of.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if find_spec("fcntl") is None:
            raise ImportError("vitdemo runs on Linux and macOS; on Windows use it in WSL")
        return getattr(import_module(f"vitdemo.{home[name]}"), name)

    return list(home), get, lambda: sorted(home)


_NAMES_OF = {
    "errors": "VitdemoError EngineFailure",
    "paths": "data_path results_folder",
    "dataset.dataset": "Dataset ImageNetVal open_data open_images",
    "models.classes": "match_classes",
    "inference.answers": "answers",
    "dataset.extraction": "extract",
    "dataset.decoding": "Preprocessing reference_crop fast_crop",
    "dataset.checking": "check_images",
    "models.model": "Model ModelInfo load_model",
    "engines.contract": "Engine find_engines CompiledEngine precisions_here",
    "engines.artifacts": "convert",
    "verification.verification": "verify",
    "machine": "describe_machine machine_record",
    "engines.roof": "memory_bandwidth",
    "evaluation.evaluation": "Evaluation evaluate",
    "evaluation.reference": "agreement flagperf_row roof_of",
    "inference.random_input": "run_random_input",
    "inference.replicas": "Replicas",
    "inference.cluster": "stop_ray",
    "benchmarking.sweeps": "benchmark",
    "benchmarking.files": "merge",
    "benchmarking.tables": "summary styled write_table aitemplate_table ttmetal_table published_performance",
    "benchmarking.choice": "choose choose_engine write_script",
    "stats": "wilson_interval",
    "evaluation.published": "compare_published published_accuracy",
    "evaluation.diagnosis": "diagnose",
}
__all__, __getattr__, __dir__ = front("vitdemo", _NAMES_OF)
