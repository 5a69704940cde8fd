#!/usr/bin/env python
"""Adapt DeepLabV3+ with UniMatch (CVPR 2023) from a labeled and an unlabeled list, or train it on
labels alone.

Inputs   --labeled-id-path     rows `<image path> <label path>`: what acts as ground truth
         --unlabeled-id-path   rows `<image path>`; a second column is not read
         --val-id-path         optional, rows `<image path> <ground truth>`: evaluated after every
                               epoch. The only ground truth that this script opens; nothing trains
                               on it
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
import functools
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from dataset.augment import SCALES, cutmix_targets
from dataset.copy_paste import RARE_CLASSES
from dataset.samples import (
    AUTHORS_PROCESSES,
    Lists,
    MicroBatches,
    TrainingSamples,
    batch_per_process,
    batches,
    iterations_per_epoch,
    loading_processes,
    read_lists,
    training_samples,
)
from eval import CropSize, Mode, evaluate_checkpoint, metrics_of
from model import losses
from model.checkpoint import load_exactly, read_checkpoint
from model.resnet import BLOCKS, STEMS, normalised
from model.train_logs import (
    Logs,
    announce,
    dry_run,
    epoch_picture,
    log_header,
    named_files,
    room_for,
    summarise,
    two_iterations,
    write_manifest,
)
from model.training import (
    State,
    average_running_statistics,
    build_model,
    distributed,
    learning_rate,
    mean_over_processes,
    optimizer_of,
    perturbation_factors,
    set_precision,
    to_device,
)
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
from util.outputs import Outputs, atomic_path, check_writable, remove_leftovers
from util.run import (
    UserError,
    peak_memory_mb,
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
    """The network with its optimizer, and UniMatch's iteration.

    network: what forward and backward go through (DistributedDataParallel, a compiled module or the
    model itself); plain: the same without gradients' averaging; model: the DeepLabV3Plus inside.
    group: samples per loss group. total: iterations of the run. weights: of the classes, for
    --class-balance.
    """

    def __init__(self, model, args: Options, device, group: int, total: int, weights=None):
        self.model, self.args, self.device = model, args, device
        self.group, self.total = group, total
        self.weights = None if weights is None else weights.to(device)
        self.optimizer = optimizer_of(model, args.optimizer, args.lr, args.lr_multi)
        self.plain = model
        if args.compile:
            self.plain = torch.compile(model)
            torch._dynamo.config.optimize_ddp = False  # its splitter fails on `fp_from`, a number
        self.network = distributed(self.plain, device)
        model.train()

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
        """Label and confidence of the images pasted from, in eval mode; only of those that
        something is pasted from (eval mode's batch norm makes each independent of the others, so
        the rest is not missed).
        """
        count, size = len(w_mix), w_mix.shape[1]
        mix = {
            "label": torch.zeros(count, size, size, dtype=torch.int64, device=self.device),
            "confidence": torch.zeros(count, size, size, device=self.device),
        }
        if needed.any():
            self.model.eval()
            with torch.no_grad(), self.amp():
                found = losses.with_confidence(self.plain(self.images(w_mix[needed.cpu()])))
            self.model.train()
            for name, values in found.items():
                mix[name][needed] = values
        return mix

    def loss_x(self, pred_x: torch.Tensor, mask_x: torch.Tensor) -> torch.Tensor:
        def loss(logits, labels):
            if self.weights is not None:
                return losses.balanced_cross_entropy(logits, labels, self.weights)
            return losses.ohem_cross_entropy(
                logits, labels, self.args.ohem_threshold, self.args.min_kept
            )

        return losses.mean_over_groups(loss, self.group, pred_x, mask_x)

    def consistency(self, pred: torch.Tensor, target: dict) -> torch.Tensor:
        """The loss of `pred` with pseudo-labels, confidence and padding as targets."""

        def loss(*chunk):
            return losses.pseudo_label_loss(*chunk, self.args.conf_thresh)

        parts = (target[name] for name in ("label", "confidence", "ignore"))
        return losses.mean_over_groups(loss, self.group, pred, *parts)

    def amp(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def images(self, views: torch.Tensor) -> torch.Tensor:
        images = normalised(views.to(self.device, non_blocking=True))
        return images if self.args.channels_last else images.contiguous()

    def iteration(
        self, iteration: int, micro_batches, sampler: MicroBatches, step: bool = True
    ) -> tuple[dict, dict]:
        """One optimizer step from `sampler.steps` batches: logged values (floats, means over the
        global batch), and what the pictures show. With step=False gradients are computed and left
        alone.
        """
        for group, factor in zip(self.optimizer.param_groups, (1.0, self.args.lr_multi)):
            group["lr"] = learning_rate(iteration, self.total, self.args.lr) * factor
        self.optimizer.zero_grad()
        factors = None
        if not self.args.supervised:
            which = (self.args.seed, iteration, sampler.global_batch)
            factors = perturbation_factors(*which, self.model.backbone.channels[::3])
        values: dict[str, torch.Tensor] = {}
        for number in range(sampler.steps):
            batch = next(micro_batches)
            whole = number == sampler.steps - 1 or self.network is self.plain
            with contextlib.nullcontext() if whole else self.network.no_sync():
                if self.args.supervised:
                    loss, found, shown = self.supervised_losses(batch)
                else:
                    slot = sampler.slot(number)
                    mine = tuple(f[:, slot : slot + sampler.batch].flatten(0, 1) for f in factors)
                    loss, found, shown = self.unimatch_losses(batch, mine)
                (loss / sampler.steps).backward()
            for name, value in found.items():
                values[name] = values.get(name, 0) + value.detach() / sampler.steps
        logged = mean_over_processes(values)
        if not all(math.isfinite(value) for value in logged.values()):
            raise UserError(
                f"iteration {iteration}: a loss is not finite ({logged}); lower --lr, or check the"
                " labels; latest.pth holds the last saved state"
            )
        if step:
            self.optimizer.step()
        if self.device.type != "cuda":
            average_running_statistics(self.model)
        return logged, {**shown, "batch": batch}


# ---------------------------------------------------------------------------------------- main loop


@dataclass
class Adaptation:
    """What the main loop works with. logs: None but on process 0."""

    args: Options
    classes: ClassSet
    lists: Lists
    trainer: Trainer
    sampler: MicroBatches
    samples: TrainingSamples
    state: State
    logs: Logs | None = None

    def save(self, name: str, epoch: int) -> None:
        """best.pth, the model alone; or latest.pth, with all that resuming needs."""
        model = self.trainer.model
        content = {"model": model.state_dict(), "config": model.config, "epoch": epoch}
        if name == "latest.pth":
            content["optimizer"] = self.trainer.optimizer.state_dict()
            content |= {"progress": self.state.saved(), "logs": self.logs.sizes()}
        with atomic_path(self.args.save_path / name) as temporary:
            torch.save(content, temporary)

    def evaluate(self, rows) -> np.ndarray:
        """The confusion matrix over `rows` in fp32, so that eval.py gives the same figures."""
        from model.network import Network  # here: the other networks load torchvision

        args, trainer = self.args, self.trainer
        network = Network(trainer.model.eval(), "DeepLabV3+", self.classes.count)
        how = (args.root_path, args.eval_mode, args.crop_size, "evaluation")
        confusion = evaluate_checkpoint(network, rows, *how)
        trainer.model.train()
        return confusion


def train(run: Adaptation) -> list[float]:
    """From state.iteration to the end; returns the seconds of each iteration."""
    args, trainer, sampler, state, logs = run.args, run.trainer, run.sampler, run.state, run.logs
    workers = loading_processes(args.workers)
    micro_batches = iter(batches(run.samples, sampler, workers, trainer.device))
    length, seconds = sampler.per_epoch, []
    every = max(length // 8, 1)  # UniMatch's rows: eight or nine an epoch
    where = {"total": sampler.total, "initial": state.iteration}
    with progress(desc="training", unit="it", quiet=logs is None, **where) as bar:
        while state.iteration < sampler.total:
            epoch, within = divmod(state.iteration, length)
            if within == 0:
                state.sums = {}
                if logs:
                    lr = learning_rate(state.iteration, sampler.total, args.lr)
                    logs.epoch(epoch, lr, state.best)
            start = time.perf_counter()
            values, shown = trainer.iteration(state.iteration, micro_batches, sampler)
            seconds.append(time.perf_counter() - start)
            for name, value in values.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            if logs:
                lr = trainer.optimizer.param_groups[0]["lr"]
                logs.train(state.iteration, {**values, "lr": lr})
                if within % every == 0:
                    logs.row(within, state.sums)
                loss, best = values["loss_all"], state.best
                bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}, best {best:.2f}", False)
                bar.update()
            state.iteration += 1
            if within == length - 1:
                finish_epoch(run, epoch, shown)
            elif logs and args.checkpoint_every and state.iteration % args.checkpoint_every == 0:
                run.save("latest.pth", epoch)
    return seconds


def finish_epoch(run: Adaptation, epoch: int, shown: dict) -> None:
    """Evaluation, picture and checkpoints at the end of an epoch."""
    args, state, logs = run.args, run.state, run.logs
    last = epoch == args.epochs - 1
    state.losses[epoch] = state.sums["loss_all"] / run.sampler.per_epoch
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
            epoch_picture(path, shown, run.classes)
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
    "with --supervised: colour jitter, grey and blur as in the strong views, for a source model"
    "less bound to its domain's colours"


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
    "samples per process at a time; fewer than its share accumulates gradients (default: its share)"
    loss_groups: Setting[Count] | None = None
    "groups of samples of the global batch within which pixels are counted (OHEM, means); default:"
    "4, the authors' GPUs, or the largest of 4, 2, 1 that divides --global-batch"
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
    "data-loading processes per process, 0: none; results do not depend on it (default: one a"
    "core, at most 4)"
    image_cache: Folder | None = None
    "keep decoded images here (6 MB for 2048x1024, 19 GB for Cityscapes): data loads several times"
    "faster"
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
    """The options, with one line for every value that no run can have; defaults that depend on
    others are filled in.
    """
    args = parse_options(Options, __doc__, argv)
    one_of(args, "unlabeled_id_path", "supervised")
    if args.photometric and not args.supervised:
        raise UserError(
            "--photometric: only with --supervised; UniMatch's labeled images stay as they are"
        )
    Bounds(most=args.class_num - 1).check("copy_paste_classes", max(args.copy_paste_classes or [0]))
    least, most = args.scales = list(args.scales)  # as settings.json gives it back
    if least > most:
        raise UserError(f"--scales {least:g} {most:g}: give the smaller factor first")
    if args.channels_last is None:
        args.channels_last = args.amp == "bf16"
    if args.loss_groups is None:
        args.loss_groups = math.gcd(AUTHORS_PROCESSES, args.global_batch)
    if args.global_batch % args.loss_groups:
        raise UserError(
            f"--loss-groups {args.loss_groups}: it must divide --global-batch {args.global_batch}"
        )
    if args.copy_paste and not args.copy_paste_classes:
        if args.class_num not in RARE_CLASSES:
            raise UserError(
                "--copy-paste: rare classes are known for 16 and 19 classes; name yours with"
                " --copy-paste-classes"
            )
        args.copy_paste_classes = list(RARE_CLASSES[args.class_num])
    return args


# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    beside = label_folder(args.root_path, read_list(args.labeled_id_path))
    classes = chosen_classes(args, beside)
    batch = batch_per_process(args.global_batch, args.batch_per_process, process_rank()[1])
    if args.supervised and batch == 1:
        raise UserError(
            "--supervised with one sample per process and step: batch norm needs two or more; "
            "raise --global-batch or --batch-per-process"
        )
    args.batch_per_process = batch
    paths = (args.labeled_id_path, args.unlabeled_id_path, args.val_id_path)
    lists = read_lists(args.root_path, *paths, classes.count)
    if args.image_cache:
        check_writable(args.image_cache)
    device = select_device(args.device)
    set_precision(args)
    tune_cpu()
    model = build_model(args, classes.count)
    with contextlib.nullcontext() if args.dry_run else Outputs(args.save_path) as out:
        if out and process_rank()[0] == 0:
            begun = any((args.save_path / name).is_file() for name in RESULTS)
            inputs = named_files(args) | lists.files(args.root_path)
            out.accept(settings_of(args), inputs, begun)
            remove_leftovers(args.save_path)
            write_classes(args.save_path, classes)
        with process_group(device):
            adapt(args, classes, lists, model, device)


def adapt(args: Options, classes: ClassSet, lists: Lists, model, device) -> None:
    """Resume and train, or --dry-run."""
    rank, world = process_rank()
    latest, state, content = args.save_path / "latest.pth", State(), {}
    if args.dry_run and world == 1:
        length = len(lists.unlabeled) or len(lists.labeled)
        iterations = args.epochs * iterations_per_epoch(length, args.global_batch)
        at_crop = functools.partial(measured_apart, args, classes, lists, device)
        if not room_for(args, iterations, device, at_crop):
            return
    if latest.is_file() and not args.dry_run:
        content = read_checkpoint(latest)
        load_exactly(model, content["model"], latest, "this run's network")
        state.restore(content["progress"])
    run = adaptation(args, classes, lists, model, device, state)
    trainer, sampler = run.trainer, run.sampler
    if state.iteration == sampler.total and (args.save_path / "summary.json").is_file():
        if rank == 0:
            print(f"{args.save_path}: this run is complete ({args.epochs} epochs)")
        return
    if content:
        trainer.optimizer.load_state_dict(content["optimizer"])
    if rank == 0:
        groups = args.global_batch // trainer.group
        announce(args, world, sampler.batch, sampler.steps, groups, device)
    if args.dry_run:
        dry_run(run, iter(batches(run.samples, sampler, 0, device)))
    elif rank > 0:
        train(run)
    else:
        train_with_records(run, content.get("logs"))


def adaptation(args: Options, classes, lists: Lists, model, device, state: State) -> Adaptation:
    """What the main loop works with, with the network on its device."""
    rank, world = process_rank()
    samples, batch = training_samples(args, lists), args.batch_per_process
    share = (args.global_batch, batch, rank, world, args.seed)
    sampler = MicroBatches(len(samples), args.epochs, *share, state.iteration)
    model = to_device(model, device, args.channels_last)
    group = losses.loss_group(args.global_batch, args.loss_groups, batch)
    pixels, power = lists.pixels.sum(axis=0), args.class_balance
    weights = losses.class_weights(pixels, power) if power else None
    trainer = Trainer(model, args, device, group, sampler.total, weights)
    return Adaptation(args, classes, lists, trainer, sampler, samples, state)


def measured_apart(args: Options, classes, lists: Lists, device, crop: int) -> tuple:
    """`measured` with another --crop-size, in a process of its own: the peak of a process's memory
    never falls. MemoryError if the kernel ends it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        job = process.submit(measured, replace(args, crop_size=crop), classes, lists, device)
        try:
            return job.result()
        except BrokenProcessPool:
            raise MemoryError(f"already at --crop-size {crop}") from None


def measured(args: Options, classes, lists: Lists, device) -> tuple[float, float, float]:
    """Peak memory in MB (of the GPU, else of this process), seconds of computing and of loading of
    an iteration.
    """
    set_precision(args)
    tune_cpu()
    run = adaptation(args, classes, lists, build_model(args, classes.count), device, State())
    computing, loading, _ = two_iterations(run, iter(batches(run.samples, run.sampler, 0, device)))
    memory = peak_memory_mb(device)
    return memory.get("device_mb", memory["host_mb"]), computing, loading


def train_with_records(run: Adaptation, sizes: dict[str, int] | None) -> None:
    """Process 0's training, with logs, manifest.json and summary.json. sizes: of the logs at the
    checkpoint that the run goes on from.
    """
    args, sampler, iteration = run.args, run.sampler, run.state.iteration
    with contextlib.closing(Logs(args.save_path, sizes, iteration)) as run.logs:
        if iteration:
            print(f"resuming at iteration {iteration} of {sampler.total}")
        else:
            log_header(run.logs, args, sampler.batch, process_rank()[1], run.trainer.model)
        write_manifest(run)
        seconds = train(run)
    write_manifest(run)
    summarise(args, run.state, sampler.total, seconds, run.trainer.device)


if __name__ == "__main__":
    sys.exit(
        run_main(main, "use --batch-per-process 1 or --amp bf16; --dry-run tells what it takes")
    )
