#!/usr/bin/env python
"""Turn a UniMatch-style text log into TensorBoard event files, CSV and a config.json.
training_logs/ was made with it.

Input    a text log as UniMatch prints it, of any version (also FixMatch's and the supervised
         baseline's of the same code base)
Outputs  in --out: events.out.tfevents.<start>.<name>, with the tags of train_unimatch.py and the
         log's own clock (read as UTC); epochs.csv (learning rate, mIoU, IoU per class); losses.csv
         (every printed row); config.json. The same log gives the same bytes.

    python -m scripts.dev.import_log tests/data/logs/seco_gta.log --out runs/imported
    python -m scripts.dev.import_log tests/data/logs/seco_gta.log --out runs/imported \\
        --iterations-per-epoch 236

A text log does not say how many iterations an epoch has, and the step axis of the losses needs it.
Where its rows leave several possible, the middle one is taken unless --iterations-per-epoch says
otherwise; config.json tells the range.

Copied away, this file needs util/.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

from util.options import check_range
from util.run import UserError, atomic_path, check_writable, run_main, sha256, write_json
from util.training_log import (
    LOSS_NAMES,
    LR_TAG,
    MIOU_TAG,
    TrainingLog,
    iterations_range,
    read_text_log,
    summary,
)


def scalars(log: TrainingLog) -> list[tuple[float, int, str, float]]:
    """All (wall time, step, tag, value), in the order of the log's clock. Losses and learning rate
    are at epoch * iterations_per_epoch + iteration, evaluations at their epoch, as
    train_unimatch.py writes them.
    """
    length = log.iterations_per_epoch
    rows = [(log.times["epoch", epoch], epoch * length, LR_TAG, lr) for epoch, lr in log.lr.items()]
    for epoch, iteration, losses in log.losses:
        rows += [
            (log.times[epoch, iteration], epoch * length + iteration, f"train/{name}", value)
            for name, value in losses.items()
        ]
    for epoch, miou in log.miou.items():
        time = log.times["eval", epoch]
        rows.append((time, epoch, MIOU_TAG, miou))
        rows += [
            (time, epoch, f"eval/{name}_IoU", value)
            for name, value in zip(log.class_names, log.class_iou.get(epoch, ()))
        ]
    return sorted(rows, key=lambda row: row[0])


def write_events(path: Path, rows: list[tuple[float, int, str, float]]) -> None:
    """One event file. SummaryWriter would put today's time and this machine's name into it; this
    does not.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        writer = RecordWriter(file)
        writer.write(
            Event(wall_time=rows[0][0], file_version="brain.Event:2").SerializeToString(
                deterministic=True
            )
        )
        for time, step, tag, value in rows:
            event = Event(
                wall_time=time,
                step=step,
                summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]),
            )
            writer.write(event.SerializeToString(deterministic=True))
        writer.flush()


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def clock(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S") + f".{round(seconds * 1000) % 1000:03d}"


def epoch_row(log: TrainingLog, epoch: int) -> list:
    """A row of epochs.csv: epoch, start, learning rate, time of the evaluation, mIoU, IoU of each
    class.
    """
    row = [epoch, clock(log.times["epoch", epoch])]
    row.append(f"{log.lr[epoch]:.5f}" if epoch in log.lr else "")
    row += (
        [clock(log.times["eval", epoch]), f"{log.miou[epoch]:.2f}"]
        if epoch in log.miou
        else ["", ""]
    )
    ious = [f"{value:.2f}" for value in log.class_iou.get(epoch, ())]
    return row + (ious or [""] * len(log.class_names))


def loss_row(log: TrainingLog, epoch: int, iteration: int, losses: dict[str, float]) -> list:
    """A row of losses.csv: epoch, iteration, step, time, losses."""
    step = epoch * log.iterations_per_epoch + iteration
    values = [f"{losses[name]:.3f}" if name in losses else "" for name in LOSS_NAMES]
    return [epoch, iteration, step, clock(log.times[epoch, iteration]), *values]


def choose_iterations(log: TrainingLog, source: Path, wanted: int | None) -> tuple[int, int, int]:
    """(iterations per epoch, least, most possible): `wanted`, or the middle of what is possible."""
    try:
        low, high = iterations_range(log)
    except UserError:
        if wanted is None:
            raise
        low = high = wanted
    chosen = wanted if wanted is not None else (low + high) // 2
    if not low <= chosen <= high:
        raise UserError(
            f"--iterations-per-epoch {chosen}: the rows of {source} allow {low} to {high}"
        )
    return chosen, low, high


def import_log(log: TrainingLog, out: Path, source: Path, iterations: int | None) -> dict:
    """Write the four files; returns what config.json holds."""
    chosen, low, high = choose_iterations(log, source, iterations)
    log.iterations_per_epoch = chosen
    start, end = min(log.times.values()), max(log.times.values())
    started = [epoch for kind, epoch in log.times if kind == "epoch"]
    events = out / f"events.out.tfevents.{int(start)}.{out.name}"
    for other in out.glob("events.out.tfevents.*"):
        if other != events:
            raise UserError(f"{other}: is of another run; choose another folder with --out")
    write_events(events, scalars(log))
    write_csv(
        out / "epochs.csv",
        ["epoch", "started", "lr", "evaluated", "mIoU", *log.class_names],
        [epoch_row(log, epoch) for epoch in started],
    )
    write_csv(
        out / "losses.csv",
        ["epoch", "iteration", "step", "time", *LOSS_NAMES],
        [loss_row(log, *row) for row in log.losses],
    )
    config = {
        "source": source.name,
        "source_sha256": sha256(source),
        "first_row": clock(start),
        "last_row": clock(end),
        "eval_mode": log.eval_mode,
        "class_names": list(log.class_names),
        "iterations_per_epoch": chosen,
        "iterations_per_epoch_possible": [low, high],
        "evaluations": len(log.miou),
        "loss_rows": len(log.losses),
        "options": log.config,
    }
    write_json(out / "config.json", config)
    return config


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="the text log")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--iterations-per-epoch",
        type=int,
        metavar="L",
        help="iterations per epoch and process (default: the middle of what the rows allow)",
    )
    options = parser.parse_args(argv)
    check_range(options, "iterations_per_epoch", least=1)
    return options


def main(argv=None) -> None:
    options = parse_args(argv)
    log = read_text_log(options.log)
    check_writable(options.out)
    config = import_log(log, options.out, options.log, options.iterations_per_epoch)
    figures = summary(log) if log.miou else None
    low, high = config["iterations_per_epoch_possible"]
    print(
        f"{options.out}: {config['loss_rows']} loss rows, {config['evaluations']} evaluations"
        f" ({log.eval_mode or 'mode not told'}), {config['iterations_per_epoch']} iterations per"
        f" epoch (possible: {low} to {high})"
    )
    if figures:
        print(
            f"best {figures['best']:.2f} @ {figures['best_epoch']}, last {figures['last']:.2f} "
            f"@ {figures['last_epoch']}, mean of the last 20 {figures['last_mean']:.2f}"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
