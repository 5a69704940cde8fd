"""SHADE's DeepLabV3+ as ours, so that its checkpoints can be loaded and used for starting
pseudo-labels.

Checkpoint (SHADE's released code): `{'state_dict', 'epoch', 'mean_iu', 'command'}`, ResNet-50 or
-101 with torchvision's stem, 19 classes. The network is ours but for one dilation and the order in
which ASPP's branches are joined.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from model.checkpoint import load_exactly
from model.deeplabv3plus import DeepLabV3Plus

# A name of SHADE's, as a regular expression, and ours.
NAMES = (
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
# Style statistics and the auxiliary classifier, which only training uses.
NOT_NEEDED = ("SHM.", "dsn.")
POOLED_CHANNELS = 256  # of ASPP's image pooling, which SHADE joins first and ours last


def is_shade_state(state: dict[str, torch.Tensor]) -> bool:
    return {"bot_aspp.0.weight", "final2.0.weight"} <= state.keys()


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SHADE's table of weights under our names. A name that is not SHADE's stays as it is."""
    result = {}
    for name, value in state.items():
        if name.startswith(NOT_NEEDED):
            continue
        for theirs, ours in NAMES:
            if re.match(theirs, name):
                name = re.sub(f"^{theirs}", ours, name)
                break
        result[name] = value
    project = result["head.project.0.weight"]
    result["head.project.0.weight"] = torch.cat(
        [project[:, POOLED_CHANNELS:], project[:, :POOLED_CHANNELS]], dim=1
    )
    return result


def load_shade_state(state: dict[str, torch.Tensor], path: str | Path) -> DeepLabV3Plus:
    """The network of SHADE's table of weights, in eval mode on the CPU; `path` is for messages."""
    depth = 101 if "layer3.22.conv1.weight" in state else 50
    model = DeepLabV3Plus(depth, len(state["final2.0.weight"]), "torchvision")
    first = model.backbone.layer4[0].conv2  # SHADE dilates it too
    first.dilation = first.padding = (2, 2)
    load_exactly(model, renamed(state), path, f"SHADE's DeepLabV3+ with ResNet-{depth}")
    return model.eval()
