"""One way to load a segmentation network, whoever trained it, with the input that belongs to it.

| file of | network | input | its size |
|---|---|---|---|
| train_unimatch.py, UniMatch | DeepLabV3+ | ImageNet's mean, deviation | the image's |
| DT-ST | DeepLabV2 | ImageNet's mean, deviation | 1536x768; 16 classes 1280x640; bicubic |
| ProDA | DeepLabV2 | RGB / 255 alone | 2048x1024, bilinear |
| SHADE | DeepLabV3+ | ImageNet's mean, deviation | the image's |

The format is told from the file's content. Each table of weights may also stand alone, without what
its authors save beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

from model import deeplabv2, proda, shade
from model.checkpoint import read_checkpoint, state_dict_in
from model.deeplabv3plus import deeplabv3plus_of
from util.images import to_tensor
from util.run import UserError


@dataclass(frozen=True)
class Network:
    """A segmentation network and how its authors feed it.

    model: in eval mode, 1 x 3 x h x w → logits, 1 x K x any size. test_size: (width, height) that
    images are resized to, by `resample`; None: as they are. scaled_only: RGB / 255 is the input,
    without ImageNet's mean and deviation.
    """

    model: nn.Module
    format: str
    class_num: int
    test_size: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    scaled_only: bool = False

    def logits(self, image: np.ndarray, test_size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 H x W x 3 → float32 1 x K x H x W on the network's device. `test_size` replaces the
        network's own.

        Logits are upsampled once, with the corners aligned, as all these networks' authors do.
        """
        size, test_size = image.shape[:2], test_size or self.test_size
        if test_size and test_size[::-1] != size:
            image = np.array(Image.fromarray(image).resize(test_size, self.resample))
        if self.scaled_only:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        else:
            pixels = to_tensor(image)
        logits = self.model(pixels[None].to(next(self.model.buffers()).device)).float()
        if logits.shape[-2:] != size:
            logits = interpolate(logits, size=size, mode="bilinear", align_corners=True)
        return logits


def load_network(path: str | Path, device, class_num: int) -> Network:
    """The network in a checkpoint file of any format of the table above, on `device`.

    class_num: how many classes it must predict.
    """
    content = read_checkpoint(path)
    if deeplabv2.is_dtst_checkpoint(content):
        model = deeplabv2.load_dtst_checkpoint(content, path)
        count = model.class_num
        size = deeplabv2.TEST_SIZE.get(count)
        network = Network(model, "DT-ST", count, size, Image.Resampling.BICUBIC)
    elif proda.is_proda_state(state := state_dict_in(content, path)):
        model = proda.load_proda_state(state, path)
        count = model.layer5.head[1].out_channels
        network = Network(model, "ProDA", count, proda.TEST_SIZE, scaled_only=True)
    elif shade.is_shade_state(state):
        model = shade.load_shade_state(state, path)
        network = Network(model, "SHADE", model.config["class_num"])
    else:
        model = deeplabv3plus_of(content, path)
        network = Network(model, "DeepLabV3+", model.config["class_num"])
    if network.class_num != class_num:
        raise UserError(
            f"{path}: predicts {network.class_num} classes, but --class-num is {class_num}"
        )
    model.to(device)
    return network
