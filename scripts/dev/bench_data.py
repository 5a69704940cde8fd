#!/usr/bin/env python
"""Images per second of data loading at 2048 x 1024, beside resizing whole images and cutting
afterwards; one worker, one run.

    python -m scripts.dev.bench_data --out bench_data.json

Both sides make the same training samples of UniMatch (one labeled crop; one unlabeled image as weak
view, two strong views, and weak and strong views to paste) with the same random numbers. "plain"
does what UniMatch's loaders do: decode the image for each of the three streams, resize all of it
and of its label with Pillow, crop, and make every strong view with torchvision and Pillow. "But
decoding" leaves decoding out on both sides, as after an epoch with --image-cache. Images are made
here (smooth colours with sensor noise, PNG of about Cityscapes' file size). Figures are CPU seconds
of the loading process, so that other load on the machine does not blur them; images per second
counts the three streams.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import cv2
import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as colour
from torchvision.transforms import functional as tensors

from dataset.augment import (
    BLUR_CHANCE,
    BLUR_RADIUS,
    GREY_CHANCE,
    JITTER,
    JITTER_CHANCE,
    Crop,
    cropped_image,
    cropped_label,
    cutmix_box,
    draw_crop,
)
from dataset.samples import LABELED, UNLABELED, UNLABELED_MIX, Key, TrainingSamples
from util.images import IMAGENET_MEAN, IMAGENET_STD
from util.labels import CITYSCAPES_19, IGNORE, read_picture, write_label
from util.options import check_range
from util.run import run_main, write_json

HEIGHT, WIDTH = 1024, 2048


# ------------------------------------------------------------------------------------ the plain way


def resized_then_cropped(image: Image.Image, crop: Crop) -> np.ndarray:
    """`dataset.augment.cropped_image` the long way: the whole image is resized, padded with black,
    cut and mirrored.
    """
    whole = np.asarray(image.resize((crop.width, crop.height), Image.Resampling.BILINEAR))
    bottom, right = max(crop.size - crop.height, 0), max(crop.size - crop.width, 0)
    whole = np.pad(whole, ((0, bottom), (0, right), (0, 0)))
    square = whole[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    return square[:, ::-1] if crop.flip else square


def label_resized_then_cropped(label: np.ndarray, crop: Crop, padding: int) -> np.ndarray:
    whole = np.asarray(
        Image.fromarray(label).resize((crop.width, crop.height), Image.Resampling.NEAREST)
    )
    bottom, right = max(crop.size - crop.height, 0), max(crop.size - crop.width, 0)
    whole = np.pad(whole, ((0, bottom), (0, right)), constant_values=padding)
    square = whole[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    return square[:, ::-1] if crop.flip else square


def pillow_strong_view(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """`dataset.augment.strong_view` with torchvision and Pillow."""
    view = Image.fromarray(np.ascontiguousarray(image))
    if random.random() < JITTER_CHANCE:
        factors = {
            part: random.uniform(1 - width, 1 + width)
            for part, width in JITTER.items()
            if part != "hue"
        }
        factors["hue"] = random.uniform(-JITTER["hue"], JITTER["hue"])
        adjust = {
            "brightness": colour.adjust_brightness,
            "contrast": colour.adjust_contrast,
            "saturation": colour.adjust_saturation,
            "hue": colour.adjust_hue,
        }
        for part in random.permutation(list(adjust)):
            view = adjust[part](view, float(factors[part]))
    if random.random() < GREY_CHANCE:
        view = view.convert("L").convert("RGB")
    if random.random() < BLUR_CHANCE:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(random.uniform(*BLUR_RADIUS))))
    return np.asarray(view)


def plain_sample(
    samples: TrainingSamples, key: Key, read=lambda path: Image.open(path).convert("RGB")
) -> int:
    """Loads one sample the plain way; returns the bytes made (so that nothing is optimised
    away).
    """
    made = 0
    for stream in (LABELED, UNLABELED, UNLABELED_MIX):
        random = samples.generator(stream, key)
        image_path, label_path = samples.labeled[key.index % len(samples.labeled)]
        image = read(samples.root / image_path)
        label = np.asarray(Image.open(samples.root / label_path))
        crop = draw_crop(random, image.height, image.width, samples.crop_size)
        view, mask = (
            resized_then_cropped(image, crop),
            label_resized_then_cropped(label, crop, IGNORE),
        )
        views = (
            [view]
            if stream == LABELED
            else [view, pillow_strong_view(random, view), pillow_strong_view(random, view)]
        )
        if stream != LABELED:
            made += sum(cutmix_box(random, samples.crop_size).nbytes for _ in range(2))
        for view in views:
            made += tensors.normalize(
                tensors.to_tensor(np.array(view)), IMAGENET_MEAN, IMAGENET_STD
            ).nbytes
        made += mask.nbytes
    return made


# ---------------------------------------------------------------------------------------- measuring


def made_image(random: np.random.Generator) -> np.ndarray:
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for rows in (8, 32, 128, 512):
        noise = Image.fromarray(random.integers(0, 256, (rows, 2 * rows, 3), dtype=np.uint8))
        image += (
            np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), np.float32) / 4
        )
    return np.clip(image + random.normal(0, 1, image.shape), 0, 255).astype(np.uint8)


def made_data(root: Path, count: int) -> list[tuple[str, str]]:
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        Image.fromarray(made_image(random)).save(root / f"{number}.png")
        label = np.kron(
            random.integers(0, 19, (32, 64), dtype=np.uint8), np.ones((32, 32), np.uint8)
        )
        write_label(root / f"{number}_label.png", label, CITYSCAPES_19.palette)
        rows.append((f"{number}.png", f"{number}_label.png"))
    return rows


class InMemory:
    """Stands in for dataset.samples.ImageCache: images are decoded once, before anything is
    timed.
    """

    def __init__(self, paths: list[Path]):
        self.images = {path: read_picture(path) for path in paths}

    def read(self, path: Path) -> Image.Image:
        return self.images[path]


def cpu_seconds(work, count: int) -> float:
    start = time.process_time()
    for number in range(count):
        work(number)
    return (time.process_time() - start) / count


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crop-size", type=int, default=769, help="pixels (default: 769)")
    parser.add_argument(
        "--samples", type=int, default=20, help="samples per measurement (default: 20)"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    check_range(args, "crop_size", least=33)
    check_range(args, "samples", least=1)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = made_data(root, 4)
        unlabeled = [image for image, _ in rows]
        fast, cached = (
            TrainingSamples(rows, unlabeled, root, args.crop_size, 0, image_cache=cache)
            for cache in (None, root / "cache")
        )
        memory = TrainingSamples(rows, unlabeled, root, args.crop_size, 0)
        memory.images = InMemory([root / image for image in unlabeled])
        key = lambda number: Key(0, number, number % len(rows))
        for number in range(len(rows)):  # fills the cache; warms the others up
            cached[key(number)], fast[key(number)], plain_sample(fast, key(number))
        image = cached.images.read(root / rows[0][0])
        label = np.array(Image.open(root / rows[0][1]))
        crops = [
            draw_crop(fast.generator(LABELED, key(n)), HEIGHT, WIDTH, args.crop_size)
            for n in range(args.samples)
        ]
        seconds = {
            "whole sample, plain": cpu_seconds(lambda n: plain_sample(fast, key(n)), args.samples),
            "whole sample": cpu_seconds(lambda n: fast[key(n)], args.samples),
            "whole sample, --image-cache": cpu_seconds(lambda n: cached[key(n)], args.samples),
            "whole sample but decoding, plain": cpu_seconds(
                lambda n: plain_sample(fast, key(n), memory.images.read), args.samples
            ),
            "whole sample but decoding": cpu_seconds(lambda n: memory[key(n)], args.samples),
            "resize and crop alone, plain": cpu_seconds(
                lambda n: (
                    resized_then_cropped(image, crops[n]),
                    label_resized_then_cropped(label, crops[n], IGNORE),
                ),
                args.samples,
            ),
            "resize and crop alone": cpu_seconds(
                lambda n: (cropped_image(image, crops[n]), cropped_label(label, crops[n], IGNORE)),
                args.samples,
            ),
        }
    print(f"{WIDTH} x {HEIGHT}, crop {args.crop_size}, {args.samples} samples, one process")
    print("| what | CPU ms | images / s | against plain |\n|---|---|---|---|")
    for what, value in seconds.items():
        plain = seconds.get(
            f"{what.removesuffix(', plain')}, plain", seconds["whole sample, plain"]
        )
        images = 1 if what.startswith("resize") else 3
        print(f"| {what} | {1000 * value:.1f} | {images / value:.1f} | {plain / value:.1f}x |")
    if args.out:
        write_json(
            args.out, {"crop_size": args.crop_size, "samples": args.samples, "cpu_seconds": seconds}
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
