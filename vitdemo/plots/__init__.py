"""Every figure of the notebooks, but those of 06, which ``vitdemo.course`` has."""

from vitdemo import front

_NAMES_OF = {
    "plots.dataset": "folder_preview plot_crops plot_gallery",
    "plots.verification": "plot_error_over_depth plot_flips",
    "plots.benchmarking": "plot_latency_throughput plot_speedups plot_roofline plot_accuracy_speed plot_prediction",
    "plots.inference": "plot_confusion plot_diagnosis plot_mistakes plot_per_class plot_predictions plot_time "
    "plot_timeline plot_overlap plot_schedule plot_replicas plot_scaling",
}
__all__, __getattr__, __dir__ = front("vitdemo.plots", _NAMES_OF)
