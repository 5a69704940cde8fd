#!/usr/bin/env python
"""Seconds and peak memory of a UniMatch training step, in every precision, beside a plain
implementation, in one run.

    python -m scripts.dev.bench_train --backbone resnet18 --crop-size 192 --batch 4            a CPU
    # a GPU: the authors' step
    python -m scripts.dev.bench_train --batch 2 --out bench.json

Random images and labels, so data loading is left out. "plain" follows UniMatch's released step
literally (perturbed features of all images decoded, classified and upsampled; pseudo-labels of all
images to paste from; targets copied pixel by pixel through masks; OHEM by sorting); the others are
train_unimatch.py's, whose losses and gradients are the same (tests/test_unimatch.py). Variants take
turns, so that other load on the machine hits all alike; medians are shown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import train_unimatch
from dataset.augment import cutmix_box
from util.images import normalised
from util.labels import IGNORE
from util.options import add_run_options, check_range, check_run_options
from util.run import peak_memory_mb, run_main, select_device, write_json

VARIANTS = {
    "plain fp32": [],
    "fp32": [],
    "tf32": ["--amp", "tf32"],
    "fp32 channels-last": ["--channels-last"],
    "bf16": ["--amp", "bf16", "--no-channels-last"],
    "bf16 channels-last": ["--amp", "bf16"],
    "bf16 channels-last compile": ["--amp", "bf16", "--compile"],
}
# Of the shipped GTA run (233 to 239 iterations an epoch).
EPOCHS, ITERATIONS, GLOBAL_BATCH = 240, 235, 8


# ------------------------------------------------------------------------ the step, written plainly


def ohem_by_sorting(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float, min_kept: int
) -> torch.Tensor:
    """OHEM as the released code words it: sort the true classes' probabilities, take the
    min_kept-th as least threshold.
    """
    labels = labels.long()
    valid = labels != IGNORE
    losses = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if valid.sum() == 0:
        return (logits * 0).sum()
    if valid.sum() < min_kept:
        return losses[valid].mean()
    of_true_class = logits.softmax(dim=1).gather(1, labels.masked_fill(~valid, 0)[:, None])[:, 0]
    of_true_class = of_true_class.masked_fill(~valid, 1.0)
    ranked = of_true_class.flatten().sort().values
    limit = max(threshold, ranked[min(ranked.numel(), min_kept) - 1].item())
    return losses[valid & (of_true_class <= limit)].mean()


def plain_losses(model, batch: dict, factors, args, group: int) -> dict[str, torch.Tensor]:
    """All losses of one iteration in the most literal way; images of `batch` as
    train_unimatch.Trainer gets them.
    """
    device = next(model.parameters()).device
    x, w, w_mix, s1, s2 = (
        normalised(batch[name].to(device)).contiguous() for name in ("x", "w", "w_mix", "s1", "s2")
    )
    mask_x, box1, box2, ignore, ignore_mix = (
        batch[name].to(device) for name in ("mask_x", "box1", "box2", "ignore", "ignore_mix")
    )
    model.eval()
    with torch.no_grad():
        conf_mix, label_mix = model(w_mix).softmax(dim=1).max(dim=1)
    model.train()
    clean, perturbed = model(torch.cat([x, w]), tuple(f.to(device) for f in factors), fp_from=0)
    pred_x, pred_w = clean.chunk(2)
    pred_fp = perturbed.chunk(2)[1]
    pred_s1, pred_s2 = model(torch.cat([s1, s2])).chunk(2)
    conf_w, label_w = pred_w.detach().softmax(dim=1).max(dim=1)

    def consistency(pred, box):
        label, conf, ignored = label_w.clone(), conf_w.clone(), ignore.clone()
        if box is not None:
            label[box], conf[box], ignored[box] = label_mix[box], conf_mix[box], ignore_mix[box]
        means = []
        for start in range(0, len(pred), group):
            part = slice(start, start + group)
            losses = cross_entropy(pred[part], label[part], reduction="none")
            kept = (conf[part] >= args.conf_thresh) & ~ignored[part]
            means.append((losses * kept).sum() / (~ignored[part]).sum())
        return sum(means) / len(means)

    ohem = [
        ohem_by_sorting(p, m, args.ohem_threshold, args.min_kept)
        for p, m in zip(pred_x.split(group), mask_x.split(group))
    ]
    loss_x, loss_s1, loss_s2, loss_fp = (
        sum(ohem) / len(ohem),
        consistency(pred_s1, box1),
        consistency(pred_s2, box2),
        consistency(pred_fp, None),
    )
    return {
        "loss_all": (loss_x + loss_s1 * 0.25 + loss_s2 * 0.25 + loss_fp * 0.5) / 2,
        "loss_x": loss_x,
        "loss_s": (loss_s1 + loss_s2) / 2,
        "loss_w_fp": loss_fp,
    }


# ---------------------------------------------------------------------------------------- measuring


def random_batch(batch: int, size: int, class_num: int, seed: int) -> dict[str, torch.Tensor]:
    """What dataset.samples makes, of noise: a tenth of the labels missing, padding at the right of
    some crops.
    """
    random = np.random.default_rng(seed)
    views = {
        name: random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        for name in ("x", "w", "w_mix", "s1", "s2")
    }
    labels = random.integers(0, class_num, (batch, size, size), dtype=np.uint8)
    labels[random.random(labels.shape) < 0.1] = IGNORE
    ignore = np.zeros((2, batch, size, size), dtype=bool)
    ignore[:, ::2, :, size - size // 4 :] = True
    boxes = {f"box{n}": np.stack([cutmix_box(random, size) for _ in range(batch)]) for n in (1, 2)}
    arrays = {**views, "mask_x": labels, "ignore": ignore[0], "ignore_mix": ignore[1], **boxes}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def trainer_for(variant: str, args, device):
    """A Trainer set up for a variant (its precision settings are global: call before each
    timing).
    """
    argv = [
        "--labeled-id-path",
        "-",
        "--unlabeled-id-path",
        "-",
        "--save-path",
        "-",
        "--backbone",
        args.backbone,
        "--class-num",
        str(args.class_num),
        "--crop-size",
        str(args.crop_size),
        "--global-batch",
        str(args.batch),
        "--loss-groups",
        "1",
        "--min-kept",
        str(args.min_kept),
        *VARIANTS[variant],
    ]
    options = train_unimatch.parse_args(argv)
    train_unimatch.set_precision(options)
    model = train_unimatch.build_model(options, args.class_num)
    model = train_unimatch.to_device(model, device, options.channels_last)
    return train_unimatch.Trainer(model, options, device, group=args.batch, total=1000)


def one_step(variant: str, trainer, batch: dict, number: int, args) -> float:
    """Seconds of one training step."""
    options, device, model = trainer.args, trainer.device, trainer.model
    train_unimatch.set_precision(options)
    channels = model.backbone.channels
    factors = tuple(
        f.flatten(0, 1)
        for f in train_unimatch.perturbation_factors(
            0, number, args.batch, (channels[0], channels[3])
        )
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.optimizer.zero_grad()
    if variant.startswith("plain"):
        loss = plain_losses(model, batch, factors, options, args.batch)["loss_all"]
    else:
        loss = trainer.unimatch_losses(batch, factors)[0]
    loss.backward()
    trainer.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(variants: list[str], args, device) -> dict[str, dict]:
    """{variant: median, least and greatest seconds, peak memory}. On a CPU the variants take turns
    step by step; on a GPU, whose memory they would share, they follow one another.
    """
    batch = random_batch(args.batch, args.crop_size, args.class_num, 0)
    results = {}
    groups = [[v] for v in variants] if device.type == "cuda" else [variants]
    for group in groups:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainers = {variant: trainer_for(variant, args, device) for variant in group}
        seconds = {variant: [] for variant in group}
        for number in range(args.steps + 2):  # two steps to warm up
            for variant, trainer in trainers.items():
                seconds[variant].append(one_step(variant, trainer, copy.copy(batch), number, args))
        for variant in group:
            timed = seconds[variant][2:]
            results[variant] = {
                "seconds": statistics.median(timed),
                "least": min(timed),
                "greatest": max(timed),
                **(peak_memory_mb(device) if device.type == "cuda" else {}),
            }
    return results


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone",
        default="resnet101",
        help="resnet18, resnet50 or resnet101 (default: resnet101)",
    )
    parser.add_argument("--class-num", type=int, default=19, help="number of classes (default: 19)")
    parser.add_argument("--crop-size", type=int, default=769, help="pixels (default: 769)")
    parser.add_argument(
        "--batch", type=int, default=2, help="labeled samples; as many unlabeled (default: 2)"
    )
    parser.add_argument(
        "--min-kept", type=int, default=200_000, help="of OHEM, pixels (default: 200000)"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="timed steps of each variant (default: 10)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help="default: all; on a CPU without tf32 and compile",
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    add_run_options(parser, seed=False)
    args = parser.parse_args(argv)
    check_run_options(args)
    check_range(args, "batch", "steps", least=1)
    check_range(args, "crop_size", least=33)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = select_device(args.device)
    variants = args.variants or [
        v
        for v in VARIANTS
        if device.type == "cuda" or v not in ("tf32", "bf16 channels-last compile")
    ]
    results = measure(variants, args, device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{args.backbone}, crop {args.crop_size}, batch {args.batch} + {args.batch},"
        f" {args.class_num} classes, {name}, torch {torch.__version__}; medians of {args.steps}"
        " steps"
    )
    # of other settings than the authors' the hours of their run cannot be told
    authors = (args.backbone, args.crop_size) == ("resnet101", 769)
    print(
        "| variant | s / iteration (least .. greatest) | against plain | peak GPU memory, GB | GTA"
        " run on this one device, h |"
    )
    print("|---|---|---|---|---|")
    plain = results.get("plain fp32", {}).get("seconds")
    for variant, r in results.items():
        ratio = f"{plain / r['seconds']:.2f}x" if plain else "-"
        memory = f"{r['device_mb'] / 1000:.1f}" if "device_mb" in r else "-"
        hours = r["seconds"] * GLOBAL_BATCH / args.batch * ITERATIONS * EPOCHS / 3600
        print(
            f"| {variant} | {r['seconds']:.3f} ({r['least']:.3f} .. {r['greatest']:.3f}) | {ratio}"
            f" | {memory} | {f'{hours:.1f}' if authors else '-'} |"
        )
    if args.out:
        write_json(
            args.out,
            {
                "device": name,
                "torch": torch.__version__,
                "backbone": args.backbone,
                "crop_size": args.crop_size,
                "batch": args.batch,
                "steps": args.steps,
                "variants": results,
            },
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
