"""SCC beside the authors' code: tests/data/scc/ holds what it made of two label maps and of three
sets of losses (DZhaoXd/SeCo at 04c4a05), and six iterations of its schedule are written out here.

regions_<map>.csv: all connectivities of label_<map>.png with the window cut from the image, the
mask in the network, and the patch. filter_cases.npz: losses, scores, predictions, and the classes
that each filter leaves.
"""

import csv
import shutil
import zlib

import numpy as np
import pytest
import torch
from conformance import DATA, formula_image, read_arrays
from PIL import Image
from torch.nn import functional as F

import seco_scc as scc
from dataset.scc import Data, index_image, numbered, patch_batches, patch_window
from model.resnet import normalised
from model.scc import PatchClassifier, PooledClassifier, linear
from util.labels import IGNORE, read_label

PATCH = (256, 512)
MAPS = {"planted": (1024, 2048), "camvid": (360, 480)}
RULES = {"both_loss": "both_loss", "local_loss": "loss", "local_score": "score"}


@pytest.fixture(scope="module", params=MAPS)
def regions(request):
    """(rows of the csv file, their INDEX rows, image, numbers) of a label map."""
    path = DATA / f"scc/label_{request.param}.png"
    with open(DATA / f"scc/regions_{request.param}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = numbered(read_label(path, 19), 19)
    return rows, index_image(path, 0, 19), formula_image(*MAPS[request.param]), numbers


def whole(row, *names):
    return tuple(int(row[name]) for name in names)


def test_the_connectivities_are_the_releases(regions):
    rows, index, _, _ = regions
    assert len(rows) == len(index) > 60
    for row, mine in zip(rows, index):
        assert whole(row, "class", "area", "x", "y", "width", "height") == whole(
            mine, "class_id", "area", "x", "y", "width", "height"
        )


def test_windows_masks_and_patches_are_the_releases(regions):
    rows, index, image, numbers = regions
    for row, mine in zip(rows, index):
        box = whole(mine, "x", "y", "width", "height")
        window = patch_window(box, *numbers.shape, PATCH)
        assert window == whole(row, "y0", "x0", "y1", "x1")
        patch, mask = scc.cut_patch(image, numbers, mine, PATCH)
        assert (int(mask.sum()), zlib.crc32(mask.tobytes())) == whole(
            row, "mask_pixels", "mask_crc32"
        )
        if row["patch_crc32"]:
            assert zlib.crc32(patch.tobytes()) == int(row["patch_crc32"])
        else:  # resized: the release does not round
            means = [float(row[f"mean_{channel}"]) for channel in "rgb"]
            assert np.abs(patch.mean(axis=(0, 1)) - means).max() < 0.05


@pytest.mark.parametrize("case", ["plain", "ties", "one_class"])
@pytest.mark.parametrize("theirs, rule", RULES.items())
def test_the_filters_keep_what_the_releases_keep(case, theirs, rule):
    cases = read_arrays("scc/filter_cases")
    loss, score, predicted = (cases[f"{case}_{name}"] for name in ("loss", "score", "pred"))
    kept, thresholds = scc.filter_connectivities(loss, score, predicted, rule, 0.5)
    assert 0 < kept.sum() < len(kept)
    assert (np.where(kept, predicted, IGNORE) == cases[f"{case}_final_{theirs}"]).all()
    if rule != "score":
        expected = float(cases[f"{case}_global_loss_threshold"])
        assert thresholds["global"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_the_score_filter_keeps_the_same_share_as_the_loss_filter(quantile):
    """sorted[int(n (1 - q))] of the scores: a larger q keeps more, as with losses."""
    score = np.random.default_rng(0).permutation(100) / 100
    kept, thresholds = scc.filter_connectivities(
        1 - score, score, np.zeros(100, int), "score", quantile
    )
    expected = sorted(score)[min(int(100 * (1 - quantile)), 99)]
    assert thresholds["per_class"] == {0: expected}
    assert (kept == (score >= expected)).all()


@pytest.mark.parametrize("network", [PatchClassifier, PooledClassifier])
def test_the_classifier_starts_from_xavier_normal_weights_and_torchs_bias(network):
    torch.manual_seed(0)
    layer = network(18, "torchvision", 19).classifier
    reach = 1 / np.sqrt(512)  # of torch's default bias
    assert 0.5 * reach < float(layer.bias.detach().abs().max()) <= reach
    weight = torch.cat([linear(512, 19).weight.detach().flatten() for _ in range(20)])
    deviation = np.sqrt(2 / (512 + 19))
    assert float(weight.std()) == pytest.approx(deviation, rel=0.01)
    # A normal variable has 4.6 % beyond two deviations, a uniform one none.
    assert float((weight.abs() > 2 * deviation).float().mean()) == pytest.approx(0.0455, abs=0.003)


@pytest.fixture
def camvid(tmp_path):
    """seco_scc's Data of label_camvid.png and its image; a network that is small enough for it."""
    Image.fromarray(formula_image(*MAPS["camvid"])).save(tmp_path / "image.png")
    (tmp_path / "pix").mkdir()
    shutil.copy(DATA / "scc/label_camvid.png", tmp_path / "pix/label.png")
    rows = [("image.png", "pix/label.png")]
    options = scc.parse_args(
        ["--id-list-path=all.txt", "--backbone=resnet10", "--backbone-weights=none"]
        + ["--patch-size", "32", "64", "--batch-size=8", "--iterations=6", "--device=cpu"]
    )
    index = index_image(tmp_path / "pix/label.png", 0, 19)
    return Data(tmp_path, rows, index, 19, options)


def test_six_iterations_against_the_schedule_written_out(camvid, tmp_path):
    """SGD with Nesterov's momentum, weight decay, two learning rates, label smoothing, by hand."""
    data = camvid
    lr, total = 0.01, 20 * (482 // 8)
    scc.seed_everything(0)
    model = scc.make_classifier(data.options, 19, torch.device("cpu")).train()
    momentum = {}
    for t, (patches, masks, classes) in enumerate(patch_batches(data, 0, 6), start=1):
        logits = model(normalised(patches), masks)
        target = F.one_hot(classes, 19) * 0.9 + 0.1 / 19
        loss = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
        model.zero_grad()
        loss.backward()
        rate = lr * (1 + 10 * t / total) ** -0.75
        with torch.no_grad():
            for name, weight in model.named_parameters():
                step = weight.grad + 1e-3 * weight
                before = momentum.get(name)
                momentum[name] = step if before is None else 0.9 * before + step
                factor = 1 if name.startswith("classifier.") else 0.1
                weight -= factor * rate * (step + 0.9 * momentum[name])
    scc.train(data, tmp_path, torch.device("cpu"))
    found = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert found.keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.allclose(found[name], expected, rtol=0, atol=2e-6), name
