"""SCC: its parts against slow oracles, and whole runs: the same bytes however they went, without
ground truth."""

import csv
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import beside_a_second, killed
from torch.nn import functional as F

import seco_scc as scc
from dataset import scc as scc_data
from dataset.toy import draw_scene
from model import scc as scc_model
from model.resnet import normalised
from model.scc import PooledClassifier
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
from util.run import UserError

RECIPES = ("release", "paper")


def speckled(label, random, share=0.3):
    """A label map as a model's raw output has it: blocks of other classes, and of no label."""
    shape = [-(-side // 12) for side in label.shape]
    blocks, changed = random.integers(0, 20, shape), random.random(shape) < share
    blocks, changed = (np.kron(x, np.ones((12, 12), int)) for x in (blocks, changed))
    blocks, changed = (x[: label.shape[0], : label.shape[1]] for x in (blocks, changed))
    return np.where(changed, np.where(blocks == 19, IGNORE, blocks), label).astype(np.uint8)


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
    sizes = {"release": "--patch-size 32 64 --batch-size 8", "paper": "--batch-size 2 --scale 0.5"}
    return [
        *("--id-list-path", str(root / "splits/pix/all.txt"), "--root-path", str(root)),
        *("--recipe", recipe, "--backbone", "resnet10", "--backbone-weights", "none"),
        *("--iterations", "4", "--device", "cpu", *sizes[recipe].split(), *extra),
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


def table(folder):
    """The rows of a folder's connectivities.csv."""
    with open(folder / "connectivities.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """Both recipes run from beginning to end, uninterrupted."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(made, root, dirs_exist_ok=True)
    for recipe in RECIPES:
        scc.main(command(root, recipe))
    return root


@pytest.fixture
def root_done(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refuse(*_):
    raise AssertionError("not to be called")


def job_of(root, recipe="release", **changes):
    """seco_scc's Job for the made images."""
    options = scc.parse_args(command(root, recipe))
    for name, value in changes.items():
        setattr(options, name, value)
    job = scc_data.Job(options, suffix(recipe))
    parts = [scc_data.index_image(root / row[1], i, 19) for i, row in enumerate(job.rows)]
    job.take(np.concatenate(parts))
    return job


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size, mirror", [((64, 96), True), ((50, 77), False)])
def test_masked_average_pooling_against_a_loop_over_pixels(size, mirror):
    """A cell's weight in a mask is its share of the cell's pixels; one pixel weighs as any."""
    random = np.random.default_rng(3)
    numbers = np.kron(random.integers(-1, 12, (20, 20)), np.ones((5, 5), np.int32))
    numbers = numbers[: size[0], : size[1]].astype(np.int32)
    numbers[numbers == 4] = -1
    numbers[3, 3] = 4
    height, width = -(-size[0] // 16), -(-size[1] // 16)
    seen, expected = numbers[:, ::-1] if mirror else numbers, np.zeros((12, height * width))
    pixels = np.zeros(height * width)
    for y, x in np.ndindex(*size):
        cell = y * height // size[0] * width + x * width // size[1]
        pixels[cell] += 1
        if seen[y, x] >= 0:
            expected[seen[y, x], cell] += 1
    expected /= pixels
    expected /= expected.sum(axis=1, keepdims=True)
    found = scc_data.mask_shares(numbers, 12, size, mirror).numpy()
    assert np.allclose(found, expected, atol=1e-6) and found[4].max() == 1


def test_one_pass_serves_all_connectivities():
    """The pooled classifier against masks averaged down by torch, one connectivity at a time."""
    torch.manual_seed(0)
    model = PooledClassifier(18, "torchvision", 19).eval()
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    numbers = np.random.default_rng(4).integers(-1, 5, (2, 64, 96)).astype(np.int32)
    with torch.no_grad():
        logits = model(normalised(images), [scc_data.mask_shares(n, 5, (64, 96)) for n in numbers])
        features = model.backbone(normalised(images))[-1]
        for image, number in np.ndindex(2, 5):
            weight = F.avg_pool2d(
                torch.from_numpy(numbers[image] == number).float()[None, None], 16
            )
            pooled = (features[image] * weight[0]).sum(dim=(1, 2)) / weight.sum()
            assert torch.allclose(logits[image * 5 + number], model.classifier(pooled), atol=1e-4)


# -------------------------------------------------------------------------- thresholds, the mixture


def test_filter_drops_losses_that_are_not_finite_and_leaves_the_rest_alone():
    loss = np.array([0.1, 0.2, 3.0, np.nan, np.inf])
    score, predicted = np.array([0.9, 0.8, 0.7, np.nan, 0.9]), np.array([1, 1, 1, 1, 2])
    kept, thresholds = scc.filter_connectivities(loss, score, predicted, "both_loss", 0.5)
    alone, same = scc.filter_connectivities(loss[:3], score[:3], predicted[:3], "both_loss", 0.5)
    assert kept.tolist() == [*alone, False, False] == [True, True, False, False, False]
    none, empty = scc.filter_connectivities(loss[3:], score[3:], predicted[3:], "both_loss", 0.5)
    assert thresholds == same and not none.any() and empty["global"] is None


def test_decisions_at_and_around_the_thresholds():
    eta, score = (
        x.ravel() for x in np.meshgrid([0, 0.59, 0.6, 0.61, 1], [0.94, 0.95, 0.96, np.nan])
    )
    decision, final = scc.decide(eta, score, np.full(20, 3), np.full(20, 8), 0.6, 0.95)
    for e, s, *found in zip(eta, score, decision, final):
        otherwise = ["corrected", 3] if s > 0.95 else ["dropped", IGNORE]
        assert found == (["kept", 8] if e < 0.6 else otherwise)


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
    assert model.weights == pytest.approx((0.75, 0.25), abs=0.03)


def test_a_wide_noisy_component_does_not_claim_the_lowest_losses():
    random = np.random.default_rng(7)
    loss = np.concatenate([random.normal(5, 0.1, 900), random.normal(8, 3, 300), [0.0]])
    model = scc.noise_posterior(loss, 0)
    assert model.fallback is None and model.eta[-1] < 0.5
    below = loss < model.low + model.means[0] * (model.high - model.low)
    assert below.sum() > 100 and model.eta[below].max() < 0.5 and model.eta[loss > 9].min() > 0.6


@pytest.mark.parametrize(
    "loss, words",
    [
        (np.linspace(0, 5, scc_model.MIN_CONNECTIVITIES - 1), "fewer than"),
        (np.full(200, 1.5), "equal"),
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
    model = scc.noise_posterior(np.append(loss, [np.nan, np.inf]), 0)
    alone = scc.noise_posterior(loss, 0)
    assert model.eta.tolist() == [*alone.eta, 1, 1] and model.means == alone.means


# ------------------------------------------------------------------------------------ training data


def test_an_epoch_has_every_connectivity_once_and_the_buffer_is_bounded(made, monkeypatch):
    monkeypatch.setattr(scc_data, "BUFFER", 20)
    job = job_of(made)
    order, visits = scc_data.shuffle(job, 0)
    assert sorted(order) == list(range(len(job.index))) and max(map(len, visits)) <= 20
    assert len(visits) == sum(-(-len(job.of_image(i)) // 20) for i in range(5))
    other = scc_data.shuffle(job, 1)[0]
    assert order.tolist() not in (sorted(order), other.tolist())
    assert order.tolist() == scc_data.shuffle(job, 0)[0].tolist()
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
    job, reads = job_of(made, workers=3), []
    read = job.read
    monkeypatch.setattr(job, "read", lambda image: reads.append(image) or read(image))
    per_epoch = scc_data.batches_per_epoch(job)
    batches = list(scc_data.patch_batches(job, 0, per_epoch + 1))
    assert len(batches) == per_epoch + 1 == len(job.index) // 8 + 1
    (first, visits), (second, _) = (scc_data.shuffle(job, epoch) for epoch in (0, 1))
    assert len(reads) <= 2 * len(visits) and reads.count(0) <= 2 * -(-len(job.of_image(0)) // 40)
    mirrored, seen = 0, [*first[: per_epoch * 8].tolist(), *second[:8].tolist()]
    store_masks(tmp_path, job, seen)
    for place, member in enumerate(seen):
        patches, masks, classes = (x[place % 8].numpy() for x in batches[place // 8])
        patch, mask = opened_patch(tmp_path, job, member, (32, 64))
        if flip := not (patches == patch).all():
            patch, mask = patch[:, ::-1], mask[:, ::-1]
        assert (patches == patch).all() and (masks[0] == mask).all()
        assert classes == job.index["class_id"][member]
        mirrored += flip
    assert 0.3 < mirrored / len(seen) < 0.7


@pytest.mark.parametrize(
    "recipe, batches_of",
    [("release", scc_data.patch_batches), ("paper", scc_data.image_batches)],
)
def test_batches_follow_from_their_number_alone(made, recipe, batches_of):
    """Starting in the middle of an epoch, or with other workers, gives the same batches."""
    whole = list(batches_of(job_of(made, recipe), 0, 9))
    for start, workers in ((3, 1), (7, 5)):
        part = list(batches_of(job_of(made, recipe, workers=workers), start, 9))
        assert len(part) == 9 - start
        for a, b in zip(whole[start:], part):
            parts = zip([a[0], *a[1], a[2]], [b[0], *b[1], b[2]], strict=True)
            assert all(torch.equal(x, y) for x, y in parts)


def test_scores_against_one_connectivity_at_a_time(made):
    torch.manual_seed(0)
    job = job_of(made, batch_size=7)
    model = scc.make_classifier(job.options, 19, torch.device("cpu")).eval()
    with ThreadPoolExecutor(2) as pool:
        found = scc.score_image(model, job, 1, job.read(1), torch.device("cpu"), pool)
    picture, numbers = job.read(1)
    for place, row in list(enumerate(job.of_image(1)))[::9]:
        patch, mask = scc.cut_patch(picture, numbers, row, (32, 64))
        patches, masks = torch.from_numpy(patch)[None], torch.from_numpy(mask)[None, None]
        with torch.no_grad():
            logits = model(normalised(patches), masks)[0].double()
        probability = torch.softmax(logits, 0)
        loss = -float(probability[row["class_id"]].log())
        assert found["loss"][place] == pytest.approx(loss, abs=1e-4)
        assert found["score"][place] == pytest.approx(float(probability.max()), abs=1e-4)
        assert found["predicted"][place] == int(probability.argmax())


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs(finished, recipe):
    out = finished / f"pix_{suffix(recipe)}"
    rows = read_list(finished / f"splits/{out.name}/all.txt")
    assert rows == [(f"images/train/{i}.png", f"{out.name}/train/{i}.png") for i in range(5)]
    lines, report = table(out), json.loads((out / "report/report.json").read_text())
    left = iter(lines)
    for i, (image, path) in enumerate(rows):
        before, after = read_label(finished / f"pix/train/{i}.png"), read_label(finished / path, 19)
        expected = np.full_like(before, IGNORE)
        for c, line in zip(connectivities(before, range(19)), left):
            assert (line["image"], int(line["class"])) == (image, c.class_id)
            assert int(line["area"]) == c.area
            assert tuple(int(line[k]) for k in ("x", "y", "width", "height")) == c.box
            assert (int(line["final"]) == IGNORE) == (line["decision"] == "dropped")
            assert (line["eta"] == "") == (recipe == "release")
            expected[c.window][c.mask] = int(line["final"])
        assert (after == expected).all()
    decisions = Counter(line["decision"] for line in lines)
    assert {k: report[k] for k in decisions} == decisions and "ground_truth" not in report
    counted = sum(sum(counts.values()) for counts in report["per_class"].values())
    assert counted == len(lines) == report["connectivities"]
    page = (out / "report/index.html").read_text()
    for name in ("loss_histogram", "panels"):
        assert Image.open(out / f"report/{name}.png").width > 500 and f"{name}.png" in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_connectivities_might_as_well_not_be_there(root, recipe):
    """--min-area on labels with slivers makes what no limit makes on labels whose slivers were
    erased beforehand.
    """
    limit, rows = 12, read_list(root / "splits/pix/all.txt")
    for _, path in rows:
        label = read_label(root / path)
        numbers = scc_data.numbered(label, 19)
        label[np.bincount(numbers.ravel() + 1)[numbers + 1] < limit] = IGNORE
        write_label(root / "erased" / path.removeprefix("pix/"), label, CITYSCAPES_19.palette)
    erased = [(image, path.replace("pix/", "erased/", 1)) for image, path in rows]
    write_list(root / "splits/erased/all.txt", erased)
    scc.main(command(root, recipe, "--min-area", str(limit)))
    plain = command(root, recipe)
    plain[1] = plain[1].replace("splits/pix", "splits/erased")
    scc.main(plain)
    out, other = (root / f"{name}_{suffix(recipe)}" for name in ("pix", "erased"))
    found, expected = table(out), table(other)
    small = [row for row in found if int(row["area"]) < limit]
    what = {(row["decision"], row["loss"], row["final"]) for row in small}
    assert len(small) > 20 and what == {("dropped", "nan", "255")}
    assert len(found) - len(small) == len(expected) > 20
    for i in range(5):
        assert (read_label(out / f"train/{i}.png") == read_label(other / f"train/{i}.png")).all()


@pytest.mark.parametrize(
    "recipe, thresholds",
    [("release", ("--quantile", "0.2")), ("paper", ("--tau-ns", "0", "--tau-cr", "0.1"))],
)
def test_other_thresholds_run_only_the_correction(root_done, monkeypatch, recipe, thresholds):
    before, table = results(root_done, recipe), f"pix_{suffix(recipe)}/connectivities.csv"
    for module, name in ((scc, "train"), (scc, "score_image"), (scc_data, "index_image")):
        monkeypatch.setattr(module, name, refuse)
    scc.main(command(root_done, recipe, *thresholds))
    other = results(root_done, recipe)
    assert other[table] != before[table]
    scc.main(command(root_done, recipe, *thresholds))
    assert results(root_done, recipe) == other
    scc.main(command(root_done, recipe, "--stage", "correct"))
    assert results(root_done, recipe) == before


def test_two_thresholds_side_by_side(root_done):
    before = results(root_done, "release")
    scc.main(command(root_done, "release", "--quantile", "0.9", "--exp", "loose"))
    assert results(root_done, "release") == before
    assert (root_done / "splits/loose/all.txt").read_text().count(" loose/train/") == 5


def test_killed_in_every_stage_and_started_again(finished, root):
    """SIGKILL in training after three iterations, in scoring after two images, in correction after
    two labels.
    """
    for name, calls in (("gradients", 3), ("score_image", 2), ("corrected_label", 2)):
        killed("seco_scc", name, calls, command(root, "release"), "seco_scc.SAVE_SECONDS = 0")
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


def test_the_learning_rate_follows_the_iteration(root, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def note(self):
        rates.append([group["lr"] for group in self.param_groups])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    scc.main(command(root, "release", "--stage", "train", "--lr", "0.02"))
    total = 20 * (len(job_of(root).index) // 8)
    expected = [0.02 * (1 + 10 * t / total) ** -0.75 for t in range(1, 5)]
    assert np.allclose(rates, [[lr / 10, lr] for lr in expected], rtol=1e-12)


def test_memory_exhaustion_in_training_changes_nothing(finished, root, monkeypatch, capsys):
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

    monkeypatch.setattr(scc_model, "logits_of", scarce)
    scc.main(command(root, "release", "--stage", "train"))
    found, expected = (
        torch.load(folder / "pix_scc/checkpoint.pth", weights_only=True)["model"]
        for folder in (root, finished)
    )
    assert seen == [False, False, True, True, True]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "does not fit into memory" in capsys.readouterr().out


def test_two_processes_make_what_one_makes(finished, root, monkeypatch):
    how = command(root, "paper")
    beside_a_second(monkeypatch, lambda: scc.main(how), "seco_scc.py", *how)
    assert results(root, "paper") == results(finished, "paper")


def test_ground_truth_is_read_for_gt_alone(root):
    """Where there is none the results are the same; --gt adds figures to the report."""
    (root / "gt").rename(root / "away")
    scc.main(command(root, "paper"))
    before = results(root, "paper")
    (root / "away").rename(root / "gt")
    scc.main(command(root, "paper", "--gt", str(root / "splits/gt.txt")))
    after = results(root, "paper")
    changed = {Path(name).name for name in after if after[name] != before[name]}
    assert changed == {"report.json", "index.html"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_diagnostics_against_the_confusion_matrix_and_loops(root_done, recipe):
    gt = str(root_done / "splits/gt.txt")
    scc.main(command(root_done, recipe, "--gt", gt, "--tau-cr", "0.02", "--tau-ns", "0"))
    out = root_done / f"pix_{suffix(recipe)}"
    report = json.loads((out / "report/report.json").read_text())
    read = lambda folder: np.stack([read_label(folder / f"train/{i}.png") for i in range(5)])
    truth, pixel = read(root_done / "gt"), read(root_done / "pix")
    known = truth != IGNORE
    for when, labels in (("before", pixel), ("after", read(out))):
        labeled = labels != IGNORE
        right = 100 * (labels == truth)[known & labeled].mean()
        assert report["ground_truth"][f"accuracy_{when}"] == pytest.approx(right)
        assert report[f"coverage_{when}"] == pytest.approx(100 * labeled.mean())
    rows, lines = [], iter(table(out))
    for before, true in zip(pixel, truth):
        for c, line in zip(connectivities(before, range(19)), lines):
            inside = true[c.window][c.mask]
            if (inside != IGNORE).any():
                rows.append((int(np.bincount(inside[inside != IGNORE]).argmax()), line))
    wrong = lambda true, line: true != int(line["class"])
    signals = [(wrong(*row), float(row[1]["eta"] or row[1]["loss"])) for row in rows]
    pairs = [(a > b) + (a == b) / 2 for w, a in signals if w for v, b in signals if not v]
    assert report["ground_truth"]["auroc"] == pytest.approx(np.mean(pairs))


# -------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "rows, extra, words",
    [
        ([], ("--quantile", "1.5"), "--quantile 1.5"),
        ([], ("--patch-size", "33", "64"), "--patch-size 33 64: give even numbers"),
        ([], ("--backbone-weights", "nowhere.pth"), "nowhere.pth"),
        ([], ("--exp", "pix"), "--exp pix: give a plain folder name"),
        ([("images/train/0.png", "pix/0.png"), ("x.png", "y/x.png")], (), "several experiments"),
        ([("images/train/9.png", "pix/train/0.png")], (), "images/train/9.png: no such file"),
        ([("images/train/3.png", "pix/train/3.png")], (), "no connectivity of --min-area 1 pixels"),
    ],
)
def test_wrong_options_and_lists(root, rows, extra, words):
    write_list(root / "splits/pix/all.txt", rows or read_list(root / "splits/pix/all.txt"))
    with pytest.raises(UserError, match=words):
        scc.main(command(root, "release", *extra))
    assert not [*root.glob("pix_scc/*.pth"), *root.glob("pix_scc/train")]


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--min-area", "99999"), "no connectivity of --min-area 99999"),
        (("--stage", "score"), "run --stage train first"),
        (("--stage", "correct"), "run --stage score first"),
        (("--class-num", "4", "--stuff", "0", "--things", "1"), "with 4 classes"),
        (("--lr", "1e30", "--iterations", "9"), "--lr 1e.30: SCC's loss is not finite"),
    ],
)
def test_a_failed_first_run_is_told_and_does_not_block_the_next_one(root, extra, words):
    with pytest.raises(UserError, match=words):
        scc.main(command(root, "release", *extra))
    assert not (root / "pix_scc/checkpoint.pth").exists()
    scc.main(command(root, "release", "--stage", "train"))


def test_results_of_other_settings_or_files_are_refused_and_left(root_done):
    before, image = results(root_done, "release"), root_done / "images/train/2.png"
    with pytest.raises(UserError, match="iterations = 4, now it is 7"):
        scc.main(command(root_done, "release", "--iterations", "7"))
    kept = image.read_bytes()
    shutil.copy(root_done / "images/train/1.png", image)
    with pytest.raises(UserError, match="images/train/2.png: has changed since"):
        scc.main(command(root_done, "release"))
    image.write_bytes(kept)
    scc.main(command(root_done, "release"))
    assert results(root_done, "release") == before


def test_a_lost_classifier_takes_its_scores_with_it_and_lost_results_come_back(root_done):
    out, before = root_done / "pix_scc", results(root_done, "release")
    (out / "checkpoint.pth").unlink()
    for path in (out / "scores").glob("*.npz"):
        with np.load(path) as scores:
            other = {name: scores[name][::-1] for name in scores.files}
        np.savez(path, **other)
    scc.main(command(root_done, "release"))
    assert results(root_done, "release") == before
    (out / "scores/000001.npz").unlink()
    (out / "train/4.png").unlink()
    (root_done / "splits/pix_scc/all.txt").unlink()
    scc.main(command(root_done, "release"))
    assert results(root_done, "release") == before


def test_maps_that_do_not_fit_are_told_before_the_training(root, monkeypatch):
    monkeypatch.setattr(scc, "train", refuse)
    truth, label = read_label(root / "gt/train/2.png"), read_label(root / "pix/train/2.png")
    for path, wrong, words in (
        ("gt/train/2.png", truth[::2, ::2], "gt/train/2.png: 64x32 pixels .*128x64"),
        ("pix/train/2.png", label.T, "pix/train/2.png: .*64x128"),
    ):
        write_label(root / path, wrong, CITYSCAPES_19.palette)
        with pytest.raises(UserError, match=words):
            scc.main(command(root, "release", "--gt", str(root / "splits/gt.txt")))
    write_list(root / "splits/gt.txt", read_list(root / "splits/gt.txt")[1:])
    with pytest.raises(UserError, match="no ground truth for images/train/0.png"):
        scc.main(command(root, "release", "--gt", str(root / "splits/gt.txt")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_labels_smaller_than_their_images(root, recipe):
    for _, path in read_list(root / "splits/pix/all.txt"):
        label = read_label(root / path)[::2, ::2]
        write_label(root / path, label, CITYSCAPES_19.palette)
    scc.main(command(root, recipe))
    for _, path in read_list(root / f"splits/pix_{suffix(recipe)}/all.txt"):
        assert read_label(root / path, 19).shape == (32, 64)


def test_a_classifier_that_has_not_learned_is_told(root_done, capsys):
    scc.main(command(root_done, "release", "--quantile", "0.4"))
    told = capsys.readouterr()
    assert "the labels of --quantile 0.5 are replaced; --exp NAME" in told.out
    assert "the classifier gives" in told.out and "all pixels of these classes are" in told.out
    assert "warning: the classifier has not learned" in told.err
    report = json.loads((root_done / "pix_scc/report/report.json").read_text())
    rows = table(root_done / "pix_scc")
    right = [row["prediction"] == row["class"] for row in rows]
    assert report["accuracy on its labels"] == pytest.approx(100 * np.mean(right))
    largest = max(Counter(row["class"] for row in rows).values())
    assert report["largest class"] == pytest.approx(100 * largest / len(rows))
    assert report["loss of chance"] == pytest.approx(np.log(19)) and report["last loss"] > 2


@pytest.mark.parametrize(
    "images, iterations", [(12, 1000), (595, 1000), (1500, 2521), (2975, 5000), (7000, 5000)]
)
def test_iterations_suit_the_set(images, iterations):
    assert scc_model.default_iterations(images) == iterations
