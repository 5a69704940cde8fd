"""A segmenter of segment_anything's architecture, without the work whose results are thrown away.

`FastSam` gives what `SamAutomaticMaskGenerator.generate` (no crops) and `SamPredictor.predict`
give, for any `Sam` of segment_anything or mobile_sam. The image is encoded once, the image side of
the decoder's first layer is computed once for all prompts, the IoU head decides before the
upscaling layers run, padding is not upscaled, and masks stay on the device.

The package's mask decoder is computed with less work from the same parameters: projections of the
many image tokens are moved to the side of the few prompt tokens, and transposed convolutions of
kernel and stride 2 become linear layers per token. What differs is the order of floating-point
sums: tests/oracle_psa.py is the oracle.

The tiny SAM (--sam-type tiny), for CPUs, is the package's prompt encoder, mask decoder and two-way
transformer, narrower, with a small convolutional image encoder that sees no padding, and with
prompts that are also drawn on the image's tokens. scripts/dev/sam_tiny.py trains it.

Axis letters: B images, K prompts, T prompt tokens, N image tokens, C channels, M masks; of one
image P prompts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from model.segmenter import Segmenter, Size

TINY_CHECKPOINT = Path(__file__).with_name("sam_tiny.pth")
TINY_IMAGE_SIZE = 384  # longest side, pixels: the toy benchmark's width
TINY_STRIDE = 8  # pixels a token of the embedding; low-resolution masks have a quarter of it
TINY_MULTIPLE = 32  # the image encoder's sides are multiples of it
TINY_WIDTH = 128  # channels of embedding and decoder


class FastSam(Segmenter):
    """One SAM and the image it has encoded. options: of `Segmenter`."""

    def __init__(self, sam: Sam, **options):
        super().__init__(sam.device, **options)
        self.sam = sam
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
        """In bf16 the image encoder runs under autocast."""
        resized = torch.as_tensor(self.transform.apply_image(image), device=self.device)
        self.input_size = tuple(resized.shape[:2])
        padded = self.sam.preprocess(resized.permute(2, 0, 1)[None].contiguous())
        if self.is_tiny:
            rows, columns = (-(-side // TINY_MULTIPLE) * TINY_MULTIPLE for side in self.input_size)
            padded = padded[..., :rows, :columns]
        encoder, prompts = self.sam.image_encoder, self.sam.prompt_encoder
        with self.autocast():
            embedding = encoder(padded).float()
        rows, columns = self.tokens = embedding.shape[-2:]  # that show the image
        # No prompt is a mask: the embedding of "no mask" is added to the image once.
        embedding = embedding + prompts.no_mask_embed.weight.view(1, -1, 1, 1)
        pe = prompts.get_dense_pe()[..., :rows, :columns]
        dtype = torch.bfloat16 if self.amp else torch.float
        self.decoder = self._bf16_decoder if self.amp else self.sam.mask_decoder
        self.image_tokens, self.image_pe = (  # 1 x 1 x N x C
            x.flatten(2).transpose(1, 2)[None].to(dtype) for x in (embedding, pe)
        )
        # Pixels of SAM's square, a side, that one low-resolution mask pixel covers.
        self.pixels_per_cell = encoder.img_size // (4 * prompts.image_embedding_size[0])

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool, above: float = -np.inf
    ) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        """Masks that are left out are never upscaled."""
        encoder = self.sam.prompt_encoder
        outputs = slice(1, None) if several else slice(0, 1)
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        if self.is_tiny and boxes is None:
            table, rows = encoder.draw_single_points(points[:, 0], *self.tokens)

        def decoded(start: int, stop: int) -> tuple[Tensor, Tensor]:
            part, keys = slice(start, stop), self.image_tokens
            around = None if boxes is None else boxes[part]
            sparse, _ = encoder((points[part], labels[part]), around, None)
            if self.is_tiny:
                if boxes is None:
                    drawn = table[rows[part]]
                else:
                    drawn = encoder.draw(points[part], around, *self.tokens)
                keys = keys + drawn[None].to(keys.dtype)
            sparse = sparse[None].to(keys.dtype)
            queries, keys = two_way_transformer(self.decoder, keys, self.image_pe, sparse)
            queries, keys = queries[0].float(), keys[0]
            iou = self.decoder.iou_prediction_head(queries[:, 0])[:, outputs]
            kept = iou > above
            if not (some := kept.any(dim=1)).all():
                queries, keys, kept, iou = queries[some], keys[some], kept[some], iou[some]
            return self.low_masks(queries, keys, outputs)[kept], iou[kept]

        return decoded

    def low_masks(self, queries: Tensor, keys: Tensor, outputs: slice) -> Tensor:
        """Low-resolution logits P x M x h x w of the mask `outputs`, of the part that shows the
        image: ceil(input / pixels_per_cell) + 1 cells, as many as bilinear enlargement looks at.
        From output tokens P x T x C and image tokens P x N x C.
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

    def enlargement(self, height: int, width: int) -> list[tuple[Size, Size]]:
        """As `Sam.postprocess_masks`: first to SAM's padded input, then to the image."""
        size = height * self.pixels_per_cell, width * self.pixels_per_cell
        second = [(self.size, self.size)] if self.input_size != self.size else []
        return [(size, self.input_size), *second]


# ----------------------------------------------------------------------------- SAM's mask decoder


def two_way_transformer(
    decoder: MaskDecoder, keys: Tensor, image_pe: Tensor, sparse: Tensor
) -> tuple[Tensor, Tensor]:
    """Output tokens [B, K, 1 + M + T, C] (IoU, masks, prompts) and image tokens [B, K, N, C].

    Args:
        keys: image tokens with the dense prompt embeddings, [B, K, N, C]; [B, 1, N, C] where those
            of all prompts are equal.
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
    output tokens [..., T, C] and image tokens [..., N, C], or some of them, [..., h, w, C].
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
    `Attention` parameters. The key projection is applied to the queries and the value projection to
    the result; the key bias shifts all scores of a query alike and cancels in the softmax.
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
    K, N, C]. Softmax weights of a head add up to one, so the output bias is spread over the values.
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
    """For each pixel of 4h x 4w, in raster order, its place in token order (`tokens_to_pixels`)."""
    places = torch.arange(h * w * 16, device=device).view(h, w, 2, 2, 2, 2)
    return places.permute(0, 2, 4, 1, 3, 5).flatten()


def tokens_to_pixels(x: Tensor, h: int, w: int) -> Tensor:
    """[..., h*w*16] in token order (token row, token column, half row, half column, quarter row,
    quarter column) to [..., 4h, 4w].
    """
    # Several times faster than a permuted copy, whose innermost runs are two numbers long.
    return x.gather(-1, pixel_order(h, w, x.device).expand(x.shape)).unflatten(-1, (4 * h, 4 * w))


# ------------------------------------------------------------------------------------- the tiny SAM


def conv_norm(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and group norm of 16 channels a group."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.GroupNorm(c_out // 16, c_out)
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv_norm(channels, channels)
        self.conv2 = conv_norm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class TinyImageEncoder(nn.Module):
    """Convolutional pyramid in the place of SAM's vision transformer: strides 4, 8, 16 and 32 going
    up, summed coarse to fine going down to stride 8. The stride-4 level enters through pixel
    unshuffling, so that an 8-pixel token can describe the fine masks inside itself.
    """

    def __init__(self):
        super().__init__()
        self.img_size = TINY_IMAGE_SIZE
        self.stem = conv_norm(3, 32, stride=2)
        self.levels = nn.ModuleList()
        widths, counts = (32, 64, 128, 176, 160), (1, 2, 2, 1)
        for c_in, width, count in zip(widths, widths[1:], counts):
            down = conv_norm(c_in, width, stride=2)
            blocks = [ResidualBlock(width) for _ in range(count)]
            self.levels.append(nn.Sequential(down, nn.ReLU(), *blocks))
        channels = (4 * 64, 128, 176, 160)  # level 1 enters unshuffled
        self.laterals = nn.ModuleList(nn.Conv2d(c, TINY_WIDTH, 1) for c in channels)
        self.smooth16 = conv_norm(TINY_WIDTH, TINY_WIDTH)
        self.smooth8 = conv_norm(TINY_WIDTH, TINY_WIDTH)
        self.project = nn.Conv2d(TINY_WIDTH, TINY_WIDTH, 1)
        self.norm = nn.LayerNorm(TINY_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W], sides multiples of TINY_MULTIPLE → embedding [B, C, H/8,
        W/8].
        """
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.stem(x))
        pyramid = []
        for level in self.levels:
            x = level(x)
            pyramid.append(x)
        s4, s8, s16, s32 = pyramid
        l4, l8, l16, l32 = self.laterals
        y = l16(s16) + F.interpolate(l32(s32), scale_factor=2, mode="nearest")
        y = F.relu(self.smooth16(y))
        y = F.interpolate(y, scale_factor=2, mode="nearest") + l8(s8) + l4(F.pixel_unshuffle(s4, 2))
        y = self.project(F.relu(self.smooth8(y)))
        return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyPromptEncoder(PromptEncoder):
    """The package's prompt encoder, which also tells each image token where it lies relative to the
    prompts: SAM learns that from Fourier features of coordinates alone, in weeks on many GPUs; from
    prompts drawn into the dense embedding a small network learns it in minutes.
    """

    def __init__(self, embed_dim: int, **options):
        super().__init__(embed_dim=embed_dim, **options)
        features = 7 + 11  # of points and of boxes
        layers = nn.Linear(features, 64), nn.GELU(), nn.Linear(64, embed_dim)
        self.prompt_map = nn.Sequential(*layers)

    def draw(self, points: Tensor, boxes: Tensor | None, h: int, w: int) -> Tensor:
        """What is drawn on the upper left h x w tokens, in raster order: [P, h*w, C]. Positive
        points [P, n, 2] (x, y) and boxes [P, 4], in pixels.
        """
        y, x = torch.meshgrid(
            (torch.arange(h, device=points.device) + 0.5) * TINY_STRIDE,
            (torch.arange(w, device=points.device) + 0.5) * TINY_STRIDE,
            indexing="ij",
        )
        centre = torch.stack([x, y], dim=-1).view(1, h * w, 2)
        near = self.point_features(centre, points)
        box = near.new_zeros(*near.shape[:2], 11)
        if boxes is not None:
            box = self.box_features(centre, boxes.float()[:, None])
        return self.prompt_map(torch.cat([near, box], dim=-1))

    @staticmethod
    def point_features(centre: Tensor, points: Tensor) -> Tensor:
        """[P, N, 7] of tokens at `centre` [1, N, 2] for the nearest point: three Gaussians of the
        distance, the offset at two scales.
        """
        offset = centre[:, :, None] - (points.float() + 0.5)[:, None]  # [P, N, n, 2]
        distance, index = offset.square().sum(-1).min(dim=2)
        offset = offset.gather(2, index[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
        variances = 2 * distance.new_tensor([6.0, 20.0, 60.0]) ** 2
        gaussians = torch.exp(-distance[..., None] / variances)
        return torch.cat([gaussians, torch.tanh(offset / 16), torch.tanh(offset / 64)], dim=-1)

    @staticmethod
    def box_features(centre: Tensor, boxes: Tensor) -> Tensor:
        """[P, N, 11] of tokens at `centre` [1, N, 2] for boxes [P, 1, 4]: the distances from the
        four sides at two scales, inside or not, the box's size, and one.
        """
        sides = torch.cat([centre - boxes[..., :2], boxes[..., 2:] + 1 - centre], dim=-1)
        extent = (boxes[..., 2:] + 1 - boxes[..., :2]).clamp(min=1)
        inside = torch.sigmoid(sides / 4).prod(dim=-1, keepdim=True)
        size = (extent.log().sum(-1, keepdim=True) / 10).expand_as(inside)
        near, far = torch.tanh(sides / 8), torch.tanh(sides / 32)
        return torch.cat([near, far, inside, size, torch.ones_like(inside)], dim=-1)

    def draw_single_points(self, points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The same of many single points [P, 2]: a table [U, C] and its row for each token, [P,
        h*w]. A row depends on the offset from point to token alone, and the points of a grid share
        their offsets.
        """
        offsets = []
        for axis, count in ((0, w), (1, h)):
            tokens = (torch.arange(count, device=points.device) + 0.5) * TINY_STRIDE - 0.5
            offset = tokens[None] - points[:, axis : axis + 1].float()
            offsets.append(torch.unique(offset, return_inverse=True))
        (dx, column), (dy, row) = offsets
        # One token is drawn, for points with all offsets to it.
        around = TINY_STRIDE / 2 - 0.5 - torch.cartesian_prod(dy, dx).flip(1)
        table = self.draw(around[:, None], None, 1, 1)[:, 0]
        return table, (row[:, :, None] * len(dx) + column[:, None, :]).flatten(1)


def build_sam_tiny() -> Sam:
    """The tiny SAM in eval mode on the CPU, with random weights."""
    size, tokens = TINY_IMAGE_SIZE, TINY_IMAGE_SIZE // TINY_STRIDE
    encoder = TinyImageEncoder()
    prompt_encoder = TinyPromptEncoder(
        TINY_WIDTH,
        image_embedding_size=(tokens, tokens),
        input_image_size=(size, size),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=TINY_WIDTH, mlp_dim=256, num_heads=4)
    decoder = MaskDecoder(
        transformer_dim=TINY_WIDTH, transformer=transformer, iou_head_hidden_dim=128
    )
    return Sam(encoder, prompt_encoder, decoder).eval()
