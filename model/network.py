"""One way to load a segmentation network, whoever trained it, with the input that belongs to it.

| file of | network | input | its size |
|---|---|---|---|
| train_unimatch.py, UniMatch | DeepLabV3+ | ImageNet's mean, deviation | the image's |
| DT-ST | DeepLabV2 | ImageNet's mean, deviation | 1536x768; 16 classes 1280x640; bicubic |
| CMA | DeepLabV2 | ImageNet's mean, deviation | the image's, in square windows |
| ProDA | DeepLabV2 | RGB / 255 alone | 2048x1024, bilinear |
| SHADE | DeepLabV3+ | ImageNet's mean, deviation | the image's |

The format is told from the file's content. Each table of weights may also stand alone, without what
its authors save beside it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import resnet101
from torchvision.ops import FrozenBatchNorm2d

from model.deeplabv3plus import DeepLabV3Plus, upsampled
from model.resnet import (
    conv3x3,
    load_exactly,
    read_checkpoint,
    state_dict_in,
    to_tensor,
)
from util.run import UserError

# Width and height that the authors feed their networks; DT-ST's by number of classes.
DTST_SIZE = {19: (1536, 768), 16: (1280, 640)}
PRODA_SIZE = (2048, 1024)
SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)  # of CMA's pixel labels (its released code)


def square_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of CMA's windows: squares of the shorter side along the longer
    one. Three where that is 1.5 to 3 times the shorter (1920x1080: at 0, 420 and 840).
    """
    side, length = sorted((height, width))
    stride = length // 2 - side // 2 if length > 1.5 * side else length - side
    stride = max(1, min(stride, side))
    starts = [*range(0, length - side, stride), length - side]
    if height > width:
        return [(start, start + side, 0, side) for start in starts]
    return [(0, side, start, start + side) for start in starts]


def square_window_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Normalised images, B x 3 x H x W → logits, float32 B x K x H x W: CMA's inference. Those of
    each window are enlarged to it, and averaged where windows overlap.
    """
    total, count = None, torch.zeros(images.shape[-2:], device=images.device)
    for top, bottom, left, right in square_windows(*images.shape[-2:]):
        window = images[..., top:bottom, left:right]
        logits = interpolate(model(window).float(), window.shape[-2:], mode="bilinear")
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        total[..., top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    return total / count


@dataclass(frozen=True)
class Network:
    """A segmentation network and how its authors feed it.

    model: in eval mode, 1 x 3 x h x w → logits, 1 x K x any size. mode: of eval.py, its authors'.
    test_size: (width, height) that images are resized to, by `resample`; None: as they are.
    scaled_only: RGB / 255 is the input, without ImageNet's mean and deviation.
    """

    model: nn.Module
    format: str
    class_num: int
    test_size: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    scaled_only: bool = False
    mode: str = "original"

    def logits(self, image: np.ndarray) -> torch.Tensor:
        """uint8 H x W x 3 → float32 1 x K x H x W on the network's device."""
        return self.logits_at(self.pixels(image), image.shape[:2])

    def multi_scale(self, image: np.ndarray) -> torch.Tensor:
        """Instead CMA's mean softmax of image and mirror image at SCALES, for its pixel labels."""
        pixels, size, total = self.pixels(image), image.shape[:2], 0
        for scale in SCALES:
            scaled_size = [int(length * scale + 0.5) for length in pixels.shape[-2:]]
            scaled = interpolate(pixels, scaled_size, mode="bilinear", antialias=True)
            total += self.logits_at(scaled, size).softmax(dim=1)
            total += self.logits_at(scaled.flip(-1), size).flip(-1).softmax(dim=1)
        return total / (2 * len(SCALES))

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """uint8 H x W x 3 → the network's input, float32 1 x 3 x h x w on its device."""
        if self.test_size and self.test_size[::-1] != image.shape[:2]:
            image = np.array(Image.fromarray(image).resize(self.test_size, self.resample))
        pixels = to_tensor(image)
        if self.scaled_only:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels[None].to(next(self.model.buffers()).device)

    def logits_at(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Logits of an input at a size (height, width): upsampled once, with the corners aligned,
        as all these networks' authors do, but CMA's, who does it window by window.
        """
        if self.mode == "square_windows":
            logits = square_window_logits(self.model, pixels)
            return interpolate(logits, size, mode="bilinear")
        logits = self.model(pixels).float()
        return logits if logits.shape[-2:] == size else upsampled(logits, size)


def load_network(path: str | Path, device, class_num: int) -> Network:
    """The network in a file of any format of the table above; it must predict `class_num`."""
    network = network_in(read_checkpoint(path), path)
    found = network.class_num
    if found != class_num:
        raise UserError(f"{path}: predicts {found} classes, but --class-num is {class_num}")
    network.model.eval().to(device)
    return network


def network_in(content, path: str | Path) -> Network:
    """The network in a checkpoint's content, on the CPU; `path` is for messages."""
    state = state_dict_in(content, path)
    for weights, network_of in (
        ({"feature_extractor.backbone.conv1.weight", "classifier.conv2d_list.0.weight"}, dtst),
        ({"backbone.stem.0.weight", "head.conv2d_list.0.weight"}, cma),
        ({"layer5.head.1.weight"}, proda),
        ({"bot_aspp.0.weight", "final2.0.weight"}, shade),
        ({"classifier.weight", "head.project.0.weight"}, deeplabv3plus),
    ):
        if weights <= state.keys():
            return network_of(state, path)
    raise UserError(
        f"{path}: not a network of train_unimatch.py, UniMatch, DT-ST, CMA, ProDA or SHADE "
        f"(first weight: {next(iter(state), 'none')})"
    )


# A weight that ResNets of at least this depth have.
DEPTHS = {"layer3.22.conv1.weight": 101, "layer1.0.conv3.weight": 50, "layer1.1.conv1.weight": 18}


def deeplabv3plus(
    state: dict[str, torch.Tensor], path: str | Path, shades: bool = False
) -> Network:
    """Of train_unimatch.py, of UniMatch or with SHADE's differences: the weights tell its size."""
    depths = [depth for name, depth in DEPTHS.items() if f"backbone.{name}" in state]
    stem = "deep" if "backbone.conv1.0.weight" in state else "torchvision"
    depth, class_num = max(depths, default=10), len(state["classifier.weight"])
    model, kind = DeepLabV3Plus(depth, class_num, stem), "SHADE" if shades else "DeepLabV3+"
    if shades:
        first = model.backbone.layer4[0].conv2  # SHADE dilates it too
        first.dilation = first.padding = (2, 2)
    load_exactly(model, state, path, f"{kind}, resnet{depth}, {stem} stem, {class_num} classes")
    return Network(model, kind, class_num)


# Names of weights: SHADE's as a regular expression, and ours.
SHADE_NAMES = (
    (r"layer0\.0\.", r"backbone.conv1."),
    (r"layer0\.1\.", r"backbone.bn1."),
    (r"layer([1-4])\.", r"backbone.layer\1."),
    (r"aspp\.features\.([0-3])\.([01])\.", r"head.b\1.\2."),
    (r"aspp\.img_conv\.0\.", r"head.b4.gap.1."),
    (r"aspp\.img_conv\.1\.", r"head.b4.gap.2."),
    (r"bot_aspp\.([01])\.", r"head.project.\1."),
    (r"bot_fine\.([01])\.", r"reduce.\1."),
    (r"final1\.([0134])\.", r"fuse.\1."),
    (r"final2\.0\.", r"classifier."),
)
# Style statistics and the auxiliary classifier, which only SHADE's training uses.
SHADE_TRAINING = ("SHM.", "dsn.")
POOLED_CHANNELS = 256  # of ASPP's image pooling, which SHADE joins first and ours last


def shade(state: dict[str, torch.Tensor], path: str | Path) -> Network:
    """Of SHADE: ours but for names, one dilation and the order of ASPP's branches."""
    state = {name: value for name, value in state.items() if not name.startswith(SHADE_TRAINING)}
    for theirs, ours in SHADE_NAMES:
        state = {re.sub(f"^{theirs}", ours, name): value for name, value in state.items()}
    project = state["head.project.0.weight"]
    pooled, others = project[:, :POOLED_CHANNELS], project[:, POOLED_CHANNELS:]
    state["head.project.0.weight"] = torch.cat([others, pooled], dim=1)
    return deeplabv3plus(state, path, shades=True)


def dtst(state: dict[str, torch.Tensor], path: str | Path) -> Network:
    """Of DT-ST's `{'feature_extractor', 'classifier', 'iteration'}`, two tables of weights."""
    class_num = len(state["classifier.conv2d_list.0.weight"])
    model, size = DeepLabV2(class_num), DTST_SIZE.get(class_num)
    load_exactly(model, state, path, "DT-ST's DeepLabV2")
    return Network(model, "DT-ST", class_num, size, Image.Resampling.BICUBIC)


def cma(state: dict[str, torch.Tensor], path: str | Path) -> Network:
    """Of CMA's table of weights, alone or under `state_dict`."""
    class_num = len(state["head.conv2d_list.0.weight"])
    model = CMA(class_num)
    load_exactly(model, state, path, "CMA's DeepLabV2")
    return Network(model, "CMA", class_num, mode="square_windows")


def proda(state: dict[str, torch.Tensor], path: str | Path) -> Network:
    """Of ProDA's `{'ResNet101': {'model_state', 'objective_vectors'}, 'iter', 'best_iou'}`."""
    class_num = len(state["layer5.head.1.weight"])
    model = ProDA(class_num, "bn_pretrain.weight" in state)
    load_exactly(model, state, path, "ProDA's DeepLabV2")
    return Network(model, "ProDA", class_num, PRODA_SIZE, scaled_only=True)


# -------------------------------------------------------------------------------------- DeepLabV2

# DeepLabV2 as DT-ST, CMA and ProDA train it, for starting pseudo-labels. All are a torchvision
# ResNet-101 at output stride 8, layer3 and layer4 trading their stride for dilation 2 and 4, and a
# classifier on layer4 whose branches are convolutions of different dilation. Weights are named as
# in the authors' checkpoints.

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
