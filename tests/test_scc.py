"""SCC: its parts against slow oracles, and whole runs: the same bytes however they went, no ground
truth opened."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import plant_noise
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torch.nn import functional as F

import seco_scc as scc
from dataset import scc as scc_data
from dataset.toy import draw_scene
from model import scc as scc_model
from model.resnet import normalised
from model.scc import PatchClassifier, PooledClassifier
from tests.reference_scc import opened_patch, store_masks
from util.labels import (
    CITYSCAPES_19,
    IGNORE,
    connectivities,
    read_label,
    read_list,
    write_label,
    write_list,
)
from util.outputs import Outputs
from util.run import UserError

RECIPES = ("release", "paper")


def speckled(label, random, share=0.3):
    """A label map as a model's raw output has it: blocks of other classes, and of no label."""
    blocks = random.integers(0, 20, tuple(-(-side // 12) for side in label.shape))
    blocks = np.where(
        random.random(blocks.shape) < share, np.where(blocks == 19, IGNORE, blocks), 254
    ).astype(np.uint8)
    blocks = np.kron(blocks, np.ones((12, 12), np.uint8))[: label.shape[0], : label.shape[1]]
    return np.where(blocks == 254, label, blocks)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root with five toy scenes 64 x 128, raw labels (one map wholly unlabeled), ground truth,
    and lists.
    """
    root, random, rows, truths = tmp_path_factory.mktemp("scc"), np.random.default_rng(0), [], []
    for index in range(5):
        scene = draw_scene(index, "target", 64, 128)
        image, label, truth = (f"{folder}/train/{index}.png" for folder in ("images", "pix", "gt"))
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(root / image)
        noisy = np.full_like(scene.label, IGNORE) if index == 3 else speckled(scene.label, random)
        write_label(root / label, noisy, CITYSCAPES_19.palette)
        write_label(root / truth, scene.label, CITYSCAPES_19.palette)
        rows.append((image, label))
        truths.append((image, truth))
    write_list(root / "splits/pix/all.txt", rows)
    write_list(root / "splits/gt.txt", truths)
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(root, recipe, *extra):
    sizes = (
        ["--patch-size", "32", "64", "--batch-size", "8"]
        if recipe == "release"
        else ["--batch-size", "2", "--scale", "0.5"]
    )
    return [
        "--id-list-path",
        str(root / "splits/pix/all.txt"),
        "--root-path",
        str(root),
        "--recipe",
        recipe,
        "--backbone",
        "resnet10",
        "--backbone-weights",
        "none",
        "--iterations",
        "4",
        "--device",
        "cpu",
        *sizes,
        *extra,
    ]


def suffix(recipe):
    return {"release": "scc", "paper": "scc_paper"}[recipe]


def results(root, recipe):
    """Bytes of all that must not depend on how the run went (a .pth file's bytes hold the name of
    its temporary file).
    """
    folders = (root / f"pix_{suffix(recipe)}", root / f"splits/pix_{suffix(recipe)}")
    found = {
        str(p.relative_to(root)): p.read_bytes()
        for f in folders
        for p in sorted(f.rglob("*"))
        if p.is_file() and p.suffix != ".pth" and p.name != "run.json"
    }
    assert len(found) > 10
    return found


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """Both recipes run from beginning to end, uninterrupted."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(made, root, dirs_exist_ok=True)
    for recipe in RECIPES:
        scc.main(command(root, recipe))
    return root


def data_of(root, recipe="release", **changes):
    """seco_scc's Data for the made images."""
    options = scc.parse_args(command(root, recipe))
    for name, value in changes.items():
        setattr(options, name, value)
    rows = read_list(root / "splits/pix/all.txt")
    parts = [scc_data.index_image(root / row[1], i, 19) for i, row in enumerate(rows)]
    return scc_data.Data(root, rows, np.concatenate(parts), 19, options)


# -------------------------------------------------------------------------- connectivities, patches


def test_index_and_numbers_agree_with_the_masks(made):
    for _, path in read_list(made / "splits/pix/all.txt"):
        label = read_label(made / path)
        numbers, rows = scc_data.numbered(label, 19), scc_data.index_image(made / path, 7, 19)
        assert ((numbers < 0) == (label == IGNORE)).all()
        assert len(rows) == numbers.max() + 1
        for row in rows:
            ys, xs = np.nonzero(numbers == row["number"])
            assert (
                (label[ys, xs] == row["class_id"]).all()
                and len(ys) == row["area"]
                and row["image"] == 7
            )
            assert (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1) == tuple(
                row[["x", "y", "width", "height"]].item()
            )


@pytest.mark.parametrize("size", [(96, 192), (40, 300)])
def test_patch_window_shows_the_whole_connectivity_as_centrally_as_can_be(size):
    """Of all windows of its size in the image, it is the one whose centre is nearest to the box's,
    to a pixel of rounding; a box that is larger than the patch may lose that pixel too.
    """
    height, width = size
    random, patch = np.random.default_rng(1), (32, 64)
    for _ in range(300):
        x, y = int(random.integers(width)), int(random.integers(height))
        w, h = int(random.integers(1, width - x + 1)), int(random.integers(1, height - y + 1))
        y0, x0, y1, x1 = scc_data.patch_window((x, y, w, h), height, width, patch)
        grow = max(1, h / 32, w / 64)
        for low, high, box_low, length, side, full in (
            (y0, y1, y, h, 32, height),
            (x0, x1, x, w, 64, width),
        ):
            assert 0 <= min(full, side * grow) - (high - low) < 2
            distances = [
                abs(start + (high - low) / 2 - (box_low + length / 2))
                for start in range(full - (high - low) + 1)
            ]
            lost = 1 if grow > 1 else 0
            assert distances[low] <= min(distances) + 1
            assert low <= box_low + lost and high >= box_low + length - lost


def test_cut_patch_of_a_small_and_of_a_large_connectivity():
    random = np.random.default_rng(2)
    image = random.integers(0, 256, (96, 192, 3), dtype=np.uint8)
    numbers = random.integers(-1, 3, (96, 192)).astype(np.int32)
    row = np.array([(0, 2, 5, 9, 80, 40, 20, 10)], scc_data.INDEX)[0]
    patch, mask = scc.cut_patch(
        image, numbers, row, (32, 64)
    )  # box centre (90, 45): rows 29 to 61, columns 58 to 122
    assert (patch == image[29:61, 58:122]).all() and (
        mask == (numbers == 2)[29:61:2, 58:122:2]
    ).all()
    row = np.array([(0, 1, 5, 9, 0, 0, 128, 64)], scc_data.INDEX)[
        0
    ]  # twice the patch: every fourth pixel of the mask
    patch, mask = scc.cut_patch(image, numbers, row, (32, 64))
    assert patch.shape == (32, 64, 3) and (mask == (numbers == 1)[0:64:4, 0:128:4]).all()
    assert (
        abs(patch.astype(int) - image[0:64, 0:128].reshape(32, 2, 64, 2, 3).mean(axis=(1, 3))).max()
        <= 1
    )


# ----------------------------------------------------------------------------------------- networks


def test_masked_stem_is_torchvisions_network_with_one_product_more():
    torch.manual_seed(0)
    model, oracle = (
        PatchClassifier(18, "torchvision", 19).eval(),
        torchvision.models.resnet18(num_classes=19).eval(),
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    state = {
        k.removeprefix("backbone.").replace("classifier.", "fc."): v
        for k, v in model.state_dict().items()
    }
    oracle.load_state_dict(state)
    patches, masks = torch.randn(3, 3, 64, 128), torch.rand(3, 1, 32, 64) > 0.5
    x = oracle.relu(oracle.bn1(oracle.conv1(patches))) * masks
    x = oracle.layer4(oracle.layer3(oracle.layer2(oracle.layer1(oracle.maxpool(x)))))
    expected = oracle.fc(torch.flatten(oracle.avgpool(x), 1))
    assert torch.allclose(model(patches, masks), expected, atol=1e-4)
    assert not torch.allclose(oracle(patches), expected, atol=1e-2)


@pytest.mark.parametrize("size, mirror", [((64, 96), False), ((64, 96), True), ((50, 77), False)])
def test_masked_average_pooling_against_a_loop_over_pixels(size, mirror):
    random = np.random.default_rng(3)
    numbers = np.kron(random.integers(-1, 12, (20, 20)), np.ones((5, 5), int))[
        : size[0], : size[1]
    ].astype(np.int32)
    numbers[numbers == 4] = -1  # a number without a pixel is never asked for, but harmless
    numbers[3, 3] = 4  # one pixel
    height, width = -(-size[0] // 16), -(-size[1] // 16)
    features = torch.randn(6, height, width)
    seen = numbers[:, ::-1] if mirror else numbers
    cells = [
        [(y * height // size[0], x * width // size[1]) for x in range(size[1])]
        for y in range(size[0])
    ]
    pixels = {}
    for cell in itertools.chain(*cells):
        pixels[cell] = pixels.get(cell, 0) + 1
    expected, weights = np.zeros((12, 6)), np.zeros(12)
    for y, x in np.ndindex(*size):
        number, cell = seen[y, x], cells[y][x]
        if number >= 0:
            expected[number] += features[:, cell[0], cell[1]].numpy() / pixels[cell]
            weights[number] += 1 / pixels[cell]
    pooled = scc_data.mask_shares(numbers, 12, size, mirror) @ features.flatten(1).t()
    assert np.allclose(pooled.numpy(), expected / weights[:, None], atol=1e-5)
    assert np.allclose(
        pooled[4], features[:, 0, -1 if mirror else 0]
    )  # one pixel weighs as much as any


def test_one_pass_serves_all_connectivities():
    """The pooled classifier against masks averaged down by torch, one connectivity at a time."""
    torch.manual_seed(0)
    model = PooledClassifier(18, "torchvision", 19).eval()
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    numbers = np.random.default_rng(4).integers(-1, 5, (2, 64, 96)).astype(np.int32)
    with torch.no_grad():
        logits = model(normalised(images), [scc_data.mask_shares(n, 5, (64, 96)) for n in numbers])
        features = model.features(normalised(images))
        for image, number in np.ndindex(2, 5):
            weight = F.avg_pool2d(
                torch.from_numpy(numbers[image] == number).float()[None, None], 16
            )
            pooled = (features[image] * weight[0]).sum(dim=(1, 2)) / weight.sum()
            assert torch.allclose(logits[image * 5 + number], model.classifier(pooled), atol=1e-4)


# -------------------------------------------------------------------------- thresholds, the mixture


@pytest.mark.parametrize(
    "rule, quantile",
    [("both_loss", 0.5), ("loss", 0.3), ("score", 0.5), ("score", 0.7), ("loss", 1.0)],
)
def test_filter_against_loops(rule, quantile):
    random = np.random.default_rng(5)
    loss, score = random.integers(0, 12, 200) / 4, random.integers(1, 9, 200) / 8  # many ties
    predicted = random.integers(0, 5, 200)
    kept, thresholds = scc.filter_connectivities(loss, score, predicted, rule, quantile)
    values = score if rule == "score" else loss
    local = {}
    for c in range(5):
        ranked = sorted(v for v, p in zip(values, predicted) if p == c)
        share = 1 - quantile if rule == "score" else quantile
        local[c] = ranked[min(int(len(ranked) * share), len(ranked) - 1)]
    overall = sum(local[p] for p in predicted) / 200
    for i, p in enumerate(predicted):
        dropped = {
            "both_loss": loss[i] > local[p] and loss[i] > overall,
            "loss": loss[i] > local[p],
            "score": score[i] < local[p],
        }[rule]
        assert kept[i] == (not dropped)
    assert thresholds["per_class"] == local and thresholds["global"] == pytest.approx(overall)
    assert 0 < kept.sum() and (kept.sum() < 200 or quantile == 1)


def test_filter_drops_losses_that_are_not_finite_and_leaves_the_rest_alone():
    loss = np.array([0.1, 0.2, 3.0, np.nan, np.inf])
    score, predicted = np.array([0.9, 0.8, 0.7, np.nan, 0.9]), np.array([1, 1, 1, 1, 2])
    kept, thresholds = scc.filter_connectivities(loss, score, predicted, "both_loss", 0.5)
    alone, same = scc.filter_connectivities(loss[:3], score[:3], predicted[:3], "both_loss", 0.5)
    assert (
        kept.tolist() == [*alone, False, False] == [True, True, False, False, False]
        and thresholds == same
    )
    kept, thresholds = scc.filter_connectivities(
        np.full(4, np.nan), np.ones(4), np.zeros(4, int), "both_loss", 0.5
    )
    assert not kept.any() and thresholds["global"] is None


def test_decisions_at_and_around_the_thresholds():
    eta, score = (
        x.ravel() for x in np.meshgrid([0, 0.59, 0.6, 0.61, 1], [0.94, 0.95, 0.96, np.nan])
    )
    decision, final = scc.decide(eta, score, np.full(20, 3), np.full(20, 8), 0.6, 0.95)
    for e, s, d, f in zip(eta, score, decision, final):
        assert (d, f) == (
            ("kept", 8) if e < 0.6 else ("corrected", 3) if s > 0.95 else ("dropped", IGNORE)
        )


def two_groups(random, clean=900, noisy=300):
    return np.concatenate([random.gamma(2, 0.1, clean), random.normal(4, 0.8, noisy)])


def test_noise_posterior_is_bayes_rule_on_the_fitted_mixture():
    loss = two_groups(np.random.default_rng(6))
    model = scc.noise_posterior(loss, 0)
    assert model.fallback is None and model.low == loss.min() and model.high == loss.max()
    x = (loss - loss.min()) / (loss.max() - loss.min())
    density = [
        w / d * np.exp(-(((x - m) / d) ** 2) / 2)
        for w, d, m in zip(model.weights, model.deviations, model.means)
    ]
    expected = density[1] / (density[0] + density[1])
    right = x >= model.means[0]
    assert np.allclose(model.eta[right], expected[right], atol=1e-6)
    assert (model.eta[:900] < 0.6).mean() > 0.98 and (model.eta[900:] >= 0.6).mean() > 0.97
    assert sum(model.weights) == pytest.approx(1) and model.weights[1] == pytest.approx(
        0.25, abs=0.03
    )
    # EM has converged: one more step by hand leaves the parameters where they are (reg_covar 5e-4
    # is on the variance).
    for k, share in enumerate((1 - expected, expected)):
        mean = (share * x).sum() / share.sum()
        assert mean == pytest.approx(model.means[k], abs=0.01)
        assert np.sqrt((share * (x - mean) ** 2).sum() / share.sum() + 5e-4) == pytest.approx(
            model.deviations[k], abs=0.01
        )


def test_a_wide_noisy_component_does_not_claim_the_lowest_losses():
    random = np.random.default_rng(7)
    loss = np.concatenate([random.normal(5, 0.1, 900), random.normal(8, 3, 300), [0.0]])
    model = scc.noise_posterior(loss, 0)
    assert model.fallback is None and model.eta[-1] < 0.5
    below = loss < model.low + model.means[0] * (model.high - model.low)
    assert (
        below.sum() > 100 and (model.eta[below] < 0.5).all() and (model.eta[loss > 9] > 0.6).all()
    )


@pytest.mark.parametrize(
    "loss, words",
    [
        (np.linspace(0, 5, scc_model.MIN_CONNECTIVITIES - 1), "fewer than"),
        (np.full(200, 1.5), "equal"),
        (np.random.default_rng(8).normal(3, 1, 4000), "do not separate"),
        (np.random.default_rng(8).standard_t(2, 4000), "do not separate"),  # one mean, two widths
        (np.full(100, np.nan), "finite losses are fewer"),
    ],
)
def test_without_a_mixture_the_labels_are_kept_and_it_says_why(loss, words):
    model = scc.noise_posterior(loss, 0)
    assert words in model.fallback
    assert (model.eta == np.where(np.isfinite(loss), 0, 1)).all()


def test_losses_that_are_not_finite_are_noisy_and_have_no_part_in_the_fit():
    loss = two_groups(np.random.default_rng(9))
    model, alone = (
        scc.noise_posterior(np.append(loss, [np.nan, np.inf]), 0),
        scc.noise_posterior(loss, 0),
    )
    assert (
        (model.eta[-2:] == 1).all()
        and (model.eta[:-2] == alone.eta).all()
        and model.means == alone.means
    )


def test_corrected_label_against_a_loop():
    random = np.random.default_rng(10)
    numbers = random.integers(-1, 7, (20, 30)).astype(np.int32)
    final = random.choice([0, 5, 18, IGNORE], 7).astype(np.uint8)
    corrected = scc.corrected_label(numbers, final)
    for y, x in np.ndindex(20, 30):
        assert corrected[y, x] == (IGNORE if numbers[y, x] < 0 else final[numbers[y, x]])


# ------------------------------------------------------------------------------------ training data


def test_an_epoch_has_every_connectivity_once_and_the_buffer_is_bounded(made, monkeypatch):
    monkeypatch.setattr(scc_data, "BUFFER", 20)
    data = data_of(made)
    order, visits = scc_data.shuffle(data, 0)
    assert sorted(order) == list(range(len(data.index))) and max(map(len, visits)) <= 20
    assert len(visits) == sum(-(-len(data.of_image(i)) // 20) for i in range(5))
    other = scc_data.shuffle(data, 1)[0]
    assert order.tolist() not in (sorted(order), other.tolist())
    assert order.tolist() == scc_data.shuffle(data, 0)[0].tolist()
    # Visits taken only when they are needed: at most the buffer and one visit are in memory.
    buffer, coming = set(), iter(visits)
    for member in order:
        while member not in buffer:
            buffer |= set(next(coming).tolist())
            assert len(buffer) <= 20 + 20
        buffer.remove(member)


def test_release_batches_against_opening_the_image_for_each_connectivity(
    made, tmp_path, monkeypatch
):
    monkeypatch.setattr(scc_data, "BUFFER", 40)
    data = data_of(made, workers=3)
    reads = []
    monkeypatch.setattr(
        data, "read", lambda image, read=data.read: reads.append(image) or read(image)
    )
    per_epoch = scc_data.batches_per_epoch(data)
    batches = list(scc_data.patch_batches(data, 0, per_epoch + 1))
    assert len(batches) == per_epoch + 1 == len(data.index) // 8 + 1
    (first, visits), (second, _) = (scc_data.shuffle(data, epoch) for epoch in (0, 1))
    assert len(reads) <= 2 * len(visits) and reads.count(0) <= 2 * -(-len(data.of_image(0)) // 40)
    seen = [*first[: per_epoch * 8].tolist(), *second[:8].tolist()]
    store_masks(tmp_path, data, seen)
    mirrored = 0
    for place, member in enumerate(seen):
        patches, masks, classes = (x[place % 8] for x in batches[place // 8])
        row = data.index[member]
        label = read_label(made / data.rows[row["image"]][1])
        found = list(connectivities(label, range(19)))[row["number"]]
        patch, mask = opened_patch(tmp_path, data, member, (32, 64))
        plain = (patches.numpy() == patch).all() and (masks[0].numpy() == mask).all()
        flipped = (patches.numpy() == patch[:, ::-1]).all() and (
            masks[0].numpy() == mask[:, ::-1]
        ).all()
        assert (plain or flipped) and classes == found.class_id
        mirrored += not plain
    assert 0.3 < mirrored / len(seen) < 0.7


@pytest.mark.parametrize(
    "recipe, batches_of",
    [("release", scc_data.patch_batches), ("paper", scc_data.image_batches)],
)
def test_batches_follow_from_their_number_alone(made, recipe, batches_of):
    """Starting in the middle of an epoch, or with other workers, gives the same batches."""
    whole = list(batches_of(data_of(made, recipe), 0, 9))
    for start, workers in ((3, 1), (7, 5)):
        part = list(batches_of(data_of(made, recipe, workers=workers), start, 9))
        assert len(part) == 9 - start
        for a, b in zip(whole[start:], part):
            assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
            if recipe == "release":
                assert torch.equal(a[1], b[1])
            else:
                assert all(torch.equal(x, y) for x, y in zip(a[1], b[1]))


def test_scores_against_one_connectivity_at_a_time(made):
    torch.manual_seed(0)
    data = data_of(made, batch_size=7)
    model = scc.make_classifier(data.options, 19, torch.device("cpu")).eval()
    with ThreadPoolExecutor(2) as pool:
        found = scc.score_image(model, data, 1, data.read(1), torch.device("cpu"), pool)
    picture, numbers = data.read(1)
    for place, row in list(enumerate(data.of_image(1)))[::9]:
        patch, mask = scc.cut_patch(picture, numbers, row, (32, 64))
        with torch.no_grad():
            logits = model(
                normalised(torch.from_numpy(patch)[None]), torch.from_numpy(mask)[None, None]
            )[0].double()
        probability = torch.softmax(logits, 0)
        assert found["loss"][place] == pytest.approx(
            -float(probability[row["class_id"]].log()), abs=1e-4
        )
        assert found["score"][place] == pytest.approx(float(probability.max()), abs=1e-4)
        assert found["predicted"][place] == int(probability.argmax())


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs(finished, recipe):
    out = finished / f"pix_{suffix(recipe)}"
    rows = read_list(finished / f"splits/pix_{suffix(recipe)}/all.txt")
    assert rows == [
        (f"images/train/{i}.png", f"pix_{suffix(recipe)}/train/{i}.png") for i in range(5)
    ]
    with open(out / "connectivities.csv") as file:
        lines = list(csv.DictReader(file))
    report = json.loads((out / "report/report.json").read_text())
    decisions = {}
    for i, (image, path) in enumerate(rows):
        before, after = read_label(finished / f"pix/train/{i}.png"), read_label(finished / path, 19)
        mine = [line for line in lines if line["image"] == image]
        found = list(connectivities(before, range(19)))
        assert len(mine) == len(found)
        expected = np.full_like(before, IGNORE)
        for line, c in zip(mine, found):
            assert (int(line["class"]), int(line["area"])) == (c.class_id, c.area)
            assert tuple(int(line[k]) for k in ("x", "y", "width", "height")) == c.box
            decisions[line["decision"]] = decisions.get(line["decision"], 0) + 1
            assert (int(line["final"]) == IGNORE) == (line["decision"] == "dropped")
            assert (line["eta"] == "") == (recipe == "release")
            expected[c.window][c.mask] = int(line["final"])
        assert (after == expected).all()
    assert {k: report[k] for k in decisions} == decisions and "ground_truth" not in report
    assert (
        sum(sum(counts.values()) for counts in report["per_class"].values())
        == len(lines)
        == report["connectivities"]
    )
    page = (out / "report/index.html").read_text()
    for name in ("loss_histogram", "decisions", "panels", "thumbnails"):
        assert (out / f"report/{name}.png").is_file() and f"{name}.png" in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_connectivities_might_as_well_not_be_there(root, recipe):
    """--min-area on labels with slivers makes what no limit makes on labels whose slivers were
    erased beforehand.
    """
    limit = 12
    for _, path in read_list(root / "splits/pix/all.txt"):
        label = read_label(root / path)
        numbers = scc_data.numbered(label, 19)
        for number in range(numbers.max() + 1):
            if (numbers == number).sum() < limit:
                label[numbers == number] = IGNORE
        erased = root / path.replace("pix/", "erased/", 1)
        erased.parent.mkdir(parents=True, exist_ok=True)
        write_label(erased, label, CITYSCAPES_19.palette)
    write_list(
        root / "splits/erased/all.txt",
        [
            (image, path.replace("pix/", "erased/", 1))
            for image, path in read_list(root / "splits/pix/all.txt")
        ],
    )
    scc.main(command(root, recipe, "--min-area", str(limit)))
    plain = command(root, recipe)
    plain[1] = plain[1].replace("splits/pix", "splits/erased")
    scc.main(plain)
    found, expected = (
        list(csv.DictReader(open(root / f"{name}_{suffix(recipe)}/connectivities.csv")))
        for name in ("pix", "erased")
    )
    small = [row for row in found if int(row["area"]) < limit]
    assert len(small) > 20 and {(row["decision"], row["loss"], row["final"]) for row in small} == {
        ("dropped", "nan", "255")
    }
    report = json.loads((root / f"pix_{suffix(recipe)}/report/report.json").read_text())
    assert report["judged"] == len(found) - len(small)
    found = [row for row in found if int(row["area"]) >= limit]
    assert len(found) == len(expected) > 20
    for row, other in zip(found, expected):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert all(
            row[name] == other[name]
            for name in ("image", "area", "prediction", "decision", "final")
        )
    for _, path in read_list(root / "splits/pix/all.txt"):
        labels = [
            read_label(root / path.replace("pix/", f"{name}_{suffix(recipe)}/", 1))
            for name in ("pix", "erased")
        ]
        assert (labels[0] == labels[1]).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bytes_again(finished, root, recipe):
    scc.main(command(root, recipe, "--workers", "1"))
    assert results(root, recipe) == results(finished, recipe)


@pytest.mark.parametrize(
    "recipe, thresholds",
    [("release", ("--quantile", "0.2")), ("paper", ("--tau-ns", "0", "--tau-cr", "0.1"))],
)
def test_other_thresholds_run_only_the_correction(
    finished, tmp_path, monkeypatch, recipe, thresholds
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

    for module, name in ((scc, "train"), (scc, "score_image"), (scc_data, "index_image")):
        monkeypatch.setattr(module, name, refuse)
    scc.main(command(tmp_path, recipe, *thresholds))
    other = results(tmp_path, recipe)
    assert (
        other[f"pix_{suffix(recipe)}/connectivities.csv"]
        != results(finished, recipe)[f"pix_{suffix(recipe)}/connectivities.csv"]
    )
    scc.main(command(tmp_path, recipe, "--stage", "correct"))
    assert results(tmp_path, recipe) == results(finished, recipe)


KILLED = """
import os, signal, sys
import seco_scc as scc
scc.SAVE_SECONDS = 0
name, calls = sys.argv[1], int(sys.argv[2])
def wrapped(*arguments, original=getattr(scc, name), **options):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(scc, name, wrapped)
scc.main(sys.argv[3:])
"""


def test_killed_in_every_stage_and_started_again(finished, root):
    """SIGKILL in training after three iterations, in scoring after two images, in correction after
    two labels.
    """
    for name, calls in (("gradients", 3), ("score_image", 2), ("corrected_label", 2)):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, name, str(calls), *command(root, "release")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -9, killed.stderr
        out = root / "pix_scc"
        state = {
            "gradients": (out / "training.pth").is_file(),
            "score_image": len(list((out / "scores").glob("*.npz"))) == 2,
            "corrected_label": not (root / "splits/pix_scc/all.txt").exists(),
        }
        assert state[name]
    scc.main(command(root, "release"))
    assert results(root, "release") == results(finished, "release")
    assert not list(root.rglob(".*.tmp*")) and not (out / "training.pth").exists()


def test_memory_exhaustion_in_training_changes_nothing(root, monkeypatch, capsys):
    """It runs out after the forward pass of the second iteration, whose statistics are then
    taken back; from there on activations are computed twice.
    """
    real, seen = scc_model.logits_of, []

    def scarce(model, *arguments):
        logits = real(model, *arguments)
        seen.append(model.backbone.recompute)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return logits

    weights = []
    for logits_of in (real, scarce):
        monkeypatch.setattr(scc_model, "logits_of", logits_of)
        shutil.rmtree(root / "pix_scc", ignore_errors=True)
        scc.main(command(root, "release", "--iterations", "4", "--stage", "train"))
        weights.append(torch.load(root / "pix_scc/checkpoint.pth", weights_only=True)["model"])
    assert seen == [False, False, True, True, True]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "does not fit into memory" in capsys.readouterr().out


def test_two_processes_make_what_one_makes(finished, root):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29541",
            "seco_scc.py",
            *command(root, "paper"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=environment,
    )
    assert results(root, "paper") == results(finished, "paper")


OPENED: list[str] | None = None


def test_ground_truth_is_opened_for_gt_alone(root):
    def note(event, arguments):
        if event == "open" and OPENED is not None:
            OPENED.append(str(arguments[0]))

    global OPENED
    sys.addaudithook(note)
    try:
        OPENED = []
        scc.main(command(root, "paper"))
        assert any("/pix/train/0.png" in path for path in OPENED)
        assert not [path for path in OPENED if "/gt/" in path or path.endswith("gt.txt")]
        before = results(root, "paper")
        scc.main(command(root, "paper", "--gt", str(root / "splits/gt.txt")))
        assert [path for path in OPENED if "/gt/" in path]
    finally:
        OPENED = None
    after = results(root, "paper")
    assert {name for name in after if after[name] != before[name]} == {
        "pix_scc_paper/report/report.json",
        "pix_scc_paper/report/index.html",
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_diagnostics_against_the_confusion_matrix_and_loops(finished, tmp_path, recipe):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    scc.main(
        command(
            tmp_path,
            recipe,
            "--gt",
            str(tmp_path / "splits/gt.txt"),
            "--tau-cr",
            "0.02",
            "--tau-ns",
            "0",
        )
    )
    out = tmp_path / f"pix_{suffix(recipe)}"
    report = json.loads((out / "report/report.json").read_text())
    truth = [read_label(tmp_path / f"gt/train/{i}.png") for i in range(5)]
    for when, folder in (("before", "pix"), ("after", out.name)):
        labels = [read_label(tmp_path / folder / f"train/{i}.png") for i in range(5)]
        known = [t != IGNORE for t in truth]
        right = sum(int(((a == t) & k).sum()) for a, t, k in zip(labels, truth, known))
        labeled = sum(int(((a != IGNORE) & k).sum()) for a, k in zip(labels, known))
        assert report["ground_truth"][f"accuracy_{when}"] == pytest.approx(100 * right / labeled)
        covered = sum(int((a != IGNORE).sum()) for a in labels)
        assert report[f"coverage_{when}"] == pytest.approx(
            100 * covered / sum(a.size for a in labels)
        )
    with open(out / "connectivities.csv") as file:
        lines = list(csv.DictReader(file))
    rows, place = [], 0
    for i in range(5):
        for c in connectivities(read_label(tmp_path / f"pix/train/{i}.png"), range(19)):
            inside = truth[i][c.window][c.mask]
            inside = inside[inside != IGNORE]
            if len(inside):
                majority = int(np.bincount(inside).argmax())
                rows.append(
                    (
                        majority != c.class_id,
                        float(lines[place]["eta"] or lines[place]["loss"]),
                        lines[place],
                        majority,
                    )
                )
            place += 1
    wrong, clean = ([s for w, s, *_ in rows if w == flag] for flag in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in wrong for b in clean]
    assert report["ground_truth"]["auroc"] == pytest.approx(np.mean(pairs))
    kept = [not w for w, _, line, _ in rows if line["decision"] == "kept"]
    assert report["ground_truth"]["kept_right"] == (
        pytest.approx(100 * np.mean(kept)) if kept else None
    )
    changed = [
        int(line["final"]) == m
        for _, _, line, m in rows
        if line["final"] not in (line["class"], str(IGNORE))
    ]
    assert report["ground_truth"]["changed_right"] == (
        pytest.approx(100 * np.mean(changed)) if changed else None
    )


# -------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--quantile", "1.5"), "--quantile 1.5"),
        (("--iterations", "0"), "--iterations 0"),
        (("--min-area", "0"), "--min-area 0"),
        (("--tau-ns", "-1"), "--tau-ns -1.0"),
        (("--patch-size", "31", "64"), "--patch-size 31 64"),
        (("--workers", "0"), "--workers 0"),
        (("--lr", "-1"), "--lr -1"),
        (("--lr", "nan"), "--lr nan"),
        (("--vis", "-1"), "--vis -1"),
        (("--recipe", "paper", "--seed", "4294967296"), "--seed 4294967296"),
        (("--seed", "-1"), "--seed -1"),
        (("--device", "banana"), "--device banana"),
        (("--backbone-weights", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_wrong_options_are_told_before_anything_is_made(root, extra, words):
    with pytest.raises(UserError, match=words):
        scc.main(command(root, "release", *extra))
    assert not list(root.glob("pix_scc*"))


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--min-area", "99999"), "the largest connectivity has"),
        (("--stage", "score"), "run --stage train first"),
        (("--stage", "correct"), "run --stage score first"),
        (("--class-num", "11"), "--class-num 11"),
        (("--class-num", "4", "--stuff", "0", "--things", "1"), "with 4 classes"),
        (("--backbone-weights", "imagenet", "--stem", "deep"), "imagenet"),
        (("--lr", "1e30", "--iterations", "9"), "--lr 1e.30: SCC's loss is not finite"),
    ],
)
def test_a_failed_first_run_is_told_and_does_not_block_the_next_one(root, extra, words):
    with pytest.raises(UserError, match=words):
        scc.main(command(root, "release", *extra))
    assert not (root / "pix_scc/checkpoint.pth").exists()
    scc.main(command(root, "release", "--stage", "train"))


def test_labels_may_change_until_there_is_work_of_them(root, finished):
    label = read_label(root / "pix/train/0.png")
    write_label(root / "pix/train/0.png", label[::-1], CITYSCAPES_19.palette)
    with pytest.raises(UserError, match="run --stage train first"):
        scc.main(command(root, "release", "--stage", "score", "--iterations", "9"))
    write_label(root / "pix/train/0.png", label, CITYSCAPES_19.palette)
    scc.main(command(root, "release"))
    assert results(root, "release") == results(finished, "release")


def test_other_settings_lists_or_files_in_the_same_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = results(tmp_path, "release")

    def refused(words, *extra):
        with pytest.raises(UserError, match=words):
            scc.main(command(tmp_path, "release", *extra))
        assert results(tmp_path, "release") == before

    refused("iterations = 4, now it is 7", "--iterations", "7")
    for path, change in (("pix/train/0.png", write_label), ("images/train/2.png", None)):
        kept = (tmp_path / path).read_bytes()
        if change:
            change(tmp_path / path, read_label(tmp_path / path)[::-1], CITYSCAPES_19.palette)
        else:
            picture = Image.open(tmp_path / path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            picture.save(tmp_path / path)
        refused(f"{path}: has changed since")
        (tmp_path / path).write_bytes(kept)
    rows = read_list(tmp_path / "splits/pix/all.txt")
    write_list(tmp_path / "splits/pix/all.txt", rows[::-1])
    refused("in another order")
    write_list(tmp_path / "splits/pix/all.txt", rows)
    scc.main(command(tmp_path, "release"))
    assert results(tmp_path, "release") == before


def test_a_lost_classifier_takes_its_scores_with_it_and_lost_results_come_back(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    out, before = tmp_path / "pix_scc", results(tmp_path, "release")
    (out / "checkpoint.pth").unlink()
    for path in (out / "scores").glob("*.npz"):
        with np.load(path) as scores:
            other = {name: scores[name][::-1] for name in scores.files}
        np.savez(path, **other)
    scc.main(command(tmp_path, "release"))
    assert results(tmp_path, "release") == before
    (out / "scores/000001.npz").unlink()
    (out / "train/4.png").unlink()
    (tmp_path / "splits/pix_scc/all.txt").unlink()
    scc.main(command(tmp_path, "release"))
    assert results(tmp_path, "release") == before


@pytest.mark.parametrize("name", ["1.png", "of_another_list.png"])
def test_labels_of_another_program_are_not_overwritten_nor_joined(root, name):
    other = root / "pix_scc/train" / name
    other.parent.mkdir(parents=True)
    shutil.copy(root / "gt/train/1.png", other)
    with pytest.raises(UserError, match="pix_scc: .* no settings.json that says what made"):
        scc.main(command(root, "release"))
    assert other.read_bytes() == (root / "gt/train/1.png").read_bytes()


def test_two_runs_in_one_folder(root):
    with Outputs(root / "pix_scc"):
        with pytest.raises(UserError, match="another run is writing there now"):
            scc.main(command(root, "release"))
    scc.main(command(root, "release", "--stage", "train"))


@pytest.mark.parametrize(
    "label, words",
    [
        ("pix/../gt/train/0.png", None),
        ("./pix/train/0.png", None),
        ("pix/../../evil/0.png", "does not lie below --root-path"),
        ("/pix/train/0.png", "does not lie below --root-path"),
        ("pix/train/1.png", "is in line 1 already"),
    ],
)
def test_no_list_row_leads_to_writing_over_an_input(root, label, words):
    rows = [("images/train/1.png", "pix/train/1.png"), ("images/train/0.png", label)]
    inputs = {p: p.read_bytes() for p in root.rglob("*.png")}
    write_list(root / "splits/pix/all.txt", rows[1:] if words is None else rows)
    if words is None:
        scc.main(command(root, "release"))
    else:
        with pytest.raises(UserError, match=words):
            scc.main(command(root, "release"))
    assert {p: p.read_bytes() for p in inputs} == inputs
    made = {p.name for p in root.iterdir()} - {"images", "pix", "gt", "splits"}
    assert made == ({label.split("/")[-3].replace(".", "") + "_scc"} if words is None else set())
    assert not (root.parent / "evil").exists() and not list(root.glob(".*"))


def refuse(*_):
    raise AssertionError("not to be called")


def test_maps_that_do_not_fit_are_told_before_the_training(root, monkeypatch):
    monkeypatch.setattr(scc, "train", refuse)

    def refused(path, label, words):
        kept = (root / path).read_bytes()
        if label is None:
            (root / path).write_bytes(kept[: len(kept) // 2])
        else:
            write_label(root / path, label, CITYSCAPES_19.palette)
        with pytest.raises(UserError, match=words):
            scc.main(command(root, "release", "--gt", str(root / "splits/gt.txt")))
        (root / path).write_bytes(kept)

    truth = read_label(root / "gt/train/2.png")
    refused("gt/train/2.png", truth[::2, ::2], "gt/train/2.png: 64x32 pixels, but .*128x64")
    refused("gt/train/2.png", np.where(truth == 0, 77, truth), "gt/train/2.png: holds the value 77")
    refused("gt/train/2.png", None, "gt/train/2.png: the label map cannot be read")
    label = read_label(root / "pix/train/2.png")
    refused("pix/train/2.png", label.T, "pix/train/2.png: .*64x128")
    refused("pix/train/2.png", np.where(label == 0, 77, label), "holds the value 77")


@pytest.mark.parametrize("recipe", RECIPES)
def test_labels_smaller_than_their_images(root, recipe):
    for _, path in read_list(root / "splits/pix/all.txt"):
        label = read_label(root / path)[::2, ::2]
        write_label(root / path, label, CITYSCAPES_19.palette)
    scc.main(command(root, recipe))
    for _, path in read_list(root / f"splits/pix_{suffix(recipe)}/all.txt"):
        assert read_label(root / path, 19).shape == (32, 64)


def test_wrong_files(root):
    images = read_list(root / "splits/pix/all.txt")
    write_list(root / "splits/gt.txt", read_list(root / "splits/gt.txt")[1:])
    with pytest.raises(UserError, match="no ground truth for images/train/0.png"):
        scc.main(command(root, "release", "--gt", str(root / "splits/gt.txt")))
    (root / "images/train/2.png").unlink()
    with pytest.raises(UserError, match="images/train/2.png: no such file"):
        scc.main(command(root, "release"))
    assert not (root / "pix_scc/settings.json").exists()
    write_list(root / "splits/pix/all.txt", [images[0], (images[1][0], "other/train/1.png")])
    with pytest.raises(UserError, match="several experiments"):
        scc.main(command(root, "release"))


def test_no_label_at_all(root):
    write_list(root / "splits/pix/all.txt", [("images/train/3.png", "pix/train/3.png")])
    with pytest.raises(UserError, match="no label at all"):
        scc.main(command(root, "paper"))


# ------------------------------------------------------------------------------------ planted noise


def test_planted_noise_changes_the_class_of_whole_connectivities(root):
    command = [
        "--id-list-path",
        str(root / "splits/gt.txt"),
        "--root-path",
        str(root),
        "--out-list",
        str(root / "splits/planted/all.txt"),
        "--share",
        "0.3",
        "--min-area",
        "5",
    ]
    plant_noise.main(command)
    rows, large, wrong = read_list(root / "splits/planted/all.txt"), 0, 0
    assert rows == [(f"images/train/{i}.png", f"planted/train/{i}.png") for i in range(5)]
    for i, (_, path) in enumerate(rows):
        true, noisy = read_label(root / f"gt/train/{i}.png"), read_label(root / path, 19)
        for c in connectivities(true, range(19)):
            given = set(noisy[c.window][c.mask].tolist())
            assert len(given) == 1 and (c.area >= 5 or given == {c.class_id})
            large, wrong = large + (c.area >= 5), wrong + (given != {c.class_id})
    assert large > 100 and abs(wrong / large - 0.3) < 0.1
    first = [(root / path).read_bytes() for _, path in rows]
    plant_noise.main(command)
    assert [(root / path).read_bytes() for _, path in rows] == first
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    for exp in ("gt", "images", "../gt", ""):
        with pytest.raises(UserError, match=f"--exp {exp}: "):
            plant_noise.main([*command, "--exp", exp])
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before


# --------------------------------------------------------------------- names, and what it tells


def test_two_thresholds_side_by_side_or_one_replaced(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = results(tmp_path, "release")
    scc.main(command(tmp_path, "release", "--quantile", "0.9", "--exp", "loose"))
    assert results(tmp_path, "release") == before and "replaced" not in capsys.readouterr().out
    assert (tmp_path / "splits/loose/all.txt").read_text().count(" loose/train/") == 5
    scc.main(command(tmp_path, "release", "--quantile", "0.9"))
    assert "the labels of --quantile 0.5 are replaced" in capsys.readouterr().out
    for image in range(5):
        one, other = (tmp_path / f"{name}/train/{image}.png" for name in ("loose", "pix_scc"))
        assert one.read_bytes() == other.read_bytes()
    for name in ("pix", "images", "a/b", ".x", ""):
        with pytest.raises(UserError, match=f"--exp {name}: give a plain folder name"):
            scc.main(command(tmp_path, "release", "--exp", name))


def test_a_classifier_that_has_not_learned_is_told(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    scc.main(command(tmp_path, "release", "--quantile", "0.4"))
    told = capsys.readouterr()
    assert "the classifier gives" in told.out and "all pixels of these classes are" in told.out
    assert "warning: the classifier has not learned" in told.err
    report = json.loads((tmp_path / "pix_scc/report/report.json").read_text())
    with open(tmp_path / "pix_scc/connectivities.csv") as file:
        rows = list(csv.DictReader(file))
    right = [row["prediction"] == row["class"] for row in rows]
    assert report["accuracy on its labels"] == pytest.approx(100 * np.mean(right))
    counts = np.bincount([int(row["class"]) for row in rows])
    assert report["largest class"] == pytest.approx(100 * counts.max() / len(rows))
    assert report["loss of chance"] == pytest.approx(np.log(19)) and report["last loss"] > 2


@pytest.mark.parametrize(
    "images, iterations", [(12, 1000), (595, 1000), (1500, 2521), (2975, 5000), (7000, 5000)]
)
def test_iterations_suit_the_set(images, iterations):
    assert scc_model.default_iterations(images) == iterations
