"""Segmenters: masks and proposals equal to each library's own, PSA with each, names, errors.

All networks are small and random (tests/small_segmenters.py); nothing is downloaded.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from small_segmenters import (
    FAMILIES,
    PROCESSORS,
    SIDE,
    mobile_sam,
    prompts_and_decoder,
    sam2_vision,
    sam3_vision,
    small_mobile_sam,
    small_sam,
    stirred,
)
from test_psa import make_root, run

from dataset.toy import draw_scene
from model import sam as model_sam
from model.sam import files_digest, load_segmenter
from model.sam_fast import FastSam
from model.segmenter import ProposalSettings
from tests.oracle_psa import official
from util.labels import IGNORE
from util.run import UserError, sha256

HEIGHT, WIDTH = 48, 64
EVERYTHING = ProposalSettings(4, -1e9, -1.0, box_nms=1.0)
BOXES = np.array([[3.0, 4.0, 20.0, 30.0], [5.0, 5.0, 40.0, 40.0], [30.0, 8.0, 60.0, 44.0]])
POINTS = [np.array([[6.0, 7.0]]), np.array([[10.0, 10.0], [20.0, 20.0]]), np.array([[41.0, 20.0]])]


def scene(height: int = HEIGHT, width: int = WIDTH, seed: int = 0):
    """Image and pixel labels, half of which are missing."""
    drawn = draw_scene(seed, "target", 2 * height, 2 * width)
    label = drawn.label[::2, ::2].copy()
    label[:, ::16] = label[::16] = IGNORE
    return np.ascontiguousarray(drawn.image[::2, ::2]), label


each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: its folder as the Hub has it}."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family, make in FAMILIES.items():
        made[family] = root / f"{family}-small"
        torch.manual_seed(0)
        model, processor = make()
        stirred(model).save_pretrained(made[family])
        processor.save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    """{family: its segmenter, as `load_segmenter` makes it}."""
    return {family: load_segmenter(str(folder)) for family, folder in folders.items()}


def anew(segmenter, **options):
    """The same network, no image yet; two threads decode its batches side by side."""
    torch.set_num_threads(2)
    made = type(segmenter)(segmenter.model, segmenter.image_processor, **options)
    torch.set_num_threads(1)  # of the encoder, whose sums depend on it
    assert made._map is not map
    return made


def between(values: torch.Tensor) -> float:
    """A threshold in the widest gap of the middle third of the values, which parts them surely."""
    values = values.sort().values[len(values) // 3 : -len(values) // 3]
    widest = int(values.diff().argmax())
    return float(values[widest : widest + 2].mean())


def thresholds(segmenter, image, side: int = 4) -> ProposalSettings:
    """Settings that each reject some of the proposals of random weights, none of them by a hair."""
    segmenter.settings = ProposalSettings(side, -1e9, -1.0, box_nms=1.0)
    segmenter.set_image(image)
    low, _, found = segmenter.find_proposals()
    predicted_iou = between(found)
    logits = segmenter.full_size(low[found > predicted_iou])
    inside, outside = ((logits > sign).flatten(1).sum(1) for sign in (1.0, -1.0))
    score = (inside / outside.clamp(min=1))[inside > 0]
    return ProposalSettings(side, predicted_iou, between(score), box_nms=1.0)


def in_place(proposals, height: int, width: int) -> list[np.ndarray]:
    """Proposals as full-size masks."""
    masks = []
    for mask, (x0, y0, x1, y1) in proposals:
        masks.append(np.zeros((height, width), bool))
        masks[-1][y0 : y1 + 1, x0 : x1 + 1] = mask.numpy()
    return masks


def check_proposals(segmenter, image, generate, side: int = 4) -> None:
    """Proposals equal to those of `generate(settings)`, masks in order, at settings that count."""
    settings = thresholds(segmenter, image, side)
    counts = [len(segmenter.find_proposals()[0])]
    for box_nms in (1.0, 0.9):
        segmenter.settings = replace(settings, box_nms=box_nms)
        masks = in_place(segmenter.proposals(), *image.shape[:2])
        expected = generate(segmenter.settings)
        assert len(masks) == len(expected)
        assert all((mask == wanted).all() for mask, wanted in zip(masks, expected))
        counts.append(len(masks))
    assert counts[0] / 2 > counts[1] >= 4 and counts[1] > counts[2] >= 1


# ------------------------------------------------------------------------------------ equal masks


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@each_family
def test_prompts_give_the_librarys_own_masks(family, amp, loaded):
    """Through the package's processor, model and post-processing, one prompt at a time."""
    segmenter = anew(loaded[family], prompt_batch=1 if amp else 2, amp=amp)
    processor = PROCESSORS[family](segmenter.image_processor)
    for height, width in ((HEIGHT, WIDTH), (100, 70), (SIDE, SIDE)):
        image, _ = scene(height, width)
        segmenter.set_image(image)
        masks = segmenter.predict(BOXES, POINTS)
        assert 0.01 < masks.float().mean() < 0.99 and masks.shape == (3, height, width)
        for mask, box, points in zip(masks, BOXES, POINTS):
            asked = {"input_points": [[points.tolist()]], "input_boxes": [[box.tolist()]]}
            asked["input_labels"] = [[[1] * len(points)]]
            inputs = processor(images=image, **asked, return_tensors="pt")
            sizes = {k: inputs.pop(k) for k in [*inputs] if k.endswith("_sizes")}
            inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
                result = segmenter.model(**inputs, multimask_output=False)
            own = processor.post_process_masks(result.pred_masks.float(), **sizes)[0]
            assert torch.equal(mask, own[0, 0])


@each_family
def test_proposals_are_those_of_the_librarys_generator(family, loaded):
    """On an image that is square: on others the package's generator misplaces the grid of models
    whose input is stretched (see the next test).
    """
    segmenter = anew(loaded[family])
    image, _ = scene(WIDTH, WIDTH)
    parts = {"model": segmenter.model, "image_processor": segmenter.image_processor}
    pipeline = t.pipeline("mask-generation", **parts)

    def generate(settings):
        found = pipeline(
            Image.fromarray(image),
            points_per_crop=settings.points_per_side,
            pred_iou_thresh=settings.predicted_iou,
            stability_score_thresh=settings.stability,
            crops_nms_thresh=settings.box_nms,
        )
        return [np.asarray(mask) for mask in found["masks"]]

    check_proposals(segmenter, image, generate)


@each_family
def test_the_grid_covers_an_image_that_is_not_square(family, loaded):
    """Each point's three masks, decoded alone through the package's processor."""
    segmenter = anew(loaded[family], settings=EVERYTHING)
    image, _ = scene(30, 80)
    segmenter.set_image(image)
    _, _, found = segmenter.find_proposals()
    processor = PROCESSORS[family](segmenter.image_processor)
    expected = []
    for y in (30 * np.arange(0.5, 4) / 4).tolist():
        for x in (80 * np.arange(0.5, 4) / 4).tolist():
            inputs = processor(images=image, input_points=[[[[x, y]]]], return_tensors="pt")
            points = inputs["input_points"].float()
            with torch.inference_mode():
                result = segmenter.model(inputs["pixel_values"], input_points=points)
            expected += result.iou_scores[0, 0].tolist()
    expected = pytest.approx(sorted(expected, reverse=True), rel=1e-4, abs=1e-5)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    "make, predictor, generator, side",  # MobileSAM's 1024 pixels cannot be had smaller
    [
        (small_sam, SamPredictor, SamAutomaticMaskGenerator, 4),
        (small_mobile_sam, mobile_sam.SamPredictor, mobile_sam.SamAutomaticMaskGenerator, 3),
    ],
)
def test_the_fast_path_gives_the_packages_own_masks_and_proposals(make, predictor, generator, side):
    sam = make()
    segmenter = FastSam(sam)
    image, _ = scene()
    segmenter.set_image(image)
    masks, plain = segmenter.predict(BOXES, POINTS), predictor(sam)
    plain.set_image(image)
    for mask, box, points in zip(masks, BOXES, POINTS):
        own, _, _ = plain.predict(points, np.ones(len(points)), box=box, multimask_output=False)
        assert (mask.numpy() == own[0]).all()
    assert 0.01 < masks.float().mean() < 0.99

    def generate(settings):
        found = generator(sam, **official(settings)).generate(image)
        return [proposal["segmentation"] for proposal in found]

    check_proposals(segmenter, image, generate, side)


def test_settings_are_those_of_the_familys_own_generator(loaded):
    expected = {"sam": 0.88, "sam_hq": 0.88, "sam2": 0.8, "sam3_tracker": 0.8, "edgetam": 0.8}
    for family, segmenter in loaded.items():
        assert segmenter.settings == ProposalSettings(32, expected[family], 0.95, box_nms=0.7)


# ----------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("family", ["vit_t", *FAMILIES])
def test_psa_end_to_end(family, folders, tmp_path, monkeypatch):
    """With few proposals, none of them rejected; a label that is made again is as it was."""
    root, settings = make_root(tmp_path, 2), replace(EVERYTHING, points_per_side=2)
    if family == "vit_t":
        torch.save(small_mobile_sam().state_dict(), tmp_path / "mobile_sam.pt")
        monkeypatch.setattr(model_sam, "sam_builder", lambda sam_type: small_mobile_sam)
        options, name = ("vit_t", "--sam-checkpoint", f"{tmp_path}/mobile_sam.pt"), "vit_t"
    else:
        options, name = (str(folders[family]),), folders[family].name
    made, folder = [], root / f"pix_{name}"
    for _ in range(2):
        result = run(root, "--sam-type", *options, settings=settings)
        assert result.code == 0, result.error
        made.append([(folder / f"{i}.png").read_bytes() for i in range(2)])
        (folder / "1.png").unlink()
    assert made[0] == made[1]
    assert (root / f"splits/pix_{name}/all.txt").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["proposals_per_image"] > 5 and summary["coverage_after"] > 10
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["sam_type"] == name and len(settings["sam_sha256"]) == 64


# --------------------------------------------------------------------------- folders of the Hub


def test_sam2_of_the_hub_is_saved_as_a_video_model(folders, loaded, tmp_path):
    """facebook/sam2.1-*: config.json says sam2_video, the processor's settings are in one file."""
    image_model = loaded["sam2"].model
    widths = ("attention_hidden_size", "encoder_hidden_size", "fuser_embed_dim")
    memory = {f"memory_{name}": 32 for name in widths} | {"mask_downsampler_embed_dim": 32}
    memory |= {"memory_attention_num_layers": 1, "memory_fuser_num_layers": 1}
    parts = prompts_and_decoder("Sam2Video", image_size=SIDE)
    config = {"vision_config": sam2_vision(), "image_size": SIDE, **memory, **parts}
    video = t.Sam2VideoModel(t.Sam2VideoConfig(**config))
    assert not video.load_state_dict(image_model.state_dict(), strict=False).unexpected_keys
    video.save_pretrained(tmp_path)
    processor = t.AutoImageProcessor.from_pretrained(folders["sam2"])
    t.Sam2VideoProcessor(processor, t.Sam2VideoVideoProcessor()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    found = load_segmenter(str(tmp_path))
    check_same_weights(found.model, image_model)
    assert found.image_processor.size == processor.size and found.settings.predicted_iou == 0.8


def test_sam3_of_the_hub_holds_detector_and_tracker(folders, loaded, tmp_path):
    """facebook/sam3: config.json says sam3_video, the tracker shares the detector's encoder."""
    tracker = loaded["sam3_tracker"].model
    parts = prompts_and_decoder("Sam3TrackerVideo", image_size=84, patch_size=14)
    config = t.Sam3TrackerVideoConfig(vision_config=sam3_vision(84), image_size=84, **parts)
    t.Sam3VideoConfig(tracker_config=config.to_dict()).save_pretrained(tmp_path)
    t.AutoImageProcessor.from_pretrained(folders["sam3_tracker"]).save_pretrained(tmp_path)

    def place(name: str) -> str:
        if name.startswith("vision_encoder.backbone."):
            return f"detector_model.{name}"
        neck = "vision_encoder.neck."
        return name.replace(neck, "tracker_neck.") if neck in name else f"tracker_model.{name}"

    state = {place(name): value.contiguous() for name, value in tracker.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_same_weights(load_segmenter(str(tmp_path)).model, tracker)


def check_same_weights(model, expected) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert type(model) is type(expected) and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------- bad input


def said(function, *arguments) -> str:
    """The one line of the UserError."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_absent_packages_and_weights_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "facebook/sam2.1-hiera-large"
    line = said(load_segmenter, "vit_t")
    assert "pretrained/mobile_sam.pt" in line and model_sam.MOBILE_URL in line
    # No network, nothing downloaded before.
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    line = said(load_segmenter, name)
    assert f"https://huggingface.co/{name}" in line and "--sam-checkpoint" in line
    assert "no such folder" in said(load_segmenter, name, "nowhere")
    (tmp_path / "mobile_sam.pt").write_bytes(b"")
    for package in ("mobile_sam", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    line = said(load_segmenter, "vit_t", tmp_path / "mobile_sam.pt")
    assert "pip install mobilesam-mirror timm" in line
    assert 'pip install "transformers>=5"' in said(load_segmenter, name)
    assert "nor a folder that is there" in said(load_segmenter, "vit_x")


def test_bad_types_and_folders(folders, tmp_path):
    assert "nor a folder that is there" in said(load_segmenter, "./nowhere")
    assert "Unrecognized model in" in said(load_segmenter, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "'bert'; give the folder" in said(load_segmenter, str(tmp_path))
    (tmp_path / "config.json").write_bytes((folders["sam2"] / "config.json").read_bytes())
    assert str(tmp_path) in said(load_segmenter, str(tmp_path))  # no weights
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    assert str(tmp_path) in said(load_segmenter, str(tmp_path))
    other = (folders["sam_hq"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(other)
    processor = (folders["sam2"] / "preprocessor_config.json").read_bytes()
    (tmp_path / "preprocessor_config.json").write_bytes(processor)
    assert "do not fit its config.json" in said(load_segmenter, str(tmp_path))


def test_weights_are_told_apart(folders, loaded, tmp_path):
    """By one digest, for a file that of the file; MobileSAM's weights are not the tiny SAM's."""
    files = loaded["sam2"].files
    names = [path.name for path in files]
    assert names == ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert files_digest(files) != files_digest(loaded["sam"].files)
    assert files_digest(files) != files_digest(files[:1]) == sha256(files[0])
    torch.save(small_mobile_sam().state_dict(), tmp_path / "mobile_sam.pt")
    assert "no weights of --sam-type tiny" in said(
        load_segmenter, "tiny", tmp_path / "mobile_sam.pt"
    )
