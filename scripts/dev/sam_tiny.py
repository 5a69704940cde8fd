"""Make the two tiny SAMs that ship with this repository (--sam-type tiny, tiny_photo).

    python -m scripts.dev.sam_tiny drawings      # model/sam_tiny.pth
    python -m scripts.dev.sam_tiny photographs   # model/sam_tiny_photo.pth, from the first

Drawings are scenes of dataset/toy, none of its target, with seeds that no benchmark scene has.
Photographs are CamVid's day drives below --root-path (splits/camvid/sam_train.txt), segments the
connected components of their labels; what has no label is neither prompted nor penalised. At the
end the IoU head alone is fitted: in the training it learns the IoU with the one object that a
prompt stands for, but a proposal is good if it is any object.

The record beside the weights has the "recipe". The shipped files came of earlier states of this
code. A stopped training goes on with the same command. Same threads and versions: same weights.

Needs when copied away: model/, dataset/scc.py, dataset/toy/, util/, splits/camvid/.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from dataset.scc import numbered
from dataset.toy import FIRST_FREE_SEED, draw_scene
from model.resnet import read_checkpoint
from model.sam import WEIGHTS
from model.sam_fast import build_sam_tiny, mask_logits, pixel_order, two_way_transformer
from util.labels import (
    CITYSCAPES_19,
    IGNORE,
    check_pairs,
    read_classes,
    read_label,
    read_list,
    read_picture,
)
from util.options import Argument, Folder, parse_options
from util.outputs import Outputs, atomic_path, read_json, write_json
from util.run import manifest, progress, run_main, tune_cpu

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"drawings": "tiny", "photographs": "tiny_photo"}
CAMVID = ROOT / "splits/camvid"
CAMVID_CLASSES = read_classes(CAMVID / "classes.txt")

SEED = 0
SIZE, PHOTO_SIZE = (192, 384), (288, 384)  # (height, width) of drawings and windows, pixels
POOL_SCENES = 2000  # that are trained on, of each kind
VOID = -1  # in segment maps: pixels without a label, or in a component of under MIN_AREA pixels
MIN_AREA = 10  # pixels: PSA skips connectivities under 10 pixels (released code), so do we
# Prompts of an image and step: boxes with one point, boxes with two, one point alone.
BOX_PROMPTS, POINT_PROMPTS = (4, 4), 7
LOGIT_GAIN = 4.0  # see `gain`
# Of positional encodings, cycles per half image: 12 is a wavelength of 16 pixels, two tokens.
PE_FREQUENCIES = (0.5, 12.0)
SAVE_EVERY = 100  # steps


@dataclass(kw_only=True)
class Options:
    """the tiny SAM"""

    pictures: Argument[Literal["drawings", "photographs"]]
    "what it sees"
    work: Folder = ROOT / "data/sam_tiny"
    "checkpoints"
    root_path: Folder = Path("data")
    "folder that the lists' paths start from"


# ------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A picture to train on: image [H, W, 3] uint8; segment [H, W] int32, ids or VOID; component
    [H, W] int32, the connected components of stuff, ids, VOID elsewhere.
    """

    image: np.ndarray
    segment: np.ndarray
    component: np.ndarray

    def large(self) -> np.ndarray:
        """The ids of the segments of at least MIN_AREA pixels."""
        ids, areas = np.unique(self.segment, return_counts=True)
        return ids[(ids != VOID) & (areas >= MIN_AREA)]


def drawing(seed: int, style: str) -> Scene:
    drawn = draw_scene(seed, style, *SIZE)
    stuff = np.where(np.isin(drawn.label, CITYSCAPES_19.stuff), drawn.label, IGNORE)
    return Scene(drawn.image, drawn.segment, numbered(stuff, CITYSCAPES_19.count))


def photo_window(index: int, rows: tuple[tuple[Path, Path], ...]) -> Scene:
    """A random part of a random photograph (image, label), in PHOTO_SIZE, in a random light, from
    day to dusk: contrast, gamma, brightness, colour cast, blur and noise.
    """
    rng = np.random.default_rng((FIRST_FREE_SEED, index))
    row, zoom = rows[rng.integers(len(rows))], np.exp(rng.uniform(0, np.log(1.6)))
    image, label = read_picture(row[0]), Image.fromarray(read_label(row[1], CAMVID_CLASSES.count))
    height, width = PHOTO_SIZE
    scale = zoom * max(width / image.width, height / image.height)
    w, h = width / scale, height / scale
    free = [image.width - w, image.height - h]
    x, y = (rng.uniform(0, 1, 2) * free).clip(0)  # rounding may leave -1e-14
    box = (x, y, min(x + w, image.width), min(y + h, image.height))
    image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
    label = np.asarray(label.resize((width, height), Image.Resampling.NEAREST, box))
    segment = numbered(label, CAMVID_CLASSES.count)
    areas = np.bincount(segment.ravel() + 1)
    segment[areas[segment + 1] < MIN_AREA] = VOID
    x = image.astype(np.float32) / 255
    x = np.clip((x - x.mean()) * rng.uniform(0.6, 1.2) + x.mean(), 0, 1)
    x = x ** np.exp(rng.uniform(np.log(0.6), np.log(3)))
    x = x * rng.uniform(0.35, 1.15) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.3:
        x = ndimage.gaussian_filter(x, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    x = x + rng.normal(0, rng.uniform(0, 0.03), x.shape)
    image = (x.clip(0, 1) * 255).round().astype(np.uint8)
    stuff = np.isin(label, CAMVID_CLASSES.stuff)
    return Scene(image, segment, np.where(stuff, segment, VOID))


@lru_cache(maxsize=1000)
def training_scene(kind: str, index: int, rows: tuple[tuple[Path, Path], ...]) -> Scene:
    """Scene `index` of a kind: "random" or "mixed" drawings (of these every eighth or second is of
    the benchmark's source), or "photographs", windows of `rows`.
    """
    if kind == "photographs":
        return photo_window(index, rows)
    every, seed = (8, FIRST_FREE_SEED) if kind == "random" else (2, FIRST_FREE_SEED + 100_000)
    return drawing(seed + index, "source" if index % every == every - 1 else "random")


# ------------------------------------------------------------------------------------------ prompts


def imperfect_box(
    rng: np.random.Generator, mask: np.ndarray, count: int, is_thing: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What PSA makes of a noisy, partial connectivity of the segment `mask` [H, W]: `count` points
    (x, y), a box (x0, y0, x1, y1), and the mask [H, W] that they stand for.

    With chance 0.45 only a fragment of the object was labeled; the points lie in it. The box around
    it grows by u * area / perimeter with u = 1.25 (half of the time; the released recipe: up to 2.6
    times the area), between 0 and 1.25 (a quarter) or 0, and its sides move a little; one in seven
    reaches into a neighbour. A fragment stands for the whole thing, but of stuff only for what lies
    in the box: a speckle in the sky must not become all of the sky (and SAM keeps to its boxes).
    """
    pixels = np.argwhere(mask)  # (y, x)
    fragment = rng.random() < 0.45
    if fragment:
        size = np.ptp(pixels, axis=0) + 1
        for _ in range(4):
            centre = rng.choice(pixels)
            half = 0.5 * rng.uniform(0.3, 1.0, 2) * size
            near = pixels[(np.abs(pixels - centre) <= half).all(axis=1)]
            if len(near) >= MIN_AREA:
                pixels = near
                break
    points = rng.choice(pixels, count)[:, ::-1]
    box = np.concatenate([pixels.min(axis=0)[::-1], pixels.max(axis=0)[::-1]]).astype(float)
    w, h = box[2:] - box[:2] + 1
    kind = rng.random()
    u = 1.25 if kind < 0.5 else 1.25 * rng.random() if kind < 0.75 else 0.0
    d = u * w * h / (2 * (w + h))
    sides = np.array([-d, -d, d, d]) + rng.normal(0, 0.05, 4) * [w, h, w, h]
    if rng.random() < 1 / 7:
        side = rng.integers(4)
        sides[side] += (-1 if side < 2 else 1) * rng.uniform(0.1, 0.6) * (w, h)[side % 2]
    box += sides
    box[:2], box[2:] = np.floor(box[:2]), np.ceil(box[2:])
    box = np.clip(box, 0, [mask.shape[1] - 1, mask.shape[0] - 1] * 2)
    target = mask
    if fragment and not is_thing:
        left, top, right, bottom = box.astype(int)
        target = np.zeros_like(mask)
        target[top : bottom + 1, left : right + 1] = mask[top : bottom + 1, left : right + 1]
    return points, box, target


def sample_prompts(rng: np.random.Generator, scene: Scene) -> list[dict[str, np.ndarray]]:
    """Random prompts of one scene, x before y, in pixels: boxes with one point, with two, single
    points. A group of K has "points" [K, n, 2], "targets" [K, T, H, W] bool and, of boxes, "boxes"
    [K, 4]. None is on VOID.

    70 % of the boxes are on things; half of the single points are uniform over the image as the
    automatic mask generator's grid is, 30 % uniform over the stuff segments, the others over all
    segments. A single point has two targets: its segment and the whole stuff component (the segment
    again where there is none).
    """
    segment, component, ids = scene.segment, scene.component, scene.large()
    of_stuff = np.isin(ids, segment[component != VOID])
    things, stuff, groups = ids[~of_stuff], ids[of_stuff], []
    for n, count in enumerate(BOX_PROMPTS, start=1):
        drawn = []
        for _ in range(count):
            is_thing = bool(len(things) and (rng.random() < 0.7 or not len(stuff)))
            mask = segment == rng.choice(things if is_thing else stuff)
            drawn.append(imperfect_box(rng, mask, n, is_thing))
        points, boxes, targets = map(np.stack, zip(*drawn))
        groups.append({"points": points, "boxes": boxes, "targets": targets[:, None]})
    points, targets = [], []
    for _ in range(POINT_PROMPTS):
        kind = rng.random()
        if kind < 0.5:
            y, x = rng.integers(segment.shape)
            while segment[y, x] == VOID:
                y, x = rng.integers(segment.shape)
        else:
            among = stuff if kind < 0.8 and len(stuff) else ids
            y, x = rng.choice(np.argwhere(segment == rng.choice(among)))
        target, whole = segment == segment[y, x], component == component[y, x]
        points.append([(x, y)])
        targets.append((target, whole if component[y, x] != VOID else target))
    return [*groups, {"points": np.array(points), "targets": np.array(targets)}]


def dense_targets(segment: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the auxiliary head learns: segment edges at half resolution [H/2, W/2] bool and where
    they are known, not touching VOID [H/2, W/2] bool; for the segment at every token's centre its
    id [H/8, W/8] and log(1 + d / 8) of the distances d to its box's four sides [H/8, W/8, 4].
    """
    right = np.concatenate([segment[:, 1:], segment[:, -1:]], axis=1)
    below = np.concatenate([segment[1:], segment[-1:]])
    edge = (right != segment) | (below != segment)
    known = np.minimum(np.minimum(right, below), segment) != VOID  # which is below all ids
    halves = (segment.shape[0] // 2, 2, segment.shape[1] // 2, 2)
    edge, known = edge.reshape(halves).any(axis=(1, 3)), known.reshape(halves).all(axis=(1, 3))
    centre = segment[4::8, 4::8]
    boxes = np.zeros((segment.max() + 1, 4), np.float32)
    for index, where in enumerate(ndimage.find_objects(segment + 1)):
        if where is not None:
            boxes[index] = [end for part in where for end in (part.start, part.stop)]
    y0, y1, x0, x1 = np.moveaxis(boxes[centre], -1, 0)
    y, x = np.mgrid[4 : segment.shape[0] : 8, 4 : segment.shape[1] : 8] + 0.5
    sides = np.log1p(np.stack([y - y0, y1 - y, x - x0, x1 - x], axis=-1).clip(0) / 8)
    return edge, known, centre, sides.astype(np.float32)


def low_resolution(masks: np.ndarray | Tensor) -> Tensor:
    """Masks [..., H, W] bool as the share of object pixels in each half-resolution cell, token
    order [..., h*w*16].
    """
    cells = torch.as_tensor(masks).float().unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return pixels_to_tokens(cells.mean(dim=(-3, -1)))


def make_batch(kind: str, rows: tuple, step: int, images: int) -> list:
    """The batch of one step, a function of its arguments alone: images [B, H, W, 3] uint8, the
    groups of `sample_prompts`, where there is a label, in `low_resolution`, the parts of
    `dense_targets` and the tokens [B, A] whose groups the auxiliary head is asked for.
    """
    rng, examples = np.random.default_rng((SEED, step)), []
    for index in rng.choice(POOL_SCENES, images, replace=False):
        scene = training_scene(kind, int(index), rows)
        if rng.random() < 0.5:
            scene = Scene(*(values[:, ::-1].copy() for values in vars(scene).values()))
        prompts = sample_prompts(rng, scene)
        anchors = rng.choice(scene.segment.size // 64, 48, replace=False)
        known, dense = low_resolution(scene.segment != VOID), dense_targets(scene.segment)
        examples.append((scene.image, prompts, known, dense, anchors))
    return default_collate(examples)


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
    low, high = PE_FREQUENCIES
    magnitude = low * (high / low) ** (torch.arange(n) / (n - 1))
    angle = 2 * np.pi * torch.rand(n, generator=generator)
    matrix.copy_(torch.stack([torch.cos(angle), torch.sin(angle)]) * magnitude)
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    attentions = [decoder.transformer.final_attn_token_to_image]
    for layer in decoder.transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    embeddings = [*encoder.point_embeddings, encoder.not_a_point_embed, encoder.no_mask_embed]
    with torch.no_grad():
        for embedding in [*embeddings, decoder.mask_tokens, decoder.iou_token]:
            embedding.weight.mul_(0.3)
        for attention in attentions:
            nn.init.orthogonal_(attention.q_proj.weight, 1.5, generator=generator)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def embedded(sam, images: Tensor) -> Tensor:
    """The embedding [B, C, H/8, W/8] of images [B, 3, H, W] of 0 to 255."""
    return sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)


def decoded(
    sam, embedding: Tensor, points: Tensor, boxes: Tensor | None, outputs: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """What SAM gives for K prompts on each of B images: logits [B, K, M, N*16] in token order and
    predicted IoU [B, K, M] of the M mask `outputs`, and what the IoU head reads [B, K, C].

    embedding [B, C, h, w]; positive points [B, K, n, 2]; boxes [B, K, 4].
    """
    (b, k), (h, w) = points.shape[:2], embedding.shape[2:]
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    labels = torch.ones(b * k, points.shape[2], dtype=torch.int)
    points, boxes = points.flatten(0, 1), None if boxes is None else boxes.flatten(0, 1)
    sparse, _ = encoder((points, labels), boxes, None)
    drawn = encoder.draw(points, boxes, h, w).unflatten(0, (b, k))
    tokens = (embedding + encoder.no_mask_embed.weight[:, :, None, None]).flatten(2).transpose(1, 2)
    keys = tokens[:, None].to(drawn.dtype) + drawn
    pe = encoder.get_dense_pe()[..., :h, :w].flatten(2).transpose(1, 2)[None].to(keys.dtype)
    queries, keys = two_way_transformer(decoder, keys, pe, sparse.unflatten(0, (b, k)))
    iou = decoder.iou_prediction_head(queries[:, :, 0])[..., outputs]
    return mask_logits(decoder, queries, keys, outputs), iou, queries[:, :, 0]


def pixels_to_tokens(x: Tensor) -> Tensor:
    """[..., 4h, 4w] to [..., h*w*16]: the inverse of `model.sam_fast.tokens_to_pixels`."""
    order = pixel_order(x.shape[-2] // 4, x.shape[-1] // 4, x.device).argsort()
    return x.flatten(-2).index_select(-1, order)


def overlap(masks: Tensor, targets: Tensor, area: Tensor) -> Tensor:
    """IoU [..., M, T] of masks [..., M, N] with targets [..., N, T] of `area` [..., 1, T]."""
    both = masks @ targets
    return both / (masks.sum(dim=-1, keepdim=True) + area - both).clamp(min=1)


def pair_losses(
    logits: Tensor, targets: Tensor, balance: float, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of every output against every valid target, and their IoU, both [B, K, M, T].

    The loss is dice plus cross-entropy, the latter `balance` parts averaged over object and
    background separately, the rest divided by the geometric mean of object and image area (a small
    object keeps a voice, its far background loses it). The IoU is the thresholded mask's.

    Args:
        logits: [B, K, M, N].
        targets: [B, K, T, N] in [0, 1].
        balance: in [0, 1].
        known: [B, N] in [0, 1], the share of a cell that counts, of which the target is a part.
    """
    known = known[:, None, None]
    n = known.sum(-1, keepdim=True)  # [B, 1, 1, 1]
    t = targets.transpose(-1, -2)  # [B, K, N, T]
    area = targets.sum(-1)[:, :, None]  # [B, K, 1, T]
    soft, probability = F.softplus(logits) * known, torch.sigmoid(logits) * known
    soft_in, logit_in = soft @ t, logits @ t  # [B, K, M, T]
    inside, outside = (soft_in - logit_in), soft.sum(-1, keepdim=True) - soft_in
    balanced = 0.5 * inside / area.clamp(min=1) + 0.5 * outside / (n - area).clamp(min=1)
    plain = (inside + outside) / (area.clamp(min=4) * n).sqrt()
    dice = 1 - (2 * (probability @ t) + 1) / (probability.sum(-1, keepdim=True) + area + 1)
    return balance * balanced + (1 - balance) * plain + dice, overlap((logits > 0) * known, t, area)


def mask_loss(sam, embedding: Tensor, prompts: list, known: Tensor, balance: float) -> Tensor:
    """Loss of masks and predicted IoU of one batch."""
    loss = 0.0
    for group in prompts:
        boxes, outputs = None, slice(1, None)
        if "boxes" in group:
            boxes, outputs = group["boxes"].float(), slice(0, 1)
        targets = low_resolution(group["targets"])
        logits, iou_pred, _ = decoded(sam, embedding, group["points"].float(), boxes, outputs)
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


@torch.no_grad()
def judged_masks(sam, scene: Scene, points: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the IoU head reads, [P, C], and what it should say, [P, M], of the masks of single
    points [P, 2] (x, y): a mask's best IoU, at half resolution, with any segment of at least
    MIN_AREA pixels or whole stuff component.
    """
    segments = [scene.segment == index for index in scene.large()]
    wholes = [scene.component == index for index in range(scene.component.max() + 1)]
    truths, read, best = low_resolution(np.stack(segments + wholes)), [], []
    known = low_resolution(scene.segment != VOID)
    embedding = embedded(sam, torch.from_numpy(scene.image).permute(2, 0, 1)[None])
    for part in torch.from_numpy(points).float().split(8):
        logits, _, token = decoded(sam, embedding, part[None, :, None], None)
        iou = overlap((logits[0] > 0) * known, truths.T, truths.sum(dim=1))
        read.append(token[0])
        best.append(iou.amax(dim=-1))
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


def refit(sam, scenes: int, rows: tuple) -> None:
    """Fit the IoU head to the masks of random points in so many drawings and photographs."""
    rng, judged = np.random.default_rng(SEED), []
    for index in progress(range(scenes), "IoU head", unit="scene"):
        for kind in ("mixed", "photographs") if rows else ("mixed",):
            scene = training_scene(kind, index, rows)
            points = rng.choice(np.argwhere(scene.segment != VOID)[:, ::-1], 224)
            judged.append(judged_masks(sam, scene, points))
    fit_iou_head(sam.mask_decoder.iou_prediction_head, *map(torch.cat, zip(*judged)))


# ----------------------------------------------------------------------------------------- training


def gain(name: str) -> float:
    """LOGIT_GAIN for parameters of the hypernetworks' last layer, which the logits are proportional
    to. It moves no mask (threshold 0), only the stability score, whose offset of 1.0 is in logits
    of a SAM trained much longer than this one.
    """
    return LOGIT_GAIN if ".layers.2." in name and "output_hypernetworks_mlps" in name else 1.0


def exported(state: dict) -> dict:
    """Weights for inference: fp16 except the positional frequencies, with `gain`."""
    return {
        name: value if "gaussian_matrix" in name else (value * gain(name)).half()
        for name, value in state.items()
    }


def load_exported(model: nn.Module, state: dict) -> None:
    model.load_state_dict({name: value.float() / gain(name) for name, value in state.items()})


def save(path: Path, content: dict) -> None:
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def begin(start: Path | None) -> dict:
    """Networks and optimizer of a new training, by name. "ema" is the average of the weights, which
    is exported. start: weights to begin with.
    """
    torch.manual_seed(SEED)
    sam = build_sam_tiny()
    initialise(sam)
    if start:
        load_exported(sam, read_checkpoint(start))
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
    counts = {phase["style"]: phase["images"]}
    if rows:
        drawings = max(1, round(phase["images"] / 4))
        counts = {phase["style"]: drawings, "photographs": phase["images"] - drawings}
    # Linear warm-up from the recipe's first step, constant, linear decay to the phase's end.
    warmup = (step - recipe["phases"][0]["from_step"] + 1) / recipe["warmup"]
    decay = max(0.0, (phase["steps"] - step) / phase["decay_steps"])
    for group in optimizer.param_groups:
        group["lr"] = phase["lr"] * min(1.0, warmup, decay)
    optimizer.zero_grad(set_to_none=True)
    for kind, count in counts.items():
        images, prompts, known, dense, anchors = make_batch(kind, rows, step, count)
        balance = max(0.0, 1 - step / 2500)  # from balanced cross-entropy to plain
        with torch.autocast("cpu", torch.bfloat16, enabled=phase["bf16"]):
            embedding = embedded(sam, images.permute(0, 3, 1, 2).float())
            loss = mask_loss(sam, embedding, prompts, known, balance)
            loss = loss + auxiliary_loss(head, embedding, dense, anchors)
        (loss * count / phase["images"]).backward()
    parameters = [*sam.parameters(), *head.parameters()]
    nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    optimizer.step()
    kept = min(0.998 if step < 4790 else 0.99, (step + 1) / (step + 9))  # the last ninth at first
    with torch.no_grad():
        for average, weight in zip(parts["ema"].parameters(), sam.parameters()):
            average.lerp_(weight, 1 - kept)


def photographs(root: Path) -> tuple[tuple[Path, Path], ...]:
    """(image, label) of CamVid's day drives, after a check of all."""
    path = CAMVID / "sam_train.txt"
    rows = read_list(path)
    check_pairs(root, rows, path, CAMVID_CLASSES.count, same_size=True)
    return tuple((root / image, root / label) for image, label in rows)


def main(argv=None) -> None:
    """All phases, then the IoU head; a checkpoint every 100 steps. Writes the weights, for
    inference, and the record beside them.

    Of its "recipe": warmup, steps; iou_scenes, of each kind, that the IoU head is fitted to;
    phases: from_step, the first; style of the drawings; images a step; lr, which decays to zero
    over `decay_steps` steps up to step `steps`; bf16. The last phase ends at step `end`.
    """
    options = parse_options(Options, __doc__, argv)
    weights, work = WEIGHTS[TYPES[options.pictures]], options.work / options.pictures
    record, checkpoint = weights.with_suffix(".json"), work / "checkpoint.pth"
    recipe = read_json(record)["recipe"]
    torch.set_num_threads(recipe["threads"])
    tune_cpu()
    rows = photographs(options.root_path) if options.pictures == "photographs" else ()
    with Outputs(work):
        parts = begin(WEIGHTS["tiny"] if rows else None)
        done, end = recipe["phases"][0]["from_step"], recipe["end"]
        if checkpoint.is_file():
            state = read_checkpoint(checkpoint)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            done = state["step"]
        for step in progress(range(done, end), options.pictures, unit="step"):
            train_step(parts, recipe, step, rows)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
                state = {name: part.state_dict() for name, part in parts.items()}
                save(checkpoint, state | {"step": step + 1})
        sam = parts["ema"]
        load_exported(sam, exported(sam.state_dict()))  # as rounded
        refit(sam, recipe["iou_scenes"], rows)
        save(weights, exported(sam.state_dict()))
    training = manifest(vars(options) | {"seed": SEED}) | {"step": end}
    write_json(record, {"recipe": recipe, "training": training})
    print(f"{weights}: step {end}")


if __name__ == "__main__":
    sys.exit(run_main(main))
