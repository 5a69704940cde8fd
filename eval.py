#!/usr/bin/env python
"""Evaluate a checkpoint, or a set of pseudo-labels, against ground truth: mean IoU from one
confusion matrix.

Inputs   --id-list-path   rows `<image path> <ground-truth path>`, relative to --root-path; and one
         of
         --checkpoint     a network of train_unimatch.py, UniMatch, DT-ST, CMA, ProDA or SHADE;
                          images enter it as its authors feed it (model/network.py)
         --labels         pseudo-labels: a list `<image path> <label path>`, whose rows are matched
                          by image path, or a folder of PNGs, named as the images are below their
                          first folder. An image of the ground truth that has no label map counts as
                          unlabeled
Outputs  the table on screen; in --out: metrics.json, confusion.png, confusion.csv, run.json
         (manifest, and what they were made from: of the same, they are not made again)

    python eval.py --checkpoint runs/seco/latest.pth --id-list-path splits/cityscapes/val.txt \\
        --root-path data/cityscapes --mode sliding_window
    python eval.py --labels splits/cityscapes/DTST_gta_vit_h/train.txt \\
        --id-list-path splits/cityscapes/train.txt --root-path data/cityscapes
    # the same figures, images shared out to four processes
    torchrun --nproc_per_node 4 eval.py …

Modes (UniMatch's): `original`, the whole image in one pass; `sliding_window`, windows of
--crop-size every two thirds of it, cut at the border, their probabilities summed; `center_crop`,
the central square of image and label. CMA's, for wide images as ACDC's: `square_windows`, squares
of the image's height, their logits averaged (model/network.py). The shipped GTA log was evaluated
with sliding windows, SYNTHIA's and BDD's with original: state the mode with every figure.

Copied away, this file needs util/ and model/.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image

from util.charts import confusion_chart, save_chart
from util.labels import (
    IDS_13_IN_16,
    IDS_16_IN_19,
    IGNORE,
    check_files,
    check_pairs,
    check_same_shape,
    chosen_classes,
    image_size,
    label_folder,
    read_image,
    read_label,
    read_list,
)
from util.options import (
    Bounds,
    ClassOptions,
    DeviceOptions,
    File,
    Folder,
    List,
    Setting,
    one_of,
    parse_options,
    settings_of,
)
from util.outputs import Outputs, atomic_path, made_before, made_from, read_json, write_json
from util.run import (
    UserError,
    exact_mode,
    manifest,
    process_group,
    process_rank,
    progress,
    run_main,
    select_device,
)

if TYPE_CHECKING:  # else where they are used: seconds that a finished evaluation does not need
    import torch
    from torch import nn

    from model.network import Network

Mode = Literal["original", "sliding_window", "center_crop", "square_windows"]
RESULTS = ("confusion.csv", "confusion.png", "metrics.json")
CropSize = Annotated[int, Bounds(least=33), "PIXELS"]  # 33: the least that DeepLabV3+ takes


# --------------------------------------------------------------------------------------- prediction


def sliding_windows(height: int, width: int, size: int) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of UniMatch's windows: a start every int(2/3 size) while it lies
    in the image; windows are cut at the border, not shifted back, so that those at the border are
    smaller.
    """
    stride = max(int(size * 2 / 3), 1)
    return [
        (top, min(top + size, height), left, min(left + size, width))
        for top in range(0, height, stride)
        for left in range(0, width, stride)
    ]


def center_square(height: int, width: int, size: int) -> tuple[slice, slice]:
    """The central `size` x `size` pixels (all of a side that is shorter)."""
    top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
    return slice(top, top + size), slice(left, left + size)


def predict(
    model: nn.Module, images: torch.Tensor, mode: str, crop_size: int | None, window_batch: int = 4
) -> torch.Tensor:
    """Normalised images, B x 3 x H x W → class scores, float32 B x K x H x W; the largest is the
    prediction.

    Scores are softmax probabilities; of sliding windows their sums. `center_crop` returns the
    central square alone. Windows of one shape go through the network `window_batch` at a time.
    """
    height, width = images.shape[-2:]
    if mode == "center_crop":
        rows, columns = center_square(height, width, crop_size)
        images = images[..., rows, columns]
    if mode == "square_windows":
        from model.network import square_window_logits

        return square_window_logits(model, images).softmax(dim=1)
    if mode != "sliding_window":
        return model(images).float().softmax(dim=1)
    import torch

    by_shape = defaultdict(list)
    for window in sliding_windows(height, width, crop_size):
        by_shape[window[1] - window[0], window[3] - window[2]].append(window)
    scores = None
    for windows in by_shape.values():
        for start in range(0, len(windows), window_batch):
            share = windows[start : start + window_batch]
            batch = torch.cat(
                [images[..., top:bottom, left:right] for top, bottom, left, right in share]
            )
            probabilities = model(batch).float().softmax(dim=1).chunk(len(share))
            if scores is None:
                scores = probabilities[0].new_zeros(
                    len(images), probabilities[0].shape[1], height, width
                )
            for (top, bottom, left, right), values in zip(share, probabilities):
                scores[..., top:bottom, left:right] += values
    return scores


# --------------------------------------------------------------------------------------- evaluation


def evaluate_checkpoint(
    model: nn.Module | Network,
    rows,
    root: Path,
    class_num: int,
    mode: str,
    crop_size: int,
    device,
    bar: str | None = None,
) -> np.ndarray:
    """The confusion matrix of a network (in eval mode) over `rows` (image path, ground-truth path),
    of this process's share of them; `summed` adds the processes' up. `bar`: title of the progress
    bar of process 0. A `model.network.Network` does all of this itself: mode is then its
    own. Ground truth has its image's size (util.labels.check_pairs, with same_size).
    """
    import torch
    from torch import nn

    from model.resnet import to_tensor

    rank, world = process_rank()
    confusion = np.zeros((class_num, class_num + 1), dtype=np.int64)
    share = rows[rank::world]
    for image_path, truth_path in progress(share, bar or "", quiet=bar is None or rank > 0):
        image, truth = read_image(root / image_path), read_label(root / truth_path, class_num)
        if mode == "center_crop":
            truth = truth[center_square(*truth.shape, crop_size)]
        with torch.inference_mode():
            if isinstance(model, nn.Module):
                scores = predict(model, to_tensor(image)[None].to(device), mode, crop_size)
            else:
                scores = model.logits(image).softmax(dim=1)
            prediction = scores.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        confusion += confusion_matrix(truth, prediction, class_num)
    return confusion


def labels_in_folder(folder: Path, images: list[str]) -> dict[str, Path]:
    """{image path: label map} of the images that have one: `<folder>/<image path without its first
    folder>.png`, where make_pseudo_labels.py, seco_sam.py and seco_scc.py put them below
    `<root>/<exp>`. Absolute paths. Two images with one label map are an error.
    """
    image_of: dict[Path, str] = {}
    for image in images:
        below = Path(*Path(image).parts[1:]) if "/" in image else Path(image)
        path = (folder / below).with_suffix(".png").resolve()
        if path.is_file() and image_of.setdefault(path, image) != image:
            raise UserError(
                f"{path}: would be the label map of {image_of[path]} and of {image}; give --labels"
                " a list, whose rows say which is whose"
            )
    return {image: path for path, image in image_of.items()}


def label_of_images(labels: Path, rows, list_path: Path, root: Path) -> dict[str, str | Path]:
    """{image path: label map} of those images of `rows` that `labels`, a list or a folder, has one
    for; files and aspect ratios checked.
    """
    images = [image for image, _ in rows]
    if labels.is_dir():
        found = labels_in_folder(labels, images)
    else:
        listed = dict(read_list(labels))
        found = {image: listed[image] for image in images if image in listed}
    if not found:
        raise UserError(
            f"{labels}: has none of the images of {list_path} (its first: {images[0]}); lists are"
            " matched by image path, a folder's files by that path without its first folder"
        )
    check_files(root, list(found.values()), labels)
    for image, truth in rows:
        if image in found:
            pair = root / found[image], root / truth
            check_same_shape(pair[0], image_size(pair[0]), pair[1], image_size(pair[1]))
    return found


def evaluate_labels(
    label_of_image: dict[str, str | Path], rows, root: Path, class_num: int
) -> np.ndarray:
    """The confusion matrix of pseudo-label maps over `rows` (image path, ground-truth path), of
    this process's share.

    A label map of another size than its ground truth is brought to it by nearest neighbour.
    """
    rank, world = process_rank()
    confusion = np.zeros((class_num, class_num + 1), dtype=np.int64)
    for image_path, truth_path in progress(rows[rank::world], "labels", quiet=rank > 0):
        truth = read_label(root / truth_path, class_num)
        if image_path in label_of_image:
            label = read_label(root / label_of_image[image_path], class_num)
            if label.shape != truth.shape:
                label = np.array(
                    Image.fromarray(label).resize(truth.shape[::-1], Image.Resampling.NEAREST)
                )
        else:
            label = np.full_like(truth, IGNORE)
        confusion += confusion_matrix(truth, label, class_num)
    return confusion


def summed(confusion: np.ndarray, device) -> np.ndarray:
    """The sum of all processes' confusion matrices."""
    if process_rank()[1] == 1:
        return confusion
    import torch
    import torch.distributed as dist

    total = torch.from_numpy(confusion).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


# ------------------------------------------------------------------------------------------ metrics


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, class_num: int) -> np.ndarray:
    """int64 class_num x (class_num + 1): rows true class, columns predicted class; the last column
    counts labeled ground-truth pixels without a prediction (IGNORE in a pseudo-label map).

    truth, prediction: integer arrays of one shape with train IDs and IGNORE. Ground-truth IGNORE is
    left out.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"ground truth is {truth.shape}, prediction {prediction.shape}")
    counted = truth != IGNORE
    predicted = np.minimum(prediction[counted].astype(np.int64), class_num)
    cells = truth[counted].astype(np.int64) * (class_num + 1) + predicted
    shape = (class_num, class_num + 1)
    return np.bincount(cells, minlength=class_num * (class_num + 1)).reshape(shape)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """IoU per class in [0, 1], float64; NaN for a class that is neither in the ground truth nor
    predicted.

    Pixels without a prediction count as missed (they are in the union through the ground truth).
    """
    square = confusion[:, :-1].astype(np.float64)
    hit = np.diag(square)
    union = confusion.sum(axis=1) + square.sum(axis=0) - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(union > 0, hit / union, np.nan)


def metrics_of(confusion: np.ndarray, names: tuple[str, ...]) -> dict:
    """What is read off a confusion matrix (K x (K + 1)), in percent. names: of the K classes.

    miou: mean over all classes, a class absent from the ground truth counting 0 (the shipped logs'
    convention); miou_present: mean over classes present in the ground truth; accuracy: share of the
    predicted pixels that are right; coverage: share of ground-truth pixels with a prediction;
    miou_16, miou_13: means over the classes that SYNTHIA papers give, of 19 and of 16 classes;
    iou: per class, None where neither in the ground truth nor predicted; absent: the classes that
    the ground truth lacks.
    """
    iou, present = class_iou(confusion), confusion.sum(axis=1) > 0
    counted = np.where(present, np.nan_to_num(iou), 0.0)
    total, predicted = int(confusion.sum()), int(confusion[:, :-1].sum())
    hit = int(np.trace(confusion[:, :-1]))
    metrics = {
        "miou": 100 * float(counted.mean()),
        "miou_present": 100 * float(iou[present].mean()) if present.any() else 0.0,
        "coverage": 100 * predicted / total if total else 0.0,
        "accuracy": 100 * hit / predicted if predicted else 0.0,
    }
    ids_13 = [IDS_16_IN_19[i] for i in IDS_13_IN_16]
    parts = {19: {"miou_16": IDS_16_IN_19, "miou_13": ids_13}, 16: {"miou_13": IDS_13_IN_16}}
    for name, ids in parts.get(len(confusion), {}).items():
        metrics[name] = float(np.mean([100 * float(counted[i]) for i in ids]))
    found = [None if np.isnan(value) else 100 * float(value) for value in iou]
    metrics["iou"] = dict(zip(names, found))
    metrics["absent"] = [name for name, there in zip(names, present) if not there]
    return metrics


def table(metrics: dict, header: str) -> str:
    """The figures as text: one class a line, then the means, named by their convention."""
    width = max(len(name) for name in metrics["iou"])
    lines = [header]
    for number, (name, value) in enumerate(metrics["iou"].items()):
        shown = "     -" if value is None else f"{value:6.2f}"
        absent = "   absent from the ground truth" if name in metrics["absent"] else ""
        lines.append(f"  {number:3d} {name:{width}s} {shown}{absent}")
    count = len(metrics["iou"])
    lines.append(
        f"mIoU {metrics['miou']:.2f} %  over all {count} classes, one absent from the ground truth"
        " counting 0 (as in the shipped logs)"
    )
    lines.append(
        f"mIoU {metrics['miou_present']:.2f} %  over the {count - len(metrics['absent'])} classes"
        " present in the ground truth"
    )
    for key, what in (
        ("miou_16", "over SYNTHIA's 16 classes, absent = 0"),
        ("miou_13", "over SYNTHIA's 13 classes (without wall, fence, pole), absent = 0"),
    ):
        if key in metrics:
            lines.append(f"mIoU {metrics[key]:.2f} %  {what}")
    lines.append(
        f"accuracy {metrics['accuracy']:.2f} % of labeled pixels; coverage"
        f" {metrics['coverage']:.2f} % of the ground truth's pixels are labeled"
    )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class EvalOptions:
    """what is evaluated"""

    checkpoint: File | None = None
    "evaluate this network"
    labels: Annotated[Path, "LIST|FOLDER"] | None = None
    "evaluate the label maps of this list or folder"
    id_list_path: List
    "images and their ground truth"
    root_path: Folder = Path("data")
    "folder that the lists' paths start from"
    mode: Setting[Mode] = "original"
    "how images go through the network"
    crop_size: Setting[CropSize] = 769
    "side of windows and of the central square, 33 or more"
    out: Folder | None = None
    "where to leave metrics.json and the pictures"


@dataclass(kw_only=True)
class Options(DeviceOptions, ClassOptions, EvalOptions):
    pass


def parse_args(argv: list[str] | None = None) -> Options:
    args = parse_options(Options, __doc__, argv)
    one_of(args, "checkpoint", "labels")
    return args


def checked_network(checkpoint: Path, class_num: int, mode: str, device):
    """The network of a checkpoint; other networks than DeepLabV3+ have one mode, their authors'."""
    from model.deeplabv3plus import DeepLabV3Plus
    from model.network import load_network

    network = load_network(checkpoint, device, class_num)
    if isinstance(network.model, DeepLabV3Plus):
        return network.model
    if mode != network.mode:
        images = "whole images" if network.mode == "original" else "square windows"
        raise UserError(
            f"{checkpoint}: a network of {network.format}, which is evaluated on {images}; use"
            f" --mode {network.mode}, not {mode}"
        )
    return network


def write_results(folder: Path, confusion: np.ndarray, metrics: dict, record: dict) -> None:
    """The files of --out; run.json, which says that they belong together, goes first and comes
    last.
    """
    (folder / "run.json").unlink(missing_ok=True)
    names = tuple(metrics["iou"])
    with atomic_path(folder / "confusion.csv") as temporary:
        rows = [",".join(["ground truth \\ prediction", *names, "none"])]
        rows += [",".join([name, *map(str, row)]) for name, row in zip(names, confusion.tolist())]
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
    save_chart(folder / "confusion.png", confusion_chart(confusion, names))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", record)


def header_of(args: Options, images: int, labels: int) -> str:
    """What is measured; labels: how many of the images have a label map (with --labels)."""
    if args.checkpoint:
        crop = f" {args.crop_size}" if args.mode in ("sliding_window", "center_crop") else ""
        what = f"{images} images of {args.id_list_path}, mode {args.mode}{crop}"
        return f"{args.checkpoint}, {what}, IoU in percent"
    header = f"{args.labels} against {args.id_list_path}: {images} images, IoU in percent"
    if labels < images:
        header += f"; {images - labels} of them have no label map and count as unlabeled"
    return header


def named_files(args: Options) -> dict[str, Path]:
    """{name: file} of what the options name."""
    files = {"list": args.id_list_path, "checkpoint": args.checkpoint, "labels": args.labels}
    return {name: path for name, path in files.items() if path and not path.is_dir()}


def files_read(args: Options, rows, label_of_image: dict[str, str | Path]) -> dict[str, Path]:
    """{name: file} of all that the metrics are made from; with --labels no image is read."""
    names = [truth for _, truth in rows] + [image for image, _ in rows if args.checkpoint]
    maps = {f"of {image}": args.root_path / path for image, path in label_of_image.items()}
    return named_files(args) | {name: args.root_path / name for name in names} | maps


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root, rows, label_of_image = args.root_path, read_list(args.id_list_path), {}
    beside = args.checkpoint.parent if args.checkpoint else args.labels
    if beside.is_file():
        beside = label_folder(root, read_list(beside))
    classes = chosen_classes(args, beside)
    if args.labels:
        check_files(root, [truth for _, truth in rows], args.id_list_path)
        label_of_image = label_of_images(args.labels, rows, args.id_list_path, root)
    header = header_of(args, len(rows), len(label_of_image))
    settings = {**settings_of(args), "names": classes.names}
    files = files_read(args, rows, label_of_image)
    source = None
    if args.out and all(path.is_file() for path in files.values()):
        source = made_from(settings, files)
        there = all((args.out / name).is_file() for name in RESULTS)
        if there and made_before(args.out / "run.json", source):
            if process_rank()[0] == 0:
                print(table(read_json(args.out / "metrics.json"), header))
            return

    device = select_device(args.device)
    exact_mode()
    if args.checkpoint:
        model = checked_network(args.checkpoint, classes.count, args.mode, device)
        check_pairs(root, rows, args.id_list_path, classes.count, same_size=True)
    with Outputs(args.out) if args.out else contextlib.nullcontext():
        with process_group(device) as (rank, _):
            if args.checkpoint:
                how = (classes.count, args.mode, args.crop_size, device, "evaluation")
                confusion = evaluate_checkpoint(model, rows, root, *how)
            else:
                confusion = evaluate_labels(label_of_image, rows, root, classes.count)
            confusion = summed(confusion, device)
        if rank > 0:
            return
        metrics = metrics_of(confusion, classes.names)
        print(table(metrics, header))
        if args.out:
            mode = args.mode if args.checkpoint else "labels"
            metrics |= {"mode": mode, "images": len(rows), "class_num": classes.count}
            record = manifest(vars(args), named_files(args), device)
            write_results(args.out, confusion, metrics, {**record, "made_from": source})


if __name__ == "__main__":
    sys.exit(run_main(main, "use --device cpu"))
