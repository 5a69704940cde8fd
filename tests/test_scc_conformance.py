"""SCC beside the authors' code: tests/data/scc/ holds what it made of two label maps, of three sets
of losses and of five batches (DZhaoXd/SeCo at 04c4a05).

regions_<map>.csv: all connectivities of label_<map>.png with the window cut from the image, the
mask in the network, and the patch. filter_cases.npz: losses, scores, predictions, and the classes
that each filter leaves. steps.json: five training steps of its ResNet-50 in float64, and the logits
after them.
"""

import csv
import json
import zlib

import numpy as np
import pytest
import torch
from conformance import DATA, formula_image, formula_state, hashed, read_arrays

import seco_scc as scc
from dataset.scc import index_image, numbered, patch_window
from model import scc as scc_model
from model.resnet import IMAGENET_MEAN, IMAGENET_STD
from model.scc import PatchClassifier, PooledClassifier
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
@pytest.mark.parametrize("rule", ["score", "loss", "both_loss"])
def test_a_larger_quantile_keeps_more(rule, quantile):
    """The threshold is sorted[int(n q)] of the losses, sorted[int(n (1 - q))] of the scores."""
    score = np.random.default_rng(0).permutation(100) / 100
    loss, predicted = 1 - score, np.zeros(100, int)
    kept, thresholds = scc.filter_connectivities(loss, score, predicted, rule, quantile)
    values, share = (score, 1 - quantile) if rule == "score" else (loss, quantile)
    expected = sorted(values)[min(int(100 * share), 99)]
    assert thresholds["per_class"] == {0: expected}
    assert (kept == (score >= expected if rule == "score" else loss <= expected)).all()


@pytest.mark.parametrize("network", [PatchClassifier, PooledClassifier])
def test_the_classifier_starts_from_xavier_normal_weights_and_torchs_bias(network):
    torch.manual_seed(0)
    layer = network(18, "torchvision", 380).classifier  # many weights
    reach = 1 / np.sqrt(512)  # of torch's default bias
    assert 0.5 * reach < float(layer.bias.detach().abs().max()) <= reach
    weight = layer.weight.detach().flatten()
    deviation = np.sqrt(2 / (512 + 380))
    assert float(weight.std()) == pytest.approx(deviation, rel=0.01)
    # A normal variable has 4.6 % beyond two deviations, a uniform one none.
    assert float((weight.abs() > 2 * deviation).float().mean()) == pytest.approx(0.0455, abs=0.003)


def batch_of_step(t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(patches float64 4 x 3 x 64 x 128, masks 4 x 1 x 32 x 64, classes 4) of step t = 1 .. 6."""
    blocks = lambda name, *shape: (hashed(name, np.prod(shape)) >> 24).reshape(shape)  # noqa: E731
    patches = np.stack([blocks(f"x {t} {b}", 8, 16, 3) for b in range(4)])
    patches = (patches / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    patches = patches.repeat(8, axis=1).repeat(8, axis=2).transpose(0, 3, 1, 2)
    masks = np.stack([blocks(f"m {t} {b}", 8, 16) >= 128 for b in range(4)])
    masks = masks.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    classes = blocks(f"y {t}", 4).astype(np.int64) % 19
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (patches, masks, classes))


@pytest.fixture(scope="module")
def steps():
    """What the release's network gave, the same of ours, and the network after the steps."""
    expected = json.loads((DATA / "scc/steps.json").read_text(encoding="utf-8"))
    model = PatchClassifier(50, "torchvision", 19)
    shapes = {released(name): value.shape for name, value in model.state_dict().items()}
    state = formula_state(shapes)
    model.load_state_dict({name: state[released(name)] for name in model.state_dict()})
    model.double().train()
    optimizer, found = scc.make_optimizer(model, 0.01), []
    base = [group["lr"] for group in optimizer.param_groups]
    with pytest.MonkeyPatch.context() as patch:  # the inputs are normalised, in float64
        patch.setattr(scc_model, "logits_of", lambda model, images, masks, *_: model(images, masks))
        for t in range(1, 6):
            rates = [scc.decayed(lr, t, 60) for lr in base]
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr
            optimizer.zero_grad()
            loss = scc.gradients(model, batch_of_step(t), torch.device("cpu"), False, 0.1)
            optimizer.step()
            found.append({"loss": loss, "lr": rates})
    return expected, found, model


def released(name: str) -> str:
    """The release's name of a weight of ours."""
    return name.removeprefix("backbone.").replace("classifier.", "fc.")


def test_five_training_steps_are_the_releases(steps):
    expected, found, model = steps
    for step, mine in zip(expected["steps"], found, strict=True):
        assert mine["loss"] == pytest.approx(step["loss"], rel=1e-12)
        assert mine["lr"] == pytest.approx(step["lr"], rel=1e-15)
    after = {released(name): value for name, value in model.state_dict().items()}
    for name, (total, largest) in expected["after"].items():
        assert float(after[name].sum()) == pytest.approx(total, rel=1e-9)
        assert float(after[name].abs().max()) == pytest.approx(largest, rel=1e-10)


def test_the_network_is_the_releases(steps):
    """Its logits for other patches, with the running statistics."""
    expected, _, model = steps
    patches, masks, _ = batch_of_step(6)
    with torch.no_grad():
        logits = model.eval()(patches, masks).numpy()
    assert np.abs(logits - expected["eval_logits_of_batch_6"]).max() < 1e-10
