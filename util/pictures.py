"""Pictures, drawn with Pillow: coloured label maps, panels side by side, legends of classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.labels import COLOURS, IGNORE, ClassSet
from util.outputs import atomic_path

INK, PAPER = (40, 40, 40), (255, 255, 255)


def save_picture(path: str | Path, image: Image.Image | np.ndarray) -> None:
    """Write a picture in the format that its name says."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    with atomic_path(path) as temporary:
        image.save(temporary, quality=85)  # of a JPEG


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


def hatch(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of an RGB picture with white diagonal lines where `mask` (bool H x W) is true."""
    rows, columns = np.indices(mask.shape)
    lines = ((rows + columns) % 8 < 2) & mask
    return np.where(lines[..., None], np.uint8(255), picture)


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (H x W, NaN allowed) → RGB from blue (0) over white to orange (1); NaN is
    black.
    """
    colours = np.array([COLOURS[0], (245, 245, 245), COLOURS[4]])
    rgb = [np.interp(values, (0, 0.5, 1), colours[:, channel]) for channel in range(3)]
    return np.nan_to_num(np.stack(rgb, axis=-1)).round().astype(np.uint8)


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
    typeface = ImageFont.load_default(size=size)
    top = size + 8 if column_titles else 0
    left = 10 + max(int(typeface.getlength(title)) for title in row_titles) if row_titles else 0
    total_width = left + max(len(row) for row in rows) * (width + gap) - gap
    total_height = top + len(rows) * (height + gap) - gap
    key = class_legend(legend, total_width, typeface) if legend else None
    sheet_height = total_height + key.height + 6 if key else total_height
    sheet = Image.new("RGB", (total_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles or []):
        middle = left + column * (width + gap) + width / 2
        draw.text((middle, top / 2), title, INK, typeface, anchor="mm")
    for number, row in enumerate(rows):
        y = top + number * (height + gap)
        if row_titles:
            draw.text((4, y + height / 2), row_titles[number], INK, typeface, anchor="lm")
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
            sheet.paste(tile, (left + column * (width + gap), y))
    if key:
        sheet.paste(key, (0, total_height + 6))
    return sheet


def class_legend(classes: ClassSet, width: int, typeface: ImageFont.FreeTypeFont) -> Image.Image:
    """A strip of the given width with the colour and name of every class, and black for `no
    label`.
    """
    entries = [*zip(classes.names, classes.palette), ("no label", (0, 0, 0))]
    size = int(typeface.size)
    step = size + 20 + int(max(typeface.getlength(name) for name, _ in entries))
    columns, line = max(width // step, 1), size + 8
    strip = Image.new("RGB", (width, line * math.ceil(len(entries) / columns)), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, (name, colour) in enumerate(entries):
        x, y = index % columns * step, index // columns * line + 2
        draw.rectangle((x, y, x + size, y + size), tuple(colour))
        draw.text((x + size + 5, y + size / 2), name, INK, typeface, anchor="lm")
    return strip
