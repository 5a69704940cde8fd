"""Augmentation of UniMatch (its section 4.1 and released code). Images are uint8 H x W x 3 (RGB),
label maps uint8 H x W. Every function that draws takes a numpy Generator, so that what a sample
becomes depends on its own seed alone, not on workers, processes or what was drawn before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

# Samples are made in processes of their own, one core each. OpenCV's threads, one for each core in
# every one of them, do not survive a fork: this has to be said before it starts any.
cv2.setNumThreads(1)

SCALES = (0.5, 2.0)  # long side after resizing / before
JITTER_CHANCE, GREY_CHANCE, BLUR_CHANCE = 0.8, 0.2, 0.5
BLUR_RADIUS = (0.1, 2.0)  # standard deviation of the Gaussian, pixels
CUTMIX_CHANCE = 0.5
CUTMIX_AREA = (0.02, 0.4)  # of the crop
CUTMIX_RATIO = (0.3, 1 / 0.3)  # height / width


@dataclass(frozen=True)
class Crop:
    """A square of `size` pixels at (top, left) of the image resized to (height, width); mirrored if
    `flip`. Where the resized image is smaller, the rest, at the right and the bottom, is padding.
    """

    height: int
    width: int
    top: int
    left: int
    size: int
    flip: bool

    @property
    def inside(self) -> tuple[int, int]:
        """(rows, columns) of the square that lie in the image."""
        return min(self.size, self.height - self.top), min(self.size, self.width - self.left)


def draw_crop(
    random: np.random.Generator, height: int, width: int, size: int, scales=SCALES
) -> Crop:
    """UniMatch's geometry for an image of height x width: long side uniform over the integers of
    `scales` times itself, both ends included; then a uniform origin; a mirror with chance 0.5.
    """
    longest = max(height, width)
    least, most = (max(int(longest * scale), 1) for scale in scales)
    long_side = int(random.integers(least, most, endpoint=True))
    short_side = max(int(min(height, width) * long_side / longest + 0.5), 1)
    new_width, new_height = long_side, short_side
    if height > width:
        new_width, new_height = short_side, long_side
    left = int(random.integers(0, max(new_width - size, 0), endpoint=True))
    top = int(random.integers(0, max(new_height - size, 0), endpoint=True))
    return Crop(new_height, new_width, top, left, size, bool(random.random() < 0.5))


def cropped_image(image: Image.Image, crop: Crop) -> np.ndarray:
    """The square of `crop`, uint8 size x size x 3, padded with black. Only the region that it shows
    is resized, which equals resizing all of the image with Pillow (bilinear, antialiased) and
    cutting, within one grey level.

    Pillow resizes rows, rounds, and then columns. Rows: its `box` is kept in float32, so that
    values half-way between two levels may be rounded the other way. Columns: such a difference
    could add to that, so all of the height is made, with the very weights of the whole image.
    """
    rows, columns = crop.inside
    scale, from_x, to_x = _source_span(image.width, crop.width, crop.left, columns)
    _, from_y, to_y = _source_span(image.height, crop.height, crop.top, rows)
    region = image.crop((from_x, from_y, to_x, to_y))
    right = min((crop.left + columns) * scale - from_x, region.width)
    box = (crop.left * scale - from_x, 0, right, region.height)
    narrow = region.resize((columns, region.height), Image.Resampling.BILINEAR, box=box)
    # negative corners add rows outside of the image's region, which no row of the square depends on
    narrow = narrow.crop((0, -from_y, columns, image.height - from_y))
    resized = narrow.resize((columns, crop.height), Image.Resampling.BILINEAR)
    return padded_and_flipped(np.asarray(resized)[crop.top : crop.top + rows], crop, 0)


def _source_span(length: int, new_length: int, start: int, count: int) -> tuple[float, int, int]:
    """(old pixels per new, first, one past the last old pixel) that `count` new ones depend on."""
    scale = length / new_length
    support = max(scale, 1.0) + 1  # of the bilinear filter, and one for rounding
    first = max(math.floor(start * scale - support), 0)
    return scale, first, min(math.ceil((start + count) * scale + support), length)


def cropped_label(label: np.ndarray, crop: Crop, padding: int) -> np.ndarray:
    """The square of `crop`, uint8 size x size, by nearest neighbour, padded with `padding`. The
    label may have another resolution than the image.
    """
    rows, columns = crop.inside
    y = nearest_indices(label.shape[0], crop.height)[crop.top : crop.top + rows]
    x = nearest_indices(label.shape[1], crop.width)[crop.left : crop.left + columns]
    return padded_and_flipped(label[y].take(x, axis=1), crop, padding)


def padded_and_flipped(shown: np.ndarray, crop: Crop, padding: int) -> np.ndarray:
    """What lies in the image, uint8 rows x columns (x 3) → the whole square, a new array."""
    below, beside = crop.size - shown.shape[0], crop.size - shown.shape[1]
    if below or beside:
        border = (0, below, 0, beside, cv2.BORDER_CONSTANT)
        shown = cv2.copyMakeBorder(shown, *border, value=(padding,) * 3)
    return cv2.flip(shown, 1) if crop.flip else np.array(shown)


def nearest_indices(length: int, new_length: int) -> np.ndarray:
    """Source index of each of `new_length` samples: the pixel that its centre falls in."""
    return (2 * np.arange(new_length) + 1) * length // (2 * new_length)


def padding_mask(crop: Crop) -> np.ndarray:
    """bool size x size: true on padding."""
    return padded_and_flipped(np.zeros(crop.inside, dtype=np.uint8), crop, 1).astype(bool)


def strong_view(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Colour jitter (its four parts in random order), grey, blur, each with its chance."""
    if random.random() < JITTER_CHANCE:
        jitter = [(adjust, random.uniform(*bounds)) for adjust, bounds in JITTER.items()]
        for part in random.permutation(len(jitter)):
            adjust, factor = jitter[part]
            image = adjust(image, factor)
    if random.random() < GREY_CHANCE:
        image = adjusted_saturation(image, 0.0)
    if random.random() < BLUR_CHANCE:
        radius = random.uniform(*BLUR_RADIUS)
        image = cv2.GaussianBlur(image, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)
    return image


# Torchvision's adjustments of Pillow images, as in UniMatch, by OpenCV: five times faster, and
# within a grey level of them on average (rounding; Pillow's blur is a threefold box).


def adjusted_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Every channel times `factor`."""
    return cv2.LUT(image, _table(np.arange(256) * factor))


def adjusted_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Distances from the image's mean grey times `factor`."""
    mean = int(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    return cv2.LUT(image, _table(mean + (np.arange(256) - mean) * factor))


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)  # Pillow cuts fractions off too


def adjusted_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Distances from each pixel's grey times `factor`; 0 makes it grey."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def adjusted_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Hue turned by `turn`, -0.5 to 0.5 of the circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


# {part of the colour jitter: least and greatest factor or turn}, in the order of their draws.
JITTER = {
    adjusted_brightness: (0.5, 1.5),
    adjusted_contrast: (0.5, 1.5),
    adjusted_saturation: (0.5, 1.5),
    adjusted_hue: (-0.25, 0.25),
}


def cutmix_box(random: np.random.Generator, size: int) -> np.ndarray:
    """bool size x size, true in one rectangle; with chance 0.5 nowhere. The area, uniform in
    CUTMIX_AREA of the square, is drawn once; shape and place again until the rectangle fits.
    """
    box = np.zeros((size, size), dtype=bool)
    if random.random() > CUTMIX_CHANCE:
        return box
    area = random.uniform(*CUTMIX_AREA) * size * size
    while True:
        ratio = random.uniform(*CUTMIX_RATIO)
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        x, y = random.integers(0, size, 2)
        if x + width <= size and y + height <= size:
            box[y : y + height, x : x + width] = True
            return box


def cutmix_targets(w: dict, mix: dict, box: torch.Tensor) -> dict:
    """Pseudo-labels, confidence and padding of a strong view: of `w`, inside the box of `mix`."""
    names = ("label", "confidence", "ignore")
    return {name: torch.where(box, mix[name], w[name]) for name in names}
