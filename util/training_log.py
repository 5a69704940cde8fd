"""One form for the record of an adaptation run, whatever it is read from: a UniMatch-style text
log, the folder of a run (metrics.jsonl or event files), or a folder of training_logs/ (CSV).

IoU and mIoU are percent. Epochs and iterations count from 0. Losses are running means since the
start of their epoch, as UniMatch prints them, where they come from a text log.
"""

from __future__ import annotations

import ast
import csv
import datetime
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.labels import CITYSCAPES_19, IDS_13_IN_16, SYNTHIA_16
from util.run import UserError, read_json

# UniMatch's TensorBoard tags. Losses count iterations, evaluations epochs. Ours adds the learning
# rate.
LOSS_NAMES = ("loss_all", "loss_x", "loss_s", "loss_w_fp", "mask_ratio")
TEXT_LOSSES = dict(zip(("Total loss", "Loss x", "Loss s", "Loss w_fp", "Mask ratio"), LOSS_NAMES))
LR_TAG, MIOU_TAG = "train/lr", "eval/mIoU"
# Names in the shipped SYNTHIA log that differ from Cityscapes' official ones.
OFFICIAL_NAMES = {"light": "traffic light", "sign": "traffic sign", "motocycle": "motorcycle"}


@dataclass
class TrainingLog:
    """The record of one run.

    miou: epoch → mIoU; class_iou: epoch → IoU per class, in the order of class_names; lr: epoch →
    learning rate as printed at the epoch's start; losses: rows (epoch, iteration, {loss name:
    value}); times: ("eval" | "epoch", epoch) or (epoch, iteration) → seconds since 1970, the log's
    clock read as UTC.
    """

    name: str
    config: dict = field(default_factory=dict)
    eval_mode: str | None = None
    class_names: tuple[str, ...] = ()
    miou: dict[int, float] = field(default_factory=dict)
    class_iou: dict[int, tuple[float, ...]] = field(default_factory=dict)
    lr: dict[int, float] = field(default_factory=dict)
    losses: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    times: dict[tuple, float] = field(default_factory=dict)
    iterations_per_epoch: int | None = None

    @property
    def epochs(self) -> list[int]:
        """Epochs with an evaluation, in order."""
        return sorted(self.miou)


# ------------------------------------------------------------------------------------ what it shows


def summary(log: TrainingLog, last: int = 20) -> dict:
    """Best mIoU and its epoch (the first one), last, mean of the last `last` evaluations; 13-class
    means for 16 classes.
    """
    epochs = log.epochs
    if not epochs:
        raise UserError(f"{log.name}: no evaluation in it yet (the first epoch must end first)")
    best = max(epochs, key=lambda epoch: (log.miou[epoch], -epoch))
    figures = {
        "best": log.miou[best],
        "best_epoch": best,
        "last": log.miou[epochs[-1]],
        "last_epoch": epochs[-1],
        "last_mean": float(np.mean([log.miou[epoch] for epoch in epochs[-last:]])),
        "evaluations": len(epochs),
    }
    if log.class_names == SYNTHIA_16.names:
        figures["best_13"] = float(np.mean([log.class_iou[best][i] for i in IDS_13_IN_16]))
    return figures


def iterations_range(log: TrainingLog) -> tuple[int, int]:
    """Least and most iterations per epoch that the printed rows allow.

    UniMatch prints iteration i if i % (L // 8) == 0. Rows s apart therefore mean 8 s <= L < 8 s +
    8; the last row of a complete epoch is below L, and the row after it, if L reached that far,
    would have been printed.
    """
    by_epoch: dict[int, list[int]] = {}
    for epoch, iteration, _ in log.losses:
        by_epoch.setdefault(epoch, []).append(iteration)
    complete = [rows for epoch, rows in by_epoch.items() if epoch in log.miou and len(rows) > 1]
    if not complete:
        raise UserError(
            f"{log.name}: no complete epoch, so its iterations per epoch are unknown; "
            "give them with --iterations-per-epoch"
        )
    rows = complete[0]
    spacing = rows[1] - rows[0]
    return max(8 * spacing, rows[-1] + 1), min(8 * spacing + 7, rows[-1] + spacing)


# ----------------------------------------------------------------------------------------- text log

_TIME = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})\]\[\s*\w+\] (.*)$")
_EPOCH = re.compile(r"^=+> Epoch: (\d+), LR: ([\d.]+), Previous best: [\d.]+$")
_ROW = re.compile(r"^Iters: (\d+), (.*)$")
_CLASS = re.compile(r"^\*+ Evaluation \*+ >>>> Class \[(\d+) (.+)\] IoU: (\d+\.\d\d)$")
_MEAN = re.compile(r"^\*+ Evaluation (\w+) \*+ >>>> MeanIoU: (\d+\.\d\d)$", re.IGNORECASE)
_NUMBER = re.compile(r"^(\d+\.\d{3}|nan|inf)$")


def read_text_log(path: str | Path) -> TrainingLog:
    """A UniMatch-style text log. Other lines are passed over, as is a last line cut short by a run
    still going.

    If the run was resumed, an epoch that starts again replaces what was logged of it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    log = TrainingLog(path.stem, config=_text_config(lines))
    epoch, names, ious = -1, {}, {}
    for line in lines:
        stamped = _TIME.match(line)
        if not stamped:
            continue
        time, text = _seconds(*stamped.groups()[:2]), stamped.group(3)
        if match := _EPOCH.match(text):
            epoch = int(match.group(1))
            log.losses = [row for row in log.losses if row[0] < epoch]
            log.lr[epoch] = float(match.group(2))
            log.times["epoch", epoch] = time
        elif (match := _ROW.match(text)) and epoch >= 0:
            losses = _text_losses(match.group(2))
            if losses:
                log.losses.append((epoch, int(match.group(1)), losses))
                log.times[epoch, int(match.group(1))] = time
        elif match := _CLASS.match(text):
            class_id = int(match.group(1))
            names[class_id] = OFFICIAL_NAMES.get(match.group(2), match.group(2))
            ious[class_id] = float(match.group(3))
        elif (match := _MEAN.match(text)) and epoch >= 0:
            log.eval_mode, log.miou[epoch] = match.group(1), float(match.group(2))
            log.class_names = tuple(names[i] for i in sorted(names))
            log.class_iou[epoch] = tuple(ious[i] for i in sorted(ious))
            log.times["eval", epoch] = time
            ious = {}
    if epoch < 0:
        raise UserError(
            f"{path}: no line `===========> Epoch: …`; this is not a UniMatch-style text log"
        )
    return log


def _seconds(clock: str, milliseconds: str) -> float:
    moment = datetime.datetime.strptime(clock, "%Y-%m-%d %H:%M:%S").replace(
        tzinfo=datetime.timezone.utc
    )
    return moment.timestamp() + int(milliseconds) / 1000


def _text_losses(text: str) -> dict[str, float] | None:
    """`Total loss: 0.893, Loss x: …` → {loss name: value}; None if a value is cut short or a name
    unknown.
    """
    losses = {}
    for part in text.split(", "):
        name, _, value = part.partition(": ")
        if name not in TEXT_LOSSES or not _NUMBER.match(value):
            return None
        losses[TEXT_LOSSES[name]] = float(value)
    return losses


def _text_config(lines: list[str]) -> dict:
    """The pretty-printed dict that UniMatch logs first; {} if there is none."""
    for number, line in enumerate(lines):
        start = line.find("{")
        if start >= 0 and _TIME.match(line):
            block = [line[start:]]
            for following in lines[number + 1 :]:
                if not following.strip():
                    break
                block.append(following)
            try:
                return ast.literal_eval("\n".join(block))
            except (ValueError, SyntaxError):
                return {}
    return {}


# -------------------------------------------------------------------------------- CSV, JSON, events


def read_training_logs_folder(folder: Path) -> TrainingLog:
    """A folder that scripts/dev/import_log.py wrote: epochs.csv, losses.csv, config.json."""
    config = read_json(folder / "config.json")
    log = TrainingLog(
        folder.name,
        config["options"],
        config["eval_mode"],
        tuple(config["class_names"]),
        iterations_per_epoch=config["iterations_per_epoch"],
    )
    with open(folder / "epochs.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epoch = int(row["epoch"])
            log.lr[epoch] = float(row["lr"])
            if row["mIoU"]:
                log.miou[epoch] = float(row["mIoU"])
                log.class_iou[epoch] = tuple(float(row[name]) for name in log.class_names)
    with open(folder / "losses.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            losses = {name: float(row[name]) for name in LOSS_NAMES if row.get(name)}
            log.losses.append((int(row["epoch"]), int(row["iteration"]), losses))
    return log


def read_metrics_json_lines(path: Path) -> TrainingLog:
    """metrics.jsonl of train_unimatch.py: a line per iteration (`train/…` tags) and per evaluation
    (`eval/…` tags).

    Losses become running means since the start of their epoch, as in text logs. A last line cut
    short by a run still going is passed over.
    """
    log = TrainingLog(path.parent.name)
    sums: dict[str, float] = {}
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines(keepends=True), start=1
    ):
        try:
            row = json.loads(line)
        except ValueError:
            if line.endswith("\n"):
                raise UserError(f"{path}, line {number}: not JSON") from None
            break
        epoch = row["epoch"]
        if MIOU_TAG in row:
            ious = {
                tag.removeprefix("eval/").removesuffix("_IoU"): value
                for tag, value in row.items()
                if tag.endswith("_IoU")
            }
            log.miou[epoch], log.eval_mode = row[MIOU_TAG], row.get("eval_mode")
            log.class_names, log.class_iou[epoch] = tuple(ious), tuple(ious.values())
        else:
            iteration = row["iteration"]
            log.lr.setdefault(epoch, row[LR_TAG])
            losses = {name: row[f"train/{name}"] for name in LOSS_NAMES if f"train/{name}" in row}
            sums = {
                name: value + (sums[name] if iteration else 0.0) for name, value in losses.items()
            }
            log.losses.append(
                (epoch, iteration, {name: value / (iteration + 1) for name, value in sums.items()})
            )
            log.iterations_per_epoch = max(log.iterations_per_epoch or 0, iteration + 1)
    return log


def read_events(folder: Path) -> TrainingLog:
    """TensorBoard event files in `folder`, of UniMatch, of train_unimatch.py or of
    training_logs/.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    log = TrainingLog(folder.name)
    if MIOU_TAG in tags:
        log.miou = {event.step: event.value for event in accumulator.Scalars(MIOU_TAG)}
    per_class = {
        tag.removeprefix("eval/").removesuffix("_IoU"): {
            e.step: e.value for e in accumulator.Scalars(tag)
        }
        for tag in tags
        if tag.startswith("eval/") and tag.endswith("_IoU")
    }
    found = {OFFICIAL_NAMES.get(name, name): values for name, values in per_class.items()}
    known = next(
        (s.names for s in (CITYSCAPES_19, SYNTHIA_16) if set(s.names) == set(found)),
        tuple(sorted(found)),
    )
    log.class_names = known
    log.class_iou = {
        epoch: tuple(found[name].get(epoch, math.nan) for name in known) for epoch in log.miou
    }
    steps: dict[int, dict[str, float]] = {}
    for name in LOSS_NAMES:
        if f"train/{name}" in tags:
            for event in accumulator.Scalars(f"train/{name}"):
                steps.setdefault(event.step, {})[name] = event.value
    log.iterations_per_epoch = _iterations_in(folder) or (
        math.ceil((max(steps) + 1) / max(1, len(log.miou))) if steps else None
    )
    length = log.iterations_per_epoch
    log.losses = [(step // length, step % length, steps[step]) for step in sorted(steps)]
    if LR_TAG in tags and length:
        for event in accumulator.Scalars(LR_TAG):
            log.lr.setdefault(event.step // length, event.value)
    return log


def _iterations_in(folder: Path) -> int | None:
    for name in ("config.json", "manifest.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("iterations_per_epoch")
            if value:
                return int(value)
    return None


def read_training_log(path: str | Path) -> TrainingLog:
    """Whatever `path` is: a run's folder, a folder of training_logs/, a metrics.jsonl, an event
    file's folder, a text log.
    """
    path = Path(path)
    if path.is_file():
        return read_metrics_json_lines(path) if path.suffix == ".jsonl" else read_text_log(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or log file")
    if (path / "epochs.csv").is_file():
        return read_training_logs_folder(path)
    if (path / "metrics.jsonl").is_file():
        log = read_metrics_json_lines(path / "metrics.jsonl")
        if (path / "manifest.json").is_file():
            log.config = read_json(path / "manifest.json")["options"]
        return log
    if any(path.glob("events.out.tfevents.*")):
        return read_events(path)
    raise UserError(
        f"{path}: holds no epochs.csv, metrics.jsonl or events.out.tfevents.* file; give the folder"
        " that train_unimatch.py saved to, or a text log"
    )
