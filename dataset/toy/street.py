"""A whole scene: the street, what lines it, what stands and drives there, and the style's light."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from PIL import Image, ImageFilter

from dataset.toy import objects
from dataset.toy.objects import HEIGHT, SKY, STYLES, SUPERSAMPLING, WIDTH, Painter, shade


@dataclass(frozen=True)
class Scene:
    """image: uint8 H x W x 3, RGB. label: uint8 H x W, train IDs 0..18. segment: int32 H x W, one
    number per object: all visible pixels of a thing, of one building, of one tree, of the road …
    """

    image: np.ndarray
    label: np.ndarray
    segment: np.ndarray


class Street:
    """Where ground and road lie, on a canvas of W x H pixels. t: 0 at the horizon, 1 at the bottom
    edge. The random numbers are drawn in a fixed order, which the scenes depend on.
    """

    def __init__(self, p: Painter, layout: float):
        """layout: statistics of the source's streets (0) to those of the target's (1)."""
        self.p, self.layout, self.W, self.H = p, layout, p.width, p.height
        uniform = p.rng.uniform
        self.horizon = self.H * uniform(self.between(0.40, 0.34), self.between(0.48, 0.46))
        self.vanishing = self.W * uniform(0.38, 0.62)

    def lay_road(self) -> None:
        uniform = self.p.rng.uniform
        self.half = self.W * uniform(self.between(0.42, 0.34), self.between(0.62, 0.52))
        self.far, self.pavement = self.W * uniform(0.008, 0.03), self.W * uniform(0.10, 0.26)

    def between(self, source, target):
        return source + (target - source) * self.layout

    def ground(self, t):
        return self.horizon + (self.H - self.horizon) * t

    def edge(self, t, side):
        """x of the road's left (-1) or right (1) edge."""
        return self.vanishing + side * self.far + side * self.half * t

    def on_road(self, t):
        """A random x on the road."""
        margin = self.W * 0.04 * t
        return self.p.rng.uniform(self.edge(t, -1) + margin, self.edge(t, 1) - margin)

    def beside(self, t):
        """A random x beside the road."""
        side = 1 if self.p.rng.random() < 0.5 else -1
        offset = self.W * self.p.rng.uniform(0.02, 0.22) * (t + 0.15)
        return self.vanishing + side * (self.far + self.half * t + offset)


def paint_sky(s: Street) -> None:
    """Sky with clouds, perhaps bushes along the horizon."""
    p, rng, uniform = s.p, s.p.rng, s.p.rng.uniform
    sky = p.start(SKY)
    p.box(0, 0, s.W, s.H, sky)
    picture = p.layers[0]
    band = max(1, round(4 * p.unit))
    for y in range(0, int(s.horizon), band):
        picture.rectangle((0, y, s.W, y + band), fill=shade(sky, 1 + 0.22 * (y / s.horizon - 0.4)))
    for _ in range(rng.integers(0, 5)):
        x, y = s.W * uniform(0, 1), s.horizon * uniform(0.08, 0.6)
        for _ in range(5):
            left, top = uniform(-60, 40), uniform(-8, 6)
            right, bottom = uniform(50, 110), uniform(10, 26)
            cloud = (x + left * p.unit, y + top * p.unit, x + right * p.unit, y + bottom * p.unit)
            picture.ellipse(tuple(int(v) for v in cloud), fill=shade(sky, uniform(1.08, 1.25)))
    if rng.random() < s.between(0.5, 0.8):
        height = s.H * uniform(0.05, 0.12)
        objects.bush(p, -20 * p.unit, s.W + 20 * p.unit, s.horizon + s.H * 0.03, height)


def paint_ground(s: Street) -> None:
    """Both sides of the road: sidewalk or terrain, perhaps with a strip of the other."""
    p, rng, horizon, vanishing, W, H = s.p, s.p.rng, s.horizon, s.vanishing, s.W, s.H
    for side in (-1, 1):
        outer = objects.TERRAIN if rng.random() < s.between(0.25, 0.5) else objects.SIDEWALK
        edge = (0 if side < 0 else W) + side * W * 0.6
        corners = [(vanishing, horizon), (edge, horizon), (edge, H), (vanishing, H)]
        p.polygon(corners, p.start(outer))
        if outer == objects.TERRAIN and rng.random() < 0.7:
            x0, x1 = vanishing + side * s.far, vanishing + side * (s.far + s.half)
            outer0, outer1 = x0 + side * s.far * 1.5, x1 + side * s.pavement * 1.4
            strip = [(x0, horizon), (outer0, horizon), (outer1, H), (x1, H)]
            p.polygon(strip, p.start(objects.SIDEWALK))
        elif outer == objects.SIDEWALK and rng.random() < 0.35:
            x0, x1 = vanishing + side * s.far, vanishing + side * (s.far + s.half + s.pavement)
            outer0, outer1 = x0 + side * s.far * 2, x1 + side * W * 0.5
            strip = [(x0, horizon), (outer0, horizon), (outer1, H), (x1, H)]
            p.polygon(strip, p.start(objects.TERRAIN))


def line_side(s: Street, side: int) -> None:
    """What lines one side of the street (-1: left, 1: right), from far to near."""
    p, rng, uniform, W, H = s.p, s.p.rng, s.p.rng.uniform, s.W, s.H
    x, t = s.vanishing + side * W * uniform(0.02, 0.10), uniform(0.03, 0.08)
    while 0 < x < W:
        length = W * uniform(0.07, 0.2)
        base, end, kind = s.ground(t), x + side * length, rng.random()
        left, right = min(x, end), max(x, end)
        tall = H * uniform(0.14, 0.36) * (0.6 + 2.0 * t)
        if kind < s.between(0.62, 0.45):
            objects.building(p, left, right, max(4 * p.unit, base - tall), base)
        elif kind < s.between(0.78, 0.72):
            for _ in range(rng.integers(1, 4)):
                x_tree, base_tree = uniform(left, right), base + H * uniform(0, 0.02)
                objects.tree(p, x_tree, base_tree, H * uniform(0.16, 0.34))
        elif kind < s.between(0.88, 0.82):
            objects.bush(p, left, right, base, H * uniform(0.05, 0.1))
        x, t = end + side * W * uniform(-0.005, 0.02), t + uniform(0.01, 0.05)
    if rng.random() < 0.45:
        t = uniform(0.1, 0.22)
        start = s.vanishing + side * W * uniform(0.12, 0.25)
        end = start + side * W * uniform(0.18, 0.4)
        barrier = objects.wall if rng.random() < s.between(0.5, 0.4) else objects.fence
        height = H * uniform(0.05, 0.10) * (0.7 + 1.5 * t)
        barrier(p, min(start, end), max(start, end), s.ground(t), height)


def paint_train(s: Street) -> None:
    """Seldom: a train across the street."""
    uniform = s.p.rng.uniform
    if s.p.rng.random() < 0.09:
        start = s.vanishing + s.W * uniform(-0.5, 0.1)
        end, base = start + s.W * uniform(0.35, 0.7), s.ground(uniform(0.1, 0.18))
        objects.train(s.p, start, end, base, s.H * uniform(0.10, 0.15))


def paint_road(s: Street) -> None:
    """Asphalt and its middle line."""
    p, vanishing, ground = s.p, s.vanishing, s.ground
    asphalt = p.start(objects.ROAD)
    top = [(s.edge(0, -1), s.horizon + 1), (s.edge(0, 1), s.horizon + 1)]
    p.polygon([*top, (s.edge(1, 1), s.H), (s.edge(1, -1), s.H)], asphalt)
    for index in range(9):
        t0, t1 = (index / 9) ** 1.8 + 0.02, ((index + 0.45) / 9) ** 1.8 + 0.02
        half0, half1 = 5 * t0 * p.unit, 6 * t1 * p.unit
        p.trapezium(vanishing, ground(t0), half0, ground(t1), half1, shade(asphalt, 1.7))


def choose_things(s: Street) -> list[tuple]:
    """What stands or drives there: (t, kind, x), unsorted."""
    rng, uniform, things = s.p.rng, s.p.rng.uniform, []

    def scatter(count, kind, far, near, where):
        """So many of a kind, each at a t between far and near, and there at x = where(t)."""
        for _ in range(count):
            t = uniform(far, near)
            things.append((t, kind, where(t)))

    def mostly(usual, share, other):
        return lambda t: usual(t) if rng.random() < share else other(t)

    scatter(rng.integers(1, 6), "car", 0.1, 0.85, mostly(s.on_road, 0.8, s.beside))
    people = rng.poisson(s.between(3.0, 4.5))
    scatter(people, "person", 0.1, 0.8, mostly(s.beside, 0.85, s.on_road))
    if rng.random() < 0.3:  # a crowd
        t = uniform(0.12, 0.45)
        x = s.beside(t)
        for _ in range(rng.integers(3, 7)):
            things.append((t + uniform(-0.02, 0.02), "person", x + s.W * uniform(-0.04, 0.04)))
    scatter(rng.poisson(s.between(1.0, 1.6)), "bicycle", 0.15, 0.85, s.beside)
    scatter(rng.poisson(0.30), "motorcycle", 0.15, 0.8, s.on_road)
    scatter(rng.poisson(0.45), "cyclist", 0.15, 0.8, s.on_road)
    scatter(rng.poisson(0.16), "motorcyclist", 0.15, 0.8, s.on_road)
    scatter(int(rng.random() < 0.2), "truck", 0.15, 0.6, s.on_road)
    scatter(int(rng.random() < 0.2), "bus", 0.15, 0.55, s.on_road)
    for kind in ("lamp", "light", "sign"):
        scatter(rng.poisson(1.3), kind, 0.05, 0.6, s.beside)
    scatter(rng.poisson(0.8), "tree", 0.1, 0.5, lambda t: s.beside(t + 0.15))
    return things


def draw_scene(seed: int, style: str, height: int = HEIGHT, width: int = WIDTH) -> Scene:
    """One scene. style: source, target or random. Each (style, seed) is another scene; any size
    shows the same one, apart from details of a few pixels.
    """
    rng = np.random.default_rng([STYLES.index(style), seed])
    p = Painter(height * SUPERSAMPLING, width * SUPERSAMPLING, rng, style)
    s = Street(p, {"source": 0.0, "target": 1.0, "random": rng.random()}[style])
    paint_sky(s)
    s.lay_road()
    paint_ground(s)
    for side in (-1, 1):
        line_side(s, side)
    paint_train(s)
    paint_road(s)
    for t, kind, x in sorted(choose_things(s), key=itemgetter(0)):  # from far to near
        objects.paint_thing(p, kind, x, s.ground(t), 0.25 + 0.95 * t)
    return _rendered(p, s.horizon)


def noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Smooth noise in -1..1 in steps of 1/128, float32 H x W; `cell` is the distance of its random
    values in pixels.
    """
    shape = (max(2, -(-height // cell)), max(2, -(-width // cell)))
    coarse = rng.integers(0, 256, shape, dtype=np.uint8)
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(fine).astype(np.float32) - 128) / 128


def _rendered(p: Painter, horizon: float) -> Scene:
    """The canvas at its final size, with texture, light, colour, haze, blur and grain of the
    style.
    """
    rng, style = p.rng, p.style
    uniform = rng.uniform
    image, label, segment = p.canvas
    picture = np.asarray(image.reduce(SUPERSAMPLING)).astype(np.float32)
    middle = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
    label = np.asarray(label)[middle, middle].astype(np.uint8)
    segment = np.asarray(segment)[middle, middle].astype(np.int32)
    h, w = label.shape

    strength = {"source": 0.7, "target": 1.0, "random": uniform(0.2, 2.2)}[style]
    cell = max(1, h // 96)
    texture = 0.6 * noise(rng, h, w, cell)
    texture = texture + 0.5 * noise(rng, h, w, 3 * cell) + 0.5 * noise(rng, h, w, 10 * cell)
    picture *= (1 + strength * objects.ROUGHNESS[label] * texture)[..., None]
    if style == "source":
        gain, cast = uniform(0.8, 1.15), tuple(uniform(0.96, 1.04, 3))
        saturation, haze, grain = uniform(0.8, 1.2), uniform(0, 0.12), uniform(1, 4)
        blur, shadow, contrast = 0.0, uniform(0, 0.12), uniform(0.9, 1.1)
    elif style == "target":
        gain = uniform(0.75, 0.98)
        cast = (uniform(1, 1.07), uniform(0.98, 1.04), uniform(0.90, 0.99))
        saturation, haze, grain = uniform(0.45, 0.75), uniform(0.10, 0.30), uniform(2, 6)
        blur, shadow, contrast = uniform(0, 0.6), uniform(0.08, 0.26), uniform(0.82, 1.0)
    else:
        gain, cast = uniform(0.5, 1.25), tuple(uniform(0.75, 1.2, 3))
        saturation, haze, grain = uniform(0.2, 1.4), uniform(0, 0.45), uniform(0, 12)
        blur = uniform(0, 1.0) if rng.random() < 0.6 else 0.0
        shadow, contrast = uniform(0, 0.35), uniform(0.7, 1.2)
    if shadow:
        shaded = (noise(rng, h, w, max(8, h // 4)) > 0.1) & (label != SKY)
        picture *= (1 - shadow * shaded)[..., None]
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
    speckled = np.asarray(image).astype(np.int16) + speckle
    return Scene(np.clip(speckled, 0, 255).astype(np.uint8), label, segment)
