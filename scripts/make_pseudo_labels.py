#!/usr/bin/env python
"""Stage 0: pixel-level pseudo-labels of any model, thresholded class by class over the whole list.

Two rules. `top-p`, DT-ST's: of all pixels of the list that the model predicts as a class, the top p
by confidence (largest softmax probability) keep the class; the rest becomes 255. Paper: p = 0.5.
`cbst`: the rule of CBST's released code, see `cbst_label`. No ground truth is read.

Inputs   --id-list-path: one image a line, relative to --root-path; further columns are not read
         --checkpoint: a network of one of the formats of model/network.py, which feeds it images as
         its authors do; or --probabilities: K x H x W class probabilities of any other model,
         float16 or wider, as <folder>/<image path>.npy (a/x.png.npy), perhaps smaller than the
         images. scripts/README.md: how mmsegmentation's models (HRDA, DAFormer, MIC) write them
Outputs  <root>/<exp>/<image path without its first folder>.png   palette PNG of train IDs and 255
         --out-list, rows `<image> <label>`; beside the labels summary.json (thresholds and shares
         per class), overview.png, settings.json, inputs.json and run.json (manifest)

    python -m scripts.make_pseudo_labels --id-list-path splits/cityscapes/train.txt \\
        --root-path data/cityscapes --checkpoint pretrained/G2C_model_iter020000.pth \\
        --preset dtst --exp DTST --out-list splits/cityscapes/DTST/train.txt
    # on four GPUs: torchrun --nproc_per_node 4 -m scripts.make_pseudo_labels …

Predictions wait in <root>/<exp>/.confidence, so a stopped run goes on where it was; they are
removed at the end. They take 5 bytes a pixel (6 with cbst), 31 GB for Cityscapes' 2975 images, and
with --preset dtst a sixteenth. With `top-p` the model runs once an image, with `cbst` twice.

Copied away, this file needs util/ and model/.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np
import torch

from model.network import load_network
from util.labels import (
    IGNORE,
    ClassSet,
    check_experiment,
    check_one_each,
    check_same_shape,
    chosen_classes,
    image_size,
    in_experiment,
    read_image,
    read_list,
    write_classes,
    write_label,
    write_list,
)
from util.options import (
    Bounds,
    ClassOptions,
    CountFrom0,
    DeviceOptions,
    File,
    Folder,
    List,
    ListOptions,
    Setting,
    ShareAbove0,
    one_of,
    parse_options,
    settings_of,
)
from util.outputs import (
    Outputs,
    atomic_path,
    check_writable,
    read_json,
    write_json,
)
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import (
    UserError,
    exact_mode,
    manifest,
    process_group,
    process_rank,
    progress,
    run_main,
    select_device,
    wait_for_all,
)

DIGITS = 1 << 16  # values of half a float32's bits
DTST_STEP = 4  # DT-ST labels every fourth pixel in each direction (256x512 of 1024x2048)
CBST_STEP = 4  # CBST ranks every fourth pixel of a class (its released code)
PANEL_WIDTH = 512  # pixels, of the pictures in overview.png

InputSide = Annotated[int, Bounds(least=32), "W H"]
Probabilities = Callable[[str], np.ndarray]  # of an image of the list

# ------------------------------------------------------------------------------------- DT-ST: top p


def top_p_thresholds(
    predictions: Callable[[], Iterable], class_num: int, top_p: float | np.ndarray
) -> np.ndarray:
    """Least confidence that is kept, per class (float32, K); infinity for a class without pixels.

    predictions as in `radix_select`; top_p in (0, 1], one number or one a class (K). DT-ST's rule:
    of a class's n confidences in rising order, the threshold is number round(n * (1 - top_p)); a
    pixel at or above it is kept (so ties with the threshold are kept).
    """

    def rank_of(n):
        return np.minimum(np.round(n * (1 - top_p)).astype(np.int64), n - 1)

    found = radix_select(predictions, class_num, rank_of)
    return np.where(np.isnan(found), np.float32(np.inf), found)


# --------------------------------------------------------------------------------------------- CBST


def cbst_thresholds(
    predictions: Callable[[], Iterable], class_num: int, portion: float, policy: str
) -> np.ndarray:
    """What CBST divides a class's probabilities by (float32, K).

    predictions as in `radix_select`, every pixel; portion in (0, 1]. Released code: a list of
    confidences and one 0.0 (policy cb, a list a class), in falling order; of n numbers the
    threshold is number floor(n * portion), counted from 1. The confidences are those of every
    fourth pixel of each image and predicted class in raster order. Policy global: one list of all
    classes, each with its 0.0, and another 0.0. A threshold of 0, or of no number, becomes 1.
    """
    zeros, ranked = (1, class_num) if policy == "cb" else (class_num + 1, 1)

    def sampled() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for prediction, confidence in predictions():
            flat = prediction.ravel()
            parts = [np.flatnonzero(flat == c)[::CBST_STEP] for c in np.unique(flat)]
            chosen = np.concatenate(parts)
            classes = flat[chosen] if policy == "cb" else np.zeros_like(chosen)
            yield classes, confidence.ravel()[chosen]

    def rank_of(samples):
        return samples - np.floor((samples + zeros) * portion).astype(np.int64)

    found = np.broadcast_to(radix_select(sampled, ranked, rank_of), class_num)
    return np.where(np.isnan(found) | (found == 0), np.float32(1), found)


def cbst_label(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """K x H x W float32 → uint8 H x W: the class of the largest p_c / threshold_c (ties to the
    lower ID), IGNORE where that is below 1.

    So a class other than the predicted one may win. It needs all K probabilities, hence a second
    run of the model. Not part of the rule as it is here: CBST's spatial prior, its flip average,
    and the schedule that raises the portion by 0.05 a round (from 0.15 for GTA, 0.2 for SYNTHIA).
    """
    ratio = probabilities / thresholds[:, None, None]
    label, largest = prediction_and_confidence(ratio)
    label[largest < 1] = IGNORE
    return label


# --------------------------------------------------------------------------------- ranks and pixels


def prediction_and_confidence(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K x H x W float32 probabilities → predicted class (uint8 H x W; ties to the lower ID) and its
    probability (float32 H x W).
    """
    prediction = probabilities.argmax(axis=0)
    confidence = np.take_along_axis(probabilities, prediction[None], axis=0)[0]
    return prediction.astype(np.uint8), confidence


def radix_select(
    predictions: Callable[[], Iterable], class_num: int, rank_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Of each class's n confidences in rising order, number rank_of(n), counted from 0: float32, K;
    NaN where that is not one of 0 .. n - 1.

    It equals sorting all pixels, in fixed memory, by radix selection: floats from 0 rank as their
    bit patterns do, so the first pass finds the upper 16 bits of the wanted one, the second its
    lower 16 bits among the confidences that share these.

    predictions: called twice, gives (prediction, confidence) arrays of one shape, image by image.
    rank_of: of all classes at once, whole numbers, K → K.
    """
    found, rank = np.zeros(class_num, dtype=np.uint32), None
    for shift in (16, 0):
        counts = np.zeros(class_num * DIGITS, dtype=np.int64)
        for prediction, confidence in predictions():
            bits = confidence.view(np.uint32) >> shift
            inside = bits // DIGITS == found[prediction]  # in the first pass 0, as found is
            cells = prediction[inside].astype(np.int64) * DIGITS + bits[inside] % DIGITS
            counts += np.bincount(cells, minlength=counts.size)
        counts = counts.reshape(class_num, DIGITS)
        if rank is None:
            n = counts.sum(axis=1)
            rank = rank_of(n)
            has_rank = (rank >= 0) & (rank < n)
        running = counts.cumsum(axis=1)
        digit = (running <= rank[:, None]).sum(axis=1) % DIGITS
        rank = rank - np.take_along_axis(running - counts, digit[:, None], axis=1)[:, 0]
        found = found * np.uint32(DIGITS) + digit.astype(np.uint32)
    return np.where(has_rank, found.view(np.float32), np.float32(np.nan))


def resized_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """… x H x W array at `size` (height, width): row i comes from row floor(i * H / height),
    columns alike.
    """
    if array.shape[-2:] == size:
        return array
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, array.shape[-2:]))
    return array[..., rows[:, None], columns]


# -------------------------------------------------------------------- where probabilities come from


def load_source(
    options: Options, images: list[str], device
) -> tuple[dict[str, Path], Probabilities]:
    """The network of --checkpoint or the arrays of --probabilities, one for every image.

    Returns the input files, {image or kind: path}, and what gives the probabilities of an image on
    the grid whose pixels are ranked: every `pixel_step`-th of the image's in each direction, or all
    of a smaller array; float32 K x height x width.
    """
    root, class_num = options.root_path, options.class_num
    sizes = {image: image_size(root / image) for image in images}
    files = {"list": options.id_list_path, **{image: root / image for image in images}}
    if options.probabilities:
        files |= {image: options.probabilities / f"{image}.npy" for image in images}
        for image, size in sizes.items():
            found = open_array(files[image], class_num).shape[1:]
            check_same_shape(files[image], found, root / image, size)
    else:
        files["checkpoint"] = options.checkpoint
        exact_mode()
        network = load_network(options.checkpoint, device, class_num)
        if options.test_size:
            network = replace(network, test_size=tuple(options.test_size))

    @torch.no_grad()
    def probabilities(image: str) -> np.ndarray:
        if options.probabilities:
            found = read_probabilities(files[image], class_num)
        elif options.multi_scale:
            found = network.multi_scale(read_image(files[image]))[0].cpu().numpy()
        else:
            scores = network.logits(read_image(files[image])).softmax(dim=1)
            found = scores[0].cpu().numpy()
        grid = [min(-(-n // options.pixel_step), m) for n, m in zip(sizes[image], found.shape[1:])]
        return resized_nearest(found, tuple(grid))

    return files, probabilities


def open_array(path: Path, class_num: int) -> np.ndarray:
    """A .npy file of `class_num` probabilities, K x H x W, mapped and not yet read."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not readable as an array ({error}); write <folder>/<image path>.npy"
        ) from None
    if array.dtype.kind != "f" or array.ndim != 3 or len(array) != class_num or not array.size:
        raise UserError(
            f"{path}: {array.dtype} of shape {array.shape}; wanted is floating-point K x H x W with"
            f" K = {class_num} classes (--class-num)"
        )
    return array


def read_probabilities(path: Path, class_num: int) -> np.ndarray:
    """float32 K x H x W of a .npy, checked to be probabilities of `class_num` classes."""
    found = np.array(open_array(path, class_num), dtype=np.float32)
    # 0.02: the sum of 19 float16 roundings stays far below it, logits do not; NaN fails too.
    if not (found.min() >= 0 and np.abs(found.sum(axis=0) - 1).max() < 0.02):
        raise UserError(f"{path}: not probabilities, which add up to 1 per pixel; save the softmax")
    return found


# ------------------------------------------------------------------------------------------- stages


def label_rows(options: Options) -> list[tuple[str, str]]:
    """(image, label) of the list: `leftImg8bit/train/a/x.jpg` → `<exp>/train/a/x.png`. No two
    images share a label, and nothing takes the place of an input.
    """
    labels = {}
    for image, *_ in read_list(options.id_list_path, columns=(1, 2)):
        if "/" not in image:
            raise UserError(
                f"image path {image}: give the folder above the images' as --root-path, so that"
                f" the list has {options.root_path.resolve().name}/{image}"
            )
        label = PurePosixPath(in_experiment(image, options.exp)).with_suffix(".png")
        labels[image] = str(label)
    check_experiment(options.exp, labels)
    check_one_each(labels, "label")
    if options.out_list.resolve() == options.id_list_path.resolve():
        raise UserError(f"--out-list {options.out_list}: is the list that is read; name another")
    return list(labels.items())


def stored_path(folder: Path, label: str, stage: str) -> Path:
    return folder / ".confidence" / stage / f"{label}.npz"


def stored(folder: Path, label: str, stage: str = "predictions") -> list[np.ndarray]:
    """What `store` has saved of an image."""
    with np.load(stored_path(folder, label, stage)) as content:
        return list(content.values())


def store(rows, folder: Path, stage: str, arrays_of: Callable) -> None:
    """Save the arrays of arrays_of(image) where they are missing; this process does its share."""
    rank, world = process_rank()
    share = [(image, stored_path(folder, label, stage)) for image, label in rows[rank::world]]
    share = [(image, path) for image, path in share if not path.exists()]
    for image, path in progress(share, stage):
        arrays = arrays_of(image)
        with atomic_path(path) as temporary:
            np.savez(temporary, *arrays)
    wait_for_all()


def write_labels(
    rows, folder: Path, thresholds: np.ndarray, options: Options, classes: ClassSet
) -> dict:
    """Write every label map, and the overview; returns the content of summary.json."""
    predicted, kept = np.zeros((2, classes.count), dtype=np.int64)
    panels = []
    for image, label in progress(rows, "labels"):
        prediction, confidence = stored(folder, label)
        if options.rule == "cbst":
            [result] = stored(folder, label, "cbst")
        else:
            result = np.where(confidence >= thresholds[prediction], prediction, np.uint8(IGNORE))
        predicted += np.bincount(prediction.ravel(), minlength=classes.count)
        kept += np.bincount(result.ravel(), minlength=256)[: classes.count]
        size = image_size(folder.parent / image)
        write_label(folder.parent / label, resized_nearest(result, size), classes.palette)
        if len(panels) < options.vis:
            maps = (colour_label(x, classes.palette) for x in (prediction, result))
            panels.append([read_image(folder.parent / image), *maps])
    if panels:
        titles = ["image", "prediction", "pseudo-labels (black: none)"]
        sheet = contact_sheet(panels, titles, legend=classes, cell_width=PANEL_WIDTH)
        save_picture(folder / "overview.png", sheet)
    columns = zip(classes.names, predicted.tolist(), kept.tolist(), thresholds.tolist())
    return {
        "images": len(rows),
        "coverage": int(kept.sum()) / int(predicted.sum()),
        "source": options.checkpoint.name if options.checkpoint else str(options.probabilities),
        **options.settings,
        "classes": {
            name: {
                "predicted_pixels": n,
                "kept_pixels": k,
                "kept_share": k / n if n else None,
                "threshold": threshold if math.isfinite(threshold) else None,
            }
            for name, n, k, threshold in columns
        },
    }


def make_labels(
    rows, folder: Path, probabilities: Probabilities, options: Options, classes: ClassSet, device
) -> None:
    """All stages; every process of torchrun takes its share of the model's work, and finds the
    thresholds by itself. run.json tells what this and the starts that were stopped have cost.
    """
    record, first = folder / "run.json", process_rank()[0] == 0
    earlier = read_json(record)["cost"]["seconds"] if first and record.exists() else 0

    def predictions():
        for _, label in progress(rows, "ranking"):
            yield stored(folder, label)

    try:
        ranked = lambda image: prediction_and_confidence(probabilities(image))
        store(rows, folder, "predictions", ranked)
        if options.rule == "cbst":
            thresholds = cbst_thresholds(predictions, classes.count, options.top_p, options.policy)
            relabeled = lambda image: [cbst_label(probabilities(image), thresholds)]
            store(rows, folder, "cbst", relabeled)
        else:
            top_p = np.full(classes.count, options.top_p)
            if options.top_p_things:
                top_p[list(classes.things)] = options.top_p_things
            thresholds = top_p_thresholds(predictions, classes.count, top_p)
        if first:
            summary = write_labels(rows, folder, thresholds, options, classes)
    finally:
        if first:
            write_json(record, manifest(vars(options), device=device, earlier=earlier))
    if first:
        write_json(folder / "summary.json", summary)


# --------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class Options(ListOptions, ClassOptions, DeviceOptions):
    """source and labels"""

    checkpoint: File | None = None
    "a network of train_unimatch.py, UniMatch, DT-ST, CMA, ProDA or SHADE; or else:"
    probabilities: Folder | None = None
    "K x H x W probability arrays of any other model, FOLDER/<image path>.npy"
    test_size: Setting[tuple[InputSide, InputSide] | None] = None
    "the network's input size in pixels (default: that of its format; DT-ST 1536x768 with 19"
    "classes, 1280x640 with 16; ProDA 2048x1024; others the image's own)"
    multi_scale: bool = False
    "with --checkpoint: the mean over seven sizes, 0.5 to 2 times that one, each mirrored too, as"
    "CMA has it for its pixel labels; 25 times the work"
    exp: str
    "name of the experiment: the labels' first folder"
    out_list: List
    "list to write, rows `<image> <label>`"
    rule: Setting[Literal["top-p", "cbst"]] = "top-p"
    "top-p: DT-ST's; cbst: CBST's, which runs the model (or reads the arrays) twice, the second"
    "time for all K probabilities of a pixel, and takes twice as long"
    policy: Setting[Literal["cb", "global"] | None] = None
    "with --rule cbst: a threshold for each class, or one for all (default: cb)"
    top_p: Setting[ShareAbove0] = 0.5
    "share of each class's pixels that is kept, over 0 up to 1 (paper section 3); with --rule cbst"
    "its portion"
    top_p_things: Setting[ShareAbove0 | None] = None
    "another share for things: a false thing grows, for SAM is asked for all of it (default:"
    "--top-p)"
    preset: Literal["full", "dtst"] = "full"
    "full: every pixel is ranked and kept or not; dtst: every fourth of the image's in each"
    "direction, which decides on a block of 4x4, as DT-ST has it"
    vis: CountFrom0 = 4
    "images in overview.png"

    @property
    def pixel_step(self) -> int:
        """Of the grid that pixels are ranked on."""
        return DTST_STEP if self.preset == "dtst" else 1

    @property
    def settings(self) -> dict:
        """What the labels depend on, beside the input files."""
        multi_scale = {"multi_scale": True} if self.multi_scale else {}
        return {**settings_of(self), "pixel_step": self.pixel_step, **multi_scale}


def parse_args(argv: list[str] | None = None) -> Options:
    options = parse_options(Options, __doc__.split("\n\n")[0], argv)
    one_of(options, "checkpoint", "probabilities")
    if options.multi_scale and not options.checkpoint:
        raise UserError("--multi-scale: is for --checkpoint; arrays are taken as they are")
    if options.rule == "cbst":
        options.policy = options.policy or "cb"
        if options.top_p_things:
            raise UserError(f"--top-p-things {options.top_p_things}: belongs to --rule top-p")
    elif options.policy:
        raise UserError(f"--policy {options.policy}: belongs to --rule cbst")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    classes = chosen_classes(options, options.checkpoint and options.checkpoint.parent)
    rows, device = label_rows(options), select_device(options.device)
    root, folder = options.root_path, options.root_path / options.exp
    inputs, probabilities = load_source(options, [image for image, _ in rows], device)
    check_writable(options.out_list.parent)
    summary_path = folder / "summary.json"

    with Outputs(folder) as out, process_group(device) as (rank, _):
        if rank == 0:
            out.accept(options.settings, inputs, (folder / ".confidence").exists())
            write_classes(folder, classes)
        wait_for_all()  # nothing is made before process 0 has accepted the settings
        finished = summary_path.exists() and all((root / label).exists() for _, label in rows)
        if not finished:
            make_labels(rows, folder, probabilities, options, classes, device)
        if rank > 0:
            return
        write_list(options.out_list, rows)
        shutil.rmtree(folder / ".confidence", ignore_errors=True)
    summary = read_json(summary_path)
    print(
        f"{'labels exist' if finished else 'labels made'}: {summary['images']} images in {folder}, "
        f"{100 * summary['coverage']:.1f} % of the pixels labeled; list: {options.out_list}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, "use --device cpu"))
