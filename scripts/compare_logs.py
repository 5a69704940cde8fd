#!/usr/bin/env python
"""Set a run beside a reference log: same epochs side by side, a tolerance band, pass or fail per
row and overall.

Inputs   RUN and REFERENCE, each one of: a run's folder, a folder of training_logs/, a text log or
         event file of UniMatch. The run may still be going: rows it has not reached are "not yet".
Outputs  a table on the screen; --picture (default: <RUN>/compare_<reference>.png) with mIoU, the
         band and the losses; of two folders the command that lays them in TensorBoard. Exit code
         0: all rows reached are in the band, 1: some are not, 2: nothing can be compared.

    python -m scripts.compare_logs runs/gta2cs/adapt training_logs/seco_gta

Only epochs that both have evaluated are compared. One that evaluates every five epochs is compared
at those; best, last and last-20 mean are taken over the epochs that both have. An evaluation whose
mIoU is not a number is named and left out; a class without an IoU counts 0, as in the shipped logs.

Copied away, this file needs util/.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np

from util.charts import draw_lines, new_axes, save_chart
from util.options import Argument, File, NotNegative, parse_options
from util.outputs import check_writable
from util.run import UserError, run_main
from util.training_log import LOSS_NAMES, TrainingLog, read_training_log

EPOCHS = (0, 1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 125, 150, 175, 200, 225, 239)
LAST = 20
BAND_COLOUR = "#f7e8c8"


@dataclass
class Row:
    """One compared figure, in percent; run is None while the run has not got there."""

    name: str
    reference: float
    run: float | None
    tolerance: float

    @property
    def verdict(self) -> str:
        if self.run is None:
            return "not yet"
        difference = self.run - self.reference
        if abs(difference) <= self.tolerance + 1e-9:
            return "pass"
        return "FAIL (high)" if difference > 0 else "FAIL (low)"


def spacing(epochs: list[int]) -> int:
    """Epochs between two evaluations: the median."""
    return max(1, int(np.median(np.diff(epochs)))) if len(epochs) > 1 else 1


def band(reference: TrainingLog, epoch: int, tolerance: float) -> float:
    """Half width of the band at one epoch: the tolerance, and twice the standard deviation of the
    reference around its own running mean, which is how much two single evaluations differ without
    any difference between the runs.

    Of 10 epochs to either side, with the mean over 5 to either side; where evaluations are farther
    apart than that allows, of two and one.
    """
    epochs, apart = reference.epochs, spacing(reference.epochs)

    def mean_around(centre: int) -> float:
        near = [e for e in epochs if abs(e - centre) <= max(5, apart)]
        return np.mean([reference.miou[e] for e in near])

    near = [e for e in epochs if abs(e - epoch) <= max(10, 2 * apart)]
    return tolerance + 2 * float(np.std([reference.miou[e] - mean_around(e) for e in near]))


def common_epochs(run: TrainingLog, reference: TrainingLog) -> list[int]:
    """Epochs that both have evaluated, in order."""
    return sorted(set(run.epochs) & set(reference.epochs))


def compared_epochs(run: TrainingLog, reference: TrainingLog) -> list[int]:
    """For each of EPOCHS the nearest epoch that both have evaluated or, of the reference, that the
    run has not got to. Each once.
    """
    common, reached = common_epochs(run, reference), max(run.miou, default=-1)
    pool = np.array(common + [epoch for epoch in reference.epochs if epoch > reached])
    wanted = [epoch for epoch in EPOCHS if epoch <= reference.epochs[-1]]
    return sorted({int(pool[np.abs(pool - epoch).argmin()]) for epoch in wanted})


def miou_rows(run: TrainingLog, reference: TrainingLog, tolerance: float) -> list[Row]:
    """Rows at fixed epochs, then last, best and mean of the last 20 up to the last common epoch."""
    common = common_epochs(run, reference)
    rows = []
    for epoch in compared_epochs(run, reference):
        values = (reference.miou[epoch], run.miou.get(epoch))
        rows.append(Row(f"epoch {epoch}", *values, band(reference, epoch, tolerance)))
    if common:
        a, b = ([log.miou[epoch] for epoch in common] for log in (reference, run))
        means = (float(np.mean(values[-LAST:])) for values in (a, b))
        end, count = common[-1], min(LAST, len(a))
        rows.append(Row(f"last (epoch {end})", a[-1], b[-1], band(reference, end, tolerance)))
        rows.append(Row(f"best up to epoch {end}", max(a), max(b), tolerance))
        rows.append(Row(f"mean of the last {count}", *means, tolerance))
    return rows


def class_rows(run: TrainingLog, reference: TrainingLog, tolerance: float) -> list[Row]:
    """Per class: the mean IoU of the last 20 common epochs; the band widens by twice the class's
    own deviation there. [] if one of the logs has no IoU per class.
    """
    both = run.class_iou.keys() & reference.class_iou.keys()
    common = [epoch for epoch in common_epochs(run, reference) if epoch in both][-LAST:]
    rows = []
    for name in reference.class_names if common else ():
        # A class in no picture of the validation set has no IoU; the shipped logs count it 0.
        values = ([log.class_iou[e].get(name, 0) for e in common] for log in (reference, run))
        a, b = map(np.nan_to_num, values)
        width = tolerance + 2 * float(np.std(a))
        rows.append(Row(name, float(np.mean(a)), float(np.mean(b)), width))
    return rows


def listed(epochs: list[int]) -> str:
    """`4, 9, 14 …`: the first epochs."""
    return ", ".join(map(str, epochs[:3])) + (" …" if len(epochs) > 3 else "")


def differing_settings(run: TrainingLog, reference: TrainingLog) -> list[str]:
    """Notes on what the two do not share, as far as the logs tell it."""
    notes = []
    for name, log in (("run", run), ("reference", reference)):
        if log.miou and not log.class_names:
            notes.append(f"the {name} has no IoU per class; only mIoU is compared")
        if left_out := sorted(log.miou.keys() - log.epochs):
            notes.append(f"the {name}'s mIoU is not a number, left out: epoch {listed(left_out)}")
    apart = [spacing(log.epochs) for log in (run, reference)]
    if run.miou and apart != [1, 1]:
        notes.append(
            f"epochs between evaluations: run {apart[0]}, reference {apart[1]}; compared at the"
            f" {len(common_epochs(run, reference))} epochs that both have"
        )
    if run.eval_mode and reference.eval_mode and run.eval_mode != reference.eval_mode:
        notes.append(
            f"evaluation mode: run {run.eval_mode}, reference {reference.eval_mode}; the numbers"
            " are not of one kind"
        )
    for key in ("epochs", "crop_size", "lr"):
        a, b = reference.config.get(key), run.config.get(key)
        if a is not None and b is not None and a != b:
            notes.append(f"{key}: run {b}, reference {a}")
    return notes


def loss_curve(log: TrainingLog, name: str) -> tuple[list, list]:
    """(epochs, values of each one's last row) from the first epoch to the last; NaN for one that is
    missing.
    """
    values = {epoch: losses[name] for epoch, _, losses in log.losses if name in losses}
    epochs = list(range(min(values), max(values) + 1)) if values else []
    return epochs, [values.get(epoch, np.nan) for epoch in epochs]


def picture(run: TrainingLog, reference: TrainingLog, tolerance: float):
    """mIoU with the band, above the four losses of each epoch's last row, which is the mean over
    nearly all of it. A matplotlib Figure.
    """
    logs, epochs = {"reference": reference, "run": run}, reference.epochs
    losses = [n for n in LOSS_NAMES[:-1] if any(n in values for _, _, values in reference.losses)]
    axes, *others = new_axes([460, *(300 for _ in losses)])
    axes.set_title("mIoU on the validation set", loc="left")
    axes.set(xlabel="epoch", ylabel="mIoU (%)")
    middle = np.array([reference.miou[epoch] for epoch in epochs])
    widths = np.array([band(reference, epoch, tolerance) for epoch in epochs])
    axes.fill_between(epochs, middle - widths, middle + widths, color=BAND_COLOUR, label="band")
    draw_lines(axes, {label: log.curve for label, log in logs.items()})
    for below, name in zip(others, losses):
        draw_lines(below, {label: loss_curve(log, name) for label, log in logs.items()})
        below.set(xlabel="epoch", ylabel=name)
    return axes.figure


def print_rows(title: str, rows: list[Row]) -> None:
    print(f"\n{title:<24} {'run':>8} {'reference':>10} {'difference':>11}    band")
    for row in rows:
        run = "" if row.run is None else f"{row.run:8.2f}"
        difference = "" if row.run is None else f"{row.run - row.reference:+11.2f}"
        print(
            f"{row.name:<24} {run:>8} {row.reference:10.2f} {difference:>11}   "
            f" ±{row.tolerance:<5.2f} {row.verdict}"
        )


@dataclass(kw_only=True)
class Options:
    """what is compared"""

    run: Argument[Path]
    "run folder, event file or text log"
    reference: Argument[Path]
    "folder of training_logs/, or as RUN"
    tolerance: Annotated[NotNegative, "POINTS"] = 1.5
    "mIoU points that two runs may differ by; at single epochs the reference's own jitter, twice,"
    "is added (no spread over seeds was ever published)"
    class_tolerance: Annotated[NotNegative, "POINTS"] = 5.0
    "the same for the IoU of one class"
    picture: File | None = None
    "where the PNG goes (default: <RUN>/compare_<reference>.png)"


def parse_args(argv=None) -> Options:
    return parse_options(Options, __doc__, argv)


def read_both(options: Options) -> tuple[TrainingLog, TrainingLog]:
    """(run, reference), which are of one set of classes, and evaluated at the same epochs at some
    time.
    """
    run, reference = read_training_log(options.run), read_training_log(options.reference)
    if not reference.epochs:
        raise UserError(
            f"{options.reference}: no evaluation with a mIoU in it, so there is nothing to compare"
            " with"
        )
    counts = [  # by the evaluations, or by the options; None if neither tells it
        len(log.class_names) or log.config.get("nclass") or log.config.get("class_num")
        for log in (run, reference)
    ]
    names = run.class_names, reference.class_names
    if all(counts) and counts[0] != counts[1] or all(names) and set(names[0]) != set(names[1]):
        raise UserError(
            f"{options.run} has {counts[0]} classes, {options.reference} {counts[1]} (or other"
            " names); take the reference of the same task"
        )
    reached = max([*run.miou, *(epoch for epoch, _, _ in run.losses)], default=-1)
    to_come = min(run.config.get("epochs", math.inf), reference.epochs[-1] + 1) - 1 - reached
    if to_come <= 0 and not common_epochs(run, reference):
        raise UserError(
            f"{options.run} cannot be compared with {options.reference}: it has {reached + 1}"
            f" epochs, evaluated at {listed(run.epochs) or 'none'}, the reference at"
            f" {listed(reference.epochs)}; train with --val-id-path and --eval-every 1"
        )
    return run, reference


def overall(rows: list[Row], classes: list[Row]) -> tuple[str, bool]:
    """The last line of the table, and whether a row is out of the band."""
    reached = [row for row in rows + classes if row.run is not None]
    failed = [row.name for row in reached if row.verdict != "pass"]
    waiting = len(rows) - sum(row.run is not None for row in rows)
    line = (
        f"overall: {'FAIL' if failed else 'pass' if reached else 'nothing to compare yet'}"
        f" ({len(reached) - len(failed)} of {len(reached)} rows in the band"
        f"{f', {waiting} not reached yet' if waiting else ''})"
    )
    return line + (f"; out: {', '.join(failed)}" if failed else ""), bool(failed)


def main(argv=None) -> int:
    options = parse_args(argv)
    run, reference = read_both(options)
    folder = options.run if options.run.is_dir() else options.run.parent
    target = options.picture or folder / f"compare_{options.reference.stem}.png"
    check_writable(target.parent)

    for note in differing_settings(run, reference):
        print(f"note: {note}")
    print(
        f"run: {options.run} ({len(run.epochs)} evaluations,"
        f" {run.eval_mode or 'evaluation mode not recorded'}); reference: {options.reference}"
        f" ({len(reference.epochs)}, {reference.eval_mode or 'not recorded'})"
    )
    rows = miou_rows(run, reference, options.tolerance)
    classes = class_rows(run, reference, options.class_tolerance)
    print_rows("mIoU, %", rows)
    if classes:
        print_rows("IoU, mean of the last 20", classes)
    save_chart(target, picture(run, reference, options.tolerance))
    line, failed = overall(rows, classes)
    print(f"\n{line}\npicture: {target}")
    if options.run.is_dir() and options.reference.is_dir():
        print(f"tensorboard --logdir_spec run:{options.run},reference:{options.reference}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
