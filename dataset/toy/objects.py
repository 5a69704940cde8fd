"""What the scenes are made of: the classes' colours, a painter that draws picture, labels and
segments at once, and the objects of a street.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from PIL import Image, ImageDraw

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
STYLES = ("source", "target", "random")
SUPERSAMPLING = 2
HEIGHT, WIDTH = 192, 384  # of the benchmark's images

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
# How strongly each class's surface is textured, as a share of its brightness; the others: 0.10.
ROUGH = {VEGETATION: 0.30, TERRAIN: 0.24, WALL: 0.14}
ROUGH |= {POLE: 0.06, LIGHT: 0.04, SIGN: 0.04, SKY: 0.05}
ROUGH |= {CAR: 0.05, TRUCK: 0.05, BUS: 0.05, TRAIN: 0.05, MOTORCYCLE: 0.08, BICYCLE: 0.08}
ROUGHNESS = np.array([ROUGH.get(class_id, 0.10) for class_id in range(19)], np.float32)
GLASS, TYRE, HUB = (58, 70, 84), (30, 30, 32), (140, 140, 144)


class Painter:
    """Draws every shape into the picture, the labels and the segments at once; later shapes occlude
    earlier ones.

    Coordinates are pixels of the supersampled canvas, x to the right, y down; `base` is where an
    object stands; `unit` is one canvas pixel of the benchmark's own size.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator, style: str):
        self.height, self.width, self.rng, self.style = height, width, rng, style
        self.canvas = [Image.new(mode, (width, height)) for mode in ("RGB", "L", "I")]
        self.layers = [ImageDraw.Draw(layer) for layer in self.canvas]
        self.class_id, self.number = 0, 0
        self.unit = height / (HEIGHT * SUPERSAMPLING)

    def pick(self, class_id: int) -> tuple[int, int, int]:
        """A colour for an object of the class, in the scene's style."""
        rng, style, jitter = self.rng, self.style, 24
        if style == "random":
            if rng.random() < 0.5:
                return tuple(int(v) for v in rng.integers(10, 246, 3))
            style, jitter = STYLES[rng.integers(2)], 40
        colours = (SOURCE_COLOURS if style == "source" else TARGET_COLOURS)[class_id]
        colour = colours[rng.integers(len(colours))]
        return tuple(int(np.clip(c + rng.integers(-jitter, jitter + 1), 0, 255)) for c in colour)

    def start(self, class_id: int) -> tuple[int, int, int]:
        """What follows is a new object of this class; its colour."""
        self.class_id, self.number = class_id, self.number + 1
        return self.pick(class_id)

    def _draw(self, method: str, shape, colour, **how) -> None:
        """Into all layers, at whole pixels. shape: x, y, x, y …"""
        shape = [round(value) for value in shape]
        for layer, fill in zip(self.layers, (colour, self.class_id, self.number)):
            getattr(layer, method)(shape, fill=fill, **how)

    def polygon(self, points, colour) -> None:
        self._draw("polygon", chain(*points), colour)

    def trapezium(self, x, y0, half0, y1, half1, colour) -> None:
        """Centred on x, with half a width at each of two heights."""
        self.polygon([(x - half0, y0), (x + half0, y0), (x + half1, y1), (x - half1, y1)], colour)

    def box(self, x0, y0, x1, y1, colour) -> None:
        x0, y0, x1, y1 = map(round, (x0, y0, x1, y1))
        if x1 > x0 and y1 > y0:
            self._draw("rectangle", (x0, y0, x1 - 1, y1 - 1), colour)

    def disc(self, x, y, radius_x, radius_y, colour) -> None:
        around = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self._draw("ellipse", around, colour)

    def line(self, points, width, colour) -> None:
        self._draw("line", chain(*points), colour, width=max(1, round(width)))


def shade(colour, factor):
    return tuple(int(np.clip(c * factor, 0, 255)) for c in colour)


def building(p: Painter, x0, x1, top, base) -> None:
    rng, colour = p.rng, p.start(BUILDING)
    p.box(x0, top, x1, base, colour)
    if rng.random() < 0.4:
        eaves, ridge = 3 * p.unit, ((x0 + x1) / 2, top - (x1 - x0) * 0.25)
        p.polygon([(x0 - eaves, top), (x1 + eaves, top), ridge], shade(colour, 0.7))
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
    bark = shade((92, 70, 52), rng.uniform(0.8, 1.2))
    p.box(x - height * 0.035, base - height * 0.5, x + height * 0.035, base, bark)
    for _ in range(9):
        radius = height * rng.uniform(0.13, 0.22)
        left, up = height * rng.uniform(-0.2, 0.2), height * rng.uniform(0.45, 0.85)
        tall, leaves = radius * rng.uniform(0.8, 1.1), shade(colour, rng.uniform(0.82, 1.18))
        p.disc(x + left, base - up, radius, tall, leaves)


def bush(p: Painter, x0, x1, base, height) -> None:
    rng, colour = p.rng, p.start(VEGETATION)
    count = max(3, int((x1 - x0) / (height * 0.7)) + 1)
    for index in range(count):
        x = x0 + (x1 - x0) * (index + 0.5) / count
        radius = height * rng.uniform(0.5, 0.75)
        tall, leaves = radius * rng.uniform(0.8, 1.2), shade(colour, rng.uniform(0.82, 1.15))
        p.disc(x, base - height * 0.45, radius, tall, leaves)


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
            y, lit = top - tall * 0.3 + tall * 1.2 * (index + 0.5) / 3, rng.random() < 0.5
            p.disc(x, y, half * 0.6, half * 0.6, lamp if lit else shade(lamp, 0.4))
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
            wide, low = half * 1.1, y + half * 0.9
            p.polygon([(x - wide, low), (x + wide, low), (x, y - half)], colour)


def person(p: Painter, x, base, height) -> None:
    rng, colour = p.rng, p.start(PERSON)
    trousers = shade(p.pick(PERSON), 0.6)
    skin = (206, 160, 130) if rng.random() < 0.6 else (120, 84, 62)
    w, step = height * 0.17, height * rng.uniform(0.03, 0.1)
    hip = base - height * 0.5
    left, right = x - step - w * 0.7, x + step + w * 0.7
    p.polygon([(x - w * 0.8, hip), (x + w * 0.1, hip), (x - step, base), (left, base)], trousers)
    p.polygon([(x - w * 0.1, hip), (x + w * 0.8, hip), (right, base), (x + step, base)], trousers)
    p.trapezium(x, base - height * 0.82, w * 1.1, base - height * 0.42, w * 0.9, colour)
    p.disc(x, base - height * 0.9, height * 0.085, height * 0.1, skin)


def two_wheeler(p: Painter, x, base, size, kind: str) -> None:
    rng, motor = p.rng, kind.startswith("motor")
    colour = p.start(MOTORCYCLE if motor else BICYCLE)
    radius, reach = size * (0.24 if motor else 0.27), size * 0.36
    front, axle, tube = 1 if rng.random() < 0.5 else -1, base - radius, max(2 * p.unit, size * 0.05)
    for side in (-1, 1):
        hub = radius * (0.45 if motor else 0.72)
        p.disc(x + side * reach, axle, radius, radius, (34, 34, 36))
        p.disc(x + side * reach, axle, hub, hub, (130, 130, 134) if motor else shade(colour, 1.1))
    if motor:
        upper = [(x - reach, base - radius * 1.5), (x + front * reach * 0.9, base - radius * 2.3)]
        lower = [(x + reach * 0.9, axle), (x - reach * 0.8, base - radius * 0.7)]
        p.polygon(upper + lower, colour)
    else:
        left, right = (x - reach * 0.2, base - radius * 2.1), (x + reach * 0.7, base - radius * 2.1)
        p.line([(x - reach, axle), left, right, (x + reach, axle)], tube, colour)
        p.line([left, (x, axle), right], tube, colour)
    low, high = base - radius * 1.9, base - radius * 2.9
    handlebar = [(x + front * reach * 0.6, low), (x + front * reach * 0.75, high)]
    p.line(handlebar, tube, shade(colour, 0.7))
    if kind.endswith("ist"):
        rider(p, x, base, size, radius, front, motor)


def rider(p: Painter, x, base, size, radius, front: int, motor: bool) -> None:
    """On a two-wheeler whose wheels have this radius; front: 1 to the right, -1 to the left."""
    colour = p.start(RIDER)
    height, seat, lean = size * 1.15, base - radius * 1.7, front * size
    foot, shoulder, chest = base - radius * 0.5, seat - height * 0.5, x + lean * 0.2
    thigh = [(x - size * 0.1, seat), (x + lean * 0.12, seat - height * 0.1)]
    p.polygon([*thigh, (x + lean * 0.14, foot), (x, foot)], shade(colour, 0.55))
    hips = [(x - size * 0.13, seat), (x + size * 0.13, seat)]
    p.polygon([*hips, (chest + size * 0.1, shoulder), (chest - size * 0.12, shoulder)], colour)
    head = shade(colour, 1.3) if motor else (206, 160, 130)
    p.disc(x + lean * 0.24, seat - height * 0.6, size * 0.1, size * 0.11, head)


def wheels(p: Painter, xs, base, radius) -> None:
    for x in xs:
        p.disc(x, base - radius, radius, radius, TYRE)
        p.disc(x, base - radius, radius * 0.45, radius * 0.45, HUB)


def car_end_on(p: Painter, x, base, w) -> None:
    rng, colour, h = p.rng, p.start(CAR), w * 0.78
    p.box(x - w * 0.42, base - h * 0.16, x - w * 0.26, base, TYRE)
    p.box(x + w * 0.26, base - h * 0.16, x + w * 0.42, base, TYRE)
    p.box(x - w * 0.5, base - h * 0.58, x + w * 0.5, base - h * 0.1, colour)
    p.trapezium(x, base - h * 0.55, w * 0.46, base - h, w * 0.34, shade(colour, 0.85))
    p.trapezium(x, base - h * 0.58, w * 0.38, base - h * 0.92, w * 0.29, GLASS)
    lamp = (190, 30, 30) if rng.random() < 0.6 else (240, 236, 200)
    for side in (-1, 1):
        middle = x + side * w * 0.4
        p.box(middle - w * 0.07, base - h * 0.46, middle + w * 0.07, base - h * 0.34, lamp)


def car_from_the_side(p: Painter, x, base, w) -> None:
    rng, colour, h = p.rng, p.start(CAR), w * 0.36
    front = 1 if rng.random() < 0.5 else -1
    sill, glass, roof = base - h * 0.2, base - h * 0.6, base - h * 0.92
    rear = [(x - w * 0.5, sill), (x - w * 0.5, base - h * 0.52)]
    hood = [(x - front * w * 0.02 - w * 0.3, base - h * 0.62), (x + w * 0.3, glass)]
    p.polygon([*rear, *hood, (x + w * 0.5, base - h * 0.48), (x + w * 0.5, sill)], colour)
    left, right = (x - w * 0.36, base - h * 0.58), (x + w * 0.34, base - h * 0.58)
    p.polygon([left, (x - w * 0.22, base - h), (x + w * 0.16, base - h), right], shade(colour, 0.9))
    for a, b, c, d in ((-0.29, -0.19, -0.04, -0.04), (0.01, 0.01, 0.14, 0.27)):
        pane = [(x + w * a, glass), (x + w * b, roof), (x + w * c, roof), (x + w * d, glass)]
        p.polygon(pane, GLASS)
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


def paint_thing(p: Painter, kind: str, x, base, scale) -> None:
    """What stands or drives on the street; scale: 1 is near."""
    rng, uniform, width, height = p.rng, p.rng.uniform, p.width, p.height
    if kind == "car":
        if rng.random() < 0.5 and rng.random() < 0.55:
            car_end_on(p, x, base, width * 0.17 * scale)
        else:
            car_from_the_side(p, x, base, width * 0.20 * scale)
    elif kind == "person":
        person(p, x, base, height * 0.30 * scale * uniform(0.85, 1.1))
    elif kind in ("bicycle", "motorcycle", "cyclist", "motorcyclist"):
        two_wheeler(p, x, base, height * 0.24 * scale, kind)
    elif kind == "truck":
        truck(p, x, base, width * 0.34 * scale)
    elif kind == "bus":
        bus(p, x, base, width * 0.42 * scale)
    elif kind == "tree":
        tree(p, x, base, height * 0.55 * scale * uniform(0.9, 1.3))
    else:
        pole(p, x, base, height * 0.62 * scale * uniform(0.8, 1.2), kind)
