"""What PSA asks of a promptable segmenter, and all of it that is not the network.

`Segmenter` is the one interface: `set_image`, then `proposals` and `predict`. A backend supplies
the network (model/sam_fast.py, model/sam.py).

Pixels of an image are (x, y) with (0, 0) at the upper left. H x W is the image's size, h x w that
of the low-resolution masks, P counts prompts, k points of a prompt, M masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
)
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops.boxes import batched_nms

from util.outputs import atomic_path
from util.run import UserError

MASK_THRESHOLD = 0.0  # logits above it are the mask
STABILITY_OFFSET = 1.0  # in logits, segment_anything's

# A proposal: its mask (bool, inside its box) and the box x0 y0 x1 y1, inclusive.
ProposalMask = tuple[Tensor, tuple[int, int, int, int]]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class ProposalSettings:
    """Of an automatic mask generator. The defaults are segment_anything's, which SeCo uses."""

    points_per_side: int = 32
    predicted_iou: float = 0.88  # proposals at or below it are rejected
    stability: float = 0.95  # proposals below it are rejected
    box_nms: float = 0.7  # IoU of boxes


class Segmenter:
    """One network and the image it has encoded.

    device: of all tensors that come out. prompt_batch: prompts decoded at a time (default: 4 on a
    CPU, whose caches like few, 64 on a GPU), halved for good when memory runs out. amp: compute in
    bf16; may be set anew before `set_image`. `files`: what `load_segmenter` made it from.
    """

    files: list[Path]

    def __init__(
        self,
        device: torch.device,
        prompt_batch: int | None = None,
        amp: bool = False,
        settings: ProposalSettings | None = None,
    ):
        self.device, self.amp, self.settings = device, amp, settings or ProposalSettings()
        self.prompt_batch = prompt_batch or (64 if device.type == "cuda" else 4)
        self.size: Size = (0, 0)  # of the image
        self._map = map
        if device.type == "cpu" and torch.get_num_threads() > 1:
            one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
            self._map = ThreadPoolExecutor(torch.get_num_threads(), **one_core).map

    # ------------------------------------------------------------------------- what a backend gives

    def encode(self, image: np.ndarray) -> None:
        """Keep what `decode` needs of an image, uint8 H x W x 3, RGB, whose `size` is set; set
        `input_size`, that of the image in the network's input.
        """

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool, above: float = -np.inf
    ) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        """A function that decodes the prompts start .. stop - 1: low-resolution logits, float32
        M x h x w, of their masks whose predicted IoU is `above`, and that IoU, float32 M.

        Args:
            points: P x k x 2, all positive, in pixels of the network's input.
            boxes: P x 4, x0 y0 x1 y1, in the same pixels, or None.
            several: the three masks of an ambiguous prompt, else the one mask.
            above: masks of this predicted IoU or less are left out.
        """

    def enlargement(self, height: int, width: int) -> list[tuple[Size, Size]]:
        """How low-resolution masks of this size come to the image's: steps of a size to enlarge to
        (bilinear) and the size of the upper left part that is kept.
        """

    # ------------------------------------------------------------------------------- what PSA calls

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encode an image, uint8 H x W x 3, RGB. `proposals` and `predict` are about it."""
        self.size = image.shape[:2]
        self.encode(image)

    def proposals(self) -> Iterator[ProposalMask]:
        """Automatic masks of the image in descending predicted IoU, on the device, made at full
        size few at a time.
        """
        return self._at_full_size(*self.find_proposals()[:2])

    @torch.inference_mode()
    def _at_full_size(self, low: Tensor, boxes: Tensor) -> Iterator[ProposalMask]:
        for some, their_boxes in zip(low.split(self.prompt_batch), boxes.split(self.prompt_batch)):
            masks = self.full_size(some) > MASK_THRESHOLD
            for mask, (x0, y0, x1, y1) in zip(masks, their_boxes.tolist()):
                yield mask[y0 : y1 + 1, x0 : x1 + 1], (x0, y0, x1, y1)

    @torch.inference_mode()
    def predict(self, boxes: np.ndarray, points: list[np.ndarray]) -> Tensor:
        """One mask per prompt (single-mask output): bool P x H x W on the device.

        boxes: P x 4, x0 y0 x1 y1; points: P arrays k x 2 of positive points, x y; both in pixels of
        the image. Prompts with the same number of points are decoded together.
        """
        result = torch.zeros(len(boxes), *self.size, dtype=torch.bool, device=self.device)
        counts = np.array([len(p) for p in points])
        tensor = lambda x: torch.as_tensor(x, dtype=torch.float, device=self.device)
        for count in np.unique(counts):
            chosen = np.flatnonzero(counts == count)
            coords = self.to_input(np.stack([points[i] for i in chosen]))
            corners = self.to_input(boxes[chosen].reshape(-1, 2, 2))
            decode = self.decode(tensor(coords), tensor(corners.reshape(-1, 4)), several=False)

            def masks(start: int, stop: int) -> Tensor:
                return self.full_size(decode(start, stop)[0]) > MASK_THRESHOLD

            batches = self._in_batches(masks, len(chosen))
            result[torch.as_tensor(chosen, device=self.device)] = torch.cat(batches)
        return result

    # ------------------------------------------------------------------------- shared by all models

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """Points ... x 2 (x, y), from the image's pixels to those of the network's input."""
        (height, width), (rows, columns) = self.size, self.input_size
        return points * np.array([columns / width, rows / height])

    def autocast(self) -> torch.autocast:
        """In bf16 with `amp`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    @torch.inference_mode()
    def find_proposals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The proposals of the image at low resolution, where those of a street scene are not
        gigabytes: logits M x h x w, boxes int64 M x 4 in pixels of the image (x0 y0 x1 y1,
        inclusive) and predicted IoU M, which descends.

        The order and the tests are segment_anything's generator's. Its test for boxes at the edge
        of a crop is left out: the only crop is the image, where it never fires.
        """
        settings, device = self.settings, self.device
        grid = build_point_grid(settings.points_per_side) * np.array(self.size)[None, ::-1]
        points = torch.as_tensor(self.to_input(grid), device=device)[:, None]
        decode = self.decode(points, None, several=True, above=settings.predicted_iou)

        def good_masks(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
            """Those that pass both tests: their logits, boxes and predicted IoU."""
            low, iou = decode(start, stop)
            stable, boxes = self._stable(low)
            return low[stable], boxes, iou[stable]

        batches = self._in_batches(good_masks, len(points))
        low, boxes, iou = (torch.cat(part) for part in zip(*batches))
        one_class = torch.zeros(len(boxes), device=device)
        keep = batched_nms(boxes.float(), iou, one_class, settings.box_nms)
        return low[keep], boxes[keep], iou[keep]

    @torch.inference_mode()
    def full_size(self, low: Tensor) -> Tensor:
        """Low-resolution logits M x h x w → logits M x H x W at the image's size."""
        masks = low[:, None]
        for size, (rows, columns) in self.enlargement(*low.shape[-2:]):
            masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
            masks = masks[..., :rows, :columns]
        return masks[:, 0]

    def _in_batches(self, function: Callable[[int, int], Any], count: int) -> list:
        """`function(start, stop)` over 0..count in prompt batches; on out-of-memory the batch is
        halved, for good. On a CPU as many batches are decoded side by side as there are cores, one
        core each: the matrices of a batch are too small to keep several cores busy.
        """
        results, start = [], 0
        while start < count:
            starts = range(start, count, self.prompt_batch)
            stops = (min(begin + self.prompt_batch, count) for begin in starts)
            try:
                for result in self._map(torch.inference_mode()(function), starts, stops):
                    results.append(result)
                    start += self.prompt_batch
            except torch.OutOfMemoryError:
                if self.prompt_batch == 1:
                    raise
                self.prompt_batch = self.prompt_batch // 2
                torch.cuda.empty_cache()
        return results

    def _stable(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Which of M low-resolution masks are stable at full size, bool M, and the boxes of those,
        int64 x 4.
        """
        if self.device.type == "cpu":
            return self._stable_on_cpu(low)
        logits = self.full_size(low)
        score = calculate_stability_score(logits, MASK_THRESHOLD, STABILITY_OFFSET)
        stable = score >= self.settings.stability
        return stable, batched_mask_to_box(logits[stable] > MASK_THRESHOLD).long()

    def _stable_on_cpu(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """As `_stable`, one mask at a time, so that it stays in the cache; OpenCV enlarges and
        numpy counts several times faster than torch on a CPU. OpenCV rounds other last bits: a
        score may change by a pixel on its threshold.
        """
        threshold, offset = np.float32(MASK_THRESHOLD), np.float32(STABILITY_OFFSET)
        stable, boxes = torch.zeros(len(low), dtype=torch.bool), []
        steps = self.enlargement(*low.shape[-2:])
        for number, logits in enumerate(low.contiguous().numpy()):
            for size, (rows, columns) in steps:
                logits = cv2.resize(logits, size[::-1], interpolation=cv2.INTER_LINEAR)
                logits = logits[:rows, :columns]
            least = np.count_nonzero(logits > threshold + offset)
            most = np.count_nonzero(logits > threshold - offset)
            if most and np.float32(least) / np.float32(most) >= self.settings.stability:
                stable[number] = True
                inside = logits > threshold
                ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
                boxes.append([xs[0], ys[0], xs[-1], ys[-1]] if ys.size else [0] * 4)
        return stable, torch.tensor(boxes, dtype=torch.long).reshape(-1, 4)


# ------------------------------------------------------------------------------- proposals as files


def save_proposals(path: Path, masks: list[ProposalMask]) -> None:
    """The masks to a file, as bits, compressed: a few hundred kilobytes at 2048x1024."""
    boxes = np.array([box for _, box in masks], dtype=np.int32).reshape(-1, 4)
    flat = [mask.cpu().numpy().ravel() for mask, _ in masks]
    bits = np.packbits(np.concatenate(flat or [np.zeros(0, bool)]))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, boxes=boxes, bits=bits)


def load_proposals(path: Path, device: torch.device) -> list[ProposalMask]:
    """What `save_proposals` wrote."""
    try:
        with np.load(path) as file:
            boxes, bits = file["boxes"].tolist(), np.unpackbits(file["bits"]).astype(bool)
    except Exception as error:  # of numpy, zipfile and zlib
        raise UserError(f"{path}: no whole mask proposals ({error}); remove the file") from None
    masks, start = [], 0
    for x0, y0, x1, y1 in boxes:
        height, width = y1 - y0 + 1, x1 - x0 + 1
        mask = torch.from_numpy(bits[start : start + height * width].reshape(height, width))
        masks.append((mask.to(device), (x0, y0, x1, y1)))
        start += height * width
    return masks
