"""Turn a UniMatch-style text log, of any version, into the form of training_logs/.

    python -m scripts.dev.import_log tests/data/logs/seco_gta.log --out runs/imported

Writes epochs.csv, losses.csv, config.json and an event file with train_unimatch.py's tags and the
log's clock (as UTC), always the same bytes. A log does not tell how many iterations an epoch has:
--iterations-per-epoch, or the middle of what its rows allow. Copied away, this file needs util/.
"""

import argparse
import csv
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from util.outputs import atomic_path, write_json
from util.run import UserError, run_main, sha256
from util.training_log import LOSS_NAMES, LR_TAG, MIOU_TAG, TrainingLog, read_text_log


def iterations_range(log: TrainingLog) -> tuple[int, int]:
    """Least and most iterations per epoch that the printed rows allow.

    UniMatch prints iteration i if i % (L // 8) == 0. Rows s apart therefore mean 8 s <= L < 8 s +
    8; the last row of a complete epoch is below L, and the row after it, if L reached that far,
    would have been printed.
    """
    rows: dict[int, list[int]] = {}
    for epoch, iteration, _ in log.losses:
        rows.setdefault(epoch, []).append(iteration)
    for epoch, iterations in rows.items():
        if (epoch in log.miou or epoch < max(rows)) and len(iterations) > 1:  # complete
            spacing, last = iterations[1] - iterations[0], iterations[-1]
            return max(8 * spacing, last + 1), min(8 * spacing + 7, last + spacing)
    raise UserError(f"{log.name}: no complete epoch, so its iterations per epoch are unknown")


def write_events(path: Path, rows: list[tuple[float, int, str, float]]) -> None:
    """An event file of (wall time, step, tag, value). SummaryWriter would add today's time."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        events = [Event(wall_time=rows[0][0], file_version="brain.Event:2")]
        for time, step, tag, value in rows:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            events.append(Event(wall_time=time, step=step, summary=summary))
        for event in events:
            RecordWriter(file).write(event.SerializeToString(deterministic=True))


def clock(seconds: float) -> str:
    moment = datetime.fromtimestamp(round(seconds, 3), timezone.utc)
    return moment.replace(tzinfo=None).isoformat(" ", "milliseconds")


def tables(log, length: int) -> tuple[list[list], list[list], list[tuple]]:
    """The rows of epochs.csv, of losses.csv and of the events, these by the log's clock. Losses and
    learning rate are at step epoch * length + iteration, evaluations at their epoch.
    """
    epochs = [["epoch", "started", "lr", "evaluated", "mIoU", *log.class_names]]
    losses = [["epoch", "iteration", "step", "time", *LOSS_NAMES]]
    begun = {epoch: time for (epoch, what), time in log.times.items() if what == "begin"}
    events = [(begun[epoch], epoch * length, LR_TAG, rate) for epoch, rate in log.lr.items()]
    for epoch, iteration, values in log.losses:
        step, time = epoch * length + iteration, log.times[epoch, iteration]
        cells = [f"{values[name]:.3f}" if name in values else "" for name in LOSS_NAMES]
        losses.append([epoch, iteration, step, clock(time), *cells])
        events += [(time, step, f"train/{name}", value) for name, value in values.items()]
    tags = [MIOU_TAG, *(f"eval/{name}_IoU" for name in log.class_names)]
    for epoch, time in begun.items():
        row = [epoch, clock(time), f"{log.lr[epoch]:.5f}" if epoch in log.lr else ""]
        if epoch in log.miou:
            values = (log.miou[epoch], *log.class_iou.get(epoch, ()))
            time = log.times[epoch, "eval"]
            events += [(time, epoch, tag, value) for tag, value in zip(tags, values)]
            row += [clock(time), *(f"{value:.2f}" for value in values)]
        epochs.append(row + [""] * (len(epochs[0]) - len(row)))
    return epochs, losses, sorted(events, key=lambda row: row[0])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("log", type=Path, help="the text log")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--iterations-per-epoch", type=int, help="(default: from the rows)")
    options = parser.parse_args(argv)
    log, out = read_text_log(options.log), options.out
    low, high = iterations_range(log)
    length = options.iterations_per_epoch
    length = (low + high) // 2 if length is None else length
    if not low <= length <= high:
        raise UserError(f"--iterations-per-epoch {length}: {options.log} allows {low} to {high}")
    start = min(log.times.values())
    path = out / f"events.out.tfevents.{int(start)}.{out.name}"
    if others := set(out.glob("events.out.tfevents.*")) - {path}:
        raise UserError(f"{min(others)}: is of another run; choose another folder with --out")
    epochs, losses, events = tables(log, length)
    write_events(path, events)
    for name, rows in (("epochs.csv", epochs), ("losses.csv", losses)):
        with atomic_path(out / name) as temporary, open(temporary, "w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    about = {
        "source": options.log.name,
        "source_sha256": sha256(options.log),
        "first_row": clock(start),
        "last_row": clock(max(log.times.values())),
        "eval_mode": log.eval_mode,
        "class_names": list(log.class_names),
        "iterations_per_epoch": length,
        "iterations_per_epoch_possible": [low, high],
        "evaluations": len(log.miou),
        "loss_rows": len(log.losses),
        "options": log.config,
    }
    write_json(out / "config.json", about)
    print(f"{out}: {len(losses) - 1} loss rows, {len(log.miou)} evaluations")


if __name__ == "__main__":
    sys.exit(run_main(main))
