"""SCC's patches cut as the released loader does: for each connectivity the image is opened, and a
mask that is stored at full size.

Slow and obvious; tests compare seco_scc.cut_patch with it, scripts/dev/bench.py measures against
it. It shares the patch's window with the fast path.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dataset.scc import Job, patch_window
from util.labels import connectivities, read_image, read_label


def store_masks(root: Path, job: Job, members: list[int]) -> None:
    """Below root/masks every mask of the members' images as a PNG at full size (the released
    loader keeps run lengths).
    """
    (root / "masks").mkdir(exist_ok=True)
    for image in {int(job.index["image"][member]) for member in members}:
        label = read_label(job.root / job.rows[image][1])
        for number, c in enumerate(connectivities(label, range(job.classes.count))):
            mask = np.zeros(label.shape, np.uint8)
            mask[c.window][c.mask] = 1
            Image.fromarray(mask).save(root / f"masks/{image}_{number}.png", compress_level=1)


def opened_patch(
    root: Path, job: Job, member: int, patch: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`seco_scc.cut_patch` of one connectivity, by its place in the index, the long way. root: of
    `store_masks`.
    """
    row = job.index[member]
    image = read_image(job.root / job.rows[row["image"]][0])
    mask = np.array(Image.open(root / f"masks/{row['image']}_{row['number']}.png"))
    y0, x0, y1, x1 = patch_window(cv2.boundingRect(mask), *mask.shape, patch)
    picture = cv2.resize(image[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_NEAREST)
    return picture, mask[::2, ::2]
