"""The tiny SAM: same numbers as the package's decoder, weights that work and are those told of,
reproducible training, clear errors."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import MaskDecoder
from torch import nn
from torch.nn import functional as F

from model.sam import WEIGHTS, build_sam
from model.sam_fast import mask_logits, tokens_to_pixels, two_way_transformer
from model.sam_tiny import TINY_CHECKPOINT, build_sam_tiny, occupied_extent
from scripts.dev import sam_tiny
from util.labels import class_set, read_list
from util.outputs import read_json, write_json
from util.run import UserError, sha256


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return build_sam("tiny")


@pytest.fixture(scope="module")
def scene():
    return sam_tiny.drawing(8_500_000, "target")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Four noisy photographs of 120x90: a street (0) under a wall (1), two cars (2) on it, one of
    8 pixels; the left tenth has no label (255).
    """
    rng, rows = np.random.default_rng(0), ""
    colours = np.array([[90, 90, 90], [150, 110, 80], [200, 30, 30]] + [[0, 255, 0]] * 253)
    for i in range(4):
        label = np.zeros((90, 120), np.uint8)
        label[:40], label[50:70, 40 + i : 80 + i], label[80:82, 100:104] = 1, 2, 2
        label[:, :12] = 255
        image = colours[label] + rng.normal(0, 8, (90, 120, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(label).save(tmp_path / f"{i}_label.png")
        rows += f"{i}.png {i}_label.png\n"
    for name in ("sam_train", "sam_holdout", "dusk_gt"):
        (tmp_path / f"{name}.txt").write_text(rows)
    monkeypatch.setattr(sam_tiny, "CAMVID", tmp_path)
    monkeypatch.setattr(sam_tiny, "CAMVID_CLASSES", class_set(3, [0, 1], [2]))
    return sam_tiny.photo_rows("sam_train", tmp_path)


def whole(row):
    return sam_tiny.photo_window(row, 1, np.array([0.5, 0.5]))


def random_sam():
    torch.manual_seed(1)
    sam = build_sam_tiny()
    sam_tiny.initialise(sam)
    return sam


# ------------------------------------------------------------------------------------- architecture


def test_token_order_is_a_bijection():
    x = torch.arange(3 * 16 * 24.0).view(3, 16, 24)
    assert torch.equal(tokens_to_pixels(sam_tiny.pixels_to_tokens(x), 4, 6), x)
    # slow oracle: token row, token column, then half and quarter rows and columns inside a 4x4 cell
    order = [
        x[0, 4 * ty + 2 * i + k, 4 * tx + 2 * j + m]
        for ty, tx in np.ndindex(4, 6)
        for i, j, k, m in np.ndindex(2, 2, 2, 2)
    ]
    assert torch.equal(sam_tiny.pixels_to_tokens(x)[0], torch.stack(order))
    mask = np.random.default_rng(0).random((16, 24)) > 0.5
    area_means = tokens_to_pixels(sam_tiny.low_resolution(mask), 2, 3).numpy()
    assert np.array_equal(area_means, mask.reshape(8, 2, 12, 2).mean(axis=(1, 3)))


def test_padding_is_found_and_changes_nothing():
    sam = random_sam()
    padded = sam.preprocess(torch.randint(0, 256, (1, 3, 192, 384)).float())
    assert occupied_extent(padded) == (192, 384)
    assert occupied_extent(torch.ones(1, 3, 40, 70), 32) == (40, 70)
    assert occupied_extent(F.pad(torch.ones(1, 3, 40, 70), (0, 58, 0, 88)), 32) == (64, 96)
    with torch.no_grad():
        embedding = sam.image_encoder(padded)
        tokens = sam.image_encoder.tokens(padded[:, :, :192])
    assert embedding.shape == (1, 128, 48, 48)
    assert torch.equal(embedding[:, :, :24], tokens) and not embedding[:, :, 24:].any()


@pytest.mark.parametrize("prompt", ["points", "points and boxes", "boxes and masks"])
@torch.no_grad()
def test_decoder_equals_the_package(prompt):
    """The fast decoder on the tokens of the image equals the package's; the tiny SAM's own, on a
    padded embedding, repeats it over the padding.
    """
    sam = random_sam()
    embedding = sam.image_encoder(sam.preprocess(torch.randint(0, 256, (1, 3, 192, 384)).float()))
    points = (torch.rand(5, 2, 2) * torch.tensor([384.0, 192.0]), torch.ones(5, 2, dtype=torch.int))
    boxes = torch.tensor([[10.0, 20, 90, 100]]).repeat(5, 1) if "boxes" in prompt else None
    low = torch.randn(5, 1, 192, 192) if "masks" in prompt else None
    sparse, dense = sam.prompt_encoder(points if "points" in prompt else None, boxes, low)
    pe = sam.prompt_encoder.get_dense_pe()
    masks, iou = sam.mask_decoder.predict_masks(embedding, pe, sparse, dense)
    embedding, pe, dense = (x[..., :24, :] for x in (embedding, pe, dense))
    expected, expected_iou = MaskDecoder.predict_masks(
        sam.mask_decoder, embedding, pe, sparse, dense
    )
    keys, pe = (x.flatten(2).transpose(1, 2)[None] for x in (embedding + dense, pe))
    queries, keys = two_way_transformer(sam.mask_decoder, keys, pe, sparse[None])
    fast = mask_logits(sam.mask_decoder, queries, keys, slice(None))[0]
    fast_iou = sam.mask_decoder.iou_prediction_head(queries[0, :, 0])
    assert masks.shape == (5, 4, 192, 192)
    assert torch.equal(masks[:, :, :96], expected) and torch.equal(iou, expected_iou)
    assert torch.equal(masks[:, :, 96:], masks[:, :, 95:96].expand(-1, -1, 96, -1))
    atol = 1e-5 if low is None else 1e-4
    assert torch.allclose(tokens_to_pixels(fast, 24, 48), expected, atol=atol)
    assert torch.allclose(fast_iou, expected_iou, atol=1e-5)


@torch.no_grad()
def test_batched_training_forward_equals_library_forward():
    """Several images with several prompts at once give what Sam.forward gives one image at a
    time.
    """
    sam = random_sam()
    images = torch.randint(0, 256, (2, 3, 192, 384)).float()
    points = torch.rand(2, 3, 1, 2) * torch.tensor([384.0, 192.0])
    boxes = torch.tensor([[10.0, 20, 90, 100], [50, 5, 60, 60], [200, 100, 383, 191]])
    boxes, ones = boxes.repeat(2, 1, 1), torch.ones(3, 1)
    tokens = sam.image_encoder.tokens((images - sam.pixel_mean) / sam.pixel_std)
    logits, iou, _ = sam_tiny.decoded(sam, tokens, points, boxes, slice(1, None))
    for i in range(2):
        asked = {"image": images[i], "original_size": (192, 384), "boxes": boxes[i]}
        (expected,) = sam([asked | {"point_coords": points[i], "point_labels": ones}], True)
        low = tokens_to_pixels(logits[i], 24, 48)
        assert torch.allclose(low, expected["low_res_logits"][:, :, :96], atol=1e-5)
        assert torch.allclose(iou[i], expected["iou_predictions"], atol=1e-5)


# ----------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("cells", [40, 25])
def test_pair_losses_against_a_slow_oracle(cells):
    """With 25 of 40 cells known, the others have no say: the oracle never sees them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 40, generator=generator)
    targets = (torch.rand(1, 2, 2, 40, generator=generator) > 0.6).float()
    known = (torch.arange(40) < cells).float()[None]
    losses, iou = sam_tiny.pair_losses(logits, targets * known, 0.25, known)
    for k, m, t in np.ndindex(2, 3, 2):
        x, y = logits[0, k, m, :cells], targets[0, k, t, :cells]
        entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        area, p = y.sum(), torch.sigmoid(x)
        balanced = 0.5 * entropy[y > 0].mean() + 0.5 * entropy[y == 0].mean()
        plain = entropy.sum() / (area * cells).sqrt()
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + area + 1)
        expected = 0.25 * balanced + 0.75 * plain + dice
        assert torch.isclose(losses[0, k, m, t], expected, atol=1e-5)
        a, b = x > 0, y > 0
        assert torch.isclose(iou[0, k, m, t], (a & b).sum() / (a | b).sum(), atol=1e-6)


def test_prompts_belong_to_their_targets(scene, photos):
    """On a drawing and on a photograph; neither they nor their targets are where no label is."""
    for picture in (scene, whole(photos[0])):
        segment, height, width = picture.segment, *picture.segment.shape
        for index, area, y0, y1, x0, x1, _ in picture.table:
            ys, xs = np.nonzero(segment == index)
            box = (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1)
            assert (area, y0, y1, x0, x1) == (len(ys), *box)
        for seed in range(5):
            groups = sam_tiny.sample_prompts(np.random.default_rng(seed), picture)
            assert [len(points) for points, _, _ in groups] == [4, 4, 7]
            for points, boxes, targets in groups:
                assert not (targets & (segment == sam_tiny.VOID)).any()
                for around, masks in zip(points, targets):
                    assert all(mask[y, x] for mask in masks for x, y in around)
                for left, top, right, bottom in () if boxes is None else boxes:
                    assert 0 <= left <= right < width and 0 <= top <= bottom < height


def test_boxes_of_stuff_fragments_stand_for_what_they_show():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:25] = True
    box, part = np.array([10, 2, 12, 9]), np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        part[y, x] = mask[y, x] and 10 <= x <= 12 and 2 <= y <= 9
    assert np.array_equal(sam_tiny.box_target(mask, box, True, False), part) and part.sum() == 15
    for fragment, is_thing in ((False, False), (False, True), (True, True)):
        assert sam_tiny.box_target(mask, box, fragment, is_thing) is mask


def test_components_of_labels_are_segments(photos):
    """Every 8-connected component of one class is a segment; nothing is one where there is no label
    or where a component is smaller than 10 pixels.
    """
    label = np.asarray(Image.open(photos[0][1]))
    segment = sam_tiny.components(label, range(3), 10)
    small = np.zeros_like(label, bool)
    small[80:82, 100:104] = True
    assert np.array_equal(segment == sam_tiny.VOID, (label == 255) | small)
    expected = []
    for class_id in range(3):
        found, count = ndimage.label(label == class_id, np.ones((3, 3)))
        expected += [found == i for i in range(1, count + 1) if (found == i).sum() >= 10]
    assert segment.max() + 1 == len(expected) == 3
    assert all(any(np.array_equal(segment == i, mask) for mask in expected) for i in range(3))


def test_photo_windows(photos):
    """Image and label stay together; zoom 1 shows everything; the same index gives the same window,
    another a different one.
    """
    part = sam_tiny.photo_window(photos[2], 1.5, np.ones(2))
    assert not (part.segment == sam_tiny.VOID).any()
    assert abs((whole(photos[2]).segment == sam_tiny.VOID).mean() - 0.1) < 0.02
    for window in (whole(photos[2]), part):
        assert window.image.shape == (288, 384, 3)
        red = window.image[..., 0].astype(int) - window.image[..., 1] > 90
        cars = np.isin(window.segment, window.table[window.table[:, 6] == 1, 0])
        assert sam_tiny.mask_iou(red, cars) > 0.9
    first, again, other = (sam_tiny.random_window(i, photos).image for i in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for _, label in photos:
        Image.new("L", (120, 90), 255).save(label)
    with pytest.raises(UserError, match="no label of 100 windows"):
        sam_tiny.random_window(0, photos)


def test_nothing_is_asked_of_pixels_without_a_label(photos):
    """Neither loss nor gradient depends on the network's output there."""
    _, prompts, known, dense, anchors = sam_tiny.make_batch("photographs", photos, 0, 1)
    logits = torch.zeros(1, 4, 1, known.shape[1], requires_grad=True)
    losses, _ = sam_tiny.pair_losses(logits, prompts[0][2], 0.5, known)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    unknown = known[0] == 0
    assert unknown.any() and not gradient[..., unknown].any() and gradient[..., ~unknown].all()
    output = torch.randn(1, 36, 48, 36, requires_grad=True)
    loss = sam_tiny.auxiliary_loss(nn.Identity(), output.permute(0, 3, 1, 2), dense, anchors)
    (gradient,) = torch.autograd.grad(loss, output)
    dark = dense[2][0] == sam_tiny.VOID
    assert dark.any() and not gradient[0][dark][:, 16:].any()
    assert gradient[0][~dark][:, 16:20].any()


@torch.no_grad()
def test_what_the_iou_head_should_say(shipped, scene):
    """Qualities against a slow oracle; the fit brings the head nearer to them."""
    points = np.array([(100, 150), (300, 40), (20, 20)])
    read, best = sam_tiny.judged_masks(shipped, scene, points)
    assert read.shape == (3, 128) and best.shape == (3, 4)
    predictor = SamPredictor(shipped)
    predictor.set_image(scene.image)
    _, predicted, low = predictor.predict(points[1:2], np.ones(1), multimask_output=True)
    head = shipped.mask_decoder.iou_prediction_head
    assert np.allclose(head(read[1:2])[0, 1:], predicted, atol=1e-3)
    truths = [scene.segment == row[0] for row in scene.table if row[1] >= 10]
    truths += [scene.component == i for i in range(scene.component.max() + 1)]
    shares = [truth.reshape(96, 2, 192, 2).mean(axis=(1, 3)) for truth in truths]
    for mask, value in zip(low[:, :96] > 0, best[1, 1:].tolist()):
        both = [(mask * share).sum() for share in shares]
        slow = max(b / (mask.sum() + share.sum() - b) for b, share in zip(both, shares))
        assert value == pytest.approx(slow, abs=1e-3)
    fitted = random_sam().mask_decoder.iou_prediction_head
    before = (fitted(read) - best).abs().mean()
    with torch.enable_grad():
        sam_tiny.fit_iou_head(fitted, read, best)
    assert (fitted(read) - best).abs().mean() < before


# ----------------------------------------------------------------------------------------- training


@pytest.fixture
def small(tmp_path, monkeypatch, photos):
    """Both recipes with two phases, eight scenes and a checkpoint after every step."""
    monkeypatch.setattr(sam_tiny, "POOL_SCENES", 8)
    monkeypatch.setattr(sam_tiny, "SAVE_EVERY", 1)
    keys = ("from_step", "style", "images", "lr", "steps", "decay_steps", "bf16")
    for name, first in (("drawings", 0), ("photographs", 2)):
        slow, fast = ("random", 2, 2e-3, 100, 80, False), ("mixed", 2, 1e-3, 4, 3, False)
        phases = (first, *slow), (first + 1, *fast)
        recipe = {"warmup": 1, "threads": 1, "iou_scenes": 1, "scenes": 1, "end": first + 2}
        recipe["phases"] = [dict(zip(keys, values)) for values in phases]
        write_json(tmp_path / f"{name}.json", {"recipe": recipe, "training": {"step": 4}})
        monkeypatch.setitem(sam_tiny.WEIGHTS, name, tmp_path / f"{name}.pth")
    return tmp_path


def trained(folder, recipe, work="work"):
    options = ["--work", str(folder / work), "--root-path", str(folder)]
    sam_tiny.main(["train", recipe, *options])
    return torch.load(folder / f"{recipe}.pth", weights_only=True)


def test_training_is_deterministic_and_resumes_exactly(small, monkeypatch):
    """Of both recipes, the second from the weights of the first: killed after a step, the weights
    are those of an undisturbed run, bit for bit. The fit moves the IoU head alone.
    """
    for recipe, first in (("drawings", 0), ("photographs", 2)):
        undisturbed = trained(small, recipe)
        step = sam_tiny.train_step

        def killed(parts, of, number, rows, first=first, step=step):
            if number > first:
                raise KeyboardInterrupt
            step(parts, of, number, rows)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sam_tiny, "train_step", killed)
            trained(small, recipe, "again")
        resumed = trained(small, recipe, "again")
        assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
        before = torch.load(small / f"work/{recipe}/trained.pth", weights_only=True)
        moved = {name for name in before if not torch.equal(before[name], resumed[name])}
        assert moved and all("iou_prediction_head" in name for name in moved)
        record = read_json(small / f"{recipe}.json")
        assert record["training"]["step"] == first + 2 and len(record["recipe"]["phases"]) == 2
    start, end = (torch.load(small / f"{name}.pth") for name in ("drawings", "photographs"))
    assert not torch.equal(start["image_encoder.stem.0.weight"], end["image_encoder.stem.0.weight"])
    build_sam("tiny", small / "photographs.pth")


def test_learning_rate():
    recipe, phase = {"warmup": 10, "phases": [{"from_step": 40}]}, {"lr": 1.0, "decay_steps": 20}
    steps = (40, 44, 49, 150, 180, 190, 199)
    rates = [sam_tiny.learning_rate(step, recipe, phase | {"steps": 200}) for step in steps]
    assert rates == [0.1, 0.5, 1, 1, 1, 0.5, 0.05]


def test_training_lists_hold_no_target_image():
    """CamVid: the tiny SAM's lists are the day drives', apart; dusk (0001TP) is in none."""
    names = ("day", "sam_train", "sam_holdout")
    lists = ([row[0] for row in read_list(ROOT / f"splits/camvid/{name}.txt")] for name in names)
    day, train, held_out = lists
    assert len(day) == 406 and len(held_out) == 40
    assert sorted(train + held_out) == sorted(day)
    assert not any("0001TP" in name for name in day)
    for drive in ("0006R0", "0016E5"):  # the last 20 frames of train/ are held out
        frames = sorted(name for name in day if name.startswith(f"camvid/train/{drive}"))
        assert set(frames[-20:]) == {name for name in held_out if drive in name}


# ---------------------------------------------------------------------------------- shipped weights


@pytest.mark.parametrize("name", ["sam_tiny", "sam_tiny_photo"])
def test_shipped_weights_are_those_told_of(name):
    """They load, and have hash, size and training of model/README.md and of their record."""
    path = TINY_CHECKPOINT.with_name(f"{name}.pth")
    sam = build_sam("tiny", path)
    assert sam.image_encoder.img_size == 384 and not sam.training
    assert sum(p.numel() for p in sam.parameters()) <= 4_000_000 and path.stat().st_size <= 8e6
    told = (ROOT / "model/README.md").read_text()
    assert sha256(path).startswith(re.search(rf"`{name}.pth` .*`([0-9a-f]{{12}})` \|", told)[1])
    record = read_json(path.with_suffix(".json"))
    phases = record["recipe"]["phases"]
    starts = [phase["from_step"] for phase in phases]
    assert starts == sorted(starts) and starts[-1] < record["recipe"]["end"] <= phases[-1]["steps"]
    assert record["recipe"]["end"] == record["training"]["step"]
    for name in record["results"].keys() & {"sam_holdout", "dusk_gt"}:
        for found in record["results"][name]["prompts"].values():
            assert found["every size"]["iou"] > found["every size"]["fill"]


def test_other_image_shapes(shipped):
    """A portrait image and one whose sides are no multiples of 32 pass through the predictor."""
    predictor = SamPredictor(shipped)
    for shape in ((70, 50, 3), (97, 203, 3)):
        predictor.set_image(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        masks, _, _ = predictor.predict(np.array([[10, 10]]), np.array([1]))
        assert masks.shape == (3, *shape[:2])


def test_shipped_weights_work(shipped, scene):
    """Boxes and points beat filling the box; the generator's coarse grid (8 points a side, for
    speed) proposes masks that fit the scene.
    """
    scenes = [scene, *(sam_tiny.drawing(8_500_000 + i, "target") for i in (1, 2))]
    predictor, rows = SamPredictor(shipped), []
    for i, picture in enumerate(scenes):
        rows += sam_tiny.prompt_scene(predictor, picture, np.random.default_rng(i))
    things = [row for row in rows if row["thing"]]
    assert len(things) >= 10
    assert np.mean([r["iou"] for r in things]) > np.mean([r["fill"] for r in things]) + 0.1
    generator = SamAutomaticMaskGenerator(shipped, points_per_side=8)
    found = sam_tiny.propose_scene(generator, scene)
    assert found["number"] >= 3 and np.mean(found["iou"]) > 0.8 and found["covered"] > 0.5


def test_measures_against_loops(small, monkeypatch):
    """What `eval` writes, of given prompts and proposals. A proposal that is right where there is a
    label has IoU 1, whatever it does elsewhere; one on no labeled pixel is not counted.
    """
    rows = sam_tiny.photo_rows("sam_holdout", small)
    picture = whole(rows[0])
    known = picture.segment != sam_tiny.VOID
    wall = picture.segment == picture.table[1, 0]
    masks = [{"segmentation": mask} for mask in (wall | ~known, ~known)]
    generator = SimpleNamespace(generate=lambda image: masks)
    found = sam_tiny.propose_scene(generator, picture)
    assert (found["number"], found["iou"]) == (1, [1.0])
    stuff = known & ~np.isin(picture.segment, picture.table[picture.table[:, 6] == 1, 0])
    assert found["covered"] == pytest.approx(wall.sum() / known.sum())
    assert found["stuff_covered"] == pytest.approx((wall & stuff).sum() / stuff.sum())

    prompted = [
        {"area": area, "thing": area % 2 == 0, "iou": area / 4000, "fill": 0.5}
        for area in (10, 49, 50, 60, 2000, 3000)
    ]
    monkeypatch.setattr(sam_tiny, "prompt_scene", lambda *_: prompted)
    monkeypatch.setattr(sam_tiny, "SamAutomaticMaskGenerator", lambda sam: generator)
    monkeypatch.setattr(sam_tiny, "STYLES", ())
    (small / "photographs.pth").write_bytes(TINY_CHECKPOINT.read_bytes())
    sam_tiny.main(["eval", "photographs", "--root-path", str(small)])
    record = read_json(small / "photographs.json")
    assert record["training"] == {"step": 4} and [*record["results"]] == ["sam_holdout", "dusk_gt"]
    bins = record["results"]["dusk_gt"]["prompts"]
    assert [v["n"] for v in bins["all"].values()] == [2, 2, 0, 0, 2, 6]
    assert [v["n"] for v in bins["things"].values()] == [1, 2, 0, 0, 2, 5]
    assert bins["all"]["50 to 150"] == {"n": 2, "iou": 0.014, "fill": 0.5}
    assert bins["all"]["150 to 500"] == {"n": 0, "iou": None, "fill": None}
    proposals = record["results"]["dusk_gt"]["proposals"]
    assert proposals["number"] == 1 and proposals["iou"] == 1
    assert proposals["covered"] == round(wall.sum() / known.sum(), 3)


# ------------------------------------------------------------------------------------------- errors


@pytest.fixture
def official(monkeypatch):
    """Weights of vit_b as a model of one layer, so that the tests need no gigabytes."""

    def small():
        model = nn.Module()
        model.image_encoder = nn.Module()
        model.image_encoder.pos_embed = nn.Parameter(torch.zeros(1, 2, 2, 768))
        return model

    monkeypatch.setitem(sam_model_registry, "vit_b", small)
    return small().state_dict()


def test_official_checkpoint_loads(tmp_path, official):
    official["image_encoder.pos_embed"] += 3
    torch.save(official, tmp_path / "mine.pth")
    sam = build_sam("vit_b", tmp_path / "mine.pth")
    assert not sam.training and sam.image_encoder.pos_embed.mean() == 3


@pytest.mark.parametrize("sam_type", ["vit_h", "vit_l", "vit_b"])
def test_missing_official_checkpoint_names_file_and_address(sam_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        build_sam(sam_type)
    name = WEIGHTS[sam_type].name
    assert f"pretrained/{name}" in str(error.value)
    assert f"https://dl.fbaipublicfiles.com/segment_anything/{name}" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_checkpoints(tmp_path, official):
    contents = {
        WEIGHTS["vit_b"].name: official,
        "b.pth": official,
        "other.pth": {"weights": 1},
        "unknown.pth": {"x": torch.zeros(1)},
        "more.pth": {**official, "image_encoder.more": torch.zeros(1)},
        "object.pth": SimpleNamespace(a=1),
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("not a weight file\n")
    (tmp_path / "cut.pth").write_bytes(TINY_CHECKPOINT.read_bytes()[:100_000])
    (tmp_path / "tiny.pth").write_bytes(TINY_CHECKPOINT.read_bytes())
    for sam_type, name, message in (
        ("vit_b", WEIGHTS["vit_b"].name, "MD5"),
        ("tiny", "b.pth", "weights of vit_b, not of --sam-type tiny"),
        ("vit_h", "b.pth", "give --sam-type vit_b"),
        ("vit_h", "tiny.pth", "not of --sam-type vit_h; give --sam-type tiny"),
        ("vit_b", "other.pth", "no plain state dict"),
        ("vit_b", "unknown.pth", "unknown model"),
        ("vit_b", "more.pth", "does not fit"),
        ("tiny", "text.pth", "cut short or no PyTorch"),
        ("tiny", "cut.pth", "cut short or no PyTorch"),
        ("tiny", "object.pth", "cut short or no PyTorch"),
        ("tiny", "missing.pth", "no such file"),
        ("vit_x", "b.pth", "choose one of vit_h, vit_l, vit_b, vit_t, tiny"),
    ):
        with pytest.raises(UserError) as error:
            build_sam(sam_type, tmp_path / name)
        said = str(error.value)
        assert message in said and "\n" not in said, (name, said)
