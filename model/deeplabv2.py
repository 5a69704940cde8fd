"""DeepLabV2 as DT-ST trains it, so that its checkpoints can be loaded and used for starting
pseudo-labels.

A torchvision ResNet-101 (7x7 stem) at output stride 8: layer3 and layer4 trade their stride for
dilation 2 and 4. Batch norm is frozen and has no epsilon. The classifier is the sum of four dilated
3x3 convolutions on layer4.

Checkpoint (DT-ST's released code): a dict with `feature_extractor` (`backbone.conv1.weight` …) and
`classifier` (`conv2d_list.0.weight` …), each key possibly prefixed `module.`, and `iteration`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet101

from model.checkpoint import load_exactly, without_prefixes
from util.run import UserError

# Of the classifier's convolutions (DeepLabV2's ASPP-L, DT-ST's released code).
DILATIONS = (6, 12, 18, 24)
FEATURE_CHANNELS = 2048  # of layer4

# Size (width, height) that DT-ST feeds its network for testing and for pseudo-labels, by number of
# classes. It resizes with Pillow's bicubic filter.
TEST_SIZE = {19: (1536, 768), 16: (1280, 640)}


class FrozenBatchNorm(nn.Module):
    """y = (x - running_mean) * weight / sqrt(running_var) + bias, all four fixed; x: B x C x H x
    W.
    """

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (
            self.weight * self.running_var.rsqrt()
        )  # no epsilon: the trained weights belong to this formula
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Classifier(nn.Module):
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
    """Images (B x 3 x H x W, RGB in [0, 1] normalised by ImageNet's mean and deviation) to logits
    at stride 8.

    `forward` returns B x K x ceil(H/8) x ceil(W/8); upsample them with align_corners=True, as DT-ST
    does.
    """

    def __init__(self, class_num: int):
        super().__init__()
        network = resnet101(
            weights=None,
            norm_layer=FrozenBatchNorm,
            replace_stride_with_dilation=[False, True, True],
        )
        layers = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.feature_extractor = nn.Module()
        self.feature_extractor.backbone = nn.Sequential(
            OrderedDict((name, getattr(network, name)) for name in layers)
        )
        self.classifier = Classifier(class_num)

    @property
    def class_num(self) -> int:
        return self.classifier.conv2d_list[0].out_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature_extractor.backbone(images))


def is_dtst_checkpoint(checkpoint) -> bool:
    return isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(part), dict) for part in ("feature_extractor", "classifier")
    )


def load_dtst_checkpoint(checkpoint: dict, path: str | Path) -> DeepLabV2:
    """The network of a DT-ST checkpoint (already read), in eval mode on the CPU; `path` is for
    messages.
    """
    parts = {
        name: without_prefixes(checkpoint[name]) for name in ("feature_extractor", "classifier")
    }
    weight = parts["classifier"].get("conv2d_list.0.weight")
    if weight is None:
        raise UserError(
            f"{path}: its classifier has no conv2d_list.0.weight; this is not DT-ST's DeepLabV2"
        )
    model = DeepLabV2(weight.shape[0])
    for name, state in parts.items():
        # A file may carry batch norm's counter, which a frozen batch norm has no use for.
        state = {
            key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
        }
        load_exactly(getattr(model, name), state, path, f"the {name} of DT-ST's DeepLabV2")
    return model.eval()
