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
         logs' format), metrics.jsonl, TensorBoard events, pictures/, curves.png, manifest.json,
         settings.json, summary.json

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
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.augment import cutmix
from dataset.copy_paste import PARTNERS, RareClassPool
from dataset.samples import MicroBatches, TrainingSamples, batches
from eval import evaluate_checkpoint, figures, summed
from model.checkpoint import load_exactly, read_checkpoint, state_dict_in
from model.deeplabv3plus import DILATIONS, DeepLabV3Plus, channel_dropout, parameter_count
from model.resnet import load_backbone
from util.images import normalised
from util.labels import ClassSet, class_set
from util.losses import (
    balanced_cross_entropy,
    class_weights,
    ohem_cross_entropy,
    pseudo_label_loss,
    total_loss,
)
from util.outputs import atomic_path, check_writable, folder_lock, write_json
from util.parallel import average_running_statistics, distributed, mean_over_processes, to_device
from util.run import (
    UserError,
    exact_mode,
    manifest,
    process_group,
    process_rank,
    run_main,
    seed_everything,
    select_device,
    tune_cpu,
)
from util.run import progress as progress_bar
from util.train_inputs import (
    input_files,
    open_folder,
    read_lists,
    run_settings,
)
from util.train_logs import Logs, announce, dry_run_report, epoch_picture, log_header, summarise
from util.train_options import add_training_options, batch_per_process, check_training_options

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # SGD without Nesterov; batch norm and biases decay too
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
    within such a group, and averaged over groups, as the authors' four processes did. A process
    that has fewer samples at a time (`batch`) than a group makes the groups smaller.
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
    generator = torch.Generator().manual_seed(int(state) >> 1)
    return tuple(
        channel_dropout(generator, 2 * global_batch, c).view(2, global_batch, c, 1, 1)
        for c in channels
    )


def optimizer_of(model: DeepLabV3Plus, args) -> torch.optim.Optimizer:
    """UniMatch's SGD, or AdamW: group 0 the backbone at --lr, group 1 the rest at --lr-multi times
    that.
    """
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"params": list(model.backbone.parameters()), "lr": args.lr},
        {"params": rest, "lr": args.lr * args.lr_multi},
    ]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


class Trainer:
    """The network with its optimizer, and UniMatch's iteration.

    network: what forward and backward go through (DistributedDataParallel, a compiled module or the
    model itself); plain: the same without gradients' averaging; model: the DeepLabV3Plus inside.
    group: samples per loss group. total: iterations of the run. weights: of the classes, for
    --class-balance.
    """

    def __init__(self, model, args, device, group: int, total: int, weights=None):
        self.model, self.args, self.device = model, args, device
        self.group, self.total = group, total
        self.weights = None if weights is None else weights.to(device)
        self.optimizer = optimizer_of(model, args)
        self.plain = model
        if args.compile:
            self.plain = torch.compile(model)
            torch._dynamo.config.optimize_ddp = False  # its splitter fails on `fp_from`, a number
        self.network = distributed(self.plain, device)
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
        def loss(logits, labels):
            if self.weights is not None:
                return balanced_cross_entropy(logits, labels, self.weights)
            return ohem_cross_entropy(logits, labels, self.args.ohem_threshold, self.args.min_kept)

        return self.per_group(loss, pred_x, mask_x)

    def consistency(self, pred: torch.Tensor, target: dict) -> torch.Tensor:
        """The loss of `pred` with pseudo-labels, confidence and padding as targets."""

        def loss(*chunk):
            return pseudo_label_loss(*chunk, self.args.conf_thresh)

        return self.per_group(loss, pred, *(target[n] for n in ("label", "confidence", "ignore")))

    def supervised_losses(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        with self.amp():
            pred_x = self.network(self.images(batch["x"]))
        loss = self.loss_x(pred_x, batch["mask_x"].to(self.device))
        return loss, {"loss_all": loss, "loss_x": loss}, {"pred_x": pred_x}

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
        w = {**with_confidence(pred_w), "ignore": ignore_w}
        target_s1, target_s2 = cutmix_targets(w, mix, box1), cutmix_targets(w, mix, box2)

        loss_x = self.loss_x(pred_x, mask_x)
        loss_s1 = self.consistency(pred_s1, target_s1)
        loss_s2 = self.consistency(pred_s2, target_s2)
        loss_fp = self.consistency(pred_fp, w)
        loss = total_loss(loss_x, loss_s1, loss_s2, loss_fp)

        valid = ~ignore_w
        kept = ((w["confidence"] >= conf_thresh) & valid).sum() / valid.sum().clamp(min=1)
        logged = {
            "loss_all": loss,
            "loss_x": loss_x,
            "loss_s": (loss_s1 + loss_s2) / 2,
            "loss_w_fp": loss_fp,
            "mask_ratio": kept,
        }
        shown = {"pred_x": pred_x, "pred_w": pred_w, "label_s1": target_s1["label"]}
        return loss, logged, shown

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
        factors = None
        if not self.args.supervised:
            c1, _, _, c4 = self.model.backbone.channels
            seed = self.args.seed
            factors = perturbation_factors(seed, iteration, sampler.global_batch, (c1, c4))
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


# -------------------------------------------------------------------------------------------- model


def build_model(args, class_num: int) -> DeepLabV3Plus:
    """DeepLabV3+ with the starting weights that the options name, the rest drawn from --seed."""
    seed_everything(args.seed)
    model = DeepLabV3Plus(
        int(args.backbone.removeprefix("resnet")), class_num, args.stem, DILATIONS
    )
    if args.init_checkpoint:
        state = state_dict_in(read_checkpoint(args.init_checkpoint), args.init_checkpoint)
        wanted = f"DeepLabV3+ with {args.backbone} ({args.stem} stem), {class_num} classes"
        load_exactly(model, state, args.init_checkpoint, wanted)
    else:
        load_backbone(model.backbone, args.backbone_weights)
    return model


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


@dataclass
class Run:
    """What the main loop works with. logs: None but on process 0. val_rows: (image path,
    ground-truth path), empty for no evaluation.
    """

    args: argparse.Namespace
    classes: ClassSet
    trainer: Trainer
    sampler: MicroBatches
    samples: TrainingSamples
    val_rows: list
    progress: Progress
    logs: Logs | None = None


def train(run: Run) -> list[float]:
    """From progress.iteration to the end; returns the seconds of each iteration."""
    args, trainer, sampler = run.args, run.trainer, run.sampler
    progress, logs = run.progress, run.logs
    micro_batches = iter(batches(run.samples, sampler, args.workers, trainer.device))
    length, seconds = sampler.per_epoch, []
    every = max(length // 8, 1)  # UniMatch's rows: eight or nine an epoch
    where = {"total": sampler.total, "initial": progress.iteration}
    with progress_bar(desc="training", unit="it", quiet=logs is None, **where) as bar:
        while progress.iteration < sampler.total:
            epoch, within = divmod(progress.iteration, length)
            if within == 0:
                progress.sums = {}
                if logs:
                    lr = learning_rate(progress.iteration, sampler.total, args.lr)
                    logs.epoch(epoch, lr, progress.best)
            start = time.perf_counter()
            values, shown = trainer.iteration(progress.iteration, micro_batches, sampler)
            seconds.append(time.perf_counter() - start)
            for name, value in values.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            if logs:
                lr = trainer.optimizer.param_groups[0]["lr"]
                logs.train(epoch, within, progress.iteration, {**values, "lr": lr})
                if within % every == 0:
                    logs.row(within, progress.sums)
                loss, best = values["loss_all"], progress.best
                bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}, best {best:.2f}", False)
                bar.update()
            progress.iteration += 1
            if within == length - 1:
                finish_epoch(run, epoch, shown)
            elif logs and args.checkpoint_every and progress.iteration % args.checkpoint_every == 0:
                save_checkpoint(args.save_path / "latest.pth", trainer, progress, epoch, logs)
    return seconds


def finish_epoch(run: Run, epoch: int, shown: dict) -> None:
    """Evaluation, picture and checkpoints at the end of an epoch."""
    args, trainer, progress, logs = run.args, run.trainer, run.progress, run.logs
    last = epoch == args.epochs - 1
    if run.val_rows and ((epoch + 1) % args.eval_every == 0 or last):
        metrics = figures(evaluate(run, run.val_rows), run.classes)
        if logs:
            logs.evaluation(epoch, args.eval_mode, metrics)
        if metrics["miou"] > progress.best:
            progress.best, progress.best_epoch = metrics["miou"], epoch
            if logs:
                save_checkpoint(args.save_path / "best.pth", trainer, progress, epoch, None)
    if logs:
        if args.pictures_every and ((epoch + 1) % args.pictures_every == 0 or last):
            path = args.save_path / "pictures" / f"epoch_{epoch:03d}.png"
            epoch_picture(path, shown, run.classes)
        save_checkpoint(args.save_path / "latest.pth", trainer, progress, epoch, logs)


def evaluate(run: Run, rows) -> np.ndarray:
    """The confusion matrix over `rows` in fp32, so that eval.py gives the same figures."""
    args, trainer = run.args, run.trainer
    how = (run.classes.count, args.eval_mode, args.crop_size, trainer.device, "evaluation")
    trainer.model.eval()
    confusion = evaluate_checkpoint(trainer.model, rows, args.root_path, *how)
    trainer.model.train()
    return summed(confusion, trainer.device)


def dry_run(run: Run) -> None:
    """Two iterations (the second is timed) and one evaluation image; process 0 prints memory and
    the projected time.
    """
    args, trainer, sampler = run.args, run.trainer, run.sampler
    rank, world = process_rank()
    start = time.perf_counter()
    loader = iter(batches(run.samples, sampler, 0, trainer.device))
    micro_batches = list(itertools.islice(loader, sampler.steps))
    loading = time.perf_counter() - start
    for iteration in range(2):
        start = time.perf_counter()
        losses, _ = trainer.iteration(iteration, iter(micro_batches), sampler)
        computing = time.perf_counter() - start
    per_image = None
    if run.val_rows:
        start = time.perf_counter()
        evaluate(run, run.val_rows[:1])
        per_image = time.perf_counter() - start
    images = math.ceil(len(run.val_rows) / world) * math.ceil(args.epochs / args.eval_every)
    counts = (sampler.total, images)
    if rank == 0:
        seconds = (computing, loading, per_image)
        print(dry_run_report(losses, *seconds, *counts, args, trainer.device))


# --------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_options(parser)
    args = parser.parse_args(argv)
    check_training_options(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    classes = class_set(args.class_num, args.stuff, args.things)
    batch = batch_per_process(args, process_rank()[1])
    labeled, unlabeled, val_rows, counts = read_lists(args, classes.count)
    if args.image_cache:
        check_writable(args.image_cache)
    device = select_device(args.device)
    set_precision(args)
    tune_cpu()
    inputs = input_files(args)
    model = build_model(args, classes.count)
    rare = weights = None
    if args.copy_paste:
        partners = PARTNERS.get(classes.count, {})
        rare = RareClassPool(
            labeled, counts, args.root_path, tuple(args.copy_paste_classes), partners
        )
    if args.class_balance:
        weights = class_weights(counts.sum(axis=0), args.class_balance)
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
    with contextlib.nullcontext() if args.dry_run else folder_lock(args.save_path):
        if process_rank()[0] == 0 and not args.dry_run:
            listed = [*itertools.chain(*labeled, *val_rows), *unlabeled]
            open_folder(args, run_settings(args, listed, inputs))
        with process_group(device):
            adapt(args, classes, batch, samples, val_rows, model, device, inputs, weights)


def adapt(args, classes, batch, samples, val_rows, model, device, inputs, weights) -> None:
    """Resume, train, summarise."""
    rank, world = process_rank()
    latest, progress, content = args.save_path / "latest.pth", Progress(), None
    if latest.is_file() and not args.dry_run:
        content = read_checkpoint(latest)
        load_exactly(model, content["model"], latest, "this run's network")
        progress.restore(content["progress"])
    share = (args.global_batch, batch, rank, world, args.seed)
    sampler = MicroBatches(len(samples), args.epochs, *share, progress.iteration)
    if progress.iteration == sampler.total and (args.save_path / "summary.json").is_file():
        if rank == 0:
            print(f"{args.save_path}: this run is complete ({args.epochs} epochs)")
        return
    model = to_device(model, device, args.channels_last)
    group = loss_group(args.global_batch, args.loss_groups, batch)
    trainer = Trainer(model, args, device, group, sampler.total, weights)
    if content:
        trainer.optimizer.load_state_dict(content["optimizer"])
    if rank == 0:
        announce(args, world, batch, sampler.steps, args.global_batch // group, device)
    run = Run(args, classes, trainer, sampler, samples, val_rows, progress)
    if args.dry_run:
        dry_run(run)
    elif rank > 0:
        train(run)
    else:
        sizes = content["logs"] if content else None
        with contextlib.closing(Logs(args.save_path, sizes, progress.iteration)) as run.logs:
            begin_logs(run, inputs)
            seconds = train(run)
        summarise(args, sampler.total, seconds, device)


def begin_logs(run: Run, inputs: dict[str, Path]) -> None:
    """The log's header and the manifest of a new run; a word about one that goes on."""
    args, sampler, model = run.args, run.sampler, run.trainer.model
    if run.progress.iteration:
        print(f"resuming at iteration {run.progress.iteration} of {sampler.total}")
        return
    log_header(run.logs, args, sampler.batch, process_rank()[1], model)
    record = {
        **manifest(vars(args), inputs),
        "iterations_per_epoch": sampler.per_epoch,
        "parameters": parameter_count(model),
    }
    write_json(args.save_path / "manifest.json", record)


if __name__ == "__main__":
    sys.exit(
        run_main(main, "use --batch-per-process 1 or --amp bf16; --dry-run tells what it takes")
    )
