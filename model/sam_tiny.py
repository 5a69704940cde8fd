"""The tiny SAM, --sam-type tiny: segment_anything's `Sam` at a small width, for CPUs.

The package's prompt encoder, mask decoder and two-way transformer, narrower, with a small
convolutional image encoder instead of the vision transformer, and with prompts that are also drawn
on the image's tokens. It was trained from scratch on random synthetic street scenes by
scripts/dev/sam_tiny.py and knows nothing but those drawings. Its weights
(model/sam_tiny.pth) ship with this repository, so that the whole pipeline runs on a CPU and without
downloads.

Needs when copied away: model/sam_tiny.pth.
"""

from __future__ import annotations

from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

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
        """Normalised, zero-padded images [B, 3, S, S] to the embedding [B, C, S/8, S/8], padded
        with zeros too.
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

    def __init__(self, embed_dim: int, **options):
        super().__init__(embed_dim=embed_dim, **options)
        features = 7 + 11  # of points and of boxes
        layers = nn.Linear(features, 64), nn.GELU(), nn.Linear(64, embed_dim)
        self.prompt_map = nn.Sequential(*layers)

    def draw(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, h: int, w: int
    ) -> Tensor:
        """What is drawn on the upper left h x w tokens, in raster order: [P, h*w, C].

        points: coordinates [P, n, 2] (x, y) in pixels and labels [P, n] (only label 1 counts);
        boxes [P, 4] or [P, 1, 4], as the package's predictor gives them.
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
            near = self.point_features(centre, *points)
        if boxes is not None:
            box = self.box_features(centre, boxes.float().reshape(-1, 1, 4))
        return self.prompt_map(torch.cat([near, box], dim=-1))

    @staticmethod
    def point_features(centre: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """Features [P, N, 7] of tokens at `centre` [1, N, 2] for the nearest point of label 1:
        three Gaussians of the distance and the offset at two scales.
        """
        offset = centre[:, :, None] - (points.float() + 0.5)[:, None]  # [P, N, n, 2]
        distance = offset.square().sum(-1).masked_fill((labels != 1)[:, None], 1e8)
        distance, index = distance.min(dim=2)
        offset = offset.gather(2, index[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
        variances = 2 * distance.new_tensor([6.0, 20.0, 60.0]) ** 2
        gaussians = torch.exp(-distance[..., None] / variances)
        return torch.cat([gaussians, torch.tanh(offset / 16), torch.tanh(offset / 64)], dim=-1)

    @staticmethod
    def box_features(centre: Tensor, boxes: Tensor) -> Tensor:
        """Features [P, N, 11] of tokens at `centre` [1, N, 2] for boxes [P, 1, 4]: the distances
        from the four sides at two scales, inside or not, the box's size, and one.
        """
        sides = torch.cat([centre - boxes[..., :2], boxes[..., 2:] + 1 - centre], dim=-1)
        extent = (boxes[..., 2:] + 1 - boxes[..., :2]).clamp(min=1)
        inside = torch.sigmoid(sides / 4).prod(dim=-1, keepdim=True)
        size = (extent.log().sum(-1, keepdim=True) / 10).expand_as(inside)
        near, far = torch.tanh(sides / 8), torch.tanh(sides / 32)
        return torch.cat([near, far, inside, size, torch.ones_like(inside)], dim=-1)

    def draw_single_points(self, points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The same of many single points [P, 2]: a table [U, C] and its row for each token, [P,
        h*w].

        A row depends on the offset from point to token alone, and the points of a grid share their
        offsets.
        """
        device = points.device
        offsets = []
        for axis, count in ((0, w), (1, h)):
            tokens = (torch.arange(count, device=device) + 0.5) * TINY_STRIDE - 0.5
            offset = tokens[None] - points[:, axis : axis + 1].float()
            offsets.append(torch.unique(offset, return_inverse=True))
        (dx, column), (dy, row) = offsets
        # One token is drawn, for points with all offsets to it.
        token = TINY_STRIDE / 2 - 0.5
        around = token - torch.cartesian_prod(dy, dx).flip(1)
        labels = torch.ones(len(around), 1, device=device)
        table = self.draw((around[:, None], labels), None, 1, 1)[:, 0]
        return table, (row[:, :, None] * len(dx) + column[:, None, :]).flatten(1)

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As in the package: sparse [P, T, C] and dense [P, C, S, S] embeddings of P prompts."""
        sparse, dense = super().forward(points, boxes, masks)
        if points is not None or boxes is not None:
            h, w = self.image_embedding_size
            drawn = self.draw(points, boxes, h, w)
            dense = dense + drawn.transpose(1, 2).unflatten(2, (h, w))
        return sparse, dense


class TinyMaskDecoder(MaskDecoder):
    """The package's mask decoder on the tokens that show the image: those of padding take no part.

    `model.sam_fast` computes the same faster, for PSA and for the training.
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
        M]. Logits over the padding repeat the image's last row or column.
        """
        full, (h, w) = image_embeddings.shape[-1], occupied_extent(image_embeddings)
        embeddings, pe = image_embeddings[..., :h, :w], image_pe[..., :h, :w]
        dense = dense_prompt_embeddings[..., :h, :w]
        masks, iou = super().predict_masks(embeddings, pe, sparse_prompt_embeddings, dense)
        return F.pad(masks, (0, 4 * (full - w), 0, 4 * (full - h)), mode="replicate"), iou


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
    decoder = TinyMaskDecoder(
        transformer_dim=TINY_WIDTH, transformer=transformer, iou_head_hidden_dim=128
    )
    return Sam(encoder, prompt_encoder, decoder).eval()
