"""Speed and memory beside plain implementations (tests/reference_*.py, tests/oracle_psa.py), both
in one run. scripts/README.md has the figures.

    python -m scripts.dev.bench data --samples 16
    python -m scripts.dev.bench psa --sam-type vit_b --size 1024 2048 --images 1
    python -m scripts.dev.bench psa --sam-type vit_h --size 1024 2048 --amp bf16 --no-oracle
    python -m scripts.dev.bench scc
    python -m scripts.dev.bench train --backbone resnet18 --crop-size 192 --batch 4     a CPU
    python -m scripts.dev.bench train                                   a GPU: the authors' step

`data --help` and so on say what is measured.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import cv2
import numpy as np
import torch
from scipy import ndimage
from segment_anything.utils.amg import calculate_stability_score

import train_unimatch
from dataset.samples import Key, TrainingSamples
from dataset.scc import BUFFER, Data, index_image, patch_batches
from dataset.toy import draw_scene
from model.sam import WEIGHTS, load_segmenter, output_name, sam_builder
from model.sam_fast import FastSam
from model.segmenter import MASK_THRESHOLD, ProposalSettings, Segmenter
from model.training import build_model, perturbation_factors, set_precision, to_device
from seco_sam import aggregate
from seco_scc import parse_args as scc_options
from tests import oracle_psa, reference_data, reference_scc, reference_train
from util import run
from util.labels import CITYSCAPES_19, IGNORE, read_picture, write_list
from util.options import Bounds, Count, DeviceOptions, Pixels, parse_options
from util.run import progress

CROP = 769  # of `data`
FILES, CUTS = 8, 24  # of `scc`: different images on disk, connectivities that the reference cuts
VARIANTS = {  # of `train`
    "plain fp32": [],
    "fp32": [],
    "tf32": ["--amp", "tf32"],
    "fp32 channels-last": ["--channels-last"],
    "bf16": ["--amp", "bf16", "--no-channels-last"],
    "bf16 channels-last": ["--amp", "bf16"],
    "bf16 channels-last compile": ["--amp", "bf16", "--compile"],
}
NOT_ON_A_CPU = "tf32", "bf16 channels-last compile"


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_seconds(work: Callable, items: list) -> float:
    """CPU seconds of this process for work(item) of one item, so that other load on the machine
    does not blur them.
    """
    start = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - start) / len(items)


def count_memory_anew(device: torch.device) -> None:
    """Gives back what torch keeps of the device's memory and begins a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# --------------------------------------------------------------------------------------------- data


@dataclass(kw_only=True)
class DataOptions:
    """data"""

    samples: Count = 20
    "per measurement"


def data(options: DataOptions) -> dict[str, float]:
    """Data loading of UniMatch at 2048 x 1024, beside resizing whole images and cutting afterwards.

    Both sides make the same samples (one labeled crop; one unlabeled image as weak view, two strong
    views, and weak and strong views to paste). "Plain" is tests/reference_data.py. "But decoding"
    leaves decoding out on both sides, as after an epoch with --image-cache. CPU seconds of one
    process, so that other load on the machine does not blur them; images a second count the three
    streams. Gives {what: seconds}.
    """
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        seconds = sample_seconds(Path(folder), options.samples)
    print(f"2048 x 1024, crop {CROP}, {options.samples} samples, one process")
    print("| what | CPU ms | images / s | against plain |\n|---|---|---|---|")
    for what, value in seconds.items():
        plain = f"{what.removesuffix(', plain')}, plain"
        ratio = seconds.get(plain, seconds["whole sample, plain"]) / value
        print(f"| {what} | {1000 * value:.1f} | {3 / value:.1f} | {ratio:.1f}x |")
    return seconds


def sample_seconds(root: Path, count: int) -> dict[str, float]:
    """{what: CPU seconds of one of `count` samples}."""
    rows, plain = reference_data.made_files(root, 4), reference_data.plain_sample
    fast, memory, cached = (
        TrainingSamples(rows, [image for image, _ in rows], root, CROP, 0, image_cache=cache)
        for cache in (None, None, root / "cache")
    )
    pictures = {root / image: read_picture(root / image) for image, _ in rows}
    memory.images = SimpleNamespace(read=pictures.get)
    keys = [Key(0, number, number % len(rows)) for number in range(max(count, len(rows)))]
    for key in keys[: len(rows)]:  # fills the cache; warms the others up
        cached[key], fast[key], plain(fast, key)
    ways = {
        "whole sample, plain": lambda key: plain(fast, key),
        "whole sample": lambda key: fast[key],
        "whole sample, --image-cache": lambda key: cached[key],
        "whole sample but decoding, plain": lambda key: plain(fast, key, pictures.get),
        "whole sample but decoding": lambda key: memory[key],
    }
    return {what: cpu_seconds(way, keys[:count]) for what, way in ways.items()}


# ---------------------------------------------------------------------------------------------- psa


@dataclass(kw_only=True)
class PsaOptions(DeviceOptions):
    """psa"""

    sam_type: str = "tiny"
    "as of seco_sam.py"
    size: tuple[Annotated[int, Bounds(least=1), "H W"], int] = (192, 384)
    "of the scenes, pixels"
    images: Count = 2
    "scenes"
    points: Count = 32
    "a side of the grid that prompts SAM"
    amp: Literal["none", "bf16"] = "none"
    "not of the oracle"
    no_oracle: bool = False
    "time PSA alone"


def psa(options: PsaOptions) -> None:
    """PSA stage by stage on scenes of the embedded benchmark, for SAMs beside tests/oracle_psa.py.

    On a GPU the device is waited for around each stage. Agreement is the share of pixels on which
    both agree. An official SAM and MobileSAM get random weights where their own are absent, with
    thresholds that on the first image a third of the proposals pass (predicted IoU) and 150 of them
    (stability), about as with trained weights, and no box NMS (random masks fill the image).
    """
    device, (height, width) = run.select_device(options.device), options.size
    run.exact_mode()
    run.tune_cpu()  # for both: the ratio is that of the algorithms
    run.seed_everything(0)
    figures = measure_psa(options, device)
    print(
        f"{output_name(options.sam_type)}, {width}x{height}, {options.images} images, {device},"
        f" {torch.get_num_threads()} threads, {options.amp}: {figures['proposals']:.0f} proposals"
        f" and {figures['prompts']:.0f} prompts an image"
    )
    for name in [name for name in ("psa", "oracle") if name in figures]:
        total, stages = figures[name]["seconds"], figures[name]["stages"]
        print(f"{name:10s} {total:9.2f} s/image  {1 / total:7.2f} images/s")
        for stage, seconds in {**stages, "rest": total - sum(stages.values())}.items():
            print(f"    {stage:30s} {seconds:9.3f} s")
        memory = figures[name]["memory"].items()
        print("    peak memory " + ", ".join(f"{k} {v:.0f}" for k, v in memory))
    if "oracle" in figures:
        ratio = figures["oracle"]["seconds"] / figures["psa"]["seconds"]
        agreement = figures["agreement"]
        print(f"ratio {ratio:.1f}, agreement {agreement:.4f} % of the pixels (worst image)")


def measure_psa(options: PsaOptions, device: torch.device) -> dict:
    """Figures an image of PSA and, where there is one, of the oracle: {"psa", "oracle": {"seconds",
    "stages", "memory"}, "proposals", "prompts", "agreement": percent of pixels, worst image}.
    """
    scenes = [draw_scene(seed, "target", *options.size) for seed in range(options.images)]
    pairs = [(scene.image, pixel_labels(scene.label, i)) for i, scene in enumerate(scenes)]
    sam = prepared_segmenter(options, device, *pairs[0])

    def measured(work) -> tuple[list, dict]:
        watch = sam.watch = DeviceStopwatch(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = clock(device)
        results = [work(*pair) for pair in pairs]
        seconds = (clock(device) - start) / len(pairs)
        stages = {stage: value / len(pairs) for stage, value in watch.seconds.items()}
        memory = run.peak_memory_mb(device)
        return results, {"seconds": seconds, "stages": stages, "memory": memory}

    def plain(image: np.ndarray, label: np.ndarray) -> np.ndarray:
        kinds, settings = (CITYSCAPES_19.stuff, CITYSCAPES_19.things), sam.settings
        official = dict(
            points_per_side=settings.points_per_side,
            pred_iou_thresh=settings.predicted_iou,
            stability_score_thresh=settings.stability,
            box_nms_thresh=settings.box_nms,
        )
        return oracle_psa.oracle_psa(image, label, sam.sam, *kinds, "release", official, sam.watch)

    found, seconds = measured(lambda image, label: aggregate(image, label, sam, CITYSCAPES_19))
    figures = {"psa": seconds, "proposals": np.mean([len(result.aligned) for result in found])}
    figures["prompts"] = np.mean([len(result.prompts) for result in found])
    if isinstance(sam, FastSam) and not options.no_oracle:
        expected, figures["oracle"] = measured(plain)
        equal = [(result.label == label).mean() for result, label in zip(found, expected)]
        figures["agreement"] = 100 * min(equal)
    return figures


def pixel_labels(label: np.ndarray, seed: int) -> np.ndarray:
    """Half of a scene's labels, in blobs as pixel-level pseudo-labels have them."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(label.shape), 6)
    return np.where(field > 0, IGNORE, label).astype(np.uint8)


def prepared_segmenter(
    options: PsaOptions, device: torch.device, image: np.ndarray, label: np.ndarray
) -> Segmenter:
    """The segmenter of the options; on a GPU it has gone through PSA once, so that nothing is
    loaded or tuned while it is timed.
    """
    sam_type = options.sam_type
    if random := sam_type in WEIGHTS and not WEIGHTS[sam_type].is_file():
        sam = FastSam(sam_builder(sam_type)().eval().to(device))
    else:
        sam = load_segmenter(sam_type, device=device)
    sam.amp = options.amp == "bf16"
    sam.settings = replace(sam.settings, points_per_side=options.points)
    if random:
        sam.settings = settings_for_random_weights(sam, image)
        print(f"no weights of {sam_type} here: random ones, no box NMS, {sam.settings}")
    if device.type == "cuda":
        aggregate(image, label, sam, CITYSCAPES_19)
    return sam


def settings_for_random_weights(sam: Segmenter, image: np.ndarray) -> ProposalSettings:
    """Thresholds that a third of the proposals and 150 of them pass."""
    sam.settings = replace(sam.settings, predicted_iou=-np.inf, stability=-1.0, box_nms=1.0)
    sam.set_image(image)
    everything = sam.find_proposals()
    iou = float(everything.predicted_iou.quantile(2 / 3))
    stability = [
        calculate_stability_score(sam.full_size(low), MASK_THRESHOLD, 1.0)
        for low in everything.low[everything.predicted_iou > iou].split(8)
    ]
    ranked = torch.cat(stability).sort(descending=True).values
    limit = float(ranked[min(150, len(ranked) - 1)])
    return replace(sam.settings, predicted_iou=iou, stability=limit)


class DeviceStopwatch(run.Stopwatch):
    """Waits for the device before and after each stage."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    @contextlib.contextmanager
    def __call__(self, stage: str, threads: int = 1):
        clock(self.device)
        with super().__call__(stage, threads):
            yield
            clock(self.device)


# ---------------------------------------------------------------------------------------------- scc


@dataclass(kw_only=True)
class SccOptions:
    """scc"""

    images: Count = 3000
    "in the list, in multiples of 8"
    batches: Count = 60
    "of 64 patches, over which the ten readings of memory are spread"


def scc(options: SccOptions) -> None:
    """SCC's patches of training a second, beside opening the image for each connectivity
    (tests/reference_scc.py), and the memory over a list of images of 2048 x 1024.

    No network; CPU seconds of one process. The list names a few files again and again, so that
    3,000 images need no 10 GB of disk. Memory is the process's peak, read at each tenth of the
    batches: it grows no more once the buffer of patches is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = repeated(root, reference_data.made_files(root, FILES), -(-options.images // FILES))
        print(
            f"{len(data.index)} connectivities in {len(data.rows)} images of 2048 x 1024;"
            f" index: {data.index.nbytes / 1e6:.1f} MB"
        )
        chosen = np.random.default_rng(1).permutation(data.starts[FILES])[:CUTS].tolist()
        reference_scc.store_masks(root, data, chosen)
        slow = cpu_seconds(
            lambda m: reference_scc.opened_patch(root, data, m, data.options.patch_size), chosen
        )
        peaks, start = [], time.process_time()
        stream = patch_batches(data, 0, options.batches)
        for _ in progress(stream, "patches", options.batches, "batch"):
            peaks.append(run.peak_memory_mb()["host_mb"])
        # The buffer is filled before the first batch: its patches are work done as well.
        drawn = options.batches * data.options.batch_size + BUFFER
        fast = (time.process_time() - start) / drawn
    readings = ", ".join(f"{peak:.0f}" for peak in peaks[:: max(1, len(peaks) // 10)])
    print(
        f"cutting patches: {1 / fast:.0f} connectivities/s, opening the image for each:"
        f" {1 / slow:.1f}/s, {slow / fast:.1f}x\npeak memory while streaming, MB: {readings}"
    )


def repeated(root: Path, rows: list[tuple[str, str]], times: int) -> Data:
    """The index of a list that names all files again and again; each is indexed once."""
    write_list(root / "all.txt", rows)
    how = ["--id-list-path", str(root / "all.txt"), "--root-path", str(root), "--workers", "1"]
    once = np.concatenate([index_image(root / row[1], i, 19) for i, row in enumerate(rows)])
    index = np.tile(once, times)
    index["image"] += np.repeat(np.arange(times, dtype="i4") * len(rows), len(once))
    return Data(root, rows * times, index, 19, scc_options(how))


# -------------------------------------------------------------------------------------------- train


@dataclass(kw_only=True)
class TrainOptions(DeviceOptions):
    """train"""

    backbone: str = "resnet101"
    "of train_unimatch.py"
    crop_size: Pixels = 769
    "a side"
    batch: Count = 2
    "labeled samples; as many unlabeled"
    min_kept: Pixels = 200_000
    "of OHEM"
    steps: Count = 10
    "timed steps of each variant"


def train(options: TrainOptions) -> dict[str, dict]:
    """Seconds and peak memory of a UniMatch training step in every precision, beside the released
    step written out (tests/reference_train.py, whose losses and gradients are the same).

    Random images and labels, so data loading is left out; medians. On a CPU without tf32 and
    compile. Gives what `measure_train` gives.
    """
    device = run.select_device(options.device)
    cuda = device.type == "cuda"
    results = measure_train([v for v in VARIANTS if cuda or v not in NOT_ON_A_CPU], options, device)
    threads = f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.backbone}, crop {options.crop_size}, batch {options.batch} + {options.batch},"
        f" 19 classes, {torch.cuda.get_device_name(device) if cuda else threads},"
        f" torch {torch.__version__}; medians of {options.steps} steps\n"
        "| variant | s / iteration | against plain | peak GPU memory, GB |\n"
        "|---|---|---|---|"
    )
    for variant, found in results.items():
        seconds, ratio = found["seconds"], results["plain fp32"]["seconds"] / found["seconds"]
        memory = f"{found['device_mb'] / 1000:.1f}" if cuda else "-"
        print(f"| {variant} | {seconds:.3f} | {ratio:.2f}x | {memory} |")
    return results


def measure_train(
    variants: list[str], options: TrainOptions, device: torch.device
) -> dict[str, dict]:
    """{variant: median seconds, peak memory in MB}. On a CPU the variants take
    turns step by step, so that other load on the machine hits all alike; on a GPU, whose memory
    they would share, they follow one another.
    """
    batch, results = reference_train.random_batch(options.batch, options.crop_size, 19, 0), {}
    for group in [[v] for v in variants] if device.type == "cuda" else [variants]:
        count_memory_anew(device)
        trainers = {variant: trainer_for(variant, options, device) for variant in group}
        seconds = {variant: [] for variant in group}
        for number in range(options.steps + 2):  # two steps to warm up
            for variant, trainer in trainers.items():
                seconds[variant].append(one_step(variant, trainer, copy.copy(batch), number))
        for variant in group:
            median = statistics.median(seconds[variant][2:])
            results[variant] = {"seconds": median, **run.peak_memory_mb(device)}
    return results


def trainer_for(variant: str, options: TrainOptions, device: torch.device):
    """A train_unimatch.Trainer set up for a variant."""
    how = ["--labeled-id-path", "-", "--unlabeled-id-path", "-", "--save-path", "-"]
    how += ["--backbone", options.backbone, "--crop-size", str(options.crop_size)]
    how += ["--global-batch", str(options.batch), "--loss-groups", "1"]
    how += ["--min-kept", str(options.min_kept), *VARIANTS[variant]]
    args = train_unimatch.parse_args(how)
    set_precision(args)
    model = build_model(args, 19)
    model = to_device(model, device, args.channels_last)
    return train_unimatch.Trainer(model, args, device, group=options.batch, total=1000)


def one_step(variant: str, trainer: train_unimatch.Trainer, batch: dict, number: int) -> float:
    """Seconds of one training step. Sets the variant's precision, which is global."""
    args, model = trainer.args, trainer.model
    set_precision(args)
    c1, _, _, c4 = model.backbone.channels
    factors = perturbation_factors(0, number, trainer.group, (c1, c4))
    factors = tuple(f.flatten(0, 1) for f in factors)
    start = clock(trainer.device)
    trainer.optimizer.zero_grad()
    if variant.startswith("plain"):
        loss = reference_train.plain_losses(model, batch, factors, args, trainer.group)["loss_all"]
    else:
        loss = trainer.unimatch_losses(batch, factors)[0]
    loss.backward()
    trainer.optimizer.step()
    return clock(trainer.device) - start


# ------------------------------------------------------------------------------------------ options

PARTS = {data: DataOptions, psa: PsaOptions, scc: SccOptions, train: TrainOptions}


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[part.__name__ for part in PARTS])
    name = parser.parse_args(argv[:1]).part
    (part,) = (part for part in PARTS if part.__name__ == name)
    part(parse_options(PARTS[part], inspect.getdoc(part), argv[1:]))


if __name__ == "__main__":
    sys.exit(run.run_main(main))
