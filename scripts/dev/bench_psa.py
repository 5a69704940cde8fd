"""Time PSA's fast path against the plain one of tests/oracle_psa.py, stage by stage, in one run.

    # scenes of the embedded benchmark
    python -m scripts.dev.bench_psa --sam-type tiny
    python -m scripts.dev.bench_psa --sam-type vit_b --size 1024 2048 --images 1
    python -m scripts.dev.bench_psa --sam-type vit_h --size 1024 2048 --amp bf16 --no-oracle

Prints seconds per image and stage for both, the ratio, and the share of pixels on which they agree.
Without a checkpoint an official SAM gets random weights; the thresholds are then set on the first
image so that a third of the proposals pass the predicted IoU and 150 the stability, about as with
trained weights, and box NMS is off (random masks fill the image).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from segment_anything import sam_model_registry
from segment_anything.utils.amg import calculate_stability_score

from dataset.toy import draw_scene
from model.sam import SAM_TYPES, build_sam, default_checkpoint
from model.sam_fast import FastSam, ProposalSettings
from seco_sam import aggregate
from tests.oracle_psa import oracle_psa
from util.labels import CITYSCAPES_19, IGNORE
from util.options import add_run_options
from util.run import (
    Stopwatch,
    UserError,
    exact_mode,
    peak_memory_mb,
    run_main,
    seed_everything,
    select_device,
    tune_cpu,
)


def pixel_labels(label: np.ndarray, seed: int) -> np.ndarray:
    """Half of a scene's labels, in blobs as pixel-level pseudo-labels have them."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(label.shape), 6)
    return np.where(field > 0, IGNORE, label).astype(np.uint8)


def settings_for_random_weights(
    sam: FastSam, image: np.ndarray, proposals: int = 150
) -> ProposalSettings:
    """Thresholds that a third of the proposals and `proposals` of them pass."""
    sam.set_image(image)
    sam.settings = replace(sam.settings, predicted_iou=-np.inf, stability=-1.0, box_nms=1.0)
    everything = sam.proposals()
    iou = float(everything.predicted_iou.quantile(2 / 3))
    passing = everything.low[everything.predicted_iou > iou]
    stability = torch.cat(
        [
            calculate_stability_score(
                sam._full_size(passing[i : i + 8]), sam.sam.mask_threshold, 1.0
            )
            for i in range(0, len(passing), 8)
        ]
    )
    limit = float(stability.sort(descending=True).values[min(proposals, len(stability) - 1)])
    return replace(sam.settings, predicted_iou=iou, stability=limit)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sam-type", default="tiny", choices=SAM_TYPES, help="size of SAM (default: %(default)s)"
    )
    parser.add_argument(
        "--sam-checkpoint",
        metavar="FILE",
        help="SAM's weights (default: the official place, else random)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(192, 384),
        metavar=("H", "W"),
        help="pixels of the scenes (default: 192 384)",
    )
    parser.add_argument(
        "--images", type=int, default=2, metavar="N", help="scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe", default="release", choices=("release", "paper"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--amp", default="none", choices=("none", "bf16"), help="of the fast path (default: none)"
    )
    parser.add_argument("--no-oracle", action="store_true", help="time the fast path alone")
    add_run_options(parser)
    options = parser.parse_args(argv)
    if options.images < 1:
        raise UserError(f"--images {options.images}: give a number from 1 up")
    return options


def main(argv=None) -> None:
    options = parse_args(argv)
    device = select_device(options.device)
    exact_mode()
    tune_cpu()  # for both: the ratio is that of the algorithms
    seed_everything(options.seed)
    checkpoint = Path(options.sam_checkpoint or default_checkpoint(options.sam_type))
    random_weights = options.sam_checkpoint is None and not checkpoint.is_file()
    sam = (
        sam_model_registry[options.sam_type]().eval().to(device)
        if random_weights
        else build_sam(options.sam_type, checkpoint, device)
    )
    fast = FastSam(sam, amp=options.amp == "bf16")
    scenes = [draw_scene(options.seed + i, "target", *options.size) for i in range(options.images)]
    if random_weights:
        fast.settings = settings_for_random_weights(fast, scenes[0].image)
        print(
            f"{checkpoint} is absent: random weights, thresholds {fast.settings.predicted_iou:.3f}"
            f" / {fast.settings.stability:.3f}, no box NMS"
        )
    official = dict(
        points_per_side=fast.settings.points_per_side,
        pred_iou_thresh=fast.settings.predicted_iou,
        stability_score_thresh=fast.settings.stability,
        box_nms_thresh=fast.settings.box_nms,
    )
    times, agreement, proposals, prompts, watch = [0.0, 0.0], [], [], [], Stopwatch()
    fast.watch.seconds.clear()

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for index, scene in enumerate(scenes):
        label = pixel_labels(scene.label, index)
        start = clock()
        result = aggregate(scene.image, label, fast, CITYSCAPES_19, options.recipe)
        middle = clock()
        times[0] += middle - start
        proposals.append(len(result.aligned))
        prompts.append(len(result.prompts))
        if not options.no_oracle:
            plain = oracle_psa(
                scene.image,
                label,
                sam,
                CITYSCAPES_19.stuff,
                CITYSCAPES_19.things,
                options.recipe,
                official,
                watch,
            )
            times[1] += clock() - middle
            agreement.append(float((plain == result.label).mean()))
    n = options.images
    print(
        f"{options.sam_type}, {options.size[1]}x{options.size[0]}, {n} images, {device},"
        f" {torch.get_num_threads()} threads, {options.amp}: {np.mean(proposals):.0f} proposals and"
        f" {np.mean(prompts):.0f} prompts an image"
    )
    rows = [("fast path", fast.watch.seconds, times[0])] + (
        [] if options.no_oracle else [("oracle", watch.seconds, times[1])]
    )
    for name, stages, total in rows:
        print(f"{name:10s} {total / n:9.2f} s/image  {n / total:7.2f} images/s")
        for stage, seconds in [*stages.items(), ("rest", total - sum(stages.values()))]:
            print(f"    {stage:30s} {seconds / n:9.3f} s")
    if agreement:
        print(
            f"ratio {times[1] / times[0]:.1f}, agreement {100 * min(agreement):.4f} % of the pixels"
            " (worst image)"
        )
    print("peak memory " + ", ".join(f"{k} {v:.0f}" for k, v in peak_memory_mb(device).items()))


if __name__ == "__main__":
    sys.exit(run_main(main))
