"""Many prompts on one image with SAM, without the work whose results are thrown away.

`FastSam` gives what segment_anything's `SamAutomaticMaskGenerator.generate` (no crops) and
`SamPredictor.predict` give, for any `Sam`: the image is encoded once; the image side of the
decoder's first layer is computed once for all prompts; the IoU head decides before the upscaling
layers run, so that a rejected proposal is never upscaled; only the tokens and rows that show the
image, not its padding, are upscaled; masks stay on the device until they are painted; nothing is
run-length encoded; a CPU's cores decode different prompts. The differences to the package are those
of floating-point summation order: tests/oracle_psa.py is the oracle.

Needs: model/sam.py, util/run.py, segment_anything.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from segment_anything.modeling import PromptEncoder, Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops.boxes import batched_nms

from model.sam import (
    TinyMaskDecoder,
    TinyPromptEncoder,
    attend_to_image,
    attend_to_tokens,
    conv_transpose_per_token,
    occupied_extent,
    tokens_to_pixels,
)
from util.run import Stopwatch

FULL_SIZE_PIXELS = 1 << 28  # of masks that a GPU looks at together at the image's size


@dataclass(frozen=True)
class ProposalSettings:
    """The automatic mask generator's official settings (segment_anything; SeCo uses them
    unchanged).
    """

    points_per_side: int = 32
    predicted_iou: float = 0.88  # proposals at or below it are rejected
    stability: float = 0.95  # proposals below it are rejected
    stability_offset: float = 1.0  # in logits
    box_nms: float = 0.7  # IoU of boxes


@dataclass(frozen=True)
class Proposals:
    """low: mask logits M x h x w at low resolution (full-size masks of a street scene would be
    gigabytes; `FastSam.masks` gives them), in descending predicted IoU; boxes: int64 M x 4, x0 y0
    x1 y1, inclusive; predicted_iou: M.
    """

    low: Tensor
    boxes: Tensor
    predicted_iou: Tensor


def default_prompt_batch(device: torch.device) -> int:
    """Prompts decoded at a time: a CPU's caches like few, a GPU wants many."""
    return 64 if device.type == "cuda" else 4


class FastSam:
    """One SAM and the image it has encoded. `set_image` first, then `proposals` and `predict`."""

    def __init__(
        self,
        sam: Sam,
        settings: ProposalSettings = ProposalSettings(),
        prompt_batch: int | None = None,
        amp: bool = False,
        watch: Stopwatch | None = None,
    ):
        self.sam, self.settings, self.amp = sam, settings, amp
        self.device = sam.device
        # bf16: the image encoder by autocast, transformer and upscaling by bf16 weights (autocast
        # would go back and forth at every normalisation); the small heads that judge and make the
        # masks stay in fp32.
        self.decoder = copy.deepcopy(sam.mask_decoder).bfloat16() if amp else sam.mask_decoder
        self.prompt_batch = prompt_batch or default_prompt_batch(self.device)
        self.watch = watch or Stopwatch()
        self.threads, self._map = 1, map
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            self.threads = torch.get_num_threads()
            self._map = ThreadPoolExecutor(
                self.threads, initializer=torch.set_num_threads, initargs=(1,)
            ).map
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encode an image, uint8 H x W x 3, RGB."""
        self.size = image.shape[:2]
        resized = torch.as_tensor(self.transform.apply_image(image), device=self.device)
        self.input_size = tuple(resized.shape[:2])
        padded = self.sam.preprocess(resized.permute(2, 0, 1)[None].contiguous())
        with (
            self.watch("encode"),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp),
        ):
            embedding = self.sam.image_encoder(padded).float()
        # A decoder that knows which tokens are padding takes no notice of them (the tiny one).
        self.tokens = embedding.shape[-2:]
        if isinstance(self.sam.mask_decoder, TinyMaskDecoder):
            self.tokens = occupied_extent(embedding)
        # No prompt is a mask: the dense embedding that stands for "no mask" is added to the image
        # once.
        embedding = embedding + self.sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dtype = torch.bfloat16 if self.amp else torch.float
        self.image_tokens = self._as_tokens(embedding).to(dtype)
        self.pe = self._as_tokens(self.sam.prompt_encoder.get_dense_pe()).to(dtype)
        # Image pixels, of SAM's resized and padded square, that one low-resolution mask pixel
        # covers.
        self.pixels_per_cell = self.sam.image_encoder.img_size // (4 * embedding.shape[-1])

    def _as_tokens(self, x: Tensor) -> Tensor:
        """B x C x S x S over SAM's square → 1 x B x N x C, the tokens that show the image."""
        rows, columns = self.tokens
        return x[..., :rows, :columns].flatten(2).transpose(1, 2)[None]

    def _drawn(self, points: Tensor, boxes: Tensor | None) -> Tensor | None:
        """What the tiny SAM draws on the image tokens for each prompt, P x N x C; None for the
        official SAMs.
        """
        encoder = self.sam.prompt_encoder
        if not isinstance(encoder, TinyPromptEncoder):
            return None
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        return encoder.prompt_map(encoder.draw_prompts((points, labels), boxes, *self.tokens))

    def _grid_drawn(self, points: Tensor):
        """As `_drawn` for single points P x 1 x 2 without boxes: a function of the range start,
        stop of them.
        """
        if not isinstance(self.sam.prompt_encoder, TinyPromptEncoder):
            return lambda start, stop: None
        table, index = self.sam.prompt_encoder.single_points(points[:, 0], *self.tokens)
        table = table.to(self.pe.dtype)
        return lambda start, stop: table[index[start:stop]]

    def _transformer(
        self, points: Tensor, boxes: Tensor | None, drawn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The two-way transformer: points P x k x 2 (positive) and boxes P x 4 or None, in SAM's
        input pixels, and what is drawn for them → output tokens P x (1 + masks + T) x C and image
        tokens P x N x C.
        """
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        sparse, _ = PromptEncoder.forward(self.sam.prompt_encoder, (points, labels), boxes, None)
        keys, decoder = self.image_tokens, self.decoder
        if drawn is not None:
            keys = keys + drawn[None].to(keys.dtype)
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output.expand(len(sparse), -1, -1), sparse.to(keys.dtype)], dim=1)[
            None
        ]  # 1 x P x T x C
        queries = tokens
        for layer in decoder.transformer.layers:
            flat, flat_pe = queries[0], tokens[0]
            if layer.skip_first_layer_pe:
                flat = layer.self_attn(q=flat, k=flat, v=flat)
            else:
                flat = flat + layer.self_attn(q=flat + flat_pe, k=flat + flat_pe, v=flat)
            queries = layer.norm1(flat)[None]
            keys_pe = keys + self.pe
            queries = layer.norm2(
                queries
                + attend_to_image(layer.cross_attn_token_to_image, queries + tokens, keys_pe, keys)
            )
            queries = layer.norm3(queries + layer.mlp(queries))
            keys = layer.norm4(
                attend_to_tokens(
                    layer.cross_attn_image_to_token, keys_pe, queries + tokens, queries, keys
                )
            )
        attended = attend_to_image(
            decoder.transformer.final_attn_token_to_image, queries + tokens, keys + self.pe, keys
        )
        return decoder.transformer.norm_final_attn(queries + attended)[0].float(), keys[0]

    def _low_masks(self, queries: Tensor, keys: Tensor, outputs: slice) -> Tensor:
        """What `_transformer` gives for P prompts → low-resolution logits P x M x h x w of the M
        mask `outputs`, of the part that shows the image: ceil(input / pixels_per_cell) + 1 cells,
        as many as bilinear enlargement looks at.
        """
        cells = [
            min(4 * have, -(-size // self.pixels_per_cell) + 1)
            for size, have in zip(self.input_size, self.tokens)
        ]
        rows, columns = (-(-count // 4) for count in cells)
        prompts, _, width = keys.shape
        keys = keys.view(prompts, *self.tokens, width)[:, :rows, :columns]
        conv1, norm, activation, conv2, _ = self.decoder.output_upscaling
        x = conv_transpose_per_token(conv1, keys)  # P x r x c x 4 x C/4
        x = activation(F.layer_norm(x, (width // 4,), norm.weight, norm.bias, norm.eps))
        x = activation(conv_transpose_per_token(conv2, x)).flatten(1, 4)  # P x r*c*16 x C/8
        heads = list(self.sam.mask_decoder.output_hypernetworks_mlps)[outputs]
        tokens = queries[:, 1 : 1 + self.sam.mask_decoder.num_mask_tokens][:, outputs]
        hyper = torch.stack(
            [head(tokens[:, i]) for i, head in enumerate(heads)], dim=1
        )  # P x M x C/8
        # The few masks are put in pixel order, not the many channels of the embedding.
        low = tokens_to_pixels(hyper.to(x.dtype) @ x.transpose(1, 2), rows, columns)
        return low[..., : cells[0], : cells[1]].float()

    def _full_size(self, low: Tensor) -> Tensor:
        """Low-resolution logits M x h x w → logits M x H x W at the image's size, as
        `Sam.postprocess_masks` does: first to SAM's input size, then to the image's.
        """
        size = tuple(side * self.pixels_per_cell for side in low.shape[-2:])
        masks = F.interpolate(low[:, None], size, mode="bilinear", align_corners=False)
        masks = masks[..., : self.input_size[0], : self.input_size[1]]
        if self.input_size != self.size:
            masks = F.interpolate(masks, self.size, mode="bilinear", align_corners=False)
        return masks[:, 0]

    def _halving(self, decode, count: int) -> list:
        """`decode(start, stop)` over 0..count in prompt batches; on out-of-memory the batch is
        halved, for good.

        On a CPU as many batches are decoded side by side as there are cores, one core each: the
        matrices of a batch are too small to keep several cores busy.
        """
        results, start = [], 0
        while start < count:
            starts = range(start, count, self.prompt_batch)
            stops = (min(begin + self.prompt_batch, count) for begin in starts)
            try:
                for result in self._map(torch.inference_mode()(decode), starts, stops):
                    results.append(result)
                    start += self.prompt_batch
            except torch.OutOfMemoryError:
                if self.prompt_batch == 1:
                    raise
                self.prompt_batch = self.prompt_batch // 2
                torch.cuda.empty_cache()
        return results

    def _stable(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Which of M low-resolution masks are stable, bool M, and the boxes of those, int64 x 4;
        judged at full size, in portions that fit into memory.
        """
        if self.device.type == "cpu":
            return self._stable_on_cpu(low)
        threshold, settings = self.sam.mask_threshold, self.settings
        stable, boxes = [], []
        for part in low.split(max(1, FULL_SIZE_PIXELS // (self.size[0] * self.size[1]))):
            logits = self._full_size(part)
            stable.append(
                calculate_stability_score(logits, threshold, settings.stability_offset)
                >= settings.stability
            )
            boxes.append(batched_mask_to_box(logits[stable[-1]] > threshold).long())
        return torch.cat(stable), torch.cat(boxes)

    def _stable_on_cpu(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """As `_stable`, one mask at a time, so that it stays in the cache; OpenCV enlarges and
        numpy counts several times faster than torch does on a CPU. OpenCV rounds other last bits: a
        score may change by a pixel on its threshold.
        """
        threshold, settings = np.float32(self.sam.mask_threshold), self.settings
        stable, boxes = torch.zeros(len(low), dtype=torch.bool), []
        for number, mask in enumerate(low.contiguous().numpy()):
            rows, columns = (side * self.pixels_per_cell for side in mask.shape)
            logits = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_LINEAR)
            logits = logits[: self.input_size[0], : self.input_size[1]]
            if self.input_size != self.size:
                logits = cv2.resize(logits, self.size[::-1], interpolation=cv2.INTER_LINEAR)
            least = np.count_nonzero(logits > threshold + np.float32(settings.stability_offset))
            most = np.count_nonzero(logits > threshold - np.float32(settings.stability_offset))
            if most and np.float32(least) / np.float32(most) >= settings.stability:
                stable[number] = True
                inside = logits > threshold
                ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
                boxes.append([xs[0], ys[0], xs[-1], ys[-1]] if ys.size else [0] * 4)
        return stable, torch.tensor(boxes, dtype=torch.long).reshape(-1, 4)

    @torch.inference_mode()
    def proposals(self) -> Proposals:
        """SAM's automatic masks of the image, in the generator's order.

        The generator's test for boxes at the edge of a crop is left out: the only crop is the
        image, where it never fires.
        """
        settings = self.settings
        grid = build_point_grid(settings.points_per_side) * np.array(self.size)[None, ::-1]
        points = torch.as_tensor(self.transform.apply_coords(grid, self.size), device=self.device)[
            :, None
        ]
        drawn = self._grid_drawn(points)

        def decode(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor] | None:
            with self.watch("decode proposals", self.threads):
                queries, keys = self._transformer(points[start:stop], None, drawn(start, stop))
                iou = self.sam.mask_decoder.iou_prediction_head(queries[:, 0])[:, 1:]
                kept = iou > settings.predicted_iou
                prompts = kept.any(dim=1)
                if not prompts.any():
                    return None
            with self.watch("upscale and filter", self.threads):
                if not prompts.all():
                    queries, keys, iou, kept = (
                        queries[prompts],
                        keys[prompts],
                        iou[prompts],
                        kept[prompts],
                    )
                low = self._low_masks(queries, keys, slice(1, None))[kept]
                stable, boxes = self._stable(low)
                return low[stable], boxes, iou[kept][stable]

        found = [part for part in self._halving(decode, len(points)) if part is not None]
        if not found:
            return Proposals(
                torch.zeros(0, 1, 1, device=self.device),
                torch.zeros(0, 4, dtype=torch.long, device=self.device),
                torch.zeros(0, device=self.device),
            )
        with self.watch("nms"):
            low, boxes, iou = (torch.cat(part) for part in zip(*found))
            keep = batched_nms(
                boxes.float(), iou, torch.zeros(len(boxes), device=self.device), settings.box_nms
            )
            return Proposals(low[keep], boxes[keep], iou[keep])

    @torch.inference_mode()
    def masks(self, low: Tensor) -> Tensor:
        """Low-resolution logits M x h x w → masks, bool M x H x W at the image's size."""
        return self._full_size(low) > self.sam.mask_threshold

    @torch.inference_mode()
    def predict(self, boxes: np.ndarray, points: list[np.ndarray]) -> Tensor:
        """One mask per prompt (single-mask output): bool P x H x W on the device.

        boxes: P x 4, x0 y0 x1 y1; points: P arrays k x 2 of positive points, x y; both in pixels of
        the image. Prompts with the same number of points are decoded together.
        """
        result = torch.zeros(len(boxes), *self.size, dtype=torch.bool, device=self.device)
        counts = np.array([len(p) for p in points])
        for count in np.unique(counts):
            chosen = np.flatnonzero(counts == count)
            coords = self.transform.apply_coords(
                np.stack([points[i] for i in chosen]).astype(np.float64), self.size
            )
            corners = self.transform.apply_boxes(boxes[chosen].astype(np.float64), self.size)
            coords, corners = (
                torch.as_tensor(x, dtype=torch.float, device=self.device) for x in (coords, corners)
            )

            def decode(start: int, stop: int) -> Tensor:
                part = coords[start:stop], corners[start:stop]
                queries, keys = self._transformer(*part, self._drawn(*part))
                return self.masks(self._low_masks(queries, keys, slice(0, 1))[:, 0])

            with self.watch("prompts"):
                masks = torch.cat(self._halving(decode, len(chosen)))
            result[torch.as_tensor(chosen, device=self.device)] = masks
        return result
