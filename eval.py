#!/usr/bin/env python
"""Evaluate a checkpoint, or a set of pseudo-labels, against ground truth: mean IoU from one
confusion matrix.

Inputs   --id-list-path   rows `<image path> <ground-truth path>`, relative to --root-path; and one
         of
         --checkpoint     a network of train_unimatch.py, UniMatch, DT-ST, ProDA or SHADE; images
                          enter it as its authors feed it (model/network.py)
         --labels         pseudo-labels: a list `<image path> <label path>`, whose rows are matched
                          by image path, or a folder of PNGs, named as the images are below their
                          first folder. An image of the ground truth that has no label map counts as
                          unlabeled
Outputs  the table on screen; in --out: metrics.json, confusion.png, confusion.csv, run.json
         (manifest)

    python eval.py --checkpoint runs/seco/latest.pth --id-list-path splits/cityscapes/val.txt \\
        --root-path data/cityscapes --mode sliding_window
    python eval.py --labels splits/cityscapes/DTST_gta_vit_h/train.txt \\
        --id-list-path splits/cityscapes/train.txt --root-path data/cityscapes
    # the same figures, images shared out to four processes
    torchrun --nproc_per_node 4 eval.py …

Modes (UniMatch's): `original`, the whole image in one pass; `sliding_window`, windows of
--crop-size every two thirds of it, cut at the border, their probabilities summed; `center_crop`,
the central square of image and label. The shipped GTA log was evaluated with sliding windows,
SYNTHIA's and BDD's with original: state the mode with every figure.

Copied away, this file needs util/ and model/.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from model.deeplabv3plus import DeepLabV3Plus
from model.network import Network, load_network
from util.charts import confusion_chart, save_chart
from util.images import to_tensor
from util.labels import (
    IDS_13_IN_16,
    IDS_16_IN_19,
    IGNORE,
    ClassSet,
    check_files,
    check_pairs,
    check_same_shape,
    class_set,
    image_size,
    read_image,
    read_label,
    read_list,
)
from util.metrics import confusion_matrix, summary
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
)
from util.outputs import Outputs, atomic_path, write_json
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

Mode = Literal["original", "sliding_window", "center_crop"]
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
    if mode != "sliding_window":
        return model(images).float().softmax(dim=1)
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
    bar of process 0. A `model.network.Network` resizes images itself: mode is then `original`.
    Ground truth has its image's size (util.labels.check_pairs, with same_size).
    """
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
    import torch.distributed as dist

    total = torch.from_numpy(confusion).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def figures(confusion: np.ndarray, classes: ClassSet) -> dict:
    """`util.metrics.summary` with class names, and the means over the 16 and the 13 classes that
    SYNTHIA papers give (all from the one confusion matrix). Percent.
    """
    metrics = summary(confusion)
    per_class, present = metrics.pop("iou"), metrics.pop("present")
    counted = [
        value if value is not None and there else 0.0 for value, there in zip(per_class, present)
    ]

    def mean(ids: Iterable[int]) -> float:
        return float(np.mean([counted[i] for i in ids]))

    if classes.count == 19:
        metrics["miou_16"] = mean(IDS_16_IN_19)
        metrics["miou_13"] = mean(IDS_16_IN_19[i] for i in IDS_13_IN_16)
    elif classes.count == 16:
        metrics["miou_13"] = mean(IDS_13_IN_16)
    metrics["iou"] = dict(zip(classes.names, per_class))
    metrics["absent"] = [name for name, there in zip(classes.names, present) if not there]
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

    checkpoint: Setting[File] | None = None
    "evaluate this network"
    labels: Setting[Annotated[Path, "LIST|FOLDER"]] | None = None
    "evaluate the label maps of this list or folder"
    id_list_path: Setting[List]
    "images and their ground truth"
    root_path: Setting[Folder] = Path("data")
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
    """The network of a checkpoint; other networks than DeepLabV3+ see whole images only."""
    network = load_network(checkpoint, device, class_num)
    if isinstance(network.model, DeepLabV3Plus):
        return network.model
    if mode != "original":
        raise UserError(
            f"{checkpoint}: a network of {network.format}, which is evaluated on whole images; use"
            f" --mode original, not {mode}"
        )
    return network


def write_results(args, confusion: np.ndarray, metrics: dict, classes: ClassSet, images: int):
    """The files of --out; run.json last."""
    with atomic_path(args.out / "confusion.csv") as temporary:
        rows = [",".join(["ground truth \\ prediction", *classes.names, "none"])]
        rows += [
            ",".join([name, *map(str, counts)])
            for name, counts in zip(classes.names, confusion.tolist())
        ]
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
    save_chart(args.out / "confusion.png", confusion_chart(confusion, classes.names))
    record = {
        "mode": args.mode if args.checkpoint else "labels",
        "images": images,
        "class_num": classes.count,
    }
    write_json(args.out / "metrics.json", {**metrics, **record})
    inputs = {"list": args.id_list_path, "checkpoint": args.checkpoint, "labels": args.labels}
    inputs = {name: path for name, path in inputs.items() if path and path.is_file()}
    write_json(args.out / "run.json", manifest(vars(args), inputs))


def prepared(args, rows, class_num: int, device) -> tuple[Callable[[], np.ndarray], str]:
    """(what gives this process's share of the confusion matrix, the table's header), everything
    that it reads checked.
    """
    root = args.root_path
    if args.checkpoint:
        model = checked_network(args.checkpoint, class_num, args.mode, device)
        check_pairs(root, rows, args.id_list_path, class_num, same_size=True)
        how = (class_num, args.mode, args.crop_size, device, "evaluation")
        crop = "" if args.mode == "original" else f" {args.crop_size}"
        return lambda: evaluate_checkpoint(model, rows, root, *how), (
            f"{args.checkpoint}, {len(rows)} images of {args.id_list_path}, mode {args.mode}{crop},"
            " IoU in percent"
        )
    check_files(root, [truth for _, truth in rows], args.id_list_path)
    label_of_image = label_of_images(args.labels, rows, args.id_list_path, root)
    header = f"{args.labels} against {args.id_list_path}: {len(rows)} images, IoU in percent"
    if missing := len(rows) - len(label_of_image):
        header += f"; {missing} of them have no label map and count as unlabeled"
    return lambda: evaluate_labels(label_of_image, rows, root, class_num), header


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    classes = class_set(args.class_num, args.stuff, args.things)
    rows = read_list(args.id_list_path)
    device = select_device(args.device)
    exact_mode()
    measure, header = prepared(args, rows, classes.count, device)
    with Outputs(args.out) if args.out else contextlib.nullcontext():
        with process_group(device) as (rank, _):
            confusion = summed(measure(), device)
        if rank > 0:
            return
        metrics = figures(confusion, classes)
        print(table(metrics, header))
        if args.out:
            write_results(args, confusion, metrics, classes, len(rows))


if __name__ == "__main__":
    sys.exit(run_main(main, "use --device cpu"))
