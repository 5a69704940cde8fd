#!/usr/bin/env python
"""A miniature of a task's inputs, for REHEARSE=1: the official layout, file names and label
formats, from toy scenes.

Outputs  <out>/data     cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, 2048x1024,
         with gtFine/…_labelIds.png
                        bdd: images/10k/{train,val}/*.jpg, 1280x720, with
                        labels/sem_seg/masks/{train,val}/*.png
         <out>/model_iter020000.pth   a DT-ST checkpoint (DeepLabV2): a random backbone, and a
                                      classifier fitted by least squares to a few other scenes, so
                                      that its labels are not pure noise

    python -m scripts.lib.rehearsal_data --layout cityscapes --class-num 19 \\
        --out runs/rehearse/gta2cs/inputs

What is there is kept, so a stopped rehearsal goes on. Copied away, this file needs dataset/toy/,
model/, util/, scripts/prepare_data.py and scripts/lib/layouts.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

import numpy as np
import torch
from PIL import Image

from dataset.toy import draw_scene
from model.deeplabv2 import DeepLabV2
from scripts.prepare_data import LABEL_IDS_OF_19
from util.images import to_tensor
from util.labels import IDS_16_IN_19, IGNORE
from util.outputs import atomic_path
from util.run import run_main, seed_everything

CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}
FIT_SCENES, FIT_SIZE = 6, (128, 256)  # scenes, height and width that the classifier is fitted on
RIDGE = 1e-3  # relative to the mean square of a feature


def label_ids(train_ids: np.ndarray) -> np.ndarray:
    """uint8 train IDs of 19 classes → official label IDs; no label becomes 4, `static`."""
    table = np.full(256, 4, dtype=np.uint8)
    table[:19] = LABEL_IDS_OF_19
    return table[train_ids]


def save(path: Path, array: np.ndarray) -> None:
    if not path.exists():
        with atomic_path(path) as temporary:
            Image.fromarray(array).save(temporary)


def write_cityscapes(root: Path, counts: dict[str, int]) -> None:
    """Images and labelIds, the images dealt out over the split's cities."""
    for split, count in counts.items():
        for i in range(count):
            city = CITIES[split][i % len(CITIES[split])]
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            if (root / f"gtFine/{stem}_gtFine_labelIds.png").exists():
                continue
            scene = draw_scene(seed_of(split, i), "target", 1024, 2048)
            save(root / f"leftImg8bit/{stem}_leftImg8bit.png", scene.image)
            save(root / f"gtFine/{stem}_gtFine_labelIds.png", label_ids(scene.label))


def write_bdd(root: Path, counts: dict[str, int]) -> None:
    """JPEG images and train-ID labels, in the layout of the current BDD100K download."""
    for split, count in counts.items():
        for i in range(count):
            name = f"{seed_of(split, i):08x}-{i:08x}"
            if (root / f"labels/sem_seg/masks/{split}/{name}.png").exists():
                continue
            scene = draw_scene(seed_of(split, i), "target", 720, 1280)
            save(root / f"images/10k/{split}/{name}.jpg", scene.image)
            save(root / f"labels/sem_seg/masks/{split}/{name}.png", scene.label)


def seed_of(split: str, index: int) -> int:
    return index + {"train": 0, "val": 1000, "fit": 2000}[split]


def fitted_checkpoint(class_num: int) -> dict:
    """A checkpoint as DT-ST writes it. Only the centre taps of the first dilated convolution are
    fitted; the rest is 0.
    """
    seed_everything(0)
    model = DeepLabV2(class_num).eval()
    for name, buffer in model.feature_extractor.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(
                0.1
            )  # keeps the activations of 33 residual blocks with random weights in bounds
    to_class = np.full(256, IGNORE, dtype=np.int64)
    to_class[list(range(19) if class_num == 19 else IDS_16_IN_19)] = np.arange(class_num)
    features, targets = [], []
    for i in range(FIT_SCENES):
        scene = draw_scene(seed_of("fit", i), "target", *FIT_SIZE)
        with torch.no_grad():
            x = model.feature_extractor.backbone(to_tensor(scene.image)[None])[0]
        label = to_class[
            scene.label[4::8, 4::8]
        ].ravel()  # the pixel at the middle of each stride-8 cell
        features.append(x.flatten(1).T[torch.from_numpy(label != IGNORE)])
        targets.append(torch.from_numpy(label[label != IGNORE]))
    x = torch.cat(features).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    y = torch.nn.functional.one_hot(torch.cat(targets), class_num).double()
    weight_of = (
        1 / y.sum(dim=0).clamp(min=1).sqrt()
    )  # rare classes count more, else they are never predicted
    row = (y * weight_of).sum(dim=1, keepdim=True)
    gram = x.T @ (row * x)
    solution = torch.linalg.solve(
        gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ (row * y)
    )
    with torch.no_grad():
        for convolution in model.classifier.conv2d_list:
            convolution.weight.zero_()
            convolution.bias.zero_()
        first = model.classifier.conv2d_list[0]
        first.weight[:, :, 1, 1] = (
            10 * solution[:-1].T.float()
        )  # 10: scores of 0 to 1 become logits
        first.bias.copy_(10 * solution[-1].float())
    return {
        "iteration": 20000,
        **{
            part: {
                f"module.{key}": value for key, value in getattr(model, part).state_dict().items()
            }
            for part in ("feature_extractor", "classifier")
        },
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layout", choices=("cityscapes", "bdd"), required=True)
    parser.add_argument(
        "--class-num",
        type=int,
        choices=(19, 16),
        default=19,
        help="of the checkpoint (default: 19)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=(2, 1),
        metavar=("TRAIN", "VAL"),
        help="images to make (default: 2 1)",
    )
    options = parser.parse_args(argv)
    write = write_cityscapes if options.layout == "cityscapes" else write_bdd
    write(options.out / "data", dict(zip(("train", "val"), options.images)))
    path = options.out / "model_iter020000.pth"
    if not path.exists():
        checkpoint = fitted_checkpoint(options.class_num)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
    print(f"{options.out}: {options.images[0]} + {options.images[1]} images, {path.name}")


if __name__ == "__main__":
    sys.exit(run_main(main))
