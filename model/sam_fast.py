"""A segmenter of segment_anything's architecture, without the work whose results are thrown away.

`FastSam` gives what `SamAutomaticMaskGenerator.generate` (no crops) and `SamPredictor.predict`
give, for any `Sam` of segment_anything or mobile_sam. The image is encoded once. The image side of
the decoder's first layer is computed once for all prompts. The IoU head decides before the
upscaling layers run, so that a rejected proposal is never upscaled. Only the tokens and rows that
show the image, not its padding, are upscaled. Masks stay on the device until they are painted, and
nothing is run-length encoded. A CPU's cores decode different prompts.

The package's mask decoder is computed with less work from the same parameters: projections of the
many image tokens are moved to the side of the few prompt tokens, and transposed convolutions of
kernel and stride 2 become linear layers per token. The differences to the package are those of
floating-point summation order: tests/oracle_psa.py is the oracle.

Axis letters: B images, K prompts, T prompt tokens, N image tokens, C channels, M masks; of one
image P prompts.

Needs when copied away: model/{segmenter,sam_tiny}.py, util/{outputs,run}.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from model.sam_tiny import TinyPromptEncoder, occupied_extent
from model.segmenter import SAM_SETTINGS, Decoded, ProposalSettings, Segmenter


class FastSam(Segmenter):
    """One SAM and the image it has encoded. options: of `Segmenter`."""

    def __init__(self, sam: Sam, settings: ProposalSettings = SAM_SETTINGS, **options):
        super().__init__(sam.device, settings, **options)
        self.sam, self.mask_threshold = sam, sam.mask_threshold
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)
        self.is_tiny = isinstance(sam.prompt_encoder, TinyPromptEncoder)

    @cached_property
    def _bf16_decoder(self) -> MaskDecoder:
        """Transformer and upscaling with bf16 weights (autocast would go back and forth at every
        normalisation); the small heads that judge and make the masks stay in fp32.
        """
        decoder = copy.deepcopy(self.sam.mask_decoder)
        for part in ("transformer", "output_upscaling", "iou_token", "mask_tokens"):
            getattr(decoder, part).bfloat16()
        return decoder

    def encode(self, image: np.ndarray) -> None:
        """See `Segmenter.encode`. In bf16 the image encoder runs under autocast."""
        resized = torch.as_tensor(self.transform.apply_image(image), device=self.device)
        self.input_size = tuple(resized.shape[:2])
        padded = self.sam.preprocess(resized.permute(2, 0, 1)[None].contiguous())
        with self.watch("encode"), self.autocast():
            embedding = self.sam.image_encoder(padded).float()
        # The tiny SAM knows which tokens are padding and takes no notice of them.
        self.tokens = occupied_extent(embedding) if self.is_tiny else embedding.shape[-2:]
        # No prompt is a mask: the dense embedding that stands for "no mask" is added to the image
        # once.
        embedding = embedding + self.sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dtype = torch.bfloat16 if self.amp else torch.float
        self.decoder = self._bf16_decoder if self.amp else self.sam.mask_decoder
        self.image_tokens = self._as_tokens(embedding).to(dtype)
        self.image_pe = self._as_tokens(self.sam.prompt_encoder.get_dense_pe()).to(dtype)
        # Image pixels, of SAM's resized and padded square, that one low-resolution mask pixel
        # covers.
        self.pixels_per_cell = self.sam.image_encoder.img_size // (4 * embedding.shape[-1])

    def _as_tokens(self, x: Tensor) -> Tensor:
        """1 x C x S x S over SAM's square → 1 x 1 x N x C, the tokens that show the image."""
        rows, columns = self.tokens
        return x[..., :rows, :columns].flatten(2).transpose(1, 2)[None]

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """See `Segmenter.to_input`."""
        return self.transform.apply_coords(points, self.size)

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool
    ) -> Callable[[int, int], Decoded]:
        """See `Segmenter.decode`. Masks that nobody asks for are never upscaled."""
        encoder = self.sam.prompt_encoder
        outputs = slice(1, None) if several else slice(0, 1)
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        if self.is_tiny and boxes is None:
            table, rows = encoder.draw_single_points(points[:, 0], *self.tokens)

        def decoded(start: int, stop: int) -> Decoded:
            part, keys = slice(start, stop), self.image_tokens
            prompts = (points[part], labels[part]), None if boxes is None else boxes[part]
            sparse, _ = PromptEncoder.forward(encoder, *prompts, None)
            if self.is_tiny:
                drawn = table[rows[part]] if boxes is None else encoder.draw(*prompts, *self.tokens)
                keys = keys + drawn[None].to(keys.dtype)
            sparse = sparse[None].to(keys.dtype)
            queries, keys = two_way_transformer(self.decoder, keys, self.image_pe, sparse)
            return DecodedTokens(self, queries[0].float(), keys[0], outputs)

        return decoded

    def low_masks(self, queries: Tensor, keys: Tensor, outputs: slice) -> Tensor:
        """Low-resolution logits P x M x h x w of the mask `outputs`, of the part that shows the
        image: ceil(input / pixels_per_cell) + 1 cells, as many as bilinear enlargement looks at.

        queries: output tokens P x T x C; keys: image tokens P x N x C.
        """
        height, width = (
            min(4 * tokens, -(-size // self.pixels_per_cell) + 1)
            for size, tokens in zip(self.input_size, self.tokens)
        )
        rows, columns = -(-height // 4), -(-width // 4)
        keys = keys.unflatten(1, self.tokens)[:, :rows, :columns]
        # The few masks are put in pixel order, not the many channels of the embedding.
        low = tokens_to_pixels(mask_logits(self.decoder, queries, keys, outputs), rows, columns)
        return low[..., :height, :width].float()

    def enlargement(self, height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """See `Segmenter.enlargement`; as `Sam.postprocess_masks` does: first to SAM's padded
        input, then to the image.
        """
        size = height * self.pixels_per_cell, width * self.pixels_per_cell
        second = [(self.size, self.size)] if self.input_size != self.size else []
        return [(size, self.input_size), *second]


class DecodedTokens(Decoded):
    """Prompts whose masks are upscaled when they are asked for (see `FastSam.low_masks`)."""

    def __init__(self, sam: FastSam, queries: Tensor, keys: Tensor, outputs: slice):
        self.iou = sam.decoder.iou_prediction_head(queries[:, 0])[:, outputs]
        self.sam, self.queries, self.keys, self.outputs = sam, queries, keys, outputs

    def masks(self, kept: Tensor | None = None) -> Tensor:
        """See `Decoded.masks`."""
        queries, keys = self.queries, self.keys
        if kept is not None and not (prompts := kept.any(dim=1)).all():
            queries, keys, kept = queries[prompts], keys[prompts], kept[prompts]
        low = self.sam.low_masks(queries, keys, self.outputs)
        return low.flatten(0, 1) if kept is None else low[kept]


# ----------------------------------------------------------------------------- SAM's mask decoder


def two_way_transformer(
    decoder: MaskDecoder, keys: Tensor, image_pe: Tensor, sparse: Tensor
) -> tuple[Tensor, Tensor]:
    """Output tokens [B, K, 1 + M + T, C], of the IoU, the masks and the prompts, and image tokens
    [B, K, N, C].

    Args:
        keys: image tokens with the dense prompt embeddings added, [B, K, N, C]; [B, 1, N, C] where
            those of all prompts are equal.
        image_pe: positional encoding of the image tokens, [1, 1, N, C].
        sparse: prompt embeddings [B, K, T, C].
    """
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([outputs.expand(*sparse.shape[:2], -1, -1), sparse], dim=2)
    queries = tokens
    for layer in decoder.transformer.layers:
        flat, flat_pe = queries.flatten(0, 1), tokens.flatten(0, 1)
        if layer.skip_first_layer_pe:
            flat = layer.self_attn(q=flat, k=flat, v=flat)
        else:
            flat = flat + layer.self_attn(q=flat + flat_pe, k=flat + flat_pe, v=flat)
        queries = layer.norm1(flat).view_as(tokens)
        keys_pe, to_image = keys + image_pe, layer.cross_attn_token_to_image
        queries = queries + attend_to_image(to_image, queries + tokens, keys_pe, keys)
        queries = layer.norm2(queries)
        queries = layer.norm3(queries + layer.mlp(queries))
        to_tokens = layer.cross_attn_image_to_token
        keys = layer.norm4(attend_to_tokens(to_tokens, keys_pe, queries + tokens, queries, keys))
    to_image = decoder.transformer.final_attn_token_to_image
    queries = queries + attend_to_image(to_image, queries + tokens, keys + image_pe, keys)
    return decoder.transformer.norm_final_attn(queries), keys


def mask_logits(decoder: MaskDecoder, queries: Tensor, keys: Tensor, outputs: slice) -> Tensor:
    """Logits [..., M, N*16], in token order (see `tokens_to_pixels`), of the mask `outputs`, from
    what `two_way_transformer` gives: output tokens [..., T, C] and image tokens [..., N, C], or
    some of them, [..., h, w, C].
    """
    conv1, norm, activation, conv2, _ = decoder.output_upscaling
    x = conv_transpose_per_token(conv1, keys)  # [..., N, 4, C/4]
    x = activation(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = activation(conv_transpose_per_token(conv2, x))  # [..., N, 4, 4, C/8]
    x = x.flatten(queries.dim() - 2, -2)  # [..., N*16, C/8]
    heads = list(enumerate(decoder.output_hypernetworks_mlps, start=1))[outputs]
    hyper = torch.stack([head(queries[..., token, :]) for token, head in heads], dim=-2)
    return hyper.to(x.dtype) @ x.transpose(-2, -1)


def attend_to_image(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tokens q [B, K, T, C] to the image's k, v [B, K or 1, N, C], with SAM's
    `Attention` parameters.

    The key projection is applied to the queries and the value projection to the result; the key
    bias shifts all scores of a query alike and cancels in the softmax.
    """
    b, n_prompts, t, c = q.shape
    heads, width = attention.num_heads, attention.internal_dim // attention.num_heads
    q = attention.q_proj(q).unflatten(-1, (heads, width)).transpose(2, 3)  # [B, K, heads, T, width]
    q = q @ attention.k_proj.weight.view(heads, width, c) / math.sqrt(width)  # [B, K, heads, T, C]
    q = q.reshape(b, k.shape[1], -1, c)  # one image side for all prompts: one product
    attn = torch.softmax(q @ k.transpose(2, 3), dim=-1)
    out = (attn @ v).view(b, n_prompts, heads, t, c)
    v_weight = attention.v_proj.weight.view(heads, width, c)
    out = out @ v_weight.transpose(1, 2)  # [B, K, heads, T, width]
    return attention.out_proj(out.transpose(2, 3).flatten(3) + attention.v_proj.bias)


def attend_to_tokens(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, residual: Tensor
) -> Tensor:
    """residual + attention of the image's q [B, K or 1, N, C] to the tokens k, v [B, K, T, C]: [B,
    K, N, C].

    Softmax weights of a head add up to one, so the output bias is spread over the values.
    """
    b, n_prompts, t, c = k.shape
    heads, width = attention.num_heads, attention.internal_dim // attention.num_heads
    k = attention.k_proj(k).unflatten(-1, (heads, width)).transpose(2, 3) / math.sqrt(width)
    bias = (k * attention.q_proj.bias.view(heads, 1, width)).sum(dim=-1)  # [B, K, heads, T]
    k = k @ attention.q_proj.weight.view(heads, width, c)  # [B, K, heads, T, C]
    k = k.reshape(b, q.shape[1], -1, c)  # one image side for all prompts: one product
    scores = (k @ q.transpose(2, 3)).view(b, n_prompts, heads, t, -1) + bias[..., None]
    attn = torch.softmax(scores, dim=3).flatten(0, 1).flatten(1, 2)  # [B*K, heads*T, N]
    v = attention.v_proj(v).unflatten(-1, (heads, width)).transpose(2, 3)
    out_weight = attention.out_proj.weight.view(c, heads, width).permute(1, 2, 0)
    v = (v @ out_weight + attention.out_proj.bias / heads).flatten(0, 1).flatten(1, 2)
    residual = residual.expand(-1, n_prompts, -1, -1).flatten(0, 1).to(v.dtype)
    attended = torch.baddbmm(residual, attn.transpose(1, 2).to(v.dtype), v)
    return attended.unflatten(0, (b, n_prompts))


def conv_transpose_per_token(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 as a linear layer: [..., C_in] to [..., 4,
    C_out], the four pixels of the 2x2 cell in row-major order.
    """
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4 * C_out, C_in]
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, conv.out_channels))


@lru_cache(maxsize=16)
def pixel_order(h: int, w: int, device: torch.device) -> Tensor:
    """For every pixel of 4h x 4w, in raster order, its place in token order, int64 (see
    `tokens_to_pixels`).
    """
    with torch.inference_mode(False):  # training may want it too
        places = torch.arange(h * w * 16, device=device).view(h, w, 2, 2, 2, 2)
        return places.permute(0, 2, 4, 1, 3, 5).flatten()


def tokens_to_pixels(x: Tensor, h: int, w: int) -> Tensor:
    """[..., h*w*16] in token order (token row, token column, half row, half column, quarter row,
    quarter column) to [..., 4h, 4w].
    """
    # Several times faster than a permuted copy, whose innermost runs are two numbers long.
    return x.gather(-1, pixel_order(h, w, x.device).expand(x.shape)).unflatten(-1, (4 * h, 4 * w))
