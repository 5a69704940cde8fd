"""PSA against what the released code (DZhaoXd/SeCo 04c4a05) gave, pixel by pixel.

tests/data/psa/ holds data only: prompts.npz the prompts of four label maps (drawn scenes of 19 and
16 classes, shapes, a map of 1024 x 2048), images.npz label maps made from three images, once with
given masks and once with the tiny SAM of this repository.
"""

import numpy as np
import pytest
import torch
from conformance import read_arrays
from PIL import Image

import seco_sam
from model.sam import load_segmenter
from model.sam_fast import TINY_CHECKPOINT
from util.labels import CITYSCAPES_19, SYNTHIA_16, connectivities, write_label
from util.run import sha256

PROMPTS, IMAGES = read_arrays("psa/prompts"), read_arrays("psa/images")
MAPS = {"toy19": CITYSCAPES_19, "toy16": SYNTHIA_16, "shapes": CITYSCAPES_19, "far": CITYSCAPES_19}
CLASS_SETS = {19: CITYSCAPES_19, 16: SYNTHIA_16}


def first_pixel(connectivity, width: int) -> int:
    """Flat index in a label map of that width."""
    rows, columns = connectivity.window
    row, column = np.argwhere(connectivity.mask)[0] + (rows.start, columns.start)
    return int(row * width + column)


@pytest.mark.parametrize("name", MAPS)
def test_prompts_equal_the_releases(name):
    label, sure = PROMPTS[f"{name}_label"], PROMPTS[f"{name}_sure"]
    prompts = seco_sam.thing_prompts(label, MAPS[name].things, "release")
    assert [p.class_id for p in prompts] == PROMPTS[f"{name}_class"].tolist()
    boxes = np.stack([p.box for p in prompts])
    off = np.abs(boxes - PROMPTS[f"{name}_box"]).max(axis=1)
    assert sure.sum() > 0.9 * len(sure)
    assert (off[sure] == 0).all() and (off <= 1).all()
    points = np.full((len(prompts), 2, 2), -1)
    for row, prompt in zip(points, prompts):
        row[: len(prompt.points)] = prompt.points
    assert (points == PROMPTS[f"{name}_points"]).all()


@pytest.mark.parametrize("name", MAPS)
def test_the_connectivities_without_a_prompt_are_the_releases(name):
    label, kept, skipped = PROMPTS[f"{name}_label"], [], []
    for connectivity in connectivities(label, MAPS[name].things):
        if connectivity.area < 10 or (label == connectivity.class_id).sum() <= 10:
            continue
        box = seco_sam.rotated_unclip_box(connectivity, *label.shape)
        (skipped if box is None else kept).append(first_pixel(connectivity, label.shape[1]))
    assert kept == PROMPTS[f"{name}_first"].tolist()
    assert skipped == PROMPTS[f"{name}_skipped"].tolist()


class RuleSam:
    """A segmenter of given proposals whose mask of a prompt is its box, without what is more than
    12 rows or columns away from all its points.
    """

    device, prompt_batch = torch.device("cpu"), 4

    def __init__(self, masks: np.ndarray):
        self.masks = masks

    def set_image(self, image: np.ndarray) -> None:
        self.rows, self.columns = np.indices(image.shape[:2])

    def proposals(self):
        for mask in self.masks:
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            inside = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
            yield torch.from_numpy(inside.copy()), (xs[0], ys[0], xs[-1], ys[-1])

    def predict(self, boxes: np.ndarray, points: list[np.ndarray]) -> torch.Tensor:
        found = []
        for (x0, y0, x1, y1), around in zip(boxes, points):
            near = np.zeros(self.rows.shape, bool)
            for x, y in around:
                near |= (abs(self.columns - x) <= 12) & (abs(self.rows - y) <= 12)
            near &= (self.columns >= x0) & (self.columns <= x1)
            found.append(near & (self.rows >= y0) & (self.rows <= y1))
        return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("name", ["i0", "i1", "i2"])
def test_painting_equals_the_releases(name):
    image, label = IMAGES[f"{name}_image"], IMAGES[f"{name}_label"]
    count = int(IMAGES[f"{name}_proposal_count"])
    bits = np.unpackbits(IMAGES[f"{name}_proposals"])[: count * label.size]
    sam = RuleSam(bits.astype(bool).reshape(count, *label.shape))
    classes = CLASS_SETS[int(IMAGES[f"{name}_class_num"])]
    result = seco_sam.aggregate(image, label, sam, classes)
    assert len(result.aligned) == count and result.prompts
    assert (result.label == IMAGES[f"{name}_rule_output"]).all()


@pytest.mark.parametrize("name", ["i0", "i1", "i2"])
def test_labels_of_the_tiny_sam_equal_the_releases(name):
    assert sha256(TINY_CHECKPOINT) == str(IMAGES["sam_tiny_sha256"])
    classes = CLASS_SETS[int(IMAGES[f"{name}_class_num"])]
    result = seco_sam.aggregate(
        IMAGES[f"{name}_image"], IMAGES[f"{name}_label"], load_segmenter("tiny"), classes
    )
    assert (result.label == IMAGES[f"{name}_tiny_output"]).all()


def test_an_image_of_another_size_is_resized_as_in_the_release(tmp_path):
    image, label = IMAGES["i0_image"], IMAGES["i0_label"][::2, ::2]
    Image.fromarray(image).save(tmp_path / "image.png")
    write_label(tmp_path / "label.png", label, CITYSCAPES_19.palette)
    made, read = seco_sam.read_pair(tmp_path, ("image.png", "label.png"), 19)
    assert (read == label).all()
    assert (made == np.asarray(Image.fromarray(image).resize(label.shape[::-1]))).all()
