"""vitdemo: from a folder of images and a Vision Transformer's weights to fast, verified inference.

The names below are the library's front; the notebooks use no others. Each is imported at its first use,
because a worker must be able to set its CPU affinity after ``import vitdemo`` and before torch is loaded.
"""

from importlib import import_module

_HOME = {
    "VitdemoError": "errors",
    "data_path": "paths",
    "results_folder": "paths",
    "ARCHIVE_MD5": "dataset.imagenet",
    "devkit_of": "dataset.imagenet",
    "val_tar": "dataset.imagenet",
    "ImageNetVal": "dataset.imagenet",
    "ImageNetTrain": "dataset.imagenet_train",
    "Sample": "dataset.imagenet",
    "extract": "dataset.extraction",
    "read_devkit": "dataset.devkit",
    "index_tar": "dataset.archives",
    "md5": "dataset.archives",
    "Preprocessing": "dataset.images",
    "image_facts": "dataset.headers",
    "check_images": "dataset.checking",
    "ImageReport": "dataset.checking",
    "reference_crop": "dataset.images",
    "fast_crop": "dataset.images",
    "folder_preview": "dataset.plots",
    "plot_class_histogram": "dataset.plots",
    "plot_crops": "dataset.plots",
    "plot_gallery": "dataset.plots",
    "Model": "conversion.models",
    "ModelInfo": "conversion.models",
    "load_model": "conversion.models",
    "Engine": "conversion.engines.contract",
    "EngineFailure": "conversion.engines.contract",
    "find_engines": "conversion.engines.contract",
    "CompiledEngine": "conversion.engines.contract",
    "calibration_for": "conversion.calibration",
    "convert": "conversion.artifacts",
    "cached_artifacts": "conversion.cache",
    "clear_cache": "conversion.cache",
    "verify": "conversion.verification",
    "plot_error_over_depth": "conversion.plots",
    "plot_flips": "conversion.plots",
    "describe_machine": "measure.clock",
    "machine_record": "measure.clock",
    "percentiles_ms": "measure.clock",
    "machine_roof": "measure.roof",
    "linear_shapes": "measure.roof",
    "Evaluation": "inference.evaluation",
    "evaluate": "inference.evaluation",
    "evaluate_beside_reference": "inference.validation",
    "agreement": "inference.validation",
    "flagperf_row": "inference.validation",
    "roof_of": "inference.validation",
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
    "flagperf_table": "benchmarking.tables",
    "published_performance": "benchmarking.published",
    "choose_engine": "benchmarking.choice",
    "write_script": "benchmarking.choice",
    "memory_bandwidth": "measure.roof",
    "plot_latency_throughput": "benchmarking.plots",
    "plot_speedups": "benchmarking.plots",
    "plot_roofline": "benchmarking.plots",
    "plot_accuracy_speed": "benchmarking.plots",
    "plot_prediction": "benchmarking.plots",
    "wilson_interval": "inference.metrics",
    "compare_published": "inference.published",
    "published_accuracy": "inference.published",
    "diagnose": "inference.diagnosis",
    "plot_diagnosis": "inference.plots",
    "plot_mistakes": "inference.plots",
    "plot_per_class": "inference.plots",
    "plot_predictions": "inference.plots",
    "plot_time": "inference.plots",
    "plot_timeline": "inference.plots",
    "plot_split": "inference.plots",
    "plot_replicas": "inference.plots",
    "plot_scaling": "inference.plots",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'vitdemo' has no attribute {name!r}")
    return getattr(import_module(f"vitdemo.{_HOME[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
