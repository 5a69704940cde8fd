"""Training samples made the plain way: whole images resized with Pillow and cut afterwards, strong
views with torchvision and Pillow. And images to make them from.

Slow and obvious; tests compare dataset/augment.py with it, scripts/dev/bench.py measures against
it. It shares the random draws and the constants with the fast path.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from dataset.augment import (
    BLUR_CHANCE,
    BLUR_RADIUS,
    GREY_CHANCE,
    JITTER,
    JITTER_CHANCE,
    Crop,
    cutmix_box,
    draw_crop,
)
from dataset.samples import LABELED, UNLABELED, UNLABELED_MIX, TrainingSamples
from model.resnet import IMAGENET_MEAN, IMAGENET_STD
from util.labels import CITYSCAPES_19, IGNORE, write_label


def resized_then_cropped(
    image: Image.Image, crop: Crop, how=Image.Resampling.BILINEAR, padding: int = 0
) -> np.ndarray:
    """`dataset.augment.cropped_image` the long way: the whole image is resized, padded with
    `padding`, cut and mirrored.
    """
    whole = np.asarray(image.resize((crop.width, crop.height), how))
    bottom, right = max(crop.size - crop.height, 0), max(crop.size - crop.width, 0)
    edges = ((0, bottom), (0, right), (0, 0))[: whole.ndim]
    whole = np.pad(whole, edges, constant_values=padding)
    square = whole[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    return square[:, ::-1] if crop.flip else square


def label_resized_then_cropped(label: np.ndarray, crop: Crop, padding: int) -> np.ndarray:
    """`dataset.augment.cropped_label` the long way."""
    nearest = Image.Resampling.NEAREST
    return resized_then_cropped(Image.fromarray(label), crop, nearest, padding)


def pillow_strong_view(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """`dataset.augment.strong_view` with torchvision and Pillow."""
    view = Image.fromarray(np.ascontiguousarray(image))
    if random.random() < JITTER_CHANCE:
        factors = [random.uniform(*bounds) for bounds in JITTER.values()]
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for part in random.permutation(len(adjust)):
            view = adjust[part](view, factors[part])
    if random.random() < GREY_CHANCE:
        view = view.convert("L").convert("RGB")
    if random.random() < BLUR_CHANCE:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(random.uniform(*BLUR_RADIUS))))
    return np.asarray(view)


def plain_sample(samples: TrainingSamples, number: int) -> int:
    """Loads one sample as UniMatch's three loaders do; returns the bytes made (so that nothing is
    optimised away).
    """
    made = 0
    for stream in (LABELED, UNLABELED, UNLABELED_MIX):
        random = samples.generator(stream, number)
        labeled, args = samples.lists.labeled, samples.args
        image_path, label_path = labeled[samples.index(number) % len(labeled)]
        image = Image.open(args.root_path / image_path).convert("RGB")
        label = np.asarray(Image.open(args.root_path / label_path))
        crop = draw_crop(random, image.height, image.width, args.crop_size)
        views = [resized_then_cropped(image, crop)]
        made += label_resized_then_cropped(label, crop, IGNORE).nbytes
        if stream != LABELED:
            views += [pillow_strong_view(random, views[0]) for _ in range(2)]
            made += sum(cutmix_box(random, args.crop_size).nbytes for _ in range(2))
        for view in views:
            values = F.to_tensor(np.array(view))
            made += F.normalize(values, IMAGENET_MEAN, IMAGENET_STD).nbytes
    return made


def made_files(root: Path, count: int) -> list[tuple[str, str]]:
    """Makes images of 2048 x 1024 (smooth colours with sensor noise, PNGs of about Cityscapes'
    file size) and label maps (a background of large areas and 90 objects); their list's rows.
    """
    random, rows, (height, width) = np.random.default_rng(0), [], (1024, 2048)
    for number in range(count):
        image = random.standard_normal((height, width, 3), np.float32)
        for side in (8, 32, 128, 512):
            colours = random.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
            smooth = Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)
            image += np.asarray(smooth, np.float32) / 4
        label = np.full((height, width), 8, np.uint8)
        label[:350], label[600:] = 10, 0
        for _ in range(90):
            x, y, w, h = random.integers((0, 200, 6, 6), (width, height - 60, 160, 120))
            label[y : y + h, x : x + w] = random.choice([2, 5, 7, 11, 13, 18])
        rows.append((f"{number}.png", f"pixel/{number}.png"))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(root / rows[-1][0])
        write_label(root / rows[-1][1], label, CITYSCAPES_19.palette)
    return rows
