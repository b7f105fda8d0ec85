"""The README's figure: ``python -m notebooks.img.finding``, from nine scripts that are run for it on the bundled data.

Nine evaluation scripts, one of them right and eight with one common bug each, run over the same images with the same
model. The figure shows what each script reports, next to what the right one reports: its wrong number in orange.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from vitdemo import describe_machine, load_model, machine_record, open_data
from vitdemo.course import BUGS, hunt
from vitdemo.course.bug_hunt import NO_BUG
from vitdemo.course.buggy_scripts import COMPILE, IMAGES, SEEN_BY, UNSYNCHRONISED
from vitdemo.paths import SHAPES20, data_path, replacing
from vitdemo.plots.inference import GREY, RIGHT, WRONG

TIMES = (UNSYNCHRONISED, COMPILE)  # these bugs falsify the speed, the others the accuracy
PICTURE = Path(__file__).with_name("finding.png")


def draw() -> plt.Figure:
    """Run the scripts and draw what they report: top-1 at the left, images/s over the right script's at the right."""
    game = hunt(load_model("vit_shapes20"), open_data(data_path(SHAPES20)))
    name_of = {bug: name for name, bug in game.bugs.items()}
    names = [NO_BUG, *(name_of[bug] for bug in BUGS if bug in name_of)]
    reports = game.reports.loc[names]
    figure, (top1, speed) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    found = [game.bugs.get(name) for name in names]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the dashed line
    said = {"va": "center", "textcoords": "offset points", "fontsize": 11, "bbox": white}
    for y, (bug, report) in enumerate(zip(found, reports.to_dict("records"), strict=True)):
        rate = report["images_per_s"] / reports.at[NO_BUG, "images_per_s"]
        counted = "" if report["images"] == IMAGES else f", of {report['images']} images"
        for ax, x, text, wrong in (
            (top1, 100 * report["top1"], f"{report['top1']:.1%}{counted}", bug not in TIMES),
            (speed, rate, f"{rate:.2f}x" if rate < 10 else f"{rate:.0f}x", bug in TIMES),
        ):
            ax.plot(x, y, "o", color=RIGHT if bug is None else WRONG if wrong else GREY, markersize=9)
            if wrong or bug is None:
                ax.annotate(text, (x, y), (9, 0), **said)
    labels = ["the right script", *(f"{bug}\n(found by {SEEN_BY[bug]})" for bug in found[1:])]
    top1.set_yticks(range(len(names)), labels, fontsize=10.5)
    top1.invert_yaxis()
    top1.axvline(100 * reports.at[NO_BUG, "top1"], color=RIGHT, linewidth=1, linestyle="--")
    speed.axvline(1, color=RIGHT, linewidth=1, linestyle="--")
    top1.set(xlim=(0, 128), xlabel=f"top-1 that it reports, %, {IMAGES} images")
    top1.set_xticks(range(0, 101, 20))
    speed.set(xscale="log", xlabel="images/s that it reports, over the right script's (log scale)")
    speed.set_xlim(0.5 * speed.get_xlim()[0], 4 * speed.get_xlim()[1])
    for ax in (top1, speed):
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.label.set_size(11)
    figure.suptitle(
        f"Nine evaluation scripts, one model: {len(found) - 1} report a wrong number, none raises an error\n"
        "blue: the right script; orange: the wrong number; grey: what the bug leaves alone (speeds vary by run)"
    )
    figure.text(1, 0, describe_machine(machine_record()), ha="right", va="top", fontsize=9, color="#555555")
    return figure


if __name__ == "__main__":
    picture = draw()
    with replacing(PICTURE, "wb") as file:
        picture.savefig(file, dpi=90, format="png", bbox_inches="tight")
