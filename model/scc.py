"""The two connectivity classifiers of SCC: one of patches (released code), one of pooled features
(paper)."""

from __future__ import annotations

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

    def forward(self, images: Tensor, shares: list[Tensor]) -> Tensor:
        """Logits of all connectivities of the images, image by image: N x K.

        shares: of each image, what dataset.scc.mask_shares gives. Features are averaged by a matrix
        product: gathered cells would be summed in a changing order when that is differentiated,
        with several threads or on a GPU.
        """
        features = self.features(images).float().flatten(2).transpose(1, 2)  # B x cells x C
        pooled = [share.to(f.device) @ f for f, share in zip(features, shares)]
        return self.classifier(torch.cat(pooled))


def linear(inputs: int, class_num: int) -> nn.Linear:
    """Starts from Xavier's normal weights and torch's default bias (released code)."""
    layer = nn.Linear(inputs, class_num)
    nn.init.xavier_normal_(layer.weight)
    return layer
