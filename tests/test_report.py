"""The report of several seeds: what it shows of their folders, and what it leaves out."""

import pytest

from scripts.lib import report
from util.labels import CITYSCAPES_19, write_classes
from util.outputs import read_json, write_json
from util.run import UserError

ROWS = ("before", "seco", "fill", "quality_pixel", "quality_psa", "quality_scc")
CALL = "--labels scc pixel psa --models seco before --seeds".split()
EVALUATION = "===> Epoch: {}\n***** Evaluation ***** >>>> MeanIoU: {:.2f}\n"


def seed(run, number):
    """A seed's folder with evaluations of ROWS, and a log of two epochs for each."""
    folder = run / f"seed{number}"
    write_classes(folder / "source", CITYSCAPES_19)
    for row in ROWS:
        figures = {"coverage": 90.0, "accuracy": 80.0, "miou": 50.0 + number}
        write_json(folder / f"eval/{row}/metrics.json", figures)
        options = {"labels": f"splits/{row}/all.txt", "id_list_path": str(run / "gt.txt")}
        cost = {"seconds": 2.0 + number, "host_mb": 100.0 + number}
        record = {"command": "eval.py", "options": options, "cost": cost}
        write_json(folder / f"eval/{row}/run.json", record)
        made = folder / (row if row.startswith("quality_") else f"adapt_{row}")
        made.mkdir()
        log = "".join(EVALUATION.format(epoch, 40 + epoch) for epoch in (4, 9))
        (made / "train.log").write_text(log)


@pytest.fixture
def drawn(monkeypatch):
    """What the curves and the pictures of images are drawn from."""
    drawn, line_chart = {}, report.line_chart

    def curves(series, *rest):
        drawn["curves"] = series
        return line_chart(series, *rest)

    monkeypatch.setattr(report, "line_chart", curves)
    monkeypatch.setattr(report, "draw_images", lambda *given: drawn.update(images=given))
    return drawn


@pytest.fixture
def run(tmp_path):
    (tmp_path / "gt.txt").write_text("".join(f"{i}.png gt/{i}.png\n" for i in range(20)))
    for number in (0, 2, 10):
        seed(tmp_path, number)
    return tmp_path


def test_only_rows_and_seeds_that_have_just_run_are_reported(run, drawn):
    report.main([str(run), *CALL, "0", "10"])
    results, text = read_json(run / "results.json"), (run / "results.md").read_text()
    assert results["seeds"] == [0, 10] and results["unfinished"] == []
    assert results["models"] == {row: {"miou": [50, 60]} for row in ("before", "seco")}
    assert list(results["labels"]) == ["pixel", "psa", "scc"]
    assert results["stages"]["eval_seco"] == {"seconds": 7, "peak_memory_mb": 110}
    assert "| SeCo (UniMatch on PSA + SCC) | 55.0 ± 7.1 | 0.0 ± 0.0 |" in text
    assert "| total | 35 | 110 |" in text and "fill" not in text
    page = (run / "index.html").read_text()
    assert "seed10/eval_seco" in page and "seed2" not in page and "fill" not in page
    with pytest.raises(UserError, match="seed3/eval/quality_pixel/metrics.json: "):
        report.main([str(run), *CALL, "3"])


def test_what_the_pictures_show(run, drawn):
    report.main([str(run), *CALL, "2"])
    assert drawn["curves"] == {report.MODEL_ROWS["seco"]: ([4, 9], [44.0, 49.0])}  # as the log
    picture, root, images, labels, models, *_ = drawn["images"]
    assert picture == run / "pictures/side_by_side.png" and root == run / "seed2"
    assert len(images) == 8 and list(labels) == ["pixel labels", "PSA", "SCC"]
    assert models == {
        "prediction before": root / "source/latest.pth",
        "prediction after": root / "adapt_seco/latest.pth",
    }
    assert {p.name for p in (run / "pictures").iterdir()} == {"miou_curve.png", "ablation.png"}
