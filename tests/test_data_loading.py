"""Training samples: region-only resizing, geometry, strong views, CutMix boxes, order, workers,
copy-paste."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as colour

from dataset import augment
from dataset.augment import Crop, cropped_image, cropped_label, cutmix_box, draw_crop, strong_view
from dataset.copy_paste import RARE_CLASSES, RareClassPool
from dataset.samples import (
    Lists,
    TrainingSamples,
    batches,
    iterations_per_epoch,
    places,
)
from tests.reference_data import (
    label_resized_then_cropped,
    pillow_strong_view,
    resized_then_cropped,
)
from train_unimatch import parse_args
from util.labels import CITYSCAPES_19, write_label


def street(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with hard-edged boxes and noise, uint8 height x width x 3."""
    random = np.random.default_rng(seed)
    colours = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = np.array(colours.resize((width, height)))
    for _ in range(20):
        y, x = random.integers(0, height - 8), random.integers(0, width - 8)
        below, right = y + random.integers(2, height // 2), x + random.integers(2, width // 3)
        image[y:below, x:right] = random.integers(0, 256, 3)
    return (image // 2 + random.integers(0, 128, image.shape)).astype(np.uint8)


def crops():
    """(image, crop): crops larger than the image, padding and mirroring included; and full size.
    3600 = 2048 x 225 / 128: in every 225th row and column values lie half-way between two levels.
    """
    for seed in range(25):
        random = np.random.default_rng(seed)
        height, width = (int(n) for n in random.integers(60, 240, 2))
        crop = draw_crop(random, height, width, int(random.integers(33, 160)))
        yield street(height, width, seed), crop
    image = street(1024, 2048)
    for geometry in ((512, 1024, 0, 200), (1800, 3600, 900, 2600), (1024, 2048, 255, 1279)):
        yield image, Crop(*geometry, 769, geometry[0] == 1800)


def test_resizing_the_region_equals_resizing_the_whole():
    """Within one grey level, everywhere in the square."""
    for image, crop in crops():
        image = Image.fromarray(image)
        fast, slow = cropped_image(image, crop), resized_then_cropped(image, crop)
        assert fast.shape == slow.shape == (crop.size, crop.size, 3)
        assert np.abs(fast.astype(int) - slow).max() <= 1, crop


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_taken_from_the_nearest_pixel(seed):
    """As by Pillow, also of another resolution than its image; odd sizes have no ties."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 19, (41, 71), dtype=np.uint8)
    crop = draw_crop(random, 80 if seed % 2 else 40, 140 if seed % 2 else 70, 45)
    expected = label_resized_then_cropped(label, crop, 255)
    assert np.array_equal(cropped_label(label, crop, 255), expected)


def test_padding_is_ignored_and_nothing_else():
    crop = Crop(20, 30, 0, 0, 40, True)
    label = np.zeros((20, 30), dtype=np.uint8)
    mask = augment.padding_mask(crop)
    assert mask.sum() == 40 * 40 - 20 * 30
    assert np.array_equal(mask, cropped_label(label, crop, 254) == 254)
    white = cropped_image(Image.new("RGB", (30, 20), "white"), crop)
    assert np.array_equal(mask, (white == 0).all(axis=2))


def test_geometry_is_unimatchs():
    """Long side uniform over [0.5 M, 2 M], ends included; origins anywhere; half are mirrored."""
    random = np.random.default_rng(0)
    crops = [draw_crop(random, 20, 10, 12) for _ in range(4000)]
    assert {c.height for c in crops} == set(range(10, 41))
    assert all(c.width == int(10 * c.height / 20 + 0.5) for c in crops)
    assert {c.top for c in crops if c.height == 20} == set(range(9))
    assert {c.left for c in crops if c.width <= 12} == {0}
    assert 0.46 < np.mean([c.flip for c in crops]) < 0.54
    wide = draw_crop(random, 30, 100, 12)
    assert wide.height == int(30 * wide.width / 100 + 0.5)
    narrower = {draw_crop(random, 20, 10, 12, (0.75, 1.5)).height for _ in range(1000)}
    assert narrower == set(range(15, 31))
    row = draw_crop(random, 1, 90, 33, (0.1, 0.2))
    assert row.height == 1 and cropped_image(Image.new("RGB", (90, 1)), row).shape == (33, 33, 3)


@pytest.mark.parametrize(
    "fast, slow, values, mean, most",
    [
        (augment.adjusted_brightness, colour.adjust_brightness, (0.5, 0.9, 1.5), 0.1, 1),
        (augment.adjusted_contrast, colour.adjust_contrast, (0.5, 0.9, 1.5), 0.6, 2),
        (augment.adjusted_saturation, colour.adjust_saturation, (0.0, 0.5, 1.5), 0.6, 2),
        (augment.adjusted_hue, colour.adjust_hue, (-0.25, 0.0, 0.1, 0.25), 1.0, 16),
    ],
)
def test_colours_are_torchvisions_within_rounding(fast, slow, values, mean, most):
    image = street(96, 128)
    for value in values:
        expected = np.asarray(slow(Image.fromarray(image), value))
        difference = np.abs(fast(image, value).astype(int) - expected)
        assert difference.mean() <= mean and difference.max() <= most, value


def test_strong_views_draw_as_stated():
    """The same draws as with torchvision; an image is as rarely left as it was as it should be."""
    image, differences, unchanged = street(48, 64), [], 0
    for seed in range(300):
        view = strong_view(np.random.default_rng(seed), image)
        unchanged += np.array_equal(view, image)
        if seed < 60:
            expected = pillow_strong_view(np.random.default_rng(seed), image)
            differences.append(np.abs(view.astype(int) - expected).mean())
    assert np.median(differences) < 1.5 and max(differences) < 8
    assert 0.03 < unchanged / 300 < 0.14  # 0.2 x 0.8 x 0.5 = 0.08


def test_cutmix_boxes_have_the_stated_chance_area_and_shape():
    random = np.random.default_rng(0)
    boxes = [cutmix_box(random, 100) for _ in range(600)]
    drawn = [box for box in boxes if box.any()]
    assert 0.44 < len(drawn) / len(boxes) < 0.56
    for box in drawn:
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert box.sum() == height * width  # one filled rectangle
        least, most = (1e4 * share for share in augment.CUTMIX_AREA)
        assert least - height - width <= box.sum() <= most
        assert 0.3 - 0.1 < height / width < 1 / 0.3 + 0.8  # both sides are cut down to integers
    assert max(box.mean() for box in drawn) > 0.35 and min(box.mean() for box in drawn) < 0.05


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five images with labels: (root, rows)."""
    root, rows = tmp_path_factory.mktemp("data"), []
    for number in range(5):
        Image.fromarray(street(60, 90, number)).save(root / f"{number}.png")
        label = np.random.default_rng(number).integers(0, 19, (60, 90), dtype=np.uint8)
        label[:10] = 255
        write_label(root / f"{number}_label.png", label, CITYSCAPES_19.palette)
        rows.append((f"{number}.png", f"{number}_label.png"))
    return root, rows


def same(one: dict, other: dict) -> bool:
    equal = (np.array_equal(one[name], other[name]) for name in one)
    return one.keys() == other.keys() and all(equal)


@pytest.fixture(scope="module")
def samples(data):
    root, rows = data
    needed = "--labeled-id-path - --unlabeled-id-path - --save-path - --crop-size 48"
    needed += f" --global-batch 2 --batch-per-process 2 --root-path {root}"
    args = parse_args(needed.split())
    lists = Lists(rows[:2], [image for image, _ in rows], [], np.zeros((2, 19)))
    return TrainingSamples(args, lists)


def changed(samples, **options) -> TrainingSamples:
    return TrainingSamples(replace(samples.args, **options), samples.lists)


def test_samples_depend_on_seed_epoch_and_position_alone(samples):
    """An epoch has the five images and the first three of its order again."""
    sample = samples[14]
    assert samples.place(14) == (1, 6) and samples.index(14) == samples.index(9)
    assert same(sample, changed(samples)[14])
    for other in (samples[9], samples[6], changed(samples, seed=1)[14]):
        assert not same(sample, other)
    assert not np.array_equal(sample["w"], sample["w_mix"])  # the same image, another crop
    shapes = {name: (value.shape, value.dtype.name) for name, value in sample.items()}
    assert shapes == {
        **{name: ((48, 48, 3), "uint8") for name in ("x", "w", "w_mix", "s1", "s2")},
        "mask_x": ((48, 48), "uint8"),
        **{name: ((48, 48), "bool") for name in ("box1", "box2", "ignore", "ignore_mix")},
    }


def test_strong_views_are_pasted_inside_their_box_alone(samples):
    pasted = 0
    for number in range(12):
        sample = samples[number]
        random, random_mix = samples.generator(1, number), samples.generator(2, number)
        draw_crop(random, 60, 90, 48)
        draw_crop(random_mix, 60, 90, 48)
        boxes = [cutmix_box(random, 48), cutmix_box(random, 48)]
        for which, box in enumerate(boxes, start=1):
            view, made = strong_view(random, sample["w"]), sample[f"s{which}"]
            assert np.array_equal(box, sample[f"box{which}"])
            assert np.array_equal(made[~box], view[~box])
            if box.any():
                pasted += 1
                view = strong_view(random_mix, sample["w_mix"])
                assert np.array_equal(made[box], view[box])
    assert pasted > 4


def test_workers_and_image_cache_change_nothing(samples, tmp_path):
    iterations, cpu = range(8), torch.device("cpu")
    plain = list(batches(samples, iterations, 0, cpu))
    cached = changed(samples, image_cache=tmp_path)
    for _ in range(2):  # filling the cache, and reading it
        others = list(batches(cached, iterations, 2, cpu))
        assert len(plain) == len(others) == 8
        assert all(same(a, b) for a, b in zip(plain, others))
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_labels_alone_and_photometric_which_changes_colours_alone(samples):
    plain, different = TrainingSamples(samples.args, replace(samples.lists, unlabeled=[])), 0
    strong = changed(plain, photometric=True)
    for number in range(8):
        before, after = plain[number], strong[number]
        assert before.keys() == after.keys() == {"x", "mask_x"}
        assert np.array_equal(before["mask_x"], after["mask_x"]) and same(after, strong[number])
        different += not np.array_equal(before["x"], after["x"])
    assert different > 4


def test_iterations_per_epoch_fit_the_shipped_logs():
    logs = json.loads((Path(__file__).parent / "data" / "shipped_logs.json").read_text())
    of_logs = {"seco_synthia": (1487, 8), "seco_bdd": (5250, 4), "seco_gta": (1890, 8)}
    for name, unlabeled_and_batch in of_logs.items():
        low, high = logs[name]["iterations_per_epoch"]
        length = iterations_per_epoch(*unlabeled_and_batch)
        assert low <= length <= high
        assert set(range(0, length, length // 8)) == set(logs[name]["printed_iterations"])


@pytest.mark.parametrize("world, batch", [(1, 4), (2, 2), (4, 1), (1, 2), (2, 1)])
def test_every_distribution_takes_the_same_samples_an_iteration(monkeypatch, world, batch):
    """Processes' accumulation steps of an iteration together are its global batch, in order."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    steps = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        steps.append(places(SimpleNamespace(global_batch=4, batch_per_process=batch)))
    assert [len(own) for own in steps] == world * [4 // world // batch]
    assert [place for step in zip(*steps) for own in step for place in own] == [0, 1, 2, 3]


def test_copy_paste_pastes_a_rare_class_and_its_partners(tmp_path):
    """Of a rider (12) on a bicycle (18) and a car (13), rider and bicycle are pasted."""
    image, label = np.zeros((60, 60, 3), dtype=np.uint8), np.full((60, 60), 255, dtype=np.uint8)
    areas = {12: np.s_[5:15, 5:13], 18: np.s_[15:22, 3:15], 13: np.s_[40:50, 40:55]}
    for class_id, area in areas.items():
        label[area], image[area] = class_id, 10 * class_id
    label[30, 30] = 18  # a speck, too small to paste
    Image.fromarray(image).save(tmp_path / "i.png")
    write_label(tmp_path / "l.png", label, CITYSCAPES_19.palette)
    counts = np.bincount(label.ravel(), minlength=256)[None, :19]
    pool = RareClassPool([("i.png", "l.png")], counts, tmp_path, RARE_CLASSES[19])
    assert set(pool.sources) == {12, 18}
    target, target_label = np.full((80, 80, 3), 255, np.uint8), np.zeros((80, 80), np.uint8)
    for seed in range(5):
        new, new_label = pool.paste(np.random.default_rng(seed), target, target_label)
        assert set(np.unique(new_label)) == {0, 12, 18}
        assert np.array_equal(new[..., 0], np.where(new_label == 0, 255, new_label * 10))
        assert (new_label == 12).sum() >= 80
    assert (target_label == 0).all() and (target == 255).all()  # what was given is not changed
    small, small_label = target[:20, :7], target_label[:20, :7]
    nothing = pool.paste(np.random.default_rng(0), small, small_label)  # all pieces are wider
    assert np.array_equal(nothing[0], small) and np.array_equal(nothing[1], small_label)
    empty = RareClassPool([("i.png", "l.png")], counts, tmp_path, (4,))
    assert empty.paste(np.random.default_rng(0), target, target_label)[1] is target_label
