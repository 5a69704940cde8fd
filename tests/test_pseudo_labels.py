"""Stage 0: class-balanced top p against sorting all pixels, the three sources, and being stopped at
any moment."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from model.deeplabv2 import DILATIONS, DeepLabV2, FrozenBatchNorm, load_dtst_checkpoint
from model.deeplabv3plus import DeepLabV3Plus
from scripts import make_pseudo_labels as stage0
from util.labels import read_label
from util.run import UserError

K, SIZE = 19, (24, 40)  # classes; height and width of the images


def softmax(logits):
    exponential = np.exp(logits - logits.max(axis=0))
    return exponential / exponential.sum(axis=0)


@pytest.fixture
def data(tmp_path):
    """A root with five images, a list, and probability arrays (float32, float16, npy, npz, three
    ways of naming).
    """
    random = np.random.default_rng(0)
    rows, arrays = [], {}
    for index in range(5):
        name = f"leftImg8bit/train/a/im{index}_leftImg8bit"
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)
        array = softmax(random.normal(0, 3, (K, *SIZE))).astype(
            np.float16 if index == 1 else np.float32
        )
        array[3] += array[7]  # one class that is never predicted; what it had goes to class 3
        array[7] = 0
        place = (
            tmp_path
            / "probabilities"
            / (name, name.partition("/")[2], name.rpartition("/")[2])[index % 3]
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        if index == 2:
            np.savez_compressed(f"{place}.npz", probabilities=array)
        else:
            np.save(f"{place}.npy", array)
        rows.append(f"{name}.png")
        arrays[f"pix/train/a/im{index}_leftImg8bit.png"] = array.astype(np.float32)
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    return tmp_path, arrays


def command(root, *extra, source=("--probabilities", "probabilities")):
    return [
        "--image-list",
        str(root / "list.txt"),
        "--root-path",
        str(root),
        "--exp",
        "pix",
        "--class-num",
        str(K),
        "--out-list",
        str(root / "splits/pix/list.txt"),
        source[0],
        str(root / source[1]),
        "--device",
        "cpu",
        *extra,
    ]


def files(folder):
    """Content of everything that must not depend on how the run went."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def oracle(arrays, top_p):
    """Labels by the rule as written: gather all confidences of a class, sort them, cut."""
    prediction = {name: array.argmax(axis=0) for name, array in arrays.items()}
    confidence = {name: array.max(axis=0) for name, array in arrays.items()}
    labels = {name: np.full(array.shape[1:], 255, dtype=np.uint8) for name, array in arrays.items()}
    for class_id in range(K):
        ranked = sorted(
            v for name in arrays for v in confidence[name][prediction[name] == class_id]
        )
        if not ranked:
            continue
        threshold = ranked[min(round(len(ranked) * (1 - top_p)), len(ranked) - 1)]
        for name in arrays:
            labels[name][(prediction[name] == class_id) & (confidence[name] >= threshold)] = (
                class_id
            )
    return labels


@pytest.mark.parametrize("top_p", [0.5, 0.25, 1.0, 0.001])
def test_equals_sorting_all_pixels(data, top_p):
    root, arrays = data
    stage0.main(command(root, "--top-p", str(top_p)))
    expected = oracle(arrays, top_p)
    for name, label in expected.items():
        assert np.array_equal(read_label(root / name, K), label)
        assert Image.open(root / name).mode == "P"
    if top_p == 0.5:
        summary = json.loads((root / "pix/summary.json").read_text())
        shares = [
            c["kept_share"] for c in summary["classes"].values() if c["predicted_pixels"] > 50
        ]
        assert shares and all(abs(share - 0.5) < 0.02 for share in shares)
        assert summary["classes"]["traffic sign"]["threshold"] is None
    assert (root / "splits/pix/list.txt").read_text().splitlines() == [
        f"{name.replace('pix', 'leftImg8bit', 1)} {name}" for name in arrays
    ]
    assert not (root / "pix/.confidence").exists()


@pytest.mark.parametrize("top_p", [0.5, 0.1, 0.9, 1.0])
def test_thresholds_with_ties_and_extremes(top_p):
    random = np.random.default_rng(1)
    images = [
        (
            random.integers(0, 3, (40, 50)).astype(np.uint8),
            random.choice(np.float32([0, 1e-30, 0.25, 0.5, 0.5000001, 0.99999994, 1]), (40, 50)),
        )
        for _ in range(3)
    ]
    found = stage0.class_thresholds(lambda: iter(images), 4, top_p)
    for class_id in range(3):
        ranked = np.sort(np.concatenate([c[p == class_id] for p, c in images]))
        assert found[class_id] == ranked[min(round(len(ranked) * (1 - top_p)), len(ranked) - 1)]
    assert found[3] == np.inf


def test_dtst_preset_takes_every_fourth_pixel(data):
    root, arrays = data
    stage0.main(command(root, "--preset", "dtst"))
    for name, label in oracle(
        {name: array[:, ::4, ::4] for name, array in arrays.items()}, 0.5
    ).items():
        assert np.array_equal(read_label(root / name, K), label.repeat(4, 0).repeat(4, 1))


def test_killed_and_started_again_is_the_same(data, monkeypatch):
    root, _ = data
    stage0.main(command(root))
    whole = files(root / "pix")
    shutil.rmtree(root / "pix")
    # the name of what dies and at which call: the third confidence, the third label, the summary,
    # the list
    for name, fatal_call in (
        ("savez", 3),
        ("write_label", 3),
        ("write_json", 2),
        ("write_list", 1),
    ):
        owner = stage0.np if name == "savez" else stage0

        def die(*args, calls=[], real=getattr(owner, name), fatal=fatal_call, **kwargs):  # noqa: B006, B008
            calls.append(1)
            if len(calls) % fatal == 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, die)
            stage0.main(command(root))
    stage0.main(command(root))
    assert files(root / "pix") == whole
    stage0.main(command(root))  # once more: nothing to do, nothing changes
    assert files(root / "pix") == whole
    next((root / "pix/train/a").glob("*.png")).unlink()
    stage0.main(command(root))
    assert files(root / "pix") == whole


def test_two_processes_give_the_same(data):
    root, _ = data
    stage0.main(command(root))
    whole = files(root / "pix")
    shutil.rmtree(root / "pix")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29517",
            str(ROOT / "scripts/make_pseudo_labels.py"),
            *command(root),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert files(root / "pix") == whole


@pytest.mark.parametrize(
    "spoil, told",
    [
        (
            lambda root: np.save(
                root / "probabilities/leftImg8bit/train/a/im0_leftImg8bit.npy", np.zeros((3, 4))
            ),
            "K x H x W",
        ),
        (
            lambda root: np.save(
                root / "probabilities/leftImg8bit/train/a/im0_leftImg8bit.npy",
                np.full((K, *SIZE), 3.0),
            ),
            "not probabilities",
        ),
        (
            lambda root: (
                root / "probabilities/leftImg8bit/train/a/im0_leftImg8bit.npy"
            ).write_bytes(b"\x93NUMPY"),
            "not readable",
        ),
        (
            lambda root: (root / "probabilities/leftImg8bit/train/a/im0_leftImg8bit.npy").unlink(),
            "no array for",
        ),
        (lambda root: (root / "leftImg8bit/train/a/im0_leftImg8bit.png").unlink(), "no such file"),
        (lambda root: (root / "list.txt").write_text("a/x.png\na/x.png\n"), "twice"),
        (lambda root: (root / "list.txt").write_text("x.png\n"), "at least one folder"),
    ],
)
def test_bad_input_is_one_clear_line(data, spoil, told):
    root, _ = data
    spoil(root)
    with pytest.raises(UserError, match=told):
        stage0.main(command(root))
    assert not (root / "pix/summary.json").exists() and not (root / "splits/pix/list.txt").exists()


def test_other_settings_are_refused(data):
    root, _ = data
    stage0.main(command(root))
    with pytest.raises(UserError, match="top_p = 0.5, now it is 0.3"):
        stage0.main(command(root, "--top-p", "0.3"))
    with pytest.raises(UserError, match="--top-p 0"):
        stage0.main(command(root, "--top-p", "0"))


# -------------------------------------------------------------------------------------------- DT-ST


def dtst_checkpoint(class_num, seed=0, prefix="module."):
    """A checkpoint as facts say DT-ST writes it, with random weights that keep activations
    finite.
    """
    torch.manual_seed(seed)
    model = DeepLabV2(class_num)
    for name, buffer in model.feature_extractor.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        if name.endswith("bn3.weight"):
            buffer.fill_(0.1)
    return {
        "iteration": 20000,
        "optimizer_fea": {},
        **{
            part: {prefix + key: value for key, value in getattr(model, part).state_dict().items()}
            for part in ("feature_extractor", "classifier")
        },
    }


def test_dtst_checkpoint_keys_and_strides():
    checkpoint = dtst_checkpoint(16)
    keys = checkpoint["feature_extractor"].keys()
    for key in (
        "conv1.weight",
        "bn1.weight",
        "layer1.0.conv1.weight",
        "layer4.2.bn3.running_var",
        "layer3.22.conv2.weight",
        "layer2.0.downsample.1.bias",
    ):
        assert f"module.backbone.{key}" in keys
    assert not any("num_batches_tracked" in key for key in keys)
    assert list(checkpoint["classifier"]) == [
        f"module.conv2d_list.{i}.{n}" for i in range(4) for n in ("weight", "bias")
    ]
    model = load_dtst_checkpoint(checkpoint, "x.pth")
    assert model.class_num == 16 and not model.training
    # torchvision's ResNet-101 without its fc has 42,500,160 weights; batch norm's are buffers here.
    batch_norm = sum(
        m.weight.numel() + m.bias.numel() for m in model.modules() if isinstance(m, FrozenBatchNorm)
    )
    assert sum(p.numel() for p in model.feature_extractor.parameters()) + batch_norm == 42_500_160
    with torch.no_grad():
        features = model.feature_extractor.backbone(torch.rand(1, 3, 64, 96))
        assert features.shape == (1, 2048, 8, 12)
        logits = model(torch.rand(1, 3, 64, 96))
        assert logits.shape == (1, 16, 8, 12) and logits.isfinite().all()
        # the classifier's centre taps and dilation, at one position, by hand
        weights = [c.weight for c in model.classifier.conv2d_list]
        padded = torch.nn.functional.pad(features, [24] * 4)
        expected = sum(c.bias for c in model.classifier.conv2d_list) + sum(
            w[:, :, i, j] @ padded[0, :, 24 + 3 + (i - 1) * d, 24 + 5 + (j - 1) * d]
            for w, d in zip(weights, DILATIONS)
            for i in range(3)
            for j in range(3)
        )
        assert torch.allclose(model.classifier(features)[0, :, 3, 5], expected, atol=1e-4)


def test_frozen_batch_norm_has_no_epsilon():
    norm = FrozenBatchNorm(1)
    (
        norm.weight.fill_(2),
        norm.bias.fill_(3),
        norm.running_mean.fill_(1),
        norm.running_var.fill_(1e-8),
    )
    assert norm(torch.full((1, 1, 1, 1), 1.5)).item() == pytest.approx(0.5 * 2 / 1e-4 + 3)


@pytest.mark.parametrize("class_num", [19, 16])
def test_labels_from_a_dtst_checkpoint(data, class_num):
    root, arrays = data
    checkpoint = dtst_checkpoint(class_num)
    torch.save(checkpoint, root / "model_iter020000.pth")
    options = command(
        root,
        "--preset",
        "dtst",
        "--test-size",
        "96",
        "64",
        "--class-num",
        str(class_num),
        source=("--checkpoint", "model_iter020000.pth"),
    )
    stage0.main(options)
    # The same by hand for one image: resize, normalise, network, upsample with corners aligned,
    # softmax, argmax.
    name = next(iter(arrays))
    image = Image.open(root / name.replace("pix", "leftImg8bit", 1)).resize(
        (96, 64), Image.Resampling.BILINEAR
    )
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        logits = load_dtst_checkpoint(checkpoint, "x")(x)
        up = torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)
    label = read_label(root / name, class_num)[::4, ::4]
    assert (label != 255).any()
    assert np.array_equal(label[label != 255], up[0].argmax(0).numpy()[::4, ::4][label != 255])
    with pytest.raises(UserError, match=f"predicts {class_num} classes"):
        stage0.main([*options, "--class-num", "11", "--stuff", "0", "--things", "1"])


def test_unfit_dtst_checkpoints():
    with pytest.raises(UserError, match="no conv2d_list.0.weight"):
        load_dtst_checkpoint({"feature_extractor": {}, "classifier": {}}, "x.pth")
    checkpoint = dtst_checkpoint(19)
    del checkpoint["feature_extractor"]["module.backbone.bn1.bias"]
    with pytest.raises(UserError, match="bn1.bias"):
        load_dtst_checkpoint(checkpoint, "x.pth")


# ------------------------------------------------------------------------------ our own checkpoints


def test_labels_from_our_checkpoint(data):
    root, arrays = data
    torch.manual_seed(0)
    model = DeepLabV3Plus(18, K)
    torch.save({"model": model.state_dict(), "config": model.config}, root / "latest.pth")
    stage0.main(command(root, source=("--checkpoint", "latest.pth")))
    summary = json.loads((root / "pix/summary.json").read_text())
    assert summary["images"] == 5 and 0.4 < summary["coverage"] < 0.6
    for name in arrays:
        read_label(root / name, K)
