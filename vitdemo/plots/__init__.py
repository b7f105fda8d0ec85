"""Every figure of the notebooks, but those of 06, which ``vitdemo.course`` has."""

from vitdemo import front

_HOME = {
    "folder_preview": "plots.dataset",
    "plot_class_histogram": "plots.dataset",
    "plot_crops": "plots.dataset",
    "plot_gallery": "plots.dataset",
    "plot_error_over_depth": "plots.verification",
    "plot_flips": "plots.verification",
    "plot_latency_throughput": "plots.benchmarking",
    "plot_speedups": "plots.benchmarking",
    "plot_roofline": "plots.benchmarking",
    "plot_accuracy_speed": "plots.benchmarking",
    "plot_prediction": "plots.benchmarking",
    "plot_diagnosis": "plots.inference",
    "plot_mistakes": "plots.inference",
    "plot_per_class": "plots.inference",
    "plot_predictions": "plots.inference",
    "plot_time": "plots.inference",
    "plot_timeline": "plots.inference",
    "plot_schedule": "plots.inference",
    "plot_replicas": "plots.inference",
    "plot_scaling": "plots.inference",
}
__all__ = list(_HOME)
__getattr__, __dir__ = front("vitdemo.plots", _HOME)
