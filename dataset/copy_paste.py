"""Rare-class copy-paste: objects of rare classes are cut out of the labeled subset and pasted into
labeled crops.

The paper (section 2.4) uses the corrected labels as such a pool; its details are not released. Ours
follow DT-ST's mixer, which two of the three shipped logs hint at: the same rare classes, partners
(a rider and the cycle), least sizes of classes and components, enlargement, nearest neighbour.
Simpler than there: whatever lies at the random place is covered.
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
    """Which images of the labeled list show which of the rare `classes`. rows: (image path, label
    path); pixel_counts: int len(rows) x K, pixels per class of each label map.
    """

    def __init__(self, rows: list[tuple[str, str]], pixel_counts: np.ndarray, root: Path, classes):
        self.rows, self.root = rows, root
        self.partners = PARTNERS.get(pixel_counts.shape[1], {})
        self.sources = {c: np.flatnonzero(pixel_counts[:, c] >= MIN_SOURCE_PIXELS) for c in classes}
        self.sources = {c: rows_of for c, rows_of in self.sources.items() if rows_of.size}

    def paste(
        self, random: np.random.Generator, image: np.ndarray, label: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """New image (S x S x 3) and label (S x S), with a random rare class of a random source."""
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
            mask = components[window] == number
            factor = random.uniform(*ENLARGEMENT)
            height, width = (round(side * factor) for side in mask.shape)
            top, left = (
                int(random.integers(0, max(room - side, 0), endpoint=True))
                for room, side in zip(label.shape, (height, width))
            )
            if height > label.shape[0] or width > label.shape[1]:
                continue  # too large for the crop
            place = np.s_[top : top + height, left : left + width]
            rows = (np.arange(height) * mask.shape[0] // height)[:, None]
            columns = np.arange(width) * mask.shape[1] // width
            where = mask[rows, columns]
            image[place][where] = source_image[window][rows, columns][where]
            label[place][where] = source_label[window][rows, columns][where]
        return image, label
