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
from segment_anything import sam_model_registry
from segment_anything.utils.amg import build_point_grid
from torch import nn

from model.sam import build_sam
from model.sam_fast import (
    TINY_CHECKPOINT,
    FastSam,
    build_sam_tiny,
    mask_logits,
    tokens_to_pixels,
    two_way_transformer,
)
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
    (tmp_path / "sam_train.txt").write_text(rows)
    monkeypatch.setattr(sam_tiny, "CAMVID", tmp_path)
    monkeypatch.setattr(sam_tiny, "CAMVID_CLASSES", class_set(3, [0, 1], [2]))
    return sam_tiny.photographs(tmp_path)


@pytest.fixture
def random_sam():
    torch.manual_seed(1)
    sam = build_sam_tiny()
    sam_tiny.initialise(sam)
    return sam


# ------------------------------------------------------------------------------------- architecture


def test_token_order_is_a_bijection():
    x = torch.arange(3 * 16 * 24.0).view(3, 16, 24)
    assert torch.equal(tokens_to_pixels(sam_tiny.pixels_to_tokens(x), 4, 6), x)
    mask = np.random.default_rng(0).random((16, 24)) > 0.5
    area_means = tokens_to_pixels(sam_tiny.low_resolution(mask), 2, 3).numpy()
    assert np.array_equal(area_means, mask.reshape(8, 2, 12, 2).mean(axis=(1, 3)))


@torch.no_grad()
def test_decoder_equals_the_package(random_sam):
    """On the tokens of an image, each prompt with a dense embedding of its own."""
    sam = random_sam
    pixels = sam.preprocess(torch.randint(0, 256, (1, 3, 192, 384)).float())
    embedding = sam.image_encoder(pixels[:, :, :192])
    points = (torch.rand(5, 2, 2) * torch.tensor([384.0, 192.0]), torch.ones(5, 2, dtype=torch.int))
    boxes = torch.tensor([[10.0, 20, 90, 100]]).repeat(5, 1)
    sparse, _ = sam.prompt_encoder(points, boxes, None)
    dense, pe = torch.randn(5, 128, 24, 48), sam.prompt_encoder.get_dense_pe()[..., :24, :]
    expected, expected_iou = sam.mask_decoder.predict_masks(embedding, pe, sparse, dense)
    keys, pe = (x.flatten(2).transpose(1, 2)[None] for x in (embedding + dense, pe))
    queries, keys = two_way_transformer(sam.mask_decoder, keys, pe, sparse[None])
    fast = mask_logits(sam.mask_decoder, queries, keys, slice(None))[0]
    fast_iou = sam.mask_decoder.iou_prediction_head(queries[0, :, 0])
    assert torch.allclose(tokens_to_pixels(fast, 24, 48), expected, atol=1e-4)
    assert torch.allclose(fast_iou, expected_iou, atol=1e-5)


# ----------------------------------------------------------------------------------- what is learnt


def test_prompts_belong_to_their_targets(scene, photos):
    """On a drawing and on a window of a photograph; neither they nor their targets are where no
    label is. Every 8-connected component of ten pixels or more is a segment.
    """
    window = sam_tiny.photo_window(3, photos)
    for picture in (scene, window):
        segment, height, width = picture.segment, *picture.segment.shape
        for seed in range(5):
            groups = sam_tiny.sample_prompts(np.random.default_rng(seed), picture)
            assert [len(group["points"]) for group in groups] == [4, 4, 7]
            for group in groups:
                assert not (group["targets"] & (segment == sam_tiny.VOID)).any()
                for around, masks in zip(group["points"], group["targets"]):
                    assert all(mask[y, x] for mask in masks for x, y in around)
                for left, top, right, bottom in group.get("boxes", ()):
                    assert 0 <= left <= right < width and 0 <= top <= bottom < height
    assert 0 < (window.segment == sam_tiny.VOID).mean() < 0.2
    red, found = window.image[..., 0].astype(int) - window.image[..., 1], ([], [])
    for index in window.large():
        mask = window.segment == index
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
        found[int((window.component[mask] != sam_tiny.VOID).any())].append(red[mask].mean())
    assert min(found[0]) > 2 * max(found[1])  # the cars are red in any light
    again, other = (sam_tiny.photo_window(i, photos).image for i in (3, 1))
    assert np.array_equal(window.image, again) and not np.array_equal(again, other)


def test_nothing_is_asked_of_pixels_without_a_label(photos):
    """Neither loss nor gradient depends on the network's output there."""
    _, prompts, known, dense, anchors = sam_tiny.make_batch("photographs", photos, 0, 1)
    targets = sam_tiny.low_resolution(prompts[0]["targets"])
    logits = torch.zeros(1, 4, 1, known.shape[1], requires_grad=True)
    losses, _ = sam_tiny.pair_losses(logits, targets, 0.5, known)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    unknown = known[0] == 0
    assert unknown.any() and not gradient[..., unknown].any() and gradient[..., ~unknown].all()
    output = torch.randn(1, 36, 48, 36, requires_grad=True)
    loss = sam_tiny.auxiliary_loss(nn.Identity(), output.permute(0, 3, 1, 2), dense, anchors)
    (gradient,) = torch.autograd.grad(loss, output)
    dark = dense[2][0] == sam_tiny.VOID
    assert dark.any() and not gradient[0][dark][:, 16:].any()
    assert gradient[0][~dark][:, 16:20].any()


def test_training_is_deterministic_and_resumes_exactly(tmp_path, photos, monkeypatch):
    """Of both recipes, the second from the weights of the first: killed after a step, the weights
    are those of an undisturbed run, bit for bit. The fit moves the IoU head alone.
    """
    monkeypatch.setattr(sam_tiny, "POOL_SCENES", 8)
    monkeypatch.setattr(sam_tiny, "SAVE_EVERY", 1)
    usual, judged = sam_tiny.train_step, sam_tiny.judged_masks
    few = lambda sam, scene, points: judged(sam, scene, points[:16])
    monkeypatch.setattr(sam_tiny, "judged_masks", few)

    def trained(name, work="work"):
        sam_tiny.main([name, "--work", str(tmp_path / work), "--root-path", str(tmp_path)])
        return torch.load(tmp_path / f"{name}.pth", weights_only=True)

    def killed(parts, recipe, step, rows):
        if step > recipe["phases"][0]["from_step"]:
            raise KeyboardInterrupt
        usual(parts, recipe, step, rows)

    for name, first in (("drawings", 0), ("photographs", 2)):
        phase = {"images": 2, "lr": 2e-3, "steps": 100, "decay_steps": 80, "bf16": False}
        phases = [
            {"from_step": first + i, "style": ("random", "mixed")[i], **phase} for i in (0, 1)
        ]
        recipe = {"warmup": 1, "threads": 1, "iou_scenes": 1, "end": first + 2, "phases": phases}
        write_json(tmp_path / f"{name}.json", {"recipe": recipe})
        monkeypatch.setitem(sam_tiny.WEIGHTS, sam_tiny.TYPES[name], tmp_path / f"{name}.pth")
        undisturbed = trained(name)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sam_tiny, "train_step", killed)
            trained(name, "again")
        resumed = trained(name, "again")
        assert all(torch.equal(undisturbed[key], resumed[key]) for key in undisturbed)
        checkpoint = torch.load(tmp_path / f"work/{name}/checkpoint.pth", weights_only=True)
        before = sam_tiny.exported(checkpoint["ema"])
        moved = {key for key in before if not torch.equal(before[key], resumed[key])}
        assert moved and all("iou_prediction_head" in key for key in moved)
        record = read_json(tmp_path / f"{name}.json")
        assert record["training"]["step"] == first + 2 and record["recipe"] == recipe
    build_sam("tiny", tmp_path / "photographs.pth")


def test_training_lists_hold_no_target_image():
    """CamVid: the tiny SAM's lists are the day drives', apart; dusk (0001TP) is in none."""
    names = ("day", "sam_train", "sam_holdout")
    day, train, held_out = (
        [row[0] for row in read_list(ROOT / f"splits/camvid/{name}.txt")] for name in names
    )
    assert len(day) == 406 and len(held_out) == 40 and sorted(train + held_out) == sorted(day)
    assert not any("0001TP" in name for name in day)


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
    starts = [phase["from_step"] for phase in record["recipe"]["phases"]]
    assert starts == sorted(starts)
    assert starts[-1] < record["recipe"]["end"] == record["training"]["step"]


def test_shipped_weights_have_the_recorded_figures(shipped):
    """Of box and point prompts on every segment of ten drawings of the target: the mean IoU of
    SAM's mask and of the filled box.
    """
    segmenter, found = FastSam(shipped), {"things": [], "all": []}
    for number in range(10):
        scene = sam_tiny.drawing(9_000_000 + number, "target")
        segmenter.set_image(scene.image)
        rng = np.random.default_rng((0, number))
        for index in scene.large():
            whole, count = scene.segment == index, int(rng.integers(1, 3))
            is_thing = (scene.component[whole] == sam_tiny.VOID).all()
            points, box, truth = sam_tiny.imperfect_box(rng, whole, count, is_thing)
            left, top, right, bottom = box.astype(int)
            filled = np.zeros_like(whole)
            filled[top : bottom + 1, left : right + 1] = True
            mask = segmenter.predict(box[None], [points])[0].numpy()
            ious = [(truth & m).sum() / max(1, (truth | m).sum()) for m in (mask, filled)]
            for kind in ("all", "things") if is_thing else ("all",):
                found[kind].append(ious)
    recorded = read_json(TINY_CHECKPOINT.with_suffix(".json"))["results"]["target"]["prompts"]
    for kind, ious in found.items():
        expected = recorded[kind]["every size"]
        assert len(ious) == expected["n"]
        means = [expected["iou"], expected["fill"]]
        assert np.mean(ious, axis=0) == pytest.approx(means, abs=5e-3)


def test_shipped_weights_propose_masks_that_fit(shipped, scene):
    """On a grid of 8 points a side. The IoU head is right about them, and can be fitted to them."""
    read, best = sam_tiny.judged_masks(shipped, scene, build_point_grid(8) * (384, 192))
    assert read.shape == (64, 128) and best.amax(dim=1).mean() > 0.8 and best.max() <= 1
    head = shipped.mask_decoder.iou_prediction_head
    before = (random_head := build_sam_tiny().mask_decoder.iou_prediction_head)(read) - best
    sam_tiny.fit_iou_head(random_head, read, best)
    assert (random_head(read) - best).abs().mean() < before.abs().mean()
    assert (head(read) - best).abs().mean() < before.abs().mean()


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


def test_bad_checkpoints(tmp_path, official, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {
        "b.pth": official,
        "other.pth": {"weights": 1},
        "more.pth": {**official, "image_encoder.more": torch.zeros(1)},
        "object.pth": SimpleNamespace(a=1),
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("not a weight file\n")
    (tmp_path / "cut.pth").write_bytes(TINY_CHECKPOINT.read_bytes()[:100_000])
    for sam_type, name, message in (
        ("tiny", "b.pth", "no weights of --sam-type tiny (Error(s) in loading"),
        ("vit_b", "other.pth", "no weights of --sam-type vit_b"),
        ("vit_b", "more.pth", "image_encoder.more"),
        ("tiny", "text.pth", "cut short, or no weights"),
        ("tiny", "cut.pth", "cut short, or no weights"),
        ("tiny", "object.pth", "cut short, or no weights"),
        ("tiny", "missing.pth", "no such file"),
        ("vit_h", None, "pretrained/sam_vit_h_4b8939.pth: no such file"),
        ("vit_l", None, "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth"),
    ):
        with pytest.raises(UserError) as error:
            build_sam(sam_type, name)
        said = str(error.value)
        assert message in said and "\n" not in said, (name, said)
