"""The parts that the notebooks, the workshop and their runner need besides the library.

06's looks, figures, controls and bug hunt; the notebooks executed as tests (``run_notebooks``), and copies of them
without solutions (``write_workshop``).
"""

from vitdemo import front

_NAMES_OF = {
    "course.attention": "attention_maps rollout most_looked_at mask_patches",
    "course.looks": "look_at names_of answers_under answers_masked disagreements",
    "course.figures": "plot_looks plot_blocks plot_disagreements",
    "course.widgets": "image_explorer",
    "course.buggy_scripts": "BUGS buggy_run",
    "course.bug_hunt": "hunt",
    "course.exercises": "check finish compare_guess",
    "dataset.decoding": "crop_picture",
    "course.notebooks": "choose_notebooks parse_parameter",
    "course.runner": "run_notebooks",
    "course.workshop": "write_workshop",
}
__all__, __getattr__, __dir__ = front("vitdemo.course", _NAMES_OF)
