"""PSA written as plainly as possible: one prompt at a time on segment_anything's own predictor and
mask generator.

Slow and obvious; tests compare seco_sam.py with it pixel by pixel, scripts/dev/bench.py
measures against it. It shares no code with the fast path but the constants' values, which are
written out again; of the tiny SAM it shares the network's parts.
"""

from __future__ import annotations

import contextlib
import copy
import math

import cv2
import numpy as np
import pyclipper
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch.nn import functional as F

from model.sam_fast import TinyPromptEncoder

IGNORE = 255


def for_the_package(sam):
    """The tiny SAM as a copy that the package's predictor can use, which deals in padded squares;
    any other as it is.
    """
    if not isinstance(sam.prompt_encoder, TinyPromptEncoder):
        return sam
    sam = copy.deepcopy(sam)
    encoder, prompts, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    embed, prompted, decoded = encoder.forward, prompts.forward, decoder.predict_masks
    side = prompts.image_embedding_size[0]

    def extent(x):  # of what is no padding: no pixel and no token is zero
        shown = (x != 0).any(dim=1)[0]
        return int(shown.any(dim=1).sum()), int(shown.any(dim=0).sum())

    def encode(x):
        height, width = (-(-pixels // 32) * 32 for pixels in extent(x))
        y = embed(x[..., :height, :width])
        return F.pad(y, (0, side - y.shape[3], 0, side - y.shape[2]))

    def encode_prompts(points, boxes, masks):
        sparse, dense = prompted(points, boxes, masks)
        boxes = None if boxes is None else boxes.reshape(-1, 4)
        drawn = prompts.draw(points[0], boxes, side, side)
        return sparse, dense + drawn.transpose(1, 2).unflatten(2, (side, side))

    def predict_masks(image_embeddings, image_pe, **prompt_embeddings):
        sparse, dense = prompt_embeddings.values()
        h, w = extent(image_embeddings)
        image, pe, dense = (x[..., :h, :w] for x in (image_embeddings, image_pe, dense))
        masks, iou = decoded(image, pe, sparse, dense)
        return F.pad(masks, (0, 4 * (side - w), 0, 4 * (side - h)), mode="replicate"), iou

    encoder.forward, prompts.forward, decoder.predict_masks = encode, encode_prompts, predict_masks
    return sam


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components of a mask as full-size masks, in raster order of their first
    pixel.
    """
    count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    found = [numbers == k for k in range(1, count)]
    return sorted(found, key=lambda m: int(np.flatnonzero(m)[0]))


def entropy_at(label: np.ndarray, row: int, column: int) -> float:
    """Entropy of the class histogram in the 17 x 17 window, 255 being one more class, outside the
    image nothing.
    """
    window = label[max(row - 8, 0) : row + 9, max(column - 8, 0) : column + 9]
    _, counts = np.unique(window, return_counts=True)
    shares = counts / window.size
    return round(float(-sum(p * math.log(p + 1e-6) for p in shares)), 12)


def release_box(mask: np.ndarray):
    """x0 y0 x1 y1, or None: Clipper's offset of the minimum-area rectangle, step by step."""
    height, width = mask.shape
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    corners = [(float(x), float(y)) for x, y in cv2.boxPoints(cv2.minAreaRect(largest))]
    corners.sort(key=lambda corner: corner[0])
    left, right = sorted(corners[:2], key=lambda c: c[1]), sorted(corners[2:], key=lambda c: c[1])
    around = [left[0], right[0], right[1], left[1]]
    area = perimeter = 0.0
    for (x, y), (next_x, next_y) in zip(around, around[1:] + around[:1]):
        area += (x * next_y - next_x * y) / 2
        perimeter += math.hypot(next_x - x, next_y - y)
    clipper = pyclipper.PyclipperOffset()
    whole = [(int(x), int(y)) for x, y in around]
    clipper.AddPath(whole, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    vertices = [v for path in clipper.Execute(1.25 * abs(area) / perimeter) for v in path]
    if not vertices:
        return None
    xs = [min(max(x, 0), width - 1) for x, _ in vertices]
    ys = [min(max(y, 0), height - 1) for _, y in vertices]
    return np.array([min(xs), min(ys), max(xs), max(ys)], dtype=float)


def release_prompt(label: np.ndarray, mask: np.ndarray):
    """(box, points) or None."""
    box = release_box(mask)
    if box is None:
        return None
    pixels = np.argwhere(mask)
    half = len(pixels) // 2
    halves = [pixels[: half + 1]] + ([pixels[half + 1 :]] if len(pixels) % 2 else [])
    points = []
    for part in halves:
        best = None
        for row, column in part:
            value = entropy_at(label, row, column)
            if best is None or value < best[0]:
                best = (value, column, row)
        points.append(best[1:])
    return box, np.array(points, dtype=float)


def paper_prompt(label: np.ndarray, mask: np.ndarray):
    height, width = label.shape
    rows, columns = np.nonzero(mask)
    w, h = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
    more_x, more_y = w * (math.sqrt(1.5) - 1) / 2, h * (math.sqrt(1.5) - 1) / 2
    box = [
        max(columns.min() - more_x, 0),
        max(rows.min() - more_y, 0),
        min(columns.max() + more_x, width - 1),
        min(rows.max() + more_y, height - 1),
    ]
    return np.array(box), np.array([[columns.mean(), rows.mean()]])


def paint(painted: np.ndarray, mask: np.ndarray, class_id: int, recipe: str) -> None:
    if recipe == "paper":
        taken = (painted != IGNORE) & mask
        if taken.sum() > 0.5 * mask.sum():
            return
        mask = mask & ~taken
    painted[mask] = class_id


def official(settings) -> dict:
    """A model.segmenter.ProposalSettings as keyword arguments of the mask generator."""
    return dict(
        points_per_side=settings.points_per_side,
        pred_iou_thresh=settings.predicted_iou,
        stability_score_thresh=settings.stability,
        box_nms_thresh=settings.box_nms,
    )


def oracle_psa(
    image: np.ndarray,
    label: np.ndarray,
    sam,
    stuff,
    things,
    recipe: str,
    settings,
    watch=lambda stage: contextlib.nullcontext(),
) -> np.ndarray:
    """The aggregated label map. settings: as of `official`. watch: times the stages, `with
    watch(name)`.
    """
    sam = for_the_package(sam)
    generator = SamAutomaticMaskGenerator(sam, **official(settings))
    over_stuff, over_things = np.full_like(label, IGNORE), np.full_like(label, IGNORE)
    with watch("proposals, encoding included"):
        proposals = generator.generate(image)
    for proposal in proposals:
        mask = proposal["segmentation"]
        labeled = label[mask & (label != IGNORE)]
        if len(labeled) == 0:
            continue
        shares = {c: float((labeled == c).sum()) / len(labeled) for c in [*stuff, *things]}
        if recipe == "paper":
            best = min(shares, key=lambda c: (-shares[c], c))
            if best in stuff:
                paint(over_stuff, mask, best, recipe)
        else:
            best = min(stuff, key=lambda c: (-shares[c], c))
            if shares[best] > 0.20:
                paint(over_stuff, mask, best, recipe)
    predictor = SamPredictor(sam)
    with watch("encode again"):
        predictor.set_image(image)
    for class_id in sorted(things):
        if (label == class_id).sum() <= 10:
            continue
        for mask in components(label == class_id):
            if mask.sum() < 10:
                continue
            with watch("make prompts"):
                prompt = (release_prompt if recipe == "release" else paper_prompt)(label, mask)
            if prompt is None:
                continue
            box, points = prompt
            with torch.no_grad(), watch("prompts"):
                masks, _, _ = predictor.predict(
                    point_coords=points,
                    point_labels=np.ones(len(points)),
                    box=box,
                    multimask_output=False,
                )
            paint(over_things, masks[0], class_id, recipe)
    return np.where(over_things != IGNORE, over_things, over_stuff)
