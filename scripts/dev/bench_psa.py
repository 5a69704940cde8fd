"""Time PSA with any segmenter, stage by stage; for SAMs against tests/oracle_psa.py in one run.

    # scenes of the embedded benchmark
    python -m scripts.dev.bench_psa --sam-type tiny
    python -m scripts.dev.bench_psa --sam-type vit_b --size 1024 2048 --images 1
    python -m scripts.dev.bench_psa --sam-type vit_h --size 1024 2048 --amp bf16 --no-oracle
    python -m scripts.dev.bench_psa --sam-type facebook/sam2.1-hiera-large --size 1024 2048

Prints seconds per image and stage, images per second and peak memory; where there is an oracle, the
plain implementation on segment_anything's own classes, also its times, the ratio, and the share of
pixels on which both agree. On a GPU the device is waited for around each stage.

Without weights a model gets random ones: an official SAM, MobileSAM, facebook/sam2.1-hiera-large,
and a local folder of transformers with configurations alone. The thresholds are then set on the
first image so that a third of the proposals pass the predicted IoU and 150 the stability, about as
with trained weights, and box NMS is off (random masks fill the image).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
import torch
from scipy import ndimage
from segment_anything.utils.amg import calculate_stability_score

from dataset.toy import draw_scene
from model.sam import SAM_TYPES, default_checkpoint, load_segmenter, output_name, sam_builder
from model.sam_fast import FastSam
from model.segmenter import ProposalSettings, Segmenter
from seco_sam import aggregate
from tests.oracle_psa import oracle_psa
from util.labels import CITYSCAPES_19, IGNORE
from util.options import add_run_options, check_range, check_run_options
from util.run import (
    Stopwatch,
    exact_mode,
    peak_memory_mb,
    run_main,
    seed_everything,
    select_device,
    tune_cpu,
)

SAM2_LARGE = "facebook/sam2.1-hiera-large"


def pixel_labels(label: np.ndarray, seed: int) -> np.ndarray:
    """Half of a scene's labels, in blobs as pixel-level pseudo-labels have them."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(label.shape), 6)
    return np.where(field > 0, IGNORE, label).astype(np.uint8)


def random_segmenter(options: argparse.Namespace, device: torch.device) -> Segmenter | None:
    """The segmenter of --sam-type with random weights if its own are absent, else None."""
    if options.sam_type in SAM_TYPES:
        if options.sam_checkpoint or default_checkpoint(options.sam_type).is_file():
            return None
        return FastSam(sam_builder(options.sam_type)().eval().to(device))
    folder = Path(options.sam_checkpoint or options.sam_type)
    if any(folder.glob("*.safetensors")):
        return None
    try:
        import transformers

        from model.sam_transformers import SETTINGS, TransformersSam
    except ImportError:
        return None  # `load_segmenter` says what to install
    if folder.is_dir():
        config = transformers.AutoConfig.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    elif options.sam_type == SAM2_LARGE:
        config, processor = sam2_large(transformers), transformers.Sam2ImageProcessor()
    else:
        return None
    model = transformers.AutoModelForMaskGeneration.from_config(config).eval().to(device)
    return TransformersSam(model, processor, SETTINGS[config.model_type])


def sam2_large(transformers):
    """The configuration of SAM 2.1 L (sam2/configs/sam2.1/sam2.1_hiera_l.yaml of Meta's sam2)."""
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8],
        global_attention_blocks=[23, 33, 43],
    )
    return transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[1152, 576, 288, 144]
        )
    )


def settings_for_random_weights(
    sam: Segmenter, image: np.ndarray, proposals: int = 150
) -> ProposalSettings:
    """Thresholds that a third of the proposals and `proposals` of them pass."""
    sam.settings = replace(sam.settings, predicted_iou=-np.inf, stability=-1.0, box_nms=1.0)
    sam.set_image(image)
    everything = sam.find_proposals()
    iou = float(everything.predicted_iou.quantile(2 / 3))
    passing = everything.low[everything.predicted_iou > iou]
    stability = torch.cat(
        [
            calculate_stability_score(sam.full_size(passing[i : i + 8]), sam.mask_threshold, 1.0)
            for i in range(0, len(passing), 8)
        ]
    )
    limit = float(stability.sort(descending=True).values[min(proposals, len(stability) - 1)])
    return replace(sam.settings, predicted_iou=iou, stability=limit)


class DeviceStopwatch(Stopwatch):
    """Waits for the GPU before and after each stage."""

    @contextlib.contextmanager
    def __call__(self, stage: str, threads: int = 1):
        torch.cuda.synchronize()
        with super().__call__(stage, threads):
            yield
            torch.cuda.synchronize()


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sam-type",
        default="tiny",
        metavar="TYPE",
        help="as of seco_sam.py (default: %(default)s)",
    )
    parser.add_argument(
        "--sam-checkpoint",
        metavar="PATH",
        help="its weights, as of seco_sam.py (default: the default place, else random)",
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
        "--points",
        type=int,
        default=32,
        metavar="N",
        help="a side of the grid that prompts SAM (default: 32)",
    )
    parser.add_argument(
        "--recipe", default="release", choices=("release", "paper"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--amp",
        default="none",
        choices=("none", "bf16"),
        help="of PSA, not of the oracle (default: none)",
    )
    parser.add_argument("--no-oracle", action="store_true", help="time PSA alone")
    add_run_options(parser)
    options = parser.parse_args(argv)
    check_run_options(options)
    check_range(options, "images", "points", least=1)
    return options


def print_stages(name: str, figures: dict) -> None:
    """Seconds an image of all stages and of what is left."""
    total, stages = figures["seconds"], figures["stages"]
    print(f"{name:10s} {total:9.2f} s/image  {1 / total:7.2f} images/s")
    for stage, seconds in [*stages.items(), ("rest", total - sum(stages.values()))]:
        print(f"    {stage:30s} {seconds:9.3f} s")


def prepared_segmenter(
    options: argparse.Namespace, device: torch.device, scene, label
) -> Segmenter:
    """The segmenter of the options, with thresholds for `scene` if its weights are random; on a GPU
    it has gone through PSA once, so that nothing is loaded or tuned while it is timed.
    """
    sam = random_segmenter(options, device)
    random_weights = sam is not None
    if sam is None:
        sam = load_segmenter(options.sam_type, options.sam_checkpoint, device)
    sam.amp = options.amp == "bf16"
    sam.settings = replace(sam.settings, points_per_side=options.points)
    if random_weights:
        sam.settings = settings_for_random_weights(sam, scene.image)
        print(
            f"no weights of {options.sam_type} here: random ones, thresholds"
            f" {sam.settings.predicted_iou:.3f} / {sam.settings.stability:.3f}, no box NMS"
        )
    if device.type == "cuda":
        aggregate(scene.image, label, sam, CITYSCAPES_19, options.recipe)
    return sam


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Figures an image of PSA and, where there is one, of the oracle: {"psa", "oracle": {"seconds",
    "stages", "memory"}, "proposals", "prompts", "agreement": percent of pixels, worst image}.
    """
    scenes = [draw_scene(options.seed + i, "target", *options.size) for i in range(options.images)]
    labels = [pixel_labels(scene.label, index) for index, scene in enumerate(scenes)]
    sam = prepared_segmenter(options, device, scenes[0], labels[0])
    new_watch = DeviceStopwatch if device.type == "cuda" else Stopwatch
    sam.watch, watch = new_watch(), new_watch()
    oracle = isinstance(sam, FastSam) and not options.no_oracle
    official = dict(
        points_per_side=sam.settings.points_per_side,
        pred_iou_thresh=sam.settings.predicted_iou,
        stability_score_thresh=sam.settings.stability,
        box_nms_thresh=sam.settings.box_nms,
    )

    def timed(run, total: dict):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        total["seconds"] += (time.perf_counter() - start) / options.images
        for name, value in peak_memory_mb(device).items():
            total["memory"][name] = max(value, total["memory"].get(name, 0))
        return result

    both = [{"seconds": 0.0, "memory": {}} for _ in range(2)]
    agreement, proposals, prompts = [], [], []
    for scene, label in zip(scenes, labels):
        how = (scene.image, label)
        result = timed(
            lambda: aggregate(*how, sam, CITYSCAPES_19, options.recipe),
            both[0],
        )
        proposals.append(len(result.aligned))
        prompts.append(len(result.prompts))
        if oracle:
            kinds = CITYSCAPES_19.stuff, CITYSCAPES_19.things
            plain = timed(
                lambda: oracle_psa(*how, sam.sam, *kinds, options.recipe, official, watch),
                both[1],
            )
            agreement.append(100 * float((plain == result.label).mean()))
    for total, stages in zip(both, (sam.watch.seconds, watch.seconds)):
        total["stages"] = {name: seconds / options.images for name, seconds in stages.items()}
    figures = {"psa": both[0], "proposals": np.mean(proposals), "prompts": np.mean(prompts)}
    return {**figures, "oracle": both[1], "agreement": min(agreement)} if oracle else figures


def main(argv=None) -> None:
    options = parse_args(argv)
    device = select_device(options.device)
    exact_mode()
    tune_cpu()  # for both: the ratio is that of the algorithms
    seed_everything(options.seed)
    figures = measure(options, device)
    print(
        f"{output_name(options.sam_type)}, {options.size[1]}x{options.size[0]}, {options.images}"
        f" images, {device}, {torch.get_num_threads()} threads, {options.amp}:"
        f" {figures['proposals']:.0f} proposals and {figures['prompts']:.0f} prompts an image"
    )
    for name in ("psa", "oracle"):
        if name in figures:
            print_stages(name, figures[name])
            memory = figures[name]["memory"].items()
            print("    peak memory " + ", ".join(f"{k} {v:.0f}" for k, v in memory))
    if "oracle" in figures:
        ratio = figures["oracle"]["seconds"] / figures["psa"]["seconds"]
        print(
            f"ratio {ratio:.1f}, agreement {figures['agreement']:.4f} % of the pixels (worst image)"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
