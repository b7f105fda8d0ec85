"""The figures draw every row once, and never two machines in one panel."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from vitdemo import VitdemoError, memory_bandwidth, published_performance, styled, summary
from vitdemo.plots import plot_accuracy_speed, plot_latency_throughput, plot_prediction, plot_roofline, plot_speedups

FIGURES = {
    "latency": plot_latency_throughput,
    "speedups": lambda rows: plot_speedups(rows, published_performance().query("model == 'vit_base_patch16_224'")),
    "roofline": lambda rows: plot_roofline(rows, 1e10),
    "accuracy": plot_accuracy_speed,
    "prediction": lambda rows: plot_prediction(rows, lambda row: row["batch"] * 2.0),
}


@pytest.fixture(params=FIGURES)
def draw(request):
    return FIGURES[request.param]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_two_machines_have_a_panel_each(draw, rows):
    one = len(draw(rows).axes)
    figure = draw(pd.concat([rows, rows.assign(machine="another machine")], ignore_index=True))
    assert len(figure.axes) == 2 * one
    assert any("another machine" in ax.get_title(loc="left") for ax in figure.axes)


def test_rows_without_a_measurement_are_left_out(draw, rows):
    draw(rows.assign(status=["failed: x"] + ["ok"] * (len(rows) - 1)))
    with pytest.raises(VitdemoError, match="no row has"):
        draw(rows.assign(status="failed: x"))


def test_it_is_as_wide_as_a_page_and_its_letters_are_12_points_there(draw, rows):
    figure = draw(rows)
    figure.draw_without_rendering()  # which makes the labels of the axes
    pixels = [text.get_fontsize() * figure.dpi / 72 for text in figure.findobj(Text) if text.get_text()]
    assert figure.get_figwidth() * figure.dpi == 900 and min(pixels) >= 16


def test_a_table_has_bars_behind_speedups_and_none_behind_rates(rows):
    table = summary(rows)
    bars = "linear-gradient"
    assert bars in styled(table).to_html()
    assert bars not in styled(table.drop(columns=[name for name in table if name.startswith("over eager")])).to_html()


def test_every_point_is_there(rows):
    lines = plot_latency_throughput(rows).axes[0].lines
    assert sorted(y for line in lines for y in line.get_ydata()) == sorted(rows["images_per_s"])


def test_no_precision_is_lost_from_the_roofline(rows):
    figure = plot_roofline(rows.assign(precision="fp16"), 1e10)
    points = [line.get_xdata() for ax in figure.axes for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(np.isfinite(x).sum() for x in points) == len(rows)


def test_published_speedups_are_joined_on_the_batch(rows):
    figure = plot_speedups(rows, published_performance().query("model == 'vit_base_patch16_224'"))
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}
    a100 = drawn["published: AITemplate fp16 of vit_base_patch16_224, NVIDIA A100-40GB"]
    assert a100[8] == pytest.approx(3642.16 / 1439.03) and len(a100) == 9
    two = drawn["published: AITemplate fp16 of vit_base_patch16_224, AMD MI-250, 2 GCDs"]
    assert min(two) == 2  # batch 1 is blank there


def test_published_speedups_of_two_precisions_are_two_lines(rows):
    def lines(model):
        figure = plot_speedups(rows, published_performance().query("model == @model"))
        labels = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
        return {label: x for label, x in labels.items() if label.startswith("published")}

    large = lines("vit_large_patch16_224")
    assert [(("fp16" in label, "over PyTorch 1.13" in label), x) for label, x in large.items()] == [
        ((True, True), [64]),
        ((False, True), [32]),
    ]
    assert list(lines("resnet18").values()) == [[1, 8, 16, 32, 256, 512]]


def test_rows_of_an_older_file_are_drawn_too(draw, rows):
    old = rows.assign(machine="an older one").drop(columns=["weights", "replicas"])
    assert len(draw(old).axes) == len(draw(rows).axes)
    assert len(draw(pd.concat([rows, old], ignore_index=True)).axes) == 2 * len(draw(rows).axes)


def test_memory_bandwidth_is_plausible():
    assert 1e9 < memory_bandwidth() < 2e12
