"""Stage 0: both rules against slow, obvious ones, every source, what must not be mixed or
overwritten, and being stopped at any moment."""

import json
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conformance import read_arrays
from conftest import ROOT
from PIL import Image
from processes import beside_a_second

import eval as evaluation
from model.deeplabv2 import DeepLabV2
from model.deeplabv3plus import DeepLabV3Plus
from model.network import DTST_SIZE, network_in
from scripts import make_pseudo_labels as stage0
from util.labels import class_set, read_label
from util.outputs import Outputs
from util.run import STARTED, UserError

K, SIZE = 19, (24, 40)  # classes; height and width of the images
IMAGE = "leftImg8bit/train/a/im{}_leftImg8bit.png"


def softmax(logits):
    exponential = np.exp(logits - logits.max(axis=0))
    return exponential / exponential.sum(axis=0)


@pytest.fixture
def data(tmp_path):
    """A root with five images, a list, and probability arrays (float32 and float16)."""
    random = np.random.default_rng(0)
    rows, arrays = [], {}
    for index in range(5):
        name = IMAGE.format(index)
        image = random.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        array = softmax(random.normal(0, 3, (K, *SIZE)))
        array = array.astype(np.float16 if index == 1 else np.float32)
        array[3] += array[7]  # one class that is never predicted; what it had goes to class 3
        array[7] = 0
        for folder in (tmp_path, tmp_path / "probabilities"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
        np.save(array_of(tmp_path, index), array)
        rows.append(name)
        arrays[name.replace("leftImg8bit", "pix", 1)] = array.astype(np.float32)
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    return tmp_path, arrays


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
    things = class_set(K).things
    prediction = {name: array.argmax(axis=0) for name, array in arrays.items()}
    confidence = {name: array.max(axis=0) for name, array in arrays.items()}
    labels = {name: np.full(array.shape[1:], 255, dtype=np.uint8) for name, array in arrays.items()}
    for class_id in range(K):
        shown = {name: classes == class_id for name, classes in prediction.items()}
        ranked = sorted(v for name in arrays for v in confidence[name][shown[name]])
        if not ranked:
            continue
        share = top_p_things if top_p_things and class_id in things else top_p
        threshold = ranked[min(round(len(ranked) * (1 - share)), len(ranked) - 1)]
        for name, label in labels.items():
            label[shown[name] & (confidence[name] >= threshold)] = class_id
    return labels


def check_labels(root, expected, class_num=K):
    for name, label in expected.items():
        assert np.array_equal(read_label(root / name, class_num), label)
        assert Image.open(root / name).mode == "P"


@pytest.mark.parametrize("top_p", [0.5, 0.25, 1.0, 0.001])
def test_equals_sorting_all_pixels(data, top_p):
    root, arrays = data
    stage0.main(command(root, "--top-p", str(top_p)))
    check_labels(root, oracle(arrays, top_p))
    if top_p == 0.5:
        summary = json.loads((root / "pix/summary.json").read_text())
        classes = summary["classes"].values()
        shares = [c["kept_share"] for c in classes if c["predicted_pixels"] > 50]
        assert shares and all(abs(share - 0.5) < 0.02 for share in shares)
        assert summary["classes"]["traffic sign"]["threshold"] is None
    assert (root / "splits/pix/list.txt").read_text().splitlines() == [
        f"{name.replace('pix', 'leftImg8bit', 1)} {name}" for name in arrays
    ]
    assert not (root / "pix/.confidence").exists()


def test_things_may_have_a_share_of_their_own(data):
    root, arrays = data
    stage0.main(command(root, "--top-p-things", "0.2"))
    expected, usual = oracle(arrays, 0.5, 0.2), oracle(arrays, 0.5)
    check_labels(root, expected)
    assert any((usual[name] != label).any() for name, label in expected.items())
    with pytest.raises(UserError, match="top_p_things = 0.2, now it is None"):
        stage0.main(command(root))


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


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[1])
def test_killed_and_started_again_is_the_same(data, monkeypatch, rule):
    root, _ = data
    again = command(root, *rule)
    stage0.main(again)
    whole = files(root / "pix")
    shutil.rmtree(root / "pix")
    # the name of what dies and at which call: the third confidence, CBST's third label (after three
    # confidences), the third label map, the summary, the list
    for name, fatal_call in (
        ("savez", 3),
        *([("savez", 6)] if rule[1] == "cbst" else []),
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
            "image path x.png: it must lie in a folder",
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
        (("--top-p", "nan"), "--top-p nan"),
        (("--top-p-things", "0"), "--top-p-things 0"),
        (("--rule", "cbst", "--top-p-things", "0.3"), "--top-p-things 0.3: belongs to"),
        (("--vis", "-1"), "--vis -1"),
        (("--policy", "global"), "--policy global: belongs to --rule cbst"),
        (("--multi-scale",), "--multi-scale: is for --checkpoint"),
        (("--test-size", "64", "16"), "--test-size 64 16"),
        (("--device", "banana"), "--device banana"),
        (("--exp", "a/b"), "--exp a/b"),
        (("--exp", "leftImg8bit"), "a folder other than --exp leftImg8bit"),
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


def test_other_settings_are_refused(data):
    root, _ = data
    stage0.main(command(root))
    with pytest.raises(UserError, match="top_p = 0.5, now it is 0.3"):
        stage0.main(command(root, "--top-p", "0.3"))
    with pytest.raises(UserError, match="rule = top-p, now it is cbst"):
        stage0.main(command(root, "--rule", "cbst"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_replaced_arrays_are_noticed(data, monkeypatch, interrupted):
    """After a whole run, and after one that was stopped while it ran the model."""
    root, _ = data

    def stop(*_):
        raise KeyboardInterrupt

    if interrupted:
        monkeypatch.setattr(stage0, "top_p_thresholds", stop)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        stage0.main(command(root))
    before = files(root / "pix")
    bad_array(K, *SIZE)(root)
    told = "im0_leftImg8bit.png.npy: has changed since the results in .*pix were made"
    with pytest.raises(UserError, match=told):
        stage0.main(command(root))
    assert files(root / "pix") == before


def test_labels_of_our_checkpoint_whose_images_are_replaced(data):
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
    stage0.main(options)
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


@pytest.mark.parametrize("name", ["train/a/im0_leftImg8bit.png", "train/a/im0_leftImg8bit.jpg"])
def test_files_of_others_are_not_overwritten_nor_joined(data, name):
    """The second: --exp images, where BDD100K's own images are."""
    root, _ = data
    mine = root / "pix" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match="pix: is not empty, but has no settings.json"):
        stage0.main(command(root))
    assert mine.read_bytes() == b"precious"
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_two_runs_in_one_folder(data):
    root, _ = data
    with Outputs(root / "pix"):
        with pytest.raises(UserError, match="pix: another run"):
            stage0.main(command(root))
    stage0.main(command(root))


# --------------------------------------------------------------------------------------------- CBST


@pytest.mark.parametrize("case", ["plain", "ties", "rare"])
@pytest.mark.parametrize("policy", ["cb", "global"])
@pytest.mark.parametrize("portion", [0.15, 0.2, 0.5])
def test_cbst_equals_the_released_code(case, policy, portion):
    """tests/data/cbst_cases.npz: labels and thresholds by CBST's own lines."""
    cases = read_arrays("cbst_cases")
    images = cases[f"{case}_probabilities"]
    thresholds = stage0.cbst_thresholds(
        lambda: map(stage0.prediction_and_confidence, images), images.shape[1], portion, policy
    )
    name = f"{case}_{policy}_{portion}"
    wanted = cases[f"{name}_thresholds"]
    assert np.array_equal(thresholds, np.where(wanted == 0, 1, wanted).astype(np.float32))
    labels = np.stack([stage0.cbst_label(image, thresholds) for image in images])
    assert np.array_equal(labels, cases[f"{name}_labels"])


@pytest.mark.parametrize("policy, told", [("cb", ()), ("global", ("--policy", "global"))])
def test_cbst_from_arrays_equals_the_released_code(tmp_path, policy, told):
    """The same through files, both passes and the command."""
    cases = read_arrays("cbst_cases")
    for index, array in enumerate(cases["rare_probabilities"]):
        image = tmp_path / f"images/{index}.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", array.shape[:0:-1]).save(image)
        (tmp_path / "probabilities/images").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"probabilities/images/{index}.png.npy", array)
    (tmp_path / "list.txt").write_text("".join(f"images/{i}.png\n" for i in range(3)))
    classes = ("--class-num", "6", "--stuff", "0", "1", "--things", "2", "3", "4", "5")
    stage0.main(command(tmp_path, *classes, "--rule", "cbst", "--top-p", "0.2", *told))
    wanted = cases[f"rare_{policy}_0.2_labels"]
    check_labels(tmp_path, {f"pix/{index}.png": label for index, label in enumerate(wanted)}, 6)
    summary = json.loads((tmp_path / "pix/summary.json").read_text())
    kept = [part["kept_pixels"] for part in summary["classes"].values()]
    assert kept == np.bincount(wanted.ravel(), minlength=256)[:6].tolist()
    assert not (tmp_path / "pix/.confidence").exists()


def test_cbst_portion_1_keeps_what_is_certain_only():
    """The list's 0.0 is then the threshold, which becomes 1."""
    images = read_arrays("cbst_cases")["plain_probabilities"]
    for policy in ("cb", "global"):
        found = stage0.cbst_thresholds(
            lambda: map(stage0.prediction_and_confidence, images), 6, 1.0, policy
        )
        assert found.tolist() == [1] * 6


# ----------------------------------------------------------------------------------- mmsegmentation

STUB_0 = {
    "mmseg/__init__.py": "__version__ = '0.16.0'",
    "mmcv/__init__.py": "",
    "mmcv/parallel.py": """
class Container:
    def __init__(self, data):
        self.data = data

def collate(samples, samples_per_gpu):
    sample, = samples
    return {"img": [x[None] for x in sample["img"]],
            "img_metas": [Container([[meta]]) for meta in sample["img_metas"]]}
""",
    "mmseg/apis/__init__.py": """
from types import SimpleNamespace as Space

from stub import Segmentor

def pipeline_tail(data):
    return {"img": [data["img"]], "img_metas": [{"ori_shape": data["img"].shape[1:]}]}

def init_segmentor(config, checkpoint, device):
    assert checkpoint is None
    model = Segmentor().to(device).eval()
    load_from_file = None  # the recipe replaces it
    model.cfg = Space(data=Space(test=Space(pipeline=[load_from_file, pipeline_tail])))
    model.inference = lambda img, metas, rescale: model(img).softmax(dim=1)
    return model
""",
    "mmseg/apis/inference.py": """
from stub import read

class LoadImage:
    def __call__(self, data):
        return {"img": read(data["img"])}
""",
    "mmseg/datasets/__init__.py": "",
    "mmseg/datasets/pipelines.py": """
class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, data):
        for step in self.steps:
            data = step(data)
        return data
""",
}
STUB_1 = {
    "mmseg/__init__.py": "__version__ = '1.2.2'",
    "mmseg/apis/__init__.py": """
from types import SimpleNamespace as Space

import torch
from stub import Segmentor, read

def init_model(config, checkpoint, device):
    model = Segmentor().to(device).eval()
    state = torch.load(checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model

def inference_model(model, path):
    return Space(seg_logits=Space(data=model(read(path)[None])[0]))
""",
}
STUB_MODEL = """
import numpy as np
import torch
from PIL import Image

class Segmentor(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 19, 3, padding=1)

def read(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
"""


@pytest.mark.parametrize("stub", [STUB_0, STUB_1], ids=["0.x", "1.x"])
def test_the_recipe_for_mmsegmentation(data, stub, monkeypatch):
    """The code of scripts/README.md, with stand-ins for mmcv and mmsegmentation, and what it says
    of arrays of every fourth pixel.
    """
    root, arrays = data
    for name, code in {**stub, "stub.py": STUB_MODEL}.items():
        path = root / "environment" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, K, 3, padding=1)
    state = {f"model.{name}": value * 4 for name, value in network.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, root / "iter_40000.pth")
    recipe = re.search(r"```python\n(.*?)```", (ROOT / "scripts/README.md").read_text(), re.S)[1]
    assert recipe.count("[:, ::4, ::4]") == 1

    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root / "environment")
    arguments = ["save_probabilities.py", "config.py", "iter_40000.pth", "list.txt", "."]

    def labels(code, folder, *extra):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*arguments, folder, "cpu"])
            exec(compile(code, "scripts/README.md", "exec"), {})
        for name in list(sys.modules):
            if name.split(".")[0] in ("mmseg", "mmcv", "stub"):
                del sys.modules[name]
        shutil.rmtree(root / "pix", ignore_errors=True)
        stage0.main(command(root, *extra, source=("--probabilities", folder)))
        return {name: read_label(root / name, K) for name in arrays}

    small = labels(recipe, "small")
    array = np.load(root / "small" / f"{IMAGE.format(0)}.npy")
    assert array.dtype == np.float16 and array.shape == (K, SIZE[0] // 4, SIZE[1] // 4)
    preset = labels(recipe, "small", "--preset", "dtst")
    whole = labels(recipe.replace("[:, ::4, ::4]", ""), "whole", "--preset", "dtst")
    for name in arrays:
        assert np.array_equal(small[name], whole[name])
        assert np.array_equal(preset[name], whole[name])
        assert 0.2 < (small[name] != 255).mean() < 0.8
    image = np.array(Image.open(root / IMAGE.format(0)))
    with torch.no_grad():
        network.load_state_dict({name[6:]: value for name, value in state.items()})
        wanted = network(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0].argmax(0)
    found = np.load(root / "whole" / f"{IMAGE.format(0)}.npy").argmax(0)
    assert (found == wanted.numpy()).mean() > 0.99  # float16


# -------------------------------------------------------------------------------------------- DT-ST


def dtst_checkpoint(class_num):
    """A checkpoint as facts say DT-ST writes it, with random weights that keep activations
    finite.
    """
    torch.manual_seed(0)
    model = DeepLabV2(class_num)
    for name, buffer in model.feature_extractor.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        if name.endswith("bn3.weight"):
            buffer.fill_(0.1)
    checkpoint = {"iteration": 20000, "optimizer_fea": {}}
    for part in ("feature_extractor", "classifier"):
        state = getattr(model, part).state_dict()
        checkpoint[part] = {f"module.{key}": value for key, value in state.items()}
    return checkpoint


def test_frozen_batch_norm_has_no_epsilon():
    norm, values = DeepLabV2(2).feature_extractor.backbone.bn1, (2, 3, 1, 1e-8)
    for name, value in zip(("weight", "bias", "running_mean", "running_var"), values):
        getattr(norm, name).fill_(value)
    assert norm(torch.full((1, 64, 1, 1), 1.5))[0, 0].item() == pytest.approx(0.5 * 2 / 1e-4 + 3)


def test_labels_and_evaluation_from_a_dtst_checkpoint(data, monkeypatch, capsys):
    """Its input size and filter come with the format."""
    root, arrays = data
    checkpoint = dtst_checkpoint(16)
    torch.save(checkpoint, root / "model_iter020000.pth")
    monkeypatch.setitem(DTST_SIZE, 16, (96, 64))
    options = command(root, source=("--checkpoint", "model_iter020000.pth"))
    options += ["--class-num", "16", "--top-p", "1"]
    stage0.main(options)
    # The same by hand for one image: resize, normalise, network, upsample with corners aligned,
    # softmax, argmax.
    name = next(iter(arrays))
    image = Image.open(root / IMAGE.format(0)).resize((96, 64), Image.Resampling.BICUBIC)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - mean) / deviation
    with torch.no_grad():
        logits = network_in(checkpoint, "x").model.eval()(x)
        up = torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)
    assert np.array_equal(read_label(root / name, 16), up[0].argmax(0).numpy())

    # eval.py sees the same predictions.
    evaluate = ["--checkpoint", str(root / "model_iter020000.pth"), "--class-num", "16"]
    evaluate += ["--id-list-path", str(root / "splits/pix/list.txt"), "--root-path", str(root)]
    capsys.readouterr()
    evaluation.main([*evaluate, "--device", "cpu"])
    assert "accuracy 100.00 % of labeled pixels; coverage 100.00 %" in capsys.readouterr().out
    with pytest.raises(UserError, match="a network of DT-ST.*--mode original, not sliding_window"):
        evaluation.main([*evaluate, "--device", "cpu", "--mode", "sliding_window"])
    with pytest.raises(UserError, match="predicts 16 classes"):
        stage0.main([*options, "--class-num", "11", "--stuff", "0", "--things", "1"])


def test_unfit_dtst_checkpoints():
    with pytest.raises(UserError, match="no conv2d_list.0.weight"):
        network_in({"feature_extractor": {}, "classifier": {}}, "x.pth")
    checkpoint = dtst_checkpoint(19)
    del checkpoint["feature_extractor"]["module.backbone.bn1.bias"]
    with pytest.raises(UserError, match="bn1.bias"):
        network_in(checkpoint, "x.pth")
