"""DeepLabV2 as DT-ST, CMA and ProDA train it, for starting pseudo-labels (model/network.py).

All are a torchvision ResNet-101 at output stride 8, layer3 and layer4 trading their stride for
dilation 2 and 4, and a classifier on layer4 whose branches are convolutions of different dilation.
Weights are named as in the authors' checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models import resnet101
from torchvision.ops import FrozenBatchNorm2d

from model.resnet import conv3x3

FEATURE_CHANNELS = 2048  # of layer4
DILATIONS = (6, 12, 18, 24)  # of the classifiers' 3x3 convolutions (DeepLabV2's ASPP-L)
# What ProDA's classifier is made of (its released code).
BRANCH_CHANNELS = 256  # of each branch
GROUPS = 32  # of group norm
SQUEEZE = 16  # the channels are squeezed to one in this many


def backbone(
    norm_layer: type[nn.Module] | partial | None = None, dilate_first: bool = True
) -> OrderedDict[str, nn.Module]:
    """The parts of a ResNet-101 at output stride 8 by name, in order. dilate_first: the first
    blocks of layer3 and layer4 get the dilation of their layers' other blocks, 2 and 4;
    torchvision's have half of it.
    """
    dilated = [False, True, True]
    network = resnet101(weights=None, norm_layer=norm_layer, replace_stride_with_dilation=dilated)
    for layer, dilation in ((network.layer3, 2), (network.layer4, 4)) if dilate_first else ():
        layer[0].conv2.dilation = layer[0].conv2.padding = (dilation, dilation)
    return OrderedDict(list(network.named_children())[:-2])  # without pooling and classifier


class SummedClassifier(nn.Module):
    """The sum of four dilated 3x3 convolutions, B x 2048 x h x w to B x K x h x w."""

    def __init__(self, class_num: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(FEATURE_CHANNELS, class_num, 3, padding=rate, dilation=rate)
            for rate in DILATIONS
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return sum(convolution(features) for convolution in self.conv2d_list)


class DeepLabV2(nn.Module):
    """DT-ST's: images (B x 3 x H x W, RGB in [0, 1] normalised by ImageNet's mean and deviation) to
    logits at stride 8, B x K x ceil(H/8) x ceil(W/8). Batch norm is frozen and has no epsilon: the
    trained weights belong to that formula.
    """

    def __init__(self, class_num: int):
        super().__init__()
        self.feature_extractor = nn.Module()
        norm = partial(FrozenBatchNorm2d, eps=0)
        self.feature_extractor.backbone = nn.Sequential(backbone(norm, dilate_first=False))
        self.classifier = SummedClassifier(class_num)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature_extractor.backbone(images))


class CMA(nn.Module):
    """CMA's: images as DT-ST's to logits at stride 8, B x K x ceil(H/8) x ceil(W/8). Its stem is
    mmsegmentation's of ResNet-101 v1c: three 3x3 convolutions, 3→32→32→64.
    """

    def __init__(self, class_num: int):
        super().__init__()
        parts, stem = backbone(), []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            stem += [conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
        for name in ("conv1", "bn1", "relu"):
            del parts[name]
        self.backbone = nn.Sequential(OrderedDict(stem=nn.Sequential(*stem), **parts))
        self.head = SummedClassifier(class_num)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def convolution(inputs: int, dilation: int = 0) -> list[nn.Module]:
    """A convolution to BRANCH_CHANNELS with group norm: 3x3, or 1x1 with dilation 0."""
    kernel, spacing = (3, dilation) if dilation else (1, 1)
    return [
        nn.Conv2d(inputs, BRANCH_CHANNELS, kernel, padding=dilation, dilation=spacing),
        nn.GroupNorm(GROUPS, BRANCH_CHANNELS),
    ]


class SqueezeExcitation(nn.Module):
    """Channels times a weight in (0, 1) that depends on all channels' means: B x C x h x w."""

    def __init__(self, channels: int):
        super().__init__()
        self.se = nn.Sequential(
            nn.Linear(channels, channels // SQUEEZE),
            nn.ReLU(inplace=True),
            nn.Linear(channels // SQUEEZE, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.se(x.mean(dim=(2, 3)))[:, :, None, None]


class JoinedClassifier(nn.Module):
    """A 1x1 and four dilated 3x3 convolutions, joined: B x 2048 x h x w to B x K x h x w."""

    def __init__(self, class_num: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Sequential(*convolution(FEATURE_CHANNELS, dilation), nn.ReLU(inplace=True))
            for dilation in (0, *DILATIONS)
        )
        joined = BRANCH_CHANNELS * len(self.conv2d_list)
        self.bottleneck = nn.Sequential(SqueezeExcitation(joined), *convolution(joined, 1))
        last = nn.Conv2d(BRANCH_CHANNELS, class_num, 1, bias=False)
        self.head = nn.Sequential(nn.Identity(), last)  # in the training it begins with dropout

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([branch(features) for branch in self.conv2d_list], dim=1)
        return self.head(self.bottleneck(joined))


class ProDA(nn.Sequential):
    """ProDA's: images (B x 3 x H x W, RGB in [0, 1], no mean and deviation) to logits at stride 8,
    B x K x (H/8 + 1) x (W/8 + 1), since max-pooling rounds sizes up. layer2 strides in its first
    convolution. pretrained_norm: a batch norm before the classifier, as in stages 2 and 3.
    """

    def __init__(self, class_num: int, pretrained_norm: bool):
        parts = backbone()
        parts["maxpool"].ceil_mode = True
        first = parts["layer2"][0]
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
        if pretrained_norm:
            parts["bn_pretrain"] = nn.BatchNorm2d(FEATURE_CHANNELS)
        parts["layer5"] = JoinedClassifier(class_num)
        super().__init__(parts)
