"""The two connectivity classifiers of SCC: one of patches (released code), one of pooled features
(paper)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from model.resnet import resnet


class PatchClassifier(nn.Module):
    """release: a ResNet (stride 32) that sees one connectivity in a patch, and a K-way linear
    layer.

    The connectivity's mask multiplies the activations after the first convolution, batch norm and
    ReLU; the pooling at the end is over the whole patch.
    """

    def __init__(self, depth: int, stem: str, class_num: int):
        super().__init__()
        self.backbone = resnet(depth, stem, dilate_last=False)
        self.classifier = linear(self.backbone.channels[-1], class_num)

    def forward(self, patches: Tensor, masks: Tensor) -> Tensor:
        """patches: normalised, B x 3 x h x w; masks: B x 1 x h/2 x w/2 of 0 and 1 → logits B x
        K.
        """
        stem = self.backbone.forward_stem(patches)
        features = self.backbone.forward_from_stem(stem * masks.to(stem.dtype))[-1]
        return self.classifier(features.mean(dim=(2, 3)).float())


class PooledClassifier(nn.Module):
    """paper: the features F(x) of whole images (stride 16), averaged over each connectivity's mask,
    and a linear layer.
    """

    def __init__(self, depth: int, stem: str, class_num: int):
        super().__init__()
        self.backbone = resnet(depth, stem, dilate_last=True)
        self.classifier = linear(self.backbone.channels[-1], class_num)

    def features(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W → F(x), B x C x H/16 x W/16."""
        return self.backbone(images)[-1]

    def forward(self, images: Tensor, shares: list[MaskShares]) -> Tensor:
        """Logits of all connectivities of the images, image by image: N x K."""
        features = self.features(images).float()
        return self.classifier(torch.cat([pooled_features(f, s) for f, s in zip(features, shares)]))


def linear(inputs: int, class_num: int) -> nn.Linear:
    """Starts from Xavier's normal weights and torch's default bias (released code)."""
    layer = nn.Linear(inputs, class_num)
    nn.init.xavier_normal_(layer.weight)
    return layer


class MaskShares:
    """The masks of an image's connectivities at feature resolution, as a sparse table.

    A mask is averaged over the pixels of each feature cell, so that the smallest connectivity still
    has weight. Entries: connectivity `number`, `cell` (row-major), `share` of the cell's pixels;
    the shares of a connectivity add up to 1.
    """

    def __init__(
        self, numbers: np.ndarray, count: int, height: int, width: int, mirror: bool = False
    ):
        """numbers: int H x W, the connectivity (0 .. count - 1) of each pixel or -1; height, width:
        of the feature map.
        """
        if mirror:
            numbers = numbers[:, ::-1]
        rows = np.arange(numbers.shape[0]) * height // numbers.shape[0]
        columns = np.arange(numbers.shape[1]) * width // numbers.shape[1]
        # Cells differ by a pixel row or column in size where the division leaves a rest.
        cell_rows, cell_columns = (
            np.bincount(rows, minlength=height),
            np.bincount(columns, minlength=width),
        )
        first = np.append(0, np.cumsum(cell_rows))
        entries = []
        for row in range(
            height
        ):  # counting one row of cells at a time needs no sorting and little memory
            pixels = np.bincount(
                (
                    (numbers[first[row] : first[row + 1]].astype(np.intp) + 1) * width + columns
                ).ravel(),
                minlength=(count + 1) * width,
            )[width:]
            found = np.flatnonzero(pixels)
            entries.append(
                (
                    found // width,
                    row * width + found % width,
                    pixels[found] / (cell_rows[row] * cell_columns[found % width]),
                )
            )
        number, cell, share = (np.concatenate(x) for x in zip(*entries))
        share /= np.bincount(number, share, minlength=count)[number]
        self.count, self.number, self.cell = count, torch.from_numpy(number), torch.from_numpy(cell)
        self.share = torch.from_numpy(share.astype(np.float32))


def pooled_features(features: Tensor, shares: MaskShares) -> Tensor:
    """Average of the feature map C x h x w over each connectivity's mask: N x C.

    A matrix product with the shares laid out densely: gathering cells would be summed in a changing
    order when it is differentiated, with several threads or on a GPU.
    """
    flat = features.flatten(1)  # C x cells
    number, cell, share = (x.to(flat.device) for x in (shares.number, shares.cell, shares.share))
    weights = flat.new_zeros(shares.count, flat.shape[1]).index_put((number, cell), share)
    return weights @ flat.t()
