"""PSA, pixel semantic aggregation: pixel-level pseudo-labels and SAM's masks → connectivity-level
pseudo-labels.

Stuff takes the shape of SAM's mask proposals (semantic alignment), things that of the masks SAM
returns for box and point prompts made from their connectivities. Pixels that no mask reaches get no
label (255).

Input:   --id-list-path, lines `<image path> <pseudo-label path>` relative to --root-path; labels
         are PNGs of train IDs. The first folder of a label path is the experiment, <exp>.
Output:  <root>/<exp>_<sam type>/…, the same paths with the aggregated labels, and their list in
         splits/<dataset>/<exp>_<sam type>/, beside the list that was read. `--recipe paper` and the
         ablations add to the name: <exp>_vit_h_paper, <exp>_vit_h_only_alignment. Beside the
         labels: summary.json, vis/, settings.json, stats/.

    python seco_sam.py --id-list-path splits/cityscapes/HRDA_seco/all.txt --class-num 19
    python seco_sam.py --id-list-path splits/cityscapes/HRDA_seco/all.txt --class-num 19 \\
        --limit 8 --vis 8
    torchrun --nproc_per_node=4 seco_sam.py --id-list-path splits/cityscapes/HRDA_seco/all.txt \\
        --class-num 19 --amp bf16
    python seco_sam.py --id-list-path splits/camvid/day/all.txt --class-num 11 \\
        --stuff 0 1 3 4 5 7 --things 2 6 8 9 10 \\
        --sam-type vit_b

The same command goes on where it was stopped; images that are done are skipped and stay in the
list. Needs when copied away: model/{segmenter,sam,sam_fast,sam_decoder,sam_tiny}.py,
util/{run,labels,connectivity,pictures}.py, for the tiny SAM model/sam_tiny.pth, for models of
transformers model/sam_transformers.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyclipper
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.sam import files_digest, load_segmenter, output_name
from model.segmenter import ProposalMask, Segmenter
from util.connectivity import Connectivity, connectivities
from util.labels import (
    IGNORE,
    ClassSet,
    check_files,
    class_set,
    image_size,
    read_label,
    read_list,
    read_picture,
    renamed_experiment,
    renamed_list,
    write_label,
    write_list,
)
from util.options import add_class_options, add_list_options, add_run_options
from util.pictures import COLOURS, colour_label, contact_sheet, overlay, save_picture
from util.run import (
    UserError,
    atomic_path,
    check_settings,
    check_writable,
    exact_mode,
    manifest,
    peak_memory_mb,
    process_rank,
    read_json,
    run_main,
    select_device,
    sha256,
    tune_cpu,
    wait_for,
    write_json,
)

MIN_SHARE = 0.20  # stuff share that a proposal must exceed (released code)
MIN_CLASS_PIXELS = 10  # classes with at most so many labeled pixels prompt nothing (released code)
MIN_AREA = 10  # connectivities with fewer pixels prompt nothing (released code)
UNCLIP = (
    1.25  # a box is offset by UNCLIP x area / perimeter of the rotated rectangle (released code)
)
ENTROPY_WINDOW = 17  # pixels, side of the window of the local label entropy (released code)
ENTROPY_EPSILON = 1e-6  # (released code)
BOX_AREA_FACTOR = 1.5  # enlargement of a box's area (paper, section 3)
# paper recipe: a mask painted over by more than this share is filtered out (our choice: the paper's
# Algorithm 1, line 15, filters overlapping connectivities and does not say how)
MAX_OVERLAP = 0.5


@dataclass(frozen=True)
class Prompt:
    """box: x0 y0 x1 y1; points: k x 2, x y, all positive; both in pixels of the label map."""

    class_id: int
    box: np.ndarray
    points: np.ndarray


@dataclass
class Aggregation:
    """PSA of one image: its label map and what made it. aligned: class given to each proposal, or
    IGNORE; masks: the proposals, where they were asked for.
    """

    label: np.ndarray
    prompts: list[Prompt] = field(default_factory=list)
    aligned: list[int] = field(default_factory=list)
    masks: list[ProposalMask] = field(default_factory=list)


# --------------------------------------------------------------------- stuff: semantic alignment


def aligned_class(counts: np.ndarray, allowed: tuple[int, ...], recipe: str) -> int:
    """The class of a proposal with `counts` labeled pixels of each class (int, K), or IGNORE.

    release: the class of `allowed` with the largest share of all labeled pixels, if the share
    exceeds MIN_SHARE. paper: the class with the largest share, if it is in `allowed`. Equal shares
    go to the lower ID.
    """
    total = counts.sum()
    if total == 0 or not allowed:
        return IGNORE
    if recipe == "paper":
        best = int(counts.argmax())
        return best if best in allowed else IGNORE
    best = min(allowed, key=lambda class_id: (-counts[class_id], class_id))
    return best if counts[best] / total > MIN_SHARE else IGNORE


def semantic_alignment(
    masks: Iterable[ProposalMask],
    label: Tensor,
    allowed: tuple[int, ...],
    class_num: int,
    recipe: str,
) -> tuple[Tensor, list[int]]:
    """Paint the proposals that get a class, in the generator's order (descending predicted IoU).

    label: pixel-level pseudo-labels, uint8 H x W on the masks' device. Returns the painted map
    (same form, IGNORE where nothing was painted) and the class of each proposal (IGNORE: none).
    release: later over earlier. paper: only pixels that are still free, and not at all if more than
    MAX_OVERLAP of the mask is taken.
    """
    painted = torch.full_like(label, IGNORE)
    aligned = []
    for mask, (x0, y0, x1, y1) in masks:
        window = slice(y0, y1 + 1), slice(x0, x1 + 1)
        counts = (
            torch.bincount(label[window][mask].int(), minlength=IGNORE + 1)[:class_num]
            .cpu()
            .numpy()
        )
        class_id = aligned_class(counts, allowed, recipe)
        aligned.append(class_id)
        if class_id != IGNORE:
            paint(painted[window], mask, class_id, recipe)
    return painted, aligned


def save_proposals(path: Path, masks: list[ProposalMask]) -> None:
    """The masks to a file, as bits, compressed: a few hundred kilobytes for an image of
    2048x1024.
    """
    boxes = np.array([box for _, box in masks], dtype=np.int32).reshape(-1, 4)
    bits = np.packbits(
        np.concatenate([m.cpu().numpy().ravel() for m, _ in masks] or [np.zeros(0, bool)])
    )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, boxes=boxes, bits=bits)


def load_proposals(path: Path, device: torch.device) -> list[ProposalMask]:
    """What `save_proposals` wrote."""
    try:
        with np.load(path) as file:
            boxes, bits = file["boxes"].tolist(), np.unpackbits(file["bits"]).astype(bool)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not mask proposals of this script ({error}); remove the file"
        ) from None
    masks, start = [], 0
    for x0, y0, x1, y1 in boxes:
        height, width = y1 - y0 + 1, x1 - x0 + 1
        mask = torch.from_numpy(bits[start : start + height * width].reshape(height, width)).to(
            device
        )
        masks.append((mask, (x0, y0, x1, y1)))
        start += height * width
    return masks


def paint(painted: Tensor, mask: Tensor, class_id: int, recipe: str) -> None:
    """Give `class_id` to the mask's pixels of `painted` (uint8, in place) by the recipe's rule for
    overlaps.
    """
    if recipe == "paper":
        free = mask & (painted == IGNORE)
        if free.sum() < (1 - MAX_OVERLAP) * mask.sum():
            return
        mask = free
    painted.masked_fill_(mask, class_id)


# ---------------------------------------------------------------------------------- things: prompts


def corners_in_order(corners: np.ndarray) -> np.ndarray:
    """Four corners 4 x 2 (x, y) around the rectangle: upper left, upper right, lower right, lower
    left, where left are the two of smallest x.
    """
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    upper_left, lower_left = (0, 1) if by_x[1, 1] > by_x[0, 1] else (1, 0)
    upper_right, lower_right = (2, 3) if by_x[3, 1] > by_x[2, 1] else (3, 2)
    return by_x[[upper_left, upper_right, lower_right, lower_left]]


def area_and_perimeter(polygon: np.ndarray) -> tuple[float, float]:
    """Of a polygon k x 2, summed in float64 in the order of shapely, which the released code calls:
    another order gives other last bits, and now and then another box.
    """
    x, y = polygon.astype(np.float64).T
    twice = sum((x - x[0]) * (np.roll(y, 1) - np.roll(y, -1)))
    sides = np.sqrt((np.roll(x, -1) - x) ** 2 + (np.roll(y, -1) - y) ** 2)
    return abs(float(twice)) / 2, float(sum(sides))


def rotated_unclip_box(connectivity: Connectivity, height: int, width: int) -> np.ndarray | None:
    """Release box: the minimum-area rectangle of the connectivity's outer contour, offset outwards
    with round corners by UNCLIP x area / perimeter; its bounds, clipped to the image.

    The offset is Clipper's, which computes in whole numbers: corners lose their decimals, the
    result is rounded. None where nothing is left of it: lines, and rectangles so thin that they
    become lines. The contour has all its points and the coordinates of the whole label map, on
    which the rectangle's last bits depend.
    """
    rows, columns = connectivity.window
    contours, _ = cv2.findContours(
        connectivity.mask.astype(np.uint8),
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_NONE,
        offset=(columns.start, rows.start),
    )
    rectangle = cv2.minAreaRect(max(contours, key=cv2.contourArea))
    corners = corners_in_order(cv2.boxPoints(rectangle))
    area, perimeter = area_and_perimeter(corners)
    offset = pyclipper.PyclipperOffset()
    offset.AddPath(
        corners.astype(np.int64).tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON
    )
    polygons = offset.Execute(UNCLIP * area / perimeter)
    if not polygons:
        return None
    vertices = np.concatenate(polygons).astype(np.float64)
    box = np.concatenate([vertices.min(axis=0), vertices.max(axis=0)])
    return box.clip(0, [width - 1, height - 1] * 2)


def enlarged_box(connectivity: Connectivity, height: int, width: int) -> np.ndarray:
    """Paper box: the axis-aligned bounding box, its area enlarged by BOX_AREA_FACTOR about its
    centre, clipped.
    """
    x, y, box_width, box_height = connectivity.box
    grow_x, grow_y = (side * (BOX_AREA_FACTOR**0.5 - 1) / 2 for side in (box_width, box_height))
    box = np.array(
        [x - grow_x, y - grow_y, x + box_width - 1 + grow_x, y + box_height - 1 + grow_y]
    )
    return box.clip(0, [width - 1, height - 1] * 2)


def label_entropy(label: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Local label entropy (nats) of the `wanted` pixels (bool H x W), float64 H x W; infinite
    elsewhere.

    Of the class histogram, IGNORE counted as a class, in the ENTROPY_WINDOW window around the
    pixel, of which the part in the image counts: -sum p log(p + ENTROPY_EPSILON). Counts come from
    box sums, one class at a time. Rounded to 12 decimals, so that windows with the same shares tie
    whatever the order of the sum.
    """
    side = (ENTROPY_WINDOW, ENTROPY_WINDOW)
    box_sum = lambda x: cv2.boxFilter(
        x, cv2.CV_32F, side, normalize=False, borderType=cv2.BORDER_CONSTANT
    )  # noqa: E731
    total = box_sum(np.ones(label.shape, np.uint8))[wanted].astype(np.float64)
    value = np.zeros(len(total))
    for class_id in np.flatnonzero(np.bincount(label.ravel(), minlength=IGNORE + 1)):
        share = box_sum((label == class_id).astype(np.uint8))[wanted] / total
        value -= share * np.log(share + ENTROPY_EPSILON)
    entropy = np.full(label.shape, np.inf)
    entropy[wanted] = value.round(12)
    return entropy


def purest_points(connectivity: Connectivity, entropy: np.ndarray) -> np.ndarray:
    """Release points, k x 2 (x, y): with the n pixels in row-major order and h = n // 2, the pixel
    of lowest entropy among indices 0..h and, only if n is odd, one more among h+1..2h. Ties go to
    the first pixel.

    The released code means two points always; for even n its loop never reaches the second.
    """
    rows, columns = np.nonzero(connectivity.mask)
    values = entropy[connectivity.window][rows, columns]
    half = len(values) // 2
    chosen = [int(values[: half + 1].argmin())]
    if len(values) % 2:
        chosen.append(half + 1 + int(values[half + 1 :].argmin()))
    top, left = connectivity.window[0].start, connectivity.window[1].start
    return np.stack([columns[chosen] + left, rows[chosen] + top], axis=1).astype(np.float64)


def centre_point(connectivity: Connectivity) -> np.ndarray:
    """Paper point, 1 x 2 (x, y): the geometric centre (mean position) of the connectivity's
    pixels.
    """
    rows, columns = np.nonzero(connectivity.mask)
    top, left = connectivity.window[0].start, connectivity.window[1].start
    return np.array([[columns.mean() + left, rows.mean() + top]])


def thing_prompts(label: np.ndarray, class_ids: tuple[int, ...], recipe: str) -> list[Prompt]:
    """The prompts of all connectivities of `class_ids` in a label map, classes ascending, within a
    class in raster order.

    Both recipes skip connectivities under MIN_AREA pixels and classes of at most MIN_CLASS_PIXELS:
    the paper is silent, and a few pixels tell SAM nothing.
    """
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
    class_ids = [c for c in sorted(class_ids) if counts[c] > MIN_CLASS_PIXELS]
    if not class_ids:
        return []
    entropy = label_entropy(label, np.isin(label, class_ids)) if recipe == "release" else None
    prompts = []
    for connectivity in connectivities(label, class_ids):
        if connectivity.area < MIN_AREA:
            continue
        if recipe == "release":
            box = rotated_unclip_box(connectivity, *label.shape)
            if box is not None:
                prompts.append(
                    Prompt(connectivity.class_id, box, purest_points(connectivity, entropy))
                )
        else:
            prompts.append(
                Prompt(
                    connectivity.class_id,
                    enlarged_box(connectivity, *label.shape),
                    centre_point(connectivity),
                )
            )
    return prompts


def prompt_things(sam: Segmenter, prompts: list[Prompt], like: Tensor, recipe: str) -> Tensor:
    """Paint the mask of every prompt in order, by the recipe's rule for overlaps: uint8 H x W,
    IGNORE where no mask is.
    """
    painted = torch.full_like(like, IGNORE)
    for start in range(
        0, len(prompts), 4 * sam.prompt_batch
    ):  # bounds the full-size masks in memory
        part = prompts[start : start + 4 * sam.prompt_batch]
        masks = sam.predict(np.stack([p.box for p in part]), [p.points for p in part])
        for prompt, mask in zip(part, masks):
            paint(painted, mask, prompt.class_id, recipe)
    return painted


# ---------------------------------------------------------------------------------------------- PSA


def aggregate(
    image: np.ndarray,
    label: np.ndarray,
    sam: Segmenter,
    classes: ClassSet,
    recipe: str = "release",
    only: str | None = None,
    cache: Path | None = None,
    keep_masks: bool = False,
) -> Aggregation:
    """PSA of one image. image: uint8 H x W x 3, RGB; label: uint8 H x W of train IDs and IGNORE.

    only: None, or one half of PSA for all classes, as the paper's ablation: "alignment" or
    "prompting". cache: file to take the mask proposals from, or to leave them in. keep_masks:
    whether the result holds them.
    """
    every = tuple(sorted(classes.stuff + classes.things))
    stuff, things = (
        (every, ())
        if only == "alignment"
        else ((), every)
        if only == "prompting"
        else (classes.stuff, classes.things)
    )
    sam.set_image(image)
    pixel = torch.as_tensor(label, device=sam.device)
    result, painted = Aggregation(label), torch.full_like(pixel, IGNORE)
    if stuff:
        if cache is not None and cache.is_file():
            masks = load_proposals(cache, sam.device)
        else:
            masks = sam.proposals()
            if cache is not None:
                masks = list(masks)
                save_proposals(cache, masks)
        if keep_masks:
            result.masks = masks = list(masks)
        with sam.watch("align"):
            painted, result.aligned = semantic_alignment(masks, pixel, stuff, classes.count, recipe)
    with sam.watch("make prompts"):
        result.prompts = thing_prompts(label, things, recipe)
    if result.prompts:
        over = prompt_things(sam, result.prompts, pixel, recipe)
        painted = torch.where(over == IGNORE, painted, over)
    result.label = painted.cpu().numpy()
    return result


def read_pair(root: Path, row: tuple[str, str], class_num: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and pseudo-label of a list's row; the image is resized to the size of the label map."""
    label = read_label(root / row[1], class_num)
    image = read_picture(root / row[0])
    if image.size != label.shape[::-1]:
        image = image.resize(label.shape[::-1], Image.Resampling.BICUBIC)  # released code
    return np.asarray(image), label


# ------------------------------------------------------------------------------------ what is shown


def panel(
    image: np.ndarray, label: np.ndarray, result: Aggregation, classes: ClassSet
) -> Image.Image:
    """Image | pixel labels with the prompts | proposals | PSA, side by side."""
    return contact_sheet(
        [
            [image, prompt_picture(image, label, result, classes)],
            [proposal_picture(image, result), colour_label(result.label, classes.palette)],
        ],
        row_titles=["image | pixel labels, prompts", "proposals | PSA"],
        legend=classes,
    )


def prompt_picture(
    image: np.ndarray, label: np.ndarray, result: Aggregation, classes: ClassSet
) -> np.ndarray:
    """The pixel labels over the image, with the boxes and points of the prompts."""
    prompts = overlay(image, label, classes.palette, 0.75)
    for prompt in result.prompts:
        x0, y0, x1, y1 = (round(v) for v in prompt.box.tolist())
        cv2.rectangle(prompts, (x0, y0), (x1, y1), (255, 255, 255), 1)
        for x, y in prompt.points:
            cv2.circle(prompts, (round(x), round(y)), 2, (255, 255, 0), -1)
    return prompts


def proposal_picture(image: np.ndarray, result: Aggregation) -> np.ndarray:
    """The mask proposals in changing colours over the darkened image."""
    picture = (image * 0.35).astype(np.uint8)
    for i, (mask, (x0, y0, x1, y1)) in enumerate(result.masks):
        window, colour, mask = (
            (slice(y0, y1 + 1), slice(x0, x1 + 1)),
            np.array(COLOURS[i % len(COLOURS)]),
            mask.cpu().numpy(),
        )
        picture[window][mask] = (0.35 * image[window][mask] + 0.65 * colour).astype(np.uint8)
    return picture


def read_stats(folder: Path) -> dict[str, dict]:
    """{label path: its line} of all stats/*.jsonl; a line that a kill cut short is as good as
    absent.
    """
    stats = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                stats[entry["label"]] = entry
            except (ValueError, KeyError):
                continue
    return stats


def summarise(stats: list[dict], classes: ClassSet) -> dict:
    """The summary of a finished list from its images' lines: shares in percent, times in
    seconds.
    """
    pixels = sum(s["pixels"] for s in stats)
    per_class = lambda key: {
        name: sum(s[key].get(str(i), 0) for s in stats)  # noqa: E731
        for i, name in enumerate(classes.names)
    }
    seconds: dict[str, float] = {}
    for entry in stats:
        for stage, value in entry["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    return {
        "images": len(stats),
        "coverage_before": 100 * sum(s["labeled_before"] for s in stats) / pixels,
        "coverage_after": 100 * sum(s["labeled_after"] for s in stats) / pixels,
        "proposals_per_image": sum(s["proposals"] for s in stats) / len(stats),
        "proposals_with_a_class_per_image": sum(s["aligned"] for s in stats) / len(stats),
        "prompts_per_class": per_class("prompts"),
        "connectivities_per_class": per_class("connectivities"),
        "seconds_per_stage": {stage: round(value, 2) for stage, value in seconds.items()},
        "seconds_per_image": round(sum(s["total_seconds"] for s in stats) / len(stats), 3),
    }


def image_stats(
    row: tuple[str, str], label: np.ndarray, result: Aggregation, classes: ClassSet
) -> dict:
    count = lambda ids: {
        str(i): n for i, n in enumerate(np.bincount(ids, minlength=1).tolist()) if n
    }  # noqa: E731
    class_ids = [c.class_id for c in connectivities(result.label, range(classes.count))]
    return {
        "label": row[1],
        "pixels": int(label.size),
        "labeled_before": int(np.count_nonzero(label != IGNORE)),
        "labeled_after": int(np.count_nonzero(result.label != IGNORE)),
        "proposals": len(result.aligned),
        "aligned": sum(c != IGNORE for c in result.aligned),
        "prompts": count(np.array([p.class_id for p in result.prompts], dtype=int)),
        "connectivities": count(np.array(class_ids, dtype=int)),
    }


# --------------------------------------------------------------------------------------------- main


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_list_options(parser, "pseudo-labels")
    add_class_options(parser)
    parser.add_argument(
        "--sam-type",
        default="vit_h",
        metavar="TYPE",
        help=(
            "vit_h, vit_l, vit_b, vit_t (MobileSAM), tiny, or a model of transformers: its name on"
            " the Hugging Face Hub or a local folder; see model/README.md (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--sam-checkpoint",
        metavar="PATH",
        help=(
            "its weights: a file, or a folder for a model of transformers (default:"
            " pretrained/<official name>; tiny: the file shipped here)"
        ),
    )
    parser.add_argument(
        "--recipe",
        default="release",
        choices=("release", "paper"),
        help="what the released code does, or what the paper says (default: %(default)s)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--only-alignment",
        action="store_const",
        dest="only",
        const="alignment",
        help="ablation: semantic alignment for all classes, no prompts",
    )
    only.add_argument(
        "--only-prompting",
        action="store_const",
        dest="only",
        const="prompting",
        help="ablation: prompts for all classes, no proposals",
    )
    parser.add_argument(
        "--prompt-batch",
        type=int,
        metavar="N",
        help=(
            "prompts decoded at a time, halved when memory runs out (default: 8 on a CPU, 64 on a"
            " GPU)"
        ),
    )
    parser.add_argument(
        "--amp",
        default="none",
        choices=("none", "bf16"),
        help=(
            "bf16 is faster; its agreement with fp32 on the first image is reported (default: none)"
        ),
    )
    parser.add_argument(
        "--proposal-cache",
        metavar="DIR",
        help=(
            "keep the mask proposals here, the larger part of the work: another recipe, ablation or"
            " set of labels of the same images takes them from there (default: not kept)"
        ),
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N images; their list is called <name>_first<N>.txt",
    )
    parser.add_argument(
        "--vis",
        type=int,
        default=0,
        metavar="N",
        help="pictures of the first N images (default: 0)",
    )
    add_run_options(parser, seed=False)
    options = parser.parse_args(argv)
    for name in ("prompt_batch", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: give a number from 1 up"
            )
    return options


def output_suffix(options: argparse.Namespace) -> str:
    return (
        output_name(options.sam_type)
        + ("_paper" if options.recipe == "paper" else "")
        + (f"_only_{options.only}" if options.only else "")
    )


def check_inputs(
    rows: list[tuple[str, str]], root: Path, class_num: int, list_path: str
) -> dict[str, str]:
    """Every file of the rows is there, readable and of the class set; returns the SHA-256 of each
    pseudo-label.
    """
    check_files(root, [path for row in rows for path in row], list_path)

    def check(row: tuple[str, str]) -> str:
        read_label(root / row[1], class_num)
        image_size(root / row[0])
        return sha256(root / row[1])

    with ThreadPoolExecutor() as pool:
        digests = list(
            tqdm(
                pool.map(check, rows), total=len(rows), desc="check labels", unit="img", leave=False
            )
        )
    return {row[1]: digest for row, digest in zip(rows, digests)}


def bf16_agreement(
    image: np.ndarray,
    label: np.ndarray,
    sam: Segmenter,
    classes: ClassSet,
    recipe: str,
    only: str | None,
) -> float:
    """Share (percent) of an image's pixels that get the same label in bf16 as in fp32."""
    half = aggregate(image, label, sam, classes, recipe, only).label
    sam.amp = False
    exact = aggregate(image, label, sam, classes, recipe, only).label
    sam.amp = True
    sam.watch.seconds.clear()
    return 100 * float((half == exact).mean())


def process(
    rows: list[tuple[str, str]],
    digests: dict[str, str],
    sam: Segmenter,
    classes: ClassSet,
    options: argparse.Namespace,
    out: Path,
    pictures: dict[str, Path],
    stats_path: Path,
    cache_key: str,
    quiet: bool,
) -> None:
    """PSA of the rows. cache_key: names the SAM in the proposal cache. The next image is read and
    the last one saved while the device works; memory does not grow.
    """
    root, suffix = Path(options.root_path), output_suffix(options)

    def save(row, label, result, picture, seconds, total_seconds) -> None:
        entry = image_stats(row, label, result, classes)
        entry |= {"sha256": digests[row[1]], "seconds": seconds, "total_seconds": total_seconds}
        if picture is not None:
            save_picture(pictures[row[1]], picture)
        stats_path.parent.mkdir(parents=True, exist_ok=True)
        with open(
            stats_path, "a", encoding="utf-8"
        ) as file:  # before the label: a label without it is made again
            file.write(json.dumps(entry) + "\n")
        write_label(root / renamed_experiment(row[1], suffix), result.label, classes.palette)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pairs = deque(reader.submit(read_pair, root, row, classes.count) for row in rows[:2])
        saving: deque = deque()
        for index, row in enumerate(tqdm(rows, desc="PSA", unit="img", disable=quiet)):
            sam.watch.seconds.clear()
            start = time.perf_counter()
            with sam.watch("wait for image"):
                image, label = pairs.popleft().result()
            if index + 2 < len(rows):
                pairs.append(reader.submit(read_pair, root, rows[index + 2], classes.count))
            if index == 0 and sam.amp:
                agreement = bf16_agreement(image, label, sam, classes, options.recipe, options.only)
                print(f"bf16 gives {agreement:.2f} % of {row[0]}'s pixels the same label as fp32")
                write_json(
                    out / "stats" / f"{stats_path.stem}_bf16.json",
                    {"image": row[0], "agreement": agreement},
                )
            cache = None
            if options.proposal_cache is not None:
                size = "x".join(map(str, label.shape[::-1]))
                cache = (
                    Path(options.proposal_cache)
                    / cache_key
                    / f"{sha256(root / row[0])[:32]}_{size}.npz"
                )
            result = aggregate(
                image, label, sam, classes, options.recipe, options.only, cache, row[1] in pictures
            )
            picture = panel(image, label, result, classes) if row[1] in pictures else None
            result.masks = []
            while len(saving) > 2:
                saving.popleft().result()
            seconds = {stage: round(value, 4) for stage, value in sam.watch.seconds.items()}
            saving.append(
                writer.submit(
                    save,
                    row,
                    label,
                    result,
                    picture,
                    seconds,
                    round(time.perf_counter() - start, 4),
                )
            )
        for job in saving:
            job.result()


def main(argv=None) -> None:
    options = parse_args(argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    root, suffix = Path(options.root_path), output_suffix(options)
    rows = read_list(options.id_list_path)[: options.limit]
    outputs = {row[1]: root / renamed_experiment(row[1], suffix) for row in rows}
    if len(outputs) < len(rows):
        raise UserError(
            f"{options.id_list_path}: lists the same label path twice; each may occur once"
        )
    experiments = {Path(row[1]).parts[0] for row in rows}
    if len(experiments) > 1:
        raise UserError(
            f"{options.id_list_path}: label paths of several experiments"
            f" ({', '.join(sorted(experiments))}); give one list for each"
        )
    out = root / renamed_experiment(rows[0][1], suffix).split("/")[0]
    list_path = renamed_list(options.id_list_path, rows[0][1], suffix)
    if options.limit:
        list_path = list_path.with_stem(f"{list_path.stem}_first{options.limit}")
    rank, world = process_rank()
    own = rows[rank::world]
    device = select_device(options.device)
    if options.amp == "none":
        exact_mode()
    tune_cpu()
    sam = load_segmenter(
        options.sam_type,
        options.sam_checkpoint,
        device,
        options.prompt_batch,
        options.amp == "bf16",
    )
    sam_digest = files_digest(sam.files)
    digests = check_inputs(own, root, classes.count, options.id_list_path)
    check_writable(out)
    check_writable(list_path.parent)
    check_settings(
        out / "settings.json",
        {
            "recipe": options.recipe,
            "only": options.only,
            "sam_type": output_name(options.sam_type),
            "sam_sha256": sam_digest,
            "stuff": list(classes.stuff),
            "things": list(classes.things),
            "amp": options.amp,
        },
    )

    cache_key = f"{output_name(options.sam_type)}_{sam_digest[:12]}_{options.amp}"
    stats = read_stats(out / "stats")
    pictures = {row[1]: out / "vis" / f"{Path(row[1]).stem}.png" for row in rows[: options.vis]}

    def done(row: tuple[str, str]) -> bool:
        if not outputs[row[1]].is_file() or row[1] not in stats:
            return False
        if stats[row[1]]["sha256"] != digests[row[1]]:
            raise UserError(
                f"{root / row[1]}: has changed since {outputs[row[1]]} was made from it; remove"
                f" {out} or rename the experiment"
            )
        return row[1] not in pictures or pictures[row[1]].is_file()

    todo = [row for row in own if not done(row)]
    if len(todo) < len(own) and rank == 0:
        print(f"{len(own) - len(todo)} of {len(own)} images are done already")
    process(
        todo,
        digests,
        sam,
        classes,
        options,
        out,
        pictures,
        out / "stats" / f"rank{rank}.jsonl",
        cache_key,
        quiet=rank > 0,
    )
    if rank == 0:
        wait_for(list(outputs.values()), "the other processes")
        write_list(list_path, [(row[0], renamed_experiment(row[1], suffix)) for row in rows])
        lines = read_stats(out / "stats")
        summary = summarise([lines[row[1]] for row in rows], classes) | {
            "peak_memory": peak_memory_mb(device)
        }
        agreement = [read_json(path) for path in sorted((out / "stats").glob("*_bf16.json"))]
        if agreement:
            summary["bf16_agreement"] = agreement
        write_json(
            out / "summary.json",
            summary
            | {
                "manifest": manifest(
                    vars(options),
                    {"list": options.id_list_path, "sam": sam.files[0]},
                )
            },
        )
        print(
            f"{len(rows)} images: {summary['coverage_before']:.1f} % of the pixels labeled before,"
            f" {summary['coverage_after']:.1f} % after; {summary['proposals_per_image']:.0f}"
            f" proposals an image\nlabels: {out}\nlist: {list_path}"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
