"""A segmenter of segment_anything's architecture, without the work whose results are thrown away.

`FastSam` gives what `SamAutomaticMaskGenerator.generate` (no crops) and `SamPredictor.predict`
give, for any `Sam` of segment_anything or mobile_sam. The image is encoded once. The image side of
the decoder's first layer is computed once for all prompts. The IoU head decides before the
upscaling layers run, so that a rejected proposal is never upscaled. Only the tokens and rows that
show the image, not its padding, are upscaled. Masks stay on the device until they are painted, and
nothing is run-length encoded. A CPU's cores decode different prompts. The differences to the
package are those of floating-point summation order: tests/oracle_psa.py is the oracle.

Needs when copied away: model/{segmenter,sam_decoder,sam_tiny}.py, util/{outputs,run}.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from model.sam_decoder import (
    attend_to_image,
    attend_to_tokens,
    conv_transpose_per_token,
    tokens_to_pixels,
)
from model.sam_tiny import TinyMaskDecoder, TinyPromptEncoder, occupied_extent
from model.segmenter import SAM_SETTINGS, LowMasks, ProposalSettings, Segmenter
from util.run import Stopwatch


class FastSam(Segmenter):
    """One SAM and the image it has encoded (see `Segmenter`)."""

    def __init__(
        self,
        sam: Sam,
        settings: ProposalSettings = SAM_SETTINGS,
        prompt_batch: int | None = None,
        amp: bool = False,
        watch: Stopwatch | None = None,
    ):
        super().__init__(sam.device, settings, prompt_batch, amp, watch)
        self.sam, self.mask_threshold = sam, sam.mask_threshold
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)

    @cached_property
    def _bf16_decoder(self) -> MaskDecoder:
        return copy.deepcopy(self.sam.mask_decoder).bfloat16()

    def encode(self, image: np.ndarray) -> None:
        """See `Segmenter.encode`.

        In bf16 the image encoder runs under autocast, the decoder's transformer and upscaling with
        bf16 weights (autocast would go back and forth at every normalisation); the small heads that
        judge and make the masks stay in fp32.
        """
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
        self.decoder = self._bf16_decoder if self.amp else self.sam.mask_decoder
        self.image_tokens = self._as_tokens(embedding).to(dtype)
        self.pe = self._as_tokens(self.sam.prompt_encoder.get_dense_pe()).to(dtype)
        # Image pixels, of SAM's resized and padded square, that one low-resolution mask pixel
        # covers.
        self.pixels_per_cell = self.sam.image_encoder.img_size // (4 * embedding.shape[-1])

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """See `Segmenter.to_input`."""
        return self.transform.apply_coords(points, self.size)

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool
    ) -> Callable[[int, int], tuple[Tensor, LowMasks]]:
        """See `Segmenter.decode`. Masks that nobody asks for are never upscaled."""
        outputs = slice(1, None) if several else slice(0, 1)
        grid_drawn = self._grid_drawn(points) if boxes is None else None

        def decoded(start: int, stop: int) -> tuple[Tensor, LowMasks]:
            point, box = points[start:stop], None if boxes is None else boxes[start:stop]
            drawn = grid_drawn(start, stop) if grid_drawn else self._drawn(point, box)
            queries, keys = self._transformer(point, box, drawn)
            iou = self.sam.mask_decoder.iou_prediction_head(queries[:, 0])[:, outputs]

            def low_masks(kept: Tensor | None) -> Tensor:
                if kept is None:
                    return self._low_masks(queries, keys, outputs).flatten(0, 1)
                prompts = kept.any(dim=1)
                if prompts.all():
                    return self._low_masks(queries, keys, outputs)[kept]
                return self._low_masks(queries[prompts], keys[prompts], outputs)[kept[prompts]]

            return iou, low_masks

        return decoded

    def enlargement(self, height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """See `Segmenter.enlargement`; as `Sam.postprocess_masks` does: first to SAM's padded
        input, then to the image.
        """
        size = height * self.pixels_per_cell, width * self.pixels_per_cell
        second = [(self.size, self.size)] if self.input_size != self.size else []
        return [(size, self.input_size), *second]

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
