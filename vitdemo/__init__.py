"""vitdemo: from a folder of images and a Vision Transformer's weights to fast, verified inference.

The names below are the library's front. ``vitdemo.imagenet``, ``vitdemo.plots`` and ``vitdemo.course`` hold what single
notebooks need besides; the notebooks use no others. Each name is imported at its first use, because a worker must be
able to set its CPU affinity after ``import vitdemo`` and before torch is loaded.
"""

from collections.abc import Callable
from importlib import import_module


def front(package: str, home: dict[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose names are imported at their first use.

    Args:
        package: its dotted name, for errors.
        home: the file of each name, below ``vitdemo``.
    """

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"vitdemo.{home[name]}"), name)

    return get, lambda: sorted(home)


_HOME = {
    "VitdemoError": "errors",
    "data_path": "paths",
    "results_folder": "paths",
    "ImageNetVal": "dataset.imagenet",
    "Sample": "dataset.imagenet",
    "extract": "dataset.extraction",
    "Preprocessing": "dataset.decoding",
    "check_images": "dataset.checking",
    "reference_crop": "dataset.decoding",
    "fast_crop": "dataset.decoding",
    "Model": "models.model",
    "ModelInfo": "models.model",
    "load_model": "models.model",
    "Engine": "engines.contract",
    "EngineFailure": "errors",
    "find_engines": "engines.contract",
    "CompiledEngine": "engines.contract",
    "precisions_here": "engines.contract",
    "convert": "engines.artifacts",
    "verify": "verification.verification",
    "describe_machine": "machine",
    "machine_record": "machine",
    "machine_roof": "engines.roof",
    "Evaluation": "evaluation.evaluation",
    "evaluate": "evaluation.evaluation",
    "agreement": "evaluation.reference",
    "flagperf_row": "evaluation.reference",
    "roof_of": "evaluation.reference",
    "run_random_input": "inference.random_input",
    "Replicas": "inference.replicas",
    "stop_ray": "inference.cluster",
    "benchmark": "benchmarking.sweeps",
    "merge": "benchmarking.files",
    "summary": "benchmarking.tables",
    "styled": "benchmarking.tables",
    "write_table": "benchmarking.tables",
    "aitemplate_table": "benchmarking.tables",
    "ttmetal_table": "benchmarking.tables",
    "published_performance": "benchmarking.others",
    "choose_engine": "benchmarking.choice",
    "write_script": "benchmarking.choice",
    "memory_bandwidth": "engines.roof",
    "wilson_interval": "stats",
    "compare_published": "evaluation.published",
    "published_accuracy": "evaluation.published",
    "diagnose": "evaluation.diagnosis",
}
__all__ = list(_HOME)
__getattr__, __dir__ = front("vitdemo", _HOME)
