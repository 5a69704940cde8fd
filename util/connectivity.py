"""Connectivities: the 8-connected components of one class in a label map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Connectivity:
    """One connected component.

    class_id: its train ID. area: its number of pixels. window: the slices (rows, columns) of its
    bounding box in the label map. mask: bool array of the window's shape, true on the component's
    pixels.
    """

    class_id: int
    area: int
    window: tuple[slice, slice]
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) in pixels."""
        rows, columns = self.window
        return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


def connectivities(label: np.ndarray, class_ids) -> Iterator[Connectivity]:
    """All connectivities of a label map: classes in the order given, within a class in raster order
    of the first pixel.

    label: uint8 H x W. Each class is labeled once inside its bounding box; masks are cut out of the
    component map by their windows, so the cost does not grow with (number of connectivities) x
    (image size).
    """
    for class_id in class_ids:
        of_class = label == class_id
        rows = np.flatnonzero(of_class.any(axis=1))
        if rows.size == 0:
            continue
        columns = np.flatnonzero(of_class.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        components, _ = ndimage.label(
            of_class[top : rows[-1] + 1, left : columns[-1] + 1], structure=EIGHT_NEIGHBOURS
        )
        # scipy numbers components in raster order of their first pixel.
        for number, (row, column) in enumerate(ndimage.find_objects(components), start=1):
            mask = components[row, column] == number
            window = (
                slice(row.start + top, row.stop + top),
                slice(column.start + left, column.stop + left),
            )
            yield Connectivity(int(class_id), int(np.count_nonzero(mask)), window, mask)
