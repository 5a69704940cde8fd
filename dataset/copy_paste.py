"""Rare-class copy-paste: objects of rare classes are cut out of the labeled subset and pasted into
labeled crops.

The paper (section 2.4) uses the corrected labels as such a pool; its details are not released. Ours
follow DT-ST's mixer, which two of the three shipped logs hint at: the same rare classes, partners
that belong together (a rider and the cycle), at least 50 pixels of the class in the source image,
connected components of at least 20 pixels, enlarged by U(1, 2.5), nearest. Simpler than there:
places are drawn until a component fits into the crop, whatever lies there is covered.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from util.labels import read_label, read_picture

# DT-ST's long-tail classes. 19: fence, pole, traffic light, traffic sign, rider, train, motorcycle,
# bicycle; 16: wall, pole, traffic light, traffic sign, rider, motorcycle, bicycle.
RARE_CLASSES = {19: (4, 5, 6, 7, 12, 16, 17, 18), 16: (3, 5, 6, 7, 11, 14, 15)}
PARTNERS = {
    19: {12: (17, 18), 17: (12,), 18: (12,), 5: (6, 7), 6: (5,), 7: (5,)},
    16: {11: (14, 15), 14: (11,), 15: (11,), 5: (6, 7), 6: (5,), 7: (5,)},
}
MIN_SOURCE_PIXELS, MIN_COMPONENT_PIXELS = 50, 20
ENLARGEMENT = (1.0, 2.5)
MAX_COMPONENTS = 10  # pasted into one crop; bounds the time that a source full of poles takes


class RareClassPool:
    """Which images of the labeled list show which rare class.

    rows: (image path, label path); pixel_counts: int len(rows) x K, pixels per class of each label
    map.
    """

    def __init__(
        self,
        rows: list[tuple[str, str]],
        pixel_counts: np.ndarray,
        root: Path,
        classes: tuple[int, ...],
    ):
        self.rows, self.root = rows, root
        self.partners = PARTNERS.get(pixel_counts.shape[1], {})
        self.sources = {c: np.flatnonzero(pixel_counts[:, c] >= MIN_SOURCE_PIXELS) for c in classes}
        self.sources = {c: rows_of for c, rows_of in self.sources.items() if rows_of.size}

    def paste(
        self, random: np.random.Generator, image: np.ndarray, label: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """New (image uint8 S x S x 3, label uint8 S x S) with the objects of one random rare class
        of one random source.
        """
        if not self.sources:
            return image, label
        class_id = int(random.choice(sorted(self.sources)))
        image_path, label_path = self.rows[int(random.choice(self.sources[class_id]))]
        source_label = read_label(self.root / label_path)
        source_image = read_picture(self.root / image_path)
        if source_image.size != source_label.shape[::-1]:
            size = source_label.shape[::-1]
            source_image = source_image.resize(size, Image.Resampling.BILINEAR)
        source_image = np.asarray(source_image)
        wanted = np.isin(source_label, (class_id, *self.partners.get(class_id, ())))
        components, count = ndimage.label(wanted, structure=np.ones((3, 3)))  # 8 neighbours
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        numbers = 1 + np.flatnonzero(sizes >= MIN_COMPONENT_PIXELS)
        windows = ndimage.find_objects(components)
        image, label = image.copy(), label.copy()
        for number in random.permutation(numbers)[:MAX_COMPONENTS]:
            window = windows[number - 1]
            piece = (source_image[window], source_label[window], components[window] == number)
            paste_component(random, image, label, *piece)
        return image, label


def paste_component(
    random: np.random.Generator,
    image: np.ndarray,
    label: np.ndarray,
    piece: np.ndarray,
    piece_label: np.ndarray,
    mask: np.ndarray,
) -> None:
    """Paste `piece` (uint8 h x w x 3) and its labels where `mask` is true, enlarged, at a random
    place, into image and label (changed in place). Pieces that do not fit, enlarged, are left
    out.
    """
    factor = random.uniform(*ENLARGEMENT)
    height, width = round(mask.shape[0] * factor), round(mask.shape[1] * factor)
    top, left = (
        int(random.integers(0, max(label.shape[axis] - side, 0), endpoint=True))
        for axis, side in enumerate((height, width))
    )
    if height > label.shape[0] or width > label.shape[1]:
        return
    rows = (np.arange(height) * mask.shape[0] // height)[:, None]
    columns = np.arange(width) * mask.shape[1] // width
    where = mask[rows, columns]
    image[top : top + height, left : left + width][where] = piece[rows, columns][where]
    label[top : top + height, left : left + width][where] = piece_label[rows, columns][where]
