"""The tiny SAM: same numbers as the package's decoder, weights that work, clear errors,
reproducible training."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import MaskDecoder

from dataset.toy import draw_scene
from model import sam as model_sam
from model.sam import OFFICIAL_CHECKPOINTS, build_sam
from model.sam_decoder import pixels_to_tokens, tokens_to_pixels
from model.sam_tiny import TINY_CHECKPOINT, build_sam_tiny, occupied_extent
from scripts.dev import eval_sam_tiny, train_sam_tiny
from util.labels import class_set, read_list
from util.run import UserError


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return build_sam("tiny")


@pytest.fixture(scope="module")
def scenes():
    drawn = [draw_scene(8_500_000 + i, "target", 192, 384) for i in range(3)]
    return [eval_sam_tiny.example_of(scene) for scene in drawn]


STREET = ["--class-num", "3", "--stuff", "0", "1", "--things", "2"]


@pytest.fixture
def photo_list(tmp_path):
    """Four noisy photographs of 120x90: a street (0) under a wall (1), two cars (2) on it, one of
    8 pixels; the left tenth has no label (255).
    """
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        label = np.zeros((90, 120), np.uint8)
        label[:40], label[50:70, 40 + i : 80 + i], label[80:82, 100:104] = 1, 2, 2
        label[:, :12] = 255
        colours = np.array([[90, 90, 90], [150, 110, 80], [200, 30, 30]] + [[0, 255, 0]] * 253)
        image = colours[label] + rng.normal(0, 8, (90, 120, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(label).save(tmp_path / f"{i}_label.png")
        rows.append(f"{i}.png {i}_label.png\n")
    (tmp_path / "list.txt").write_text("".join(rows))
    return tmp_path / "list.txt"


def street_photographs(photo_list):
    classes = class_set(3, [0, 1], [2])
    return train_sam_tiny.read_photographs(photo_list, photo_list.parent, classes)


def random_sam():
    torch.manual_seed(1)
    sam = build_sam_tiny()
    train_sam_tiny.initialise(sam, 1)
    return sam


# ------------------------------------------------------------------------------------- architecture


def test_size_and_parts():
    sam = build_sam_tiny()
    assert sum(p.numel() for p in sam.parameters()) <= 4_000_000
    assert sam.image_encoder.img_size == 384 and not sam.training
    assert isinstance(sam.mask_decoder, MaskDecoder)
    assert TINY_CHECKPOINT.stat().st_size <= 8e6


def test_token_order_is_a_bijection():
    x = torch.arange(3 * 16 * 24.0).view(3, 16, 24)
    assert torch.equal(tokens_to_pixels(pixels_to_tokens(x), 4, 6), x)
    # slow oracle: token row, token column, then half and quarter rows and columns inside a 4x4 cell
    order = [
        x[0, 4 * ty + 2 * i + k, 4 * tx + 2 * j + m]
        for ty in range(4)
        for tx in range(6)
        for i in range(2)
        for j in range(2)
        for k in range(2)
        for m in range(2)
    ]
    assert torch.equal(pixels_to_tokens(x)[0], torch.stack(order))


def test_padding_is_found_and_changes_nothing():
    sam = random_sam()
    image = torch.randint(0, 256, (1, 3, 192, 384)).float()
    padded = sam.preprocess(image)
    assert occupied_extent(padded) == (192, 384)
    assert occupied_extent(torch.ones(1, 3, 40, 70), 32) == (40, 70)
    assert occupied_extent(
        torch.nn.functional.pad(torch.ones(1, 3, 40, 70), (0, 58, 0, 88)), 32
    ) == (64, 96)
    with torch.no_grad():
        embedding = sam.image_encoder(padded)
        tokens = sam.image_encoder.tokens(padded[:, :, :192])
    assert embedding.shape == (1, 128, 48, 48)
    assert torch.equal(embedding[:, :, :24], tokens) and not embedding[:, :, 24:].any()


@pytest.mark.parametrize("with_box", [False, True])
def test_decoder_equals_the_package(with_box):
    """The fast decoder on a padded embedding equals MaskDecoder.predict_masks on the tokens of the
    image.
    """
    sam = random_sam()
    with torch.no_grad():
        embedding = sam.image_encoder(
            sam.preprocess(torch.randint(0, 256, (1, 3, 192, 384)).float())
        )
        points = torch.rand(5, 2, 2) * torch.tensor([384.0, 192.0])
        boxes = torch.tensor([[10.0, 20, 90, 100]]).repeat(5, 1) if with_box else None
        sparse, dense = sam.prompt_encoder((points, torch.ones(5, 2, dtype=torch.int)), boxes, None)
        pe = sam.prompt_encoder.get_dense_pe()
        masks, iou = sam.mask_decoder.predict_masks(embedding, pe, sparse, dense)
        expected, expected_iou = MaskDecoder.predict_masks(
            sam.mask_decoder, embedding[..., :24, :], pe[..., :24, :], sparse, dense[..., :24, :]
        )
    assert masks.shape == (5, 4, 192, 192)
    assert torch.allclose(masks[:, :, :96], expected, atol=1e-5) and torch.allclose(
        iou, expected_iou, atol=1e-5
    )
    assert torch.equal(masks[:, :, 96:], masks[:, :, 95:96].expand(-1, -1, 96, -1))


def test_mask_prompts_too_equal_the_package():
    sam = random_sam()
    with torch.no_grad():
        embedding = sam.image_encoder(
            sam.preprocess(torch.randint(0, 256, (1, 3, 192, 384)).float())
        )
        sparse, dense = sam.prompt_encoder(
            None, torch.tensor([[10.0, 20, 90, 100]] * 2), torch.randn(2, 1, 192, 192)
        )
        pe = sam.prompt_encoder.get_dense_pe()
        masks, _ = sam.mask_decoder.predict_masks(embedding, pe, sparse, dense)
        expected, _ = MaskDecoder.predict_masks(
            sam.mask_decoder, embedding[..., :24, :], pe[..., :24, :], sparse, dense[..., :24, :]
        )
    assert torch.allclose(masks[:, :, :96], expected, atol=1e-4)


def test_batched_training_forward_equals_library_forward():
    """Several images with several prompts at once give what Sam.forward gives one image at a
    time.
    """
    sam = random_sam()
    images = torch.randint(0, 256, (2, 3, 192, 384)).float()
    points = torch.rand(2, 3, 1, 2) * torch.tensor([384.0, 192.0])
    boxes = torch.tensor([[10.0, 20, 90, 100], [50, 5, 60, 60], [200, 100, 383, 191]]).repeat(
        2, 1, 1
    )
    library = sam(
        [
            {
                "image": image,
                "original_size": (192, 384),
                "boxes": box,
                "point_coords": point,
                "point_labels": torch.ones(3, 1),
            }
            for image, point, box in zip(images, points, boxes)
        ],
        True,
    )
    with torch.no_grad():
        tokens = sam.image_encoder.tokens((images - sam.pixel_mean) / sam.pixel_std)
        keys, sparse = train_sam_tiny.prompted(sam, tokens, points, boxes)
        pe = sam.prompt_encoder.get_dense_pe()[..., :24, :].flatten(2).transpose(1, 2)
        logits, iou = sam.mask_decoder.decode(keys, pe, sparse, slice(1, None))
    for i, expected in enumerate(library):
        assert torch.allclose(
            tokens_to_pixels(logits[i], 24, 48), expected["low_res_logits"][:, :, :96], atol=1e-5
        )
        assert torch.allclose(iou[i], expected["iou_predictions"], atol=1e-5)


def test_other_image_shapes(shipped):
    """A portrait image and one whose sides are no multiples of 32 pass through predictor and
    generator.
    """
    predictor = SamPredictor(shipped)
    for shape in ((70, 50, 3), (97, 203, 3)):
        predictor.set_image(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        masks, _, _ = predictor.predict(
            point_coords=np.array([[10, 10]]), point_labels=np.array([1])
        )
        assert masks.shape == (3, *shape[:2])


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("cells", [40, 25])
def test_pair_losses_against_a_slow_oracle(cells):
    """With 25 of 40 cells known, the others have no say: the oracle never sees them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 40, generator=generator)
    targets = (torch.rand(1, 2, 2, 40, generator=generator) > 0.6).float()
    known = (torch.arange(40) < cells).float()[None]
    losses, iou = train_sam_tiny.pair_losses(logits, targets * known, 0.25, known)
    logits, targets = logits[..., :cells], targets[..., :cells]
    for k in range(2):
        for m in range(3):
            for t in range(2):
                x, y = logits[0, k, m], targets[0, k, t]
                entropy = torch.nn.functional.binary_cross_entropy_with_logits(
                    x, y, reduction="none"
                )
                area, p = y.sum(), torch.sigmoid(x)
                balanced = 0.5 * entropy[y > 0].mean() + 0.5 * entropy[y == 0].mean()
                plain = entropy.sum() / (area * cells).sqrt()
                dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + area + 1)
                assert torch.isclose(
                    losses[0, k, m, t], 0.25 * balanced + 0.75 * plain + dice, atol=1e-5
                )
                a, b = x > 0, y > 0
                assert torch.isclose(iou[0, k, m, t], (a & b).sum() / (a | b).sum(), atol=1e-6)


def test_low_resolution_is_the_area_mean():
    mask = np.random.default_rng(0).random((16, 24)) > 0.5
    expected = mask.reshape(8, 2, 12, 2).mean(axis=(1, 3))
    assert np.array_equal(
        tokens_to_pixels(train_sam_tiny.low_resolution(mask), 2, 3).numpy(), expected
    )


def test_prompts_belong_to_their_targets(scenes):
    scene = scenes[0]
    segment = np.asarray(scene.segment, np.int32)
    table = train_sam_tiny.segment_table(segment, scene.label)
    for index, area, y0, y1, x0, x1, _ in table:
        ys, xs = np.nonzero(segment == index)
        assert (area, y0, y1, x0, x1) == (len(ys), ys.min(), ys.max() + 1, xs.min(), xs.max() + 1)
    p = train_sam_tiny.sample_prompts(np.random.default_rng(0), segment, scene.component, table)
    for boxes, points, targets in zip(p.boxes, p.box_points, p.box_targets):
        for box, pair, target in zip(boxes, points, targets):
            assert (
                (box >= 0).all() and box[2] <= 383 and box[3] <= 191 and (box[2:] > box[:2]).all()
            )
            assert all(target[y, x] for x, y in pair)
    for ((x, y),), target, alternative in zip(p.points, p.targets, p.alternatives):
        assert target[y, x] and alternative[y, x]


# -------------------------------------------------------------------------------------- photographs


def test_components_of_labels_are_segments(photo_list):
    """Every 8-connected component of one class is a segment; nothing is one where there is no label
    or where a component is smaller than 10 pixels.
    """
    photographs = street_photographs(photo_list)
    _, label = photographs.read(0)
    segment = train_sam_tiny.labeled_components(label, photographs.classes)
    small = np.zeros_like(label, bool)
    small[80:82, 100:104] = True
    assert np.array_equal(segment == train_sam_tiny.VOID, (label == 255) | small)
    found = [segment == i for i in range(segment.max() + 1)]
    expected = []
    for class_id in range(3):
        components, count = ndimage.label(label == class_id, np.ones((3, 3)))
        expected += [components == i for i in range(1, count + 1) if (components == i).sum() >= 10]
    assert len(found) == len(expected) == 3
    assert all(any(np.array_equal(a, b) for b in expected) for a in found)


def test_photo_windows(photo_list):
    """Windows have the photographs' shape with the long side of a drawing; image and label stay
    together; zoom 1 shows everything; the same index gives the same window, another a different
    one.
    """
    photographs = street_photographs(photo_list)
    assert photographs.size == (288, 384)
    image, label = photographs.read(2)
    whole, whole_label = train_sam_tiny.photo_window(image, label, (288, 384), 1, np.zeros(2))
    assert whole.shape == (288, 384, 3)
    assert np.array_equal(np.unique(whole_label), [0, 1, 2, 255])
    assert abs((whole_label == 2).mean() - (label == 2).mean()) < 0.005
    part, part_label = train_sam_tiny.photo_window(image, label, (288, 384), 1.5, np.ones(2))
    assert not (part_label == 255).any()
    for picture, mask in ((whole, whole_label == 2), (part, part_label == 2)):
        red = picture[..., 0].astype(int) - picture[..., 1] > 90
        assert eval_sam_tiny.mask_iou(red, mask) > 0.9
    drawn = [train_sam_tiny.draw_photo_window(i, photographs) for i in (0, 0, 1)]
    assert np.array_equal(drawn[0][0], drawn[1][0]) and not np.array_equal(drawn[0][0], drawn[2][0])
    wide, nothing = Image.new("RGB", (300, 60)), np.zeros((60, 300), np.uint8)
    wide = train_sam_tiny.photo_window(wide, nothing, (192, 384), 1, np.ones(2))
    assert wide[0].shape == (192, 384, 3)


def test_nothing_is_asked_of_pixels_without_a_label(photo_list):
    """Prompts and targets keep off them, and neither loss nor gradient depends on the network's
    output there.
    """
    photographs = street_photographs(photo_list)
    image, label = train_sam_tiny.photo_window(
        *photographs.read(0), photographs.size, 1, np.zeros(2)
    )
    segment = train_sam_tiny.labeled_components(label, photographs.classes)
    table = train_sam_tiny.segment_table(segment, label, photographs.classes.stuff)
    void = segment == train_sam_tiny.VOID
    assert void.mean() > 0.09 and sorted(table[:, 6]) == [0, 0, 1, 1]
    nothing = np.zeros_like(segment)
    for seed in range(5):
        p = train_sam_tiny.sample_prompts(np.random.default_rng(seed), segment, nothing, table)
        assert not any((target & void).any() for targets in p.box_targets for target in targets)
        assert not (p.targets & void).any() and np.array_equal(p.targets, p.alternatives)
        for points in (*p.box_points, p.points):
            assert not void[points[..., 1], points[..., 0]].any()
    pool = [image[None], segment[None].astype(np.int16), nothing[None], [table]]
    batch = train_sam_tiny.make_batch(pool, 0, 0, 1, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    flipped = not np.array_equal(batch.images[0].permute(1, 2, 0).numpy().astype(np.uint8), image)
    expected = (~void[:, ::-1] if flipped else ~void).reshape(144, 2, 192, 2).mean(axis=(1, 3))
    known = tokens_to_pixels(batch.known[0], 36, 48)
    assert np.allclose(known.numpy(), expected)
    logits = torch.zeros(1, 4, 1, batch.known.shape[1], requires_grad=True)
    losses, _ = train_sam_tiny.pair_losses(logits, batch.box_targets[0], 0.5, batch.known)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    unknown = batch.known[0] == 0
    assert not gradient[..., unknown].any() and gradient[..., ~unknown].all()
    head = train_sam_tiny.AuxiliaryHead(128)
    head.forward = lambda x: x.permute(0, 2, 3, 1).split((16, 4, 16), dim=-1)
    dense = torch.randn(1, 36, 36, 48, requires_grad=True)
    loss, _ = train_sam_tiny.auxiliary_loss(head, dense, batch)
    (gradient,) = torch.autograd.grad(loss, dense)
    dark = batch.centre.view(36, 48) == train_sam_tiny.VOID
    assert dark.any() and not gradient[0, 16:, dark].any() and gradient[0, 16:20, ~dark].any()


def test_training_with_photographs(tmp_path, photo_list):
    """Three of four images are photographs; another list makes another pool; the record names the
    list. Errors are one line.
    """
    options = [*STREET, "--photos", str(photo_list), "--root-path", str(photo_list.parent)]
    weights = tiny_run(tmp_path / "a", 2, *options, "--images", "4")
    again = tiny_run(tmp_path / "b", 1, *options, "--images", "4")
    resumed = tiny_run(tmp_path / "b", 2, *options, "--images", "4", "--resume")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert not all(torch.equal(weights[name], again[name]) for name in weights)
    phase = json.loads((tmp_path / "a/training.json").read_text())["phases"][-1]
    assert phase["photos"] == photo_list.as_posix()
    assert len(list((tmp_path / "pool").glob("photos_*"))) == 1
    photo_list.write_text("".join(photo_list.read_text().splitlines(True)[:3]))
    tiny_run(tmp_path / "c", 1, *options)
    assert len(list((tmp_path / "pool").glob("photos_*"))) == 2
    fit = [*options, "--scenes", "8", "--threads", "1", "--pool", str(tmp_path / "pool")]
    fit += ["--run-folder", str(tmp_path / "d"), "--init", str(tmp_path / "a/w.pth")]
    train_sam_tiny.main([*fit, "--out", str(tmp_path / "d.pth"), "--iou-head", "1"])
    assert (tmp_path / "d.pth").is_file()
    with pytest.raises(UserError, match="--images 1: give 2 or more with --photos"):
        tiny_run(tmp_path / "e", 1, *options, "--images", "1")
    for i in range(4):
        Image.new("L", (120, 90), 255).save(tmp_path / f"{i}_label.png")
    with pytest.raises(UserError, match="labeled pixels in one piece") as error:
        train_sam_tiny.draw_photo_window(0, street_photographs(photo_list))
    assert "\n" not in str(error.value)
    Image.new("L", (60, 45)).save(tmp_path / "0_label.png")
    with pytest.raises(UserError, match="0_label.png: is 60x45, its image 120x90"):
        street_photographs(photo_list).read(0)


def test_training_lists_hold_no_target_image():
    """CamVid: the tiny SAM's lists are the day drives', apart; dusk (0001TP) is in none."""
    folder = Path(__file__).resolve().parents[1] / "splits/camvid"
    day, train, held_out = (
        [row[0] for row in read_list(folder / f"{name}.txt")]
        for name in ("day", "sam_train", "sam_holdout")
    )
    assert len(day) == 406 and len(held_out) == 40
    assert sorted(train + held_out) == sorted(day)
    assert not any("0001TP" in name for name in day)
    for drive in ("0006R0", "0016E5"):  # the last 20 frames of train/ are held out
        frames = sorted(name for name in day if name.startswith(f"camvid/train/{drive}"))
        assert set(frames[-20:]) == {name for name in held_out if drive in name}


# ----------------------------------------------------------------------------------------- training


def tiny_run(folder: Path, steps: int, *options: str) -> dict:
    train_sam_tiny.main(
        [
            "--pool",
            str(folder.parent / "pool"),
            "--run-folder",
            str(folder),
            "--out",
            str(folder / "w.pth"),
            "--scenes",
            "8",
            "--images",
            "2",
            "--warmup",
            "1",
            "--decay-steps",
            "1",
            "--save-every",
            "1",
            "--threads",
            "1",
            "--device",
            "cpu",
            "--steps",
            str(steps),
            *options,
        ]
    )
    return torch.load(folder / "w.pth", weights_only=True)


def test_training_is_deterministic_and_resumes_exactly(tmp_path):
    """Two runs of three steps agree bit for bit, and so does one stopped after two. (--decay-steps
    1 keeps the learning rate of the first steps independent of --steps.)
    """
    first = tiny_run(tmp_path / "a", 3)
    again = tiny_run(tmp_path / "b", 3)
    tiny_run(tmp_path / "c", 2)
    resumed = tiny_run(tmp_path / "c", 3, "--resume")
    start = random_sam().state_dict()
    assert all(
        torch.equal(first[name], again[name]) and torch.equal(first[name], resumed[name])
        for name in first
    )
    assert not torch.equal(
        first["image_encoder.stem.0.weight"].float(), start["image_encoder.stem.0.weight"]
    )
    assert json.loads((tmp_path / "a/training.json").read_text())["step"] == 3
    with pytest.raises(UserError, match="--resume"):
        tiny_run(tmp_path / "a", 3)
    build_sam("tiny", tmp_path / "a/w.pth")


def test_exported_weights_are_trained_further(tmp_path):
    """--init starts from what --out holds (to fp16), and its record's steps and phases go on."""
    exported = tiny_run(tmp_path / "a", 2)
    (tmp_path / "a/w.json").write_text(
        json.dumps({"training": json.loads((tmp_path / "a/training.json").read_text())})
    )
    sam = random_sam()
    record = train_sam_tiny.load_exported(sam, 4.0, tmp_path / "a/w.pth")
    for name, value in sam.state_dict().items():
        gain = 4.0 if train_sam_tiny.gains(name) else 1.0
        assert torch.equal(value, exported[name].float() / gain)
    assert any(train_sam_tiny.gains(name) for name in exported) and record["step"] == 2
    tiny_run(tmp_path / "b", 3, "--init", str(tmp_path / "a/w.pth"))
    record = json.loads((tmp_path / "b/training.json").read_text())
    assert record["step"] == 3 and [phase["from_step"] for phase in record["phases"]] == [0, 2]
    with pytest.raises(UserError, match="no such"):
        tiny_run(tmp_path / "c", 3, "--init", str(tmp_path / "none.pth"))


def test_boxes_of_stuff_fragments_stand_for_what_they_show():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:25] = True
    box = np.array([10, 2, 12, 9])
    part = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        part[y, x] = mask[y, x] and 10 <= x <= 12 and 2 <= y <= 9
    assert (
        np.array_equal(train_sam_tiny.box_target(mask, box, True, False), part) and part.sum() == 15
    )
    for fragment, is_thing in ((False, False), (False, True), (True, True)):
        assert train_sam_tiny.box_target(mask, box, fragment, is_thing) is mask


def test_iou_head_alone_is_fitted(tmp_path):
    """Qualities against a slow oracle; the fit moves the IoU head and nothing else, and raises what
    it says.
    """
    tiny_run(tmp_path / "a", 1)
    pool = train_sam_tiny.load_pool(tmp_path / "pool/random_8", None, 8, 1)
    sam = build_sam("tiny", tmp_path / "a/w.pth")
    image, segment, component, tables = (array[0] for array in pool)
    read, best = train_sam_tiny.judged_masks(
        sam, pool, 0, np.array([(100, 150), (300, 40), (20, 20)])
    )
    assert read.shape == (3, 128) and best.shape == (3, 4)
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(image))
    _, predicted, low = predictor.predict(
        point_coords=np.array([(300, 40)]), point_labels=np.ones(1), multimask_output=True
    )
    assert np.allclose(
        sam.mask_decoder.iou_prediction_head(read[1:2])[0, 1:].detach(), predicted, atol=1e-3
    )
    masks = low[:, :96] > 0
    truths = [segment == row[0] for row in tables if row[1] >= 10]
    truths += [component == number for number in np.unique(component[component > 0])]
    for mask, value in zip(masks, best[1, 1:].tolist()):
        shares = [truth.reshape(96, 2, 192, 2).mean(axis=(1, 3)) for truth in truths]
        slow = max(
            (mask * share).sum() / (mask.sum() + share.sum() - (mask * share).sum())
            for share in shares
        )
        assert value == pytest.approx(slow, abs=1e-3)

    options = [
        "--pool",
        str(tmp_path / "pool"),
        "--run-folder",
        str(tmp_path / "b"),
        "--scenes",
        "8",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--iou-head",
        "2",
    ]
    train_sam_tiny.main(
        [*options, "--init", str(tmp_path / "a/w.pth"), "--out", str(tmp_path / "b.pth")]
    )
    before, after = (
        torch.load(path, weights_only=True) for path in (tmp_path / "a/w.pth", tmp_path / "b.pth")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("iou_prediction_head" in name for name in changed)
    assert "iou_head" in json.loads((tmp_path / "b/training.json").read_text())
    head = sam.mask_decoder.iou_prediction_head
    train_sam_tiny.fit_iou_head(head, read, best, seed=0)
    again = build_sam("tiny", tmp_path / "a/w.pth").mask_decoder.iou_prediction_head
    wrong = [float((h(read) - best).abs().mean().detach()) for h in (head, again)]
    assert wrong[0] < wrong[1]
    with pytest.raises(UserError, match="--iou-head 2: it needs --init"):
        train_sam_tiny.main(options)


def test_learning_rate():
    rate = lambda step: train_sam_tiny.learning_rate(step, 100, 1.0, 10, 20)  # noqa: E731
    assert [rate(0), rate(4), rate(9), rate(50), rate(80), rate(90), rate(99)] == [
        0.1,
        0.5,
        1,
        1,
        1,
        0.5,
        0.05,
    ]
    assert train_sam_tiny.learning_rate(44, 100, 1.0, 10, 20, first=40) == 0.5


# ---------------------------------------------------------------------------------- shipped weights


def test_box_and_points_beat_filling_the_box(shipped, scenes):
    predictor = SamPredictor(shipped)
    rows = [
        row
        for i, scene in enumerate(scenes)
        for row in eval_sam_tiny.prompt_scene(predictor, scene, np.random.default_rng(i))
        if row["thing"]
    ]
    assert len(rows) >= 10
    assert np.mean([row["iou"] for row in rows]) > np.mean([row["fill"] for row in rows]) + 0.1


def test_proposals_at_the_official_thresholds(shipped, scenes):
    """The generator's coarse grid (8 points a side, for speed) proposes masks that fit the
    scene.
    """
    found = eval_sam_tiny.propose_scene(
        SamAutomaticMaskGenerator(shipped, points_per_side=8), scenes[0]
    )
    assert found["number"] >= 3 and np.mean(found["iou"]) > 0.8 and found["covered"] > 0.5


def test_weights_that_know_photographs_ship_with_their_record():
    """They load, and their record is of photographs: prompts beat filling the box on day drives
    that were held out and on dusk.
    """
    path = TINY_CHECKPOINT.with_name("sam_tiny_photo.pth")
    assert path.stat().st_size <= 8e6
    build_sam("tiny", path)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["training"]["phases"][-1]["photos"] == "splits/camvid/sam_train.txt"
    for name in ("sam_holdout", "dusk_gt"):
        for kind in ("things", "all"):
            measured = record["results"][name]["prompts"][kind]["every size"]
            assert measured["iou"] > measured["fill"]


def test_evaluation_summary(tmp_path, scenes, photo_list, monkeypatch):
    monkeypatch.setattr(eval_sam_tiny, "drawing", lambda *_, **__: scenes[0])
    monkeypatch.setattr(
        eval_sam_tiny,
        "SamAutomaticMaskGenerator",
        lambda sam: SamAutomaticMaskGenerator(sam, points_per_side=2),
    )
    options = [*STREET, "--photos", str(photo_list), "--root-path", str(photo_list.parent)]
    options += ["--scenes", "1", "--styles", "target", "--device", "cpu"]
    eval_sam_tiny.main([*options, "--out", str(tmp_path / "r.json")])
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(results) == ["target", "list"]
    for result in results.values():
        bins = result["prompts"]["all"]
        sizes = sum(v["n"] for k, v in bins.items() if k != "every size")
        assert bins["every size"]["n"] == sizes > 0
    assert results["list"]["prompts"]["all"]["every size"]["n"] == 4


def test_only_labeled_pixels_are_measured(photo_list):
    """A proposal that is right where there is a label has IoU 1, whatever it does elsewhere; one on
    no labeled pixel is not counted.
    """

    class Generator:
        def generate(self, image):
            wall = scene.label == 1
            return [{"segmentation": mask} for mask in (wall | ~scene.known, ~scene.known)]

    scene = eval_sam_tiny.photograph(0, street_photographs(photo_list), 4)
    found = eval_sam_tiny.propose_scene(Generator(), scene)
    assert found["iou"] == [1.0] and found["number"] == 1
    stuff = np.isin(scene.label, (0, 1)) & scene.known
    share = (scene.label == 1).sum() / scene.known.sum()
    assert found["covered"] == found["covered_well"] == pytest.approx(share)
    assert found["stuff_covered"] == pytest.approx((scene.label == 1).sum() / stuff.sum())


# ------------------------------------------------------------------------------------------- errors


def small_official(monkeypatch):
    """Replace the official builders by a model of one layer, so that the tests need no
    gigabytes.
    """

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image_encoder = torch.nn.Module()
            self.image_encoder.pos_embed = torch.nn.Parameter(torch.zeros(1, 2, 2, 768))

    monkeypatch.setitem(sam_model_registry, "vit_b", Small)
    return Small().state_dict()


def test_official_checkpoint_loads(tmp_path, monkeypatch):
    state = small_official(monkeypatch)
    state["image_encoder.pos_embed"] += 3
    torch.save(state, tmp_path / "mine.pth")
    sam = build_sam("vit_b", tmp_path / "mine.pth")
    assert not sam.training and sam.image_encoder.pos_embed.mean() == 3


@pytest.mark.parametrize("sam_type", ["vit_h", "vit_l", "vit_b"])
def test_missing_official_checkpoint_names_file_and_address(sam_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        build_sam(sam_type)
    name = OFFICIAL_CHECKPOINTS[sam_type]
    assert f"pretrained/{name}" in str(error.value)
    assert f"https://dl.fbaipublicfiles.com/segment_anything/{name}" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_checkpoints(tmp_path, monkeypatch):
    state = small_official(monkeypatch)
    torch.save(state, tmp_path / OFFICIAL_CHECKPOINTS["vit_b"])
    torch.save(state, tmp_path / "b.pth")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "unknown.pth")
    torch.save({**state, "image_encoder.more": torch.zeros(1)}, tmp_path / "more.pth")
    (tmp_path / "text.pth").write_text("not a weight file\n")
    (tmp_path / "cut.pth").write_bytes(TINY_CHECKPOINT.read_bytes()[:100_000])
    torch.save(argparse.Namespace(a=1), tmp_path / "object.pth")
    cases = [
        ("vit_b", OFFICIAL_CHECKPOINTS["vit_b"], "MD5"),
        ("tiny", "b.pth", "weights of vit_b, not of --sam-type tiny"),
        ("vit_h", "b.pth", "give --sam-type vit_b"),
        ("vit_b", "other.pth", "no plain state dict"),
        ("vit_b", "unknown.pth", "unknown model"),
        ("vit_b", "more.pth", "does not fit"),
        ("tiny", "text.pth", "cut short or no PyTorch"),
        ("tiny", "cut.pth", "cut short or no PyTorch"),
        ("tiny", "object.pth", "cut short or no PyTorch"),
        ("tiny", "missing.pth", "no such file"),
        ("vit_x", "b.pth", "choose one of vit_h, vit_l, vit_b, vit_t, tiny"),
    ]
    for sam_type, name, message in cases:
        with pytest.raises(UserError) as error:
            build_sam(sam_type, tmp_path / name)
        assert message in str(error.value) and "\n" not in str(error.value), (
            name,
            str(error.value),
        )


def test_tiny_weights_in_the_wrong_type(monkeypatch):
    with pytest.raises(
        UserError, match="weights of tiny, not of --sam-type vit_h; give --sam-type tiny"
    ):
        build_sam("vit_h", TINY_CHECKPOINT)
    assert model_sam.default_checkpoint("tiny") == TINY_CHECKPOINT
