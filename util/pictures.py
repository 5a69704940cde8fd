"""Pictures, drawn with Pillow: coloured label maps, panels side by side, legends of classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.labels import IGNORE, ClassSet
from util.outputs import atomic_path

INK, PAPER = (40, 40, 40), (255, 255, 255)


def save_picture(path: str | Path, image: Image.Image) -> None:
    """Write a picture in the format that its name says."""
    with atomic_path(path) as temporary:
        image.save(temporary, quality=85)  # of a JPEG


# --------------------------------------------------------------------------------------- label maps


def colour_label(label: np.ndarray, palette) -> np.ndarray:
    """uint8 H x W of train IDs → uint8 H x W x 3; IGNORE and unknown values are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, palette, alpha: float) -> np.ndarray:
    """The coloured label map laid over the image; pixels without a label show the image."""
    mixed = (1 - alpha) * image + alpha * colour_label(label, palette)
    return np.where((label != IGNORE)[..., None], mixed, image).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------- panels


def contact_sheet(
    rows: list[list[np.ndarray]],
    titles: list[str],
    legend: ClassSet | None = None,
    cell_width: int | None = None,
) -> Image.Image:
    """Pictures in a grid.

    Args:
        rows: uint8 H x W x 3 each, of one size or scaled to the first one's.
        titles: above the first row's pictures, or above as many more as there are titles.
        legend: classes whose colours and names stand below.
        cell_width: pixels, instead of the first picture's.
    """
    height, width = rows[0][0].shape[:2]
    if cell_width:
        height, width = round(height * cell_width / width), cell_width
    gap, size, columns = 4, max(12, min(18, width // 18)), max(map(len, rows))
    head, titled_rows = size + 8, math.ceil(len(titles) / columns)
    typeface = ImageFont.load_default(size=size)
    total_width = columns * (width + gap) - gap
    total_height = titled_rows * head + len(rows) * (height + gap) - gap
    key = class_legend(legend, total_width, typeface) if legend else None
    sheet_height = total_height + key.height + 6 if key else total_height
    sheet = Image.new("RGB", (total_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        y = number * (height + gap) + min(number + 1, titled_rows) * head
        for column, picture in enumerate(row):
            x = column * (width + gap)
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
            sheet.paste(tile, (x, y))
            for title in titles[number * columns + column :][:1]:
                draw.text((x + width / 2, y - head / 2), title, INK, typeface, anchor="mm")
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
