"""PSA, pixel semantic aggregation: pixel-level pseudo-labels and SAM's masks → connectivity-level
pseudo-labels.

Stuff takes the shape of SAM's mask proposals (semantic alignment), things that of the masks SAM
returns for box and point prompts made from their connectivities. Pixels that no mask reaches get no
label (255), or keep their pixel-level one (--fill pixel).

Input:   --id-list-path, lines `<image path> <pseudo-label path>` relative to --root-path; labels
         are PNGs of train IDs. The first folder of a label path is the experiment, <exp>.
Output:  <root>/<exp>_<sam type>/…, the same paths with the aggregated labels, and their list in
         splits/<dataset>/<exp>_<sam type>/, beside the list that was read. `--recipe paper`, the
         ablations and `--fill` add to the name: <exp>_vit_h_paper, <exp>_vit_h_only_alignment,
         <exp>_vit_h_fill. Beside the labels: summary.json, vis/, settings.json, stats/.

    python seco_sam.py --id-list-path splits/cityscapes/HRDA_seco/all.txt \\
        --root-path data/cityscapes --class-num 19
    torchrun --nproc_per_node=4 seco_sam.py --id-list-path splits/cityscapes/HRDA_seco/all.txt \\
        --root-path data/cityscapes --class-num 19 --amp bf16

The same command goes on where it was stopped; images that are done are skipped and stay in the
list. README.md has the call for one image from Python.

Needs when copied away: dataset/psa.py, model/{segmenter,sam,sam_fast}.py,
util/{labels,options,outputs,pictures,run}.py and, for the tiny SAM, model/sam_tiny.pth.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyclipper
import torch
from PIL import Image
from torch import Tensor

from dataset.psa import Job, Row, image_record, panel, write_summary
from model.sam import files_digest, load_segmenter, output_name
from model.segmenter import ProposalMask, Segmenter, load_proposals, save_proposals
from util.labels import (
    IGNORE,
    ClassSet,
    Connectivity,
    check_pairs,
    connectivities,
    read_label,
    read_picture,
    write_classes,
    write_label,
)
from util.options import (
    ClassOptions,
    Count,
    CountFrom0,
    DeviceOptions,
    Folder,
    List,
    ListOptions,
    one_of,
    parse_options,
)
from util.outputs import Outputs, check_writable, read_json, write_json
from util.pictures import save_picture
from util.run import (
    ahead,
    exact_mode,
    manifest,
    process_rank,
    progress,
    run_main,
    select_device,
    tune_cpu,
)

READ_AHEAD = 2  # images that are read while the device works
# Of the released code:
MIN_SHARE = 0.20  # stuff share that a proposal must exceed
MIN_CLASS_PIXELS = 10  # classes with at most so many labeled pixels prompt nothing
MIN_AREA = 10  # connectivities with fewer pixels prompt nothing
UNCLIP = 1.25  # a box is offset by UNCLIP x area / perimeter of the rotated rectangle
ENTROPY_WINDOW = 17  # pixels, side of the window of the local label entropy
ENTROPY_EPSILON = 1e-6
# Of the paper recipe:
BOX_AREA_FACTOR = 1.5  # enlargement of a box's area (section 3)
# Masks of which more is painted over are filtered out (ours: Algorithm 1, line 15, says not how).
MAX_OVERLAP = 0.5


@dataclass(frozen=True)
class Prompt:
    """box: x0 y0 x1 y1; points: k x 2, x y, all positive; both in pixels of the label map."""

    class_id: int
    box: np.ndarray
    points: np.ndarray


@dataclass
class Aggregation:
    """aligned: class of each proposal, or IGNORE; masks: the proposals, if they were asked for;
    seconds: of each stage.
    """

    label: np.ndarray
    prompts: list[Prompt] = field(default_factory=list)
    aligned: list[int] = field(default_factory=list)
    masks: list[ProposalMask] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def watch(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 4)


# ---------------------------------------------------------------------------------------------- PSA


def aggregate(
    image: np.ndarray,
    label: np.ndarray,
    sam: Segmenter,
    classes: ClassSet,
    recipe: str = "release",
    only: str | None = None,
    fill: str | None = None,
    cache: Path | None = None,
    keep_masks: bool = False,
) -> Aggregation:
    """PSA of one image (the paper's Algorithm 1).

    Args:
        image: uint8 H x W x 3, RGB.
        label: the pixel-level pseudo-label, uint8 H x W of train IDs and IGNORE.
        sam: the segmenter; it encodes the image.
        classes: which train IDs are stuff and which things.
        recipe: "release" or "paper".
        only: None, or one half of PSA for all classes, as the paper's ablation: "alignment" or
            "prompting".
        fill: None, or "pixel": where no mask reaches, the pixel keeps its label.
        cache: folder to take the mask proposals from, or to leave them in.
        keep_masks: whether the result holds the proposals.
    """
    stuff, things = classes.stuff, classes.things
    if only:
        every = tuple(sorted(stuff + things))
        stuff, things = (every, ()) if only == "alignment" else ((), every)
    result = Aggregation(label)
    with result.watch("encode"):
        sam.set_image(image)
    pixel = torch.as_tensor(label, device=sam.device)
    painted = torch.full_like(pixel, IGNORE)
    if stuff:
        with result.watch("find proposals"):
            masks = cached_proposals(sam, image, cache)
            if keep_masks:
                result.masks = masks = list(masks)
        with result.watch("align"):
            painted, result.aligned = semantic_alignment(masks, pixel, stuff, classes.count, recipe)
    with result.watch("make prompts"):
        result.prompts = thing_prompts(label, things, recipe)
    if result.prompts:
        with result.watch("decode prompts"):
            over = prompt_things(sam, result.prompts, pixel, recipe)
        painted = torch.where(over == IGNORE, painted, over)  # things lie over stuff
    if fill == "pixel":
        painted = torch.where(painted == IGNORE, pixel, painted)
    result.label = painted.cpu().numpy()
    return result


# --------------------------------------------------------------------- stuff: semantic alignment


def aligned_class(counts: np.ndarray, allowed: tuple[int, ...], recipe: str) -> int:
    """The class of a proposal with `counts` labeled pixels of each class (int, K), or IGNORE.

    release: the class of `allowed` with the largest share of all labeled pixels, if the share
    exceeds MIN_SHARE. paper: the class with the largest share, if it is in `allowed`. Equal shares
    go to the lower ID.
    """
    total = counts.sum()
    if total == 0:
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

    label: pixel-level pseudo-labels, uint8 H x W on the masks' device. Returns the painted map,
    IGNORE where nothing was painted, and the class of each proposal (IGNORE: none).
    """
    painted, aligned = torch.full_like(label, IGNORE), []
    for mask, (x0, y0, x1, y1) in masks:
        window = slice(y0, y1 + 1), slice(x0, x1 + 1)
        counts = torch.bincount(label[window][mask].int(), minlength=IGNORE + 1)[:class_num]
        class_id = aligned_class(counts.cpu().numpy(), allowed, recipe)
        aligned.append(class_id)
        if class_id != IGNORE:
            paint(painted[window], mask, class_id, recipe)
    return painted, aligned


def paint(painted: Tensor, mask: Tensor, class_id: int, recipe: str) -> None:
    """Give `class_id` to the mask's pixels of `painted` (uint8, in place).

    release: later over earlier. paper: only to pixels that are still free, and not at all if more
    than MAX_OVERLAP of the mask is taken.
    """
    if recipe == "paper":
        free = mask & (painted == IGNORE)
        if free.sum() < (1 - MAX_OVERLAP) * mask.sum():
            return
        mask = free
    painted.masked_fill_(mask, class_id)


# ---------------------------------------------------------------------------------- things: prompts


def corners_in_order(corners: np.ndarray) -> np.ndarray:
    """Corners 4 x 2 (x, y) clockwise from the upper left; left are the two of smallest x."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    upper_left, lower_left = (0, 1) if by_x[1, 1] > by_x[0, 1] else (1, 0)
    upper_right, lower_right = (2, 3) if by_x[3, 1] > by_x[2, 1] else (3, 2)
    return by_x[[upper_left, upper_right, lower_right, lower_left]]


def rotated_unclip_box(connectivity: Connectivity, height: int, width: int) -> np.ndarray | None:
    """Release box: the minimum-area rectangle of the connectivity's outer contour, offset outwards
    with round corners by UNCLIP x area / perimeter; its bounds, clipped to the image.

    The offset is Clipper's, which computes in whole numbers: corners lose their decimals, the
    result is rounded. None where nothing is left of it, as of lines. The contour has all its points
    and the coordinates of the whole label map, on which the rectangle's last bits depend.
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
    # Summed in the order of shapely, which the released code calls.
    x, y = corners.astype(np.float64).T
    area = abs(sum((x - x[0]) * (np.roll(y, 1) - np.roll(y, -1)))) / 2
    perimeter = sum(np.sqrt((np.roll(x, -1) - x) ** 2 + (np.roll(y, -1) - y) ** 2))
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
    """Paper box: the bounding box, its area enlarged BOX_AREA_FACTOR times about its centre."""
    corner, size = np.array(connectivity.box).reshape(2, 2)
    grow = size * (BOX_AREA_FACTOR**0.5 - 1) / 2
    box = np.concatenate([corner - grow, corner + size - 1 + grow])
    return box.clip(0, [width - 1, height - 1] * 2)


def label_entropy(label: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Local label entropy (nats) of the `wanted` pixels (bool H x W), elsewhere infinite: float64.

    Of the class histogram, IGNORE counted as a class, in the ENTROPY_WINDOW window around the
    pixel, of which the part in the image counts: -sum p log(p + ENTROPY_EPSILON). Rounded to 12
    decimals, so that windows with the same shares tie whatever the order of the sum.
    """
    how = {"normalize": False, "borderType": cv2.BORDER_CONSTANT}
    box_sum = lambda x: cv2.boxFilter(x, cv2.CV_32F, (ENTROPY_WINDOW, ENTROPY_WINDOW), **how)
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
    the first pixel. (The released code means two; for even n its loop never reaches the second.)
    """
    x, y, _, _ = connectivity.box
    rows, columns = np.nonzero(connectivity.mask)
    values = entropy[connectivity.window][rows, columns]
    half = len(values) // 2
    chosen = [int(values[: half + 1].argmin())]
    if len(values) % 2:
        chosen.append(half + 1 + int(values[half + 1 :].argmin()))
    return np.stack([columns[chosen] + x, rows[chosen] + y], axis=1).astype(np.float64)


def centre_point(connectivity: Connectivity) -> np.ndarray:
    """Paper point, 1 x 2 (x, y): the geometric centre of the connectivity's pixels."""
    x, y, _, _ = connectivity.box
    rows, columns = np.nonzero(connectivity.mask)
    return np.array([[columns.mean() + x, rows.mean() + y]])


def thing_prompts(label: np.ndarray, class_ids: tuple[int, ...], recipe: str) -> list[Prompt]:
    """The prompts of all connectivities of `class_ids` in a label map, classes ascending, within a
    class in raster order. Both recipes skip connectivities under MIN_AREA pixels and classes of at
    most MIN_CLASS_PIXELS: the paper is silent, and a few pixels tell SAM nothing.
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
            points = purest_points(connectivity, entropy)
        else:
            box = enlarged_box(connectivity, *label.shape)
            points = centre_point(connectivity)
        if box is not None:
            prompts.append(Prompt(connectivity.class_id, box, points))
    return prompts


def prompt_things(sam: Segmenter, prompts: list[Prompt], like: Tensor, recipe: str) -> Tensor:
    """Paint the mask of every prompt in order: uint8 H x W, IGNORE where no mask is."""
    painted, todo = torch.full_like(like, IGNORE), prompts
    while todo:
        count = 4 * sam.prompt_batch  # bounds the full-size masks in memory; memory may halve it
        part, todo = todo[:count], todo[count:]
        masks = sam.predict(np.stack([p.box for p in part]), [p.points for p in part])
        for prompt, mask in zip(part, masks):
            paint(painted, mask, prompt.class_id, recipe)
    return painted


def cached_proposals(
    sam: Segmenter, image: np.ndarray, folder: Path | None
) -> Iterable[ProposalMask]:
    """The proposals of the image that `sam` has encoded, from `folder` if they are there, else left
    there; the image's pixels and size name the file.
    """
    if folder is None:
        return sam.proposals()
    height, width = image.shape[:2]
    path = folder / f"{hashlib.sha256(image.tobytes()).hexdigest()[:32]}_{width}x{height}.npz"
    if path.is_file():
        return load_proposals(path, sam.device)
    masks = list(sam.proposals())
    save_proposals(path, masks)
    return masks


# ------------------------------------------------------------------------------------------- a list


def read_pair(root: Path, row: tuple[str, str], class_num: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and pseudo-label of a list's row; the image is resized to the size of the label map."""
    label = read_label(root / row[1], class_num)
    image = read_picture(root / row[0])
    if image.size != label.shape[::-1]:
        image = image.resize(label.shape[::-1], Image.Resampling.BICUBIC)  # released code
    return np.asarray(image), label


def aggregate_list(
    job: Job, rows: list[Row], sam: Segmenter, how: dict, proposals: Path | None
) -> None:
    """PSA of this process's rows; the next images are read while the device works. how: recipe,
    only and fill. proposals: folder of this SAM's mask proposals.
    """
    classes, agreement = job.classes, {}

    def read(row: Row):
        return *read_pair(job.root, row, classes.count), job.digests(row)

    if rows and sam.amp:
        image, label, _ = read(rows[0])
        labels = []
        for amp in (False, True):
            sam.amp = amp
            labels.append(aggregate(image, label, sam, classes, **how).label)
        share = 100 * float((labels[0] == labels[1]).mean())
        print(f"bf16 gives {share:.2f} % of {rows[0][0]} the labels of fp32")
        agreement[rows[0]] = {"bf16_agreement": share}
    with ThreadPoolExecutor(1) as reader:
        inputs = ahead(reader, read, rows, READ_AHEAD)
        for row in progress(rows, "PSA"):
            start, shown = time.perf_counter(), row[1] in job.shown
            image, label, digests = next(inputs)
            result = aggregate(image, label, sam, classes, **how, cache=proposals, keep_masks=shown)
            if shown:
                save_picture(job.picture(row), panel(image, label, result, classes))
            record = digests | image_record(row, label, result) | agreement.get(row, {})
            record["total_seconds"] = round(time.perf_counter() - start, 4)
            write_json(job.record(row), record)  # before the label: one without it is made again
            write_label(job.label(row), result.label, classes.palette)


# --------------------------------------------------------------------------------------------- main


@dataclass(kw_only=True)
class Options(ListOptions, ClassOptions, DeviceOptions):
    """PSA"""

    sam_type: str = "vit_h"
    "vit_h, vit_l, vit_b, vit_t (MobileSAM), tiny (for drawn scenes), tiny_photo, or a model of"
    "transformers: its name on the Hugging Face Hub or a local folder; see model/README.md"
    sam_checkpoint: str | None = None
    "its weights: a file, or a folder for a model of transformers (default: pretrained/<official"
    "name>; tiny: the file shipped here)"
    prompt_batch: Count | None = None
    "prompts decoded at a time, halved when memory runs out (default: 4 on a CPU, 64 on a GPU)"
    amp: Literal["none", "bf16"] = "none"
    "bf16 is faster; its agreement with fp32 on the first image is reported"
    proposal_cache: Folder | None = None
    "keep the mask proposals here, the larger part of the work: another recipe, ablation or set of"
    "labels of the same images takes them from there (default: not kept)"
    recipe: Literal["release", "paper"] = "release"
    "what the released code does, or what the paper says"
    only_alignment: bool = False
    "ablation: semantic alignment for all classes, no prompts"
    only_prompting: bool = False
    "ablation: prompts for all classes, no proposals"
    fill: Literal["pixel"] | None = None
    "where no mask reaches, keep the pixel-level pseudo-label; neither recipe does it (default: no"
    "label there)"
    exp: str | None = None
    "name of the result (default: <experiment>_<sam type>, and more as the head says)"
    limit: Count | None = None
    "only the first N images; their list is called <name>_first<N>.txt"
    vis: CountFrom0 = 0
    "pictures of the first N images"
    gt: List | None = None
    "list `<image path> <ground-truth path>`: adds the accuracy before and after to the summary,"
    "changes nothing else"

    @property
    def only(self) -> str | None:
        """The half of PSA that is taken for all classes."""
        given = one_of(self, "only_alignment", "only_prompting", needed=False)
        return given and given.removeprefix("only_")

    @property
    def suffix(self) -> str:
        """What the results' names have after the experiment's."""
        paper = "_paper" if self.recipe == "paper" else ""
        only = f"_only_{self.only}" if self.only else ""
        return output_name(self.sam_type) + paper + only + ("_fill" if self.fill else "")


def parse_args(argv: list[str] | None = None) -> Options:
    return parse_options(Options, __doc__, argv)


def tell_classes_without_kind(classes: ClassSet) -> None:
    """Name, on stderr, the classes that are neither stuff nor things, which PSA does not label."""
    kinds = (*classes.stuff, *classes.things)
    names = [name for i, name in enumerate(classes.names) if i not in kinds]
    if names and process_rank()[0] == 0:
        print(
            f"warning: {', '.join(names)}: neither stuff nor things, so all pixels of it lose their"
            " label; add each to --stuff or --things",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    job = Job(options)
    tell_classes_without_kind(job.classes)
    device = select_device(options.device)
    if options.amp == "none":
        exact_mode()
    tune_cpu()
    weights, bf16 = options.sam_checkpoint, options.amp == "bf16"
    sam = load_segmenter(options.sam_type, weights, device, options.prompt_batch, bf16)
    sam_name, sam_digest = output_name(options.sam_type), files_digest(sam.files)
    check_pairs(job.root, job.rows, options.id_list_path, job.classes.count)
    if job.truth:
        known = [(image, job.truth[image]) for image, _ in job.rows]
        check_pairs(job.root, known, options.gt, job.classes.count)
    check_writable(job.list_path.parent)
    proposals = options.proposal_cache
    if proposals:
        proposals = proposals / f"{sam_name}_{sam_digest[:12]}_{options.amp}"
    how = {"recipe": options.recipe, "only": options.only, "fill": options.fill}
    segmenter = {"sam_type": sam_name, "sam_sha256": sam_digest}
    kinds = {"stuff": list(job.classes.stuff), "things": list(job.classes.things)}
    with Outputs(job.out) as out:
        # Every process: the first one notes the settings before it writes a label.
        begun = any(job.label(row).is_file() for row in job.rows)  # in any format
        out.accept(how | segmenter | kinds | {"amp": options.amp}, begun=begun)
        write_classes(job.out, job.classes)
        todo, (rank, world) = job.rows_to_do(), process_rank()
        aggregate_list(job, todo, sam, how, proposals)
        if rank == 0:
            done = set(job.rows[::world]).difference(todo)
            earlier = sum(read_json(job.record(row))["total_seconds"] for row in done)
            made = manifest(vars(options), device, earlier)
            if not todo and job.summary.is_file():  # nothing was made
                made = read_json(job.summary)["manifest"]
            write_summary(job, made)


if __name__ == "__main__":
    sys.exit(run_main(main, "use --amp bf16 or a smaller --sam-type"))
