"""Speed and memory beside plain implementations (tests/reference_*.py, tests/oracle_psa.py), both
in one run. scripts/README.md has the figures.

    python -m scripts.dev.bench data --samples 16
    python -m scripts.dev.bench psa --sam-type vit_h --size 1024 2048 --amp bf16 --no-oracle
    python -m scripts.dev.bench scc
    python -m scripts.dev.bench train --backbone resnet18 --crop-size 192 --batch 4     a CPU
    python -m scripts.dev.bench train                                   a GPU: the authors' step
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from segment_anything.utils.amg import calculate_stability_score

import train_unimatch
from dataset.samples import Lists, TrainingSamples
from dataset.scc import BUFFER, Job, index_image, patch_batches
from dataset.toy import draw_scene
from model.sam import WEIGHTS, load_segmenter, sam_builder
from model.sam_fast import FastSam
from model.segmenter import MASK_THRESHOLD, Segmenter
from model.training import perturbation_factors
from scripts.lib.page import markdown
from seco_sam import aggregate
from seco_scc import parse_args as scc_options
from tests import oracle_psa, reference_data, reference_scc, reference_train
from util import run
from util.labels import CITYSCAPES_19, IGNORE, write_list
from util.options import Argument, Bounds, Count, DeviceOptions, Pixels, parse_options

# Of `scc`: different images on disk, how often each is listed, connectivities that the reference
# cuts, batches of patches
FILES, TIMES, CUTS, BATCHES = 8, 375, 24, 60
VARIANTS = {  # of `train`
    "plain fp32": [],
    "fp32": [],
    "tf32": ["--amp", "tf32"],
    "fp32 channels-last": ["--channels-last"],
    "bf16 channels-last": ["--amp", "bf16"],
    "bf16 channels-last compile": ["--amp", "bf16", "--compile"],
}


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """measurements"""

    part: Argument[Literal["data", "psa", "scc", "train"]]
    "what is measured"
    samples: Count = 20
    "data: per measurement"
    sam_type: str = "tiny"
    "psa: as of seco_sam.py"
    size: tuple[Annotated[int, Bounds(least=1), "H W"], int] = (192, 384)
    "psa: of the scenes, pixels"
    images: Count = 2
    "psa: scenes"
    points: Count = 32
    "psa: a side of the grid that prompts SAM"
    amp: Literal["none", "bf16"] = "none"
    "psa: not of the oracle"
    no_oracle: bool = False
    "psa: time PSA alone"
    backbone: str = "resnet101"
    "train: of train_unimatch.py"
    crop_size: Pixels = 769
    "train: a side"
    batch: Count = 2
    "train: labeled samples; as many unlabeled"
    min_kept: Pixels = 200_000
    "train: of OHEM"
    steps: Count = 10
    "train: timed steps of each variant"


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


def median_seconds(work: Callable, steps: int, device: torch.device) -> float:
    """Seconds of work(number) on the device, after two calls to warm up."""
    seconds = []
    for number in range(steps + 2):
        start = clock(device)
        work(number)
        seconds.append(clock(device) - start)
    return statistics.median(seconds[2:])


def count_memory_anew(device: torch.device) -> None:
    """Gives back what torch keeps of the device's memory and begins a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# --------------------------------------------------------------------------------------------- data


def data(options: Options, device: torch.device) -> dict[str, float]:
    """Data loading of UniMatch at 2048 x 1024, beside resizing whole images and cutting afterwards
    (tests/reference_data.py).

    Both sides make the same samples (one labeled crop; one unlabeled image as weak view, two strong
    views, and weak and strong views to paste). One process. Gives {what: CPU seconds of a sample}.
    """
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = reference_data.made_files(root, 4)
        lists = Lists(rows, [image for image, _ in rows], [], np.zeros((4, 19)))
        fast, cached = (
            TrainingSamples(training_options(["--root-path", folder, *more]), lists)
            for more in ([], ["--image-cache", str(root / "cache")])
        )
        ways = {
            "plain": lambda number: reference_data.plain_sample(fast, number),
            "ours": lambda number: fast[number],
            "ours, --image-cache": lambda number: cached[number],
        }
        numbers = range(max(options.samples, len(rows)))
        seconds = {}
        for what, way in ways.items():
            cpu_seconds(way, numbers[: len(rows)])  # fills the cache; warms the others up
            seconds[what] = value = cpu_seconds(way, numbers[: options.samples])
            print(f"| {what} | {1000 * value:.1f} ms CPU | {seconds['plain'] / value:.1f}x |")
    return seconds


# ---------------------------------------------------------------------------------------------- psa


def psa(options: Options, device: torch.device) -> None:
    """PSA stage by stage on scenes of the embedded benchmark, for SAMs beside tests/oracle_psa.py.
    Seconds an image, MB. On a GPU the stages' own seconds need CUDA_LAUNCH_BLOCKING=1.
    """
    run.exact_mode()
    run.tune_cpu()  # for both: the ratio is that of the algorithms
    run.seed_everything(0)
    figures = measure_psa(options, device)
    print(json.dumps(figures, indent=4))
    if "oracle" in figures:
        print(f"ratio {figures['oracle']['seconds'] / figures['psa']['seconds']:.1f}")


def measure_psa(options: Options, device: torch.device) -> dict:
    """Figures an image of PSA and, where there is one, of the oracle: {"psa": {"seconds", "memory",
    "stages"}, "oracle": {"seconds", "memory", "make prompts": seconds of it}, "proposals",
    "prompts", "agreement": percent of pixels, worst image}.
    """
    scenes = [draw_scene(seed, "target", *options.size) for seed in range(options.images)]
    pairs = [(scene.image, pixel_labels(scene.label, i)) for i, scene in enumerate(scenes)]
    sam = prepared_segmenter(options, device, *pairs[0])

    def measured(work) -> tuple[list, dict]:
        count_memory_anew(device)
        start = clock(device)
        results = [work(*pair) for pair in pairs]
        seconds = (clock(device) - start) / len(pairs)
        return results, {"seconds": seconds, "memory": run.peak_memory_mb(device)}

    figures: dict = {}
    found, figures["psa"] = measured(lambda *pair: aggregate(*pair, sam, CITYSCAPES_19))
    figures["psa"]["stages"] = {
        stage: statistics.mean(result.seconds.get(stage, 0) for result in found)
        for stage in found[0].seconds
    }
    figures["proposals"] = statistics.mean(len(result.aligned) for result in found)
    figures["prompts"] = statistics.mean(len(result.prompts) for result in found)
    if isinstance(sam, FastSam) and not options.no_oracle:
        prompting: list[float] = []

        @contextlib.contextmanager
        def watch(stage: str):
            start = clock(device)
            yield
            if stage == "make prompts":
                prompting.append(clock(device) - start)

        how = (CITYSCAPES_19.stuff, CITYSCAPES_19.things, "release", sam.settings, watch)
        plain = lambda image, label: oracle_psa.oracle_psa(image, label, sam.sam, *how)
        expected, figures["oracle"] = measured(plain)
        figures["oracle"]["make prompts"] = sum(prompting) / len(pairs)
        equal = [(result.label == label).mean() for result, label in zip(found, expected)]
        figures["agreement"] = 100 * float(min(equal))
    return figures


def pixel_labels(label: np.ndarray, seed: int) -> np.ndarray:
    """Half of a scene's labels, in blobs as pixel-level pseudo-labels have them."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(label.shape), 6)
    return np.where(field > 0, IGNORE, label).astype(np.uint8)


def prepared_segmenter(
    options: Options, device: torch.device, image: np.ndarray, label: np.ndarray
) -> Segmenter:
    """The segmenter of the options; on a GPU it has gone through PSA once, so that nothing is
    loaded or tuned while it is timed.

    An official SAM and MobileSAM get random weights where their own are absent, with thresholds
    that on the first image a third of the proposals pass (predicted IoU) and 150 of them
    (stability), about as with trained weights, and no box NMS (random masks fill the image).
    """
    sam_type = options.sam_type
    if random := sam_type in WEIGHTS and not WEIGHTS[sam_type].is_file():
        sam = FastSam(sam_builder(sam_type)().eval().to(device))
    else:
        sam = load_segmenter(sam_type, device=device)
    sam.amp = options.amp == "bf16"
    sam.settings = replace(sam.settings, points_per_side=options.points)
    if random:
        sam.settings = replace(sam.settings, predicted_iou=-np.inf, stability=-1.0, box_nms=1.0)
        sam.set_image(image)
        low, _, predicted_iou = sam.find_proposals()
        iou = float(predicted_iou.quantile(2 / 3))
        stability = [
            calculate_stability_score(sam.full_size(some), MASK_THRESHOLD, 1.0)
            for some in low[predicted_iou > iou].split(8)
        ]
        ranked = torch.cat(stability).sort(descending=True).values
        limit = float(ranked[min(150, len(ranked) - 1)])
        sam.settings = replace(sam.settings, predicted_iou=iou, stability=limit)
        print(f"no weights of {sam_type} here: random ones, no box NMS, {sam.settings}")
    if device.type == "cuda":
        aggregate(image, label, sam, CITYSCAPES_19)
    return sam


# ---------------------------------------------------------------------------------------------- scc


def scc(options: Options, device: torch.device) -> None:
    """SCC's patches of training a second, beside opening the image for each connectivity
    (tests/reference_scc.py), and the memory over a list of images of 2048 x 1024.

    No network; CPU seconds of one process. The list names a few files again and again, for 3,000
    images need 10 GB of disk. The process's peak grows no more once the buffer of patches is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        job = repeated(root, reference_data.made_files(root, FILES), TIMES)
        chosen = np.random.default_rng(1).permutation(job.starts[FILES])[:CUTS].tolist()
        reference_scc.store_masks(root, job, chosen)
        slow = cpu_seconds(
            lambda m: reference_scc.opened_patch(root, job, m, job.options.patch_size), chosen
        )
        peaks, start = [], time.process_time()
        for _ in patch_batches(job, 0, BATCHES):
            peaks.append(run.peak_memory_mb()["host_mb"])
        # The buffer is filled before the first batch: its patches are work done as well.
        drawn = BATCHES * job.options.batch_size + BUFFER
        fast = (time.process_time() - start) / drawn
    print(
        f"{len(job.index)} connectivities in {len(job.rows)} images; index:"
        f" {job.index.nbytes / 1e6:.1f} MB\ncutting patches: {1 / fast:.0f} connectivities/s,"
        f" opening the image for each: {1 / slow:.1f}/s, {slow / fast:.1f}x\n"
        f"peak memory while streaming, MB: {peaks[:: max(1, len(peaks) // 10)]}"
    )


def repeated(root: Path, rows: list[tuple[str, str]], times: int) -> Job:
    """The index of a list that names all files again and again; each is indexed once."""
    write_list(root / "all.txt", rows)
    how = ["--id-list-path", str(root / "all.txt"), "--root-path", str(root), "--workers", "1"]
    once = np.concatenate([index_image(root / row[1], i, 19) for i, row in enumerate(rows)])
    index = np.tile(once, times)
    index["image"] += np.repeat(np.arange(times, dtype="i4") * len(rows), len(once))
    job = Job(scc_options(how), "scc")
    job.rows *= times
    job.take(index)
    return job


# -------------------------------------------------------------------------------------------- train


def train(options: Options, device: torch.device) -> dict[str, dict]:
    """Seconds and peak memory of a UniMatch training step in every precision, beside the released
    step written out (tests/reference_train.py, whose losses and gradients are the same).

    Random images and labels, so data loading is left out; medians. No tf32, no compile on a CPU.
    """
    cuda = device.type == "cuda"
    variants = [v for v in VARIANTS if cuda or not {"tf32", "--compile"} & set(VARIANTS[v])]
    results = measure_train(variants, options, device)
    rows = []
    for variant, found in results.items():
        ratio = results["plain fp32"]["seconds"] / found["seconds"]
        memory = f"{found['device_mb'] / 1000:.1f}" if cuda else "–"
        rows.append([variant, f"{found['seconds']:.3f}", f"{ratio:.2f}x", memory])
    head = ["variant", "s / iteration", "against plain", "GPU memory, GB"]
    print(markdown([{"head": head, "rows": rows}]))
    return results


def measure_train(variants: list[str], options: Options, device: torch.device) -> dict[str, dict]:
    """{variant: median seconds, peak memory in MB}, one after another."""
    batch, results = reference_train.random_batch(options.batch, options.crop_size, 19, 0), {}
    for variant in variants:
        count_memory_anew(device)
        trainer = trainer_for(variant, options, device)
        step = partial(one_step, variant, trainer, batch)
        seconds = median_seconds(step, options.steps, device)
        results[variant] = {"seconds": seconds, **run.peak_memory_mb(device)}
        del trainer, step  # its memory is not the next one's
    return results


def training_options(more: list[str]) -> train_unimatch.Options:
    """Options of train_unimatch.py, of lists that are not read."""
    needed = "--labeled-id-path - --unlabeled-id-path - --save-path -"
    return train_unimatch.parse_args([*needed.split(), *more])


def trainer_for(variant: str, options: Options, device: torch.device) -> train_unimatch.Trainer:
    """Set up for a variant, whose precision, which is global, is set."""
    how = f"--loss-groups 1 --backbone {options.backbone} --crop-size {options.crop_size}"
    how += f" --global-batch {options.batch} --batch-per-process {options.batch}"
    how += f" --min-kept {options.min_kept}"
    args = training_options([*how.split(), *VARIANTS[variant]])
    lists = Lists([], ["-"], [], np.zeros((0, 19)))
    return train_unimatch.Trainer(args, CITYSCAPES_19, lists, device)


def one_step(variant: str, trainer: train_unimatch.Trainer, batch: dict, number: int) -> None:
    args, model = trainer.args, trainer.model
    factors = perturbation_factors(0, number, trainer.group, model.backbone.channels[::3])
    factors = tuple(f.flatten(0, 1) for f in factors)
    trainer.optimizer.zero_grad()
    if variant.startswith("plain"):
        loss = reference_train.plain_losses(model, batch, factors, args, trainer.group)["loss_all"]
    else:
        loss = trainer.unimatch_losses(batch, factors)[0]
    loss.backward()
    trainer.optimizer.step()


def main(argv=None) -> None:
    options = parse_options(Options, __doc__, argv)
    device = run.select_device(options.device)
    print(f"{options}, on {device}, {torch.get_num_threads()} threads")
    {"data": data, "psa": psa, "scc": scc, "train": train}[options.part](options, device)


if __name__ == "__main__":
    sys.exit(run.run_main(main))
