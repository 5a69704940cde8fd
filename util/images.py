"""How RGB images become a network's input: ImageNet's mean and deviation."""

from __future__ import annotations

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB / 255
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 B x H x W x 3 → float32 B x 3 x H x W with ImageNet's mean and deviation.

    The result is laid out channels-last in memory.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device) * 255
    deviation = torch.tensor(IMAGENET_STD, device=images.device) * 255
    return ((images.float() - mean) / deviation).permute(0, 3, 1, 2)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 H x W x 3 → normalised float32 3 x H x W."""
    return normalised(torch.from_numpy(np.array(image))[None])[0].contiguous()
