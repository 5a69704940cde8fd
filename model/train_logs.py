"""What a training run says and leaves: train.log in the shipped logs' format, TensorBoard events,
pictures, summary.json. run: a train_unimatch.Trainer."""

from __future__ import annotations

import logging
import math
import os
import pprint
import re
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dataset.samples import batches, loading_processes
from model.deeplabv3plus import DILATIONS
from util.charts import line_chart, save_chart
from util.labels import IGNORE
from util.outputs import write_json
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import manifest, peak_memory_mb, process_rank

# Losses as UniMatch's text log names them, by their TensorBoard tags below train/.
TEXT_LOSSES = {
    "loss_all": "Total loss",
    "loss_x": "Loss x",
    "loss_s": "Loss s",
    "loss_w_fp": "Loss w_fp",
    "mask_ratio": "Mask ratio",
}

# --dry-run estimates larger crops from these two: sides of a multiple of 16 and 1, as the network
# takes them; large enough that activations, not weights, settle the memory, and on a GPU the
# arithmetic, not its launches, the seconds.
SMALL_CROPS = {"cpu": (97, 161), "cuda": (257, 385)}
MEMORY_MARGIN = 1.1  # times the estimate, which may be a few per cent low, has to be there


class Logs:
    """train.log and TensorBoard events of process 0.

    `sizes` goes into checkpoints. Resuming cuts the files back to the sizes at the checkpoint and
    removes event files begun after it, so that nothing is there twice.
    """

    TEXT, EVENTS = "train.log", "events.out.tfevents.*"

    def __init__(self, run, sizes: dict[str, int] | None):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, sizes, iteration = run.args.save_path, sizes or {}, run.state.iteration
        for path in self.files():
            if path.name in sizes:
                os.truncate(path, min(sizes[path.name], path.stat().st_size))
            else:
                path.unlink()
        self.handler = logging.FileHandler(self.folder / self.TEXT, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("[%(asctime)s][%(levelname)8s] %(message)s"))
        self.text = logging.Logger("train_unimatch")
        self.text.addHandler(self.handler)
        self.events = SummaryWriter(str(self.folder), purge_step=iteration)
        if iteration:
            print(f"resuming at iteration {iteration} of {run.total}")
        else:
            self.header(run)

    def files(self) -> list[Path]:
        return [*self.folder.glob(self.TEXT), *self.folder.glob(self.EVENTS)]

    def sizes(self) -> dict[str, int]:
        self.events.flush()  # what comes before a checkpoint must outlive a kill after it
        return {path.name: path.stat().st_size for path in self.files()}

    def header(self, run) -> None:
        """The configuration under UniMatch's names, and the number of parameters."""
        args, ohem = run.args, {"ignore_index": IGNORE}
        ohem |= {"min_kept": args.min_kept, "thresh": args.ohem_threshold}
        same = "backbone conf_thresh crop_size epochs global_batch lr lr_multi seed stem".split()
        configuration = {
            **{name: getattr(args, name) for name in same},
            "batch_size": args.batch_per_process,
            "criterion": {"kwargs": ohem, "name": "OHEM"},
            "data_root": str(args.root_path),
            "dilations": list(DILATIONS),
            "labeled_id_path": str(args.labeled_id_path),
            "nclass": args.class_num,
            "ngpus": process_rank()[1],
            "replace_stride_with_dilation": [False, False, True],
            "save_path": str(args.save_path),
            "unlabeled_id_path": args.unlabeled_id_path and str(args.unlabeled_id_path),
        }
        self.text.info(f"{pprint.pformat(configuration)}\n")
        parameters = sum(values.numel() for values in run.model.parameters())
        self.text.info(f"Total params: {parameters / 1e6:.1f}M\n")

    def iteration(self, run, values: dict[str, float]) -> None:
        """Losses and learning rate of an iteration; at the start of an epoch its head, and eight or
        nine times in it, as UniMatch, the means of its losses so far.
        """
        state, length, lr = run.state, run.samples.per_epoch, run.optimizer.param_groups[0]["lr"]
        epoch, within = divmod(state.iteration, length)
        if within == 0:
            start = f"Epoch: {epoch}, LR: {lr:.5f}, Previous best: {state.best:.2f}"
            self.text.info(f"===========> {start}")
        for name, value in {**values, "lr": lr}.items():
            self.events.add_scalar(f"train/{name}", value, state.iteration)
        if within % max(length // 8, 1) == 0:
            means = [
                f"{title}: {state.sums[name] / (within + 1):.3f}"
                for name, title in TEXT_LOSSES.items()
                if name in state.sums
            ]
            self.text.info(f"Iters: {within}, {', '.join(means)}")

    def evaluation(self, epoch: int, mode: str, metrics: dict) -> None:
        ious = {name: value or 0.0 for name, value in metrics["iou"].items()}
        for number, (name, value) in enumerate(ious.items()):
            self.text.info(f"***** Evaluation ***** >>>> Class [{number} {name}] IoU: {value:.2f}")
        self.text.info(f"***** Evaluation {mode} ***** >>>> MeanIoU: {metrics['miou']:.2f}\n")
        self.events.add_scalar("eval/mIoU", metrics["miou"], epoch)
        for name, value in ious.items():
            self.events.add_scalar(f"eval/{name}_IoU", value, epoch)

    def close(self) -> None:
        self.handler.close()
        self.events.close()


def announce(run) -> None:
    """What a run is, and what differs from the authors'."""
    args, world, steps = run.args, process_rank()[1], len(run.places)
    batch = args.batch_per_process
    groups = args.global_batch // run.group
    together = batch * (world if run.device.type == "cuda" else 1)
    print(
        f"global batch {args.global_batch} = {world} process{'es' if world > 1 else ''} x {batch}"
        f" samples x {steps} accumulation step{'s' if steps > 1 else ''}; losses are normalised in"
        f" {groups} groups"
    )
    if groups > args.loss_groups:
        print(f"warning: {groups} groups, not {args.loss_groups}: results will differ a little")
    if together < args.global_batch:
        seen = f"batch norm sees {together} samples at a time, not {args.global_batch}"
        print(f"warning: {seen}: results will differ from the authors'")


def epoch_picture(path: Path, shown: dict, classes) -> None:
    """Views, labels and predictions of an iteration's first three samples, one a row."""
    batch = shown["batch"]
    columns = {
        "img_x": batch["x"],
        "label": batch["mask_x"],
        "prediction": shown["pred_x"].argmax(dim=1),
    }
    if "w" in batch:
        columns |= {
            "img_u_w": batch["w"],
            "pseudo-label": shown["pred_w"].argmax(dim=1),
            "img_u_s1": batch["s1"],
            "its labels": shown["label_s1"],
        }

    def panel(values: torch.Tensor) -> np.ndarray:
        values = values.to(torch.uint8).cpu().numpy()
        return values if values.ndim == 3 else colour_label(values, classes.palette)

    rows = [[panel(values) for values in sample] for sample in islice(zip(*columns.values()), 3)]
    save_picture(path, contact_sheet(rows, [*columns], legend=classes, cell_width=192))


def curves_picture(path: Path, miou: dict[int, float], losses: dict[int, float]) -> None:
    """mIoU after each epoch, or the mean loss of each where nothing was evaluated."""
    shown, label = (miou, "mIoU (%)") if miou else (losses, "mean loss of the epoch")
    points = {"validation" if miou else "loss_all": (list(shown), list(shown.values()))}
    save_chart(path, line_chart(points, "", "epoch", label))


def best_and_last(miou: dict[int, float], last: int = 20) -> dict:
    """Best mIoU and its epoch, last, mean of the last `last` evaluations. miou: by epoch."""
    best, values = max(miou, key=miou.get), list(miou.values())
    return {
        "best": miou[best],
        "best_epoch": best,
        "last": values[-1],
        "last_epoch": list(miou)[-1],
        "last_mean": float(np.mean(values[-last:])),
        "evaluations": len(miou),
    }


def write_manifest(run) -> None:
    """manifest.json of a run, with what it has cost so far."""
    args = run.args
    record = manifest(vars(args), run.device, run.state.seconds)
    record["iterations_per_epoch"] = run.samples.per_epoch
    write_json(args.save_path / "manifest.json", record)


def summarise(run, seconds: list[float]) -> None:
    """summary.json and curves.png; the headline is the last epoch. seconds: of iterations."""
    args, state, iterations = run.args, run.state, run.total
    miou = {epoch: metrics["miou"] for epoch, metrics in state.evaluations.items()}
    curves_picture(args.save_path / "curves.png", miou, state.losses)
    m = None
    if miou:
        m = best_and_last(miou)
        if args.class_num == 16:
            m["best_13"] = state.evaluations[m["best_epoch"]]["miou_13"]
        m["eval_mode"] = args.eval_mode
    shares = state.sums.get("mask_ratio")  # of an epoch's iterations
    record = {
        "epochs": args.epochs,
        "iterations": iterations,
        "mIoU": m,
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "peak_memory": peak_memory_mb(run.device),
        "above_conf_thresh": None if shares is None else 100 * shares / run.samples.per_epoch,
    }
    write_json(args.save_path / "summary.json", record)
    if shares is not None:
        print(
            f"in the last epoch {record['above_conf_thresh']:.1f} % of the unlabeled pixels had a"
            f" confidence of --conf-thresh {args.conf_thresh:g} or more"
        )
    if m:
        print(
            f"mIoU ({args.eval_mode}): last {m['last']:.2f}, mean of the last"
            f" {min(20, m['evaluations'])} evaluations {m['last_mean']:.2f}, best {m['best']:.2f}"
            f" (epoch {m['best_epoch']})"
        )
    else:
        print("no --val-id-path: no mIoU was measured, and no best.pth is kept")
    print(f"{args.save_path / 'latest.pth'}: trained for {iterations} iterations")


def memory_here(device) -> float:
    """MB (10^6 bytes) that a run may take: all of the GPU's, what is available of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e6
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    return 1024 * int(re.search(r"^MemAvailable: *(\d+) kB", text, re.M)[1]) / 1e6


def measure(run) -> dict:
    """Two iterations (the second is timed) and an evaluation image: the losses, the peak memory,
    seconds of loading and computing an iteration and of the image.
    """
    times = [time.perf_counter()]
    micro_batches = list(batches(run.samples, range(1), 0, run.device))
    times.append(time.perf_counter())
    for iteration in range(2):
        losses, _ = run.iteration(iteration, iter(micro_batches))
        times.append(time.perf_counter())
    if run.lists.validation:
        run.evaluate(run.lists.validation[:1])
    times.append(time.perf_counter())
    loading, _, computing, image = np.diff(times)
    seconds = {"loading": loading, "computing": computing, "image": image}
    return {"losses": losses, "memory": peak_memory_mb(run.device), **seconds}


def room_for(run, measured: Callable[[int], dict]) -> bool:
    """Whether a dry run at --crop-size has room, as two small crops suggest; prints the estimate.
    Memory and seconds are taken to grow in proportion to a crop's pixels, above a fixed part. A
    crop no larger than these is not estimated.

    measured(crop): what `measure` finds at such a crop.
    """
    args, small_crops, found = run.args, SMALL_CROPS[run.device.type], []
    if args.crop_size <= small_crops[-1]:
        return True
    for crop in small_crops:
        one = measured(crop)
        memory = one["memory"].get("device_mb", one["memory"]["host_mb"])
        what = f"{memory / 1e3:.1f} GB, {one['computing']:.2f} s computing an iteration"
        print(f"measured at --crop-size {crop}: {what}", flush=True)
        found.append((memory, one["computing"]))
    small, large = (crop**2 for crop in small_crops)
    further = (args.crop_size**2 - large) / (large - small)
    memory, computing = (b + max(b - a, 0) * further for a, b in zip(*found))
    there = memory_here(run.device)
    owner = "this GPU" if run.device.type == "cuda" else "this machine"
    print(
        f"estimate for --crop-size {args.crop_size}: {memory / 1e3:.1f} GB, {owner} has"
        f" {there / 1e3:.1f} GB; {computing:.2f} s computing an iteration",
        flush=True,
    )
    if memory * MEMORY_MARGIN <= there:
        return True
    print("not run: use --batch-per-process 1, --amp bf16 or a smaller --crop-size")
    return False


def report(run, found: dict) -> None:
    """What `measure` has found, on the terminal, and the hours of the whole run."""
    args, workers = run.args, loading_processes(run.args.workers)
    computing, loading, image = (found[name] for name in ("computing", "loading", "image"))
    each = max(computing, loading / workers) if workers else computing + loading
    evaluations = math.ceil(args.epochs / args.eval_every)
    images = math.ceil(len(run.lists.validation) / process_rank()[1]) * evaluations
    hours = (run.total * each + images * image) / 3600
    values = ", ".join(f"{name} {value:.3f}" for name, value in found["losses"].items())
    memory = found["memory"].items()
    peaks = ", ".join(f"{n.removesuffix('_mb')} {value:.0f} MB" for n, value in memory)
    print(
        f"losses after two iterations: {values}\n"
        f"an iteration: {computing:.2f} s computing; loading its samples takes {loading:.2f} s in"
        f" one process (--workers {workers})\n"
        f"projected time of {run.total} iterations and {images} images to evaluate"
        f" ({args.eval_mode}, {image:.2f} s each): {hours:.1f} h\n"
        f"peak memory of process 0: {peaks}"
    )
