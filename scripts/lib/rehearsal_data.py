#!/usr/bin/env python
"""A miniature of a task's inputs, for REHEARSE=1: the official layout, file names and label
formats, from toy scenes.

Outputs  <out>/data     cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, 2048x1024,
         with gtFine/…_labelIds.png
                        bdd: images/10k/{train,val}/*.jpg, 1280x720, with
                        labels/sem_seg/masks/{train,val}/*.png
                        acdc: rgb_anon/<condition>/{train,val,test}/<recording>/*_rgb_anon.png,
                        1920x1080, with gt/…_gt_labelTrainIds.png
         <out>/model_iter020000.pth   a DT-ST checkpoint (DeepLabV2), with acdc one of CMA: a random
                                      backbone, and a classifier fitted by least squares to a few
                                      other scenes, so that its labels are not pure noise

    python -m scripts.lib.rehearsal_data --layout cityscapes --class-num 19 \\
        --out runs/rehearse/gta2cs/inputs

A checkpoint that is there is kept. Copied away, this file needs dataset/toy/, model/, util/ and
scripts/lib/layouts.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

import numpy as np
import torch
from PIL import Image

from dataset.toy import draw_scene
from model.network import CMA, DeepLabV2
from model.resnet import to_tensor
from scripts.lib.layouts import OFFICIAL
from util.labels import IDS_16_IN_19, IGNORE, LABEL_IDS_OF_19
from util.options import Count, Folder, parse_options
from util.outputs import atomic_path
from util.run import run_main, seed_everything

NAMES = {
    "cityscapes": "{city}/{city}_{i:06d}_000019",
    "bdd": "{seed:08x}-{i:08x}",
    "acdc": "GOPR0122/GOPR0122_frame_{i:06d}",
}
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",), "test": ("berlin",)}
FIRST_SEEDS = {"train": 0, "val": 1000, "fit": 2000, "test": 3000}
FIT_SCENES, FIT_SIZE = 6, (128, 256)  # scenes, height and width that the classifier is fitted on
RIDGE = 1e-3  # relative to the mean square of a feature
# Keeps the activations of 33 residual blocks with random weights in bounds.
LAST_NORM_WEIGHT = 0.1
LOGIT_SCALE = 10  # scores of 0 to 1 become logits
# uint8 256: train ID of 19 classes → official label ID; no label becomes 4, `static`.
LABEL_IDS = np.full(256, 4, dtype=np.uint8)
LABEL_IDS[:19] = LABEL_IDS_OF_19


def write_data(root: Path, layout: str, counts: dict[str, int]) -> None:
    """Images and official labels in the first layout of the data set, sizes and names as its own
    are: Cityscapes' dealt out over cities, with label IDs; BDD's JPEG, with train IDs; ACDC's dealt
    out over conditions, with train IDs but for test images.

    counts: split → images.
    """
    files = OFFICIAL[layout].layouts[0]
    for split, count in counts.items():
        for i in range(count):
            seed = FIRST_SEEDS[split] + i
            city = CITIES[split][i % len(CITIES[split])]
            name = NAMES[layout].format(city=city, i=i, seed=seed)
            names = {"split": split, "condition": files.conditions[i % len(files.conditions)]}
            image, label = (
                root / folder.format(**names) / f"{name}{ending}"
                for folder, ending in (files.images, files.labels)
            )
            scene = draw_scene(seed, "target", *OFFICIAL[layout].size)
            save(image, scene.image)
            if split not in OFFICIAL[layout].unlabeled:
                save(label, LABEL_IDS[scene.label] if layout == "cityscapes" else scene.label)


def save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary)


@torch.no_grad()
def fitted_checkpoint(class_num: int, of_cma: bool) -> dict:
    """A checkpoint as DT-ST or CMA writes it. Only the centre taps of the first dilated convolution
    are fitted; the rest is 0.
    """
    seed_everything(0)
    model = (CMA if of_cma else DeepLabV2)(class_num).eval()
    backbone = model.backbone if of_cma else model.feature_extractor.backbone
    head = model.head if of_cma else model.classifier
    for name, weight in backbone.state_dict().items():
        if name.endswith("bn3.weight"):
            weight.fill_(LAST_NORM_WEIGHT)
    to_class = np.full(256, IGNORE, dtype=np.int64)
    to_class[list(range(19) if class_num == 19 else IDS_16_IN_19)] = np.arange(class_num)
    features, targets = [], []
    for i in range(FIT_SCENES):
        scene = draw_scene(FIRST_SEEDS["fit"] + i, "target", *FIT_SIZE)
        x = backbone(to_tensor(scene.image)[None])[0]
        middle = scene.label[4::8, 4::8]  # of each stride-8 cell
        label = to_class[middle].ravel()
        features.append(x.flatten(1).T[torch.from_numpy(label != IGNORE)])
        targets.append(torch.from_numpy(label[label != IGNORE]))
    x = torch.cat(features).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    y = torch.nn.functional.one_hot(torch.cat(targets), class_num).double()
    # Rare classes count more, else they are never predicted.
    row = (y / y.sum(dim=0).clamp(min=1).sqrt()).sum(dim=1, keepdim=True)
    gram = x.T @ (row * x)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram + ridge, x.T @ (row * y))
    for convolution in head.conv2d_list:
        convolution.weight.zero_()
        convolution.bias.zero_()
    first = head.conv2d_list[0]
    first.weight[:, :, 1, 1] = LOGIT_SCALE * solution[:-1].T.float()
    first.bias.copy_(LOGIT_SCALE * solution[-1].float())
    if of_cma:
        return {"state_dict": model.state_dict()}
    checkpoint = {"iteration": 20000}
    for part in ("feature_extractor", "classifier"):
        state = getattr(model, part).state_dict()
        checkpoint[part] = {f"module.{key}": value for key, value in state.items()}
    return checkpoint


@dataclass(kw_only=True)
class Options:
    """inputs"""

    layout: Literal["cityscapes", "bdd", "acdc"]
    "the data set whose layout is made"
    class_num: Literal[19, 16] = 19
    "classes of the checkpoint"
    out: Folder
    "folder for both"
    images: list[Count] | None = None
    "images to make for training and validation, of acdc for testing too (default: 2 1)"


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, __doc__.split("\n\n")[0], argv)
    counts = dict(zip(OFFICIAL[options.layout].counts, options.images or [2, 1]))
    write_data(options.out / "data", options.layout, counts)
    path = options.out / "model_iter020000.pth"
    if not path.exists():
        checkpoint = fitted_checkpoint(options.class_num, options.layout == "acdc")
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
    print(f"{options.out}: {' + '.join(map(str, options.images or [2, 1]))} images, {path.name}")


if __name__ == "__main__":
    sys.exit(run_main(main))
