"""The report of several seeds: which seeds are reported, and what the pictures count."""

import json

import pytest

from scripts.lib import report
from scripts.lib.run_folder import seeds_in
from util.run import UserError, sha256

FIGURES = {"coverage": 90.0, "accuracy": 80.0, "miou": 50.0}


def seed(run, name, evaluations, begun=None, **options):
    """A seed's folder with evaluations, and a folder of what was only begun."""
    (run / name).mkdir(parents=True, exist_ok=True)
    for row in evaluations:
        folder = run / name / "eval" / row
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(FIGURES))
        lists = {"labels": f"splits/{row}/all.txt", "id_list_path": "gt.txt", "seed": name}
        cost = {"seconds": 2.0, "host_mb": 100.0}
        record = {"command": "eval.py", "options": lists | options, "cost": cost}
        (folder / "run.json").write_text(json.dumps(record))
    if begun:
        (run / name / begun).mkdir()
    return run / name


def made(run):
    report.main([str(run), "--class-num", "19", "--pictures", "0"])
    return json.loads((run / "results.json").read_text()), (run / "results.md").read_text()


WHOLE = ("before", "quality_pixel", "seco", "fill")


@pytest.mark.parametrize(
    "evaluations, begun",
    [
        ((), None),
        (("before", "quality_pixel"), None),
        (WHOLE[:3], "adapt_fill"),
        (("before", "seco"), "quality_pixel"),
    ],
)
def test_finished_seeds_are_reported_and_others_named(tmp_path, capsys, evaluations, begun):
    for name in ("seed0", "seed10"):
        seed(tmp_path, name, WHOLE)
    seed(tmp_path, "seed2", evaluations, begun)
    results, text = made(tmp_path)
    assert results["seeds"] == [0, 10] and results["unfinished"] == [2]
    assert results["models"].keys() == {"before", "seco", "fill"}
    assert results["models"]["seco"]["miou"] == [50.0, 50.0]
    cost = {"seconds": 2.0, "peak_memory_mb": 100}
    assert results["stages"]["eval_seco"] == results["stages"]["quality_pixel"] == cost
    line = "Not finished, left out: seeds 2."
    assert line in text and line in capsys.readouterr().out


def test_one_seed_still_going_is_reported(tmp_path):
    seed(tmp_path, "seed3", WHOLE[:2], "adapt_seco")
    results, text = made(tmp_path)
    assert results["seeds"] == [3] and results["unfinished"] == [] and "Not finished" not in text
    assert results["models"].keys() == {"before"} and results["labels"].keys() == {"pixel"}


def test_only_seed_and_a_number_is_a_seed(tmp_path):
    for name in ("seed1", "seed0", "seed1.old", "seed0_1", "seeds", "seed"):
        seed(tmp_path, name, WHOLE)
    assert [path.name for path in seeds_in(tmp_path)] == ["seed0", "seed1"]
    assert made(tmp_path)[0]["seeds"] == [0, 1]


def test_seeds_of_other_options_are_told_apart(tmp_path):
    """But for the seed and the places of files."""
    for number in range(2):
        seed(tmp_path, f"seed{number}", WHOLE, root_path=f"runs/seed{number}", crop_size=769)
    made(tmp_path)
    seed(tmp_path, "seed2", WHOLE, root_path="elsewhere/seed2", crop_size=129)
    with pytest.raises(UserError, match="seeds have stage eval_before with other options"):
        made(tmp_path)


def test_a_row_of_another_checkpoint_is_left_out(tmp_path, capsys):
    folder = seed(tmp_path, "seed0", WHOLE)
    checkpoint = tmp_path / "latest.pth"
    checkpoint.write_bytes(b"weights")
    record = json.loads((folder / "eval/fill/run.json").read_text())
    for content, rows in (
        (b"weights", {"before", "seco", "fill"}),
        (b"others", {"before", "seco"}),
    ):
        record["inputs"] = {"checkpoint": {"path": str(checkpoint), "sha256": sha256(checkpoint)}}
        (folder / "eval/fill/run.json").write_text(json.dumps(record))
        checkpoint.write_bytes(content)
        assert made(tmp_path)[0]["models"].keys() == rows
    assert "left out, from inputs that have changed since: eval_fill" in capsys.readouterr().out


def test_number_of_pictures(tmp_path):
    seed(tmp_path, "seed0", WHOLE)
    made(tmp_path)
    assert not (tmp_path / "pictures/side_by_side.png").exists()
    with pytest.raises(UserError, match="--pictures -1"):
        report.main([str(tmp_path), "--class-num", "19", "--pictures", "-1"])
    with pytest.raises(UserError, match="no finished seed<n> folder"):
        report.main([str(tmp_path / "pictures"), "--class-num", "19"])


def test_curve_counts_epochs_as_the_log_does(tmp_path, monkeypatch):
    folder = seed(tmp_path, "seed0", WHOLE)
    (folder / "adapt_seco").mkdir()
    evaluation = "===> Epoch: {}\n***** Evaluation ***** >>>> MeanIoU: {:.2f}\n"
    lines = [evaluation.format(epoch, 40 + epoch) for epoch in (4, 9)]
    (folder / "adapt_seco/train.log").write_text("".join(lines))
    drawn, line_chart = [], report.line_chart
    monkeypatch.setattr(
        report,
        "line_chart",
        lambda series, *rest: drawn.append(series) or line_chart(series, *rest),
    )
    made(tmp_path)
    assert drawn == [{report.MODEL_ROWS["seco"]: ([4, 9], [44.0, 49.0])}]
    assert (tmp_path / "pictures/miou_curve.png").is_file()
