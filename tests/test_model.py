"""ResNet and DeepLabV3+: sizes, shapes, weights from files, feature perturbation."""

import pytest
import torch
import torchvision

from model.deeplabv3plus import (
    DeepLabV3Plus,
    channel_dropout,
    load_segmentation_model,
    parameter_count,
)
from model.resnet import load_backbone, resnet
from util.run import UserError


@pytest.mark.parametrize("class_num, parameters", [(19, 59_467_571), (16, 59_466_800)])
def test_parameter_count_is_that_of_the_shipped_logs(class_num, parameters):
    with torch.device("meta"):
        model = DeepLabV3Plus(101, class_num)
    assert parameter_count(model) == parameters
    assert parameter_count(model.backbone) == 42_623_936
    assert parameter_count(model.head) == 15_535_104
    assert parameter_count(model.reduce) == 12_384
    assert parameter_count(model.fuse) == 1_291_264


def test_shapes_at_the_authors_crop():
    with torch.device("meta"):
        model = DeepLabV3Plus(101, 19)
        images = torch.empty(4, 3, 769, 769)
        features = model.backbone(images)
        logits, perturbed = model(
            images, (torch.empty(4, 256, 1, 1), torch.empty(4, 2048, 1, 1)), fp_from=2
        )
    assert [tuple(f.shape[1:]) for f in features] == [
        (256, 193, 193),
        (512, 97, 97),
        (1024, 49, 49),
        (2048, 49, 49),
    ]
    assert logits.shape == (4, 19, 769, 769) and perturbed.shape == (2, 19, 769, 769)


@pytest.mark.parametrize("depth, width", [(10, 64), (18, 64), (50, 256), (101, 256)])
@pytest.mark.parametrize("stem", ["deep", "torchvision"])
def test_every_backbone_gives_logits_at_the_images_size(depth, width, stem):
    with torch.device("meta"):
        model = DeepLabV3Plus(depth, 5, stem)
        assert model(torch.empty(2, 3, 70, 101)).shape == (2, 5, 70, 101)
        c1, _, c3, c4 = model.backbone(torch.empty(2, 3, 96, 160))
        plain = resnet(depth, stem, dilate_last=False)(torch.empty(2, 3, 96, 160))
    assert model.classifier.in_channels == width
    assert c1.shape[-2:] == (24, 40) and c3.shape[-2:] == c4.shape[-2:] == (6, 10)
    assert plain[3].shape[-2:] == (3, 5)
    assert tuple(f.shape[1] for f in plain) == model.backbone.channels


def test_torchvision_stem_computes_what_torchvision_does(tmp_path):
    """Dilated as well: torchvision builds that for ResNet-50."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    ours = resnet(50, "torchvision")
    load_backbone(ours, tmp_path / "resnet50.pth")
    x = torch.randn(2, 3, 64, 96)
    # batch norm in training mode, so that deviations do not vanish in running statistics
    expected = x
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        expected = getattr(reference, name)(expected)
    torch.testing.assert_close(ours(x)[3], expected)


def test_stem_and_rest_are_the_whole():
    model = resnet(18).eval()
    x = torch.randn(1, 3, 64, 64)
    stem = model.forward_stem(x)
    assert stem.shape == (1, 128, 32, 32)
    for one, other in zip(model.forward_from_stem(stem), model(x)):
        assert torch.equal(one, other)


def test_dilated_layer4_of_resnet18():
    blocks = resnet(18).layer4
    assert [(b.conv1.stride, b.conv1.dilation, b.conv2.dilation) for b in blocks] == [
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (2, 2)),
    ]


# ------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return DeepLabV3Plus(18, 5).eval()


@pytest.mark.parametrize("form", ["ours", "unimatch", "bare", "compiled"])
def test_checkpoints_load_with_and_without_prefixes(small_model, tmp_path, form):
    state = small_model.state_dict()
    content = {
        "ours": {"model": state, "config": small_model.config, "epoch": 3},
        "unimatch": {
            "model": {f"module.{k}": v for k, v in state.items()},
            "optimizer": {},
            "epoch": 1,
            "previous_best": 1.0,
        },
        "bare": state,
        "compiled": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    }[form]
    torch.save(content, tmp_path / "c.pth")
    model, config = load_segmentation_model(tmp_path / "c.pth", torch.device("cpu"))
    assert config == small_model.config and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    backbone = resnet(18)
    load_backbone(backbone, tmp_path / "c.pth")  # the part `backbone.` of a whole checkpoint
    assert torch.equal(backbone.layer4[1].conv2.weight, small_model.backbone.layer4[1].conv2.weight)


def test_other_files_are_refused_in_one_line(small_model, tmp_path):
    def message(action):
        with pytest.raises(UserError) as error:
            action()
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "tv.pth")
    assert "--stem torchvision" in message(lambda: load_backbone(resnet(18), tmp_path / "tv.pth"))
    assert "ResNet-50" in message(
        lambda: load_backbone(resnet(50, "torchvision"), tmp_path / "tv.pth")
    )
    assert "tv.pth: not a DeepLabV3+" in message(
        lambda: load_segmentation_model(tmp_path / "tv.pth", "cpu")
    )
    state = dict(small_model.state_dict())
    state["classifier.weight"] = torch.zeros(7, 64, 1, 1)
    torch.save({"model": state, "config": small_model.config}, tmp_path / "wrong.pth")
    assert "classifier.weight: (7, 64, 1, 1) in the file" in message(
        lambda: load_segmentation_model(tmp_path / "wrong.pth", "cpu")
    )
    (tmp_path / "text.pth").write_text("hello")
    assert "not a checkpoint" in message(
        lambda: load_segmentation_model(tmp_path / "text.pth", "cpu")
    )
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert "no table of weights" in message(
        lambda: load_segmentation_model(tmp_path / "empty.pth", "cpu")
    )
    assert "no such checkpoint" in message(
        lambda: load_segmentation_model(tmp_path / "none.pth", "cpu")
    )
    assert "--stem torchvision" in message(lambda: load_backbone(resnet(18), "imagenet"))
    assert "resnet34" in message(lambda: resnet(34))
    assert "stem wide" in message(lambda: resnet(18, "wide"))


# ----------------------------------------------------------------------------- feature perturbation


def test_channel_dropout_drops_half_of_the_channels_and_doubles_the_rest():
    factors = channel_dropout(torch.Generator().manual_seed(0), 20, 500)
    assert factors.shape == (20, 500, 1, 1) and set(factors.unique().tolist()) == {0.0, 2.0}
    assert abs(factors.mean().item() - 1) < 0.05
    assert not torch.equal(factors[0], factors[1])


def test_perturbed_logits_are_those_of_perturbed_features(small_model):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 64, 64)
    factors = channel_dropout(generator, 3, 64), channel_dropout(generator, 3, 512)
    with torch.no_grad():
        clean, perturbed = small_model(images, factors, fp_from=1)
        c1, _, _, c4 = small_model.backbone(images)
        expected = small_model.classifier(small_model.decode(c1 * factors[0], c4 * factors[1]))
        expected = torch.nn.functional.interpolate(
            expected, (64, 64), mode="bilinear", align_corners=True
        )
        torch.testing.assert_close(clean, small_model(images))
    torch.testing.assert_close(perturbed, expected[1:])
    assert (perturbed - clean[1:]).abs().max() > 1e-3
