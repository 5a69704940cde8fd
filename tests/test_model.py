"""The networks: sizes, shapes, outputs equal to the original code's, weights from files, feature
perturbation."""

import os
import zipfile
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conformance import (
    formula_image,
    formula_tensor,
    hashed,
    original_checkpoint,
    read_arrays,
    read_keys,
)

from model import network
from model.deeplabv3plus import DeepLabV3Plus
from model.network import load_network, square_windows
from model.resnet import ResNet, load_backbone, read_checkpoint
from model.training import perturbation_factors
from util.run import UserError

# What every original code does with logits.
enlarged = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("class_num, parameters", [(19, 59_467_571), (16, 59_466_800)])
def test_parameter_count_is_that_of_the_shipped_logs(class_num, parameters):
    with torch.device("meta"):
        model = DeepLabV3Plus(101, class_num)
    parts = (model, model.backbone, model.head, model.reduce, model.fuse)
    expected = [parameters, 42_623_936, 15_535_104, 12_384, 1_291_264]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == expected


def test_shapes_at_the_authors_crop():
    with torch.device("meta"):
        model = DeepLabV3Plus(101, 19)
        images = torch.empty(4, 3, 769, 769)
        features = model.backbone(images)
        factors = torch.empty(4, 256, 1, 1), torch.empty(4, 2048, 1, 1)
        logits, perturbed = model(images, factors, fp_from=2)
    sizes = (256, 193), (512, 97), (1024, 49), (2048, 49)
    assert [tuple(f.shape[1:]) for f in features] == [(c, side, side) for c, side in sizes]
    assert logits.shape == (4, 19, 769, 769) and perturbed.shape == (2, 19, 769, 769)


@pytest.mark.parametrize("depth, width", [(10, 64), (18, 64), (50, 256), (101, 256)])
@pytest.mark.parametrize("stem", ["deep", "torchvision"])
def test_every_backbone_gives_logits_at_the_images_size(depth, width, stem):
    with torch.device("meta"):
        model = DeepLabV3Plus(depth, 5, stem)
        assert model(torch.empty(2, 3, 70, 101)).shape == (2, 5, 70, 101)
        c1, _, c3, c4 = model.backbone(torch.empty(2, 3, 96, 160))
        backbone = ResNet(depth, stem, dilate_last=False)
        activations = backbone.forward_stem(torch.empty(2, 3, 96, 160))
        plain = backbone.forward_from_stem(activations)
    assert model.classifier.in_channels == width
    assert c1.shape[-2:] == (24, 40) and c3.shape[-2:] == c4.shape[-2:] == (6, 10)
    assert activations.shape == (2, backbone.bn1.num_features, 48, 80)
    assert plain[3].shape[-2:] == (3, 5)
    assert tuple(f.shape[1] for f in plain) == model.backbone.channels


def test_torchvision_stem_computes_what_torchvision_does(tmp_path):
    """Dilated as well: torchvision builds that for ResNet-50."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    ours = ResNet(50, "torchvision")
    load_backbone(ours, tmp_path / "resnet50.pth")
    x = torch.randn(2, 3, 64, 96)
    # batch norm in training mode, so that deviations do not vanish in running statistics
    expected = x
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        expected = getattr(reference, name)(expected)
    torch.testing.assert_close(ours(x)[3], expected)


def test_dilated_layer4_of_resnet18():
    blocks = ResNet(18).layer4
    assert [(b.conv1.stride, b.conv1.dilation, b.conv2.dilation) for b in blocks] == [
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (2, 2)),
    ]


# ----------------------------------------------------------------------- equal to the original code


def test_the_fixtures_formula():
    """The values that came with the fixtures."""
    for key, shape, start in (
        ("layer1.0.conv1.weight", (64, 64, 1, 1), (-0.14859256, 0.05390207, 0.04100208)),
        ("module.layer1.0.bn3.weight", (256,), (0.30921534, 0.28289634)),
        ("layer1.0.bn1.running_var", (64,), (0.72659075, 0.57824755)),
        ("layer5.head.1.weight", (19, 256, 1, 1), (-0.14119178, -0.08146630)),
    ):
        value = formula_tensor(key, shape)
        found = value.flatten()[: len(start)].tolist()
        assert value.shape == shape and found == pytest.approx(start, abs=5e-9)
    assert hashed("image", 3).tolist() == [113825699, 2033281112, 3082829439]
    for size, crc in (((64, 96), 3510499283), ((1024, 2048), 1413914461)):
        assert zlib.crc32(formula_image(*size).tobytes()) == crc


# {name: format, its input size, whether the input is RGB / 255 alone}
ORIGINALS = {
    "dtst_19": ("DT-ST", (1536, 768), False),
    "dtst_16": ("DT-ST", (1280, 640), False),
    "cma_deeplabv2": ("CMA", None, False),
    "proda_stage3": ("ProDA", (2048, 1024), True),
    "proda_warmup": ("ProDA", (2048, 1024), True),
    "shade_r50": ("SHADE", None, False),
    "shade_r101": ("SHADE", None, False),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs_equal_the_original_codes(name, monkeypatch):
    """tests/data/logits_*: the authors' own networks with the same weights and image."""
    content, class_num = original_checkpoint(name)
    monkeypatch.setattr(network, "read_checkpoint", lambda path: content)
    found = load_network("x.pth", torch.device("cpu"), class_num)
    assert (found.format, found.test_size, found.scaled_only) == ORIGINALS[name]
    assert not any(module.training for module in found.model.modules())

    expected, image, raw = read_arrays(f"logits_{name}"), formula_image(64, 96), []
    hook = found.model.register_forward_hook(lambda module, inputs, output: raw.append(output[0]))

    def same(mine, key):  # but for the last bits of sums, which versions of torch order differently
        wanted = expected.pop(key)
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())

    found = replace(found, test_size=found.test_size and (96, 64))
    with torch.no_grad():
        found.model(found.pixels(image))
        hook.remove()
        logits = found.logits(image)[0]
        if name.startswith("shade"):
            same(logits[:, ::4, ::4], "logits_every_4th")
        else:
            same(raw[0], "logits")
        if name.startswith("cma"):
            for height, width in ((96, 128), (108, 192)):
                logits = found.logits(formula_image(height, width))[0]
                same(logits[:, ::8, ::8], f"slide_{height}x{width}_every_8th")
            mean = found.multi_scale(formula_image(108, 192))[0]
            same(mean[:, ::8, ::8], "ensemble_108x192_every_8th")
        if name.startswith("proda"):
            same(logits[:, ::8, ::8], "upsampled_every_8th")
            mirrored = torch.from_numpy(image[:, ::-1].copy()).permute(2, 0, 1)[None] / 255
            both = torch.stack([raw[0], found.model(mirrored)[0].flip(-1)]).softmax(dim=1)
            # ProDA mirrors after enlarging, which is the same with the corners aligned.
            large = enlarged(both, (64, 96))
            same(large.mean(dim=0)[:, ::8, ::8], "flip_probabilities_every_8th")
    assert not expected


def test_square_windows():
    """Along the longer side, ACDC's as CMA has them; no pixel between windows is left out."""
    starts = [left for _, _, left, _ in square_windows(1080, 1920)]
    assert starts == [0, 420, 840] and square_windows(50, 50) == [(0, 50, 0, 50)]
    assert square_windows(70, 50) == [(0, 50, 0, 50), (20, 70, 0, 50)]
    assert [left for _, _, left, _ in square_windows(10, 43)] == [0, 10, 20, 30, 33]


@pytest.mark.parametrize("depth", [50, 101])
def test_weights_are_named_as_in_unimatch(depth):
    with torch.device("meta"):
        state = DeepLabV3Plus(depth, 19).state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == read_keys(f"unimatch_r{depth}")


# ------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return DeepLabV3Plus(18, 5).eval()


@pytest.mark.parametrize("form", ["ours", "unimatch", "bare", "compiled", "twice", "mmseg"])
def test_checkpoints_load_with_and_without_prefixes(small_model, tmp_path, form):
    state = small_model.state_dict()
    content = {
        "ours": {"model": state, "config": small_model.config, "epoch": 3},
        "unimatch": {
            "model": {f"module.{k}": v for k, v in state.items()},
            "optimizer": {},
            "epoch": 1,
            "previous_best": np.float64(61.5),
        },
        "bare": state,
        "compiled": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "twice": {"model": {f"_orig_mod.module.module.{k}": v for k, v in state.items()}},
        "mmseg": {"state_dict": state, "meta": {"epoch": 1}},
    }[form]
    torch.save(content, tmp_path / "c.pth")
    model = load_network(tmp_path / "c.pth", torch.device("cpu"), 5).model
    assert model.config == small_model.config and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    backbone = ResNet(18)
    load_backbone(backbone, tmp_path / "c.pth")  # the part `backbone.` of a whole checkpoint
    assert torch.equal(backbone.layer4[1].conv2.weight, small_model.backbone.layer4[1].conv2.weight)


@pytest.mark.parametrize("maker", ["core", "_core"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_numpy_number_beside_the_weights_loads(tmp_path, maker, zipped):
    """As UniMatch, ProDA and SHADE save it, with numpy 1 (`numpy.core`) and numpy 2
    (`numpy._core`).
    """
    path = tmp_path / "c.pth"
    content = {"best": np.float64(61.53), "epoch": np.int64(7), "state_dict": {"a": torch.ones(2)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    here, there = np.float64(0).__reduce__()[0].__module__, f"numpy.{maker}.multiarray"

    def renamed(pickled):
        assert f"c{here}\n".encode() in pickled
        return pickled.replace(f"c{here}\n".encode(), f"c{there}\n".encode())

    if zipped:
        with zipfile.ZipFile(path) as file:
            parts = {part: file.read(part) for part in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for part, data in parts.items():
                file.writestr(part, renamed(data) if part.endswith("data.pkl") else data)
    else:
        path.write_bytes(renamed(path.read_bytes()))
    found = read_checkpoint(path)
    assert found["best"] == 61.53 and found["epoch"] == 7
    assert torch.equal(found["state_dict"]["a"], torch.ones(2))


class Harmful:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function", [os.mkdir, exec, np.load, np.memmap, torch.load], ids=lambda f: f.__name__
)
def test_a_file_that_runs_something_is_refused(tmp_path, function, zipped):
    harm = tmp_path / "harm"
    argument = f"import os; os.mkdir({str(harm)!r})" if function is exec else str(harm)
    content = {"model": {"a": torch.ones(2)}, "previous_best": Harmful(function, argument)}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="c.pth: not a checkpoint of tensors") as error:
        read_checkpoint(tmp_path / "c.pth")
    assert not harm.exists() and "\n" not in str(error.value)


def said(action, *arguments) -> str:
    """The one line of the UserError."""
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_files_are_refused_in_one_line(small_model, tmp_path):
    state, contents = small_model.state_dict(), {}
    contents["torchvision"] = torchvision.models.resnet18().state_dict()
    contents["wrong"] = {"model": state | {"classifier.bias": torch.zeros(7)}}
    contents["empty"] = {"epoch": 3}
    contents["five"] = {"model": state}
    contents["dtst"] = {"feature_extractor": {"a": torch.zeros(1)}, "classifier": {}}
    for name in ("proda_warmup", "shade_r50"):
        weights = {key: torch.zeros(()).expand(shape) for key, shape in read_keys(name).items()}
        del weights[next(key for key in weights if key.endswith("layer1.0.conv2.weight"))]
        contents[name] = {"state_dict": weights}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name, class_num, message in (
        ("torchvision", 5, "torchvision.pth: not a network of"),
        ("wrong", 5, "classifier.bias: copying a param with shape torch.Size([7])"),
        ("text", 5, "not a checkpoint"),
        ("empty", 5, "no table of weights"),
        ("dtst", 5, "not a network of"),
        ("five", 19, "predicts 5 classes, but --class-num is 19"),
        ("proda_warmup", 19, "1 differ, first: missing weight"),
        ("shade_r50", 19, "1 differ, first: missing weight"),
        ("absent", 5, "no such checkpoint"),
    ):
        assert message in said(load_network, tmp_path / f"{name}.pth", "cpu", class_num)
    path = tmp_path / "torchvision.pth"
    assert "--stem torchvision" in said(load_backbone, ResNet(18), path)
    assert "ResNet-50" in said(load_backbone, ResNet(50, "torchvision"), path)
    assert "--stem torchvision" in said(load_backbone, ResNet(18), "imagenet")


# ----------------------------------------------------------------------------- feature perturbation


def test_perturbed_logits_are_those_of_perturbed_features(small_model):
    images = torch.randn(3, 3, 64, 64)
    factors = [factor[0] for factor in perturbation_factors(1, 0, 3, (64, 512))]
    with torch.no_grad():
        clean, perturbed = small_model(images, factors, fp_from=1)
        c1, _, _, c4 = small_model.backbone(images)
        features = small_model.decode(c1 * factors[0], c4 * factors[1])
        expected = enlarged(small_model.classifier(features), (64, 64))
        torch.testing.assert_close(clean, small_model(images))
    torch.testing.assert_close(perturbed, expected[1:])
    assert (perturbed - clean[1:]).abs().max() > 1e-3
