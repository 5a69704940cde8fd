"""The shipped logs against excerpts of the authors' text logs, logs of other versions of UniMatch,
comparison, and the README's results table.
"""

import csv
import json
import math
import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from model.train_logs import best_and_last
from scripts import compare_logs
from util.labels import IDS_13_IN_16
from util.run import UserError
from util.training_log import (
    LOSS_NAMES,
    TrainingLog,
    read_events,
    read_text_log,
    read_training_log,
)

SHIPPED = ROOT / "training_logs"
# The authors' text logs up to epoch 1; of GTA also what the log has after its last evaluation.
EXCERPTS = ROOT / "tests/data/logs"
COUNTS = {
    "seco_gta": (2118, 235, 236, 236),
    "seco_synthia": (2160, 240, 240, 186),
    "seco_bdd": (504, 56, 56, 1313),
}


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_rows_are_those_of_the_text_logs(name):
    """Of the epochs of the excerpts: options, classes, every figure and the clock."""
    text, shipped = read_text_log(EXCERPTS / f"{name}.log"), read_training_log(SHIPPED / name)
    assert text.config == shipped.config and text.class_names == shipped.class_names
    assert text.eval_mode == shipped.eval_mode
    epochs = {0, 1, 235} if name == "seco_gta" else {0, 1}
    assert text.miou.keys() == {0, 1}
    for part in ("miou", "class_iou"):
        ours, theirs = getattr(shipped, part), getattr(text, part)
        assert {epoch: ours[epoch] for epoch in theirs} == theirs
    assert [row for row in shipped.losses if row[0] in epochs] == text.losses
    excerpt = (EXCERPTS / f"{name}.log").read_text()
    for row in table(SHIPPED / name / "losses.csv") + table(SHIPPED / name / "epochs.csv"):
        if int(row["epoch"]) in epochs:
            clock = row.get("time", row.get("started")).replace(".", ",")
            what = "Iters: {iteration}, " if "time" in row else "> Epoch: {epoch}, LR: {lr}, "
            assert re.search(f"{clock}.*{what.format_map(row)}", excerpt)


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_folders_are_consistent(name):
    """With themselves, with their README, and their events with the CSVs, figure by figure."""
    log = read_training_log(SHIPPED / name)
    config = json.loads((SHIPPED / name / "config.json").read_text())
    loss_rows, evaluated, _, length = COUNTS[name]
    assert (len(log.losses), len(log.miou)) == (loss_rows, evaluated)
    printed = [iteration for epoch, iteration, _ in log.losses if epoch == 1]
    for possible in (*config["iterations_per_epoch_possible"], length):
        assert printed == list(range(0, possible, possible // 8))
    assert log.eval_mode == ("sliding_window" if name == "seco_gta" else "original")
    assert len(log.class_names) == config["options"]["nclass"]
    for epoch in log.miou:  # the mIoU printed is the mean of the classes, to rounding
        assert np.mean([*log.class_iou[epoch].values()]) == pytest.approx(
            log.miou[epoch], abs=0.0101
        )
    events = read_events(SHIPPED / name)
    assert events.class_names == log.class_names and events.epochs == log.epochs
    assert events.miou == pytest.approx(log.miou)
    for epoch, ious in log.class_iou.items():
        assert events.class_iou[epoch] == pytest.approx(ious)
    assert len(events.losses) == loss_rows
    for ours, (epoch, iteration, values) in zip(events.losses, log.losses):
        assert ours[:2] == (epoch, iteration) and ours[2] == pytest.approx(values)
    text = (SHIPPED / name / "README.md").read_text().replace("\n", " ")
    found = best_and_last(log.miou)
    assert all(f"{found[key]:.2f}" in text for key in ("best", "last", "last_mean"))
    assert f"**{length} was chosen**" in text and f"@ epoch {found['best_epoch']}" in text


def text_log(path, epochs, miou=lambda e: 40 + e, length=20, classes=("road", "sky"), start=0):
    """A small log in UniMatch's format."""
    lines = ["nohup: ignoring input", "[2024-01-01 00:00:00,000][    INFO] {'epochs': 9,"]
    lines += [" 'nclass': 2}", "", "[0.125 0.125]"]
    row = "Loss x: 1.000, Loss s: nan, Loss w_fp: 0.500, Mask ratio: 1.000"
    for epoch in range(start, start + epochs):
        clock = f"[2024-01-01 {epoch:02d}:00:00,000][    INFO]"
        evaluation = f"{clock} ***** Evaluation"
        lines.append(f"{clock} ===========> Epoch: {epoch}, LR: 0.00500, Previous best: 0.00")
        for i in range(0, length, length // 8):
            lines.append(f"{clock} Iters: {i}, Total loss: 0.{epoch:03d}, {row}")
        for i, name in enumerate(classes):
            lines.append(f"{evaluation} ***** >>>> Class [{i} {name}] IoU: {miou(epoch):.2f}")
        lines += [f"{evaluation} original ***** >>>> MeanIoU: {miou(epoch):.2f}", ""]
    path.write_text("\n".join(lines))
    return path


def test_small_log_is_read(tmp_path):
    log = read_text_log(text_log(tmp_path / "a.log", 3))
    assert log.miou == {0: 40, 1: 41, 2: 42} and log.config == {"epochs": 9, "nclass": 2}
    assert log.class_names == ["road", "sky"]
    assert log.class_iou[2] == {"road": 42, "sky": 42}
    assert math.isnan(log.losses[0][2]["loss_s"]) and log.losses[-1][:2] == (2, 18)
    assert len(log.losses) == 30
    summary = {"best": 42, "best_epoch": 2, "last": 42, "last_epoch": 2, "last_mean": 41}
    assert best_and_last(log.miou) == {**summary, "evaluations": 3}
    assert best_and_last({3: 7.0, 4: 9.0, 5: 9.0, 6: 1.0}, last=2)["best_epoch"] == 4
    assert best_and_last({3: 7.0, 4: 9.0, 5: 9.0, 6: 1.0}, last=2)["last_mean"] == 5


@pytest.mark.parametrize("again", [0, 5])
def test_an_epoch_started_again_voids_all_later_ones(tmp_path, again):
    """20 epochs, then again from epoch `again` on with other classes, options and mode, cut in the
    middle of the third epoch.
    """
    path = tmp_path / "a.log"
    first, second = (
        re.split(r"(?m)^(?=.*Epoch: )", text_log(path, *how).read_text().replace("nan", "0.25"))
        for how in ((20,), (3, lambda e: 20 + e, 40, ("a", "b", "c"), again))
    )
    second = [part.replace("original", "center_crop").replace("s': 9", "s': 8") for part in second]
    second[3] = second[3].partition("***** Evaluation")[0]
    path.write_text("".join(first + second))
    log = read_text_log(path)
    path.write_text("".join(second[:1] + first[1 : 1 + again] + second[1:]))
    assert log == read_text_log(path)
    assert log.epochs == [*range(again + 2)] and log.miou[again + 1] == 21 + again
    assert log.config == {"epochs": 8, "nclass": 2} and log.class_names == ["a", "b", "c"]
    assert log.eval_mode == ("original, then center_crop" if again else "center_crop")


# -------------------------------------------------------------------------- other versions' records


def log_of_2022(path, epochs, miou):
    """As UniMatch of 2022 wrote it: `Mask`, `meanIOU`, four decimals of the learning rate, center
    crops until the last two epochs, no class rows.
    """
    text = text_log(path, epochs, miou, 236, ()).read_text()
    words = {"Mask ratio": "Mask", "MeanIoU": "meanIOU", "0.00500": "0.0050", "s: nan": "s: 0.25"}
    for today, of_2022 in {**words, " 'nclass': 2}": " 'batch_size': 2}"}.items():
        text = text.replace(today, of_2022)
    text = text.replace("original", "center_crop", epochs - 2)
    path.write_text(text.replace("original", "sliding_window"))
    return path


def test_log_of_2022_keeps_its_rows(tmp_path, capsys):
    reference = read_training_log(SHIPPED / "seco_gta")
    path = log_of_2022(tmp_path / "a.log", 12, reference.miou.get)
    log = read_text_log(path)
    assert log.epochs == list(range(12)) and log.miou[3] == reference.miou[3]
    assert len(log.losses) == 12 * 9
    assert log.losses[10] == (1, 29, dict(zip(LOSS_NAMES, (0.001, 1, 0.25, 0.5, 1))))
    assert log.eval_mode == "center_crop, then sliding_window" and not log.class_iou

    code, printed = compared(path, SHIPPED / "seco_gta", capsys)
    assert code == 0 and "the run has no IoU per class; only mIoU is compared" in printed
    assert "last (epoch 11)" in printed and "overall: pass (8 of 8 rows" in printed


def test_rows_of_other_wordings(tmp_path):
    path = tmp_path / "a.log"
    path.write_text(
        "2023-01-01 00:00:00.250 - INFO - ===========> Epoch: 0/80, LR: 1e-05, Previous best: 0\n"
        "Iters: 0/100, Loss: 0.5, Loss_x: 1.25, Loss U: .5e, Loss fp: 2, Other: 3, Mask ratio: 1e-2"
        "\nINFO:root:Iters: 0, Loss: 0.75\n"  # told twice by another logger: the later counts
        "***** Evaluation ***** >>>> mIoU: 41.5\n"
        "===========> Epoch: 1, Previous best: 41.5\n"
    )
    log = read_text_log(path)
    assert log.losses == [(0, 0, {"loss_all": 0.75})]
    assert log.miou == {0: 41.5} and log.eval_mode is None
    path.write_text(path.read_text().replace("INFO:root:Iters: 0", "INFO:root:Iters: 1"))
    known = {"loss_all": 0.5, "loss_x": 1.25, "loss_w_fp": 2, "mask_ratio": 0.01}
    assert read_text_log(path).losses[0][2] == known


@pytest.mark.parametrize("kind", ["miou", "losses"])
def test_a_last_line_cut_anywhere(tmp_path, kind):
    """Of a run still going: the last value is whole or not there. It is whole with its line end."""
    path = tmp_path / "a.log"
    lines = log_of_2022(path, 3, lambda epoch: 40.25 + epoch).read_text().splitlines(keepends=True)
    text = "".join(lines if kind == "miou" else lines[:-1])
    path.write_text(text)
    full = list(getattr(read_text_log(path), kind))
    assert len(full) in (3, 27)
    for cut in range(1, 100):
        path.write_text(text[:-cut])
        assert list(getattr(read_text_log(path), kind)) == full[:-1]


@pytest.mark.parametrize("every", [1, 5])
def test_events_with_tensorboardx_tags(tmp_path, capsys, every):
    """Class names with underscores, `mIOU`; the run is in the middle of epoch 12."""
    reference, length, rows = read_training_log(SHIPPED / "seco_gta"), 30, []
    for epoch in range(13):
        for i in range(length if epoch < 12 else 7):
            step = epoch * length + i
            rows += [(1e9 + step, step, f"train/{name}", 0.5) for name in LOSS_NAMES]
        if epoch < 12 and epoch % every == every - 1:
            clock = 1e9 + step + 0.5
            rows.append((clock, epoch, "eval/mIOU", reference.miou[epoch]))
            for name, value in reference.class_iou[epoch].items():
                rows.append((clock, epoch, f"eval/{name.replace(' ', '_')}_IoU", value))
    with SummaryWriter(tmp_path / "run") as writer:
        for clock, step, tag, value in rows:
            writer.add_scalar(tag, value, step, clock)
    for path in (tmp_path / "run", *(tmp_path / "run").iterdir()):
        log = read_training_log(path)
        assert log.class_names == reference.class_names
        assert log.epochs == list(range(every - 1, 12, every))
        assert log.miou[9] == pytest.approx(reference.miou[9], abs=1e-4)
        assert log.class_iou[9] == pytest.approx(reference.class_iou[9], abs=1e-4)
        assert log.losses[-1] == (12, 6, dict.fromkeys(LOSS_NAMES, 0.5))
    assert compare_logs.main([str(tmp_path / "run"), str(SHIPPED / "seco_gta")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"traffic light .* pass", printed)


@pytest.mark.parametrize("purge", [False, True])
@pytest.mark.parametrize(
    "start, end, epochs", [(0, 110, [0]), (0, 37, []), (300, 350, [0, 1, 2]), (250, 350, [0, 1, 2])]
)
def test_events_of_a_run_started_again(tmp_path, purge, start, end, epochs):
    """Five epochs of 100 iterations at 60; then, in another file, from `start` to `end` at 20."""
    clock = 1e9
    for number, (low, high) in enumerate([(0, 500), (start, end)]):
        writer = SummaryWriter(str(tmp_path), purge_step=low if purge else None)
        for step in range(low, high):
            clock += 1
            writer.add_scalar("train/loss_all", number, step, clock)
            if step % 100 == 99:
                for tag in ("mIoU", "road_IoU", "sky_IoU"):
                    writer.add_scalar(f"eval/{tag}", 60 - 40 * number, step // 100, clock + 0.5)
        writer.close()
    log = read_training_log(tmp_path)
    assert log.epochs == epochs
    new = {epoch: epoch >= start // 100 for epoch in range(5)}
    assert log.miou == {epoch: 60 - 40 * new[epoch] for epoch in epochs}
    assert log.class_iou == {e: {"road": miou, "sky": miou} for e, miou in log.miou.items()}
    rows = [(step // 100, step % 100, {"loss_all": step >= start}) for step in range(end)]
    assert log.losses == rows


# ---------------------------------------------------------------------------------------- comparing


def compared(run, reference, capsys):
    """(exit code, what is printed) of compare_logs, whose picture is made but not rendered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_logs, "save_chart", lambda path, figure: None)
        code = compare_logs.main([str(run), str(reference), "--picture", f"{run}.png"])
    return code, capsys.readouterr().out


@pytest.fixture
def compared_logs(tmp_path, monkeypatch, capsys):
    """As `compared`, of two TrainingLogs."""

    def compare(run, reference):
        logs = {"run": run, "reference": reference}
        monkeypatch.setattr(compare_logs, "read_training_log", lambda path: logs[path.name])
        return compared(tmp_path / "run", tmp_path / "reference", capsys)

    return compare


GTA = read_training_log(SHIPPED / "seco_gta")
HIGH, FAILED = "best up to epoch 234", ("FAIL (low)", "FAIL (high)")
LATE = {"epoch 225", "last (epoch 234)", "mean of the last 20"}


@pytest.mark.parametrize(
    "miou, car, failing",
    [
        ({**GTA.miou, 100: 50.0}, 0, {"epoch 100"}),
        ({e: miou - 2.1 * (e >= 215) for e, miou in GTA.miou.items()}, 0, LATE),
        (GTA.miou, -6, {"car"}),
        ({**GTA.miou, 179: 66.2}, 0, {HIGH}),
        ({e: GTA.miou[e] for e in range(30)}, 0, set()),
    ],
    ids=["one epoch", "late epochs", "one class", "higher", "still going"],
)
def test_perturbed_logs_fail_at_the_right_rows(compared_logs, miou, car, failing):
    ious = {e: {**ious, "car": ious["car"] + car} for e, ious in GTA.class_iou.items()}
    code, printed = compared_logs(replace(GTA, miou=miou, class_iou=ious), GTA)
    rows = {line[:24].strip() for line in printed.splitlines() if line.endswith(FAILED)}
    assert rows == failing and code == bool(failing)
    assert ("FAIL (high)" in printed) == (failing == {HIGH})
    if not failing:
        assert "last (epoch 29)" in printed and "overall: pass" in printed
        assert "10 not reached yet" in printed and re.search(r"epoch 30 .* not yet", printed)


def test_runs_evaluated_now_and_then(compared_logs):
    """Every five epochs, at 4, 9, …: compared there, whichever of the two it is."""
    seldom = replace(GTA, miou={e: miou for e, miou in GTA.miou.items() if e % 5 == 4})
    best, last = max(seldom.miou.values()), np.mean([*seldom.miou.values()][-20:])
    for pair in ((seldom, GTA), (GTA, seldom), (seldom, seldom)):
        code, printed = compared_logs(*pair)
        found = [int(e) for e in re.findall(r"^epoch (\d+) ", printed, re.MULTILINE)]
        assert found == [4, 9, 19, 29, 39, 49, 74, 99, 124, 149, 174, 199, 224] and code == 0
        assert "compared at the 47 epochs that both have" in printed
        assert "not yet" not in printed and "last (epoch 234)" in printed
        assert re.search(rf"best up to epoch 234 +{best:.2f} +{best:.2f} ", printed)
        assert re.search(rf"mean of the last 20 +{last:.2f} +{last:.2f} ", printed)


def test_a_log_with_itself_passes(tmp_path, capsys):
    for name in COUNTS:
        log, picture = str(SHIPPED / name), tmp_path / f"{name}.png"
        assert compare_logs.main([log, log, "--picture", str(picture)]) == 0
        assert Image.open(picture).width > 800
        printed = capsys.readouterr().out
        assert "FAIL" not in printed and "overall: pass" in printed
        assert f"tensorboard --logdir_spec run:{log},reference:{log}" in printed


def test_a_class_without_iou_counts_0_on_both_sides(tmp_path, capsys):
    path, zero = text_log(tmp_path / "a.log", 4), tmp_path / "zero.log"
    zero.write_text(re.sub(r"(1 sky\] IoU): .*", r"\1: 0.00", path.read_text()))
    path.write_text(re.sub(r"(1 sky\] IoU): .*", r"\1: nan", path.read_text()))
    for pair in ((path, path), (path, zero), (zero, path)):
        code, printed = compared(*pair, capsys)
        assert code == 0 and "overall: pass" in printed
        assert re.search(r"^sky +0.00 +0.00 +\+0.00 .* pass", printed, re.MULTILINE)


def test_an_miou_that_is_no_number_is_named_and_left_out(tmp_path, capsys):
    whole, path = text_log(tmp_path / "whole.log", 6), tmp_path / "a.log"
    path.write_text(whole.read_text().replace("MeanIoU: 42.00", "MeanIoU: nan"))
    for pair, who in (((path, whole), "run"), ((whole, path), "reference")):
        code, printed = compared(*pair, capsys)
        assert code == 0 and "overall: pass" in printed and "nan" not in printed
        assert f"the {who}'s mIoU is not a number, left out: epoch 2\n" in printed
        assert "epoch 2 " not in printed and "best up to epoch 5" in printed


def evaluated_at(epochs, kept):
    """A log of 0 to `epochs` - 1, of 15, with a mIoU at `kept` alone."""
    losses = [(epoch, 0, {"loss_x": 1.0}) for epoch in range(epochs)]
    return TrainingLog({"epochs": 15}, miou={epoch: 40 + epoch for epoch in kept}, losses=losses)


def test_evaluations_that_never_meet_are_told_others_waited_for(compared_logs):
    reference = evaluated_at(15, (4, 9, 14))
    for epochs, *kept in ((15, 5, 10), (16, 5, 10, 15), (15,)):
        run, found = evaluated_at(epochs, kept), ", ".join(map(str, kept)) or "none"
        message = f"run cannot be compared .*: it has {epochs} epochs, evaluated at {found}, the"
        with pytest.raises(UserError, match=f"{message} reference at 4, 9, 14; train with"):
            compared_logs(run, reference)
    with pytest.raises(UserError, match="no evaluation with a mIoU in it"):
        compared_logs(reference, run)
    for epochs, *kept in ((8,), (3, 0, 1, 2), (6, 5), (12, 5, 10)):
        code, printed = compared_logs(evaluated_at(epochs, kept), reference)
        assert code == 0 and "overall: nothing to compare yet" in printed


@pytest.fixture
def our_run(tmp_path):
    """A run's folder as train_unimatch.py leaves it after two epochs."""
    names = read_training_log(SHIPPED / "seco_gta").class_names
    (tmp_path / "run").mkdir()
    text_log(tmp_path / "run/train.log", 2, lambda epoch: 34.14 + 10 * epoch, classes=names)
    options = {"epochs": 240, "crop_size": 801, "lr": 0.005}
    (tmp_path / "run/manifest.json").write_text(json.dumps({"options": options}))
    return tmp_path / "run"


def test_our_run_beside_a_shipped_log(our_run, capsys):
    pair = [str(our_run), str(SHIPPED / "seco_gta")]
    assert compare_logs.main([*pair, "--class-tolerance", "100"]) == 0
    printed = capsys.readouterr().out
    assert "the numbers are not of one kind" in printed
    assert "crop_size: run 801, reference 769" in printed
    assert (our_run / "compare_seco_gta.png").is_file()
    assert "tensorboard --logdir_spec run:" in printed


def test_tolerance_is_the_stated_one():
    reference = TrainingLog(miou={e: 60 + (e % 2) for e in range(40)})

    def residual(e):
        return reference.miou[e] - np.mean([reference.miou[f] for f in range(e - 5, e + 6)])

    wobble = np.std([residual(e) for e in range(10, 31)])
    assert compare_logs.band(reference, 20, 1.5) == pytest.approx(1.5 + 2 * wobble)
    values = {61.4: "pass", 61.6: "FAIL (high)", 58.4: "FAIL (low)", None: "not yet"}
    for run, verdict in values.items():
        assert compare_logs.Row("x", 60, run, 1.5).verdict == verdict


def test_comparison_of_unlike_things_is_refused(our_run, tmp_path):
    gta, lost = str(SHIPPED / "seco_gta"), str(tmp_path / "none")
    for arguments, message in (
        ([gta, str(SHIPPED / "seco_synthia")], "19 classes"),
        ([lost, gta], "no such run folder"),
        ([str(tmp_path), gta], "holds no epochs.csv"),
        ([str(ROOT / "README.md"), gta], "not a UniMatch-style text log"),
        ([gta, gta, "--tolerance", "-1"], "--tolerance -1"),
    ):
        with pytest.raises(UserError, match=message):
            compare_logs.main(arguments)
    # by the options, where there are no IoUs
    text = (our_run / "train.log").read_text()
    (our_run / "train.log").write_text(text.split("*****")[0].rpartition("\n")[0] + "\n")
    (our_run / "manifest.json").write_text(json.dumps({"options": {"class_num": 11}}))
    with pytest.raises(UserError, match="run has 11 classes, .*seco_gta 19 "):
        compare_logs.main([str(our_run), gta])


# ------------------------------------------------------------------------------------------- claims


# Task, folder of the log, "before" and "after" as the authors' README reports them (source-free,
# DeepLab-ResNet-101).
REPORTED = (
    ("GTA → Cityscapes", "seco_gta", "55.1 (DTST)", "64.6"),
    ("SYNTHIA → Cityscapes", "seco_synthia", "52.3 (DTST)", "59.2"),
    ("GTA → BDD100K", "seco_bdd", "37.9 (SFOCDA)", "44.3"),
)


def test_readme_claims_what_the_logs_say():
    """The table of "Results", cell by cell. Nobody has run the tasks with this code yet."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    assert header[:3] == ["task", "before (reported)", "after (reported)"]
    assert header[3:5] == ["shipped log: best @ epoch", "last"]
    assert header[5:] == ["last-20 mean", "13-class mean (best)", "ours"]
    derived = []
    for task, folder, before, after in REPORTED:
        log = read_training_log(SHIPPED / folder)
        found, mean_of_13 = best_and_last(log.miou), "–"
        best = f"{found['best']:.2f} @ {found['best_epoch']}"
        last = f"{found['last']:.2f} @ {found['last_epoch']}"
        if len(log.class_names) == 16:
            ious = [*log.class_iou[found["best_epoch"]].values()]
            mean_of_13 = f"{np.mean([ious[i] for i in IDS_13_IN_16]):.2f}"
        derived.append([task, before, after, best, last, f"{found['last_mean']:.2f}", mean_of_13])
        derived[-1].append("not run")
    nothing = ["–"] * 4  # ACDC has no log
    acdc = ["Cityscapes → ACDC", "34.6 (CMA, validation)", "not published", *nothing, "not run"]
    assert rows == [*derived, acdc]


@pytest.mark.parametrize(
    "name, script, digits",
    [("seco_gta", "gta2cs", 1), ("seco_synthia", "synthia2cs", 1), ("seco_bdd", "gta2bdd", 0)],
)
def test_hours_are_those_of_the_logs(name, script, digits):
    """On four GPUs; BDD100K's 56 epochs projected to 240."""
    rows = [row for row in table(SHIPPED / name / "epochs.csv") if row["evaluated"]]
    last, first = (datetime.fromisoformat(t) for t in (rows[-1]["evaluated"], rows[0]["started"]))
    hours = (last - first).total_seconds() / 3600 * (240 / len(rows) if name == "seco_bdd" else 1)
    said = f" {hours:.{digits}f} h"
    row = [line for line in (ROOT / "README.md").read_text().splitlines() if f"/{name}`" in line]
    assert any(f"{said} on 4 GPUs" in line for line in row)
    head = (ROOT / f"scripts/{script}.sh").read_text()
    assert said in head and "four GPUs" in head
