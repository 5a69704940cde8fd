"""One form for the record of an adaptation run, whatever it is read from: a UniMatch-style text
log, TensorBoard's event files, the folder of a run, or a folder of training_logs/ (CSV).

IoU and mIoU are percent. Epochs and iterations count from 0. Losses are running means since the
start of their epoch, as UniMatch prints them, where they come from a text log.
"""

from __future__ import annotations

import ast
import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from util.outputs import read_json, read_text
from util.run import UserError

# UniMatch's TensorBoard tags. Losses count iterations, evaluations epochs.
LOSS_NAMES = ("loss_all", "loss_x", "loss_s", "loss_w_fp", "mask_ratio")
MIOU_TAG = "eval/mIoU"
# Names of losses in text logs and tags: of UniMatch 2023 and of 2022 (`Mask`), and in code built on
# it; lower case, without spaces and underscores.
LOSS_WORDINGS = {
    **dict.fromkeys(("totalloss", "loss", "lossall"), "loss_all"),
    "lossx": "loss_x",
    **dict.fromkeys(("losss", "lossu", "lossus"), "loss_s"),
    **dict.fromkeys(("losswfp", "lossfp", "lossuwfp"), "loss_w_fp"),
    **dict.fromkeys(("maskratio", "mask"), "mask_ratio"),
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

    miou: epoch → mIoU; class_iou: epoch → {class: IoU}, in the order of the log; losses: rows
    (epoch, iteration, {loss name: value}). eval_mode: several modes are joined by `, then `. A log
    may have no IoU per class, for all epochs or for some. IoU and mIoU may be NaN, as they were
    printed.
    """

    config: dict = field(default_factory=dict)
    eval_mode: str | None = None
    miou: dict[int, float] = field(default_factory=dict)
    class_iou: dict[int, dict[str, float]] = field(default_factory=dict)
    losses: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Of the last evaluation that has them."""
        return list(self.class_iou[max(self.class_iou)]) if self.class_iou else []

    @property
    def epochs(self) -> list[int]:
        """Epochs with an evaluation whose mIoU is a number, in order."""
        return sorted(epoch for epoch, miou in self.miou.items() if math.isfinite(miou))

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """(epochs, mIoU) of all evaluations, in order; NaN where it is not a number."""
        return sorted(self.miou), [self.miou[epoch] for epoch in sorted(self.miou)]


# ----------------------------------------------------------------------------------------- text log

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_CONFIG = re.compile(r"(?m)^\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[^{\n]*(\{.*(?:\n.*\S.*)*)")
_EPOCH = re.compile(r"=> Epoch:? *(\d+)")
_ROW = re.compile(r"\bIters?: *(\d+)(?:/\d+)?, *(.*)$", re.IGNORECASE)
_LOSS = re.compile(rf"([A-Za-z][\w ]*?) *: *({_NUMBER}|nan|inf)(?=,|\s|$)")
_CLASS = re.compile(rf"\*+ Evaluation .*Class \[\d+ (.+)\] IoU: ({_NUMBER}|nan)", re.IGNORECASE)
_MEAN = re.compile(
    rf"\*+ Evaluation(?: (\w+))? \*+ >+ m(?:ean)? ?IoU: ({_NUMBER}|nan)", re.IGNORECASE
)


def read_text_log(path: str | Path) -> TrainingLog:
    """A text log of UniMatch, of any version, or of code built on it.

    Other lines are passed over, as is a last line without its end: the run is still writing it. If
    the run was resumed or started anew, an epoch that starts again voids what was logged of it and
    of all later ones.
    """
    text, epochs = read_text(path, "log", errors="replace").rpartition("\n")[0], {}
    _, *parts = _EPOCH.split(text)
    for number, chunk in zip(map(int, parts[::2]), parts[1::2]):
        epochs = {epoch: earlier for epoch, earlier in epochs.items() if epoch < number}
        epochs[number] = chunk
    if not epochs:
        raise UserError(
            f"{path}: no line `===========> Epoch: …`; this is not a UniMatch-style text log"
        )
    log, modes = TrainingLog(_last_config(text)), []
    for epoch, chunk in epochs.items():
        rows, ious = {}, {}
        for line in chunk.splitlines():
            if match := _ROW.search(line):
                named = ((loss_name(name), value) for name, value in _LOSS.findall(match[2]))
                if losses := {name: float(value) for name, value in named if name}:
                    rows[int(match[1])] = losses
            elif match := _CLASS.search(line):
                ious[official_name(match[1])] = float(match[2])
            elif match := _MEAN.search(line):
                log.miou[epoch] = float(match[2])
                modes += [match[1]] if match[1] else []
                if ious:
                    log.class_iou[epoch], ious = ious, {}
        log.losses += [(epoch, iteration, losses) for iteration, losses in rows.items()]
    log.eval_mode = ", then ".join(dict.fromkeys(modes)) or None
    return log


def _last_config(text: str) -> dict:
    """The pretty-printed dict, up to an empty line, that UniMatch logs at each start; of the last
    start, {} without one.
    """
    found = _CONFIG.findall(text)
    try:
        return ast.literal_eval(found[-1]) if found else {}
    except (ValueError, SyntaxError):
        return {}


# -------------------------------------------------------------------------------------- CSV, events


def read_training_logs_folder(folder: Path) -> TrainingLog:
    """A folder of training_logs/: epochs.csv, losses.csv, config.json."""
    config = read_json(folder / "config.json")
    log = TrainingLog(config["options"], config["eval_mode"])
    with open(folder / "epochs.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mIoU"]:  # else not evaluated
                epoch = int(row["epoch"])
                log.miou[epoch] = float(row["mIoU"])
                log.class_iou[epoch] = {n: float(row[n]) for n in config["class_names"]}
    with open(folder / "losses.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            losses = {name: float(row[name]) for name in LOSS_NAMES}
            log.losses.append((int(row["epoch"]), int(row["iteration"]), losses))
    return log


def read_events(path: Path) -> TrainingLog:
    """A TensorBoard event file, or those in a folder, of any version of UniMatch (through
    torch.utils.tensorboard or tensorboardX), of train_unimatch.py or of training_logs/.

    Where a step goes back, the run was resumed or started anew: it voids what was written before of
    this and of later steps, and the evaluations that came after these.
    """
    steps: dict[int, dict[str, float]] = {}  # of losses
    evaluations: dict[int, dict[str, float]] = {}  # epoch: IoU by class, and MIOU_TAG
    ends, step, length = {}, -1, None  # ends: the step before an evaluation
    for _, evaluation, number, name, value in _events_by_clock(path):
        if evaluation:
            evaluations.setdefault(number, {})[name] = value
            ends[number], length = step, math.ceil((step + 1) / (number + 1))
            continue
        if number < step:
            steps = {earlier: losses for earlier, losses in steps.items() if earlier < number}
            evaluations = {e: ious for e, ious in evaluations.items() if ends[e] < number}
        step = number
        steps.setdefault(step, {})[name] = value
    folder = path if path.is_dir() else path.parent
    for record in (folder / "config.json", folder / "manifest.json"):
        if record.is_file():
            length = read_json(record).get("iterations_per_epoch") or length
    length, log = length or step + 1, TrainingLog()
    for epoch, ious in sorted(evaluations.items()):
        if MIOU_TAG in ious:
            log.miou[epoch] = ious.pop(MIOU_TAG)
            if ious:
                log.class_iou[epoch] = ious
    log.losses = [(n // length, n % length, losses) for n, losses in sorted(steps.items())]
    return log


def _events_by_clock(path: Path) -> list[tuple[float, bool, int, str, float]]:
    """(wall time, whether of an evaluation, step or epoch, name of a loss, MIOU_TAG or name
    of a class, value) of all scalars with a tag that we know, void ones included.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = {"scalars": 0}
    accumulator = EventAccumulator(str(path), size_guidance=every, purge_orphaned_data=False)
    accumulator.Reload()
    found = []
    for tag in accumulator.Tags()["scalars"]:
        kind, _, rest = tag.strip("/").partition("/")
        name = None
        if kind == "train":
            name = loss_name(rest)
        elif kind == "eval" and rest.lower() in ("miou", "meaniou"):
            name = MIOU_TAG
        elif kind == "eval" and rest.lower().endswith("_iou"):
            name = official_name(rest[: -len("_iou")])
        if name:
            events = accumulator.Scalars(tag)
            found += [(e.wall_time, kind == "eval", e.step, name, e.value) for e in events]
    return sorted(found, key=lambda event: event[:3])


# --------------------------------------------------------------------------------- whatever it is


def read_training_log(path: str | Path) -> TrainingLog:
    """Whatever `path` is: a run's folder, a folder of training_logs/, an event file or a folder
    with some, a text log.

    Of a run of train_unimatch.py train.log is read, which has the evaluation mode and means of the
    losses, as the shipped logs.
    """
    path = Path(path)
    if path.is_file():
        return read_events(path) if "tfevents" in path.name else read_text_log(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or log file")
    if (path / "epochs.csv").is_file():
        return read_training_logs_folder(path)
    if (path / "train.log").is_file():
        log = read_text_log(path / "train.log")
        if (path / "manifest.json").is_file():
            log.config = read_json(path / "manifest.json")["options"]
        return log
    if any(path.glob("events.out.tfevents.*")):
        return read_events(path)
    raise UserError(
        f"{path}: holds no epochs.csv, train.log or events.out.tfevents.* file; give the folder"
        " that train_unimatch.py saved to, or a text log"
    )
