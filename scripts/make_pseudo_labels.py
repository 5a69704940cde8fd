#!/usr/bin/env python
"""Stage 0: pixel-level pseudo-labels of any model, thresholded class by class over the whole list.

Two rules. `top-p`, DT-ST's: of all pixels of the list that the model predicts as a class, the top p
by confidence (largest softmax probability) keep the class; the rest becomes 255. Paper: p = 0.5;
`--top-p-things` sets another p for things. `cbst`: the rule of CBST's released code, see
`cbst_label`. No ground truth is read.

Inputs   --id-list-path: one image a line, relative to --root-path; further columns are not read;
         and one of
         --checkpoint       a network of train_unimatch.py, UniMatch, DT-ST, ProDA or SHADE, told
                            apart by content; images enter it as its authors feed it
                            (model/network.py)
         --probabilities    a folder of arrays of any other model, K x H x W class probabilities,
                            float16 or wider, as <folder>/<image path>.npy (x.png.npy or x.npy, .npz
                            too), or without its first folder, or the bare file name. Arrays may be
                            smaller than the images. scripts/README.md: how mmsegmentation's models
                            (HRDA, DAFormer, MIC) write them
Outputs  <root>/<exp>/<image path without its first folder>.png   palette PNG of train IDs and 255
         --out-list, rows `<image> <label>`; <root>/<exp>/summary.json (thresholds and shares per
         class), overview.png, settings.json (what the labels were made from), run.json (manifest)

    python -m scripts.make_pseudo_labels --id-list-path splits/cityscapes/train.txt \\
        --root-path data/cityscapes --checkpoint runs/source/latest.pth \\
        --exp pix --out-list splits/cityscapes/pix/train.txt
    python -m scripts.make_pseudo_labels --id-list-path splits/cityscapes/train.txt \\
        --root-path data/cityscapes --checkpoint pretrained/G2C_model_iter020000.pth \\
        --preset dtst --exp DTST --out-list splits/cityscapes/DTST/train.txt
    # the same on four GPUs
    torchrun --nproc_per_node 4 -m scripts.make_pseudo_labels …

Confidences wait in <root>/<exp>/.confidence (5 bytes a pixel, 6 with cbst; removed at the end), so
a stopped run goes on where it was. With `top-p` the model runs once an image, with `cbst` twice.
The ranking is exact: see `ranked_confidences`.

Copied away, this file needs util/ and model/.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np
from PIL import Image

from util.labels import (
    IGNORE,
    check_files,
    check_same_shape,
    class_set,
    holds_pictures,
    image_size,
    read_image,
    read_list,
    write_label,
    write_list,
)
from util.options import (
    add_class_options,
    add_list_options,
    add_run_options,
    check_range,
    check_run_options,
)
from util.outputs import (
    atomic_path,
    check_settings,
    check_writable,
    digest_of_all,
    folder_lock,
    read_json,
    remove_leftovers,
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
    sha256,
)

HALF = 1 << 16  # values of half a float32's bits
# DT-ST keeps every fourth pixel of the label in each direction (256x512 of 1024x2048) and writes it
# as a 4x4 block.
DTST_STEP = 4
CBST_STEP = 4  # CBST ranks every fourth pixel of a class (its released code)
PANEL_WIDTH = 512  # pixels, of the pictures in overview.png


# ------------------------------------------------------------------------------- thresholds by rank


def prediction_and_confidence(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K x H x W float32 probabilities → predicted class (uint8 H x W; ties to the lower ID) and its
    probability (float32 H x W).
    """
    prediction = probabilities.argmax(axis=0)
    confidence = np.take_along_axis(probabilities, prediction[None], axis=0)[0]
    return prediction.astype(np.uint8), confidence


def count_cells(cells: np.ndarray, class_num: int) -> np.ndarray:
    return np.bincount(cells.ravel(), minlength=class_num * HALF).reshape(class_num, HALF)


def ranked_confidences(
    predictions: Callable[[], Iterable],
    class_num: int,
    rank_of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Of each class's n confidences in rising order, number rank_of(n), counted from 0: float32, K;
    NaN where that is not one of 0 .. n - 1.

    predictions: called twice, gives (prediction, confidence) arrays of one shape, image by image.
    rank_of: of all classes at once, whole numbers, K → K.

    It equals sorting all pixels, in fixed memory: floats from 0 rank as their bit patterns do, so
    the first pass counts the upper 16 bits and finds where the wanted one's are, the second counts
    the lower 16 bits of the pixels there.
    """
    counts = np.zeros((class_num, HALF), dtype=np.int64)
    for prediction, confidence in predictions():
        upper = confidence.view(np.uint32) >> 16
        counts += count_cells(prediction.astype(np.int64) * HALF + upper, class_num)
    n = counts.sum(axis=1)
    rank = rank_of(n)
    there_is = (rank >= 0) & (rank < n)
    rank[~there_is] = 0
    running = counts.cumsum(axis=1)
    upper_of = position(running, rank)
    rank -= np.array([row[u - 1] if u else 0 for row, u in zip(running, upper_of)])

    counts[:] = 0
    for prediction, confidence in predictions():
        bits = confidence.view(np.uint32)
        there = bits >> 16 == upper_of[prediction]
        counts += count_cells(
            prediction[there].astype(np.int64) * HALF + (bits[there] & (HALF - 1)), class_num
        )
    lower_of = position(counts.cumsum(axis=1), rank)
    values = (upper_of * HALF + lower_of).astype(np.uint32).view(np.float32)
    return np.where(there_is, values, np.float32(np.nan))


def position(running: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Per class the cell that holds number `rank`; running: counts summed up, K x HALF."""
    return np.array([np.searchsorted(row, r, side="right") for row, r in zip(running, rank)]) % HALF


def top_p_thresholds(
    predictions: Callable[[], Iterable], class_num: int, top_p: float | np.ndarray
) -> np.ndarray:
    """Least confidence that is kept, per class (float32, K); infinity for a class without pixels.

    predictions as in `ranked_confidences`; top_p in (0, 1], one number or one a class (K). DT-ST's
    rule: of a class's n confidences in rising order, the threshold is number round(n * (1 -
    top_p)); a pixel at or above it is kept (so ties with the threshold are kept).
    """

    def rank_of(n):
        return np.minimum(np.round(n * (1 - top_p)).astype(np.int64), n - 1)

    found = ranked_confidences(predictions, class_num, rank_of)
    return np.where(np.isnan(found), np.float32(np.inf), found)


def thresholded(
    prediction: np.ndarray, confidence: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """uint8 H x W: the predicted class where its probability reaches the class's threshold, else
    IGNORE.
    """
    return np.where(confidence >= thresholds[prediction], prediction, IGNORE).astype(np.uint8)


# --------------------------------------------------------------------------------------------- CBST


def every_fourth(predictions: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What CBST ranks: of each image and predicted class every fourth pixel in raster order."""
    for prediction, confidence in predictions:
        flat = prediction.ravel()
        chosen = np.concatenate([np.flatnonzero(flat == c)[::CBST_STEP] for c in np.unique(flat)])
        yield flat[chosen], confidence.ravel()[chosen]


def cbst_thresholds(
    predictions: Callable[[], Iterable], class_num: int, portion: float, policy: str
) -> np.ndarray:
    """What CBST divides a class's probabilities by (float32, K).

    predictions as in `ranked_confidences`, every pixel; portion in (0, 1]. Released code: a list of
    the sampled confidences and one 0.0 (policy cb, a list a class), in falling order; of n numbers
    the threshold is number floor(n * portion), counted from 1. Policy global: one list of all
    classes, each with its 0.0, and another 0.0. A threshold of 0, or of no number, becomes 1.
    """
    zeros = 1 if policy == "cb" else class_num + 1

    def rank_of(samples):
        return samples - np.floor((samples + zeros) * portion).astype(np.int64)

    if policy == "cb":
        found = ranked_confidences(lambda: every_fourth(predictions()), class_num, rank_of)
    else:

        def as_one_class():
            for prediction, confidence in every_fourth(predictions()):
                yield np.zeros_like(prediction), confidence

        found = np.repeat(ranked_confidences(as_one_class, 1, rank_of), class_num)
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


def resized_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """… x H x W array at `size` (height, width): row i comes from row floor(i * H / height),
    columns alike.
    """
    if array.shape[-2:] == size:
        return array
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, array.shape[-2:]))
    return array[..., rows[:, None], columns]


def ranked_grid(image: tuple[int, int], array: tuple[int, int], step: int) -> tuple[int, int]:
    """(height, width) of the grid on which an image's pixels are ranked: every step-th of the
    image's in each direction, or all of a smaller array.

    image, array: (height, width) of the image and of its probabilities.
    """
    return tuple(min(-(-of_image // step), given) for of_image, given in zip(image, array))


# -------------------------------------------------------------------- where probabilities come from


@dataclass(frozen=True)
class Source:
    """A model's probabilities. name: for the record. files: those that they depend on, in the
    list's order, beside the checkpoint. grids: `ranked_grid` of each image. probabilities: of an
    image, float32 K x height x width of its grid.
    """

    name: str
    checkpoint: Path | None
    files: list[Path]
    grids: dict[str, tuple[int, int]]
    probabilities: Callable[[str], np.ndarray]


def array_path(folder: Path, image_path: str) -> Path | None:
    """The array of an image in a folder of probability arrays, or None."""
    path = PurePosixPath(image_path)
    for parts in dict.fromkeys((path.parts, path.parts[1:], path.parts[-1:])):
        for stem in (PurePosixPath(*parts), PurePosixPath(*parts).with_suffix("")):
            for suffix in (".npy", ".npz"):
                if (folder / f"{stem}{suffix}").is_file():
                    return folder / f"{stem}{suffix}"
    return None


def array_paths(folder: Path, images: list[str]) -> dict[str, Path]:
    """{image: its array}; every image has one of its own."""
    paths = {image: array_path(folder, image) for image in images}
    missing = [image for image, path in paths.items() if path is None]
    if missing:
        raise UserError(
            f"{folder}: no array for {missing[0]} ({len(missing)} of {len(images)} images lack"
            f" one); wanted: {missing[0]}.npy, or its file name alone"
        )
    owners = {}
    for image, path in paths.items():
        first = owners.setdefault(path, image)
        if first != image:
            raise UserError(
                f"{path}: would serve {first} and {image}; name arrays by the whole image path,"
                f" {folder / image}.npy"
            )
    return paths


def read_array(file) -> np.ndarray:
    return np.lib.format.read_array(file, allow_pickle=False)


def array_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an open .npy, without its values."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        reader = np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    return shape, dtype


def from_array_file(path: Path, read: Callable):
    """`read` of the open .npy, or of the only array in a .npz."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                return read(file)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise UserError(f"{path}: holds {len(names)} arrays where one is wanted")
            with archive.open(names[0]) as file:
                return read(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not readable as a numpy array ({error}); write it again"
        ) from None


def array_size(path: Path, class_num: int) -> tuple[int, int]:
    """(height, width) of an array file, whose header must be that of `class_num` probabilities."""
    shape, dtype = from_array_file(path, array_header)
    if len(shape) != 3 or shape[0] != class_num or dtype.kind != "f" or 0 in shape:
        raise UserError(
            f"{path}: {dtype} {' x '.join(map(str, shape))} where floating-point "
            f"K x H x W with K = {class_num} classes (--class-num) is wanted"
        )
    return shape[1:]


def read_probabilities(path: Path, class_num: int) -> np.ndarray:
    """float32 K x H x W of a .npy, or of the only array in a .npz; checked to be probabilities of
    `class_num` classes.
    """
    array_size(path, class_num)
    probabilities = from_array_file(path, read_array).astype(np.float32)
    # 0.02: the sum of 19 float16 roundings stays far below it, logits do not.
    if not (
        np.isfinite(probabilities).all()
        and probabilities.min() >= 0
        and np.abs(probabilities.sum(axis=0) - 1).max() < 0.02
    ):
        raise UserError(
            f"{path}: its values are not probabilities that add up to 1 per pixel; save the softmax"
            " output"
        )
    return probabilities


def array_source(folder: Path, images: list[str], root: Path, class_num: int, step: int) -> Source:
    paths, grids = array_paths(folder, images), {}
    for image, path in paths.items():
        size, of_image = array_size(path, class_num), image_size(root / image)
        check_same_shape(path, size, root / image, of_image)
        grids[image] = ranked_grid(of_image, size, step)

    def probabilities(image: str) -> np.ndarray:
        return resized_nearest(read_probabilities(paths[image], class_num), grids[image])

    return Source(str(folder), None, list(paths.values()), grids, probabilities)


def network_source(
    checkpoint: Path,
    images: list[str],
    root: Path,
    class_num: int,
    step: int,
    test_size: tuple[int, int] | None,
    device,
) -> Source:
    """test_size (width, height): the network's input size, instead of that of its format."""
    import torch

    from model.network import load_network

    sizes = {image: image_size(root / image) for image in images}
    grids = {image: ranked_grid(size, size, step) for image, size in sizes.items()}
    exact_mode()
    network = load_network(checkpoint, device, class_num)

    @torch.no_grad()
    def probabilities(image: str) -> np.ndarray:
        logits = network.logits(read_image(root / image), test_size)
        return resized_nearest(logits.softmax(dim=1)[0].cpu().numpy(), grids[image])

    files = [root / image for image in images]
    return Source(checkpoint.name, checkpoint, files, grids, probabilities)


# -------------------------------------------------------------------------------------------- files


def label_path(experiment: str, image_path: str) -> str:
    """`pix`, `leftImg8bit/train/a/x.jpg` → `pix/train/a/x.png`."""
    parts = PurePosixPath(image_path).parts
    if len(parts) < 2:
        raise UserError(
            f"image path {image_path}: it must lie in at least one folder, which the experiment's"
            " name replaces in the label's path"
        )
    return str(PurePosixPath(experiment, *parts[1:]).with_suffix(".png"))


def confidence_path(folder: Path, label: str) -> Path:
    return (
        folder / ".confidence" / PurePosixPath(*PurePosixPath(label).parts[1:]).with_suffix(".npz")
    )


def read_confidence(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as content:
        return content["prediction"], content["confidence"]


def cbst_path(folder: Path, label: str) -> Path:
    """Of the label on the grid, which waits beside its confidences."""
    path = confidence_path(folder, label)
    return path.with_name(path.name + ".npy")


def check_disk(folder: Path, rows, source: Source, bytes_a_pixel: int) -> None:
    """The confidences of every image that has none yet must fit."""
    rows = [row for row in rows if not confidence_path(folder, row[1]).exists()]
    need = bytes_a_pixel * sum(math.prod(source.grids[image]) for image, _ in rows)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: confidences of {len(rows)} images need {need / 1e9:.1f} GB for a while,"
            f" {free / 1e9:.1f} GB are free; make room, or use --preset dtst, which takes a"
            " sixteenth"
        )


def made_of(rows, folder: Path) -> Iterator[Path]:
    """Every image's label map and confidences."""
    for _, label in rows:
        yield folder.parent / label
        yield confidence_path(folder, label)


def check_not_overwritten(rows, options) -> None:
    """No label and no list may take the place of one of the inputs."""
    images = {image for image, _ in rows}
    for image, label in rows:
        if label in images:
            raise UserError(
                f"--exp {options.exp}: the label of {image} would overwrite the image {label};"
                " choose another name"
            )
    if options.out_list.resolve() == Path(options.id_list_path).resolve():
        raise UserError(f"--out-list {options.out_list}: is the list that is read; name another")


# ------------------------------------------------------------------------------------------- stages


def wait_for_all() -> None:
    """Of torchrun's processes, until each of them is here."""
    if process_rank()[1] > 1:
        import torch.distributed as dist

        dist.barrier()


def this_process(rows: list, desc: str, done: Callable[[str], Path]):
    """This process's share of those rows whose file `done(label)` is missing, with progress."""
    rank, world = process_rank()
    share = [row for row in rows[rank::world] if not done(row[1]).exists()]
    return progress(share, desc, quiet=rank > 0)


def predict_all(rows, folder: Path, source: Source) -> None:
    """Run the model on every image without a stored confidence."""
    for image, label in this_process(rows, "predictions", lambda x: confidence_path(folder, x)):
        prediction, confidence = prediction_and_confidence(source.probabilities(image))
        with atomic_path(confidence_path(folder, label)) as temporary:
            np.savez(temporary, prediction=prediction, confidence=confidence)


def cbst_all(rows, folder: Path, source: Source, thresholds: np.ndarray) -> None:
    """Run the model again, for CBST's label of every image that has none."""
    for image, label in this_process(rows, "CBST's second pass", lambda x: cbst_path(folder, x)):
        result = cbst_label(source.probabilities(image), thresholds)
        with atomic_path(cbst_path(folder, label)) as temporary:
            np.save(temporary, result)


def thresholds_of_list(rows, folder: Path, options, classes) -> np.ndarray:
    """The thresholds (float32, K), ranked by process 0 and handed to the others in a file."""
    path = folder / ".confidence" / "thresholds.npy"
    if process_rank()[0] == 0:

        def predictions():
            for _, label in progress(rows, "ranking"):
                yield read_confidence(confidence_path(folder, label))

        if options.rule == "cbst":
            found = cbst_thresholds(predictions, classes.count, options.top_p, options.policy)
        else:
            top_p = np.full(classes.count, options.top_p)
            if options.top_p_things:
                top_p[list(classes.things)] = options.top_p_things
            found = top_p_thresholds(predictions, classes.count, top_p)
        with atomic_path(path) as temporary:
            np.save(temporary, found)
    wait_for_all()
    return np.load(path)


def write_labels(
    rows, root: Path, folder: Path, thresholds: np.ndarray, classes, rule: str, pictures: int
) -> dict:
    """Write every label map; returns pixel counts per class, before and after the threshold, and
    draws the overview.
    """
    predicted, kept = np.zeros((2, classes.count), dtype=np.int64)
    panels = []
    for image, label in progress(rows, "labels"):
        prediction, confidence = read_confidence(confidence_path(folder, label))
        if rule == "cbst":
            result = np.load(cbst_path(folder, label))
        else:
            result = thresholded(prediction, confidence, thresholds)
        predicted += np.bincount(prediction.ravel(), minlength=classes.count)
        kept += np.bincount(result.ravel(), minlength=256)[: classes.count]
        size = image_size(root / image)
        write_label(root / label, resized_nearest(result, size), classes.palette)
        if len(panels) < pictures:
            size = tuple(max(1, length * PANEL_WIDTH // size[1]) for length in size)
            picture = Image.fromarray(read_image(root / image)).resize(size[::-1])
            maps = (resized_nearest(x, size) for x in (prediction, result))
            panels.append([np.array(picture), *(colour_label(x, classes.palette) for x in maps)])
    if panels:
        titles = ["image", "prediction", "pseudo-labels (black: none)"]
        save_picture(folder / "overview.png", contact_sheet(panels, titles, legend=classes))
    return {"predicted": predicted.tolist(), "kept": kept.tolist()}


def settings_of(options, source: Source, step: int) -> dict:
    """What the labels depend on; equal settings give equal labels."""
    contents = "images_sha256" if source.checkpoint else "arrays_sha256"
    return {
        "image_list_sha256": sha256(options.id_list_path),
        "checkpoint_sha256": sha256(source.checkpoint) if source.checkpoint else None,
        contents: digest_of_all(source.files),
        "class_num": options.class_num,
        "rule": options.rule,
        "policy": options.policy,
        "top_p": options.top_p,
        "top_p_things": options.top_p_things,
        "pixel_step": step,
        "test_size": options.test_size,
    }


def summary_of(rows, source: Source, settings: dict, counts: dict, thresholds, names) -> dict:
    columns = zip(names, counts["predicted"], counts["kept"], thresholds.tolist())
    return {
        "images": len(rows),
        "coverage": sum(counts["kept"]) / sum(counts["predicted"]),
        "source": source.name,
        **settings,
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


# --------------------------------------------------------------------------------------------- main


def add_source_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a network of train_unimatch.py, UniMatch, DT-ST, ProDA or SHADE",
    )
    source.add_argument(
        "--probabilities",
        type=Path,
        metavar="FOLDER",
        help="K x H x W probability arrays, .npy or .npz",
    )
    parser.add_argument(
        "--test-size",
        type=int,
        nargs=2,
        metavar=("W", "H"),
        help="the network's input size in pixels (default: that of its format; DT-ST 1536x768 "
        "with 19 classes, 1280x640 with 16; ProDA 2048x1024; others the image's own)",
    )


def parse_options(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_list_options(parser, "perhaps labels, which are not read")
    add_source_options(parser)
    parser.add_argument(
        "--exp", required=True, help="name of the experiment: the labels' first folder"
    )
    parser.add_argument(
        "--out-list",
        type=Path,
        required=True,
        metavar="LIST",
        help="list to write, rows `<image> <label>`",
    )
    add_class_options(parser)
    parser.add_argument(
        "--rule",
        choices=("top-p", "cbst"),
        default="top-p",
        help="top-p: DT-ST's; cbst: CBST's, which runs the model (or reads the arrays) twice, the "
        "second time for all K probabilities of a pixel, and takes twice as long (default: top-p)",
    )
    parser.add_argument(
        "--policy",
        choices=("cb", "global"),
        help="with --rule cbst: a threshold for each class, or one for all (default: cb)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.5,
        metavar="P",
        help="share of each class's pixels that is kept, over 0 up to 1; with --rule cbst its "
        "portion (default: 0.5, paper section 3)",
    )
    parser.add_argument(
        "--top-p-things",
        type=float,
        metavar="P",
        help="another share for things: a false thing grows, for SAM is asked for all of it "
        "(default: --top-p)",
    )
    parser.add_argument(
        "--preset",
        choices=("full", "dtst"),
        default="full",
        help="full: every pixel is ranked and kept or not; dtst: every fourth of the image's in "
        "each direction, which decides on a block of 4x4, as DT-ST has it (default: full)",
    )
    parser.add_argument(
        "--vis", type=int, default=4, metavar="N", help="images in overview.png (default: 4)"
    )
    add_run_options(parser, seed=False)
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options) -> None:
    """Refuses what cannot be; gives --policy its default."""
    check_run_options(options)
    check_range(options, "top_p", "top_p_things", above=0, most=1)
    check_range(options, "test_size", least=32)
    check_range(options, "vis", least=0)
    if not options.exp or "/" in options.exp or options.exp.startswith("."):
        raise UserError(f"--exp {options.exp}: give a plain folder name")
    if options.rule == "cbst":
        options.policy = options.policy or "cb"
        if options.top_p_things:
            raise UserError(f"--top-p-things {options.top_p_things}: belongs to --rule top-p")
    elif options.policy:
        raise UserError(f"--policy {options.policy}: belongs to --rule cbst")


def label_rows(options) -> list[tuple[str, str]]:
    """(image, label) of the list; no two images share a label."""
    images = [row[0] for row in read_list(options.id_list_path, columns=(1, 2))]
    rows, owners = [(image, label_path(options.exp, image)) for image in images], {}
    check_files(options.root_path, images, options.id_list_path)
    for image, label in rows:
        if owners.setdefault(label, image) != image:
            raise UserError(
                f"{options.id_list_path}: {owners[label]} and {image} would share the label"
                f" {label}; images must differ in more than first folder and suffix"
            )
    return rows


def make_labels(rows, folder: Path, source: Source, settings: dict, options, classes) -> None:
    """All stages; every process of torchrun takes its share of the model's work."""
    started = time.monotonic()
    predict_all(rows, folder, source)
    wait_for_all()
    thresholds = thresholds_of_list(rows, folder, options, classes)
    if options.rule == "cbst":
        cbst_all(rows, folder, source, thresholds)
        wait_for_all()
    if process_rank()[0] > 0:
        return
    counts = write_labels(
        rows, folder.parent, folder, thresholds, classes, options.rule, options.vis
    )
    seconds = round(time.monotonic() - started, 1)
    write_json(folder / "run.json", {**manifest(vars(options)), "seconds": seconds})
    summary = summary_of(rows, source, settings, counts, thresholds, classes.names)
    write_json(folder / "summary.json", summary)


def main(argv=None) -> None:
    options = parse_options(argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    rows, root = label_rows(options), Path(options.root_path)
    folder, images = root / options.exp, [image for image, _ in rows]
    device = select_device(options.device)
    step = DTST_STEP if options.preset == "dtst" else 1
    if options.checkpoint:
        test_size = options.test_size and tuple(options.test_size)
        source = network_source(
            options.checkpoint, images, root, classes.count, step, test_size, device
        )
    else:
        source = array_source(options.probabilities, images, root, classes.count, step)
    check_not_overwritten(rows, options)
    check_writable(options.out_list.parent)
    summary_path = folder / "summary.json"

    with folder_lock(folder), process_group(device) as (rank, _):
        settings = {"pixel_step": step}
        if rank == 0:
            settings = settings_of(options, source, step)
            begun = any(map(Path.exists, made_of(rows, folder))) or holds_pictures(folder)
            mend = "choose another --exp, or remove that folder"
            check_settings(folder / "settings.json", settings, "labels made with", mend, begun)
            check_disk(folder, rows, source, 6 if options.rule == "cbst" else 5)
            for parent in {(root / label).parent for _, label in rows}:
                remove_leftovers(parent)
        wait_for_all()  # nothing is made before process 0 has accepted the settings
        finished = summary_path.exists() and all((root / label).exists() for _, label in rows)
        wait_for_all()
        if not finished:
            make_labels(rows, folder, source, settings, options, classes)
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
