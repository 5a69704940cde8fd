"""One form for the record of an adaptation run, whatever it is read from: a UniMatch-style text
log, the folder of a run (metrics.jsonl or event files), or a folder of training_logs/ (CSV).

IoU and mIoU are percent. Epochs and iterations count from 0. Losses are running means since the
start of their epoch, as UniMatch prints them, where they come from a text log.
"""

from __future__ import annotations

import ast
import bisect
import csv
import datetime
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.labels import CITYSCAPES_19, IDS_13_IN_16, SYNTHIA_16
from util.outputs import read_json
from util.run import UserError

# UniMatch's TensorBoard tags. Losses count iterations, evaluations epochs. Ours adds the learning
# rate.
LOSS_NAMES = ("loss_all", "loss_x", "loss_s", "loss_w_fp", "mask_ratio")
TEXT_LOSSES = dict(zip(("Total loss", "Loss x", "Loss s", "Loss w_fp", "Mask ratio"), LOSS_NAMES))
LR_TAG, MIOU_TAG = "train/lr", "eval/mIoU"
# Names of losses in other versions of UniMatch (those of 2022 say `Mask`) and in code built on it;
# lower case, without spaces and underscores.
LOSS_WORDINGS = {
    **{name.lower().replace(" ", "").replace("_", ""): tag for name, tag in TEXT_LOSSES.items()},
    **{"loss": "loss_all", "lossall": "loss_all", "lossu": "loss_s", "lossus": "loss_s"},
    **{"lossfp": "loss_w_fp", "lossuwfp": "loss_w_fp", "mask": "mask_ratio"},
}
# Names in the shipped SYNTHIA log that differ from Cityscapes' official ones.
OFFICIAL_NAMES = {"light": "traffic light", "sign": "traffic sign", "motocycle": "motorcycle"}


def official_name(name: str) -> str:
    """A class name as this kit has it. TensorBoardX writes `traffic_light`."""
    name = name.replace("_", " ")
    return OFFICIAL_NAMES.get(name, name)


def loss_name(wording: str) -> str | None:
    """`Mask ratio`, `Mask`, `Loss w_fp`, … → one of LOSS_NAMES; None for anything else."""
    return LOSS_WORDINGS.get(re.sub(r"[\s_]", "", wording).lower())


@dataclass
class TrainingLog:
    """The record of one run.

    miou: epoch → mIoU; class_iou: epoch → IoU per class, in the order of class_names; lr: epoch →
    learning rate as printed at the epoch's start; losses: rows (epoch, iteration, {loss name:
    value}); times: ("eval" | "epoch", epoch) or (epoch, iteration) → seconds since 1970, the log's
    clock read as UTC. eval_mode: several modes are joined by `, then `. A log may have no IoU per
    class, for all epochs or for some. IoU and mIoU may be NaN, as they were printed.
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
        """Epochs with an evaluation whose mIoU is a number, in order."""
        return sorted(epoch for epoch, miou in self.miou.items() if math.isfinite(miou))

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """(epochs, mIoU) of all evaluations, in order; NaN where it is not a number."""
        return sorted(self.miou), [self.miou[epoch] for epoch in sorted(self.miou)]

    def forget_from(self, epoch: int) -> None:
        """Drop all that is logged of this epoch and of later ones."""
        for name in ("miou", "class_iou", "lr"):
            kept = {e: value for e, value in getattr(self, name).items() if e < epoch}
            setattr(self, name, kept)
        self.losses = [row for row in self.losses if row[0] < epoch]
        self.times = {
            (a, b): time
            for (a, b), time in self.times.items()
            if (b if a in ("epoch", "eval") else a) < epoch
        }


# ------------------------------------------------------------------------------------ what it shows


def summary(log: TrainingLog, last: int = 20) -> dict:
    """Best mIoU and its epoch (the first one), last, mean of the last `last` evaluations; 13-class
    means for 16 classes. A class without an IoU counts 0, as in the shipped logs.
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
    if log.class_names == SYNTHIA_16.names and best in log.class_iou:
        figures["best_13"] = float(
            np.mean(np.nan_to_num([log.class_iou[best][i] for i in IDS_13_IN_16]))
        )
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
    complete = [
        rows
        for epoch, rows in by_epoch.items()
        if (epoch in log.miou or epoch < max(by_epoch)) and len(rows) > 1
    ]
    if not complete:
        raise UserError(
            f"{log.name}: no complete epoch, so its iterations per epoch are unknown; "
            "give them with --iterations-per-epoch"
        )
    rows = complete[0]
    spacing = rows[1] - rows[0]
    return max(8 * spacing, rows[-1] + 1), min(8 * spacing + 7, rows[-1] + spacing)


# ----------------------------------------------------------------------------------------- text log

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_TIME = re.compile(r"^\[?(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[,.](\d{1,6}))?")
_EPOCH = re.compile(r"=+> Epoch:? *(\d+)")
_LR = re.compile(rf"\b(?:LR|learning rate) *[:=] *({_NUMBER})", re.IGNORECASE)
_ROW = re.compile(r"\bIters?: *(\d+)(?:/\d+)?, *(.*)$", re.IGNORECASE)
_LOSS = re.compile(rf"([A-Za-z][\w ]*?) *: *({_NUMBER}|nan|inf)(?=,|\s|$)")
_CLASS = re.compile(rf"\*+ Evaluation .*Class \[(\d+) (.+)\] IoU: ({_NUMBER}|nan)", re.IGNORECASE)
_MEAN = re.compile(
    rf"\*+ Evaluation(?: (\w+))? \*+ >+ m(?:ean)? ?IoU: ({_NUMBER}|nan)", re.IGNORECASE
)


def read_text_log(path: str | Path) -> TrainingLog:
    """A text log of UniMatch, of any version, or of code built on it.

    Other lines are passed over, as is a last line cut short by a run still going. If the run was
    resumed or started anew, an epoch that starts again voids what was logged of it and of all later
    ones. Lines without a clock have the time of the line before.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    lines = _whole_lines(text)
    log = TrainingLog(path.stem, config=_text_config(lines))
    epoch, begun, time, ious, modes = -1, 0, 0.0, {}, {}
    for number, line in enumerate(lines):
        time = _seconds(line) or time
        if match := _EPOCH.search(line):
            before, epoch = epoch, int(match.group(1))
            if epoch <= before:
                log.forget_from(epoch)
                modes = {e: mode for e, mode in modes.items() if e < epoch}
                log.config = _text_config(lines[begun:number]) or log.config
            begun, ious = number, {}
            log.times["epoch", epoch] = time
            if rate := _LR.search(line):
                log.lr[epoch] = float(rate.group(1))
        elif epoch < 0:
            continue
        elif match := _ROW.search(line):
            row = (epoch, int(match.group(1)), _text_losses(match.group(2)))
            if row[2]:
                repeated = bool(log.losses) and log.losses[-1][:2] == row[:2]
                log.losses[len(log.losses) - repeated :] = [row]
                log.times[row[:2]] = time
        elif match := _CLASS.search(line):
            ious[int(match.group(1))] = (official_name(match.group(2)), float(match.group(3)))
        elif match := _MEAN.search(line):
            log.miou[epoch], log.times["eval", epoch] = float(match.group(2)), time
            if ious:
                log.class_names, log.class_iou[epoch] = zip(*(ious[i] for i in sorted(ious)))
            ious = {}
            if match.group(1):
                modes[epoch] = match.group(1)
    if epoch < 0:
        raise UserError(
            f"{path}: no line `===========> Epoch: …`; this is not a UniMatch-style text log"
        )
    log.eval_mode = ", then ".join(dict.fromkeys(modes.values())) or None
    return log


def _whole_lines(text: str) -> list[str]:
    """The lines of a log. A last one without a line end counts only if it is as long as its kind:
    an earlier line is like it in all but digits, with as many decimals.
    """
    lines = text.splitlines()
    if lines and not text.endswith("\n"):

        def kind(line: str) -> str:
            return re.sub(r"\d", "0", re.sub(r"(?<![.\d])\d+", "0", line))

        if kind(lines[-1]) not in {kind(line) for line in lines[:-1]}:
            lines.pop()
    return lines


def _seconds(line: str) -> float | None:
    """Seconds since 1970 by the clock that the line starts with, if it does."""
    match = _TIME.match(line)
    if not match:
        return None
    moment = datetime.datetime.fromisoformat(f"{match.group(1)} {match.group(2)}+00:00")
    return moment.timestamp() + float(f"0.{match.group(3) or 0}")


def _text_losses(text: str) -> dict[str, float]:
    """`Total loss: 0.893, Loss x: …` → {loss name: value}, of the losses with a name we know."""
    found = ((loss_name(name), value) for name, value in _LOSS.findall(text))
    return {name: float(value) for name, value in found if name}


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
    try:
        return _training_logs_folder(folder)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: epochs.csv, losses.csv or config.json is not as import_log.py writes it"
            f" ({type(error).__name__}: {error}); import the text log again"
        ) from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _training_logs_folder(folder: Path) -> TrainingLog:
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
            if row["lr"]:
                log.lr[epoch] = float(row["lr"])
            if row["mIoU"]:
                log.miou[epoch] = float(row["mIoU"])
            values = [row[name] for name in log.class_names]
            if values and all(values):
                log.class_iou[epoch] = tuple(float(value) for value in values)
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
                official_name(tag.removeprefix("eval/").removesuffix("_IoU")): value
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


def _meaning(tag: str) -> tuple[str, str] | None:
    """What a TensorBoard tag holds: ("loss", loss name), ("lr" | "mIoU", ""), ("class", name)."""
    kind, _, rest = tag.strip("/").partition("/")
    if kind == "train":
        return (
            ("lr", "") if rest == "lr" else ("loss", loss_name(rest)) if loss_name(rest) else None
        )
    if kind == "eval" and rest.lower() in ("miou", "meaniou"):
        return "mIoU", ""
    if kind == "eval" and rest.lower().endswith("_iou"):
        return "class", official_name(rest[: -len("_iou")])
    return None


def read_events(path: Path) -> TrainingLog:
    """A TensorBoard event file, or those in a folder, of any version of UniMatch (through
    torch.utils.tensorboard or tensorboardX), of train_unimatch.py or of training_logs/.

    Where a step goes back, the run was resumed or started anew: it voids all later steps written
    before, of losses and of evaluations.
    """
    written = _written(path)
    found = {key: _standing(events) for key, events in written.items()}
    losses = [("loss", name) for name in LOSS_NAMES]
    clock, standing = (
        sorted((time, step) for key in losses for time, step, _ in events.get(key, []))
        for events in (written, found)
    )
    evaluations = _trained(found.get(("mIoU", ""), []), clock, standing)
    log = TrainingLog(path.name, miou={epoch: value for _, epoch, value in evaluations})
    per_class = {
        key[1]: {e: value for _, e, value in _trained(events, clock, standing)}
        for key, events in found.items()
        if key and key[0] == "class"
    }
    log.class_names = next(
        (s.names for s in (CITYSCAPES_19, SYNTHIA_16) if set(s.names) == set(per_class)),
        tuple(sorted(per_class)),
    )
    if per_class:
        log.class_iou = {
            epoch: tuple(per_class[name].get(epoch, math.nan) for name in log.class_names)
            for epoch in log.miou
        }
    steps: dict[int, dict[str, float]] = {}
    for key in losses:
        for _, step, value in found.get(key, []):
            steps.setdefault(step, {})[key[1]] = value
    length = _iterations_in(path) or _iterations_by_clock(clock, written.get(("mIoU", ""), []))
    log.iterations_per_epoch = length
    log.losses = [(step // length, step % length, steps[step]) for step in sorted(steps)]
    for _, step, value in found.get(("lr", ""), []) if length else []:
        log.lr.setdefault(step // length, value)
    return log


def _written(path: Path) -> dict:
    """{what a tag holds: its (wall time, step, value) in the order of time}, void ones included."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False
    )
    accumulator.Reload()
    return {
        _meaning(tag): sorted((e.wall_time, e.step, e.value) for e in accumulator.Scalars(tag))
        for tag in accumulator.Tags()["scalars"]
    }


def _standing(events: list) -> list:
    """The events of a tag without those that a later one of the same or a lower step voids."""
    kept, lowest = [], math.inf
    for event in reversed(events):
        if event[1] < lowest:
            kept.append(event)
            lowest = event[1]
    return kept[::-1]


def _trained(evaluations: list, clock: list[tuple], standing: list[tuple]) -> list:
    """Standing evaluations without the last ones whose training is void: the loss before them does
    not stand, and the run has not evaluated since.

    clock, standing: (wall time, step) of all losses and of those that stand, in order.
    """
    kept, stands = list(evaluations), set(standing)
    while kept:
        before = bisect.bisect_left(clock, kept[-1][:1])
        if before == 0 or clock[before - 1] in stands:
            break
        kept.pop()
    return kept


def _iterations_by_clock(clock: list[tuple], evaluations: list) -> int | None:
    """Iterations per epoch: those that were done when the last evaluated epoch was, an equal share
    for each epoch. clock: (wall time, step) of all losses, in order.
    """
    if not clock:
        return None
    until, epoch, _ = evaluations[-1] if evaluations else (math.inf, 0, None)
    done = [step for time, step in clock if time <= until]
    return math.ceil(((done or [clock[-1][1]])[-1] + 1) / (epoch + 1))


def _iterations_in(path: Path) -> int | None:
    """Iterations per epoch as the records beside the event files tell it."""
    folder = path if path.is_dir() else path.parent
    for name in ("config.json", "manifest.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("iterations_per_epoch")
            if value:
                return int(value)
    return None


def read_training_log(path: str | Path) -> TrainingLog:
    """Whatever `path` is: a run's folder, a folder of training_logs/, a metrics.jsonl, an event
    file or its folder, a text log.
    """
    path = Path(path)
    if path.is_file():
        if path.name.startswith("events.out.tfevents."):
            return read_events(path)
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
