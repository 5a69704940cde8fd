"""DeepLabV3+ (Chen et al. 2018) as UniMatch builds it: ResNet at output stride 16, ASPP without
dropout, decoder on layer1. Weights are named as in UniMatch's checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate

from model.resnet import ResNet

# Of ASPP at output stride 16 (DeepLabV3, table 5; UniMatch's configuration).
DILATIONS = (6, 12, 18)
REDUCED_CHANNELS = 48  # of layer1's output in the decoder (DeepLabV3+, table 1)


def upsampled(x: torch.Tensor, size) -> torch.Tensor:
    """B x C x h x w → B x C x size, bilinear with the corners aligned."""
    return interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation if kernel == 3 else 0
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: B x inputs x h x w → B x outputs x h x w."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.b0 = nn.Sequential(*conv_bn_relu(inputs, outputs, 1))
        self.b1, self.b2, self.b3 = (
            nn.Sequential(*conv_bn_relu(inputs, outputs, 3, rate)) for rate in DILATIONS
        )
        pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(inputs, outputs, 1))
        self.b4 = nn.ModuleDict({"gap": pooling})
        self.project = nn.Sequential(*conv_bn_relu(5 * outputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [branch(x) for branch in (self.b0, self.b1, self.b2, self.b3)]
        pooled = self.b4["gap"](x).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([*branches, pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """Images to logits at the images' size. backbone: its depth, 10, 18, 50 or 101."""

    def __init__(self, backbone: int, class_num: int, stem: str = "deep"):
        super().__init__()
        self.backbone = ResNet(backbone, stem)
        low, high = self.backbone.channels[0], self.backbone.channels[-1]
        width = max(64, high // 8)  # of ASPP and decoder: 256 with ResNet-50 and -101
        self.head = ASPP(high, width)
        self.reduce = nn.Sequential(*conv_bn_relu(low, REDUCED_CHANNELS, 1))
        first = conv_bn_relu(REDUCED_CHANNELS + width, width, 3)
        self.fuse = nn.Sequential(*first, *conv_bn_relu(width, width, 3))
        self.classifier = nn.Conv2d(width, class_num, 1)
        self.config = {
            "arch": "deeplabv3plus",
            "backbone": f"resnet{backbone}",
            "stem": stem,
            "class_num": class_num,
            "dilations": list(DILATIONS),
        }

    def decode(self, c1: torch.Tensor, c4: torch.Tensor) -> torch.Tensor:
        """Stride-4 and stride-16 features → stride-4 features before the classifier."""
        aspp = upsampled(self.head(c4), c1.shape[-2:])
        return self.fuse(torch.cat([self.reduce(c1), aspp], dim=1))

    def forward(
        self,
        images: torch.Tensor,
        perturbation: tuple[torch.Tensor, torch.Tensor] | None = None,
        fp_from: int = 0,
    ):
        """B x 3 x H x W → logits, B x K x H x W.

        With `perturbation` (factors for the channels of c1 and of c4, B x C x 1 x 1 each): (logits,
        logits of images[fp_from:] from perturbed features). The decoder runs on both of all B
        images, since all of them take part in its batch norm statistics, as in UniMatch.
        """
        size, count = images.shape[-2:], images.shape[0]
        c1, _, _, c4 = self.backbone(images)
        if perturbation is None:
            return upsampled(self.classifier(self.decode(c1, c4)), size)
        both = zip((c1, c4), perturbation)
        c1, c4 = (torch.cat([c, c * factors.to(c.dtype)]) for c, factors in both)
        features = self.decode(c1, c4)
        wanted = torch.cat([features[:count], features[count + fp_from :]])
        logits = upsampled(self.classifier(wanted), size)
        return logits[:count], logits[count:]
