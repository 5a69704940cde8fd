"""The tiny SAM, --sam-type tiny: segment_anything's `Sam` at a small width, for CPUs.

The package's prompt encoder, mask decoder and two-way transformer, narrower, with a small
convolutional image encoder instead of the vision transformer, and with prompts that are also drawn
on the image's tokens. It was trained from scratch on random synthetic street scenes by
scripts/dev/sam_tiny.py and knows nothing but those drawings. Its weights
(model/sam_tiny.pth) ship with this repository, so that the whole pipeline runs on a CPU and without
downloads.

Needs when copied away: model/sam_decoder.py and model/sam_tiny.pth.
"""

from __future__ import annotations

from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from model.sam_decoder import (
    attend_to_image,
    attend_to_tokens,
    conv_transpose_per_token,
    tokens_to_pixels,
)

TINY_CHECKPOINT = Path(__file__).with_name("sam_tiny.pth")
# Longest side in pixels: the toy benchmark's width, whose images are not resized.
TINY_IMAGE_SIZE = 384
# Pixels per token of the image embedding; low-resolution masks have a quarter of it.
TINY_STRIDE = 8
TINY_WIDTH = 128  # channels of embedding and decoder
# Cycles per half image: 12 is a wavelength of 16 pixels, two tokens.
TINY_PE_FREQUENCIES = (0.5, 12.0)


def occupied_extent(x: Tensor, multiple: int = 1) -> tuple[int, int]:
    """(height, width) of the part of `x` [B, C, H, W] that is not the zero padding at its bottom
    and right.

    `Sam.preprocess` pads normalised images with exact zeros, which no 8-bit pixel becomes (the
    means are no integers), so the extent can be read off the values. Rounded up to `multiple`, at
    least one `multiple`.
    """
    occupied = (x != 0).any(dim=1).any(dim=0)  # [H, W]
    extent = []
    for size, hit in ((x.shape[2], occupied.any(dim=1)), (x.shape[3], occupied.any(dim=0))):
        last = int(hit.nonzero().max()) + 1 if bool(hit.any()) else size
        extent.append(min(size, -(-last // multiple) * multiple))
    return extent[0], extent[1]


def conv_norm(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and group norm (16 channels a group): no running statistics, training equals
    inference.
    """
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
    """Convolutional pyramid in the place of SAM's vision transformer.

    Strides 4, 8, 16 and 32 going up, summed coarse to fine going down to stride 8; the stride-4
    level enters through pixel unshuffling, so that an 8-pixel token can describe the fine masks
    inside itself.

    `Sam` pads images to a square. The padding is cut off first and the embedding is padded with
    zeros last: a padded image gives the same tokens as an unpadded one at half the cost of a 2:1
    scene.
    """

    def __init__(
        self,
        img_size: int = TINY_IMAGE_SIZE,
        out_channels: int = TINY_WIDTH,
        widths: tuple[int, ...] = (64, 128, 176, 160),
        blocks: tuple[int, ...] = (1, 2, 2, 1),
    ):
        super().__init__()
        self.img_size = img_size
        self.stem = conv_norm(3, 32, stride=2)
        self.levels = nn.ModuleList()
        c_in = 32
        for width, count in zip(widths, blocks):
            self.levels.append(
                nn.Sequential(
                    conv_norm(c_in, width, stride=2),
                    nn.ReLU(),
                    *(ResidualBlock(width) for _ in range(count)),
                )
            )
            c_in = width
        self.laterals = nn.ModuleList(
            nn.Conv2d(c, out_channels, 1) for c in (4 * widths[0], *widths[1:])
        )
        self.smooth16 = conv_norm(out_channels, out_channels)
        self.smooth8 = conv_norm(out_channels, out_channels)
        self.project = nn.Conv2d(out_channels, out_channels, 1)
        self.norm = nn.LayerNorm(out_channels)

    def tokens(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W], sides multiples of 32, to the embedding [B, C, H/8, W/8],
        no padding.
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, zero-padded images [B, 3, S, S] to the embedding [B, C, S/8, S/8], zero where
        the image is.
        """
        height, width = occupied_extent(x, multiple=32)
        y = self.tokens(x[:, :, :height, :width])
        full = self.img_size // TINY_STRIDE
        return F.pad(y, (0, full - y.shape[3], 0, full - y.shape[2]))


class TinyPromptEncoder(PromptEncoder):
    """The package's prompt encoder, which besides tells every image token where it lies relative to
    the prompts.

    SAM learns to find a point or a box from Fourier features of coordinates alone, in weeks on many
    GPUs. Drawing the prompts into the dense embedding, as SAM does with mask prompts, teaches a
    small network that in minutes.
    """

    FEATURES = 18

    def __init__(self, embed_dim: int, **options):
        super().__init__(embed_dim=embed_dim, **options)
        self.prompt_map = nn.Sequential(
            nn.Linear(self.FEATURES, 64), nn.GELU(), nn.Linear(64, embed_dim)
        )

    def draw_prompts(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, h: int, w: int
    ) -> Tensor:
        """Features [P, h*w, FEATURES] of the upper left h x w tokens, in raster order.

        points: coordinates [P, n, 2] (x, y) in pixels and labels [P, n] (only label 1 counts);
        boxes [P, 4]. To the nearest point: three Gaussians of the distance and the offset at two
        scales; to the box: the distances from its four sides at two scales, inside or not, size;
        zeros for what is not given.
        """
        device = self.no_mask_embed.weight.device
        y, x = torch.meshgrid(
            (torch.arange(h, device=device) + 0.5) * TINY_STRIDE,
            (torch.arange(w, device=device) + 0.5) * TINY_STRIDE,
            indexing="ij",
        )
        centre = torch.stack([x, y], dim=-1).view(1, h * w, 2)
        count = len(points[0]) if points is not None else len(boxes)
        near, box = centre.new_zeros(count, h * w, 7), centre.new_zeros(count, h * w, 11)
        if points is not None:
            coordinates, labels = points
            offset = centre[:, :, None] - (coordinates.float() + 0.5)[:, None]  # [P, N, n, 2]
            distance = offset.square().sum(-1).masked_fill((labels != 1)[:, None], 1e8)
            distance, index = distance.min(dim=2)
            offset = offset.gather(2, index[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
            near = torch.cat(
                [
                    torch.exp(
                        -distance[..., None] / (2 * distance.new_tensor([6.0, 20.0, 60.0]) ** 2)
                    ),
                    torch.tanh(offset / 16),
                    torch.tanh(offset / 64),
                ],
                dim=-1,
            )
        if boxes is not None:
            boxes = boxes.float().reshape(
                -1, 1, 4
            )  # the package's predictor gives [P, 1, 4], others [P, 4]
            sides = torch.cat([centre - boxes[..., :2], boxes[..., 2:] + 1 - centre], dim=-1)
            size = (boxes[..., 2:] + 1 - boxes[..., :2]).clamp(min=1).log().sum(
                -1, keepdim=True
            ) / 10
            inside = torch.sigmoid(sides / 4).prod(dim=-1, keepdim=True)
            box = torch.cat(
                [
                    torch.tanh(sides / 8),
                    torch.tanh(sides / 32),
                    inside,
                    size.expand_as(inside),
                    torch.ones_like(inside),
                ],
                dim=-1,
            )
        return torch.cat([near, box], dim=-1)

    def single_points(self, points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The drawn embeddings of many single points [P, 2]: a table [U, C] and the index [P, h*w]
        of each token's row.

        A row depends on the offset from point to token alone, and the points of a grid share their
        offsets.
        """
        device = points.device
        tables = []
        for axis, count in ((0, w), (1, h)):
            tokens = (torch.arange(count, device=device) + 0.5) * TINY_STRIDE - 0.5
            tables.append(
                torch.unique(tokens[None] - points[:, axis : axis + 1].float(), return_inverse=True)
            )
        (dx, column), (dy, row) = tables
        origin = TINY_STRIDE / 2 - 0.5  # of the one token that is drawn for each
        offsets = origin - torch.cartesian_prod(dy, dx).flip(
            1
        )  # points with all offsets to it, x y
        labels = torch.ones(len(offsets), 1, device=device)
        table = self.prompt_map(self.draw_prompts((offsets[:, None], labels), None, 1, 1))[:, 0]
        return table, (row[:, :, None] * len(dx) + column[:, None, :]).flatten(1)

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As in the package: sparse [P, T, C] and dense [P, C, S, S] embeddings of P prompts."""
        sparse, dense = super().forward(points, boxes, masks)
        if points is not None or boxes is not None:
            h, w = self.image_embedding_size
            drawn = self.prompt_map(self.draw_prompts(points, boxes, h, w))
            dense = dense + drawn.transpose(1, 2).unflatten(2, (h, w))
        return sparse, dense


class TinyMaskDecoder(MaskDecoder):
    """The package's mask decoder, computed faster and without the padding; same parameters, same
    numbers.

    Two identities save most of the work and let the training run the same code for a batch of
    images: the projections of the image's keys, queries and values are moved to the side of the few
    prompt tokens, and transposed convolutions of kernel and stride 2 are linear layers per token.
    `MaskDecoder.predict_masks` is the test's oracle.
    """

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As in the package, for one image: embeddings [1, C, S, S], pe [1, C, S, S], sparse [P, T,
        C], dense [P, C, S, S] to low-resolution mask logits [P, M, 4S, 4S] and predicted IoU [P,
        M].

        Tokens of padding take no part; logits over the padding repeat the image's last row or
        column.
        """
        full = image_embeddings.shape[-1]
        h, w = occupied_extent(image_embeddings)
        keys = (
            (image_embeddings[..., :h, :w] + dense_prompt_embeddings[..., :h, :w])
            .flatten(2)
            .transpose(1, 2)
        )
        pe = image_pe[..., :h, :w].flatten(2).transpose(1, 2)
        logits, iou = self.decode(keys[None], pe, sparse_prompt_embeddings[None])
        masks, iou = tokens_to_pixels(logits[0], h, w), iou[0]
        return F.pad(masks, (0, 4 * (full - w), 0, 4 * (full - h)), mode="replicate"), iou

    def decode(
        self, keys: Tensor, image_pe: Tensor, sparse: Tensor, outputs: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Masks of K prompts on each of B images.

        keys: image embeddings with the dense prompt embeddings added [B, K, N, C]; image_pe [1, N,
        C]; sparse: prompt embeddings [B, K, T, C]; outputs: which of the M mask tokens. Returns
        logits [B, K, M, N*16] in token order (see `tokens_to_pixels`) and predicted IoU [B, K, M].
        """
        b, k, _, c = keys.shape
        pe = image_pe.to(keys.dtype)
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(b, k, -1, -1), sparse], dim=2)  # [B, K, T, C]
        queries = tokens
        for layer in self.transformer.layers:
            flat, flat_pe = queries.flatten(0, 1), tokens.flatten(0, 1)
            if layer.skip_first_layer_pe:
                flat = layer.self_attn(q=flat, k=flat, v=flat)
            else:
                flat = flat + layer.self_attn(q=flat + flat_pe, k=flat + flat_pe, v=flat)
            queries = layer.norm1(flat).view_as(tokens)
            keys_pe = keys + pe
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
        queries = self.transformer.norm_final_attn(
            queries
            + attend_to_image(
                self.transformer.final_attn_token_to_image, queries + tokens, keys + pe, keys
            )
        )

        conv1, norm, _, conv2, _ = self.output_upscaling
        activation = self.output_upscaling[2]
        up = conv_transpose_per_token(conv1, keys)  # [B, K, N, 4, C/4]
        up = activation(F.layer_norm(up, (c // 4,), norm.weight, norm.bias, norm.eps))
        up = activation(conv_transpose_per_token(conv2, up))  # [B, K, N, 4, 4, C/8]
        indices = range(self.num_mask_tokens)[outputs]
        hyper = torch.stack(
            [self.output_hypernetworks_mlps[i](queries[:, :, 1 + i]) for i in indices], dim=2
        )
        logits = hyper @ up.flatten(2, 4).transpose(2, 3)  # [B, K, M, N*16]
        return logits, self.iou_prediction_head(queries[:, :, 0])[..., outputs]


def build_sam_tiny() -> Sam:
    """The tiny SAM in eval mode on the CPU, with random weights."""
    tokens = TINY_IMAGE_SIZE // TINY_STRIDE
    sam = Sam(
        image_encoder=TinyImageEncoder(),
        prompt_encoder=TinyPromptEncoder(
            embed_dim=TINY_WIDTH,
            image_embedding_size=(tokens, tokens),
            input_image_size=(TINY_IMAGE_SIZE, TINY_IMAGE_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=TinyMaskDecoder(
            num_multimask_outputs=3,
            transformer_dim=TINY_WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=TINY_WIDTH, mlp_dim=256, num_heads=4
            ),
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    return sam.eval()
