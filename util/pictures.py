"""Pictures and charts, drawn with Pillow: coloured label maps, panels side by side, curves, bars,
histograms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.labels import IGNORE, ClassSet
from util.run import atomic_path

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (110, 110, 110),
)
INK, GRID, PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def save_picture(path: str | Path, image: Image.Image | np.ndarray) -> None:
    """Write a picture: JPEG if the name ends in .jpg, else PNG."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    with atomic_path(path) as temporary:
        if Path(path).suffix == ".jpg":
            image.convert("RGB").save(temporary, format="JPEG", quality=85)
        else:
            image.save(temporary, format="PNG")


# --------------------------------------------------------------------------------------- label maps


def colour_label(label: np.ndarray, palette) -> np.ndarray:
    """uint8 H x W of train IDs → uint8 H x W x 3; IGNORE and unknown values are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, palette, alpha: float = 0.55) -> np.ndarray:
    """The coloured label map laid over the image; pixels without a label show the image."""
    mixed = (1 - alpha) * image + alpha * colour_label(label, palette)
    return np.where((label != IGNORE)[..., None], mixed, image).round().astype(np.uint8)


def hatch(
    picture: np.ndarray, mask: np.ndarray, colour=(255, 255, 255), spacing: int = 8
) -> np.ndarray:
    """A copy of an RGB picture with diagonal lines drawn where `mask` (bool H x W) is true."""
    rows, columns = np.indices(mask.shape)
    lines = ((rows + columns) % spacing < max(1, spacing // 4)) & mask
    return np.where(lines[..., None], np.array(colour, dtype=np.uint8), picture)


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (H x W, NaN allowed) → RGB from blue (0) over white to orange (1); NaN is
    black.
    """
    low, middle, high = np.array(COLOURS[0]), np.array((245, 245, 245)), np.array(COLOURS[4])
    t = np.clip(np.nan_to_num(values), 0, 1)[..., None]
    rgb = np.where(t < 0.5, low + (middle - low) * 2 * t, middle + (high - middle) * (2 * t - 1))
    return np.where(np.isnan(values)[..., None], 0, rgb).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------- panels


def contact_sheet(
    rows: list[list[np.ndarray]],
    column_titles: list[str] | None = None,
    row_titles: list[str] | None = None,
    legend: ClassSet | None = None,
    cell_width: int | None = None,
) -> Image.Image:
    """Pictures (uint8 H x W x 3, one size or scaled to the first one's) in a grid with titles and a
    class legend.
    """
    height, width = rows[0][0].shape[:2]
    if cell_width:
        height, width = round(height * cell_width / width), cell_width
    gap, size = 4, max(12, min(18, width // 18))
    top = size + 8 if column_titles else 0
    left = (
        max((int(font(size).getlength(t)) for t in row_titles), default=0) + 10 if row_titles else 0
    )
    columns = max(len(row) for row in rows)
    total_width = left + columns * (width + gap) - gap
    key = class_legend(legend, total_width, size) if legend else None
    total_height = top + len(rows) * (height + gap) - gap + (key.height + 6 if key else 0)
    sheet = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, title in enumerate(column_titles or []):
        draw.text(
            (left + index * (width + gap) + width / 2, top / 2), title, INK, font(size), anchor="mm"
        )
    for r, row in enumerate(rows):
        y = top + r * (height + gap)
        if row_titles:
            draw.text((4, y + height / 2), row_titles[r], INK, font(size), anchor="lm")
        for c, picture in enumerate(row):
            tile = Image.fromarray(picture)
            if tile.size != (width, height):
                tile = tile.resize((width, height), Image.Resampling.BILINEAR)
            sheet.paste(tile, (left + c * (width + gap), y))
    if key:
        sheet.paste(key, (0, total_height - key.height))
    return sheet


def class_legend(classes: ClassSet, width: int, size: int = 14) -> Image.Image:
    """A strip of the given width with the colour and name of every class, and black for `no
    label`.
    """
    entries = [*zip(classes.names, classes.palette), ("no label", (0, 0, 0))]
    positions, x, y = [], 0, 0
    for name, _ in entries:
        step = size + 6 + int(font(size).getlength(name)) + 14
        if x + step > width and x:
            x, y = 0, y + size + 8
        positions.append((x, y))
        x += step
    strip = Image.new("RGB", (width, y + size + 8), PAPER)
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, y) in zip(entries, positions):
        draw.rectangle((x, y + 2, x + size, y + 2 + size), tuple(colour))
        draw.text((x + size + 5, y + 2 + size / 2), name, INK, font(size), anchor="lm")
    return strip


# ------------------------------------------------------------------------------------------- charts


class Chart:
    """Axes with ticks and a grid on a white picture. Coordinates are data units; `x()` and `y()`
    give pixels.
    """

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        x_range,
        y_range,
        size=(860, 460),
        x_ticks=None,
    ):
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.left, self.top, self.right, self.bottom = 72, 58, size[0] - 20, size[1] - 56
        self.x_range, self.y_range = _widened(x_range), _widened(y_range)
        for tick in _ticks(*self.y_range):
            self.draw.line((self.left, self.y(tick), self.right, self.y(tick)), GRID)
            self.draw.text((self.left - 6, self.y(tick)), f"{tick:g}", INK, font(13), anchor="rm")
        for tick, name in (
            x_ticks if x_ticks is not None else [(t, f"{t:g}") for t in _ticks(*self.x_range)]
        ):
            self.draw.line((self.x(tick), self.bottom, self.x(tick), self.bottom + 4), INK)
            self.draw.text((self.x(tick), self.bottom + 8), name, INK, font(13), anchor="ma")
        self.draw.line((self.left, self.top, self.left, self.bottom, self.right, self.bottom), INK)
        self.draw.text((self.left, 8), title, INK, font(17))
        self.draw.text(
            ((self.left + self.right) / 2, size[1] - 8), x_label, INK, font(14), anchor="mb"
        )
        label = Image.new("RGB", (int(font(14).getlength(y_label)) + 4, 20), PAPER)
        ImageDraw.Draw(label).text((2, 10), y_label, INK, font(14), anchor="lm")
        label = label.rotate(90, expand=True)
        self.image.paste(label, (4, int((self.top + self.bottom - label.height) / 2)))
        self.key_x = self.right

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def line(self, xs, ys, colour, width: int = 2) -> None:
        points = [(self.x(a), self.y(b)) for a, b in zip(xs, ys) if math.isfinite(b)]
        if len(points) == 1:
            x, y = points[0]
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        elif points:
            self.draw.line(points, colour, width, joint="curve")

    def bar(
        self, x_low: float, x_high: float, value: float, colour, base: float | None = None
    ) -> None:
        """A bar from `base` (default: the axis) to `value`."""
        y0, y1 = sorted((self.y(value), self.y(self.y_range[0] if base is None else base)))
        self.draw.rectangle((self.x(x_low), y0, self.x(x_high), y1), colour)

    def whisker(self, x: float, low: float, high: float) -> None:
        a, b, c = self.x(x), self.y(low), self.y(high)
        self.draw.line((a, b, a, c), INK, 2)
        for y in (b, c):
            self.draw.line((a - 5, y, a + 5, y), INK, 2)

    def vertical(self, x: float, colour=INK) -> None:
        """A dashed vertical line at a threshold."""
        for y in range(self.top, self.bottom, 9):
            self.draw.line((self.x(x), y, self.x(x), min(y + 5, self.bottom)), colour, 2)

    def key(self, name: str, colour) -> None:
        """Add an entry to the legend, which runs leftwards above the plot so that it never covers
        data.
        """
        width = int(font(13).getlength(name))
        x = self.key_x - width
        self.draw.text((x, self.top - 9), name, INK, font(13), anchor="lm")
        self.draw.rectangle((x - 18, self.top - 13, x - 5, self.top - 5), colour)
        self.key_x = x - 34


def line_chart(
    series: dict[str, tuple[list, list]],
    title: str,
    x_label: str,
    y_label: str,
    size=(860, 460),
    y_range=None,
) -> Image.Image:
    """One line per series, `{name: (xs, ys)}`; non-finite values leave a gap."""
    xs = [x for a, _ in series.values() for x in a]
    ys = [y for _, b in series.values() for y in b if math.isfinite(y)]
    chart = Chart(
        title,
        x_label,
        y_label,
        (min(xs, default=0), max(xs, default=1)),
        y_range or (min(ys, default=0), max(ys, default=1)),
        size,
    )
    for index, (name, (a, b)) in enumerate(series.items()):
        chart.line(a, b, COLOURS[index % len(COLOURS)])
        chart.key(name, COLOURS[index % len(COLOURS)])
    return chart.image


def bar_chart(
    values: dict[str, float],
    title: str,
    y_label: str,
    deviations: dict[str, float] | None = None,
    size=(860, 460),
    y_range=None,
) -> Image.Image:
    """One bar per name, with a whisker of one standard deviation where given."""
    spread = deviations or {}
    top = max((v + spread.get(n, 0) for n, v in values.items()), default=1)
    ticks = [(i, name) for i, name in enumerate(values)]
    chart = Chart(
        title, "", y_label, (-0.6, len(values) - 0.4), y_range or (0, top * 1.05), size, ticks
    )
    for i, (name, value) in enumerate(values.items()):
        chart.bar(i - 0.35, i + 0.35, value, COLOURS[i % len(COLOURS)])
        if spread.get(name):
            chart.whisker(i, value - spread[name], value + spread[name])
        chart.draw.text(
            (chart.x(i), chart.y(value + spread.get(name, 0)) - 4),
            f"{value:.1f}",
            INK,
            font(13),
            anchor="mb",
        )
    return chart.image


def histogram(
    groups: dict[str, np.ndarray],
    title: str,
    x_label: str,
    bins: int = 60,
    curves=None,
    thresholds=None,
    size=(860, 460),
    colours=COLOURS,
) -> Image.Image:
    """Stacked histogram of several groups of values, with curves `{name: (xs, counts)}` and dashed
    `thresholds` `{name: x}` over it. colours: of the groups and then of the curves.
    """
    everything = np.concatenate([np.asarray(v, dtype=np.float64) for v in groups.values()])
    edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-9), bins + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in groups.items()}
    stacked = sum(counts.values())
    highest = max([stacked.max(), *(max(c) for _, c in (curves or {}).values())])
    chart = Chart(
        title,
        x_label,
        "connectivities" if "connectiv" in title.lower() else "count",
        (edges[0], edges[-1]),
        (0, highest * 1.05),
        size,
    )
    base = np.zeros(bins)
    for index, (name, heights) in enumerate(counts.items()):
        for low, high, b, h in zip(edges[:-1], edges[1:], base, heights):
            if h:
                chart.bar(low, high, b + h, colours[index % len(colours)], base=b)
        base += heights
        chart.key(name, colours[index % len(colours)])
    for index, (name, (xs, ys)) in enumerate((curves or {}).items(), start=len(counts)):
        chart.line(xs, ys, colours[index % len(colours)], 3)
        chart.key(name, colours[index % len(colours)])
    for name, x in (thresholds or {}).items():
        chart.vertical(x)
        chart.key(name, INK)
    return chart.image


def _widened(limits) -> tuple[float, float]:
    low, high = map(float, limits)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between two limits."""
    raw = (high - low) / about
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def confusion_picture(confusion: np.ndarray, names, cell: int = 30) -> Image.Image:
    """A confusion matrix (K x K or K x (K + 1), rows ground truth; the last column of the latter:
    no prediction) as a picture: each row in percent of its sum, empty rows grey.
    """
    columns = [*names, "none"][: confusion.shape[1]]
    sums = confusion.sum(axis=1, keepdims=True)
    shares = np.where(sums > 0, confusion / np.maximum(sums, 1), np.nan)
    side = max(int(font(13).getlength(name)) for name in columns) + 12
    image = Image.new("RGB", (side + cell * len(columns) + 8, side + cell * len(names) + 30), PAPER)
    draw = ImageDraw.Draw(image)
    for column, name in enumerate(columns):
        upright = Image.new("RGB", (side, 20), PAPER)
        ImageDraw.Draw(upright).text((4, 10), name, INK, font(13), anchor="lm")
        image.paste(upright.rotate(90, expand=True), (side + column * cell + cell // 2 - 10, 0))
    for row, name in enumerate(names):
        y = side + row * cell
        draw.text((side - 6, y + cell / 2), name, INK, font(13), anchor="rm")
        for column in range(len(columns)):
            share, x = shares[row, column], side + column * cell
            shade = (
                GRID
                if np.isnan(share)
                else tuple(
                    round(255 + (c - 255) * share) for c in COLOURS[0 if column == row else 4]
                )
            )
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if not np.isnan(share) and share >= 0.005:
                draw.text(
                    (x + cell / 2 - 1, y + cell / 2),
                    f"{100 * share:.0f}",
                    PAPER if share > 0.6 else INK,
                    font(12),
                    anchor="mm",
                )
    draw.text(
        (4, image.height - 8),
        "rows: ground truth, in % of its pixels; columns: prediction",
        INK,
        font(13),
        anchor="ls",
    )
    return image
