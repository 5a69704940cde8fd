"""Make and measure the two tiny SAMs that ship with this repository (--sam-type tiny).

    python -m scripts.dev.sam_tiny train drawings      # model/sam_tiny.pth
    python -m scripts.dev.sam_tiny train photographs   # model/sam_tiny_photo.pth, from the first
    python -m scripts.dev.sam_tiny eval drawings       # measures it; into model/sam_tiny.json
    python -m scripts.dev.sam_tiny eval photographs

Drawings are scenes of dataset/toy, none of its target, with seeds that no benchmark scene has.
Photographs are CamVid's day drives below --root-path (splits/camvid/sam_train.txt); the connected
components of their labels are the segments, and what has no label is neither prompted nor
penalised. At the end the IoU head alone is fitted: in the training it learns the IoU with the one
object that a prompt stands for, but a proposal is good if it is any object.

What a training does is read from "recipe" in the record beside its weights. The shipped files came
of earlier states of this code: the first 150 steps showed abstract shapes, here drawings, and up to
step 4790 fewer points lay on stuff. A step takes about a second on 2 CPU cores with avx512_bf16. A
stopped training goes on when its command is given again. Same threads and versions: same weights.

Needs when copied away: model/, dataset/toy/, util/.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from dataset.toy import draw_scene
from model.checkpoint import load_exactly, read_checkpoint, state_dict_in
from model.sam import build_sam
from model.sam_fast import mask_logits, two_way_transformer
from model.sam_tiny import TINY_CHECKPOINT, TINY_PE_FREQUENCIES, build_sam_tiny
from util.connectivity import connectivities
from util.labels import (
    CITYSCAPES_19,
    check_pairs,
    read_classes,
    read_label,
    read_list,
    read_picture,
)
from util.options import Argument, Folder, parse_options
from util.outputs import Outputs, atomic_path, read_json, write_json
from util.run import UserError, manifest, progress, run_main, tune_cpu

ROOT = Path(__file__).resolve().parents[2]


WEIGHTS = {
    "drawings": TINY_CHECKPOINT,
    "photographs": TINY_CHECKPOINT.with_name("sam_tiny_photo.pth"),
}
CAMVID = ROOT / "splits/camvid"
CAMVID_CLASSES = read_classes(CAMVID / "classes.txt")

SEED = 0
SIZE, PHOTO_SIZE = (192, 384), (288, 384)  # (height, width) of drawings and windows, pixels
POOL_SCENES = 2000  # that are trained on, of each kind
FIRST_TRAIN_SEED, FIRST_EVAL_SEED = 10_000_000, 9_000_000  # of scenes, here alone
STYLES = ("target", "source", "random")  # that are measured
VOID = -1  # in segment maps: pixels without a label, or in a component of under MIN_AREA pixels
MIN_AREA = 10  # pixels: PSA skips connectivities under 10 pixels (released code), so do we
# Prompts of an image and step: boxes with one point, boxes with two, one point alone.
BOX_PROMPTS, POINT_PROMPTS = (4, 4), 7
LOGIT_GAIN = 4.0  # see `export`
SAVE_EVERY = 100  # steps
SIZE_BINS = {  # pixels of the object
    "under 50": (0, 50),
    "50 to 150": (50, 150),
    "150 to 500": (150, 500),
    "500 to 2000": (500, 2000),
    "above 2000": (2000, np.inf),
    "every size": (0, np.inf),
}


@dataclass(kw_only=True)
class Options:
    """the tiny SAM"""

    command: Argument[Literal["train", "eval"]]
    "make weights, or measure them"
    pictures: Argument[Literal["drawings", "photographs"]]
    "what they see"
    work: Folder = ROOT / "data/sam_tiny"
    "checkpoints"
    root_path: Folder = Path("data")
    "folder that the lists' paths start from"


# ------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A picture to train or to measure on: image [H, W, 3] uint8; segment [H, W] int16, ids or
    VOID; component [H, W] int16, the whole stuff components, ids from 0, VOID elsewhere; table, the
    segments' rows (id, area, y0, y1, x0, x1, is_thing), boxes half open, int32 [N, 7].
    """

    image: np.ndarray
    segment: np.ndarray
    component: np.ndarray
    table: np.ndarray

    @property
    def large(self) -> np.ndarray:
        """The table's rows of segments of at least MIN_AREA pixels."""
        return self.table[self.table[:, 1] >= MIN_AREA]

    def objects(self, table: np.ndarray) -> list[np.ndarray]:
        """Masks [H, W] of a table's segments, then of all whole stuff components."""
        wholes = np.unique(self.component[self.component != VOID])
        masks = [self.segment == index for index in table[:, 0]]
        return masks + [self.component == number for number in wholes]

    def mirrored(self) -> Scene:
        maps, table = (self.image, self.segment, self.component), self.table.copy()
        table[:, 4:6] = self.segment.shape[1] - table[:, [5, 4]]
        return Scene(*(values[:, ::-1] for values in maps), table)


def components(label: np.ndarray, class_ids, least: int = 1) -> np.ndarray:
    """8-connected components of these classes [H, W] int16, ids from 0; VOID elsewhere and on those
    of under `least` pixels.
    """
    found = [c for c in connectivities(label, class_ids) if c.area >= least]
    numbers = np.full(label.shape, VOID, np.int16)
    for number, connectivity in enumerate(found):
        numbers[connectivity.window][connectivity.mask] = number
    return numbers


def segment_table(segment: np.ndarray, label: np.ndarray, stuff: tuple[int, ...]) -> np.ndarray:
    """The `table` of a Scene."""
    rows = []
    for index, where in enumerate(ndimage.find_objects(segment.astype(np.int32) + 1)):
        if where is not None:
            inside, (y, x) = segment[where] == index, where
            is_thing = int(label[where][inside][0]) not in stuff
            rows.append((index, inside.sum(), y.start, y.stop, x.start, x.stop, is_thing))
    return np.array(rows, np.int32).reshape(-1, 7)


def drawing(seed: int, style: str) -> Scene:
    drawn, stuff = draw_scene(seed, style, *SIZE), CITYSCAPES_19.stuff
    segment = np.asarray(drawn.segment, np.int16)
    table = segment_table(segment, drawn.label, stuff)
    return Scene(drawn.image, segment, components(drawn.label, stuff), table)


def photo_rows(name: str, root: Path) -> tuple[tuple[Path, Path], ...]:
    """(image, label) of every row of one of CamVid's lists, after a check of all."""
    rows = read_list(CAMVID / f"{name}.txt")
    check_pairs(root, rows, CAMVID / f"{name}.txt", CAMVID_CLASSES.count, same_size=True)
    return tuple((root / image, root / label) for image, label in rows)


def photo_window(row: tuple[Path, Path], zoom: float, at: np.ndarray) -> Scene:
    """A part of a photograph in PHOTO_SIZE: the largest one of that shape for zoom 1, a smaller one
    above. at: its place (x, y) in [0, 1]. All of `component` is VOID.
    """
    image, label = read_picture(row[0]), Image.fromarray(read_label(row[1], CAMVID_CLASSES.count))
    height, width = PHOTO_SIZE
    scale = zoom * max(width / image.width, height / image.height)
    w, h = width / scale, height / scale
    x, y = (at * [image.width - w, image.height - h]).clip(0)  # rounding may leave -1e-14
    box = (x, y, min(x + w, image.width), min(y + h, image.height))
    image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
    label = np.asarray(label.resize((width, height), Image.Resampling.NEAREST, box))
    segment = components(label, range(CAMVID_CLASSES.count), MIN_AREA)
    table = segment_table(segment, label, CAMVID_CLASSES.stuff)
    return Scene(image, segment, np.full_like(segment, VOID), table)


def random_window(index: int, rows: tuple[tuple[Path, Path], ...]) -> Scene:
    """A random part of a random photograph in a random light, from day to dusk: contrast, gamma,
    brightness, colour cast, blur and noise.
    """
    rng = np.random.default_rng((FIRST_TRAIN_SEED, index))
    for _ in range(100):
        row, zoom = rows[rng.integers(len(rows))], np.exp(rng.uniform(0, np.log(1.6)))
        scene = photo_window(row, zoom, rng.uniform(0, 1, 2))
        if len(scene.table):
            break
    else:
        raise UserError(f"{row[1]}: no label of 100 windows has {MIN_AREA} pixels in one piece")
    x = scene.image.astype(np.float32) / 255
    x = np.clip((x - x.mean()) * rng.uniform(0.6, 1.2) + x.mean(), 0, 1)
    x = x ** np.exp(rng.uniform(np.log(0.6), np.log(3)))
    x = x * rng.uniform(0.35, 1.15) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.3:
        x = ndimage.gaussian_filter(x, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    x = x + rng.normal(0, rng.uniform(0, 0.03), x.shape)
    return replace(scene, image=(x.clip(0, 1) * 255).round().astype(np.uint8))


@lru_cache(maxsize=1000)
def training_scene(kind: str, index: int, rows: tuple[tuple[Path, Path], ...]) -> Scene:
    """Scene `index` of a kind: "random" or "mixed" drawings (of these every eighth or second is of
    the benchmark's source), or "photographs", windows of `rows`.
    """
    if kind == "photographs":
        return random_window(index, rows)
    every, seed = (8, FIRST_TRAIN_SEED) if kind == "random" else (2, FIRST_TRAIN_SEED + 100_000)
    return drawing(seed + index, "source" if index % every == every - 1 else "random")


# ------------------------------------------------------------------------------------------ prompts


def imperfect_box(rng: np.random.Generator, segment: np.ndarray, row: np.ndarray, count: int):
    """A box (x0, y0, x1, y1), `count` points (x, y) as PSA derives them from a noisy, partial
    connectivity of the segment of a table's `row`, and whether it is one of a fragment.

    With chance 0.45 only a fragment of the object was labeled; the points lie in it. The box around
    it grows by u * area / perimeter with u = 1.25 (half of the time; the released recipe: up to 2.6
    times the area), between 0 and 1.25 (a quarter) or 0, and its sides move a little; one in seven
    reaches into a neighbour.
    """
    index, _, top, bottom, left, right, _ = row
    mask = segment[top:bottom, left:right] == index
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
    points = np.stack([xs[chosen] + left, ys[chosen] + top], axis=1)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    w, h = x1 - x0, y1 - y0
    kind = rng.random()
    u = 1.25 if kind < 0.5 else 1.25 * rng.random() if kind < 0.75 else 0.0
    d = u * w * h / (2 * (w + h))
    sides = np.array([-d, -d, d, d]) + rng.normal(0, 0.05, 4) * [w, h, w, h]
    if rng.random() < 1 / 7:
        side = rng.integers(4)
        sides[side] += (-1 if side < 2 else 1) * rng.uniform(0.1, 0.6) * (w, h)[side % 2]
    box = np.array([x0 + left, y0 + top, x1 - 1 + left, y1 - 1 + top]) + sides
    box[:2], box[2:] = np.floor(box[:2]), np.ceil(box[2:])
    return np.clip(box, 0, [segment.shape[1] - 1, segment.shape[0] - 1] * 2), points, fragment


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


def sample_prompts(rng: np.random.Generator, scene: Scene) -> list[tuple]:
    """Random prompts of one scene, in groups (points [K, n, 2], boxes [K, 4] or None, targets
    [K, T, H, W] bool), x before y, in pixels: boxes with one point, with two, single points.

    70 % of the boxes are on things; half of the single points are uniform over the image as the
    automatic mask generator's grid is, 30 % uniform over the stuff segments, the others over all
    segments. None is on VOID. A single point has two targets: its segment and the whole stuff
    component (the segment again where there is none).
    """
    segment, component = scene.segment, scene.component
    table = scene.large
    things, stuff = table[table[:, 6] == 1], table[table[:, 6] == 0]
    groups = []
    for n, count in enumerate(BOX_PROMPTS, start=1):
        drawn = []
        for _ in range(count):
            of_things = len(things) and (rng.random() < 0.7 or not len(stuff))
            rows = things if of_things else stuff
            row = rows[rng.integers(len(rows))]
            box, points, fragment = imperfect_box(rng, segment, row, n)
            target = box_target(segment == row[0], box, fragment, bool(row[6]))
            drawn.append((points, box, target[None]))
        groups.append(tuple(np.stack(part) for part in zip(*drawn)))
    points, targets = [], []
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
            chosen = rng.integers(len(ys))
            y, x = ys[chosen] + y0, xs[chosen] + x0
        target, whole = segment == segment[y, x], component == component[y, x]
        points.append([(x, y)])
        targets.append((target, whole if component[y, x] != VOID else target))
    return [*groups, (np.array(points), None, np.array(targets))]


def dense_targets(segment: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the auxiliary head learns: segment edges at half resolution [H/2, W/2] bool and where
    they are known, not touching VOID [H/2, W/2] bool; for the segment at every token's centre its
    id [H/8, W/8] and log(1 + d / 8) of the distances d to its box's four sides [H/8, W/8, 4].
    """
    halves = (segment.shape[0] // 2, 2, segment.shape[1] // 2, 2)
    void, edge = segment == VOID, np.zeros(segment.shape, bool)
    unknown = void.copy()
    unknown[:, :-1] |= void[:, 1:]
    unknown[:-1] |= void[1:]
    edge[:, :-1] |= segment[:, :-1] != segment[:, 1:]
    edge[:-1] |= segment[:-1] != segment[1:]
    edge, unknown = (cells.reshape(halves).any(axis=(1, 3)) for cells in (edge, unknown))
    centre = segment[4::8, 4::8]
    boxes = np.zeros((table[:, 0].max() + 1, 4), np.float32)
    boxes[table[:, 0]] = table[:, 2:6]
    y0, y1, x0, x1 = np.moveaxis(boxes[centre], -1, 0)
    y, x = np.mgrid[4 : segment.shape[0] : 8, 4 : segment.shape[1] : 8] + 0.5
    sides = np.log1p(np.stack([y - y0, y1 - y, x - x0, x1 - x], axis=-1).clip(0) / 8)
    return edge, ~unknown, centre, sides.astype(np.float32)


def low_resolution(masks: np.ndarray) -> Tensor:
    """Masks [..., H, W] bool as the share of object pixels in each half-resolution cell, token
    order [..., h*w*16].
    """
    t = torch.from_numpy(np.ascontiguousarray(masks)).to(torch.uint8)
    t = t[..., 0::2, 0::2] + t[..., 0::2, 1::2] + t[..., 1::2, 0::2] + t[..., 1::2, 1::2]
    return pixels_to_tokens(t).float() / 4


def make_batch(kind: str, rows: tuple, step: int, images: int) -> tuple:
    """The batch of one step, a function of its arguments alone: images [B, 3, H, W], prompts as
    `sample_prompts` (points [B, K, n, 2], boxes [B, K, 4] or None, targets as area means in token
    order [B, K, T, h*w*16]), the share of pixels with a label [B, h*w*16], the parts of
    `dense_targets` and the tokens [B, A] whose groups the auxiliary head is asked for.
    """
    rng = np.random.default_rng((SEED, step))
    chosen, prompts, anchors = [], [], []
    for index in rng.choice(POOL_SCENES, images, replace=False):
        scene = training_scene(kind, int(index), rows)
        scene = scene.mirrored() if rng.random() < 0.5 else scene
        chosen.append(scene)
        prompts.append(sample_prompts(rng, scene))
        anchors.append(torch.from_numpy(rng.choice(scene.segment.size // 64, 48, replace=False)))
    groups = []
    for group in zip(*prompts):
        points, boxes, targets = ([p[i] for p in group] for i in range(3))
        boxes = None if boxes[0] is None else torch.from_numpy(np.stack(boxes)).float()
        points = torch.from_numpy(np.stack(points)).float()
        groups.append((points, boxes, low_resolution(np.stack(targets))))
    pictures = torch.from_numpy(np.stack([scene.image for scene in chosen]))
    known = low_resolution(np.stack([scene.segment != VOID for scene in chosen]))
    dense = zip(*(dense_targets(scene.segment, scene.table) for scene in chosen))
    dense = [torch.from_numpy(np.stack(part)) for part in dense]
    return pictures.permute(0, 3, 1, 2).float(), groups, known, dense, torch.stack(anchors)


# --------------------------------------------------------------------------------- forward and loss


def initialise(sam) -> None:
    """Starting weights that localise from the first step.

    The random positional frequencies are spread over scales (the package draws them all around one
    cycle per half image, too coarse for small objects of a small network); query and key
    projections of the cross-attentions start equal and orthogonal, so that a prompt token attends
    to its own place.
    """
    generator = torch.Generator().manual_seed(SEED)
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


def decoded(
    sam, embedding: Tensor, points: Tensor, boxes: Tensor | None, outputs: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """What SAM gives for K prompts on each of B images: logits [B, K, M, N*16] in token order and
    predicted IoU [B, K, M] of the M mask `outputs`, and what the IoU head reads [B, K, C].

    embedding [B, C, h, w]; positive points [B, K, n, 2]; boxes [B, K, 4]. The prompt encoder's own
    forward would draw the prompts over the padding too.
    """
    (b, k), (h, w) = points.shape[:2], embedding.shape[2:]
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    labels = torch.ones(b * k, points.shape[2], dtype=torch.int, device=points.device)
    points, boxes = (points.flatten(0, 1), labels), None if boxes is None else boxes.flatten(0, 1)
    sparse, _ = PromptEncoder.forward(encoder, points, boxes, None)
    drawn = encoder.draw(points, boxes, h, w).unflatten(0, (b, k))
    tokens = (embedding + encoder.no_mask_embed.weight[:, :, None, None]).flatten(2).transpose(1, 2)
    keys = tokens[:, None].to(drawn.dtype) + drawn
    pe = encoder.get_dense_pe()[..., :h, :w].flatten(2).transpose(1, 2)[None].to(keys.dtype)
    queries, keys = two_way_transformer(decoder, keys, pe, sparse.unflatten(0, (b, k)))
    iou = decoder.iou_prediction_head(queries[:, :, 0])[..., outputs]
    return mask_logits(decoder, queries, keys, outputs), iou, queries[:, :, 0]


def pixels_to_tokens(x: Tensor) -> Tensor:
    """[..., 4h, 4w] to [..., h*w*16]: the inverse of `model.sam_fast.tokens_to_pixels`."""
    lead, (height, width) = x.shape[:-2], x.shape[-2:]
    x = x.reshape(-1, height // 4, 2, 2, width // 4, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(*lead, height * width)


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


def mask_loss(sam, embedding: Tensor, prompts: list, known: Tensor, balance: float) -> Tensor:
    """Loss of masks and predicted IoU of one batch."""
    loss = 0.0
    for points, boxes, targets in prompts:
        outputs = slice(1, None) if boxes is None else slice(0, 1)
        logits, iou_pred, _ = decoded(sam, embedding, points, boxes, outputs)
        losses, iou = pair_losses(logits.float(), targets, balance, known)
        best = losses.amin(dim=2).mean(dim=-1)  # each valid target needs one good output
        if logits.shape[2] > 1:
            best = best + 0.03 * losses.mean(dim=(2, 3))  # keeps idle outputs alive
        iou = iou.amax(dim=-1)  # an output may show either target
        share = targets.shape[1] / (sum(BOX_PROMPTS) + POINT_PROMPTS)
        loss = loss + share * (best.mean() + 2 * F.mse_loss(iou_pred.float(), iou))
    return loss


def auxiliary_loss(head: nn.Module, embedding: Tensor, dense: list, anchors: Tensor) -> Tensor:
    """Loss of what `head` says of each token: 16 edges, 4 box sides, a grouping vector of 16. Only
    the training uses it. VOID takes no part.
    """
    edge, sides, group = head(embedding.permute(0, 2, 3, 1)).float().split((16, 4, 16), dim=-1)
    edges, edges_known, centre = dense[0].float(), dense[1].float(), dense[2].flatten(1).long()
    weight = (1 + 4 * edges) * edges_known
    edge_loss = F.binary_cross_entropy_with_logits(
        edge, pixels_to_tokens(edges).view(edge.shape), pixels_to_tokens(weight).view(edge.shape)
    )
    seen = (centre != VOID).float()  # [B, N]
    of_token = seen.view(*sides.shape[:3], 1)
    side_loss = F.smooth_l1_loss(sides * of_token, dense[3] * of_token, beta=0.1)
    group = group.flatten(1, 2)  # [B, N, 16]
    anchor = group.gather(1, anchors[..., None].expand(-1, -1, group.shape[2]))  # [B, A, 16]
    same = (centre.gather(1, anchors)[:, :, None] == centre[:, None]).float()
    both_seen = seen.gather(1, anchors)[:, :, None] * seen[:, None]
    affinity = 2 - torch.cdist(anchor, group).square()
    share_same = same.mean().clamp(0.01, 0.99)
    weight = same * 0.5 / share_same + (1 - same) * 0.5 / (1 - share_same)
    group_loss = F.binary_cross_entropy_with_logits(affinity, same, weight * both_seen)
    return 0.5 * edge_loss + 0.5 * side_loss + 0.5 * group_loss


# ------------------------------------------------------------------------------- the IoU head alone


def judged_masks(sam, scene: Scene, points: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the IoU head reads, [P, C], and what it should say, [P, M], of the masks of single
    points [P, 2] (x, y): a mask's best IoU, at half resolution, with any segment of at least
    MIN_AREA pixels or whole stuff component.
    """
    truths = low_resolution(np.stack(scene.objects(scene.large)))
    known, areas = low_resolution(scene.segment != VOID), truths.sum(dim=1)
    picture = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)[None].float()
    read, best = [], []
    with torch.no_grad():
        embedding = sam.image_encoder.tokens((picture - sam.pixel_mean) / sam.pixel_std)
        for part in torch.from_numpy(points).float().split(8):
            logits, _, token = decoded(sam, embedding, part[None, :, None], None)
            read.append(token[0])
            masks = (logits[0] > 0).float() * known  # [P, M, h*w*16]
            both = masks @ truths.T
            union = masks.sum(dim=-1, keepdim=True) + areas - both
            best.append((both / union.clamp(min=1)).amax(dim=-1))
    return torch.cat(read), torch.cat(best)


def fit_iou_head(head: nn.Module, read: Tensor, target: Tensor) -> None:
    """Least asymmetric squares: `head` (in place) learns the 0.95 expectile of target [n, M] given
    read [n, C], for the official threshold of 0.88.
    """
    optimizer, epochs = torch.optim.AdamW(head.parameters(), lr=1e-3), 8
    generator = torch.Generator().manual_seed(SEED)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs)
        for rows in torch.randperm(len(read), generator=generator).split(256):
            error = target[rows] - head(read[rows])
            loss = (torch.where(error > 0, 0.95, 0.05) * error.square()).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def refit(sam, scenes: int, kinds: tuple[str, ...], rows: tuple) -> None:
    """Fit the IoU head to the masks of random points in so many scenes of each kind, the rest as it
    is.
    """
    rng, judged = np.random.default_rng(SEED), []
    for index in progress(range(scenes), "IoU head", unit="scene"):
        for kind in kinds:
            scene = training_scene(kind, index, rows)
            ys, xs = np.nonzero(scene.segment != VOID)
            chosen = rng.integers(len(ys), size=224)
            judged.append(judged_masks(sam, scene, np.stack([xs, ys], axis=1)[chosen]))
    fit_iou_head(sam.mask_decoder.iou_prediction_head, *map(torch.cat, zip(*judged)))


# ----------------------------------------------------------------------------------------- training


def learning_rate(step: int, recipe: dict, phase: dict) -> float:
    """Linear warm-up from the recipe's first step, constant, linear decay to the phase's end."""
    warmup = (step - recipe["phases"][0]["from_step"] + 1) / recipe["warmup"]
    decay = (phase["steps"] - step) / phase["decay_steps"]
    return phase["lr"] * min(1.0, warmup, max(0.0, decay))


def gains(name: str) -> bool:
    """Is it a parameter of the hypernetworks' last layer, which the logits are proportional to?"""
    return ".layers.2." in name and "output_hypernetworks_mlps" in name


def export(model: nn.Module, path: Path) -> None:
    """Write the weights for inference: fp16 except the positional frequencies, logits multiplied by
    LOGIT_GAIN.

    The gain goes into the last layer of the hypernetworks. It moves no mask (threshold 0), only the
    stability score, whose offset of 1.0 is in logits of a SAM trained much longer than this one.
    """
    state = {}
    for name, value in model.state_dict().items():
        value = value * LOGIT_GAIN if gains(name) else value
        state[name] = value.clone() if "gaussian_matrix" in name else value.half()
    save(path, state)


def save(path: Path, content: dict) -> None:
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_exported(model: nn.Module, path: Path) -> None:
    """Load weights that `export` wrote."""
    state = state_dict_in(read_checkpoint(path), path)
    state = {k: v.float() / (LOGIT_GAIN if gains(k) else 1) for k, v in state.items()}
    load_exactly(model, state, path, "the tiny SAM")


def begin(start: Path | None) -> dict:
    """Networks and optimizer of a new training, by name. "ema" is the average of the weights, which
    is exported. start: weights to begin with.
    """
    torch.manual_seed(SEED)
    sam = build_sam_tiny()
    initialise(sam)
    if start:
        load_exported(sam, start)
    width = sam.mask_decoder.transformer_dim
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 36))
    parameters = [*sam.train().parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    return {"sam": sam, "head": head, "ema": copy.deepcopy(sam).eval(), "optimizer": optimizer}


def train_step(parts: dict, recipe: dict, step: int, rows: tuple) -> None:
    """One step of the optimizer and of the average. rows: of photographs; with them three of four
    images are photographs.
    """
    sam, head, optimizer = parts["sam"], parts["head"], parts["optimizer"]
    phase = [phase for phase in recipe["phases"] if phase["from_step"] <= step][-1]
    drawings = max(1, round(phase["images"] / 4)) if rows else phase["images"]
    counts = {phase["style"]: drawings, "photographs": phase["images"] - drawings}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe, phase)
    optimizer.zero_grad(set_to_none=True)
    for kind, count in counts.items() if rows else [(phase["style"], drawings)]:
        images, prompts, known, dense, anchors = make_batch(kind, rows, step, count)
        balance = max(0.0, 1 - step / 2500)  # from balanced cross-entropy to plain
        with torch.autocast("cpu", torch.bfloat16, enabled=phase["bf16"]):
            embedding = sam.image_encoder.tokens((images - sam.pixel_mean) / sam.pixel_std)
            loss = mask_loss(sam, embedding, prompts, known, balance)
            loss = loss + auxiliary_loss(head, embedding, dense, anchors)
        if not torch.isfinite(loss):
            raise UserError(f"loss is {loss.item()} at step {step}; remove --work and start anew")
        (loss * count / phase["images"]).backward()
    nn.utils.clip_grad_norm_([*sam.parameters(), *head.parameters()], 1.0)
    optimizer.step()
    highest = 0.998 if step < 4790 else 0.99
    decay = min(highest, (step + 1) / (step + 9))  # of the last ninth at first
    with torch.no_grad():
        averages, weights = list(parts["ema"].parameters()), list(sam.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)


def train(options: Options, weights: Path, record: dict) -> None:
    """All phases, then the IoU head; a checkpoint every 100 steps. Writes `weights`, for inference,
    and the record beside it.

    Of record["recipe"]: warmup, steps; iou_scenes, of each kind, that the IoU head is fitted to;
    phases: from_step, the first; style of the drawings; images a step; lr, which decays to zero
    over `decay_steps` steps up to step `steps`; bf16. The last phase ends at step `end`.
    """
    recipe, photos = record["recipe"], options.pictures == "photographs"
    work = options.work / options.pictures
    torch.set_num_threads(recipe["threads"])
    tune_cpu()
    rows = photo_rows("sam_train", options.root_path) if photos else ()
    with Outputs(work):
        parts, started = begin(WEIGHTS["drawings"] if photos else None), time.time()
        done, end = recipe["phases"][0]["from_step"], recipe["end"]
        if (checkpoint := work / "checkpoint.pth").is_file():
            state = read_checkpoint(checkpoint)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            done, started = state["step"], started - 60 * state["minutes"]
        for step in progress(range(done, end), options.pictures, unit="step"):
            train_step(parts, recipe, step, rows)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
                state = {name: part.state_dict() for name, part in parts.items()}
                minutes = (time.time() - started) / 60
                save(checkpoint, state | {"step": step + 1, "minutes": minutes})
        export(parts["ema"], work / "trained.pth")
        sam = build_sam_tiny()
        load_exported(sam, work / "trained.pth")
        refit(sam, recipe["iou_scenes"], ("mixed", "photographs")[: 1 + photos], rows)
        export(sam, weights)
    training = manifest(vars(options) | {"seed": SEED, "threads": recipe["threads"]})
    training |= {"step": end, "minutes": round((time.time() - started) / 60, 1)}
    write_json(weights.with_suffix(".json"), {"recipe": recipe, "training": training})
    print(f"{weights}: step {end}, {training['minutes']} minutes")


# -------------------------------------------------------------------------------------- measurement


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two bool masks of one shape; 0 for two empty ones."""
    return np.count_nonzero(a & b) / max(1, np.count_nonzero(a | b))


def prompt_scene(predictor: SamPredictor, scene: Scene, rng: np.random.Generator) -> list[dict]:
    """One imperfect box-and-points prompt for every segment: its area, whether it is a thing, the
    IoU of SAM's mask and of the filled box.
    """
    predictor.set_image(scene.image)
    rows, known = [], scene.segment != VOID
    for row in scene.large:
        is_thing = bool(row[6])
        box, points, fragment = imperfect_box(rng, scene.segment, row, int(rng.integers(1, 3)))
        truth = box_target(scene.segment == row[0], box, fragment, is_thing)
        ones = np.ones(len(points), int)
        mask = predictor.predict(points, ones, box, multimask_output=False)[0][0]
        filled = box_target(np.ones_like(truth), box, fragment=True, is_thing=False)
        iou, fill = (mask_iou(found & known, truth) for found in (mask, filled))
        area = np.count_nonzero(truth)
        rows.append({"area": area, "thing": is_thing, "iou": iou, "fill": fill})
    return rows


def propose_scene(generator: SamAutomaticMaskGenerator, scene: Scene) -> dict:
    """Proposals of one scene: their best IoU with any segment or whole stuff component, and the
    share of the pixels and of the stuff pixels that they cover.
    """
    known, truths = scene.segment != VOID, scene.objects(scene.table)
    stuff = np.isin(scene.segment, scene.table[scene.table[:, 6] == 0, 0])
    masks = [proposal["segmentation"] & known for proposal in generator.generate(scene.image)]
    masks = [mask for mask in masks if mask.any()]  # not those where nothing is measured
    covered = np.any([np.zeros_like(known), *masks], axis=0)
    return {
        "number": len(masks),
        "iou": [max(mask_iou(mask, truth) for truth in truths) for mask in masks],
        "covered": covered[known].mean(),
        "stuff_covered": covered[stuff].mean(),
    }


def means(rows: list[dict], *keys: str) -> dict[str, float | None]:
    """The mean of each key over the rows; None without rows."""
    return {k: round(float(np.mean([row[k] for row in rows])), 3) if rows else None for k in keys}


def measure(sam, name: str, scenes: list[Scene]) -> dict:
    """Both measurements: means by object size for things and for all, `n` objects each; means over
    the proposals, which take seconds, of three scenes spread evenly.
    """
    predictor, generator = SamPredictor(sam), SamAutomaticMaskGenerator(sam)
    rows, prompts, few = [], {}, min(3, len(scenes))
    for number, scene in enumerate(progress(scenes, name)):
        rows += prompt_scene(predictor, scene, np.random.default_rng((SEED, number)))
    for kind, of_kind in {"things": [row for row in rows if row["thing"]], "all": rows}.items():
        prompts[kind] = {}
        for size, (low, high) in SIZE_BINS.items():
            inside = [row for row in of_kind if low <= row["area"] < high]
            prompts[kind][size] = {"n": len(inside), **means(inside, "iou", "fill")}
    found = [propose_scene(generator, scenes[i * len(scenes) // few]) for i in range(few)]
    proposals = means(found, "number", "covered", "stuff_covered")
    proposals |= means([{"iou": iou} for scene in found for iou in scene["iou"]], "iou")
    about = {"scenes": len(scenes), "proposal_scenes": few}
    return about | {"prompts": prompts, "proposals": proposals}


def evaluate(options: Options, weights: Path, record: dict) -> None:
    """Held-out drawings; of photographs the day drives' held-out ones and, as a diagnostic, dusk,
    all whole; record["recipe"]["scenes"] of each. The results join the record beside `weights`.
    """
    sam, sets, wanted = build_sam("tiny", weights), {}, record["recipe"]["scenes"]
    for number, style in enumerate(STYLES):
        first = FIRST_EVAL_SEED + 100_000 * number
        sets[style] = [drawing(first + i, style) for i in range(wanted)]
    for name in ("sam_holdout", "dusk_gt") if options.pictures == "photographs" else ():
        rows = photo_rows(name, options.root_path)
        count = min(wanted, len(rows))
        chosen = [rows[i * len(rows) // count] for i in range(count)]
        sets[name] = [photo_window(row, 1, np.array([0.5, 0.5])) for row in chosen]
    record |= {"seed": SEED, "first_scene_seed": FIRST_EVAL_SEED}
    record["results"] = {name: measure(sam, name, scenes) for name, scenes in sets.items()}
    write_json(weights.with_suffix(".json"), record)
    print(f"{weights.with_suffix('.json')}: measured on {', '.join(sets)}")


def main(argv=None) -> None:
    options = parse_options(Options, __doc__, argv)
    weights = WEIGHTS[options.pictures]
    command = train if options.command == "train" else evaluate
    command(options, weights, read_json(weights.with_suffix(".json")))


if __name__ == "__main__":
    sys.exit(run_main(main))
