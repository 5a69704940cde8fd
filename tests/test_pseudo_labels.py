"""Stage 0: both rules against slow, obvious ones, every source, what must not be mixed or
overwritten, and being stopped at any moment."""

import json
import os
import re
import shutil
import sys
import time
from itertools import count
from types import SimpleNamespace as Space

import numpy as np
import pytest
import torch
from conformance import original_checkpoint, read_arrays
from conftest import ROOT
from PIL import Image
from processes import beside_a_second

import eval as evaluation
from model.deeplabv3plus import DeepLabV3Plus
from model.network import DTST_SIZE, network_in
from scripts import make_pseudo_labels as stage0
from util.labels import class_set, read_label
from util.run import STARTED, UserError

K, SIZE = 19, (24, 40)  # classes; height and width of the images
IMAGE = "leftImg8bit/train/a/im{}_leftImg8bit.png"


def softmax(logits):
    exponential = np.exp(logits - logits.max(axis=0))
    return exponential / exponential.sum(axis=0)


def make_root(root, arrays):
    """Random images, a list of them, and their probabilities; arrays: {image: K x H x W}."""
    random = np.random.default_rng(0)
    for name, array in arrays.items():
        for path in (root / name, root / "probabilities" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 255, (*array.shape[1:], 3), dtype=np.uint8)
        Image.fromarray(image).save(root / name)
        np.save(root / "probabilities" / f"{name}.npy", array)
    (root / "list.txt").write_text("\n".join(arrays) + "\n")


@pytest.fixture
def data(tmp_path):
    """A root with five images, a list, and probability arrays (float32 and float16); the root and
    {label: array}.
    """
    random, arrays = np.random.default_rng(0), {}
    for index in range(5):
        array = softmax(random.normal(0, 3, (K, *SIZE)))
        array = array.astype(np.float16 if index == 1 else np.float32)
        array[3] += array[7]  # one class that is never predicted; what it had goes to class 3
        array[7] = 0
        arrays[IMAGE.format(index)] = array
    make_root(tmp_path, arrays)
    labels = [name.replace("leftImg8bit", "pix", 1) for name in arrays]
    return tmp_path, dict(zip(labels, (array.astype(np.float32) for array in arrays.values())))


def array_of(root, index):
    return root / "probabilities" / f"{IMAGE.format(index)}.npy"


def command(root, *extra, source=("--probabilities", "probabilities")):
    words = ["--id-list-path", root / "list.txt", "--root-path", root, "--exp", "pix"]
    words += ["--class-num", K, "--out-list", root / "splits/pix/list.txt", "--device", "cpu"]
    return [*map(str, words), source[0], str(root / source[1]), *extra]


def files(folder):
    """Content of everything that must not depend on how the run went."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }


def oracle(arrays, top_p, top_p_things=None):
    """Labels by the rule as written: gather all confidences of a class, sort them, cut."""
    stack = np.stack(list(arrays.values()))
    prediction, confidence = stack.argmax(axis=1), stack.max(axis=1)
    labels = np.full(prediction.shape, 255, dtype=np.uint8)
    for class_id in np.unique(prediction):
        shown = prediction == class_id
        ranked = np.sort(confidence[shown])
        share = top_p_things if top_p_things and class_id in class_set(K).things else top_p
        threshold = ranked[min(round(len(ranked) * (1 - share)), len(ranked) - 1)]
        labels[shown & (confidence >= threshold)] = class_id
    return dict(zip(arrays, labels))


def check_labels(root, expected, class_num=K):
    for name, label in expected.items():
        assert np.array_equal(read_label(root / name, class_num), label)
        assert Image.open(root / name).mode == "P"


@pytest.mark.parametrize(
    "top_p, things", [(0.5, None), (0.25, None), (1.0, None), (0.001, None), (0.5, 0.2)]
)
def test_equals_sorting_all_pixels(data, top_p, things):
    root, arrays = data
    more = ["--top-p-things", str(things)] if things else []
    stage0.main(command(root, "--top-p", str(top_p), *more))
    check_labels(root, oracle(arrays, top_p, things))
    if (top_p, things) == (0.5, None):
        summary = json.loads((root / "pix/summary.json").read_text())
        classes = summary["classes"].values()
        shares = [c["kept_share"] for c in classes if c["predicted_pixels"] > 50]
        assert shares and all(abs(share - 0.5) < 0.02 for share in shares)
        assert summary["classes"]["traffic sign"]["threshold"] is None
    assert (root / "splits/pix/list.txt").read_text().splitlines() == [
        f"{name.replace('pix', 'leftImg8bit', 1)} {name}" for name in arrays
    ]
    assert not (root / "pix/.confidence").exists()


@pytest.mark.parametrize("top_p", [0.5, 0.1, 0.9, 1.0])
def test_thresholds_with_ties_and_extremes(top_p):
    random = np.random.default_rng(1)
    values = np.float32([0, 1e-30, 0.25, 0.5, 0.5000001, 0.99999994, 1])
    images = [
        (random.integers(0, 3, (40, 50)).astype(np.uint8), random.choice(values, (40, 50)))
        for _ in range(3)
    ]
    found = stage0.top_p_thresholds(lambda: iter(images), 4, top_p)
    for class_id in range(3):
        ranked = np.sort(np.concatenate([c[p == class_id] for p, c in images]))
        assert found[class_id] == ranked[min(round(len(ranked) * (1 - top_p)), len(ranked) - 1)]
    assert found[3] == np.inf


def test_dtst_preset_takes_every_fourth_pixel(data):
    root, arrays = data
    stage0.main(command(root, "--preset", "dtst"))
    grids = oracle({name: array[:, ::4, ::4] for name, array in arrays.items()}, 0.5)
    check_labels(root, {name: grid.repeat(4, 0).repeat(4, 1) for name, grid in grids.items()})


RULES = [("--rule", "top-p"), ("--rule", "cbst", "--preset", "dtst")]


def dying(function, fatal):
    """The function, whose call number `fatal` is interrupted."""
    calls = count(1)

    def call(*args, **kwargs):
        if next(calls) == fatal:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[1])
def test_killed_and_started_again_is_the_same(data, monkeypatch, rule):
    """At the third prediction, CBST's third label, the third label map, the summary, the list."""
    root, _ = data
    again = command(root, *rule)
    stage0.main(again)
    whole = files(root / "pix")
    shutil.rmtree(root / "pix")
    deaths = [("write_label", 3), ("write_json", 2), ("write_list", 1)]
    for name, fatal in [("savez", 3), *([("savez", 6)] if rule[1] == "cbst" else []), *deaths]:
        owner = stage0.np if name == "savez" else stage0
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, dying(getattr(owner, name), fatal))
            stage0.main(again)
    stage0.main(again)
    assert files(root / "pix") == whole
    cost = json.loads((root / "pix/run.json").read_text())["cost"]
    assert cost["seconds"] > time.time() - STARTED  # of this process, which was all of the starts
    stage0.main(again)  # once more: nothing to do, nothing changes
    assert files(root / "pix") == whole
    next((root / "pix/train/a").glob("*.png")).unlink()
    stage0.main(again)
    assert files(root / "pix") == whole


def test_two_processes_give_the_same(data, monkeypatch):
    root, _ = data
    again = command(root, *RULES[1])  # whose stages are top-p's and one more
    stage0.main(again)
    whole = files(root / "pix")
    shutil.rmtree(root / "pix")
    module = ("-m", "scripts.make_pseudo_labels")
    beside_a_second(monkeypatch, lambda: stage0.main(again), *module, *again)
    assert files(root / "pix") == whole


def bad_array(*shape, value=1 / K):
    return lambda root: np.save(array_of(root, 0), np.full(shape, value))


@pytest.mark.parametrize(
    "spoil, told",
    [
        (bad_array(3, 4), "K x H x W"),
        (bad_array(K, *SIZE, value=3.0), "not probabilities"),
        (bad_array(K, *SIZE[::-1]), "24x40 pixels do not show the same as the 40x24"),
        (lambda root: array_of(root, 0).write_bytes(b"\x93NUMPY"), "not readable"),
        (lambda root: os.truncate(array_of(root, 0), 2000), "not readable"),
        (lambda root: np.savez(array_of(root, 0).open("wb"), p=0), "not readable"),
        (
            lambda root: array_of(root, 0).unlink(),
            "a/im0_leftImg8bit.png.npy: not readable as an array",
        ),
        (lambda root: (root / IMAGE.format(0)).unlink(), "no such file"),
        (lambda root: (root / IMAGE.format(1)).write_bytes(b"x"), "im1_leftImg8bit.png: the image"),
        (lambda root: (root / "list.txt").write_text("a/x.png\na/x.png\n"), "in line 1 already"),
        (
            lambda root: (root / "list.txt").write_text("x.png\n"),
            "image path x.png: give the folder above the images' as --root-path",
        ),
    ],
)
def test_bad_input_is_one_clear_line(data, spoil, told):
    root, _ = data
    spoil(root)
    with pytest.raises(UserError, match=told):
        stage0.main(command(root))
    assert not (root / "pix/summary.json").exists() and not (root / "splits/pix/list.txt").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        (("--top-p", "0"), "--top-p 0"),
        (("--rule", "cbst", "--top-p-things", "0.3"), "--top-p-things 0.3: belongs to"),
        (("--policy", "global"), "--policy global: belongs to --rule cbst"),
        (("--multi-scale",), "--multi-scale: is for --checkpoint"),
        (("--test-size", "64", "16"), "--test-size 16"),
        (("--exp", "a/b"), "--exp a/b"),
        (("--exp", "leftImg8bit"), "--exp leftImg8bit: give a plain"),
        (("--out-list", "list.txt"), "is the list that is read"),
    ],
)
def test_bad_options_are_one_clear_line(data, options, told, monkeypatch):
    root, _ = data
    monkeypatch.chdir(root)
    before = files(root)
    with pytest.raises(UserError, match=told):
        stage0.main(command(root, *options))
    assert files(root) == before


# ----------------------------------------------------------------------- nothing mixed, overwritten


def test_nothing_is_mixed_or_overwritten(data, monkeypatch):
    """Settings, inputs and unknown content of the folder (its rules: tests/test_outputs.py)."""
    root, _ = data
    again = command(root)
    mine = root / "pix/train/a/im0_leftImg8bit.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match="pix: is not empty, but has no settings.json"):
        stage0.main(again)
    assert mine.read_bytes() == b"precious" and list(mine.parent.iterdir()) == [mine]
    mine.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage0, "top_p_thresholds", dying(stage0.top_p_thresholds, 1))
        stage0.main(again)
    before = files(root / "pix")
    for other in (("--top-p", "0.3"), ("--rule", "cbst")):
        name = other[0][2:].replace("-", "_")
        with pytest.raises(UserError, match=f"{name} = .*, now it is {other[1]}"):
            stage0.main([*again, *other])
    bad_array(K, *SIZE)(root)
    with pytest.raises(UserError, match="im0_leftImg8bit.png.npy: has changed since the results"):
        stage0.main(again)
    assert files(root / "pix") == before


def test_labels_of_our_checkpoint(data):
    root, arrays = data
    torch.manual_seed(0)
    model = DeepLabV3Plus(18, K)
    torch.save({"model": model.state_dict(), "config": model.config}, root / "latest.pth")
    options = command(root, source=("--checkpoint", "latest.pth"))
    stage0.main(options)
    summary = json.loads((root / "pix/summary.json").read_text())
    assert summary["images"] == 5 and 0.4 < summary["coverage"] < 0.6
    for name in arrays:
        read_label(root / name, K)
    Image.new("RGB", SIZE[::-1]).save(root / IMAGE.format(0))
    with pytest.raises(UserError, match="im0_leftImg8bit.png: has changed since"):
        stage0.main(options)


def test_a_failed_first_run_does_not_block_the_corrected_command(data):
    root, arrays = data
    with pytest.raises(UserError, match="K = 16 classes"):
        stage0.main(command(root, "--class-num", "16"))
    np.save(array_of(root, 0), np.full((K, *SIZE), 0.9))  # found after the settings are written
    with pytest.raises(UserError, match="not probabilities"):
        stage0.main(command(root, "--top-p", "0.3"))
    assert (root / "pix/settings.json").exists()
    np.save(array_of(root, 0), next(iter(arrays.values())))
    stage0.main(command(root))
    check_labels(root, oracle(arrays, 0.5))


# --------------------------------------------------------------------------------------------- CBST


@pytest.mark.parametrize("case", ["plain", "ties", "rare"])
@pytest.mark.parametrize("policy", ["cb", "global"])
@pytest.mark.parametrize("portion", [0.15, 0.2, 0.5, 1.0])
def test_cbst_equals_the_released_code(case, policy, portion):
    """tests/data/cbst_cases.npz: labels and thresholds by CBST's own lines. Of portion 1, which
    they lack, the list's 0.0 is the threshold, which becomes 1.
    """
    cases = read_arrays("cbst_cases")
    images = cases[f"{case}_probabilities"]
    thresholds = stage0.cbst_thresholds(
        lambda: map(stage0.prediction_and_confidence, images), images.shape[1], portion, policy
    )
    if portion == 1:
        assert thresholds.tolist() == [1] * images.shape[1]
        return
    name = f"{case}_{policy}_{portion}"
    wanted = cases[f"{name}_thresholds"]
    assert np.array_equal(thresholds, np.where(wanted == 0, 1, wanted).astype(np.float32))
    labels = np.stack([stage0.cbst_label(image, thresholds) for image in images])
    assert np.array_equal(labels, cases[f"{name}_labels"])


@pytest.mark.parametrize("policy, told", [("cb", ()), ("global", ("--policy", "global"))])
def test_cbst_from_arrays_equals_the_released_code(tmp_path, policy, told):
    """The same through files, both passes and the command."""
    cases = read_arrays("cbst_cases")
    arrays = enumerate(cases["rare_probabilities"])
    make_root(tmp_path, {f"images/{index}.png": array for index, array in arrays})
    classes = ("--class-num", "6", "--stuff", "0", "1", "--things", "2", "3", "4", "5")
    stage0.main(command(tmp_path, *classes, "--rule", "cbst", "--top-p", "0.2", *told))
    wanted = cases[f"rare_{policy}_0.2_labels"]
    check_labels(tmp_path, {f"pix/{index}.png": label for index, label in enumerate(wanted)}, 6)
    summary = json.loads((tmp_path / "pix/summary.json").read_text())
    kept = [part["kept_pixels"] for part in summary["classes"].values()]
    assert kept == np.bincount(wanted.ravel(), minlength=256)[:6].tolist()
    assert not (tmp_path / "pix/.confidence").exists()


# ----------------------------------------------------------------------------------- mmsegmentation


class Segmentor(torch.nn.Conv2d):
    """Stands in for a network of mmsegmentation, of 0.x with its configuration."""

    load_from_file = None  # the recipe replaces it
    cfg = Space(data=Space(test=Space(pipeline=[load_from_file, lambda data: data])))

    def __init__(self):
        super().__init__(3, K, 3, padding=1)

    def inference(self, img, metas, rescale):
        return self(img).softmax(dim=1)


def picture(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


def init_model(config, checkpoint, device):
    model = Segmentor()
    state = torch.load(checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model


def collate(samples, samples_per_gpu):
    [sample] = samples
    return {"img": [sample["img"][None]], "img_metas": [Space(data=[[]])]}


OF_0 = {
    "mmseg": {"__version__": "0.16.0"},
    "mmseg.apis": {"init_segmentor": lambda config, checkpoint, device: Segmentor()},
    "mmseg.apis.inference": {"LoadImage": lambda: lambda data: {"img": picture(data["img"])}},
    "mmseg.datasets": {},
    "mmseg.datasets.pipelines": {"Compose": lambda steps: lambda data: steps[1](steps[0](data))},
    "mmcv": {},
    "mmcv.parallel": {"collate": collate},
}
OF_1 = {
    "mmseg": {"__version__": "1.2.2"},
    "mmseg.apis": {
        "init_model": init_model,
        "inference_model": lambda model, path: Space(
            seg_logits=Space(data=model(picture(path)[None])[0])
        ),
    },
}


@pytest.mark.parametrize("modules", [OF_0, OF_1], ids=["0.x", "1.x"])
def test_the_recipe_for_mmsegmentation(data, modules, monkeypatch):
    """The code of scripts/README.md, with stand-ins for mmcv and mmsegmentation, and what it says
    of arrays of every fourth pixel.
    """
    root, arrays = data
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, Space(**content))
    torch.manual_seed(0)
    network = Segmentor()
    state = {name: value * 4 for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    state = {f"model.{name}": value for name, value in state.items()}
    torch.save({"meta": {}, "state_dict": state}, root / "iter_40000.pth")
    recipe = re.search(r"```python\n(.*?)```", (ROOT / "scripts/README.md").read_text(), re.S)[1]
    assert recipe.count("[:, ::4, ::4]") == 1

    def labels(code, folder, *extra):
        words = ["config.py", "iter_40000.pth", "list.txt", ".", folder, "cpu"]
        with monkeypatch.context() as patch:
            patch.chdir(root)
            patch.setattr(sys, "argv", ["save_probabilities.py", *words])
            exec(compile(code, "scripts/README.md", "exec"), {})
        shutil.rmtree(root / "pix", ignore_errors=True)
        stage0.main(command(root, *extra, source=("--probabilities", folder)))
        return np.stack([read_label(root / name, K) for name in arrays])

    small = labels(recipe, "small")
    array = np.load(root / "small" / f"{IMAGE.format(0)}.npy")
    assert array.dtype == np.float16 and array.shape == (K, SIZE[0] // 4, SIZE[1] // 4)
    preset = labels(recipe, "small", "--preset", "dtst")
    whole = labels(recipe.replace("[:, ::4, ::4]", ""), "whole", "--preset", "dtst")
    assert np.array_equal(small, whole) and np.array_equal(preset, whole)
    assert 0.2 < (small != 255).mean() < 0.8
    with torch.no_grad():
        wanted = network(picture(root / IMAGE.format(0))[None])[0].argmax(0)
    found = np.load(root / "whole" / f"{IMAGE.format(0)}.npy").argmax(0)
    assert (found == wanted.numpy()).mean() > 0.99  # float16


# -------------------------------------------------------------------------------------------- DT-ST


def test_labels_and_evaluation_from_a_dtst_checkpoint(data, monkeypatch, capsys):
    """Its input size and filter come with the format; eval.py sees the same predictions. Trained by
    several processes its weights have a prefix.
    """
    root, arrays = data
    content, _ = original_checkpoint("dtst_16")
    for part in ("feature_extractor", "classifier"):
        content[part] = {f"module.{name}": value for name, value in content[part].items()}
    torch.save(content, root / "model_iter020000.pth")
    monkeypatch.setitem(DTST_SIZE, 16, (96, 64))
    options = command(root, source=("--checkpoint", "model_iter020000.pth"))
    options += ["--class-num", "16", "--top-p", "1"]
    stage0.main(options)
    name = next(iter(arrays))
    image = Image.open(root / IMAGE.format(0)).resize((96, 64), Image.Resampling.BICUBIC)
    network = network_in(content, "x")
    with torch.no_grad():
        raw = network.model.eval()(network.pixels(np.array(image)))
        logits = torch.nn.functional.interpolate(raw, SIZE, mode="bilinear", align_corners=True)
    assert np.array_equal(read_label(root / name, 16), logits[0].argmax(0).numpy())

    evaluate = ["--checkpoint", str(root / "model_iter020000.pth"), "--class-num", "16"]
    evaluate += ["--id-list-path", str(root / "splits/pix/list.txt"), "--root-path", str(root)]
    capsys.readouterr()
    evaluation.main([*evaluate, "--device", "cpu"])
    assert "accuracy 100.00 % of labeled pixels; coverage 100.00 %" in capsys.readouterr().out
    with pytest.raises(UserError, match="a network of DT-ST.*--mode original, not sliding_window"):
        evaluation.main([*evaluate, "--device", "cpu", "--mode", "sliding_window"])
    with pytest.raises(UserError, match="predicts 16 classes"):
        stage0.main([*options, "--class-num", "11", "--stuff", "0", "--things", "1"])
