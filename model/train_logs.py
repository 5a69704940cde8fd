"""What a training run says, and leaves beside its network: train.log in the shipped logs' format,
TensorBoard events, pictures, summary.json."""

from __future__ import annotations

import logging
import math
import os
import pprint
import re
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.samples import loading_processes
from model.deeplabv3plus import DILATIONS, parameter_count
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
# takes them; large enough that activations, not weights, settle the memory.
SMALL_CROPS = (97, 161)
MEMORY_MARGIN = 1.1  # times the estimate, which may be a few per cent low, has to be there


class Logs:
    """train.log and TensorBoard events of process 0.

    `sizes` goes into checkpoints. Resuming cuts the files back to the sizes at the checkpoint and
    removes event files begun after it, so that nothing is there twice.
    """

    TEXT, EVENTS = "train.log", "events.out.tfevents.*"

    def __init__(self, folder: Path, sizes: dict[str, int] | None, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        (folder / self.TEXT).touch()
        cut_back(folder / self.TEXT, sizes[self.TEXT] if sizes else 0)
        for path in folder.glob(self.EVENTS) if sizes else ():
            if path.name in sizes:
                cut_back(path, sizes[path.name])
            else:
                path.unlink()
        self.handler = logging.FileHandler(folder / self.TEXT, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("[%(asctime)s][%(levelname)8s] %(message)s"))
        self.text = logging.getLogger(f"train_unimatch.{folder}")
        self.text.handlers, self.text.propagate = [self.handler], False
        self.text.setLevel(logging.INFO)
        self.events = SummaryWriter(str(folder), purge_step=iteration)

    def sizes(self) -> dict[str, int]:
        self.events.flush()  # what comes before a checkpoint must outlive a kill after it
        files = [self.folder / self.TEXT, *self.folder.glob(self.EVENTS)]
        return {path.name: path.stat().st_size for path in files}

    def epoch(self, epoch: int, lr: float, best: float) -> None:
        self.text.info(f"===========> Epoch: {epoch}, LR: {lr:.5f}, Previous best: {best:.2f}")

    def train(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(f"train/{name}", value, iteration)

    def row(self, within: int, sums: dict[str, float]) -> None:
        """The means since the start of the epoch, of their sums after iteration `within`."""
        shown = [(title, sums[name]) for name, title in TEXT_LOSSES.items() if name in sums]
        means = [f"{title}: {total / (within + 1):.3f}" for title, total in shown]
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


def cut_back(path: Path, size: int) -> None:
    os.truncate(path, min(size, path.stat().st_size))


def log_header(logs: Logs, args, batch: int, world: int, model: nn.Module) -> None:
    """The first lines of the shipped logs: the configuration under UniMatch's names, and the number
    of parameters.
    """
    configuration = {
        "backbone": args.backbone,
        "batch_size": batch,
        "conf_thresh": args.conf_thresh,
        "crop_size": args.crop_size,
        "criterion": {
            "kwargs": {
                "ignore_index": IGNORE,
                "min_kept": args.min_kept,
                "thresh": args.ohem_threshold,
            },
            "name": "OHEM",
        },
        "data_root": str(args.root_path),
        "dilations": list(DILATIONS),
        "epochs": args.epochs,
        "global_batch": args.global_batch,
        "labeled_id_path": str(args.labeled_id_path),
        "lr": args.lr,
        "lr_multi": args.lr_multi,
        "nclass": args.class_num,
        "ngpus": world,
        "replace_stride_with_dilation": [False, False, True],
        "save_path": str(args.save_path),
        "seed": args.seed,
        "stem": args.stem,
        "unlabeled_id_path": str(args.unlabeled_id_path) if args.unlabeled_id_path else None,
    }
    logs.text.info(f"{pprint.pformat(configuration)}\n")
    logs.text.info(f"Total params: {parameter_count(model) / 1e6:.1f}M\n")


def announce(args, world: int, batch: int, steps: int, groups: int, device) -> None:
    """What a run is, and what differs from the authors'. groups: of samples that share the losses'
    pixel counts.
    """
    print(
        f"global batch {args.global_batch} = {world} process{'es' if world > 1 else ''} x {batch}"
        f" samples x {steps} accumulation step{'s' if steps > 1 else ''}; losses are normalised in"
        f" {groups} groups"
    )
    if groups > args.loss_groups:
        print(
            f"warning: {groups} groups, not {args.loss_groups}: a process has too few samples at a"
            " time for whole groups, so results will differ a little from the authors'"
        )
    if steps > 1:
        print(
            f"warning: batch norm sees {batch * (world if device.type == 'cuda' else 1)} samples at"
            f" a time, not {args.global_batch}: accumulation does not repair its statistics, so"
            " results will differ from the authors'"
        )
    if world > 1 and device.type != "cuda":
        print(
            "warning: on CPUs every process normalises its own samples (batch norm), so results"
            " differ from one process's"
        )


def epoch_picture(path: Path, shown: dict, classes, samples: int = 3) -> None:
    """Views, labels and predictions of an iteration's first samples, one a row."""
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

    count = min(samples, len(batch["x"]))
    rows = [[panel(values[row]) for values in columns.values()] for row in range(count)]
    save_picture(path, contact_sheet(rows, [*columns], legend=classes, cell_width=192))


def curves_picture(path: Path, miou: dict[int, float], losses: dict[int, float]) -> None:
    """mIoU after each epoch, or the mean loss of each where nothing was evaluated."""
    series = {"validation": miou} if miou else {"loss_all": losses}
    label = "mIoU (%)" if miou else "mean loss of the epoch"
    points = {name: (list(values), list(values.values())) for name, values in series.items()}
    save_chart(path, line_chart(points, "", "epoch", label))


def best_and_last(miou: dict[int, float], last: int = 20) -> dict:
    """Best mIoU and its epoch (the first one), last, mean of the last `last` evaluations. miou: by
    epoch, in their order, one at least.
    """
    best, epochs = max(miou, key=miou.get), list(miou)
    return {
        "best": miou[best],
        "best_epoch": best,
        "last": miou[epochs[-1]],
        "last_epoch": epochs[-1],
        "last_mean": float(np.mean([miou[epoch] for epoch in epochs[-last:]])),
        "evaluations": len(miou),
    }


def named_files(args) -> dict[str, Path]:
    """{name: file} of what the options name."""
    weights = args.backbone_weights
    files = {
        "labeled": args.labeled_id_path,
        "unlabeled": args.unlabeled_id_path,
        "val": args.val_id_path,
        "init_checkpoint": args.init_checkpoint,
        "backbone_weights": None if weights in ("none", "imagenet") else Path(weights),
    }
    return {name: path for name, path in files.items() if path}


def write_manifest(run) -> None:
    """manifest.json of a run, a train_unimatch.Adaptation, with what it has cost so far."""
    args, device, earlier = run.args, run.trainer.device, run.state.seconds
    record = {
        **manifest(vars(args), named_files(args), device, earlier),
        "iterations_per_epoch": run.sampler.per_epoch,
        "parameters": parameter_count(run.trainer.model),
    }
    write_json(args.save_path / "manifest.json", record)


def summarise(args, state, iterations: int, seconds: list[float], device) -> None:
    """summary.json and curves.png; the headline is the last epoch, not the best. state: a
    train_unimatch.State. seconds: of each iteration of this start of the run.
    """
    miou = {epoch: metrics["miou"] for epoch, metrics in state.evaluations.items()}
    curves_picture(args.save_path / "curves.png", miou, state.losses)
    m = None
    if miou:
        m = best_and_last(miou)
        if args.class_num == 16:
            m["best_13"] = state.evaluations[m["best_epoch"]]["miou_13"]
        m["eval_mode"] = args.eval_mode
    record = {
        "epochs": args.epochs,
        "iterations": iterations,
        "mIoU": m,
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "peak_memory": peak_memory_mb(device),
    }
    confident = None
    if "mask_ratio" in state.sums:
        confident = 100 * state.sums["mask_ratio"] / (iterations // args.epochs)
    record["above_conf_thresh"] = confident
    write_json(args.save_path / "summary.json", record)
    if confident is not None:
        print(
            f"in the last epoch {confident:.1f} % of the unlabeled pixels had a confidence of"
            f" --conf-thresh {args.conf_thresh:g} or more"
        )
    if m:
        print(
            f"mIoU ({args.eval_mode}): last {m['last']:.2f}, mean of the last"
            f" {min(20, m['evaluations'])} evaluations {m['last_mean']:.2f}, best {m['best']:.2f}"
            f" (epoch {m['best_epoch']})"
        )
    elif not args.val_id_path:
        print("no --val-id-path: no mIoU was measured, and no best.pth is kept")
    print(f"{args.save_path / 'latest.pth'}: trained for {iterations} iterations")


def two_iterations(run, loader: Iterator[dict]) -> tuple[float, float, dict]:
    """Seconds that the second of two iterations computes, seconds that its samples take to load,
    and its losses. run: a train_unimatch.Adaptation; loader: gives its batches, without other
    processes.
    """
    start = time.perf_counter()
    micro_batches = list(islice(loader, run.sampler.steps))
    loading = time.perf_counter() - start
    for iteration in range(2):
        start = time.perf_counter()
        losses, _ = run.trainer.iteration(iteration, iter(micro_batches), run.sampler)
        computing = time.perf_counter() - start
    return computing, loading, losses


def memory_here(device) -> float:
    """MB (10^6 bytes) that a run may take: of the GPU all; of the host what is available, or what
    its control group (a container's or a job's limit) allows if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e6
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8")
        limits = [1024 * int(re.search(r"^MemAvailable: *(\d+) kB", lines, re.M)[1])]
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    root = Path("/sys/fs/cgroup")
    for _, kind, path in (line.split(":", 2) for line in groups):
        if kind not in ("", "memory"):  # of version 2, and version 1's for memory
            continue
        top, name = (root / kind, "memory.limit_in_bytes") if kind else (root, "memory.max")
        folder = top / path.lstrip("/")  # a limit holds for all groups below it
        for file in (parent / name for parent in (folder, *folder.parents)):
            if file.is_file() and (limit := file.read_text(encoding="utf-8").strip()).isdigit():
                limits.append(int(limit))
    return min(limits) / 1e6


def room_for(args, iterations: int, device, measured: Callable) -> bool:
    """Whether a dry run at --crop-size has room, as two small crops suggest; prints the estimate.
    Memory and seconds are taken to grow in proportion to a crop's pixels, above a fixed part. A
    crop no larger than these is not estimated.

    measured(crop): peak memory in MB, seconds of computing and of loading of an iteration.
    """
    if args.crop_size <= SMALL_CROPS[-1]:
        return True
    found = []
    for crop in SMALL_CROPS:
        memory, computing, loading = measured(crop)
        found.append((memory, computing, loading))
        what = f"{memory / 1e3:.1f} GB, {computing:.2f} s computing an iteration"
        print(f"measured at --crop-size {crop}: {what}", flush=True)
    small, large = (crop**2 for crop in SMALL_CROPS)
    further = (args.crop_size**2 - large) / (large - small)
    memory, computing, loading = (b + max(b - a, 0) * further for a, b in zip(*found))
    there = memory_here(device)
    owner = "this GPU" if device.type == "cuda" else "this machine"
    hours = iterations * seconds_of(computing, loading, args) / 3600
    print(
        f"estimate for --crop-size {args.crop_size}: {memory / 1e3:.1f} GB, {owner} has"
        f" {there / 1e3:.1f} GB; {computing:.2f} s computing an iteration, {hours:.1f} h for"
        f" {iterations} iterations",
        flush=True,
    )
    if memory * MEMORY_MARGIN <= there:
        return True
    print("not run: use --batch-per-process 1, --amp bf16 or a smaller --crop-size")
    return False


def seconds_of(computing: float, loading: float, args) -> float:
    """Seconds of an iteration, whose samples other processes load meanwhile, if there are any."""
    workers = loading_processes(args.workers)
    return max(computing, loading / workers) if workers else computing + loading


def dry_run(run, loader: Iterator[dict]) -> None:
    """Two iterations (the second is timed) and one evaluation image of `run`, a
    train_unimatch.Adaptation; process 0 prints memory and the projected time. loader: gives its
    batches, without other processes.
    """
    args, trainer, sampler, validation = run.args, run.trainer, run.sampler, run.lists.validation
    rank, world = process_rank()
    computing, loading, losses = two_iterations(run, loader)
    seconds = sampler.total * seconds_of(computing, loading, args)
    if validation:
        start = time.perf_counter()
        run.evaluate(validation[:1])
        per_image = time.perf_counter() - start
    if rank > 0:
        return
    values = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    print(f"losses after two iterations: {values}")
    ours = f"{computing:.2f} s computing and, with --workers 0, {loading:.2f} s loading"
    if workers := loading_processes(args.workers):
        ours = (
            f"{computing:.2f} s computing; loading its samples takes {loading:.2f} s in one"
            f" process, {workers} do it meanwhile"
        )
    what = f"{sampler.total} iterations"
    if validation:
        images = math.ceil(len(validation) / world) * math.ceil(args.epochs / args.eval_every)
        seconds, what = seconds + images * per_image, f"{what} and evaluations"
        print(f"evaluation, {args.eval_mode}: {per_image:.2f} s an image")
    print(f"an iteration: {ours}\nprojected time of {what}: {seconds / 3600:.1f} h")
    memory = peak_memory_mb(trainer.device)
    peaks = ", ".join(f"{n.removesuffix('_mb')} {value:.0f} MB" for n, value in memory.items())
    print(f"peak memory of process 0: {peaks}")
