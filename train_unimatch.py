#!/usr/bin/env python
"""Adapt DeepLabV3+ with UniMatch (CVPR 2023) from a labeled and an unlabeled list, or train it on
labels alone.

Inputs   --labeled-id-path     rows `<image path> <label path>`: the images whose corrected labels
         act as ground truth
         --unlabeled-id-path   rows `<image path>` (a second column is not read)
         --val-id-path         optional, rows `<image path> <ground truth>`: evaluated after every
                               epoch, and best.pth kept. The only ground truth that this script
                               opens, and nothing trains on it
         --supervised          no unlabeled list: OHEM cross-entropy on the labeled one (source
                               model, upper bound)
Outputs  in --save-path: latest.pth (resumes), best.pth, train.log (the shipped logs' format),
         metrics.jsonl, TensorBoard events, pictures/, curves.png, manifest.json, settings.json,
         summary.json

    python train_unimatch.py --labeled-id-path splits/cityscapes/DTST_gta_vit_h_scc/labeled.txt \\
        --unlabeled-id-path splits/cityscapes/DTST_gta_vit_h_scc/unlabeled.txt \\
        --val-id-path splits/cityscapes/val.txt --root-path data/cityscapes \\
        --backbone-weights pretrained/resnet101.pth --eval-mode sliding_window --save-path runs/seco
    # the same on four GPUs; the global batch stays 8
    torchrun --nproc_per_node 4 train_unimatch.py …
    # two iterations and one evaluation image: memory and time
    python train_unimatch.py … --dry-run

The defaults are the authors' (Cityscapes logs). Stopped at any moment, the same command goes on
from latest.pth, and ends as if it had never stopped: all random numbers are functions of --seed and
the iteration.

Copied away, this file needs eval.py, model/, dataset/ and util/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import pprint
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.augment import SCALES, cutmix
from dataset.copy_paste import PARTNERS, RARE_CLASSES, RareClassPool
from dataset.samples import AUTHORS_PROCESSES, MicroBatches, TrainingSamples, batches
from eval import MODES, evaluate_checkpoint, figures, summed
from model.checkpoint import load_exactly, read_checkpoint, state_dict_in
from model.deeplabv3plus import DILATIONS, DeepLabV3Plus, channel_dropout, parameter_count
from model.resnet import BLOCKS, STEMS, load_backbone
from util.images import normalised
from util.labels import IGNORE, check_files, check_pairs, class_set, read_label, read_list
from util.losses import (
    OHEM_MIN_KEPT,
    OHEM_THRESHOLD,
    balanced_cross_entropy,
    class_weights,
    ohem_cross_entropy,
    pseudo_label_loss,
    total_loss,
)
from util.options import add_class_options, add_run_options, check_range, check_run_options
from util.pictures import colour_label, contact_sheet, line_chart, save_picture
from util.progress import progress as progress_bar
from util.run import (
    UserError,
    atomic_path,
    check_settings,
    check_writable,
    exact_mode,
    folder_lock,
    manifest,
    peak_memory_mb,
    process_group,
    process_rank,
    remove_leftovers,
    run_main,
    seed_everything,
    select_device,
    sha256,
    tune_cpu,
    write_json,
)
from util.training_log import TEXT_LOSSES, read_metrics_json_lines
from util.training_log import summary as log_summary

MOMENTUM, WEIGHT_DECAY = (
    0.9,
    1e-4,
)  # SGD without Nesterov; batch norm and biases decay too (UniMatch)
POLY_POWER = 0.9
FACTORS = 4  # stream of random numbers, after those of dataset/samples.py


# ----------------------------------------------------------------------------------------- schedule


def learning_rate(iteration: int, total: int, base: float) -> float:
    """Learning rate of training step `iteration` (from 0) of `total`: poly, one step late, as in
    the shipped logs.

    UniMatch sets lr0 (1 - it / total)^0.9 *after* step `it`, so that steps 0 and 1 both use lr0.
    """
    return base * (1 - max(iteration - 1, 0) / total) ** POLY_POWER


def loss_group(global_batch: int, groups: int, batch: int) -> int:
    """Samples that share the losses' pixel counts: OHEM and the means over valid pixels are taken
    within such a group, and averaged over groups, as the authors' four processes did, on any number
    of processes.
    """
    group = global_batch // groups
    return group if batch % group == 0 else math.gcd(group, batch)


# ------------------------------------------------------------------------------------ one iteration


def cutmix_targets(w: dict, mix: dict, box: torch.Tensor) -> dict:
    """Pseudo-labels, confidence and padding of a strong view: those of `w`, and those of `mix`
    inside the box (B x S x S).
    """
    return {name: cutmix(w[name], mix[name], box) for name in ("label", "confidence", "ignore")}


def with_confidence(logits: torch.Tensor) -> dict:
    """Pseudo-labels of logits (B x K x S x S), detached: label and confidence, B x S x S."""
    confidence, label = logits.detach().float().softmax(dim=1).max(dim=1)
    return {"label": label, "confidence": confidence}


def perturbation_factors(seed: int, iteration: int, global_batch: int, channels: tuple[int, int]):
    """Channel factors of an iteration's feature perturbation, drawn for the whole global batch, so
    that they do not depend on its distribution: a pair (c1, c4) of tensors 2 x G x C x 1 x 1,
    [labeled, unlabeled].
    """
    state = np.random.SeedSequence((seed, FACTORS, iteration)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    return tuple(
        channel_dropout(generator, 2 * global_batch, c).view(2, global_batch, c, 1, 1)
        for c in channels
    )


class Trainer:
    """The network with its optimizer, and UniMatch's iteration.

    network: what forward and backward go through (DistributedDataParallel, a compiled module or the
    model itself); model: the DeepLabV3Plus inside. group: samples per loss group. weights: of the
    classes, for --class-balance.
    """

    def __init__(
        self,
        model: nn.Module,
        args,
        device,
        group: int,
        total: int,
        weights: torch.Tensor | None = None,
    ):
        self.weights = None if weights is None else weights.to(device)
        self.model, self.args, self.device, self.group, self.total = (
            model,
            args,
            device,
            group,
            total,
        )
        backbone = list(model.backbone.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
        groups = [
            {"params": backbone, "lr": args.lr},
            {"params": rest, "lr": args.lr * args.lr_multi},
        ]
        self.optimizer = (
            torch.optim.AdamW(groups, lr=args.lr)
            if args.optimizer == "adamw"
            else torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        )
        plain = torch.compile(model) if args.compile else model
        self.plain = self.network = plain
        if process_rank()[1] > 1:
            ddp = nn.parallel.DistributedDataParallel
            # Buffers are equal already (see average_running_statistics); newer versions of torch
            # name the option otherwise.
            option = (
                "forward_sync_buffers"
                if "forward_sync_buffers" in inspect.signature(ddp).parameters
                else "broadcast_buffers"
            )
            self.network = ddp(
                plain,
                device_ids=[device.index] if device.type == "cuda" else None,
                **{option: False},
            )
        model.train()

    def amp(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def images(self, views: torch.Tensor) -> torch.Tensor:
        images = normalised(views.to(self.device, non_blocking=True))
        return images if self.args.channels_last else images.contiguous()

    def per_group(self, loss, *tensors) -> torch.Tensor:
        """The mean of loss(chunk of each tensor) over the loss groups."""
        chunks = zip(*(tensor.split(self.group) for tensor in tensors))
        return torch.stack([loss(*chunk) for chunk in chunks]).mean()

    def loss_x(self, pred_x: torch.Tensor, mask_x: torch.Tensor) -> torch.Tensor:
        if self.weights is not None:
            return self.per_group(
                lambda p, m: balanced_cross_entropy(p, m, self.weights), pred_x, mask_x
            )
        return self.per_group(
            lambda p, m: ohem_cross_entropy(p, m, self.args.ohem_threshold, self.args.min_kept),
            pred_x,
            mask_x,
        )

    def supervised_losses(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        with self.amp():
            pred_x = self.network(self.images(batch["x"]))
        loss = self.loss_x(pred_x, batch["mask_x"].to(self.device))
        return loss, {"loss_all": loss, "loss_x": loss}, {"pred_x": pred_x}

    def unimatch_losses(self, batch: dict, factors) -> tuple[torch.Tensor, dict, dict]:
        """Section "one iteration" of UniMatch's released code.

        batch: dataset.samples.TrainingSamples' items, stacked. factors: pair (c1, c4) of 2B x C x 1
        x 1, for [x; w]. Returns the loss, the logged values and what the pictures show.
        """
        count = len(batch["x"])
        mask_x, box1, box2, ignore_w, ignore_mix = (
            batch[name].to(self.device, non_blocking=True)
            for name in ("mask_x", "box1", "box2", "ignore", "ignore_mix")
        )
        mix = self.mix_pseudo_labels(
            batch["w_mix"], (box1 | box2).flatten(1).any(dim=1)
        )  # forward A
        mix["ignore"] = ignore_mix
        with self.amp():
            images = self.images(torch.cat([batch["x"], batch["w"]]))
            logits, pred_fp = self.network(
                images, tuple(f.to(self.device) for f in factors), fp_from=count
            )  # forward B
            pred_s = self.network(self.images(torch.cat([batch["s1"], batch["s2"]])))  # forward C
        (pred_x, pred_w), (pred_s1, pred_s2) = logits.chunk(2), pred_s.chunk(2)
        w = {**with_confidence(pred_w), "ignore": ignore_w}

        def consistency(pred, target):
            return self.per_group(
                lambda *chunk: pseudo_label_loss(*chunk, self.args.conf_thresh),
                pred,
                target["label"],
                target["confidence"],
                target["ignore"],
            )

        target_s1 = cutmix_targets(w, mix, box1)
        loss_x = self.loss_x(pred_x, mask_x)
        loss_s1, loss_s2 = (
            consistency(pred_s1, target_s1),
            consistency(pred_s2, cutmix_targets(w, mix, box2)),
        )
        loss_fp = consistency(pred_fp, w)
        loss = total_loss(loss_x, loss_s1, loss_s2, loss_fp)
        kept = ((w["confidence"] >= self.args.conf_thresh) & ~ignore_w).sum() / (
            ~ignore_w
        ).sum().clamp(min=1)
        return (
            loss,
            {
                "loss_all": loss,
                "loss_x": loss_x,
                "loss_s": (loss_s1 + loss_s2) / 2,
                "loss_w_fp": loss_fp,
                "mask_ratio": kept,
            },
            {"pred_x": pred_x, "pred_w": pred_w, "label_s1": target_s1["label"]},
        )

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
                found = with_confidence(self.plain(self.images(w_mix[needed.cpu()])))
            self.model.train()
            for name, values in found.items():
                mix[name][needed] = values
        return mix

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
        values: dict[str, torch.Tensor] = {}
        factors = None
        if not self.args.supervised:
            channels = self.model.backbone.channels
            factors = perturbation_factors(
                self.args.seed, iteration, sampler.global_batch, (channels[0], channels[3])
            )
        for number in range(sampler.steps):
            batch = next(micro_batches)
            last = number == sampler.steps - 1
            waiting = (
                contextlib.nullcontext()
                if last or self.network is self.plain
                else self.network.no_sync()
            )
            with waiting:
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
                " labels; latest.pth holds the last good state"
            )
        if step:
            self.optimizer.step()
        if self.device.type != "cuda":
            average_running_statistics(self.model)
        return logged, {**shown, "batch": batch}


def average_running_statistics(model: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics of batch norm, which only
    GPUs synchronise by themselves: what process 0 saves and what each evaluates or pastes with are
    then the same.
    """
    if process_rank()[1] == 1:
        return
    import torch.distributed as dist

    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    together = torch.cat([buffer.flatten() for buffer in running])
    dist.all_reduce(together)
    together /= process_rank()[1]
    for buffer, values in zip(running, together.split([buffer.numel() for buffer in running])):
        buffer.copy_(values.view_as(buffer))


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    stacked = torch.stack(list(values.values())).float()
    if process_rank()[1] > 1:
        import torch.distributed as dist

        dist.all_reduce(stacked)
        stacked /= process_rank()[1]
    return dict(zip(values, stacked.tolist()))


# --------------------------------------------------------------------------------------------- logs


class Logs:
    """train.log, metrics.jsonl and TensorBoard events of process 0.

    `sizes` goes into checkpoints. Resuming cuts the files back to the sizes at the checkpoint and
    removes event files begun after it, so that nothing is there twice.
    """

    FILES = ("train.log", "metrics.jsonl")
    EVENTS = "events.out.tfevents.*"

    def __init__(self, folder: Path, sizes: dict[str, int] | None, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        for name in self.FILES:
            path = folder / name
            path.touch()
            cut_back(path, (sizes or {}).get(name, 0))
        for path in folder.glob(self.EVENTS) if sizes else ():
            if path.name in sizes:
                cut_back(path, sizes[path.name])
            else:
                path.unlink()
        self.json_lines = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        self.handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("[%(asctime)s][%(levelname)8s] %(message)s"))
        self.text = logging.getLogger(f"train_unimatch.{folder}")
        self.text.handlers, self.text.propagate = [self.handler], False
        self.text.setLevel(logging.INFO)
        self.events = SummaryWriter(str(folder), purge_step=iteration)

    def sizes(self) -> dict[str, int]:
        self.events.flush()  # what comes before a checkpoint must outlive a kill after it
        events = [path.name for path in self.folder.glob(self.EVENTS)]
        return {name: (self.folder / name).stat().st_size for name in (*self.FILES, *events)}

    def train(self, epoch: int, within: int, iteration: int, values: dict[str, float]) -> None:
        tags = {f"train/{name}": value for name, value in values.items()}
        for tag, value in tags.items():
            self.events.add_scalar(tag, value, iteration)
        self.json_lines.write(json.dumps({"epoch": epoch, "iteration": within, **tags}) + "\n")

    def row(self, within: int, means: dict[str, float]) -> None:
        self.text.info(
            f"Iters: {within}, "
            + ", ".join(
                f"{title}: {means[name]:.3f}"
                for title, name in TEXT_LOSSES.items()
                if name in means
            )
        )

    def evaluation(self, epoch: int, mode: str, metrics: dict) -> None:
        ious = {name: value or 0.0 for name, value in metrics["iou"].items()}
        for number, (name, value) in enumerate(ious.items()):
            self.text.info(f"***** Evaluation ***** >>>> Class [{number} {name}] IoU: {value:.2f}")
        self.text.info(f"***** Evaluation {mode} ***** >>>> MeanIoU: {metrics['miou']:.2f}\n")
        tags = {
            "eval/mIoU": metrics["miou"],
            **{f"eval/{name}_IoU": value for name, value in ious.items()},
        }
        for tag, value in tags.items():
            self.events.add_scalar(tag, value, epoch)
        self.json_lines.write(json.dumps({"epoch": epoch, "eval_mode": mode, **tags}) + "\n")

    def close(self) -> None:
        self.json_lines.close()
        self.handler.close()
        self.events.close()


def cut_back(path: Path, size: int) -> None:
    os.truncate(path, min(size, path.stat().st_size))


def epoch_picture(path: Path, shown: dict, classes, samples: int = 3) -> None:
    """Views, labels and predictions of an iteration's first samples, one a row."""

    def label(values, row):
        return colour_label(values[row].detach().to(torch.uint8).cpu().numpy(), classes.palette)

    def prediction(logits, row):
        return colour_label(
            logits[row].detach().argmax(dim=0).to(torch.uint8).cpu().numpy(), classes.palette
        )

    batch = shown["batch"]
    titles, rows = ["img_x", "label", "prediction"], []
    for row in range(min(samples, len(batch["x"]))):
        panels = [
            batch["x"][row].numpy(),
            label(batch["mask_x"], row),
            prediction(shown["pred_x"], row),
        ]
        if "w" in batch:
            panels += [
                batch["w"][row].numpy(),
                prediction(shown["pred_w"], row),
                batch["s1"][row].numpy(),
                label(shown["label_s1"], row),
            ]
        rows.append(panels)
    if "w" in batch:
        titles += ["img_u_w", "pseudo-label", "img_u_s1", "its labels"]
    save_picture(path, contact_sheet(rows, titles, legend=classes, cell_width=192))


def curves_picture(path: Path, log) -> None:
    """mIoU after each epoch, or the mean loss of each where nothing was evaluated."""
    if log.miou:
        series, label = (
            {"validation": ([e + 1 for e in log.epochs], [log.miou[e] for e in log.epochs])},
            "mIoU (%)",
        )
    else:
        means = {
            epoch + 1: values["loss_all"] for epoch, _, values in log.losses
        }  # the running mean at each epoch's end
        series = {"loss_all": (list(means), list(means.values()))}
        label = "mean loss of the epoch"
    save_picture(path, line_chart(series, "", "epoch", label))


# ------------------------------------------------------------------------------ checks and settings


def label_pixel_counts(
    rows: list[tuple[str, str]], root: Path, class_num: int, list_path: Path
) -> np.ndarray:
    """Pixels per class of each label map, int64 len(rows) x class_num; none at all is an error."""
    with ThreadPoolExecutor() as pool:
        labels = pool.map(lambda row: read_label(root / row[1], class_num), rows)
        counts = [np.bincount(label.ravel(), minlength=256)[:class_num] for label in labels]
    if not np.any(counts):
        raise UserError(
            f"{list_path}: no label map of it has a labeled pixel; nothing can be learned"
        )
    return np.array(counts, dtype=np.int64)


def read_lists(args, class_num: int) -> tuple[list, list, list]:
    """Rows of the labeled, the unlabeled (image paths) and the validation list, with all that they
    name checked. Evaluation needs ground truth in its image's size; a training label may be smaller
    or larger.
    """
    labeled = read_list(args.labeled_id_path)
    unlabeled, validation = [], []
    if args.unlabeled_id_path:
        unlabeled = [row[0] for row in read_list(args.unlabeled_id_path, (1, 2))]
    both = {image for image, _ in labeled}.intersection(unlabeled)
    if both:
        raise UserError(
            f"{min(both)}: in {args.labeled_id_path} and in {args.unlabeled_id_path}; each image"
            " is in one of the two, make both with scripts/make_split.py"
        )
    if args.val_id_path:
        validation = read_list(args.val_id_path)
    check_files(args.root_path, unlabeled, args.unlabeled_id_path)
    if validation:
        check_pairs(args.root_path, validation, args.val_id_path, class_num, same_size=True)
    check_pairs(args.root_path, labeled, args.labeled_id_path, class_num)
    return labeled, unlabeled, validation


RESULTS = ("latest.pth", "best.pth", "summary.json")  # a folder with one of them holds a run

# What a run is: changing one of these in a folder that holds a run is an error. Others (workers,
# pictures, processes) may change.
SETTINGS = (
    "supervised",
    "class_num",
    "backbone",
    "stem",
    "crop_size",
    "global_batch",
    "loss_groups",
    "epochs",
    "lr",
    "lr_multi",
    "ohem_threshold",
    "min_kept",
    "conf_thresh",
    "amp",
    "seed",
    "copy_paste",
    "copy_paste_classes",
    "eval_mode",
    "eval_every",
    "optimizer",
    "class_balance",
    "scales",
    "photometric",
)


def run_settings(args, counts: np.ndarray, inputs: dict[str, Path]) -> dict:
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["label_pixels_sha256"] = hashlib.sha256(counts.tobytes()).hexdigest()
    for name, path in inputs.items():
        settings[f"{name}_sha256"] = sha256(path)
    return settings


def batch_per_process(args, world: int) -> int:
    """Samples per process and accumulation step, checked."""
    if args.global_batch % world:
        raise UserError(
            f"--global-batch {args.global_batch}: it must be a multiple of the number of processes,"
            f" {world}"
        )
    share = args.global_batch // world
    batch = args.batch_per_process or share
    if share % batch:
        raise UserError(
            f"--batch-per-process {batch}: {share} samples of the global batch fall to each of"
            f" {world} processes; give a divisor of {share}"
        )
    if args.global_batch % args.loss_groups:
        raise UserError(
            f"--loss-groups {args.loss_groups}: it must divide --global-batch {args.global_batch}"
        )
    if args.supervised and batch == 1:
        raise UserError(
            "--supervised with one sample per process and step: batch norm needs two or more; "
            "raise --global-batch or --batch-per-process"
        )
    return batch


def announce(args, world: int, batch: int, steps: int, device) -> None:
    print(
        f"global batch {args.global_batch} = {world} process{'es' if world > 1 else ''} x {batch}"
        f" samples x {steps} accumulation step{'s' if steps > 1 else ''}; losses are normalised in"
        f" {args.loss_groups} groups"
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


def build_model(args, class_num: int) -> DeepLabV3Plus:
    seed_everything(args.seed)
    model = DeepLabV3Plus(
        int(args.backbone.removeprefix("resnet")), class_num, args.stem, DILATIONS
    )
    if args.init_checkpoint:
        load_exactly(
            model,
            state_dict_in(read_checkpoint(args.init_checkpoint), args.init_checkpoint),
            args.init_checkpoint,
            f"DeepLabV3+ with {args.backbone} ({args.stem} stem), {class_num} classes",
        )
    else:
        load_backbone(model.backbone, args.backbone_weights)
    return model


def to_device(model: nn.Module, args, device, world: int) -> nn.Module:
    model = model.to(
        device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format
    )
    return (
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if world > 1 and device.type == "cuda"
        else model
    )


def set_precision(args) -> None:
    """Exact fp32 unless asked otherwise."""
    exact_mode()
    if args.amp != "none" or args.compile:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    if args.amp == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


# ---------------------------------------------------------------------------------------- main loop


class Progress:
    """Where a run stands: the next iteration, best mIoU, sums of the running epoch's losses."""

    def __init__(self):
        self.iteration, self.best, self.best_epoch, self.sums = 0, 0.0, -1, {}

    def state(self) -> dict:
        return dict(vars(self))

    def restore(self, state: dict) -> None:
        vars(self).update(state)


def save_checkpoint(
    path: Path, trainer: Trainer, progress: Progress, epoch: int, logs: Logs | None
) -> None:
    """latest.pth with all that resuming needs; without `logs`, the model alone (best.pth)."""
    content = {"model": trainer.model.state_dict(), "config": trainer.model.config, "epoch": epoch}
    if logs is not None:
        content.update(
            optimizer=trainer.optimizer.state_dict(), progress=progress.state(), logs=logs.sizes()
        )
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def train(
    trainer: Trainer,
    sampler: MicroBatches,
    samples: TrainingSamples,
    progress: Progress,
    logs: Logs | None,
    args,
    classes,
    val_rows,
) -> list[float]:
    """From progress.iteration to the end; returns the seconds of each iteration. `logs` is None but
    on process 0.
    """
    micro_batches = iter(batches(samples, sampler, args.workers, trainer.device))
    length, seconds = sampler.per_epoch, []
    every = max(length // 8, 1)  # UniMatch's rows: eight or nine an epoch
    shown = None
    with progress_bar(
        desc="training",
        total=sampler.total,
        unit="it",
        quiet=logs is None,
        initial=progress.iteration,
    ) as bar:
        while progress.iteration < sampler.total:
            epoch, within = divmod(progress.iteration, length)
            if within == 0:
                progress.sums = {}
                if logs:
                    lr = learning_rate(progress.iteration, sampler.total, args.lr)
                    logs.text.info(
                        f"===========> Epoch: {epoch}, LR: {lr:.5f}, Previous best:"
                        f" {progress.best:.2f}"
                    )
            start = time.perf_counter()
            values, shown = trainer.iteration(progress.iteration, micro_batches, sampler)
            seconds.append(time.perf_counter() - start)
            progress.sums = {
                name: progress.sums.get(name, 0.0) + value for name, value in values.items()
            }
            if logs:
                logs.train(
                    epoch,
                    within,
                    progress.iteration,
                    {**values, "lr": trainer.optimizer.param_groups[0]["lr"]},
                )
                if within % every == 0:
                    logs.row(
                        within,
                        {name: total / (within + 1) for name, total in progress.sums.items()},
                    )
                bar.set_postfix_str(
                    f"epoch {epoch}, loss {values['loss_all']:.3f}, best {progress.best:.2f}",
                    refresh=False,
                )
                bar.update()
            progress.iteration += 1
            if within == length - 1:
                finish_epoch(trainer, progress, logs, args, classes, val_rows, epoch, shown)
            elif logs and args.checkpoint_every and progress.iteration % args.checkpoint_every == 0:
                save_checkpoint(args.save_path / "latest.pth", trainer, progress, epoch, logs)
    return seconds


def finish_epoch(
    trainer: Trainer,
    progress: Progress,
    logs: Logs | None,
    args,
    classes,
    val_rows,
    epoch: int,
    shown: dict,
) -> None:
    """Evaluation, picture and checkpoints at the end of an epoch."""
    last = epoch == args.epochs - 1
    if val_rows and ((epoch + 1) % args.eval_every == 0 or last):
        metrics = figures(evaluate(trainer, args, classes, val_rows), classes)
        if logs:
            logs.evaluation(epoch, args.eval_mode, metrics)
        if metrics["miou"] > progress.best:
            progress.best, progress.best_epoch = metrics["miou"], epoch
            if logs:
                save_checkpoint(args.save_path / "best.pth", trainer, progress, epoch, None)
    if logs:
        if args.pictures_every and ((epoch + 1) % args.pictures_every == 0 or last):
            epoch_picture(
                args.save_path / "pictures" / f"epoch_{epoch + 1:03d}.png", shown, classes
            )
        save_checkpoint(args.save_path / "latest.pth", trainer, progress, epoch, logs)


def evaluate(trainer: Trainer, args, classes, rows) -> np.ndarray:
    """The confusion matrix over `rows` in fp32, so that eval.py gives the same figures."""
    trainer.model.eval()
    confusion = evaluate_checkpoint(
        trainer.model,
        rows,
        args.root_path,
        classes.count,
        args.eval_mode,
        args.crop_size,
        trainer.device,
        "evaluation",
    )
    trainer.model.train()
    return summed(confusion, trainer.device)


def dry_run(
    trainer: Trainer, sampler: MicroBatches, samples: TrainingSamples, args, classes, val_rows
) -> None:
    """Two iterations (the second is timed) and one evaluation image; process 0 prints memory and
    the projected time.
    """
    rank, world = process_rank()
    start = time.perf_counter()
    micro_batches = list(
        itertools.islice(iter(batches(samples, sampler, 0, trainer.device)), sampler.steps)
    )
    loading = time.perf_counter() - start
    for iteration in range(2):
        start = time.perf_counter()
        values, _ = trainer.iteration(iteration, iter(micro_batches), sampler)
        computing = time.perf_counter() - start
    per_iteration = max(computing, loading / args.workers) if args.workers else computing + loading
    lines = [
        "losses after two iterations:"
        f" {', '.join(f'{name} {value:.3f}' for name, value in values.items())}"
    ]
    hours = per_iteration * sampler.total / 3600
    if val_rows:
        start = time.perf_counter()
        evaluate(trainer, args, classes, val_rows[:1])
        per_image = time.perf_counter() - start
        hours += (
            per_image
            * math.ceil(len(val_rows) / world)
            * math.ceil(args.epochs / args.eval_every)
            / 3600
        )
        lines.append(f"evaluation, {args.eval_mode}: {per_image:.2f} s an image")
    lines += [
        (
            f"an iteration: {computing:.2f} s computing; loading its samples takes {loading:.2f} s"
            f" in one process, {args.workers} do it meanwhile"
            if args.workers
            else (
                f"an iteration: {computing:.2f} s computing and, with --workers 0, {loading:.2f} s"
                " loading"
            )
        ),
        (
            f"projected time of {sampler.total} iterations{' and evaluations' if val_rows else ''}:"
            f" {hours:.1f} h"
        ),
        "peak memory of process 0: "
        + ", ".join(
            f"{name.removesuffix('_mb')} {value:.0f} MB"
            for name, value in peak_memory_mb(trainer.device).items()
        ),
    ]
    if rank == 0:
        print("\n".join(lines))


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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--labeled-id-path",
        type=Path,
        required=True,
        metavar="LIST",
        help="images and labels to learn from",
    )
    add(
        "--unlabeled-id-path",
        type=Path,
        metavar="LIST",
        help="images without labels; needed unless --supervised",
    )
    add(
        "--val-id-path",
        type=Path,
        metavar="LIST",
        help="images and ground truth, evaluated after epochs (default: none)",
    )
    add(
        "--root-path",
        type=Path,
        default=Path("data"),
        help="folder the lists' paths start from (default: data)",
    )
    add(
        "--save-path",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="outputs; an unfinished run there goes on",
    )
    add("--supervised", action="store_true", help="train on the labeled list alone")
    add(
        "--photometric",
        action="store_true",
        help=(
            "with --supervised: colour jitter, grey and blur as in the strong views, for a source"
            " model less bound to its domain's colours"
        ),
    )
    add_class_options(parser)
    network = parser.add_argument_group("network")
    add = network.add_argument
    add(
        "--backbone",
        default="resnet101",
        choices=[f"resnet{d}" for d in BLOCKS],
        help="(default: resnet101)",
    )
    add(
        "--stem",
        default="deep",
        choices=STEMS,
        help="deep: UniMatch's; torchvision: for its ImageNet weights (default: deep)",
    )
    add(
        "--backbone-weights",
        default="none",
        metavar="none|imagenet|FILE",
        help=(
            "start of the backbone; the authors' is UniMatch's pretrained/resnet101.pth (default:"
            " none, random)"
        ),
    )
    add(
        "--init-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from this whole network, e.g. the source model",
    )
    recipe = parser.add_argument_group("recipe (defaults: the authors' Cityscapes runs)")
    add = recipe.add_argument
    add(
        "--crop-size",
        type=int,
        default=769,
        metavar="PIXELS",
        help="side of training crops and of windows, >= 33 (default: 769)",
    )
    add(
        "--global-batch",
        type=int,
        default=8,
        metavar="N",
        help="labeled samples an iteration, over all processes; as many unlabeled (default: 8)",
    )
    add(
        "--batch-per-process",
        type=int,
        metavar="N",
        help=(
            "samples per process at a time; fewer than its share accumulates gradients (default:"
            " its share)"
        ),
    )
    add(
        "--loss-groups",
        type=int,
        metavar="N",
        help=(
            "groups of samples of the global batch within which pixels are counted (OHEM, means);"
            " default: 4, the authors' GPUs, or the largest of 4, 2, 1 that divides --global-batch"
        ),
    )
    add(
        "--epochs",
        type=int,
        default=240,
        metavar="N",
        help="passes over the unlabeled list (default: 240)",
    )
    add(
        "--lr",
        type=float,
        default=0.005,
        help="starting learning rate of the backbone (default: 0.005)",
    )
    add(
        "--lr-multi",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="learning rate of the rest / --lr (default: 1.0)",
    )
    add(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="adamw learns faster from random weights; UniMatch's is sgd (default: sgd)",
    )
    add(
        "--scales",
        type=float,
        nargs=2,
        default=SCALES,
        metavar=("LEAST", "MOST"),
        help=(
            "range of the random resizing before cropping, as factors of the image's size (default:"
            " 0.5 2)"
        ),
    )
    add(
        "--class-balance",
        type=float,
        default=0.0,
        metavar="POWER",
        help=(
            "the labels' loss is cross-entropy with class weights frequency^-POWER, instead of OHEM"
            " (default: 0, OHEM)"
        ),
    )
    add(
        "--ohem-threshold",
        type=float,
        default=OHEM_THRESHOLD,
        metavar="P",
        help="pixels less sure than this are hard, 0 to 1 (default: 0.7)",
    )
    add(
        "--min-kept",
        type=int,
        default=OHEM_MIN_KEPT,
        metavar="PIXELS",
        help=(
            "least hard pixels per loss group; with fewer labeled ones all count (default: 200000)"
        ),
    )
    add(
        "--conf-thresh",
        type=float,
        default=0.0,
        metavar="P",
        help="least confidence of a pseudo-label that counts, 0 to 1 (default: 0, all count)",
    )
    add(
        "--copy-paste",
        action="store_true",
        help="paste objects of rare classes of the labeled list into labeled crops",
    )
    add(
        "--copy-paste-classes",
        type=int,
        nargs="+",
        metavar="ID",
        help="train IDs of the rare classes (default: DT-ST's, known for 16 and 19 classes)",
    )
    running = parser.add_argument_group("running")
    add = running.add_argument
    add(
        "--eval-mode",
        choices=MODES,
        default="original",
        help=(
            "the shipped GTA log has sliding_window, SYNTHIA's and BDD's original (default:"
            " original)"
        ),
    )
    add(
        "--eval-every",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="evaluate every so many epochs and at the end (default: 1)",
    )
    add(
        "--checkpoint-every",
        type=int,
        default=200,
        metavar="ITERATIONS",
        help="latest.pth within epochs as well; 0: only after epochs (default: 200)",
    )
    add(
        "--pictures-every",
        type=int,
        default=10,
        metavar="EPOCHS",
        help="views and predictions as a picture; 0: never (default: 10)",
    )
    add(
        "--workers",
        type=int,
        default=4,
        metavar="N",
        help=(
            "data-loading processes per process; results do not depend on it (default: 4; 0: none)"
        ),
    )
    add(
        "--image-cache",
        type=Path,
        metavar="FOLDER",
        help=(
            "keep decoded images here (6 MB for 2048x1024, 19 GB for Cityscapes): data loads"
            " several times faster"
        ),
    )
    add(
        "--amp",
        choices=("none", "tf32", "bf16"),
        default="none",
        help="none is exact fp32 (default); bf16 is faster, on CPUs too",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="memory layout that convolutions in bf16 prefer (default: with --amp bf16)",
    )
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--dry-run",
        action="store_true",
        help="two iterations and one evaluation image; reports memory and time, saves nothing",
    )
    add_run_options(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = options().parse_args(argv)
    if args.supervised == bool(args.unlabeled_id_path):
        raise UserError(
            "--unlabeled-id-path: UniMatch needs it, --supervised excludes it; give one of the two"
        )
    if args.photometric and not args.supervised:
        raise UserError(
            "--photometric: only with --supervised; UniMatch's labeled images stay as they are"
        )
    check_run_options(args)
    check_range(args, "crop_size", least=33)
    check_range(args, "epochs", "eval_every", "min_kept", "global_batch", least=1)
    check_range(args, "batch_per_process", "loss_groups", least=1)
    check_range(args, "workers", "checkpoint_every", "pictures_every", "lr_multi", least=0)
    check_range(args, "lr", "scales", above=0)
    check_range(args, "ohem_threshold", "conf_thresh", "class_balance", least=0, most=1)
    check_range(args, "copy_paste_classes", least=0, most=args.class_num - 1)
    if args.scales[0] > args.scales[1]:
        raise UserError(
            f"--scales {args.scales[0]:g} {args.scales[1]:g}: give the smaller factor first"
        )
    args.scales = list(args.scales)  # as settings.json gives it back
    if args.channels_last is None:
        args.channels_last = args.amp == "bf16"
    if args.loss_groups is None:
        args.loss_groups = math.gcd(AUTHORS_PROCESSES, args.global_batch)
    if args.copy_paste and not args.copy_paste_classes:
        if args.class_num not in RARE_CLASSES:
            raise UserError(
                "--copy-paste: rare classes are known for 16 and 19 classes; name yours with"
                " --copy-paste-classes"
            )
        args.copy_paste_classes = list(RARE_CLASSES[args.class_num])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world = process_rank()
    classes = class_set(args.class_num, args.stuff, args.things)
    batch = batch_per_process(args, world)
    labeled, unlabeled, val_rows = read_lists(args, classes.count)
    if args.image_cache:
        check_writable(args.image_cache)
    device = select_device(args.device)
    set_precision(args)
    tune_cpu()
    counts = label_pixel_counts(labeled, args.root_path, classes.count, args.labeled_id_path)
    inputs = {
        "labeled": args.labeled_id_path,
        "unlabeled": args.unlabeled_id_path,
        "val": args.val_id_path,
        "init_checkpoint": args.init_checkpoint,
        "backbone_weights": (
            None if args.backbone_weights in ("none", "imagenet") else Path(args.backbone_weights)
        ),
    }
    inputs = {name: path for name, path in inputs.items() if path}
    model = build_model(args, classes.count)
    rare = (
        RareClassPool(
            labeled,
            counts,
            args.root_path,
            tuple(args.copy_paste_classes),
            PARTNERS.get(classes.count, {}),
        )
        if args.copy_paste
        else None
    )
    samples = TrainingSamples(
        labeled,
        unlabeled,
        args.root_path,
        args.crop_size,
        args.seed,
        rare,
        args.image_cache,
        args.scales,
        args.photometric,
    )
    weights = class_weights(counts.sum(axis=0), args.class_balance) if args.class_balance else None
    lock = contextlib.nullcontext() if args.dry_run else folder_lock(args.save_path)
    with lock:
        if rank == 0 and not args.dry_run:
            open_folder(args, run_settings(args, counts, inputs))
        with process_group(device):
            run(args, classes, batch, samples, val_rows, model, device, inputs, weights)


def open_folder(args, settings: dict) -> None:
    """Make --save-path ready: a run of other settings there is an error, a failed start is not."""
    check_settings(
        args.save_path / "settings.json",
        settings,
        "a run with",
        "choose another --save-path, or remove that folder",
        begun=any((args.save_path / name).is_file() for name in RESULTS),
    )
    remove_leftovers(args.save_path)


def run(
    args,
    classes,
    batch: int,
    samples: TrainingSamples,
    val_rows,
    model: nn.Module,
    device,
    inputs,
    weights: torch.Tensor | None,
) -> None:
    """Resume, train, summarise."""
    rank, world = process_rank()
    latest, progress, content = args.save_path / "latest.pth", Progress(), None
    if latest.is_file() and not args.dry_run:
        content = read_checkpoint(latest)
        load_exactly(model, content["model"], latest, "this run's network")
        progress.restore(content["progress"])
    sampler = MicroBatches(
        len(samples),
        args.epochs,
        args.global_batch,
        batch,
        rank,
        world,
        args.seed,
        progress.iteration,
    )
    if (
        content
        and progress.iteration == sampler.total
        and (args.save_path / "summary.json").is_file()
    ):
        if rank == 0:
            print(f"{args.save_path}: this run is complete ({args.epochs} epochs)")
        return
    trainer = Trainer(
        to_device(model, args, device, world),
        args,
        device,
        loss_group(args.global_batch, args.loss_groups, batch),
        sampler.total,
        weights,
    )
    if content:
        trainer.optimizer.load_state_dict(content["optimizer"])
    if rank == 0:
        announce(args, world, batch, sampler.steps, device)
    if args.dry_run:
        dry_run(trainer, sampler, samples, args, classes, val_rows)
        return
    logs = None
    if rank == 0:
        logs = Logs(args.save_path, content and content["logs"], progress.iteration)
        if content:
            print(f"resuming at iteration {progress.iteration} of {sampler.total}")
        else:
            log_header(logs, args, batch, world, model)
            write_json(
                args.save_path / "manifest.json",
                {
                    **manifest(vars(args), inputs),
                    "iterations_per_epoch": sampler.per_epoch,
                    "parameters": parameter_count(model),
                },
            )
    seconds = train(trainer, sampler, samples, progress, logs, args, classes, val_rows)
    if logs:
        logs.close()
        summarise(args, sampler, seconds, device)


def summarise(args, sampler: MicroBatches, seconds: list[float], device) -> None:
    """summary.json and curves.png from metrics.jsonl; the headline is the last epoch, not the
    best.
    """
    log = read_metrics_json_lines(args.save_path / "metrics.jsonl")
    curves_picture(args.save_path / "curves.png", log)
    record = {
        "epochs": args.epochs,
        "iterations": sampler.total,
        "mIoU": {**log_summary(log), "eval_mode": args.eval_mode} if log.miou else None,
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "peak_memory": peak_memory_mb(device),
    }
    write_json(args.save_path / "summary.json", record)
    if record["mIoU"]:
        m = record["mIoU"]
        print(
            f"mIoU ({args.eval_mode}): last {m['last']:.2f}, mean of the last"
            f" {min(20, m['evaluations'])} evaluations {m['last_mean']:.2f}, best {m['best']:.2f}"
            f" (epoch {m['best_epoch']})"
        )
    print(f"{args.save_path / 'latest.pth'}: trained for {sampler.total} iterations")


if __name__ == "__main__":
    sys.exit(run_main(main))
