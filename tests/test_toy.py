"""The embedded benchmark: what is drawn, and the data set made of it."""

import hashlib

import numpy as np
import pytest

from dataset.toy import FIRST_FREE_SEED, SPLITS, STYLES, draw_scene, make_toy, scene_seed
from util.labels import read_label, read_list
from util.run import UserError

SMALL = {("source", "train"): 3, ("target", "train"): 3, ("target", "val"): 2}


def digest(scenes) -> str:
    whole = hashlib.sha256()
    for scene in scenes:
        whole.update(scene.image.tobytes() + scene.label.tobytes() + scene.segment.tobytes())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize(
    "style, one, small",
    [
        ("source", "eac8b2d9b3dc18c6", "d3c571a234c4e351"),
        ("target", "e919804331eb637f", "8736c40af51a88ed"),
        ("random", "feab66f634d50b6e", "f5177de500d2d4fc"),
    ],
)
def test_pinned_pixels(style, one, small):
    """One scene, and twelve small ones, so that every kind of object is in one of them."""
    assert digest([draw_scene(7, style)]) == one
    assert digest(draw_scene(seed, style, 96, 192) for seed in range(12)) == small


def test_all_classes_occur_with_a_long_tail():
    for style in ("source", "target"):
        pixels, images = np.zeros(19), np.zeros(19)
        for index in range(60):
            label = draw_scene(scene_seed(0, "val", index), style).label
            counts = np.bincount(label.ravel(), minlength=19)
            assert counts.size == 19
            pixels, images = pixels + counts, images + (counts > 0)
        assert (images > 0).all()
        share = pixels / pixels.sum()
        assert share.max() > 50 * np.sort(share)[:3].mean()


def test_every_segment_has_one_class():
    for style in STYLES:
        scene = draw_scene(3, style)
        for number in np.unique(scene.segment):
            assert np.unique(scene.label[scene.segment == number]).size == 1
        assert scene.segment.min() >= 1 and np.unique(scene.segment).size > 10


@pytest.mark.parametrize("size", [(96, 192), (384, 768)])
def test_another_size_shows_the_same_scene(size):
    small, other = draw_scene(5, "target"), draw_scene(5, "target", *size)
    assert other.image.shape == (*size, 3)
    shares = [np.bincount(s.label.ravel(), minlength=19) / s.label.size for s in (small, other)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02


def test_styles_differ():
    def mean_saturation(style):
        images = [draw_scene(i, style).image.astype(int) for i in range(8)]
        return np.mean([image.max(2) - image.min(2) for image in images])

    assert mean_saturation("source") > 1.5 * mean_saturation("target")


def test_seeds_never_coincide():
    seeds = {
        scene_seed(seed, split, index)
        for seed in (0, 1, 99)
        for split in ("train", "val")
        for index in (0, max(SPLITS.values()) - 1)
    }
    assert len(seeds) == 12 and max(seeds) < FIRST_FREE_SEED


def test_data_set(tmp_path):
    folder = make_toy(tmp_path, 1, SMALL)
    rows = read_list(folder / "lists" / "target_val.txt")
    label = draw_scene(scene_seed(1, "val", 1), "target").label
    assert np.array_equal(read_label(tmp_path / rows[1][1], 19), label)
    # Nothing that trains on the target gets to see where its ground truth is.
    assert all(len(row) == 1 for row in read_list(folder / "lists" / "target_train.txt", (1,)))


def test_data_set_goes_on_where_it_was_stopped(tmp_path):
    folder = make_toy(tmp_path, 0, SMALL)
    images = sorted(folder.glob("*/*/images/*.png"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images}
    (folder / "made.json").unlink()
    images[0].unlink()
    make_toy(tmp_path, 0, SMALL)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != images[0])


def test_another_number_of_scenes_is_refused(tmp_path):
    make_toy(tmp_path, 0, SMALL)
    with pytest.raises(UserError, match="delete the folder"):
        make_toy(tmp_path, 0, {**SMALL, ("target", "val"): 1})
