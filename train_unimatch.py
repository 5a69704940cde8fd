#!/usr/bin/env python
"""Adapt DeepLabV3+ with UniMatch (CVPR 2023) from a labeled and an unlabeled list, or train it on
labels alone.

Inputs   --labeled-id-path     rows `<image path> <label path>`: what acts as ground truth
         --unlabeled-id-path   rows `<image path>`; a second column is not read
         --val-id-path         optional, rows `<image path> <ground truth>`: evaluated after every
                               epoch. The only ground truth that this script opens
         --supervised          instead of an unlabeled list: OHEM cross-entropy on the labeled one
                               (source model, upper bound)
Outputs  in --save-path: latest.pth (resumes), best.pth (best evaluation), train.log (the shipped
         logs' format), TensorBoard events, pictures/, curves.png, summary.json; settings.json and
         inputs.json (what the run depends on), manifest.json

    python train_unimatch.py --labeled-id-path splits/cityscapes/DTST_gta_vit_h_scc/labeled.txt \\
        --unlabeled-id-path splits/cityscapes/DTST_gta_vit_h_scc/unlabeled.txt \\
        --val-id-path splits/cityscapes/val.txt --root-path data/cityscapes \\
        --backbone-weights pretrained/resnet101.pth --eval-mode sliding_window --save-path runs/seco
    # the same on four GPUs; the global batch stays 8
    torchrun --nproc_per_node 4 train_unimatch.py …
    # two iterations and one evaluation image: memory and time; only an estimate if it has no room
    python train_unimatch.py … --dry-run

The defaults are the authors' (Cityscapes logs). Stopped at any moment, the same command goes on
from latest.pth, and ends as if it had never stopped: all random numbers are functions of --seed and
the iteration.

Copied away, this file needs eval.py, model/, dataset/ and util/.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch

from dataset.augment import SCALES, cutmix_targets
from dataset.copy_paste import RARE_CLASSES
from dataset.samples import (
    AUTHORS_PROCESSES,
    Lists,
    TrainingSamples,
    batches,
    loading_processes,
    places,
    read_lists,
)
from eval import CropSize, Mode, evaluate_checkpoint, metrics_of
from model import losses, train_logs, training
from model.resnet import BLOCKS, STEMS, load_exactly, normalised, read_checkpoint
from model.training import learning_rate, perturbation_factors
from util.labels import ClassSet, chosen_classes, label_folder, read_list, write_classes
from util.options import (
    Bounds,
    ClassOptions,
    Count,
    CountFrom0,
    File,
    Folder,
    List,
    NotNegative,
    Pixels,
    Positive,
    RunOptions,
    Setting,
    Share,
    one_of,
    parse_options,
    settings_of,
)
from util.outputs import Outputs, atomic_path
from util.run import (
    STARTED,
    UserError,
    process_group,
    process_rank,
    progress,
    run_main,
    select_device,
    tune_cpu,
)

RESULTS = ("latest.pth", "best.pth", "summary.json")  # a folder with one of them holds a run


# ------------------------------------------------------------------------------------ one iteration


class Trainer:
    """UniMatch's iteration, and all that a run works with: its samples and their order, the network
    with its optimizer, where it stands. Sets torch's precision.

    network: what forward and backward go through, the model or the compiled one, within
    DistributedDataParallel where there are several processes. group: samples that share the losses'
    pixel counts (OHEM's, the means'), as within one of the authors' four processes; fewer where a
    process has fewer at a time. weights: of classes, or None. state: the next iteration, the best
    mIoU, sums of the running epoch's losses; the metrics of every evaluation and the mean loss, by
    epoch; seconds of the starts before this one. logs: on process 0 alone.
    """

    logs: train_logs.Logs | None = None

    def __init__(self, args: Options, classes: ClassSet, lists: Lists, device):
        self.args, self.classes, self.lists, self.device = args, classes, lists, device
        training.set_precision(args)
        layout = torch.channels_last if args.channels_last else torch.preserve_format
        model = training.build_model(args, classes.count).to(device, memory_format=layout)
        if process_rank()[1] > 1 and device.type == "cuda":  # statistics of all GPUs' samples
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.train()
        self.optimizer = training.optimizer_of(model, args)
        self.network = model
        if args.compile:
            self.network = torch.compile(model)
            torch._dynamo.config.optimize_ddp = False  # its splitter fails on `fp_from`, a number
        self.group = math.gcd(args.global_batch // args.loss_groups, args.batch_per_process)
        self.weights = None
        if args.class_balance:
            pixels = lists.pixels.sum(axis=0)
            self.weights = losses.class_weights(pixels, args.class_balance).to(device)
        self.state = SimpleNamespace(
            iteration=0, best=0.0, best_epoch=-1, sums={}, evaluations={}, losses={}, seconds=0.0
        )
        self.samples = TrainingSamples(args, lists)
        self.places = places(args)
        self.total = self.samples.per_epoch * args.epochs

    def unimatch_losses(self, batch: dict, factors) -> tuple[torch.Tensor, dict, dict]:
        """UniMatch's losses of one batch, as its released code has them.

        batch: dataset.samples.TrainingSamples' items, stacked. factors: pair (c1, c4) of 2B x C x 1
        x 1, for [x; w]. Returns the loss, the logged values and what the pictures show.
        """
        count, conf_thresh = len(batch["x"]), self.args.conf_thresh
        mask_x, box1, box2, ignore_w, ignore_mix = (
            batch[name].to(self.device, non_blocking=True)
            for name in ("mask_x", "box1", "box2", "ignore", "ignore_mix")
        )
        factors = tuple(f.to(self.device) for f in factors)

        # forward A, in eval mode: pseudo-labels of the images pasted from
        mix = self.mix_pseudo_labels(batch["w_mix"], (box1 | box2).flatten(1).any(dim=1))
        mix["ignore"] = ignore_mix
        with self.amp():
            # forward B: labels and weak views, these also with perturbed features
            images = self.images(torch.cat([batch["x"], batch["w"]]))
            logits, pred_fp = self.network(images, factors, fp_from=count)
            # forward C: both strong views, already pasted into
            pred_s = self.network(self.images(torch.cat([batch["s1"], batch["s2"]])))
        (pred_x, pred_w), (pred_s1, pred_s2) = logits.chunk(2), pred_s.chunk(2)
        w = {**losses.with_confidence(pred_w), "ignore": ignore_w}
        target_s1, target_s2 = cutmix_targets(w, mix, box1), cutmix_targets(w, mix, box2)

        loss_x = self.loss_x(pred_x, mask_x)
        loss_s1 = self.consistency(pred_s1, target_s1)
        loss_s2 = self.consistency(pred_s2, target_s2)
        loss_fp = self.consistency(pred_fp, w)
        loss = losses.total_loss(loss_x, loss_s1, loss_s2, loss_fp)

        valid = ~ignore_w
        kept = ((w["confidence"] >= conf_thresh) & valid).sum() / valid.sum().clamp(min=1)
        logged = {
            "loss_all": loss,
            "loss_x": loss_x,
            "loss_s": (loss_s1 + loss_s2) / 2,
            "loss_w_fp": loss_fp,
            "mask_ratio": kept,
        }
        return loss, logged, {"pred_x": pred_x, "pred_w": pred_w, "label_s1": target_s1["label"]}

    def supervised_losses(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """The same three of the labeled list alone."""
        with self.amp():
            pred_x = self.network(self.images(batch["x"]))
        loss = self.loss_x(pred_x, batch["mask_x"].to(self.device))
        return loss, {"loss_all": loss, "loss_x": loss}, {"pred_x": pred_x}

    def mix_pseudo_labels(self, w_mix: torch.Tensor, needed: torch.Tensor) -> dict:
        """Pseudo-labels in eval mode of the images that are pasted from (`needed`), else zeros."""
        count, size = len(w_mix), w_mix.shape[1]
        mix = {
            "label": torch.zeros(count, size, size, dtype=torch.int64, device=self.device),
            "confidence": torch.zeros(count, size, size, device=self.device),
        }
        if needed.any():
            self.model.eval()
            with torch.no_grad(), self.amp():
                found = losses.with_confidence(self.network(self.images(w_mix[needed.cpu()])))
            self.model.train()
            for name, values in found.items():
                mix[name][needed] = values
        return mix

    def loss_x(self, pred_x: torch.Tensor, mask_x: torch.Tensor) -> torch.Tensor:
        how = {"threshold": self.args.ohem_threshold, "min_kept": self.args.min_kept}
        loss = partial(losses.ohem_cross_entropy, **how)
        if self.weights is not None:
            loss = partial(losses.balanced_cross_entropy, weights=self.weights)
        return losses.mean_over_groups(loss, self.group, pred_x, mask_x)

    def consistency(self, pred: torch.Tensor, target: dict) -> torch.Tensor:
        """The loss of `pred` with pseudo-labels, confidence and padding as targets."""
        loss = partial(losses.pseudo_label_loss, threshold=self.args.conf_thresh)
        parts = (target[name] for name in ("label", "confidence", "ignore"))
        return losses.mean_over_groups(loss, self.group, pred, *parts)

    def amp(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def images(self, views: torch.Tensor) -> torch.Tensor:
        images = normalised(views.to(self.device, non_blocking=True))
        return images if self.args.channels_last else images.contiguous()

    def iteration(self, iteration: int, loader: Iterator[dict]) -> tuple[dict, dict]:
        """A step of the optimizer, from one batch of each of `places`. Gives the logged values and
        what the pictures show.
        """
        args, steps = self.args, len(self.places)
        for group, factor in zip(self.optimizer.param_groups, (1.0, args.lr_multi)):
            group["lr"] = learning_rate(iteration, self.total, args.lr) * factor
        self.optimizer.zero_grad()
        which = (args.seed, iteration, args.global_batch, self.model.backbone.channels[::3])
        factors = None if args.supervised else perturbation_factors(*which)
        values: dict[str, torch.Tensor] = {}
        for step, mine in enumerate(self.places):
            batch = next(loader)
            whole = step == steps - 1 or process_rank()[1] == 1
            with contextlib.nullcontext() if whole else self.network.no_sync():
                if args.supervised:
                    loss, found, shown = self.supervised_losses(batch)
                else:
                    own = tuple(f[:, mine].flatten(0, 1) for f in factors)
                    loss, found, shown = self.unimatch_losses(batch, own)
                (loss / steps).backward()
            for name, value in found.items():
                values[name] = values.get(name, 0) + value.detach() / steps
        stacked = torch.stack(list(values.values())).float()
        training.average_over_processes([stacked])
        logged = dict(zip(values, stacked.tolist()))
        if not all(math.isfinite(value) for value in logged.values()):
            raise UserError(
                f"iteration {iteration}: a loss is not finite ({logged}); lower --lr, or check the"
                " labels; latest.pth holds the last saved state"
            )
        self.optimizer.step()
        if self.device.type != "cuda":  # GPUs synchronise batch norm by themselves
            buffers = self.model.buffers()
            training.average_over_processes([b for b in buffers if b.is_floating_point()])
        return logged, {**shown, "batch": batch}

    def save(self, name: str, epoch: int) -> None:
        """best.pth, the model alone; or latest.pth, with all that resuming needs."""
        content = {"model": self.model.state_dict(), "config": self.model.config, "epoch": epoch}
        if name == "latest.pth":
            content["optimizer"] = self.optimizer.state_dict()
            seconds = self.state.seconds + time.time() - STARTED
            content["progress"] = {**vars(self.state), "seconds": seconds}
            content["logs"] = self.logs.sizes()
        with atomic_path(self.args.save_path / name) as temporary:
            torch.save(content, temporary)

    def evaluate(self, rows) -> np.ndarray:
        """The confusion matrix over `rows` in fp32, so that eval.py gives the same figures."""
        from model.network import Network  # here: the other networks load torchvision

        args = self.args
        network = Network(self.model.eval(), "DeepLabV3+", self.classes.count)
        how = (args.root_path, args.eval_mode, args.crop_size)
        confusion = evaluate_checkpoint(network, rows, *how)
        self.model.train()
        return confusion


# ---------------------------------------------------------------------------------------- main loop


def train(run: Trainer) -> list[float]:
    """From state.iteration to the end; returns the seconds of each iteration."""
    args, state, logs, seconds = run.args, run.state, run.logs, []
    length, workers = run.samples.per_epoch, loading_processes(args.workers)
    loader = iter(batches(run.samples, range(state.iteration, run.total), workers, run.device))
    where = {"total": run.total, "initial": state.iteration}
    with progress(desc="training", unit="it", **where) as bar:
        while state.iteration < run.total:
            epoch, within = divmod(state.iteration, length)
            if within == 0:
                state.sums = {}
            start = time.perf_counter()
            values, shown = run.iteration(state.iteration, loader)
            seconds.append(time.perf_counter() - start)
            for name, value in values.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            if logs:
                logs.iteration(run, values)
                loss, best = values["loss_all"], state.best
                bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}, best {best:.2f}", False)
                bar.update()
            state.iteration += 1
            if within == length - 1:
                finish_epoch(run, epoch, shown)
            elif logs and args.checkpoint_every and state.iteration % args.checkpoint_every == 0:
                run.save("latest.pth", epoch)
    return seconds


def finish_epoch(run: Trainer, epoch: int, shown: dict) -> None:
    """Evaluation, picture and checkpoints at the end of an epoch."""
    args, state, logs = run.args, run.state, run.logs
    last = epoch == args.epochs - 1
    state.losses[epoch] = state.sums["loss_all"] / run.samples.per_epoch
    if run.lists.validation and ((epoch + 1) % args.eval_every == 0 or last):
        metrics = metrics_of(run.evaluate(run.lists.validation), run.classes.names)
        state.evaluations[epoch] = metrics
        if logs:
            logs.evaluation(epoch, args.eval_mode, metrics)
        if metrics["miou"] > state.best:
            state.best, state.best_epoch = metrics["miou"], epoch
            if logs:
                run.save("best.pth", epoch)
    if logs:
        if args.pictures_every and ((epoch + 1) % args.pictures_every == 0 or last):
            path = args.save_path / "pictures" / f"epoch_{epoch:03d}.png"
            train_logs.epoch_picture(path, shown, run.classes)
        run.save("latest.pth", epoch)


# ------------------------------------------------------------------------------------------ options

Backbone = Literal[tuple(f"resnet{depth}" for depth in BLOCKS)]
TwoFactors = Annotated[tuple[float, float], Bounds(above=0), "LEAST MOST"]


@dataclass(kw_only=True)
class DataOptions:
    """what is read and written"""

    labeled_id_path: List
    "images and labels to learn from"
    unlabeled_id_path: List | None = None
    "images without labels; needed unless --supervised"
    val_id_path: List | None = None
    "images and ground truth, evaluated after epochs (default: none)"
    root_path: Folder = Path("data")
    "folder that the lists' paths start from"
    save_path: Folder
    "outputs; an unfinished run there goes on"
    supervised: Setting[bool] = False
    "train on the labeled list alone"
    photometric: Setting[bool] = False
    "with --supervised: colour jitter, grey and blur as in the strong views"


@dataclass(kw_only=True)
class NetworkOptions:
    """network"""

    backbone: Setting[Backbone] = "resnet101"
    "network below DeepLabV3+"
    stem: Setting[Literal[STEMS]] = "deep"
    "deep: UniMatch's; torchvision: for its ImageNet weights"
    backbone_weights: Annotated[str, "none|imagenet|FILE"] = "none"
    "start of the backbone; the authors' is UniMatch's pretrained/resnet101.pth; none: random"
    init_checkpoint: File | None = None
    "start from this whole network, e.g. the source model"


@dataclass(kw_only=True)
class RecipeOptions:
    """recipe (defaults: the authors' Cityscapes runs)"""

    crop_size: Setting[CropSize] = 769
    "side of training crops and of windows, 33 or more"
    global_batch: Setting[Count] = 8
    "labeled samples an iteration, over all processes; as many unlabeled"
    batch_per_process: Count | None = None
    "samples per process at a time; fewer than its share (the default) accumulate gradients"
    loss_groups: Setting[Count] | None = None
    "groups within which pixels are counted (default: 4, the authors' GPUs, or what divides 4)"
    epochs: Setting[Count] = 240
    "passes over the unlabeled list"
    lr: Setting[Positive] = 0.005
    "starting learning rate of the backbone"
    lr_multi: Setting[NotNegative] = 1.0
    "learning rate of the rest / --lr"
    optimizer: Setting[Literal["sgd", "adamw"]] = "sgd"
    "adamw learns faster from random weights; UniMatch's is sgd"
    scales: Setting[TwoFactors] = SCALES
    "range of the random resizing before cropping, as factors of the image's size"
    class_balance: Setting[Share] = 0.0
    "above 0: the labels' loss is cross-entropy with class weights frequency^-BALANCE, not OHEM"
    ohem_threshold: Setting[Share] = losses.OHEM_THRESHOLD
    "pixels less sure than this are hard, 0 to 1"
    min_kept: Setting[Pixels] = losses.OHEM_MIN_KEPT
    "least hard pixels per loss group; with fewer labeled ones all count"
    conf_thresh: Setting[Share] = 0.0
    "least confidence of a pseudo-label that counts, 0 to 1"
    copy_paste: Setting[bool] = False
    "paste objects of rare classes of the labeled list into labeled crops"
    copy_paste_classes: Setting[Annotated[list[int], Bounds(least=0), "ID"]] | None = None
    "train IDs of the rare classes (default: DT-ST's, known for 16 and 19 classes)"


@dataclass(kw_only=True)
class RunningOptions:
    """running"""

    eval_mode: Setting[Mode] = "original"
    "the shipped GTA log has sliding_window, SYNTHIA's and BDD's original"
    eval_every: Setting[Count] = 1
    "evaluate every so many epochs and at the end"
    checkpoint_every: CountFrom0 = 200
    "iterations between latest.pth within epochs; 0: only after epochs"
    pictures_every: CountFrom0 = 10
    "epochs between pictures of views and predictions; 0: never"
    workers: CountFrom0 | None = None
    "data-loading processes per process, 0: none (default: one a core, at most 4)"
    image_cache: Folder | None = None
    "keep decoded images here, for speed (6 MB for 2048x1024, 19 GB for Cityscapes)"
    amp: Setting[Literal["none", "tf32", "bf16"]] = "none"
    "none is exact fp32; bf16 is faster, on CPUs too"
    channels_last: bool | None = None
    "memory layout that convolutions in bf16 prefer (default: with --amp bf16)"
    compile: bool = False
    "torch.compile the network"
    dry_run: bool = False
    "two iterations and one evaluation image; reports memory and time, saves nothing. On one"
    "process small crops tell first whether there is room; without, the estimate is all"


@dataclass(kw_only=True)
class Options(RunOptions, RunningOptions, RecipeOptions, NetworkOptions, ClassOptions, DataOptions):
    "--help and settings.json have the groups from the last to the first."


def parse_args(argv: list[str] | None = None) -> Options:
    """The options, with defaults that depend on others filled in."""
    args = parse_options(Options, __doc__, argv)
    one_of(args, "unlabeled_id_path", "supervised")
    if args.photometric and not args.supervised:
        raise UserError("--photometric: only with --supervised")
    Bounds(most=args.class_num - 1).check("copy_paste_classes", max(args.copy_paste_classes or [0]))
    args.scales = sorted(args.scales)
    if args.channels_last is None:
        args.channels_last = args.amp == "bf16"
    args.loss_groups = args.loss_groups or math.gcd(AUTHORS_PROCESSES, args.global_batch)
    if args.global_batch % args.loss_groups:
        raise UserError(f"--loss-groups {args.loss_groups}: give a divisor of --global-batch")
    if args.copy_paste and not args.copy_paste_classes:
        if args.class_num not in RARE_CLASSES:
            raise UserError("--copy-paste: name your rare classes with --copy-paste-classes")
        args.copy_paste_classes = list(RARE_CLASSES[args.class_num])
    return args


# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args, (rank, world) = parse_args(argv), process_rank()
    share, rest = divmod(args.global_batch, world)
    if rest:
        raise UserError(
            f"--global-batch {args.global_batch}: must be a multiple of {world} processes"
        )
    args.batch_per_process = args.batch_per_process or share
    if share % args.batch_per_process:
        raise UserError(
            f"--batch-per-process {args.batch_per_process}: a process has {share}; give a divisor"
            " of it"
        )
    if args.supervised and args.batch_per_process == 1:
        raise UserError("--supervised: batch norm needs a --batch-per-process of two or more")
    device = select_device(args.device)
    beside = label_folder(args.root_path, read_list(args.labeled_id_path))
    classes, lists = chosen_classes(args, beside), read_lists(args)
    tune_cpu()
    run = Trainer(args, classes, lists, device)
    with contextlib.nullcontext() if args.dry_run else Outputs(args.save_path) as out:
        if out and rank == 0:
            begun = any((args.save_path / name).is_file() for name in RESULTS)
            out.accept(settings_of(args), inputs_of(args, lists), begun)
            write_classes(args.save_path, classes)
        with process_group(device):
            run.network = training.distributed(run.network, device)
            if args.dry_run:
                dry_run(run)
            else:
                adapt(run)


def inputs_of(args: Options, lists: Lists) -> dict[str, Path]:
    """{name: file} of what the options and the lists name."""
    files = {
        "labeled": args.labeled_id_path,
        "unlabeled": args.unlabeled_id_path,
        "val": args.val_id_path,
        "init_checkpoint": args.init_checkpoint,
    }
    if args.backbone_weights not in ("none", "imagenet"):
        files["backbone_weights"] = Path(args.backbone_weights)
    listed = (*chain(*lists.labeled, *lists.validation), *lists.unlabeled)
    files = {name: path for name, path in files.items() if path}
    return files | {name: args.root_path / name for name in listed}


def dry_run(run: Trainer) -> None:
    """Measures one process's small crops first, and then the run's own if it has room."""
    rank, world = process_rank()
    if world > 1 or train_logs.room_for(run, partial(measured_alone, run)):
        if rank == 0:
            train_logs.announce(run)
        figures = train_logs.measure(run)
        if rank == 0:
            train_logs.report(run, figures)


def measured_alone(run: Trainer, crop: int) -> dict:
    """Of another --crop-size, in a process of its own: the peak of a process's memory never falls.
    MemoryError if the kernel ends it.
    """
    args, lists = replace(run.args, crop_size=crop), replace(run.lists, validation=[])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(measured, args, run.classes, lists, run.device).result()
        except BrokenProcessPool:
            raise MemoryError(f"already at --crop-size {crop}") from None


def measured(*run) -> dict:
    tune_cpu()
    return train_logs.measure(Trainer(*run))


def adapt(run: Trainer) -> None:
    """Resume and train."""
    save_path, state, content = run.args.save_path, run.state, {}
    if (latest := save_path / "latest.pth").is_file():
        content = read_checkpoint(latest)
        load_exactly(run.model, content["model"], latest, "this run's network")
        run.optimizer.load_state_dict(content["optimizer"])
        vars(state).update(content["progress"])
    rank = process_rank()[0]
    if state.iteration == run.total and (save_path / "summary.json").is_file():
        if rank == 0:
            print(f"{save_path}: this run is complete ({run.args.epochs} epochs)")
    elif rank > 0:
        train(run)
    else:
        train_logs.announce(run)
        with contextlib.closing(train_logs.Logs(run, content.get("logs"))) as run.logs:
            train_logs.write_manifest(run)
            seconds = train(run)
        train_logs.write_manifest(run)
        train_logs.summarise(run, seconds)


if __name__ == "__main__":
    sys.exit(
        run_main(main, "use --batch-per-process 1 or --amp bf16; --dry-run tells what it takes")
    )
