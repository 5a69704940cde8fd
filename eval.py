#!/usr/bin/env python
"""Evaluate a checkpoint, or a set of pseudo-labels, against ground truth: mean IoU from one
confusion matrix. Or write a checkpoint's predictions.

Inputs   --id-list-path   rows `<image path> <ground-truth path>`, relative to --root-path; with
                          --predictions also `<image path>` alone, which gives no figures
         --checkpoint     a network of train_unimatch.py, UniMatch, DT-ST, CMA, ProDA or SHADE;
                          images enter it as its authors feed it (model/network.py)
         --labels         instead: a list `<image path> <label path>`, or a folder of PNGs, named as
                          the images are below their first folder. What has none is unlabeled
Outputs  the table on screen; in --out: metrics.json, confusion.png, confusion.csv, run.json
         (manifest, and what they were made from: of the same, they are not made again).
         With --predictions FOLDER, FOLDER/<image path>.png of every image, in its size: train IDs
         (with the classes' colours as palette), Cityscapes' label IDs or colours. Stopped, the same
         command goes on; FOLDER holds predictions of one checkpoint, list and mode

    python eval.py --checkpoint runs/seco/latest.pth --id-list-path splits/cityscapes/val.txt \\
        --root-path data/cityscapes --mode sliding_window
    python eval.py --labels splits/cityscapes/DTST_gta_vit_h/train.txt \\
        --id-list-path splits/cityscapes/train.txt --root-path data/cityscapes
    python eval.py --checkpoint runs/seco/latest.pth --id-list-path splits/cityscapes/test.txt \\
        --root-path data/cityscapes --mode sliding_window --predictions runs/seco/test \\
        --prediction-values label-ids
    torchrun --nproc_per_node 4 eval.py …    # images are shared out; the same results

Modes (UniMatch's): `original`, the whole image in one pass; `sliding_window`, windows of
--crop-size every two thirds of it, cut at the border, their probabilities summed; `center_crop`,
the central square of image and label (255 around it in a prediction). CMA's, for wide images as
ACDC's: `square_windows`, squares of the image's height, their logits averaged (model/network.py).
The shipped GTA log was evaluated with sliding windows, SYNTHIA's and BDD's with original: state the
mode with every figure.

Copied away, this file needs util/ and model/.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image

from util.charts import GRID, new_chart, save_chart
from util.labels import (
    CITYSCAPES_19,
    IGNORE,
    LABEL_IDS_OF_19,
    ClassSet,
    check_files,
    check_one_each,
    check_pairs,
    check_same_shape,
    chosen_classes,
    image_size,
    label_folder,
    read_image,
    read_label,
    read_list,
    write_label,
)
from util.metrics import confusion_matrix, metrics_of, table
from util.options import (
    Bounds,
    ClassOptions,
    DeviceOptions,
    File,
    Folder,
    ListOptions,
    Setting,
    one_of,
    parse_options,
    settings_of,
)
from util.outputs import (
    Outputs,
    atomic_path,
    made_before,
    made_from,
    read_json,
    write_json,
    write_text,
)
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

if TYPE_CHECKING:  # else where they are used: seconds that a finished evaluation does not need
    import torch

    from model.network import Network

Mode = Literal["original", "sliding_window", "center_crop", "square_windows"]
Values = Literal["train-ids", "label-ids", "colour"]
RESULTS = ("confusion.csv", "confusion.png", "metrics.json")
WINDOW_BATCH = 4
CropSize = Annotated[int, Bounds(least=33), "PIXELS"]  # 33: the least that DeepLabV3+ takes


# --------------------------------------------------------------------------------------- prediction


def sliding_windows(height: int, width: int, size: int) -> list[tuple[slice, slice]]:
    """UniMatch's windows: a start every int(2/3 size); cut at the border, not shifted back."""
    stride = max(int(size * 2 / 3), 1)
    return [
        (slice(top, min(top + size, height)), slice(left, min(left + size, width)))
        for top in range(0, height, stride)
        for left in range(0, width, stride)
    ]


def center_square(height: int, width: int, size: int) -> tuple[slice, slice]:
    """The central `size` x `size` pixels (all of a side that is shorter)."""
    top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
    return slice(top, top + size), slice(left, left + size)


def sliding_scores(model: Callable, images: torch.Tensor, crop_size: int) -> torch.Tensor:
    """Normalised images, B x 3 x H x W → the windows' softmax probabilities, summed, float32
    B x K x H x W. Windows of one shape go through the network WINDOW_BATCH at a time.
    """
    import torch

    height, width = images.shape[-2:]
    by_shape, scores = defaultdict(list), None
    for window in sliding_windows(height, width, crop_size):
        by_shape[images[(..., *window)].shape].append(window)
    for windows in by_shape.values():
        for start in range(0, len(windows), WINDOW_BATCH):
            share = windows[start : start + WINDOW_BATCH]
            batch = torch.cat([images[(..., *window)] for window in share])
            probabilities = model(batch).float().softmax(dim=1)
            if scores is None:
                scores = images.new_zeros(len(images), probabilities.shape[1], height, width)
            for window, values in zip(share, probabilities.chunk(len(share))):
                scores[(..., *window)] += values
    return scores


def label_map(
    network: Network, image: np.ndarray, mode: Mode = "original", crop_size: int = 769
) -> np.ndarray:
    """The predicted class of every pixel, uint8 H x W, of a uint8 H x W x 3 image; IGNORE around
    the square of `center_crop`. Networks other than DeepLabV3+ have one mode, `network.mode`.
    """
    import torch

    with torch.inference_mode():
        if mode in ("original", "square_windows"):
            scores = replace(network, mode=mode).logits(image).softmax(dim=1)
        else:
            images = network.pixels(image)
            if mode == "sliding_window":
                scores = sliding_scores(network.model, images, crop_size)
            else:
                square = images[(..., *center_square(*image.shape[:2], crop_size))]
                scores = network.model(square).float().softmax(dim=1)
        label = scores.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
    if mode != "center_crop":
        return label
    whole = np.full(image.shape[:2], IGNORE, dtype=np.uint8)
    whole[center_square(*whole.shape, crop_size)] = label
    return whole


def write_prediction(path: Path, label: np.ndarray, classes: ClassSet, values: Values) -> None:
    """A PNG of train IDs with palette; or 8 bits of Cityscapes' label IDs, 0 for IGNORE; or RGB,
    black for IGNORE.
    """
    if values == "train-ids":
        write_label(path, label, classes.palette)
        return
    value_of = LABEL_IDS_OF_19 if values == "label-ids" else classes.palette
    table = np.zeros((256, *np.shape(value_of)[1:]), dtype=np.uint8)
    table[: len(value_of)] = value_of
    with atomic_path(path) as temporary:
        Image.fromarray(table[label]).save(temporary, format="PNG")


# --------------------------------------------------------------------------------------- evaluation


def evaluate(rows, root: Path, class_num: int, label_of: Callable[[str], np.ndarray]) -> np.ndarray:
    """The confusion matrix of label maps, to which every process adds its share of the rows.

    Args:
        rows: (image path, ground-truth path); of an image alone nothing is counted.
        root: the folder that paths start from.
        class_num: number of classes.
        label_of: image path → uint8 label map; one of another size than its ground truth is brought
            to it by nearest neighbour.
    """
    rank, world = process_rank()
    confusion = np.zeros((class_num, class_num + 1), dtype=np.int64)
    for image, *truths in progress(rows[rank::world], "evaluation"):
        label = label_of(image)
        if truths:
            truth = read_label(root / truths[0], class_num)
            if label.shape != truth.shape:
                size = truth.shape[::-1]
                label = np.array(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
            confusion += confusion_matrix(truth, label, class_num)
    if world == 1:
        return confusion
    import torch.distributed as dist

    shares = [None] * world
    dist.all_gather_object(shares, confusion)
    return sum(shares)


def evaluate_checkpoint(
    network: Network,
    rows,
    root: Path,
    mode: Mode,
    crop_size: int,
    keep: Callable[[str, np.ndarray], None] | None = None,
) -> np.ndarray:
    """`evaluate` of a network (in eval mode). Ground truth has its image's size
    (util.labels.check_pairs, with same_size).

    keep: called with the image path and the prediction of each.
    """

    def label_of(image: str) -> np.ndarray:
        label = label_map(network, read_image(root / image), mode, crop_size)
        if keep:
            keep(image, label)
        return label

    confusion = evaluate(rows, root, network.class_num, label_of)
    confusion[:, -1] = 0  # pixels around the square of center_crop
    return confusion


def labels_in_folder(folder: Path, images: list[str]) -> dict[str, Path]:
    """{image path: label map} of the images that have one where make_pseudo_labels.py, seco_sam.py
    and seco_scc.py put them below `<root>/<exp>`: <image path without its first folder>.png.
    """
    below = {image: image.partition("/")[2] or image for image in images}
    files = {i: (folder / name).with_suffix(".png").resolve() for i, name in below.items()}
    files = {image: path for image, path in files.items() if path.is_file()}
    check_one_each(files, "label map")
    return files


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


@dataclass(kw_only=True)
class Options(DeviceOptions, ClassOptions, ListOptions):
    """what is evaluated"""

    checkpoint: File | None = None
    "evaluate this network"
    labels: Annotated[Path, "LIST|FOLDER"] | None = None
    "evaluate the label maps of this list or folder"
    mode: Setting[Mode] = "original"
    "how images go through the network"
    crop_size: Setting[CropSize] = 769
    "side of windows and of the central square, 33 or more"
    out: Folder | None = None
    "where to leave metrics.json and the pictures"
    predictions: Folder | None = None
    "where to leave the label map of every image, as PNG"
    prediction_values: Values = "train-ids"
    "what its pixels are; label-ids are Cityscapes' 34, which its server wants"


def parse_args(argv: list[str] | None = None) -> Options:
    args = parse_options(Options, __doc__, argv)
    if one_of(args, "checkpoint", "labels") == "labels" and args.predictions:
        raise UserError("--predictions: a network makes them; give --checkpoint, not --labels")
    return args


class Evaluation:
    """What the options ask for; lists and label maps are checked.

    rows: (image path, ground-truth path), or of images alone. maps: {image path: its label map}, of
    --labels. predictions: {image path: where its prediction goes}. files: {name: file} of all that
    is read.
    """

    def __init__(self, args: Options):
        root, self.args = args.root_path, args
        columns = (1, 2) if args.predictions and not args.out else (2,)
        self.rows = rows = read_list(args.id_list_path, columns)
        self.labeled = len(rows[0]) == 2
        if len({len(row) for row in rows}) > 1:
            raise UserError(f"{args.id_list_path}: some lines lack a ground truth; give two lists")
        beside = args.checkpoint.parent if args.checkpoint else args.labels
        if beside.is_file():
            beside = label_folder(root, read_list(beside))
        self.classes = chosen_classes(args, beside)
        if args.prediction_values == "label-ids" and self.classes.names != CITYSCAPES_19.names:
            raise UserError(
                "--prediction-values label-ids: they are known of Cityscapes' 19 classes only; use"
                " train-ids"
            )
        images, names = [row[0] for row in rows], [row[-1] for row in rows]
        names += images if args.checkpoint else []  # with --labels no image is read
        self.maps, self.predictions = {}, {}
        if args.predictions:
            places = ((args.predictions / image).with_suffix(".png") for image in images)
            self.predictions = dict(zip(images, places))
            check_one_each(self.predictions, "prediction")
        check_files(root, names, args.id_list_path)
        if args.labels:
            self.maps = label_of_images(args.labels, rows, args.id_list_path, root)
        elif not args.checkpoint.is_file():
            raise UserError(f"{args.checkpoint}: no such checkpoint")
        self.settings = {**settings_of(args), "names": self.classes.names}
        named = {"list": args.id_list_path, "checkpoint": args.checkpoint, "labels": args.labels}
        self.files = {name: path for name, path in named.items() if path and not path.is_dir()}
        self.files |= {name: root / name for name in names}
        self.files |= {f"of {image}": root / path for image, path in self.maps.items()}

    @cached_property
    def source(self) -> dict:
        """What the metrics of --out are made from. All files are read for it."""
        return made_from(self.settings, self.files)

    def finished(self) -> bool:
        """Whether an earlier call has left all that is asked for."""
        out = self.args.out
        results = [out / name for name in RESULTS] if out else []
        if not all(path.is_file() for path in (*results, *self.predictions.values())):
            return False
        return not self.labeled or bool(out) and made_before(out / "run.json", self.source)

    def accept(self, folder: Outputs) -> None:
        """In process 0: refuse the folder of --predictions if it holds those of something else."""
        values, colours = self.args.prediction_values, self.classes.palette
        inputs = {"checkpoint": self.args.checkpoint}
        inputs |= {image: self.args.root_path / image for image in self.predictions}
        settings = {**self.settings, "prediction_values": values, "colours": colours}
        folder.accept(settings, inputs)

    def label_map(self, image: str) -> np.ndarray:
        """The label map of --labels; one pixel without a label where there is none."""
        if image in self.maps:
            return read_label(self.args.root_path / self.maps[image], self.classes.count)
        return np.full((1, 1), IGNORE, np.uint8)

    def keep(self, image: str, label: np.ndarray) -> None:
        """Write the prediction of an image, unless it is there."""
        path = self.predictions[image]
        if not path.is_file():
            write_prediction(path, label, self.classes, self.args.prediction_values)

    def show(self, metrics: dict | None) -> None:
        """On screen, the figures and where the predictions are."""
        args, count = self.args, len(self.rows)
        header = f"{args.checkpoint or args.labels}, {count} images of {args.id_list_path}"
        if args.checkpoint:
            header += f", mode {args.mode}"
            header += f" {args.crop_size}" if args.mode in ("sliding_window", "center_crop") else ""
        elif lacking := count - len(self.maps):
            header += f", {lacking} of them have no label map and count as unlabeled"
        print(table(metrics, f"{header}, IoU in percent") if metrics else header)
        if self.predictions:
            print(f"{len(self.predictions)} label maps in {args.predictions}")


def checked_network(task: Evaluation, device) -> Network:
    """The network of the checkpoint; other networks than DeepLabV3+ have one mode, their authors'.
    Its images and ground truth are checked.
    """
    from model.deeplabv3plus import DeepLabV3Plus
    from model.network import load_network

    args, count = task.args, task.classes.count
    network = load_network(args.checkpoint, device, count)
    if args.mode != network.mode and not isinstance(network.model, DeepLabV3Plus):
        images = "whole images" if network.mode == "original" else "square windows"
        raise UserError(
            f"{args.checkpoint}: a network of {network.format}, which is evaluated on {images}; use"
            f" --mode {network.mode}, not {args.mode}"
        )
    if task.labeled:
        check_pairs(args.root_path, task.rows, args.id_list_path, count, same_size=True)
    return network


def confusion_chart(confusion: np.ndarray, names: tuple[str, ...]):
    """A confusion matrix (K x K or K x (K + 1), rows ground truth; the last column of the latter:
    no prediction), each row in percent of its sum, empty rows grey.
    """
    columns = [*names, "none"][: confusion.shape[1]]
    sums = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.where(sums > 0, sums, np.nan)
    side = 100 + 8 * max(map(len, columns)) + 30 * max(6, len(columns))
    axes = new_chart("", "prediction, in % of each row", "ground truth", side, side + 60)
    axes.imshow(shares, "Blues", aspect="auto", vmin=0, vmax=1)
    axes.set_facecolor(GRID)
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        colour = "white" if share > 0.6 else "black"
        where = {"ha": "center", "va": "center", "fontsize": 8}
        axes.text(column, row, f"{100 * share:.0f}", color=colour, **where)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    return axes.figure


def write_results(folder: Path, confusion: np.ndarray, metrics: dict, record: dict) -> None:
    """The files of --out; run.json, which says that they are whole, goes first and comes last."""
    (folder / "run.json").unlink(missing_ok=True)
    names = tuple(metrics["iou"])
    rows = [["ground truth \\ prediction", *names, "none"]]
    rows += [[name, *map(str, row)] for name, row in zip(names, confusion.tolist())]
    write_text(folder / "confusion.csv", "".join(",".join(row) + "\n" for row in rows))
    save_chart(folder / "confusion.png", confusion_chart(confusion, names))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", record)


def measure(task: Evaluation, first: bool) -> None:
    """Evaluate and predict what is not there yet; process 0 tells and writes it."""
    args, device = task.args, select_device(task.args.device)
    exact_mode()
    network = checked_network(task, device) if args.checkpoint else None
    source = task.source if args.out and first else None  # of the files as they are before the work
    rows = task.rows
    if not task.labeled:
        rows = [row for row in rows if not task.predictions[row[0]].is_file()]
    with process_group(device):
        wait_for_all()  # before the first prediction is written
        if network:
            how = (args.root_path, args.mode, args.crop_size)
            keep = task.keep if args.predictions else None
            confusion = evaluate_checkpoint(network, rows, *how, keep)
        else:
            confusion = evaluate(rows, args.root_path, task.classes.count, task.label_map)
    if not first:
        return
    metrics = metrics_of(confusion, task.classes.names) if task.labeled else None
    task.show(metrics)
    record = manifest(vars(args), device)
    if args.predictions:
        write_json(args.predictions / "run.json", record)
    if args.out:
        mode = args.mode if args.checkpoint else "labels"
        metrics |= {"mode": mode, "images": len(rows), "class_num": task.classes.count}
        write_results(args.out, confusion, metrics, {**record, "made_from": source})


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    task, first = Evaluation(args), process_rank()[0] == 0
    with contextlib.ExitStack() as held:
        for place in filter(None, (args.predictions, args.out)):
            folder = held.enter_context(Outputs(place))
            if first and place == args.predictions:
                task.accept(folder)
        if not task.finished():
            measure(task, first)
        elif first:
            task.show(read_json(args.out / "metrics.json") if args.out else None)


if __name__ == "__main__":
    sys.exit(run_main(main, "use --device cpu"))
