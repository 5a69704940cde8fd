"""Pictures of PSA: the prompts over the pixel labels, the mask proposals, and a panel of all.

`result` is a seco_sam.Aggregation; proposals are shown only if it holds its masks.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from util.labels import COLOURS, ClassSet
from util.pictures import colour_label, contact_sheet, overlay


def panel(image: np.ndarray, label: np.ndarray, result, classes: ClassSet) -> Image.Image:
    """Image | pixel labels with the prompts | proposals | PSA, two by two.

    image: uint8 H x W x 3, RGB; label: uint8 H x W, the pixel-level pseudo-label.
    """
    return contact_sheet(
        [
            [image, prompt_picture(image, label, result, classes)],
            [proposal_picture(image, result), colour_label(result.label, classes.palette)],
        ],
        row_titles=["image | pixel labels, prompts", "proposals | PSA"],
        legend=classes,
    )


def prompt_picture(image: np.ndarray, label: np.ndarray, result, classes: ClassSet) -> np.ndarray:
    """The pixel labels over the image, with the boxes and points of the prompts."""
    picture = overlay(image, label, classes.palette, 0.75)
    for prompt in result.prompts:
        x0, y0, x1, y1 = (round(v) for v in prompt.box.tolist())
        cv2.rectangle(picture, (x0, y0), (x1, y1), (255, 255, 255), 1)
        for x, y in prompt.points:
            cv2.circle(picture, (round(x), round(y)), 2, (255, 255, 0), -1)
    return picture


def proposal_picture(image: np.ndarray, result) -> np.ndarray:
    """The mask proposals in changing colours over the darkened image."""
    picture = (image * 0.35).astype(np.uint8)
    for i, (mask, (x0, y0, x1, y1)) in enumerate(result.masks):
        window, inside = (slice(y0, y1 + 1), slice(x0, x1 + 1)), mask.cpu().numpy()
        colour = np.array(COLOURS[i % len(COLOURS)])
        picture[window][inside] = (0.35 * image[window][inside] + 0.65 * colour).astype(np.uint8)
    return picture
