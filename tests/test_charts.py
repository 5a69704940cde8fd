"""util/charts.py: what the charts show, and that nothing in them overruns."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from eval import confusion_chart
from scripts.lib.report import ablation_chart
from util.charts import line_chart, save_chart

NAN = float("nan")
LONG = "UniMatch on PSA, pixel label where no mask reaches, and some more words to make it long"


def test_a_gap_is_a_gap_and_two_evaluations_are_two_points():
    series = {"gap": ([0, 1, 2, 3, 4], [1, 2, NAN, float("inf"), 3]), "two": ([4, 9], [5.0, 6.0])}
    series |= {f"{LONG} {i}": ([0, 1, 2], [i, i, i]) for i in range(7)}
    lines = line_chart(series, "", "epoch", "mIoU (%)").axes[0].lines
    assert np.isnan(lines[0].get_ydata()).tolist() == [False, False, True, True, False]
    assert [line.get_linestyle() for line in lines[:3]] == ["-", "None", "-"]
    assert all(line.get_marker() != "None" for line in lines)
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(styles) == len(series)


@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("name", ["short", LONG, LONG * 3])
def test_a_legend_is_below_the_chart_and_within_its_width(tmp_path, count, name):
    series = {f"{name} {i}": ([0, 1, 2], [i, NAN, i + 1]) for i in range(count)}
    figure = line_chart(series, "title", "epoch", "mIoU (%)")
    save_chart(tmp_path / "x.png", figure)
    (legend,), picture = figure.legends, Image.open(tmp_path / "x.png")
    box, axes = legend.get_window_extent(), figure.axes[0].get_tightbbox()
    assert axes.x0 >= 0 and box.x0 >= 0 and max(axes.x1, box.x1) <= 860 and box.y1 < axes.y0
    assert abs(picture.width - 860) < 40 and picture.height > axes.y1 - box.y0
    assert len(legend.get_texts()) == count and figure.axes[0].bbox.height > 300


def test_bars_have_figures_and_whiskers():
    models = {"before": {"miou": [49, 50, 51]}, "seco": {"miou": [58.04, 60.04, 62.04]}}
    axes = ablation_chart(models).axes[0]
    assert [text.get_text() for text in axes.texts] == ["50.0", "60.0"]
    ((whiskers,),) = (bars.errorbar.lines[2] for bars in axes.containers[1:])
    ends = [x for segment in whiskers.get_segments() for x, _ in segment]
    assert ends == pytest.approx([49, 51, 58.04, 62.04])


def test_a_confusion_matrix_is_in_percent_of_its_rows():
    confusion = np.array([[3, 1, 0], [0, 0, 0]])
    axes = confusion_chart(confusion, ("road", "sky")).axes[0]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {(0, 0): "75", (1, 0): "25"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["road", "sky", "none"]
    cells = axes.images[0].get_array()
    assert np.ma.getmaskarray(cells)[1].all() and cells[0].tolist() == [0.75, 0.25, 0]


def test_charts_of_nothing_are_drawn(tmp_path):
    for figure in (
        line_chart({}, "", "x", "y"),
        line_chart({"a": ([], []), "b": ([4], [NAN])}, "", "x", "y"),
        confusion_chart(np.zeros((2, 2), int), ("a", "b")),
    ):
        save_chart(tmp_path / "x.png", figure)
        assert Image.open(tmp_path / "x.png").width > 200


def test_charts_need_no_display_and_no_global_state():
    code = (
        "import sys; from util.charts import *; assert 'matplotlib' not in sys.modules;"
        "line_chart({'a': ([0], [1])}, '', '', ''); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, check=True)
