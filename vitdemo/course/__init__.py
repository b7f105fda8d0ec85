"""What the notebooks, the workshop and their runner need besides the library.

06's looks, figures, controls and bug hunt; the notebooks executed as tests (``run_notebooks``), and copies of them
without solutions (``write_workshop``).
"""

from vitdemo import front

_HOME = {
    "attention_maps": "course.attention",
    "rollout": "course.attention",
    "most_looked_at": "course.attention",
    "mask_patches": "course.attention",
    "look_at": "course.looks",
    "names_of": "course.looks",
    "answers_under": "course.looks",
    "answers_masked": "course.looks",
    "disagreements": "course.looks",
    "measured_and_published": "course.performance",
    "browse": "course.browsing",
    "plot_looks": "course.figures",
    "plot_blocks": "course.figures",
    "plot_disagreements": "course.figures",
    "image_explorer": "course.widgets",
    "benchmark_explorer": "course.widgets",
    "dataset_browser": "course.widgets",
    "BUGS": "course.buggy_scripts",
    "buggy_run": "course.buggy_scripts",
    "hunt": "course.bug_hunt",
    "crop_picture": "dataset.decoding",
    "choose_notebooks": "course.notebooks",
    "parse_parameter": "course.notebooks",
    "run_notebooks": "course.runner",
    "write_workshop": "course.workshop",
}
__all__ = list(_HOME)
__getattr__, __dir__ = front("vitdemo.course", _HOME)
