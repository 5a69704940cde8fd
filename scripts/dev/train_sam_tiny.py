"""Train the tiny SAM (--sam-type tiny) on drawn street scenes and on labeled photographs.

Inputs:  drawings: scenes of dataset/toy.py (style "random", every eighth "source"; --style mixed:
         every second; never "target"), seeds from 10,000,000 up, which no benchmark scene has.
         photographs: --photos LIST --root-path --class-num ..., of a source domain with labels,
         never of a target. The connected components of their labels are the segments; what has no
         label (255) is neither prompted nor penalised. Random windows in a random light, from day
         to dusk. Both are made once into --pool.
Outputs: --out (model/sam_tiny.pth: weights for inference, fp16), --run-folder/{checkpoint.pth,
         log.jsonl, training.json}.

Learning rate: linear warm-up, constant, linear decay to zero over the last --decay-steps of
--steps. Train for as long as you like at the constant rate, then resume with the --steps at which
it shall end:

    python -m scripts.dev.train_sam_tiny --steps 100000                       # Ctrl-C at any time
    # decays over steps 5200..6000, ends
    python -m scripts.dev.train_sam_tiny --resume --steps 6000
    # a few minutes; add the options of --photos for both pools
    python -m scripts.dev.train_sam_tiny --init model/sam_tiny.pth --style mixed --iou-head 120
    # model/sam_tiny_photo.pth: goes on from model/sam_tiny.pth with CamVid's day drives (the record
    # has the phases that were run), then --iou-head
    python -m scripts.dev.train_sam_tiny --init model/sam_tiny.pth --out model/sam_tiny_photo.pth \\
        --photos splits/camvid/sam_train.txt --class-num 11 --stuff 0 1 3 4 5 7 \\
        --things 2 6 8 9 10 --images 4 --steps 6100 --decay-steps 300 --warmup 50 --lr 1e-3
    # measures it, writes model/sam_tiny.json
    python -m scripts.dev.eval_sam_tiny

--iou-head fits the IoU head alone, at the very end. In the training above it learns the IoU
with the one object that the prompt stands for, and a point stands for several: it then says 0.7 of
masks that are right. A proposal is good if it is any object, so here the target is the best IoU
with any, and the loss is an expectile's, for the official threshold of 0.88.

The checkpoint is not shipped, the weights are: --init model/sam_tiny.pth trains them further, with
a fresh optimizer and auxiliary head; steps, minutes and phases go on from the record beside the
weights (model/sam_tiny.json).

One step on 2 CPU cores (bf16): 8 images x 15 prompts, about one second; photographs of 384x288 take
1.5 times as long. Same seed, options and thread count: same weights. Needs when copied away:
model/{checkpoint,sam_tiny,sam_decoder}.py, dataset/toy/, util/.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # spinning threads starve each other on a shared machine
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import load_exactly, read_checkpoint, state_dict_in
from model.sam_decoder import pixels_to_tokens
from model.sam_tiny import TINY_CHECKPOINT, TINY_PE_FREQUENCIES, build_sam_tiny
from util.connectivity import connectivities
from util.labels import (
    CITYSCAPES_19,
    ClassSet,
    check_files,
    class_set,
    read_label,
    read_list,
    read_picture,
)
from util.options import add_class_options, add_run_options, check_run_options
from util.progress import progress
from util.run import (
    UserError,
    atomic_path,
    check_writable,
    manifest,
    read_json,
    run_main,
    select_device,
    tune_cpu,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]

HEIGHT, WIDTH = 192, 384  # pixels, the toy benchmark's scenes
FIRST_TRAIN_SEED = 10_000_000  # scene seeds from here up belong to this training
MIXED_SEED = 100_000  # added for the scenes of style "mixed"
MIN_AREA = 10  # pixels: PSA skips connectivities under 10 pixels (released code), so do we
BOX_PROMPTS, POINT_PROMPTS = (
    (4, 4),
    7,
)  # an image and step: box with one point, box with two, one point alone
UNCLIP = 1.25  # PSA's box offset d = 1.25 * area / perimeter (released code)
EMA_DECAY = 0.99  # of the weights that are exported (0.998 up to step 4790)
IOU_POINTS = 224  # random points of a scene whose masks the IoU head is fitted to
IOU_EXPECTILE = (
    0.95  # held-out drawings: proposals above 0.88 have mean IoU 0.94 (0.967 without the fit)
)
PHOTO_ZOOM = 1.6  # windows show the whole photograph down to 1 / 1.6 of its sides
DRAWING_SHARE = 0.25  # of a step's images, with photographs (drawings lose 0.05 of box IoU)
VOID = -1  # in segment maps: pixels without a label, or in a component of under MIN_AREA pixels
IOU_EPOCHS, IOU_BATCH, IOU_RATE = 8, 256, 1e-3


# --------------------------------------------------------------------------------------------- pool


def segment_table(
    segment: np.ndarray, label: np.ndarray, stuff: tuple[int, ...] = CITYSCAPES_19.stuff
) -> np.ndarray:
    """Rows (id, area, y0, y1, x0, x1, is_thing) of a segment map [H, W], boxes half open, int32;
    none for VOID.
    """
    rows = []
    for index, where in enumerate(ndimage.find_objects(segment + 1)):
        if where is None:
            continue
        inside = segment[where] == index
        is_thing = int(label[where][inside][0]) not in stuff
        rows.append(
            (
                index,
                inside.sum(),
                where[0].start,
                where[0].stop,
                where[1].start,
                where[1].stop,
                is_thing,
            )
        )
    return np.array(rows, np.int32).reshape(-1, 7)


def stuff_components(label: np.ndarray) -> np.ndarray:
    """8-connected components of every stuff class [H, W] int32, ids from 1; 0 on things and where
    there is no label.
    """
    components = np.zeros(label.shape, np.int32)
    for number, connectivity in enumerate(connectivities(label, CITYSCAPES_19.stuff), start=1):
        components[connectivity.window][connectivity.mask] = number
    return components


def draw_pool_scene(index: int, style: str):
    """Scene `index` of the pool: image, segments, stuff components, segment table."""
    from dataset.toy import draw_scene

    every = 8 if style == "random" else 2
    scene = draw_scene(
        FIRST_TRAIN_SEED + (0 if style == "random" else MIXED_SEED) + index,
        "source" if index % every == every - 1 else "random",
        HEIGHT,
        WIDTH,
    )
    image, label, segment = scene.image, scene.label, np.asarray(scene.segment, np.int32)
    return (
        image,
        segment.astype(np.int16),
        stuff_components(label).astype(np.int16),
        segment_table(segment, label),
    )


@dataclass(frozen=True)
class Photographs:
    """Photographs with labels: rows (image, label) relative to `root`, their class set, and the
    size (height, width) of the windows: WIDTH pixels on the long side, as SAM sees the whole
    photograph, the other side in proportion, a multiple of 32.
    """

    root: Path
    rows: tuple[tuple[str, str], ...]
    classes: ClassSet
    size: tuple[int, int]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image and label [H, W] uint8 of a row."""
        image_path, label_path = (self.root / name for name in self.rows[index])
        image, label = read_picture(image_path), read_label(label_path, self.classes.count)
        if label.shape[::-1] != image.size:
            raise UserError(
                f"{label_path}: is {label.shape[1]}x{label.shape[0]}, its image {image.width}x"
                f"{image.height}; give labels of the images' size"
            )
        return image, label


def read_photographs(list_path: Path, root: Path, classes: ClassSet) -> Photographs:
    """The photographs that a list names; the first one's shape decides the windows' size."""
    rows = tuple(read_list(list_path, columns=2))
    check_files(root, [name for row in rows for name in row], list_path)
    width, height = read_picture(root / rows[0][0]).size
    short = max(32, round(WIDTH * min(width, height) / max(width, height) / 32) * 32)
    size = (short, WIDTH) if width >= height else (WIDTH, short)
    return Photographs(root, rows, classes, size)


def labeled_components(label: np.ndarray, classes: ClassSet) -> np.ndarray:
    """8-connected components of every class as segments [H, W] int32, ids from 0; VOID where there
    is no label and on components of under MIN_AREA pixels.
    """
    segment, number = np.full(label.shape, VOID, np.int32), 0
    for connectivity in connectivities(label, range(classes.count)):
        if connectivity.area >= MIN_AREA:
            segment[connectivity.window][connectivity.mask] = number
            number += 1
    return segment


def day_to_dusk(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The photograph [H, W, 3] uint8 in another light: contrast, gamma, brightness, colour cast,
    blur and noise.
    """
    x = image.astype(np.float32) / 255
    x = np.clip((x - x.mean()) * rng.uniform(0.6, 1.2) + x.mean(), 0, 1)
    x = x ** np.exp(rng.uniform(np.log(0.6), np.log(3)))
    x = x * rng.uniform(0.35, 1.15) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.3:
        x = ndimage.gaussian_filter(x, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    x = x + rng.normal(0, rng.uniform(0, 0.03), x.shape)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def photo_window(
    image: Image.Image, label: np.ndarray, size: tuple[int, int], zoom: float, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A part of a photograph and of its label, resized to `size` (height, width): the largest one
    of that shape for zoom 1, a smaller one above. `at` (x, y) in [0, 1]: its place, left to right
    and top to bottom.
    """
    height, width = size
    scale = zoom * max(width / image.width, height / image.height)
    w, h = width / scale, height / scale
    x, y = (at * [image.width - w, image.height - h]).clip(0)  # rounding may leave -1e-14
    box = (x, y, min(x + w, image.width), min(y + h, image.height))
    picture = image.resize((width, height), Image.Resampling.BILINEAR, box)
    label = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST, box)
    return np.asarray(picture), np.asarray(label)


def draw_photo_window(index: int, photographs: Photographs):
    """Window `index` of the pool: a random part of a random photograph in a random light; as
    `draw_pool_scene`. Stuff has no second, larger answer here: its components are 0.
    """
    rng = np.random.default_rng((FIRST_TRAIN_SEED, index))
    for _ in range(100):
        image, label = photographs.read(rng.integers(len(photographs.rows)))
        zoom = np.exp(rng.uniform(0, np.log(PHOTO_ZOOM)))
        image, label = photo_window(image, label, photographs.size, zoom, rng.uniform(0, 1, 2))
        segment = labeled_components(label, photographs.classes)
        if (segment != VOID).any():
            table = segment_table(segment, label, photographs.classes.stuff)
            component = np.zeros_like(segment, np.int16)
            return day_to_dusk(rng, image), segment.astype(np.int16), component, table
    raise UserError(
        f"{photographs.root / photographs.rows[0][1]}: no label of 100 windows has {MIN_AREA} "
        "labeled pixels in one piece; give labels of train IDs"
    )


def load_pool(folder: Path, draw, scenes: int, processes: int):
    """Memory-mapped arrays of a pool, made first by `draw(index)` where `folder` lacks them: images
    [S, H, W, 3] uint8, segments and stuff components [S, H, W] int16, and a list of segment tables.
    """
    names = [folder / f"{name}.npy" for name in ("image", "segment", "component", "table")]
    if not names[-1].is_file():  # the table is written last
        check_writable(folder)
        with Pool(processes) as workers:
            drawn = list(progress(workers.imap(draw, range(scenes), chunksize=8), "scenes", scenes))
        image, segment, component, tables = zip(*drawn)
        table = np.concatenate(
            [np.column_stack([np.full(len(t), i, np.int32), t]) for i, t in enumerate(tables)]
        )
        for name, array in zip(
            names, (np.stack(image), np.stack(segment), np.stack(component), table)
        ):
            with atomic_path(name) as temporary:
                np.save(temporary, array)
    image, segment, component = (np.load(name, mmap_mode="r") for name in names[:3])
    table = np.load(names[3])
    tables = np.split(table[:, 1:], np.flatnonzero(np.diff(table[:, 0])) + 1)
    return image, segment, component, tables


def load_pools(args) -> dict:
    """The pools of a training: "drawing", and "photo" if --photos is given. A pool of photographs
    is named by its list's content, so that another list makes another pool.
    """
    draw = partial(draw_pool_scene, style=args.style)
    folder = args.pool / f"{args.style}_{args.scenes}"
    pools = {"drawing": load_pool(folder, draw, args.scenes, args.threads)}
    if args.photos:
        classes = class_set(args.class_num, args.stuff, args.things)
        photographs = read_photographs(args.photos, args.root_path, classes)
        digest = hashlib.sha256(repr(photographs).encode()).hexdigest()[:12]
        pools["photo"] = load_pool(
            args.pool / f"photos_{digest}_{args.scenes}",
            partial(draw_photo_window, photographs=photographs),
            args.scenes,
            args.threads,
        )
    return pools


# ------------------------------------------------------------------------------------------ prompts


@dataclass
class Prompts:
    """Prompts of one image. Points and boxes (x, y) in pixels, int; masks [K, H, W] bool.

    boxes[g] [K, 4], box_points[g] [K, g + 1, 2] and box_targets[g] for g + 1 points; points [P, 1,
    2] with targets [P, H, W] and alternatives [P, H, W] (the whole stuff component; the target
    again where there is none).
    """

    boxes: list
    box_points: list
    box_targets: list
    points: np.ndarray
    targets: np.ndarray
    alternatives: np.ndarray


def imperfect_box(
    rng: np.random.Generator,
    mask: np.ndarray,
    corner: tuple[int, int],
    count: int,
    size: tuple[int, int] = (HEIGHT, WIDTH),
):
    """A box (x0, y0, x1, y1), `count` points as PSA derives them from a noisy, partial
    connectivity, and whether it is one of a fragment.

    mask: the object inside its own bounding box; corner: (y0, x0) of that box in the image, whose
    (height, width) is `size`. With
    chance 0.45 only a fragment of the object was labeled; the points lie in it. The box around it
    grows by u * area / perimeter with u = 1.25 (half of the time; the released recipe: up to 2.6
    times the area), between 0 and 1.25 (a quarter) or 0, and its sides move a little; one in seven
    reaches into a neighbour.
    """
    ys, xs = np.nonzero(mask)
    fragment = rng.random() < 0.45
    if fragment:
        for _ in range(4):
            centre = rng.integers(len(ys))
            half = 0.5 * rng.uniform(0.3, 1.0, 2) * mask.shape
            keep = (np.abs(ys - ys[centre]) <= half[0]) & (np.abs(xs - xs[centre]) <= half[1])
            if keep.sum() >= MIN_AREA:
                ys, xs = ys[keep], xs[keep]
                break
    chosen = rng.integers(len(ys), size=count)
    points = np.stack([xs[chosen] + corner[1], ys[chosen] + corner[0]], axis=1)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    w, h = x1 - x0, y1 - y0
    kind = rng.random()
    d = (
        (UNCLIP if kind < 0.5 else UNCLIP * rng.random() if kind < 0.75 else 0.0)
        * w
        * h
        / (2 * (w + h))
    )
    sides = np.array([-d, -d, d, d]) + rng.normal(0, 0.05, 4) * [w, h, w, h]
    if rng.random() < 1 / 7:
        side = rng.integers(4)
        sides[side] += (-1 if side < 2 else 1) * rng.uniform(0.1, 0.6) * (w, h)[side % 2]
    box = np.array([x0 + corner[1], y0 + corner[0], x1 - 1 + corner[1], y1 - 1 + corner[0]]) + sides
    box[:2], box[2:] = np.floor(box[:2]), np.ceil(box[2:])
    return np.clip(box, 0, [size[1] - 1, size[0] - 1] * 2), points, fragment


def box_target(mask: np.ndarray, box: np.ndarray, fragment: bool, is_thing: bool) -> np.ndarray:
    """The mask [H, W] that a box on the object `mask` stands for. A fragment stands for the whole
    thing, but of stuff only for what lies in the box: a speckle in the sky must not become all of
    the sky (and SAM keeps to its boxes).
    """
    if not fragment or is_thing:
        return mask
    left, top, right, bottom = box.astype(int)
    target = np.zeros_like(mask)
    target[top : bottom + 1, left : right + 1] = mask[top : bottom + 1, left : right + 1]
    return target


def sample_prompts(
    rng: np.random.Generator, segment: np.ndarray, component: np.ndarray, table: np.ndarray
) -> Prompts:
    """Random prompts for one scene: 70 % of the boxes on things; half of the single points uniform
    over the image as the automatic mask generator's grid is, 30 % uniform over the stuff segments,
    the others over all segments. None is on VOID.
    """
    table = table[table[:, 1] >= MIN_AREA]
    things, stuff = table[table[:, 6] == 1], table[table[:, 6] == 0]

    def pick() -> np.ndarray:
        rows = things if len(things) and (rng.random() < 0.7 or not len(stuff)) else stuff
        return rows[rng.integers(len(rows))]

    boxes, box_points, box_targets = [], [], []
    for g, count in enumerate(BOX_PROMPTS):
        drawn = []
        for _ in range(count):
            index, _, y0, y1, x0, x1, is_thing = pick()
            box, point, fragment = imperfect_box(
                rng, segment[y0:y1, x0:x1] == index, (y0, x0), g + 1, segment.shape
            )
            drawn.append((box, point, box_target(segment == index, box, fragment, bool(is_thing))))
        b, p, t = zip(*drawn)
        boxes.append(np.stack(b)), box_points.append(np.stack(p)), box_targets.append(np.stack(t))

    points, targets, alternatives = [], [], []
    for _ in range(POINT_PROMPTS):
        kind = rng.random()
        if kind < 0.5:
            y, x = rng.integers(segment.shape)
            while segment[y, x] == VOID:
                y, x = rng.integers(segment.shape)
        else:
            rows = stuff if kind < 0.8 and len(stuff) else table
            index, _, y0, y1, x0, x1, _ = rows[rng.integers(len(rows))]
            ys, xs = np.nonzero(segment[y0:y1, x0:x1] == index)
            j = rng.integers(len(ys))
            y, x = ys[j] + y0, xs[j] + x0
        target = segment == segment[y, x]
        points.append([(x, y)])
        targets.append(target)
        alternatives.append(component == component[y, x] if component[y, x] else target)
    return Prompts(
        boxes, box_points, box_targets, np.array(points), np.stack(targets), np.stack(alternatives)
    )


def dense_targets(
    segment: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the auxiliary head learns: segment edges at half resolution [H/2, W/2] bool and where
    they are known, not touching VOID [H/2, W/2] bool; for the segment at every token's centre its
    id [H/8, W/8] and log(1 + d / 8) of the distances d to its box's four sides [H/8, W/8, 4].
    """
    halves = (segment.shape[0] // 2, 2, segment.shape[1] // 2, 2)
    void = segment == VOID
    unknown = void.copy()
    unknown[:, :-1] |= void[:, 1:]
    unknown[:-1] |= void[1:]
    known = ~unknown.reshape(halves).any(axis=(1, 3))
    edge = np.zeros(segment.shape, bool)
    edge[:, :-1] |= segment[:, :-1] != segment[:, 1:]
    edge[:-1] |= segment[:-1] != segment[1:]
    edge = edge.reshape(halves).any(axis=(1, 3))
    centre = segment[4::8, 4::8]
    sides = np.zeros((table[:, 0].max() + 1, 4), np.float32)
    sides[table[:, 0]] = table[:, 2:6]
    y0, y1, x0, x1 = np.moveaxis(sides[centre], -1, 0)
    y, x = np.mgrid[4 : segment.shape[0] : 8, 4 : segment.shape[1] : 8] + 0.5
    return (
        edge,
        known,
        centre,
        np.log1p(np.stack([y - y0, y1 - y, x - x0, x1 - x], axis=-1).clip(0) / 8).astype(
            np.float32
        ),
    )


@dataclass
class Batch:
    """One step's images [B, 3, H, W] (normalised), prompts (see `Prompts`; targets as area means in
    token order, [B, K, T, h*w*16], and `known`, the share of pixels that have a label
    [B, h*w*16]) and the auxiliary head's targets, as tensors.
    """

    images: Tensor
    boxes: list
    box_points: list
    box_targets: list
    points: Tensor
    targets: Tensor
    known: Tensor
    edge: Tensor
    edge_known: Tensor
    centre: Tensor
    sides: Tensor
    anchors: Tensor

    def to(self, device) -> Batch:
        moved = {
            name: [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
            for name, value in vars(self).items()
        }
        return Batch(**moved)


def low_resolution(masks: np.ndarray) -> Tensor:
    """Masks [..., H, W] bool as the share of object pixels in each half-resolution cell, token
    order [..., h*w*16].
    """
    t = torch.from_numpy(np.ascontiguousarray(masks)).to(torch.uint8)
    t = t[..., 0::2, 0::2] + t[..., 0::2, 1::2] + t[..., 1::2, 0::2] + t[..., 1::2, 1::2]
    return pixels_to_tokens(t).float() / 4


def make_batch(pool, seed: int, step: int, images: int, mean: Tensor, std: Tensor) -> Batch:
    """The batch of one step: a function of seed and step alone, so that a resumed training sees the
    same.
    """
    rng = np.random.default_rng((seed, step))
    image_array, segment_array, component_array, tables = pool
    drawn, dense, pictures, anchors, known = [], [], [], [], []
    for index in rng.choice(len(tables), images, replace=False):
        image, segment, component = image_array[index], segment_array[index], component_array[index]
        table = tables[index]
        if rng.random() < 0.5:
            image, segment, component = image[:, ::-1], segment[:, ::-1], component[:, ::-1]
            table = table.copy()
            table[:, 4:6] = segment.shape[1] - table[:, [5, 4]]
        drawn.append(sample_prompts(rng, segment, component, table))
        dense.append(dense_targets(segment, table))
        known.append(segment != VOID)
        pictures.append(torch.from_numpy(np.array(image)))
        anchors.append(torch.from_numpy(rng.choice(segment.size // 64, 48, replace=False)))
    x = torch.stack(pictures).permute(0, 3, 1, 2).float()
    groups = range(len(BOX_PROMPTS))
    edge, edge_known, centre, sides = (torch.from_numpy(np.stack(a)) for a in zip(*dense))
    return Batch(
        images=(x - mean) / std,
        boxes=[torch.from_numpy(np.stack([p.boxes[g] for p in drawn])).float() for g in groups],
        box_points=[
            torch.from_numpy(np.stack([p.box_points[g] for p in drawn])).float() for g in groups
        ],
        box_targets=[
            low_resolution(np.stack([p.box_targets[g] for p in drawn]))[:, :, None] for g in groups
        ],
        points=torch.from_numpy(np.stack([p.points for p in drawn])).float(),
        targets=low_resolution(np.stack([np.stack([p.targets, p.alternatives], 1) for p in drawn])),
        known=low_resolution(np.stack(known)),
        edge=edge.float(),
        edge_known=edge_known.float(),
        centre=centre.flatten(1).long(),
        sides=sides,
        anchors=torch.stack(anchors),
    )


# --------------------------------------------------------------------------------- forward and loss


class AuxiliaryHead(nn.Module):
    """Dense predictions from the image embedding that only the training uses: edges, box sides, a
    grouping vector.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.out = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 16 + 4 + 16)
        )

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.out(embedding.permute(0, 2, 3, 1)).float().split((16, 4, 16), dim=-1)


def initialise(sam, seed: int) -> None:
    """Starting weights that localise from the first step.

    The random positional frequencies are spread over scales (the package draws them all around one
    cycle per half image, too coarse for small objects of a small network); query and key
    projections of the cross-attentions start equal and orthogonal, so that a prompt token attends
    to its own place.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    n = matrix.shape[1]
    low, high = TINY_PE_FREQUENCIES
    magnitude = low * (high / low) ** (torch.arange(n) / (n - 1))
    angle = 2 * np.pi * torch.rand(n, generator=generator)
    matrix.copy_(torch.stack([torch.cos(angle), torch.sin(angle)]) * magnitude)
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    with torch.no_grad():
        for embedding in (
            *sam.prompt_encoder.point_embeddings,
            sam.prompt_encoder.not_a_point_embed,
            sam.prompt_encoder.no_mask_embed,
            sam.mask_decoder.mask_tokens,
            sam.mask_decoder.iou_token,
        ):
            embedding.weight.mul_(0.3)
        for attention in attentions:
            nn.init.orthogonal_(attention.q_proj.weight, 1.5, generator=generator)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def prompted(sam, embedding: Tensor, points: Tensor, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs of `TinyMaskDecoder.decode`: keys [B, K, N, C] and sparse embeddings [B, K, T, C].

    embedding [B, C, h, w]; positive points [B, K, n, 2]; boxes [B, K, 4]. The prompt encoder's own
    forward would draw the prompts over the padding too.
    """
    b, k = points.shape[:2]
    h, w = embedding.shape[2:]
    labels = torch.ones(b * k, points.shape[2], dtype=torch.int, device=points.device)
    points, boxes = (points.flatten(0, 1), labels), None if boxes is None else boxes.flatten(0, 1)
    encoder = sam.prompt_encoder
    sparse, _ = PromptEncoder.forward(encoder, points, boxes, None)
    drawn = encoder.prompt_map(encoder.draw_prompts(points, boxes, h, w)).unflatten(0, (b, k))
    tokens = (embedding + encoder.no_mask_embed.weight[:, :, None, None]).flatten(2).transpose(1, 2)
    return tokens[:, None].to(drawn.dtype) + drawn, sparse.unflatten(0, (b, k))


def pair_losses(
    logits: Tensor, targets: Tensor, balance: float, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of every output against every valid target, and their IoU.

    logits [B, K, M, N], targets [B, K, T, N] in [0, 1], balance in [0, 1]; known [B, N] in [0, 1],
    the share of a cell that counts, of which the target is a part. Returns loss [B, K, M,
    T]: dice plus cross-entropy, the latter `balance` parts averaged over object and background
    separately, the rest divided by the geometric mean of object and image area (a small object
    keeps a voice, its far background loses it); and IoU of the thresholded mask [B, K, M, T],
    without gradient.
    """
    known = known[:, None, None]
    n = known.sum(-1, keepdim=True)  # [B, 1, 1, 1]
    t = targets.transpose(-1, -2)  # [B, K, N, T]
    area = targets.sum(-1)[:, :, None]  # [B, K, 1, T]
    soft, probability = F.softplus(logits) * known, torch.sigmoid(logits) * known
    soft_in, logit_in = soft @ t, logits @ t  # [B, K, M, T]
    soft_out = soft.sum(-1, keepdim=True) - soft_in
    inside, outside = (soft_in - logit_in), soft_out  # summed cross-entropy
    balanced = 0.5 * inside / area.clamp(min=1) + 0.5 * outside / (n - area).clamp(min=1)
    plain = (inside + outside) / (area.clamp(min=4) * n).sqrt()
    dice = 1 - (2 * (probability @ t) + 1) / (probability.sum(-1, keepdim=True) + area + 1)
    with torch.no_grad():
        hard = (logits > 0).float() * known
        both = hard @ t
        iou = both / (hard.sum(-1, keepdim=True) + area - both).clamp(min=1)
    return balance * balanced + (1 - balance) * plain + dice, iou


def mask_loss(sam, embedding: Tensor, batch: Batch, balance: float) -> tuple[Tensor, dict]:
    """Loss of masks and predicted IoU of one batch, and what to log (IoU at half resolution)."""
    h, w = embedding.shape[2:]
    pe = sam.prompt_encoder.get_dense_pe()[..., :h, :w].flatten(2).transpose(1, 2)
    prompts = [*zip(batch.box_points, batch.boxes, batch.box_targets)]
    loss, log = 0.0, {}
    for points, boxes, targets in [*prompts, (batch.points, None, batch.targets)]:
        keys, sparse = prompted(sam, embedding, points, boxes)
        outputs = slice(1, None) if boxes is None else slice(0, 1)
        logits, iou_pred = sam.mask_decoder.decode(keys, pe, sparse, outputs)
        losses, iou = pair_losses(logits.float(), targets, balance, batch.known)
        best = losses.amin(dim=2).mean(dim=-1)  # each valid target needs one good output
        if logits.shape[2] > 1:
            best = best + 0.03 * losses.mean(dim=(2, 3))  # keeps idle outputs alive
        iou = iou.amax(dim=-1)  # an output may show either target
        share = targets.shape[1] / (sum(BOX_PROMPTS) + POINT_PROMPTS)
        loss = loss + share * (best.mean() + 2 * F.mse_loss(iou_pred.float(), iou))
        name, groups = ("point", 1) if boxes is None else ("box", len(BOX_PROMPTS))
        log[f"iou_{name}"] = log.get(f"iou_{name}", 0) + iou.amax(dim=-1).mean().item() / groups
        log[f"mse_{name}"] = F.mse_loss(iou_pred.detach().float(), iou).item()
    return loss, log | {"loss": loss.item()}


def auxiliary_loss(head: AuxiliaryHead, embedding: Tensor, batch: Batch) -> tuple[Tensor, dict]:
    """Loss of the dense predictions, and what to log. VOID takes no part."""
    edge, sides, group = head(embedding)
    weight = (1 + 4 * batch.edge) * batch.edge_known
    edge_loss = F.binary_cross_entropy_with_logits(
        edge,
        pixels_to_tokens(batch.edge).view(edge.shape),
        pixels_to_tokens(weight).view(edge.shape),
    )
    seen = (batch.centre != VOID).float()  # [B, N]
    of_token = seen.view(*sides.shape[:3], 1)
    side_loss = F.smooth_l1_loss(sides * of_token, batch.sides * of_token, beta=0.1)
    group = group.flatten(1, 2)  # [B, N, 16]
    anchor = group.gather(1, batch.anchors[..., None].expand(-1, -1, group.shape[2]))  # [B, A, 16]
    same = (batch.centre.gather(1, batch.anchors)[:, :, None] == batch.centre[:, None]).float()
    both_seen = seen.gather(1, batch.anchors)[:, :, None] * seen[:, None]
    affinity = 2 - torch.cdist(anchor, group).square()
    share_same = same.mean().clamp(0.01, 0.99)
    weight = same * 0.5 / share_same + (1 - same) * 0.5 / (1 - share_same)
    group_loss = F.binary_cross_entropy_with_logits(affinity, same, weight * both_seen)
    log = {"edge": edge_loss.item(), "sides": side_loss.item(), "group": group_loss.item()}
    return 0.5 * edge_loss + 0.5 * side_loss + 0.5 * group_loss, log


def training_loss(
    sam, head: AuxiliaryHead, batch: Batch, balance: float, bf16: bool
) -> tuple[Tensor, dict]:
    """Sum of the losses of one batch, and what to log (means over the batch)."""
    device_type = batch.images.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
        embedding = sam.image_encoder.tokens(batch.images)
        loss, log = mask_loss(sam, embedding, batch, balance)
        auxiliary, more = auxiliary_loss(head, embedding, batch)
    return loss + auxiliary, log | more


# ------------------------------------------------------------------------------- the IoU head alone


def judged_masks(sam, pool, index: int, points: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the IoU head reads, [P, C], and what it should say, [P, M], of the masks of single
    points [P, 2] (x, y) on scene `index`: a mask's best IoU, at half resolution, with any segment
    of at least MIN_AREA pixels or whole stuff component.
    """
    image, segment, component, tables = (array[index] for array in pool)
    ids, wholes = tables[tables[:, 1] >= MIN_AREA, 0], np.unique(component)
    truths = np.concatenate(
        [segment[None] == ids[:, None, None], component[None] == wholes[wholes > 0, None, None]]
    )
    truths, known = low_resolution(truths), low_resolution(segment != VOID)  # [G, h*w*16], [h*w*16]
    areas = truths.sum(dim=1)
    pictures = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    read: list[Tensor] = []
    hook = sam.mask_decoder.iou_prediction_head.register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0])
    )
    best = []
    with torch.no_grad():
        embedding = sam.image_encoder.tokens((pictures - sam.pixel_mean) / sam.pixel_std)
        h, w = embedding.shape[2:]
        pe = sam.prompt_encoder.get_dense_pe()[..., :h, :w].flatten(2).transpose(1, 2)
        for part in torch.from_numpy(points).float().split(8):
            keys, sparse = prompted(sam, embedding, part[None, :, None], None)
            masks = (sam.mask_decoder.decode(keys, pe, sparse)[0][0] > 0).float()  # [P, M, h*w*16]
            masks *= known
            both = masks @ truths.T
            best.append(
                (both / (masks.sum(dim=-1, keepdim=True) + areas - both).clamp(min=1)).amax(dim=-1)
            )
    hook.remove()
    return torch.cat(read, dim=1)[0], torch.cat(best)


def fit_iou_head(head: nn.Module, read: Tensor, target: Tensor, seed: int) -> None:
    """Least asymmetric squares: `head` (in place) learns the IOU_EXPECTILE of target [n, M] given
    read [n, C].
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=IOU_RATE)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(IOU_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = IOU_RATE * (1 - epoch / IOU_EPOCHS)
        for rows in torch.randperm(len(read), generator=generator).split(IOU_BATCH):
            error = target[rows] - head(read[rows])
            loss = (
                torch.where(error > 0, IOU_EXPECTILE, 1 - IOU_EXPECTILE) * error.square()
            ).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def refit_iou_head(args) -> None:
    """--iou-head: the weights of --init with the IoU head fitted anew, to --out; the training's
    record says so.
    """
    started, sam = time.time(), build_sam_tiny()
    record = load_exported(sam, args.logit_gain, args.init)
    pools, rng, judged = load_pools(args), np.random.default_rng(args.seed), []
    for index in progress(range(args.iou_head), "IoU head", unit="scene"):
        for pool in pools.values():
            ys, xs = np.nonzero(pool[1][index] != VOID)
            chosen = rng.integers(len(ys), size=IOU_POINTS)
            judged.append(judged_masks(sam, pool, index, np.stack([xs, ys], axis=1)[chosen]))
    head = sam.mask_decoder.iou_prediction_head
    fit_iou_head(head, *(torch.cat(part) for part in zip(*judged)), args.seed)
    export(sam, args.logit_gain, args.out)
    write_json(
        args.run_folder / "training.json",
        record
        | {"iou_head": manifest(vars(args)) | {"minutes": round((time.time() - started) / 60, 1)}},
    )
    print(
        f"{args.out}: IoU head fitted to {args.iou_head} scenes, {(time.time() - started) / 60:.1f}"
        " minutes"
    )


# ----------------------------------------------------------------------------------------- training


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, decay_steps: int, first: int = 0
) -> float:
    """Linear warm-up from step `first`, constant, linear decay to zero over the last
    `decay_steps`.
    """
    return peak * min(
        1.0, (step - first + 1) / warmup, max(0.0, (steps - step) / max(1, decay_steps))
    )


def gains(name: str) -> bool:
    """Is it a parameter of the hypernetworks' last layer, which the logits are proportional to?"""
    return ".layers.2." in name and "output_hypernetworks_mlps" in name


def export(model: nn.Module, logit_gain: float, path: Path) -> None:
    """Write the weights for inference: fp16 except the positional frequencies, logits multiplied by
    `logit_gain`.

    The gain goes into the last layer of the hypernetworks. It moves no mask (threshold 0), only the
    stability score, whose offset of 1.0 is in logits of a SAM trained much longer than this one.
    """
    state = {}
    for name, value in model.state_dict().items():
        if gains(name):
            value = value * logit_gain
        state[name] = value.clone() if "gaussian_matrix" in name else value.half()
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_exported(model: nn.Module, logit_gain: float, path: Path) -> dict:
    """Load weights that `export` wrote with the same gain; returns the training record beside them
    ({} if none).
    """
    state = state_dict_in(read_checkpoint(path), path)
    load_exactly(
        model,
        {name: value.float() / (logit_gain if gains(name) else 1) for name, value in state.items()},
        path,
        "the tiny SAM",
    )
    record = path.with_suffix(".json")
    return read_json(record)["training"] if record.is_file() else {}


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    """What is trained on."""
    parser.add_argument(
        "--pool", type=Path, default=ROOT / "data/sam_tiny_pool", help="cache of drawn scenes"
    )
    parser.add_argument(
        "--style",
        choices=("random", "mixed"),
        default="random",
        help="of the street scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="LIST",
        help=(
            "list of labeled photographs, `<image> <label>` a line; three of four images of a"
            " step are then windows of them (default: drawings only)"
        ),
    )
    parser.add_argument(
        "--root-path",
        type=Path,
        default=ROOT / "data",
        help="folder that the paths of --photos start at (default: %(default)s)",
    )
    add_class_options(parser)
    parser.add_argument(
        "--scenes",
        type=int,
        default=2000,
        help="scenes in the pool, and as many windows of --photos (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=8, help="images a step (default: %(default)s)"
    )


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    """How long and how fast it is trained."""
    for name, kind, default, about in (
        ("--steps", int, 6000, "the step at which training ends"),
        ("--lr", float, 2e-3, "peak learning rate of AdamW"),
        ("--warmup", int, 100, "steps of warm-up"),
        ("--decay-steps", int, 800, "steps of decay at the end"),
        ("--balance-steps", int, 2500, "steps from balanced cross-entropy to plain"),
        ("--save-every", int, 100, "steps between checkpoints"),
        ("--threads", int, 2, "CPU threads"),
    ):
        parser.add_argument(
            name, type=kind, default=default, help=f"{about} (default: %(default)s)"
        )
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="no bfloat16 (needed without avx512_bf16 or a recent GPU)",
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=TINY_CHECKPOINT,
        help="weights for inference (default: %(default)s)",
    )
    parser.add_argument(
        "--logit-gain",
        type=float,
        default=4.0,
        help="factor on the exported logits (default: %(default)s)",
    )
    parser.add_argument(
        "--run-folder", type=Path, default=ROOT / "data/sam_tiny_run", help="checkpoint and log"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's checkpoint"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="weights to train further, as --out has them (default: from scratch)",
    )
    parser.add_argument(
        "--iou-head",
        type=int,
        default=0,
        metavar="SCENES",
        help=(
            "fit only the IoU head of --init, to this many scenes of every pool (default: 0, train"
            " everything)"
        ),
    )
    add_pool_options(parser)
    add_schedule_options(parser)
    add_run_options(parser)
    args = parser.parse_args(argv)
    check_run_options(args)
    if args.iou_head and (not args.init or not 0 < args.iou_head <= args.scenes):
        raise UserError(
            f"--iou-head {args.iou_head}: it needs --init, and 1 to {args.scenes} scenes (--scenes)"
        )
    if args.photos and args.images < 2:
        raise UserError(f"--images {args.images}: give 2 or more with --photos")
    return args


@dataclass
class Training:
    """What a training is made of: networks, optimizer, and where it stands. `ema` is the average of
    the weights, which is exported; `first` is the step at which this warm-up began.
    """

    sam: nn.Module
    head: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    first: int = 0
    minutes: float = 0.0
    phases: tuple = ()

    MODULES = ("sam", "head", "ema", "optimizer")
    NUMBERS = ("step", "first", "minutes", "phases")


def begin(args, device) -> Training:
    """A new training, one from the weights of --init, or the one in the run folder (--resume)."""
    torch.manual_seed(args.seed)
    sam = build_sam_tiny()
    initialise(sam, args.seed)
    earlier = (
        load_exported(sam, args.logit_gain, args.init) if args.init and not args.resume else {}
    )
    sam = sam.to(device).train()
    head = AuxiliaryHead(sam.mask_decoder.transformer_dim).to(device)
    parameters = [*sam.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    training = Training(sam, head, copy.deepcopy(sam).eval(), optimizer)
    for name in Training.NUMBERS:
        setattr(training, name, earlier.get(name, getattr(training, name)))
    training.first = training.step
    if args.resume:
        path = args.run_folder / "checkpoint.pth"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in Training.MODULES:
            getattr(training, name).load_state_dict(state[name])
        for name in Training.NUMBERS:
            setattr(training, name, state[name])
    phase = {"from_step": training.step, "photos": args.photos and args.photos.as_posix()}
    for name in ("style", "scenes", "images", "lr", "steps", "decay_steps"):
        phase[name] = getattr(args, name)
    training.phases = [*training.phases, phase]
    return training


def train_step(training: Training, pools: dict, args, device) -> dict:
    """One step of the optimizer and of the average. Returns what to log."""
    sam, step = training.sam, training.step
    drawings = max(1, round(args.images * DRAWING_SHARE)) if len(pools) > 1 else args.images
    rate = learning_rate(step, args.steps, args.lr, args.warmup, args.decay_steps, training.first)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad(set_to_none=True)
    balance, log = max(0.0, 1 - step / args.balance_steps), {"lr": rate}
    mean, std = sam.pixel_mean.cpu(), sam.pixel_std.cpu()
    for kind, pool in pools.items():
        images = drawings if kind == "drawing" else args.images - drawings
        batch = make_batch(pool, args.seed, step, images, mean, std).to(device)
        loss, values = training_loss(sam, training.head, batch, balance, not args.fp32)
        if not torch.isfinite(loss):
            raise UserError(
                f"loss is {loss.item()} at step {step}; resume with a lower --lr (now {args.lr})"
            )
        (loss * images / args.images).backward()
        log |= {f"{kind}_{name}": value for name, value in values.items()}
    nn.utils.clip_grad_norm_([*sam.parameters(), *training.head.parameters()], 1.0)
    training.optimizer.step()
    training.step += 1
    decay = min(EMA_DECAY, training.step / (training.step + 8))  # of the last ninth at first
    with torch.no_grad():
        torch._foreach_lerp_(list(training.ema.parameters()), list(sam.parameters()), 1 - decay)
    return log


def save(training: Training, args, record: dict) -> None:
    """Checkpoint, exported weights and the training's record."""
    state = {name: getattr(training, name).state_dict() for name in Training.MODULES}
    numbers = {name: getattr(training, name) for name in Training.NUMBERS}
    with atomic_path(args.run_folder / "checkpoint.pth") as temporary:
        torch.save(state | numbers, temporary)
    export(training.ema, args.logit_gain, args.out)
    numbers["minutes"] = round(training.minutes, 1)
    write_json(args.run_folder / "training.json", record | numbers)


def train(training: Training, pools: dict, args, device) -> None:
    """To step --steps. A line of log.jsonl every 25 steps: means since the last one."""
    started, minutes = time.time(), training.minutes
    lines, record = [], manifest(vars(args))
    bar = progress(desc="tiny SAM", total=args.steps, unit="step", initial=training.step)
    while training.step < args.steps:
        lines.append(train_step(training, pools, args, device))
        training.minutes = minutes + (time.time() - started) / 60
        bar.update()
        if training.step % 25 == 0:
            line = {"step": training.step, "minutes": round(training.minutes, 2)}
            line |= {key: round(float(np.mean([e[key] for e in lines])), 6) for key in lines[0]}
            with open(args.run_folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            lines = []
        if training.step % args.save_every == 0 or training.step == args.steps:
            save(training, args, record)
    bar.close()
    print(f"{args.out}: step {training.step}, {training.minutes:.1f} minutes of training")


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    tune_cpu()
    check_writable(args.run_folder)
    check_writable(args.out.parent)
    if args.iou_head:
        refit_iou_head(args)
        return
    device = select_device(args.device)
    checkpoint = args.run_folder / "checkpoint.pth"
    if checkpoint.exists() and not args.resume:
        raise UserError(
            f"{checkpoint}: a training is there; add --resume to go on, "
            "or choose another --run-folder"
        )
    if args.resume and not checkpoint.exists():
        raise UserError(
            f"{checkpoint}: no such checkpoint to resume; leave out --resume to start anew"
        )
    pools = load_pools(args)
    train(begin(args, device), pools, args, device)


if __name__ == "__main__":
    sys.exit(run_main(main))
