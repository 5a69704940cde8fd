"""ResNet-10, -18, -50 and -101: the backbones of DeepLabV3+ at output stride 16 and of SCC's
classifiers; and how RGB images become their input.

Two stems. "deep": three 3x3 convolutions 3→64→64→128, as in UniMatch's ResNet-101. "torchvision":
one 7x7 convolution 3→64, for torchvision's ImageNet weights. ResNet-10, one block a stage and half
the width, is for CPUs and small images. Weights are named as in torchvision and in UniMatch's
`pretrained/resnet101.pth`, so that both kinds of files load. Below them: reading checkpoint files
safely, and what all kinds of them share. What a file is for is told from its content by
`model.network.load_network`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.run import UserError

STEMS = ("deep", "torchvision")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB / 255
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 B x H x W x 3 → float32 B x 3 x H x W with ImageNet's mean and deviation, channels-last
    in memory.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device) * 255
    deviation = torch.tensor(IMAGENET_STD, device=images.device) * 255
    return ((images.float() - mean) / deviation).permute(0, 3, 1, 2)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 H x W x 3 → normalised float32 3 x H x W."""
    return normalised(torch.from_numpy(np.array(image))[None])[0].contiguous()


def conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Block(nn.Module):
    """torchvision's BasicBlock (`bottleneck` false) or Bottleneck, with a dilation of its 3x3
    convolutions: B x inputs x h x w to B x (width or 4 width) x h/stride x w/stride.
    """

    def __init__(self, bottleneck: bool, inputs: int, width: int, stride: int, dilation: int):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.outputs, shortcut = outputs, None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        self.bottleneck, self.relu = bottleneck, nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1, self.bn1 = conv1x1(inputs, width), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv3x3(width, width, stride, dilation), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv1x1(width, outputs), nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.bn1 = conv3x3(inputs, width, stride, dilation), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv3x3(width, width, 1, dilation), nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


# Depth: whether of bottlenecks, blocks in layer1 .. layer4, width of layer1's 3x3 convolutions,
# which doubles from layer to layer (He et al. 2016, table 1; 10 is ours).
BLOCKS = {
    10: (False, (1, 1, 1, 1), 32),
    18: (False, (2, 2, 2, 2), 64),
    50: (True, (3, 4, 6, 3), 64),
    101: (True, (3, 4, 23, 3), 64),
}


class ResNet(nn.Module):
    """Images (B x 3 x H x W, float32) to the outputs (c1, c2, c3, c4) of layer1 .. layer4.

    Strides 4, 8, 16 and, with `dilate_last`, 16 again (layer4 trades its stride for dilation: its
    first block has dilation 1, the others 2); without, 32. `channels` holds their numbers of
    channels. While `recompute` is true, backward computes the blocks' activations again instead of
    keeping them: the same gradients, less memory, about a third more time.
    """

    recompute = False

    def __init__(self, depth: int, stem: str = "deep", dilate_last: bool = True):
        super().__init__()
        bottleneck, counts, base = BLOCKS[depth]
        self.depth, self.stem = depth, stem
        if stem == "deep":
            inputs = 2 * base
            self.conv1 = nn.Sequential(
                conv3x3(3, base, stride=2),
                nn.BatchNorm2d(base),
                nn.ReLU(inplace=True),
                conv3x3(base, base),
                nn.BatchNorm2d(base),
                nn.ReLU(inplace=True),
                conv3x3(base, 2 * base),
            )
        else:
            inputs = base
            self.conv1 = nn.Conv2d(3, base, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = []
        for level, count in enumerate(counts):
            dilated, width, blocks = dilate_last and level == 3, base * 2**level, []
            for index in range(count):
                stride = 1 if level == 0 or dilated or index > 0 else 2
                dilation = 2 if dilated and index > 0 else 1
                blocks.append(Block(bottleneck, inputs, width, stride, dilation))
                inputs = blocks[-1].outputs
            setattr(self, f"layer{level + 1}", nn.Sequential(*blocks))
            channels.append(inputs)
        self.channels = tuple(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_stem(self, images: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W → B x C x H/2 x W/2, before max-pooling."""
        return self.relu(self.bn1(self.conv1(images)))

    def forward_from_stem(self, activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `forward_stem` gives → (c1, c2, c3, c4)."""
        x, outputs = self.maxpool(activations), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = recomputed(block, x) if self.recompute and self.training else block(x)
            outputs.append(x)
        return tuple(outputs)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.forward_from_stem(self.forward_stem(images))


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """block(x), without its activations: backward computes them again."""
    contexts = lambda: (contextlib.nullcontext(), _statistics_left_alone(block))
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_left_alone(block: nn.Module):
    """Batch norm's running statistics count a batch once, in the first pass."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(block.buffers(), before):
            buffer.copy_(value)


def imagenet_weights(backbone: ResNet) -> dict[str, torch.Tensor]:
    """torchvision's IMAGENET1K_V1 weights, trained most like those that UniMatch starts from."""
    if backbone.depth == 10 or backbone.stem != "torchvision":
        raise UserError(
            "--backbone-weights imagenet: torchvision has weights for ResNet-18, 50 and 101 with"
            " its own stem; use --stem torchvision and one of these, or give UniMatch's"
            " pretrained/resnet101.pth for the deep stem"
        )
    from torchvision.models import get_weight  # here: loading it takes two seconds

    weights = get_weight(f"ResNet{backbone.depth}_Weights.IMAGENET1K_V1")
    try:
        return weights.get_state_dict(progress=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision's ImageNet weights cannot be downloaded ({error}); download them"
            " elsewhere and give the .pth file with --backbone-weights"
        ) from None


def load_backbone(backbone: ResNet, weights: str | Path) -> None:
    """Load weights into `backbone`: "none" (leave it random), "imagenet" (torchvision's), or a .pth
    file: of a backbone, of torchvision (its `fc` is left out), or a whole segmentation checkpoint
    of ours or of UniMatch, of which the part `backbone.` is taken.
    """
    if weights == "none":
        return
    path = weights
    if weights == "imagenet":
        state, path = imagenet_weights(backbone), "torchvision's ImageNet weights"
    else:
        state = state_dict_in(read_checkpoint(path), path)
        own = "backbone."
        parts = {n.removeprefix(own): value for n, value in state.items() if n.startswith(own)}
        state = parts or state
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    first = {"conv1.weight": "torchvision", "conv1.0.weight": "deep"}
    found = next((stem for name, stem in first.items() if name in state), None)
    if found and found != backbone.stem:
        raise UserError(
            f"{path}: made for the {found} stem, but the network has the {backbone.stem} one; "
            f"use --stem {found}"
        )
    load_exactly(backbone, state, path, f"ResNet-{backbone.depth} with the {backbone.stem} stem")


# ----------------------------------------------------------------------------- checkpoint files

PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
# Where a table of weights lies in a checkpoint: ProDA's `ResNet101` holds a `model_state`.
TABLES = ("ResNet101", "model_state", "model", "state_dict")
DTST_TABLES = ("feature_extractor", "classifier")  # two of one network


def numpy_scalars() -> list:
    """For torch's `safe_globals`: UniMatch, ProDA and SHADE save their best score as a number of
    numpy's. Its maker has one name in files of numpy 1 and another in those of numpy 2.
    """
    scalar = np.float64(0).__reduce__()[0]
    makers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*makers, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")]


def read_checkpoint(path: str | Path):
    """The content of a .pth file, zip or older, on the CPU. Only tensors, plain Python values and
    numpy's numbers are accepted: nothing in the file is run.
    """
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # the unpickler meets bytes of another kind with any kind of error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of tensors ({reason}); fetch or save it again"
        ) from None


def without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The table with every name freed from its leading `module.` and `_orig_mod.`, however many."""
    result = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        result[name] = value
    return result


def state_dict_in(content, path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's content, without prefixes: under `model` (ours, UniMatch's),
    `state_dict` (SHADE's, mmsegmentation's) or `ResNet101`, `model_state` (ProDA's), or the content
    itself. Of DT-ST's two tables the names begin with the table's.
    """
    for key in TABLES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and all(isinstance(content.get(x), dict) for x in DTST_TABLES):
        tables = {table: without_prefixes(content[table]) for table in DTST_TABLES}
        content = {f"{table}.{x}": value for table in tables for x, value in tables[table].items()}
    is_table = isinstance(content, dict) and all(torch.is_tensor(v) for v in content.values())
    if not is_table or not content:
        raise UserError(f"{path}: holds no table of weights (a state_dict, alone or under 'model')")
    return without_prefixes(content)


def load_exactly(
    module: nn.Module, state: dict[str, torch.Tensor], path: str | Path, what: str
) -> None:
    """Copy `state` into `module`. A missing, additional or differently shaped weight is an error
    that names it; but for batch norm's counter `num_batches_tracked`, which no arithmetic here uses
    (older files lack it, a frozen batch norm does not have it).
    """
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # its second line names the first weight of another shape
        problems = [str(error).splitlines()[1].strip()]
    else:
        problems = [
            f"{kind} weight {name}"
            for kind, names in (("missing", found.missing_keys), ("unknown", found.unexpected_keys))
            for name in names
            if not name.endswith("num_batches_tracked")
        ]
    if problems:
        raise UserError(
            f"{path}: its weights do not fit {what} ({len(problems)} differ, first: {problems[0]});"
            " check --backbone, --stem and --class-num, or give another file"
        )
