"""The embedded benchmark: procedural street scenes with the 19 Cityscapes classes, in a source and
a target style.

    # images, ground truth and lists under data/toy/s0/
    python -m dataset.toy --seed 0
    python -m dataset.toy --preview images/toy.png      a picture of some scenes of every style

Source scenes are clean and colourful, as a game's, under skies of all weathers. Target scenes are
those of a hazy, faded day: they differ in illumination, colour cast, saturation, palette, texture,
haze, blur, noise, cast shadows, and in how many of which things stand where. A third style,
"random", varies all of this far more widely; only the tiny SAM is trained on it
(scripts/dev/train_sam_tiny.py). A model trained on the source alone loses a good third of its mIoU
on the target, with speckles and confused regions.

The target's ground truth is written for eval.py and for diagnostics: `target_train.txt`, which
everything before evaluation reads, has images only.

Same bytes everywhere: all random numbers come from numpy's PCG64; shapes are filled by Pillow at
integer coordinates at twice the size; noise is random bytes enlarged by Pillow's fixed-point
resampling; what follows is float32 arithmetic of single operations (+, -, x, comparisons), whose
results IEEE 754 fixes, and rounding. No sine, no matrix product.

Needs: util/labels.py, util/run.py, util/pictures.py (for --preview).
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from util.labels import CITYSCAPES_19, write_label, write_list
from util.run import UserError, atomic_path, check_writable, read_json, run_main, write_json

(
    ROAD,
    SIDEWALK,
    BUILDING,
    WALL,
    FENCE,
    POLE,
    LIGHT,
    SIGN,
    VEGETATION,
    TERRAIN,
    SKY,
    PERSON,
    RIDER,
    CAR,
    TRUCK,
    BUS,
    TRAIN,
    MOTORCYCLE,
    BICYCLE,
) = range(19)
STYLES = ("source", "target", "random")
SUPERSAMPLING = 2
HEIGHT, WIDTH = 192, 384  # of the benchmark's images
VERSION = 4  # of what is drawn; a cache made by another version is not used

# Colours of the classes' materials; one is drawn per object and jittered.
SOURCE_COLOURS = {
    ROAD: [(96, 96, 102), (110, 108, 106)],
    SIDEWALK: [(176, 164, 158), (190, 178, 168)],
    BUILDING: [(178, 110, 92), (200, 176, 140), (150, 150, 160), (210, 190, 170), (140, 96, 84)],
    WALL: [(168, 160, 150), (150, 140, 134)],
    FENCE: [(120, 92, 64), (70, 84, 76)],
    POLE: [(88, 92, 96), (70, 72, 76)],
    LIGHT: [(44, 46, 44)],
    SIGN: [(40, 90, 190), (240, 200, 40), (220, 220, 220), (200, 50, 50)],
    VEGETATION: [(66, 128, 58), (88, 142, 62), (56, 110, 66)],
    TERRAIN: [(134, 160, 82), (150, 144, 92)],
    # (blue, overcast, dull, evening: a game's skies change with its weather and hours)
    SKY: [(126, 180, 232), (150, 196, 238), (204, 208, 214), (170, 182, 194), (226, 200, 174)],
    PERSON: [(70, 70, 110), (150, 60, 60), (60, 110, 90), (180, 150, 90)],
    RIDER: [(200, 110, 50), (60, 90, 160), (210, 190, 60)],
    CAR: [
        (190, 40, 44),
        (36, 70, 150),
        (220, 222, 226),
        (40, 42, 46),
        (120, 130, 136),
        (60, 120, 80),
    ],
    TRUCK: [(206, 122, 40), (70, 110, 170), (220, 220, 214)],
    BUS: [(214, 176, 36), (190, 46, 50), (50, 120, 90)],
    TRAIN: [(186, 190, 196), (60, 110, 80), (90, 60, 130)],
    MOTORCYCLE: [(40, 40, 44), (150, 36, 36), (36, 60, 120)],
    BICYCLE: [(40, 44, 50), (170, 50, 60), (50, 130, 150)],
}
TARGET_COLOURS = {
    ROAD: [(102, 98, 98), (100, 98, 97)],
    SIDEWALK: [(163, 154, 147), (181, 168, 155)],
    BUILDING: [(165, 117, 98), (169, 151, 127), (164, 155, 145), (191, 171, 157), (124, 94, 88)],
    WALL: [(155, 144, 130), (154, 144, 136)],
    FENCE: [(111, 93, 74), (90, 93, 79)],
    POLE: [(96, 100, 100), (75, 74, 73)],
    LIGHT: [(47, 47, 42)],
    SIGN: [(48, 88, 175), (227, 191, 52), (208, 208, 206), (187, 54, 52)],
    VEGETATION: [(76, 119, 58), (81, 121, 59), (79, 111, 63)],
    TERRAIN: [(134, 146, 83), (135, 135, 86)],
    SKY: [(149, 184, 217), (170, 196, 216)],
    PERSON: [(66, 65, 93), (129, 64, 60), (79, 107, 92), (129, 116, 86)],
    RIDER: [(169, 95, 51), (64, 86, 138), (183, 167, 69)],
    CAR: [
        (171, 44, 45),
        (44, 71, 132),
        (207, 207, 207),
        (44, 44, 47),
        (117, 123, 126),
        (72, 113, 81),
    ],
    TRUCK: [(192, 132, 71), (78, 107, 152), (189, 166, 155)],
    BUS: [(189, 150, 49), (163, 51, 55), (73, 124, 109)],
    TRAIN: [(172, 171, 170), (79, 95, 74), (90, 76, 118)],
    MOTORCYCLE: [(44, 42, 45), (135, 42, 40), (45, 62, 107)],
    BICYCLE: [(48, 48, 51), (151, 56, 61), (62, 117, 131)],
}
COLOUR_JITTER = {"source": 24, "target": 24, "random": 40}
GLASS, TYRE, HUB = (58, 70, 84), (30, 30, 32), (140, 140, 144)
# How strongly each class's surface is textured, as a share of its brightness.
ROUGHNESS = np.array(
    [
        0.10,
        0.10,
        0.10,
        0.14,
        0.10,
        0.06,
        0.04,
        0.04,
        0.30,
        0.24,
        0.05,
        0.10,
        0.10,
        0.05,
        0.05,
        0.05,
        0.05,
        0.08,
        0.08,
    ],
    np.float32,
)


@dataclass(frozen=True)
class Scene:
    """image: uint8 H x W x 3, RGB. label: uint8 H x W, train IDs 0..18. segment: int32 H x W, one
    number per object: all visible pixels of a thing, of one building, of one tree, of the road …
    """

    image: np.ndarray
    label: np.ndarray
    segment: np.ndarray


class Painter:
    """Draws every shape into the picture, the labels and the segments at once; later shapes occlude
    earlier ones.

    Coordinates are pixels of the supersampled canvas, x to the right, y down; `base` is where an
    object stands.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator, style: str):
        self.height, self.width, self.rng, self.style = height, width, rng, style
        self.image, self.label, self.segment = (
            Image.new(mode, (width, height)) for mode in ("RGB", "L", "I")
        )
        self.layers = [ImageDraw.Draw(layer) for layer in (self.image, self.label, self.segment)]
        self.class_id, self.number = 0, 0
        self.unit = height / (
            HEIGHT * SUPERSAMPLING
        )  # one canvas pixel of the benchmark's own size

    def begin(self, class_id: int) -> None:
        """What follows is a new object of this class."""
        self.class_id, self.number = class_id, self.number + 1

    def pick(self, class_id: int) -> tuple[int, int, int]:
        """A colour for an object of the class, in the scene's style."""
        rng = self.rng
        if self.style == "random" and rng.random() < 0.5:
            return tuple(int(v) for v in rng.integers(10, 246, 3))
        tables = {"source": SOURCE_COLOURS, "target": TARGET_COLOURS}
        table = tables.get(self.style) or (SOURCE_COLOURS, TARGET_COLOURS)[rng.integers(2)]
        colour = table[class_id][rng.integers(len(table[class_id]))]
        jitter = COLOUR_JITTER[self.style]
        return tuple(int(np.clip(c + rng.integers(-jitter, jitter + 1), 0, 255)) for c in colour)

    def start(self, class_id: int) -> tuple[int, int, int]:
        """`begin` and `pick` at once."""
        self.begin(class_id)
        return self.pick(class_id)

    def _draw(self, method: str, shape, colour) -> None:
        for layer, fill in zip(self.layers, (colour, self.class_id, self.number)):
            getattr(layer, method)(shape, fill=fill)

    def polygon(self, points, colour) -> None:
        self._draw("polygon", [(int(round(x)), int(round(y))) for x, y in points], colour)

    def box(self, x0, y0, x1, y1, colour) -> None:
        x0, y0, x1, y1 = (int(round(v)) for v in (x0, y0, x1, y1))
        if x1 > x0 and y1 > y0:
            self._draw("rectangle", (x0, y0, x1 - 1, y1 - 1), colour)

    def disc(self, x, y, radius_x, radius_y, colour) -> None:
        self._draw(
            "ellipse",
            tuple(int(round(v)) for v in (x - radius_x, y - radius_y, x + radius_x, y + radius_y)),
            colour,
        )

    def line(self, points, width, colour) -> None:
        points = [(int(round(x)), int(round(y))) for x, y in points]
        for layer, fill in zip(self.layers, (colour, self.class_id, self.number)):
            layer.line(points, fill=fill, width=max(1, int(round(width))))


def shade(colour, factor):
    return tuple(int(np.clip(c * factor, 0, 255)) for c in colour)


# ------------------------------------------------------------------------------------------ objects


def building(p: Painter, x0, x1, top, base) -> None:
    rng, colour = p.rng, p.start(BUILDING)
    p.box(x0, top, x1, base, colour)
    if rng.random() < 0.4:
        p.polygon(
            [
                (x0 - 3 * p.unit, top),
                (x1 + 3 * p.unit, top),
                ((x0 + x1) / 2, top - (x1 - x0) * 0.25),
            ],
            shade(colour, 0.7),
        )
    else:
        p.box(x0, top, x1, top + 4 * p.unit, shade(colour, 0.75))
    step = max(9 * p.unit, int(p.height * rng.uniform(0.035, 0.06)))
    window = shade(colour, rng.choice([0.55, 0.65, 1.3]))
    width, height = step * rng.uniform(0.4, 0.6), step * rng.uniform(0.45, 0.65)
    y = top + step * 0.7
    while y + height < base - step * 0.6:
        x = x0 + step * 0.4
        while x + width < x1 - 2 * p.unit:
            p.box(x, y, x + width, y + height, window)
            x += step
        y += step * 1.15


def tree(p: Painter, x, base, height) -> None:
    rng, colour = p.rng, p.start(VEGETATION)
    p.box(
        x - height * 0.035,
        base - height * 0.5,
        x + height * 0.035,
        base,
        shade((92, 70, 52), rng.uniform(0.8, 1.2)),
    )
    for _ in range(9):
        radius = height * rng.uniform(0.13, 0.22)
        p.disc(
            x + height * rng.uniform(-0.2, 0.2),
            base - height * rng.uniform(0.45, 0.85),
            radius,
            radius * rng.uniform(0.8, 1.1),
            shade(colour, rng.uniform(0.82, 1.18)),
        )


def bush(p: Painter, x0, x1, base, height) -> None:
    rng, colour = p.rng, p.start(VEGETATION)
    count = max(3, int((x1 - x0) / (height * 0.7)) + 1)
    for index in range(count):
        x = x0 + (x1 - x0) * (index + 0.5) / count
        radius = height * rng.uniform(0.5, 0.75)
        p.disc(
            x,
            base - height * 0.45,
            radius,
            radius * rng.uniform(0.8, 1.2),
            shade(colour, rng.uniform(0.82, 1.15)),
        )


def pole(p: Painter, x, base, height, kind: str) -> None:
    """A pole with an arm ("lamp"), a traffic light ("light") or a traffic sign ("sign")."""
    rng, width, colour = p.rng, max(3 * p.unit, height * 0.035), p.start(POLE)
    top = base - height
    p.box(x - width / 2, top, x + width / 2, base, colour)
    if kind == "lamp":
        side = 1 if rng.random() < 0.5 else -1
        p.line([(x, top), (x + side * height * 0.22, top - height * 0.03)], width, colour)
    if kind == "light":
        housing = p.start(LIGHT)
        half = max(5 * p.unit, height * 0.075)
        tall = half * 2.6
        p.box(x - half, top - tall * 0.3, x + half, top + tall * 0.9, housing)
        for index, lamp in enumerate([(220, 50, 40), (230, 180, 50), (60, 200, 90)]):
            p.disc(
                x,
                top - tall * 0.3 + tall * 1.2 * (index + 0.5) / 3,
                half * 0.6,
                half * 0.6,
                lamp if rng.random() < 0.5 else shade(lamp, 0.4),
            )
    if kind == "sign":
        colour = p.start(SIGN)
        half = max(6 * p.unit, height * rng.uniform(0.09, 0.13))
        y, form = top + half * 0.6, rng.integers(3)
        if form == 0:
            p.disc(x, y, half, half, colour)
            p.disc(x, y, half * 0.6, half * 0.6, shade(colour, 1.5))
        elif form == 1:
            p.box(x - half, y - half, x + half, y + half, colour)
            p.box(x - half * 0.55, y - half * 0.3, x + half * 0.55, y + half * 0.3, (235, 235, 235))
        else:
            p.polygon(
                [(x - half * 1.1, y + half * 0.9), (x + half * 1.1, y + half * 0.9), (x, y - half)],
                colour,
            )


def person(p: Painter, x, base, height) -> None:
    rng, colour = p.rng, p.start(PERSON)
    trousers = shade(p.pick(PERSON), 0.6)
    skin = (206, 160, 130) if rng.random() < 0.6 else (120, 84, 62)
    w, step = height * 0.17, height * rng.uniform(0.03, 0.1)
    hip = base - height * 0.5
    p.polygon(
        [(x - w * 0.8, hip), (x + w * 0.1, hip), (x - step, base), (x - step - w * 0.7, base)],
        trousers,
    )
    p.polygon(
        [(x - w * 0.1, hip), (x + w * 0.8, hip), (x + step + w * 0.7, base), (x + step, base)],
        trousers,
    )
    shoulder, waist = base - height * 0.82, base - height * 0.42
    p.polygon(
        [
            (x - w * 1.1, shoulder),
            (x + w * 1.1, shoulder),
            (x + w * 0.9, waist),
            (x - w * 0.9, waist),
        ],
        colour,
    )
    p.disc(x, base - height * 0.9, height * 0.085, height * 0.1, skin)


def two_wheeler(p: Painter, x, base, size, motor: bool, ridden: bool) -> None:
    rng = p.rng
    colour = p.start(MOTORCYCLE if motor else BICYCLE)
    radius, reach = size * (0.24 if motor else 0.27), size * 0.36
    front = 1 if rng.random() < 0.5 else -1
    for side in (-1, 1):
        p.disc(x + side * reach, base - radius, radius, radius, (34, 34, 36))
        if motor:
            p.disc(x + side * reach, base - radius, radius * 0.45, radius * 0.45, (130, 130, 134))
        else:
            p.disc(
                x + side * reach, base - radius, radius * 0.72, radius * 0.72, shade(colour, 1.1)
            )
    if motor:
        p.polygon(
            [
                (x - reach, base - radius * 1.5),
                (x + front * reach * 0.9, base - radius * 2.3),
                (x + reach * 0.9, base - radius),
                (x - reach * 0.8, base - radius * 0.7),
            ],
            colour,
        )
    else:
        tube, seat = max(2 * p.unit, size * 0.05), base - radius * 2.1
        p.line(
            [
                (x - reach, base - radius),
                (x - reach * 0.2, seat),
                (x + reach * 0.7, seat),
                (x + reach, base - radius),
            ],
            tube,
            colour,
        )
        p.line([(x - reach * 0.2, seat), (x, base - radius), (x + reach * 0.7, seat)], tube, colour)
    p.line(
        [
            (x + front * reach * 0.6, base - radius * 1.9),
            (x + front * reach * 0.75, base - radius * 2.9),
        ],
        max(2 * p.unit, size * 0.05),
        shade(colour, 0.7),
    )
    if ridden:
        colour = p.start(RIDER)
        height, seat, lean = size * 1.15, base - radius * 1.7, front * size
        p.polygon(
            [
                (x - size * 0.1, seat),
                (x + lean * 0.12, seat - height * 0.1),
                (x + lean * 0.14, base - radius * 0.5),
                (x, base - radius * 0.5),
            ],
            shade(colour, 0.55),
        )
        p.polygon(
            [
                (x - size * 0.13, seat),
                (x + size * 0.13, seat),
                (x + lean * 0.2 + size * 0.1, seat - height * 0.5),
                (x + lean * 0.2 - size * 0.12, seat - height * 0.5),
            ],
            colour,
        )
        p.disc(
            x + lean * 0.24,
            seat - height * 0.6,
            size * 0.1,
            size * 0.11,
            shade(colour, 1.3) if motor else (206, 160, 130),
        )


def wheels(p: Painter, xs, base, radius) -> None:
    for x in xs:
        p.disc(x, base - radius, radius, radius, TYRE)
        p.disc(x, base - radius, radius * 0.45, radius * 0.45, HUB)


def car_end_on(p: Painter, x, base, w) -> None:
    rng, colour, h = p.rng, p.start(CAR), w * 0.78
    p.box(x - w * 0.42, base - h * 0.16, x - w * 0.26, base, TYRE)
    p.box(x + w * 0.26, base - h * 0.16, x + w * 0.42, base, TYRE)
    p.box(x - w * 0.5, base - h * 0.58, x + w * 0.5, base - h * 0.1, colour)
    p.polygon(
        [
            (x - w * 0.46, base - h * 0.55),
            (x + w * 0.46, base - h * 0.55),
            (x + w * 0.34, base - h),
            (x - w * 0.34, base - h),
        ],
        shade(colour, 0.85),
    )
    p.polygon(
        [
            (x - w * 0.38, base - h * 0.58),
            (x + w * 0.38, base - h * 0.58),
            (x + w * 0.29, base - h * 0.92),
            (x - w * 0.29, base - h * 0.92),
        ],
        GLASS,
    )
    lamp = (190, 30, 30) if rng.random() < 0.6 else (240, 236, 200)
    for side in (-1, 1):
        p.box(
            x + side * w * 0.4 - w * 0.07,
            base - h * 0.46,
            x + side * w * 0.4 + w * 0.07,
            base - h * 0.34,
            lamp,
        )


def car_from_the_side(p: Painter, x, base, w) -> None:
    rng, colour, h = p.rng, p.start(CAR), w * 0.36
    front = 1 if rng.random() < 0.5 else -1
    p.polygon(
        [
            (x - w * 0.5, base - h * 0.2),
            (x - w * 0.5, base - h * 0.52),
            (x - front * w * 0.02 - w * 0.3, base - h * 0.62),
            (x + w * 0.3, base - h * 0.6),
            (x + w * 0.5, base - h * 0.48),
            (x + w * 0.5, base - h * 0.2),
        ],
        colour,
    )
    p.polygon(
        [
            (x - w * 0.36, base - h * 0.58),
            (x - w * 0.22, base - h),
            (x + w * 0.16, base - h),
            (x + w * 0.34, base - h * 0.58),
        ],
        shade(colour, 0.9),
    )
    p.polygon(
        [
            (x - w * 0.29, base - h * 0.6),
            (x - w * 0.19, base - h * 0.92),
            (x - w * 0.04, base - h * 0.92),
            (x - w * 0.04, base - h * 0.6),
        ],
        GLASS,
    )
    p.polygon(
        [
            (x + w * 0.01, base - h * 0.6),
            (x + w * 0.01, base - h * 0.92),
            (x + w * 0.14, base - h * 0.92),
            (x + w * 0.27, base - h * 0.6),
        ],
        GLASS,
    )
    wheels(p, (x - w * 0.29, x + w * 0.29), base, h * 0.24)


def truck(p: Painter, x, base, w) -> None:
    rng, colour = p.rng, p.start(TRUCK)
    cargo, h = p.pick(TRUCK), w * 0.55
    front = 1 if rng.random() < 0.5 else -1
    cab = sorted((x + front * w * 0.22, x + front * w * 0.5))
    rear = sorted((x - front * w * 0.5, x + front * w * 0.2))
    p.box(rear[0], base - h, rear[1], base - h * 0.18, cargo)
    p.box(rear[0], base - h * 0.2, rear[1], base - h * 0.12, shade(cargo, 0.5))
    p.box(cab[0], base - h * 0.8, cab[1], base - h * 0.12, colour)
    p.box(cab[0] + w * 0.06, base - h * 0.74, cab[1] - w * 0.03, base - h * 0.48, GLASS)
    p.box(x - w * 0.4, base - h * 0.22, x + w * 0.4, base - h * 0.1, (60, 60, 62))
    wheels(p, (x - front * w * 0.36, x - front * w * 0.2, x + front * w * 0.36), base, h * 0.15)


def bus(p: Painter, x, base, w) -> None:
    colour, h = p.start(BUS), w * 0.38
    p.box(x - w * 0.5, base - h, x + w * 0.5, base - h * 0.12, colour)
    p.box(x - w * 0.5, base - h, x + w * 0.5, base - h * 0.93, shade(colour, 1.25))
    for index in range(6):
        left = x - w * 0.47 + w * 0.94 * index / 6
        p.box(left, base - h * 0.85, left + w * 0.125, base - h * 0.5, GLASS)
    p.box(x - w * 0.5, base - h * 0.34, x + w * 0.5, base - h * 0.28, shade(colour, 0.7))
    wheels(p, (x - w * 0.32, x + w * 0.3), base, h * 0.17)


def train(p: Painter, x0, x1, base, h) -> None:
    colour = p.start(TRAIN)
    stripe = p.pick(TRAIN)
    p.box(x0, base - h, x1, base - h * 0.08, colour)
    p.box(x0, base - h, x1, base - h * 0.9, shade(colour, 0.6))
    p.box(x0, base - h * 0.36, x1, base - h * 0.22, stripe)
    x = x0 + h * 0.15
    while x + h * 0.5 < x1:
        p.box(x, base - h * 0.8, x + h * 0.42, base - h * 0.48, GLASS)
        x += h * 0.6
    p.box(x0, base - h * 0.1, x1, base, (50, 48, 48))


def fence(p: Painter, x0, x1, base, h) -> None:
    colour = p.start(FENCE)
    p.box(x0, base - h, x1, base, shade(colour, 0.62))
    step, x = max(5 * p.unit, h * 0.28), x0
    while x < x1:
        p.box(x, base - h, min(x + step * 0.5, x1), base, colour)
        x += step
    p.box(x0, base - h * 0.85, x1, base - h * 0.72, shade(colour, 1.15))
    p.box(x0, base - h * 0.3, x1, base - h * 0.18, shade(colour, 1.15))


def wall(p: Painter, x0, x1, base, h) -> None:
    colour = p.start(WALL)
    p.box(x0, base - h, x1, base, colour)
    p.box(x0, base - h, x1, base - h * 0.86, shade(colour, 1.2))
    y = base - h * 0.7
    while y < base:
        p.box(x0, y, x1, y + 2 * p.unit, shade(colour, 0.82))
        y += max(5 * p.unit, h * 0.22)


# ------------------------------------------------------------------------------------------- scenes


def draw_scene(seed: int, style: str, height: int = HEIGHT, width: int = WIDTH) -> Scene:
    """One scene. style: source, target or random. Each (style, seed) is another scene; any size
    shows the same one, apart from details of a few pixels.
    """
    rng = np.random.default_rng([STYLES.index(style), seed])
    uniform = rng.uniform
    H, W = height * SUPERSAMPLING, width * SUPERSAMPLING
    p = Painter(H, W, rng, style)
    # Layout statistics go from the source's (0) to the target's (1).
    layout = {"source": 0.0, "target": 1.0, "random": rng.random()}[style]

    def between(source, target):
        return source + (target - source) * layout

    horizon = H * uniform(between(0.40, 0.34), between(0.48, 0.46))
    vanishing = W * uniform(0.38, 0.62)

    def ground(t):  # t: 0 at the horizon, 1 at the bottom edge
        return horizon + (H - horizon) * t

    sky = p.start(SKY)
    p.box(0, 0, W, H, sky)
    picture = p.layers[0]
    band = max(1, round(4 * p.unit))
    for y in range(0, int(horizon), band):
        picture.rectangle((0, y, W, y + band), fill=shade(sky, 1 + 0.22 * (y / horizon - 0.4)))
    for _ in range(rng.integers(0, 5)):
        x, y = W * uniform(0, 1), horizon * uniform(0.08, 0.6)
        for _ in range(5):
            left, top, right, bottom = (
                uniform(-60, 40),
                uniform(-8, 6),
                uniform(50, 110),
                uniform(10, 26),
            )
            cloud = (x + left * p.unit, y + top * p.unit, x + right * p.unit, y + bottom * p.unit)
            picture.ellipse(tuple(int(v) for v in cloud), fill=shade(sky, uniform(1.08, 1.25)))
    if rng.random() < between(0.5, 0.8):
        bush(p, -20 * p.unit, W + 20 * p.unit, horizon + H * 0.03, H * uniform(0.05, 0.12))

    # The ground on both sides of the road: sidewalk or terrain, perhaps with a strip of the other.
    half = W * uniform(between(0.42, 0.34), between(0.62, 0.52))
    far, pavement = W * uniform(0.008, 0.03), W * uniform(0.10, 0.26)

    def road_left(t):
        return vanishing - far - half * t

    def road_right(t):
        return vanishing + far + half * t

    for side in (-1, 1):
        outer = TERRAIN if rng.random() < between(0.25, 0.5) else SIDEWALK
        edge = 0 if side < 0 else W
        colour = p.start(outer)
        p.polygon(
            [
                (vanishing, horizon),
                (edge + side * W * 0.6, horizon),
                (edge + side * W * 0.6, H),
                (vanishing, H),
            ],
            colour,
        )
        if outer == TERRAIN and rng.random() < 0.7:
            x0, x1 = vanishing + side * far, vanishing + side * (far + half)
            p.polygon(
                [
                    (x0, horizon),
                    (x0 + side * far * 1.5, horizon),
                    (x1 + side * pavement * 1.4, H),
                    (x1, H),
                ],
                p.start(SIDEWALK),
            )
        elif outer == SIDEWALK and rng.random() < 0.35:
            x0, x1 = vanishing + side * far, vanishing + side * (far + half + pavement)
            p.polygon(
                [(x0, horizon), (x0 + side * far * 2, horizon), (x1 + side * W * 0.5, H), (x1, H)],
                p.start(TERRAIN),
            )

    # What lines the street, from far to near on each side.
    for side in (-1, 1):
        x, t = vanishing + side * W * uniform(0.02, 0.10), uniform(0.03, 0.08)
        while 0 < x < W:
            length = W * uniform(0.07, 0.2)
            base, end, kind = ground(t), x + side * length, rng.random()
            left, right = min(x, end), max(x, end)
            tall = H * uniform(0.14, 0.36) * (0.6 + 2.0 * t)
            if kind < between(0.62, 0.45):
                building(p, left, right, max(4 * p.unit, base - tall), base)
            elif kind < between(0.78, 0.72):
                for _ in range(rng.integers(1, 4)):
                    tree(
                        p,
                        uniform(left, right),
                        base + H * uniform(0, 0.02),
                        H * uniform(0.16, 0.34),
                    )
            elif kind < between(0.88, 0.82):
                bush(p, left, right, base, H * uniform(0.05, 0.1))
            x, t = end + side * W * uniform(-0.005, 0.02), t + uniform(0.01, 0.05)
        if rng.random() < 0.45:
            t = uniform(0.1, 0.22)
            start = vanishing + side * W * uniform(0.12, 0.25)
            end = start + side * W * uniform(0.18, 0.4)
            barrier = wall if rng.random() < between(0.5, 0.4) else fence
            barrier(
                p,
                min(start, end),
                max(start, end),
                ground(t),
                H * uniform(0.05, 0.10) * (0.7 + 1.5 * t),
            )
    if rng.random() < 0.09:
        start = vanishing + W * uniform(-0.5, 0.1)
        train(
            p,
            start,
            start + W * uniform(0.35, 0.7),
            ground(uniform(0.1, 0.18)),
            H * uniform(0.10, 0.15),
        )

    asphalt = p.start(ROAD)
    p.polygon(
        [
            (road_left(0), horizon + 1),
            (road_right(0), horizon + 1),
            (road_right(1), H),
            (road_left(1), H),
        ],
        asphalt,
    )
    for index in range(9):
        t0, t1 = (index / 9) ** 1.8 + 0.02, ((index + 0.45) / 9) ** 1.8 + 0.02
        p.polygon(
            [
                (vanishing - 5 * t0 * p.unit, ground(t0)),
                (vanishing + 5 * t0 * p.unit, ground(t0)),
                (vanishing + 6 * t1 * p.unit, ground(t1)),
                (vanishing - 6 * t1 * p.unit, ground(t1)),
            ],
            shade(asphalt, 1.7),
        )

    # What stands or drives there, painted from far to near.
    objects = []

    def place(kind, t, x):
        objects.append((t, len(objects), kind, x))

    def on_road(t):
        return uniform(road_left(t) + W * 0.04 * t, road_right(t) - W * 0.04 * t)

    def beside(t):
        side = 1 if rng.random() < 0.5 else -1
        return vanishing + side * (far + half * t + W * uniform(0.02, 0.22) * (t + 0.15))

    for _ in range(rng.integers(1, 6)):
        t = uniform(0.1, 0.85)
        place("car", t, on_road(t) if rng.random() < 0.8 else beside(t))
    for _ in range(rng.poisson(between(3.0, 4.5))):
        t = uniform(0.1, 0.8)
        place("person", t, beside(t) if rng.random() < 0.85 else on_road(t))
    if rng.random() < 0.3:  # a crowd
        t = uniform(0.12, 0.45)
        x = beside(t)
        for _ in range(rng.integers(3, 7)):
            place("person", t + uniform(-0.02, 0.02), x + W * uniform(-0.04, 0.04))
    for kind, mean, where in (
        ("bicycle", between(1.0, 1.6), beside),
        ("motorcycle", 0.30, on_road),
        ("cyclist", 0.45, on_road),
        ("motorcyclist", 0.16, on_road),
    ):
        for _ in range(rng.poisson(mean)):
            t = uniform(0.15, 0.85 if kind == "bicycle" else 0.8)
            place(kind, t, where(t))
    for kind, nearest in (("truck", 0.6), ("bus", 0.55)):
        if rng.random() < 0.2:
            t = uniform(0.15, nearest)
            place(kind, t, on_road(t))
    for kind in ("lamp", "light", "sign"):
        for _ in range(rng.poisson(1.3)):
            t = uniform(0.05, 0.6)
            place(kind, t, beside(t))
    for _ in range(rng.poisson(0.8)):
        t = uniform(0.1, 0.5)
        place("tree", t, beside(t + 0.15))

    for t, _, kind, x in sorted(objects):
        y, scale = ground(t), 0.25 + 0.95 * t
        if kind == "car":
            if rng.random() < 0.5 and rng.random() < 0.55:
                car_end_on(p, x, y, W * 0.17 * scale)
            else:
                car_from_the_side(p, x, y, W * 0.20 * scale)
        elif kind == "person":
            person(p, x, y, H * 0.30 * scale * uniform(0.85, 1.1))
        elif kind in ("bicycle", "motorcycle", "cyclist", "motorcyclist"):
            two_wheeler(p, x, y, H * 0.24 * scale, kind.startswith("motor"), kind.endswith("ist"))
        elif kind == "truck":
            truck(p, x, y, W * 0.34 * scale)
        elif kind == "bus":
            bus(p, x, y, W * 0.42 * scale)
        elif kind == "tree":
            tree(p, x, y, H * 0.55 * scale * uniform(0.9, 1.3))
        else:
            pole(p, x, y, H * 0.62 * scale * uniform(0.8, 1.2), kind)
    return _rendered(p, horizon)


def noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Smooth noise in -1..1 in steps of 1/128, float32 H x W; `cell` is the distance of its random
    values in pixels.
    """
    coarse = rng.integers(
        0, 256, (max(2, -(-height // cell)), max(2, -(-width // cell))), dtype=np.uint8
    )
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(fine).astype(np.float32) - 128) / 128


def _rendered(p: Painter, horizon: float) -> Scene:
    """The canvas at its final size, with texture, light, colour, haze, blur and grain of the
    style.
    """
    rng, style = p.rng, p.style
    uniform = rng.uniform
    picture = np.asarray(p.image.reduce(SUPERSAMPLING)).astype(np.float32)
    middle = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
    label = np.asarray(p.label)[middle, middle].astype(np.uint8)
    segment = np.asarray(p.segment)[middle, middle].astype(np.int32)
    h, w = label.shape

    strength = {"source": 0.7, "target": 1.0, "random": uniform(0.2, 2.2)}[style]
    cell = max(1, h // 96)
    texture = (
        0.6 * noise(rng, h, w, cell)
        + 0.5 * noise(rng, h, w, 3 * cell)
        + 0.5 * noise(rng, h, w, 10 * cell)
    )
    picture *= (1 + strength * ROUGHNESS[label] * texture)[..., None]
    if style == "source":
        gain, cast = uniform(0.8, 1.15), tuple(uniform(0.96, 1.04, 3))
        saturation, haze, grain = uniform(0.8, 1.2), uniform(0, 0.12), uniform(1, 4)
        blur, shadow, contrast = 0.0, uniform(0, 0.12), uniform(0.9, 1.1)
    elif style == "target":
        gain, cast = (
            uniform(0.75, 0.98),
            (uniform(1, 1.07), uniform(0.98, 1.04), uniform(0.90, 0.99)),
        )
        saturation, haze, grain = uniform(0.45, 0.75), uniform(0.10, 0.30), uniform(2, 6)
        blur, shadow, contrast = uniform(0, 0.6), uniform(0.08, 0.26), uniform(0.82, 1.0)
    else:
        gain, cast = uniform(0.5, 1.25), tuple(uniform(0.75, 1.2, 3))
        saturation, haze, grain = uniform(0.2, 1.4), uniform(0, 0.45), uniform(0, 12)
        blur = uniform(0, 1.0) if rng.random() < 0.6 else 0.0
        shadow, contrast = uniform(0, 0.35), uniform(0.7, 1.2)
    if shadow:
        picture *= (1 - shadow * ((noise(rng, h, w, max(8, h // 4)) > 0.1) & (label != SKY)))[
            ..., None
        ]
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + (picture - grey) * np.float32(saturation)
    picture = (picture - 118) * np.float32(contrast) + 118
    picture = picture * np.float32(gain) * np.array(cast, np.float32)
    rows = np.arange(h, dtype=np.float32)[:, None] / h
    depth = np.clip(1 - np.abs(rows - horizon / (SUPERSAMPLING * h)) * 2.2, 0, 1)[..., None]
    fog = np.array([200, 198, 194], np.float32) * np.float32(gain)
    picture = picture + (fog - picture) * np.float32(haze) * (0.35 + 0.65 * depth)
    image = Image.fromarray(np.clip(np.round(picture), 0, 255).astype(np.uint8))
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * h / 192))
    speckle = rng.integers(-128, 128, (h, w, 3), dtype=np.int16) * int(round(grain * 1.7)) // 128
    return Scene(
        np.clip(np.asarray(image).astype(np.int16) + speckle, 0, 255).astype(np.uint8),
        label,
        segment,
    )


# ----------------------------------------------------------------------------------------- data set

# (domain, split): number of scenes. Each scene's own seed is built from (data seed, split, index),
# see `scene_seed`.
SPLITS = {("source", "train"): 600, ("target", "train"): 60, ("target", "val"): 80}
# Seeds from here on are never used for the benchmark: scripts/dev/train_sam_tiny.py takes its
# scenes from there.
FIRST_FREE_SEED = 10_000_000


def scene_seed(seed: int, split: str, index: int) -> int:
    """Data seeds 0..99, at most 10,000 scenes of a split: no two scenes of one style share a
    seed.
    """
    return seed * 100_000 + ("train", "val").index(split) * 10_000 + index


def _write_scene(folder: Path, domain: str, split: str, seed: int, index: int) -> None:
    """Draw and save one scene, unless both files are there."""
    image_path = folder / domain / split / "images" / f"{index:05d}.png"
    label_path = folder / domain / split / "gt" / f"{index:05d}.png"
    if image_path.is_file() and label_path.is_file():
        return
    scene = draw_scene(scene_seed(seed, split, index), domain)
    with atomic_path(image_path) as temporary:
        Image.fromarray(scene.image).save(temporary, format="PNG", compress_level=1)
    write_label(label_path, scene.label, CITYSCAPES_19.palette)


def make_toy(
    root: Path, seed: int, sizes: dict[tuple[str, str], int] | None = None, processes: int = 2
) -> Path:
    """Make the benchmark of a data seed under `<root>/toy/s<seed>/`, or finish it; returns that
    folder.

    Writes `<domain>/<split>/images/*.png`, `<domain>/<split>/gt/*.png` and, in `lists/`,
    source_train.txt (image and label), target_train.txt (image only), target_train_gt.txt and
    target_val.txt (image and label; for evaluation and diagnostics). Paths in the lists are
    relative to `root`.
    """
    sizes = sizes or SPLITS
    if not 0 <= seed < 100:
        raise UserError(f"--seed {seed}: data seeds run from 0 to 99")
    folder = root / "toy" / f"s{seed}"
    made = {
        "version": VERSION,
        "seed": seed,
        "size": [HEIGHT, WIDTH],
        "scenes": {f"{domain}/{split}": count for (domain, split), count in sizes.items()},
    }
    marker = folder / "made.json"
    if marker.is_file():
        if read_json(marker) == made:
            return folder
        raise UserError(
            f"{folder}: holds scenes of another version or number; delete the folder and start"
            " again"
        )
    check_writable(folder)
    # The lists come first: they say what an unfinished folder is to become.
    for (domain, split), count in sizes.items():
        base = f"toy/s{seed}/{domain}/{split}"
        rows = [(f"{base}/images/{i:05d}.png", f"{base}/gt/{i:05d}.png") for i in range(count)]
        lists = {f"{domain}_{split}": rows}
        if (domain, split) == ("target", "train"):
            lists = {"target_train": [(image,) for image, _ in rows], "target_train_gt": rows}
        for name, content in lists.items():
            write_list(folder / "lists" / f"{name}.txt", content)
    with (
        ProcessPoolExecutor(processes) as pool,
        tqdm(total=sum(sizes.values()), desc="drawing", unit="img") as bar,
    ):
        for (domain, split), count in sizes.items():
            for _ in pool.map(
                partial(_write_scene, folder, domain, split, seed), range(count), chunksize=8
            ):
                bar.update()
    write_json(marker, made)
    return folder


def preview(path: Path, rows: int = 4) -> None:
    """A picture of the first scenes of every style, each beside its labels."""
    from util.pictures import colour_label, contact_sheet, save_picture

    sheet = []
    for index in range(rows):
        scenes = [draw_scene(scene_seed(0, "train", index), style) for style in STYLES]
        sheet.append(
            [
                tile
                for scene in scenes
                for tile in (scene.image, colour_label(scene.label, CITYSCAPES_19.palette))
            ]
        )
    titles = [title for style in STYLES for title in (f"{style} style", "labels")]
    save_picture(path, contact_sheet(sheet, titles, legend=CITYSCAPES_19))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Makes the embedded benchmark.")
    parser.add_argument("--seed", type=int, default=0, help="data seed, 0 to 99 (default: 0)")
    parser.add_argument(
        "--root-path",
        type=Path,
        default=Path("data"),
        help="folder for toy/s<seed>/ (default: data)",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        nargs=3,
        metavar=("SOURCE", "TARGET", "VAL"),
        default=[SPLITS[key] for key in SPLITS],
        help=(
            "number of source training, target training and target validation scenes, 1 to 10000 "
            f"(default: {' '.join(map(str, SPLITS.values()))})"
        ),
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="PNG",
        help="only draw a picture of some scenes to this file",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    if args.preview:
        preview(args.preview)
    else:
        if not all(1 <= count <= 10_000 for count in args.scenes):
            raise UserError(
                f"--scenes {' '.join(map(str, args.scenes))}: give three numbers from 1 to 10000"
            )
        make_toy(args.root_path, args.seed, dict(zip(SPLITS, args.scenes)))


if __name__ == "__main__":
    sys.exit(run_main(main))
