#!/usr/bin/env python
"""Stage 0: pixel-level pseudo-labels of any model, thresholded class by class over the whole list
(as in CBST).

Per class, of all pixels of the list that the model predicts as that class, the top p by confidence
(largest softmax probability) keep the class; the rest becomes 255. Paper: p = 0.5. No ground truth
is read.

Inputs   --image-list: one image a line (further columns are ignored), relative to --root-path; and
         one of
         --checkpoint       a DeepLabV3+ checkpoint of train_unimatch.py, or a DT-ST checkpoint
                            (DeepLabV2); told apart by their content. It must come from a run whose
                            files you trust
         --probabilities    a folder of arrays of any other model, K x H x W class probabilities,
                            float16 or wider, as <folder>/<image path>.npy|.npz, or without its
                            first folder, or the bare file name
Outputs  <root>/<exp>/<image path without its first folder>.png   palette PNG of train IDs and 255
         --out-list, rows `<image> <label>`; <root>/<exp>/summary.json (thresholds and shares per
         class), overview.png, settings.json (what the labels were made from), run.json (manifest)

    python -m scripts.make_pseudo_labels --image-list splits/cityscapes/train.txt \\
        --checkpoint runs/source/latest.pth \\
        --exp pix --out-list splits/cityscapes/pix/train.txt
    python -m scripts.make_pseudo_labels --image-list splits/cityscapes/train.txt --preset dtst \\
        --checkpoint pretrained/G2C_model_iter020000.pth --exp DTST --out-list
        splits/cityscapes/DTST/train.txt
    torchrun --nproc_per_node 4 scripts/make_pseudo_labels.py …            the same, on four GPUs

The network runs once an image. Confidences wait in <root>/<exp>/.confidence (5 bytes a pixel,
removed at the end), so a stopped run goes on where it was. The ranking is exact: see
`class_thresholds`.

Copied away, this file needs util/, model/ and dataset/augment.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from util.labels import (
    IGNORE,
    check_files,
    class_set,
    image_size,
    read_image,
    read_list,
    write_label,
    write_list,
)
from util.options import add_class_options, add_run_options
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import (
    UserError,
    atomic_path,
    check_settings,
    check_writable,
    exact_mode,
    manifest,
    process_group,
    process_rank,
    read_json,
    run_main,
    select_device,
    sha256,
    write_json,
)

HALF = 1 << 16  # values of half a float32's bits
# DT-ST keeps every fourth pixel of the label in each direction (256x512 of 1024x2048) and writes it
# as a 4x4 block.
DTST_STEP = 4
PANEL_WIDTH = 512  # pixels, of the pictures in overview.png


# ----------------------------------------------------------------------------- class-balanced top p


def prediction_and_confidence(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K x H x W float32 probabilities → predicted class (uint8 H x W; ties to the lower ID) and its
    probability (float32 H x W, at most 1).
    """
    prediction = probabilities.argmax(axis=0)
    confidence = np.take_along_axis(probabilities, prediction[None], axis=0)[0]
    return prediction.astype(np.uint8), np.clip(confidence, 0, 1)


def count_cells(cells: np.ndarray, class_num: int) -> np.ndarray:
    return np.bincount(cells.ravel(), minlength=class_num * HALF).reshape(class_num, HALF)


def class_thresholds(
    predictions: Callable[[], Iterable], class_num: int, top_p: float
) -> np.ndarray:
    """Least confidence that is kept, per class (float32, K); infinity for a class without pixels.

    predictions: called twice, gives (prediction, confidence) image by image. top_p in (0, 1].
    DT-ST's rule: of a class's n confidences in rising order, the threshold is number round(n * (1 -
    top_p)), counted from 0; a pixel at or above it is kept (so ties with the threshold are kept).

    It equals sorting all pixels, in fixed memory: floats from 0 rank as their bit patterns do, so
    the first pass counts the upper 16 bits and finds where the threshold's are, the second counts
    the lower 16 bits of the pixels there.
    """
    counts = np.zeros((class_num, HALF), dtype=np.int64)
    for prediction, confidence in predictions():
        upper = confidence.view(np.uint32) >> 16
        counts += count_cells(prediction.astype(np.int64) * HALF + upper, class_num)
    n = counts.sum(axis=1)
    rank = np.array([min(round(k * (1 - top_p)), max(k - 1, 0)) for k in n.tolist()])
    running = counts.cumsum(axis=1)
    upper_of = (
        np.array([np.searchsorted(row, r, side="right") for row, r in zip(running, rank)]) % HALF
    )
    rank -= np.array([row[u - 1] if u else 0 for row, u in zip(running, upper_of)])

    counts[:] = 0
    for prediction, confidence in predictions():
        bits = confidence.view(np.uint32)
        there = bits >> 16 == upper_of[prediction]
        counts += count_cells(
            prediction[there].astype(np.int64) * HALF + (bits[there] & (HALF - 1)), class_num
        )
    lower_of = (
        np.array(
            [np.searchsorted(row, r, side="right") for row, r in zip(counts.cumsum(axis=1), rank)]
        )
        % HALF
    )
    thresholds = (upper_of * HALF + lower_of).astype(np.uint32).view(np.float32)
    return np.where(n > 0, thresholds, np.float32(np.inf))


def thresholded(
    prediction: np.ndarray, confidence: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """uint8 H x W: the predicted class where its probability reaches the class's threshold, else
    IGNORE.
    """
    return np.where(confidence >= thresholds[prediction], prediction, IGNORE).astype(np.uint8)


def resized_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """H x W array at `size` (height, width): row i comes from row floor(i * H / height), columns
    alike.
    """
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, array.shape))
    return array[rows[:, None], columns]


# -------------------------------------------------------------------------------------------- where
# probabilities come from


def array_path(folder: Path, image_path: str) -> Path | None:
    """The array of an image in a folder of probability arrays, or None."""
    path = PurePosixPath(image_path).with_suffix("")
    for name in dict.fromkeys((path, PurePosixPath(*path.parts[1:]), PurePosixPath(path.name))):
        for suffix in (".npy", ".npz"):
            if name.parts and (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def read_probabilities(path: Path, class_num: int) -> np.ndarray:
    """float32 K x H x W of a .npy, or of the only array in a .npz; checked to be probabilities of
    `class_num` classes.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            if len(content.files) != 1:
                raise UserError(f"{path}: holds {len(content.files)} arrays where one is wanted")
            content = content[content.files[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not readable as a numpy array ({error}); write it again"
        ) from None
    if content.ndim != 3 or content.shape[0] != class_num or content.dtype.kind != "f":
        raise UserError(
            f"{path}: {content.dtype} {' x '.join(map(str, content.shape))} where floating-point "
            f"K x H x W with K = {class_num} classes (--class-num) is wanted"
        )
    probabilities = content.astype(np.float32)
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


def network_probabilities(
    checkpoint: Path, class_num: int, test_size: tuple[int, int] | None, device
):
    """A function image (uint8 H x W x 3) → float32 K x H x W softmax at the image's size, of the
    network in a checkpoint.

    test_size (width, height): the network's input size; None is the image's own. Logits are
    upsampled with align_corners=True, as both networks' training does.
    """
    import torch
    from torch.nn.functional import interpolate

    from model.checkpoint import read_checkpoint
    from model.deeplabv2 import is_dtst_checkpoint, load_dtst_checkpoint
    from util.images import to_tensor

    exact_mode()
    content = read_checkpoint(checkpoint)
    if is_dtst_checkpoint(content):
        model = load_dtst_checkpoint(content, checkpoint).to(device)
        found = model.class_num
    else:
        from model.deeplabv3plus import load_segmentation_model

        model, config = load_segmentation_model(checkpoint, device)
        found = config["class_num"]
    if found != class_num:
        raise UserError(f"{checkpoint}: predicts {found} classes, but --class-num is {class_num}")

    @torch.no_grad()
    def probabilities(image: np.ndarray) -> np.ndarray:
        size = image.shape[:2]
        if test_size and test_size[::-1] != size:
            image = np.array(Image.fromarray(image).resize(test_size, Image.Resampling.BILINEAR))
        logits = model(to_tensor(image)[None].to(device)).float()
        if logits.shape[-2:] != size:
            logits = interpolate(logits, size=size, mode="bilinear", align_corners=True)
        return logits.softmax(dim=1)[0].cpu().numpy()

    return probabilities


# -------------------------------------------------------------------------------------------- files


def label_path(experiment: str, image_path: str) -> str:
    """`pix`, `leftImg8bit/train/a/x.jpg` → `pix/train/a/x.png`."""
    parts = PurePosixPath(image_path).parts
    if len(parts) < 2 or parts[0] in ("/", "..", "."):
        raise UserError(
            f"image path {image_path}: it must be relative to --root-path and lie in at least one"
            " folder, which the experiment's name replaces in the label's path"
        )
    return str(PurePosixPath(experiment, *parts[1:]).with_suffix(".png"))


def confidence_path(folder: Path, label: str) -> Path:
    return (
        folder / ".confidence" / PurePosixPath(*PurePosixPath(label).parts[1:]).with_suffix(".npz")
    )


def read_confidence(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as content:
        return content["prediction"], content["confidence"]


def check_disk(folder: Path, root: Path, images: list[str], step: int) -> None:
    """Five bytes a pixel must fit for every image; judged by the first image's size."""
    height, width = image_size(root / images[0])
    need = 5 * -(-height // step) * -(-width // step) * len(images)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: confidences of {len(images)} images need {need / 1e9:.1f} GB for a while,"
            f" {free / 1e9:.1f} GB are free; make room, or use --preset dtst, which takes a"
            " sixteenth"
        )


# ------------------------------------------------------------------------------------------- stages


def predict_all(
    rows, root: Path, folder: Path, probabilities_of, class_num: int, step: int
) -> None:
    """Run the model on every image without a stored confidence; this process takes its share of
    them.
    """
    rank, world = process_rank()
    share = [
        (image, label)
        for image, label in rows[rank::world]
        if not confidence_path(folder, label).exists()
    ]
    for image, label in tqdm(share, desc="predictions", unit="image", disable=rank > 0):
        prediction, confidence = prediction_and_confidence(probabilities_of(image))
        grid = tuple(-(-length // step) for length in prediction.shape)
        path = confidence_path(folder, label)
        with atomic_path(path) as temporary:
            np.savez(
                temporary,
                prediction=resized_nearest(prediction, grid),
                confidence=resized_nearest(confidence, grid),
            )


def write_labels(
    rows, root: Path, folder: Path, thresholds: np.ndarray, classes, pictures: int
) -> dict:
    """Write every label map; returns pixel counts per class, before and after the threshold, and
    draws the overview.
    """
    predicted, kept = np.zeros((2, classes.count), dtype=np.int64)
    panels = []
    for image, label in tqdm(rows, desc="labels", unit="image"):
        prediction, confidence = read_confidence(confidence_path(folder, label))
        result = thresholded(prediction, confidence, thresholds)
        predicted += np.bincount(prediction.ravel(), minlength=classes.count)
        kept += np.bincount(result.ravel(), minlength=256)[: classes.count]
        size = image_size(root / image)
        write_label(root / label, resized_nearest(result, size), classes.palette)
        if len(panels) < pictures:
            size = tuple(length * PANEL_WIDTH // size[1] for length in size)
            panels.append(
                [
                    np.array(Image.fromarray(read_image(root / image)).resize(size[::-1])),
                    *(
                        colour_label(resized_nearest(x, size), classes.palette)
                        for x in (prediction, result)
                    ),
                ]
            )
    if panels:
        titles = ["image", "prediction", "pseudo-labels (black: none)"]
        save_picture(folder / "overview.png", contact_sheet(panels, titles, legend=classes))
    return {"predicted": predicted.tolist(), "kept": kept.tolist()}


def parse_options(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image-list", type=Path, required=True, help="one image a line, relative to --root-path"
    )
    parser.add_argument(
        "--root-path", type=Path, default=Path("data"), help="where paths start (default: ./data)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, help="a DeepLabV3+ checkpoint of ours, or a DT-ST one"
    )
    source.add_argument(
        "--probabilities", type=Path, help="folder of K x H x W probability arrays, .npy or .npz"
    )
    parser.add_argument(
        "--exp", required=True, help="name of the experiment: the labels' first folder"
    )
    parser.add_argument(
        "--out-list", type=Path, required=True, help="list to write, rows `<image> <label>`"
    )
    add_class_options(parser)
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.5,
        help=(
            "share of each class's pixels that is kept, over 0 up to 1 (default: 0.5, paper"
            " section 3)"
        ),
    )
    parser.add_argument(
        "--preset",
        choices=("full", "dtst"),
        default="full",
        help=(
            "full: native input, every pixel; dtst: DT-ST's input size (1536x768 with 19 classes, "
            "1280x640 with 16) and every fourth pixel (default: full)"
        ),
    )
    parser.add_argument(
        "--test-size",
        type=int,
        nargs=2,
        metavar=("W", "H"),
        help="the network's input size in pixels, instead of the preset's",
    )
    parser.add_argument(
        "--vis", type=int, default=4, metavar="N", help="images in overview.png (default: 4)"
    )
    add_run_options(parser, seed=False)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    options = parse_options(argv)
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: give a share over 0 and up to 1")
    if options.test_size and min(options.test_size) < 32:
        raise UserError(
            f"--test-size {' '.join(map(str, options.test_size))}: give a width and a height from"
            " 32 pixels"
        )
    if not options.exp or "/" in options.exp or options.exp.startswith("."):
        raise UserError(f"--exp {options.exp}: give a plain folder name")
    classes = class_set(options.class_num, options.stuff, options.things)
    root, folder = options.root_path, options.root_path / options.exp
    images = [row[0] for row in read_list(options.image_list, columns=(1, 2))]
    rows = [(image, label_path(options.exp, image)) for image in images]
    if len({label for _, label in rows}) < len(rows):
        raise UserError(
            f"{options.image_list}: names an image twice (or two that differ in the first folder or"
            " suffix only)"
        )
    check_files(root, images, options.image_list)
    step, test_size = 1, tuple(options.test_size or ()) or None
    if options.preset == "dtst":
        from model.deeplabv2 import TEST_SIZE

        step = DTST_STEP
        if options.checkpoint and not test_size:
            if options.class_num not in TEST_SIZE:
                raise UserError(
                    f"--preset dtst: DT-ST has no input size for {options.class_num} classes; "
                    "give one with --test-size"
                )
            test_size = TEST_SIZE[options.class_num]

    started = time.monotonic()
    device = select_device(options.device)
    if options.checkpoint:
        of_image = network_probabilities(options.checkpoint, options.class_num, test_size, device)
        source, digest = options.checkpoint.name, sha256(options.checkpoint)

        def probabilities_of(image):
            return of_image(read_image(root / image))

    else:
        source, digest = str(options.probabilities), None
        arrays = {image: array_path(options.probabilities, image) for image in images}
        missing = [image for image, path in arrays.items() if path is None]
        if missing:
            raise UserError(
                f"{options.probabilities}: no array for {missing[0]} ({len(missing)} of"
                f" {len(images)} images lack one); wanted:"
                f" {PurePosixPath(missing[0]).with_suffix('.npy')}, or its file name alone"
            )

        def probabilities_of(image):
            return read_probabilities(arrays[image], options.class_num)

    check_writable(folder)
    check_writable(options.out_list.parent)

    # An hour: the processes meet once, after predicting, and the slowest may be far behind.
    with process_group(device, timeout_seconds=3600) as (rank, world):
        settings = {
            "image_list_sha256": sha256(options.image_list),
            "source": source,
            "source_sha256": digest,
            "class_num": options.class_num,
            "top_p": options.top_p,
            "pixel_step": step,
            "test_size": list(test_size) if test_size else None,
        }
        if rank == 0:
            check_settings(
                folder / "settings.json",
                settings,
                "labels made with",
                "choose another --exp, or remove that folder",
            )
            check_disk(folder, root, images, step)
        summary_path = folder / "summary.json"
        finished = summary_path.exists() and all((root / label).exists() for _, label in rows)
        if not finished:
            predict_all(rows, root, folder, probabilities_of, options.class_num, step)
        if world > 1:
            import torch.distributed as dist

            dist.barrier()
        if rank > 0:
            return
        if not finished:

            def predictions():
                for _, label in tqdm(rows, desc="ranking", unit="image"):
                    yield read_confidence(confidence_path(folder, label))

            thresholds = class_thresholds(predictions, options.class_num, options.top_p)
            counts = write_labels(rows, root, folder, thresholds, classes, options.vis)
            write_json(
                folder / "run.json",
                {**manifest(vars(options)), "seconds": round(time.monotonic() - started, 1)},
            )
            write_json(
                summary_path,
                {
                    "images": len(rows),
                    "coverage": sum(counts["kept"]) / sum(counts["predicted"]),
                    **settings,
                    "classes": {
                        name: {
                            "predicted_pixels": n,
                            "kept_pixels": k,
                            "kept_share": k / n if n else None,
                            "threshold": float(threshold) if n else None,
                        }
                        for name, n, k, threshold in zip(
                            classes.names, counts["predicted"], counts["kept"], thresholds
                        )
                    },
                },
            )
        write_list(options.out_list, rows)
        shutil.rmtree(folder / ".confidence", ignore_errors=True)
    summary = read_json(summary_path)
    print(
        f"{'labels exist' if finished else 'labels made'}: {summary['images']} images in {folder}, "
        f"{100 * summary['coverage']:.1f} % of the pixels labeled; list: {options.out_list}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
