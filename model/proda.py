"""ProDA's network (DeepLabV2 with a larger classifier), so that its checkpoints can be loaded and
used for starting pseudo-labels.

A ResNet-101 at output stride 8 which differs from torchvision's in three places: max-pooling rounds
sizes up, layer2 strides in its first convolution, and every 3x3 convolution of layer3 and layer4 is
dilated, the first block's too. The classifier joins five branches, weighs their channels
(squeeze and excitation) and ends in a convolution without bias.

Checkpoint (ProDA's released code): `{'ResNet101': {'model_state': …, 'objective_vectors': …},
'iter', 'best_iou'}`. Models of its stages 2 and 3 have a batch norm `bn_pretrain` between backbone
and classifier; warm-up and stage-1 models do not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet101

from model.checkpoint import load_exactly

FEATURE_CHANNELS, BRANCH_CHANNELS = 2048, 256  # of layer4; of each branch of the classifier
# Of the classifier's branches: a 1x1 convolution, then 3x3 convolutions with these dilations.
DILATIONS = (6, 12, 18, 24)
GROUPS = 32  # of group norm
SQUEEZE = 16  # the channels are squeezed to one in this many
TEST_SIZE = (2048, 1024)  # width and height that ProDA feeds its network


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


class Classifier(nn.Module):
    """B x 2048 x h x w → B x K x h x w."""

    def __init__(self, class_num: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Sequential(*convolution(FEATURE_CHANNELS, dilation), nn.ReLU(inplace=True))
            for dilation in (0, *DILATIONS)
        )
        joined = BRANCH_CHANNELS * len(self.conv2d_list)
        self.bottleneck = nn.Sequential(SqueezeExcitation(joined), *convolution(joined, 1))
        # head.0 is dropout during training.
        self.head = nn.Sequential(
            nn.Identity(), nn.Conv2d(BRANCH_CHANNELS, class_num, 1, bias=False)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([branch(features) for branch in self.conv2d_list], dim=1)
        return self.head(self.bottleneck(joined))


class ProDA(nn.Module):
    """Images (B x 3 x H x W, RGB in [0, 1], no mean and deviation) to logits at stride 8.

    `forward` returns B x K x (H/8 + 1) x (W/8 + 1); upsample them with align_corners=True, as ProDA
    does. pretrained_norm: whether there is a `bn_pretrain`.
    """

    def __init__(self, class_num: int, pretrained_norm: bool):
        super().__init__()
        network = resnet101(weights=None, replace_stride_with_dilation=[False, True, True])
        network.maxpool.ceil_mode = True
        network.layer2[0].conv1.stride, network.layer2[0].conv2.stride = (2, 2), (1, 1)
        for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
            layer[0].conv2.dilation = layer[0].conv2.padding = (dilation, dilation)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(network, name))
        self.bn_pretrain = nn.BatchNorm2d(FEATURE_CHANNELS) if pretrained_norm else nn.Identity()
        self.layer5 = Classifier(class_num)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.layer5(self.bn_pretrain(x))


def is_proda_state(state: dict[str, torch.Tensor]) -> bool:
    return "layer5.head.1.weight" in state


def load_proda_state(state: dict[str, torch.Tensor], path: str | Path) -> ProDA:
    """The network of ProDA's table of weights, in eval mode on the CPU; `path` is for messages."""
    model = ProDA(len(state["layer5.head.1.weight"]), "bn_pretrain.weight" in state)
    load_exactly(model, state, path, "ProDA's DeepLabV2")
    return model.eval()
