"""PSA: equality with the oracle, its parts, resuming, sharding, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

import seco_sam
from dataset.toy import draw_scene
from model import segmenter
from model.sam import build_sam
from model.sam_fast import FastSam
from model.segmenter import ProposalSettings
from tests.oracle_psa import components, entropy_at, oracle_psa, paper_prompt, release_prompt
from util.connectivity import connectivities
from util.labels import (
    CAMVID_11,
    CITYSCAPES_19,
    IGNORE,
    read_image,
    read_label,
    write_label,
    write_list,
)
from util.pictures import save_picture

ROOT = Path(__file__).resolve().parents[1]
CAMVID = ROOT.parent / "shared" / "data" / "camvid"


@pytest.fixture(scope="module")
def sam():
    return build_sam("tiny")


def speckled(label: np.ndarray, seed: int, class_num: int = 19) -> np.ndarray:
    """Pixel-level pseudo-labels as a model might give: blobs without a label, blobs of a wrong
    class.
    """
    random = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(random.standard_normal(label.shape), 5) for _ in range(2)]
    noisy = np.where(fields[0] > 0.06, random.integers(class_num), label)
    return np.where(fields[1] > 0.03, IGNORE, noisy).astype(np.uint8)


def scene(seed: int, height: int = 96, width: int = 192) -> tuple[np.ndarray, np.ndarray]:
    drawn = draw_scene(seed, "target", height, width)
    return drawn.image, speckled(drawn.label, seed)


# Few points keep the tests short; looser thresholds give proposals that overlap. `slow` compares at
# the official settings.
FEW = ProposalSettings(points_per_side=6, predicted_iou=0.6, stability=0.8)
FEW_OFFICIAL = dict(
    points_per_side=6, pred_iou_thresh=0.6, stability_score_thresh=0.8, box_nms_thresh=0.7
)


@pytest.mark.parametrize("recipe", ["release", "paper"])
def test_equals_the_oracle(sam, recipe):
    for seed in range(3):
        image, label = scene(seed, 150, 250)
        fast = seco_sam.aggregate(
            image, label, FastSam(sam, FEW, prompt_batch=7), CITYSCAPES_19, recipe
        ).label
        slow = oracle_psa(
            image, label, sam, CITYSCAPES_19.stuff, CITYSCAPES_19.things, recipe, FEW_OFFICIAL
        )
        assert (fast != IGNORE).any() and (fast == slow).mean() >= 0.9999


@pytest.mark.parametrize("size", [(96, 192), (150, 250), (192, 384), (300, 500)])
def test_stability_and_boxes_on_a_cpu_are_the_packages(sam, size, monkeypatch):
    """Against the GPU's path, which is segment_anything's score and boxes of masks enlarged by
    torch, one at a time.
    """
    fast = FastSam(sam, FEW)
    fast.set_image(scene(0, *size)[0])
    low = 4 * torch.randn(12, 24, 48, generator=torch.Generator().manual_seed(0))
    low = F.interpolate(low[:, None], (97, 193), mode="bicubic")[:, 0]  # as smooth as masks are
    low[0], low[1] = -5, 5  # nothing at all; everything
    fast.settings = replace(FEW, stability=0.5)
    stable, boxes = fast._stable(low)
    monkeypatch.setattr(segmenter, "FULL_SIZE_PIXELS", 1)
    fast.device = torch.device("meta")  # whatever is no CPU
    expected, expected_boxes = fast._stable(low)
    assert torch.equal(stable, expected) and torch.equal(boxes, expected_boxes)
    assert not stable[0] and stable[1] and 2 < stable.sum() < 12


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["release", "paper"])
def test_equals_the_oracle_at_the_official_settings(sam, recipe):
    """20 scenes of the embedded benchmark and, where they are, 5 dusk images of CamVid."""
    cases = []
    for seed in range(20):
        drawn = draw_scene(seed, "target")
        cases.append((drawn.image, speckled(drawn.label, seed), CITYSCAPES_19))
    for path in sorted((CAMVID / "train").glob("0001TP*.png"))[:5]:
        label = read_label(CAMVID / "trainannot" / path.name)
        cases.append(
            (read_image(path), speckled(np.where(label == 11, IGNORE, label), 0, 11), CAMVID_11)
        )
    for image, label, classes in cases:
        fast = seco_sam.aggregate(image, label, FastSam(sam), classes, recipe).label
        slow = oracle_psa(image, label, sam, classes.stuff, classes.things, recipe)
        assert (fast == slow).mean() >= 0.9999


@pytest.mark.slow
def test_equals_the_oracle_with_an_official_architecture():
    """ViT-B with random weights, a wide image (padding below) and thresholds that random weights
    pass.
    """
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval()
    image, label = scene(1, 128, 256)
    settings = ProposalSettings(points_per_side=3, predicted_iou=-9.0, stability=0.0)
    fast = seco_sam.aggregate(image, label, FastSam(sam, settings), CITYSCAPES_19).label
    slow = oracle_psa(
        image,
        label,
        sam,
        CITYSCAPES_19.stuff,
        CITYSCAPES_19.things,
        "release",
        dict(
            points_per_side=3, pred_iou_thresh=-9.0, stability_score_thresh=0.0, box_nms_thresh=0.7
        ),
    )
    assert (fast == slow).mean() >= 0.9999


@pytest.mark.parametrize("recipe, plain", [("release", release_prompt), ("paper", paper_prompt)])
def test_prompts_equal_the_oracle(recipe, plain):
    label = speckled(draw_scene(3, "source", 96, 192).label, 3)
    prompts = iter(seco_sam.thing_prompts(label, CITYSCAPES_19.things, recipe))
    for class_id in CITYSCAPES_19.things:
        if (label == class_id).sum() <= 10:
            continue
        for mask in components(label == class_id):
            wanted = plain(label, mask) if mask.sum() >= 10 else None
            if wanted is not None:
                prompt = next(prompts)
                assert prompt.class_id == class_id
                np.testing.assert_allclose(prompt.box, wanted[0])
                np.testing.assert_allclose(prompt.points, wanted[1])
    assert next(prompts, None) is None


def test_label_entropy_equals_the_oracle():
    label = speckled(draw_scene(4, "source", 48, 96).label, 4)
    wanted = np.random.default_rng(0).random(label.shape) < 0.2
    entropy = seco_sam.label_entropy(label, wanted)
    assert np.isinf(entropy[~wanted]).all()
    for row, column in np.argwhere(wanted):
        assert entropy[row, column] == pytest.approx(entropy_at(label, row, column), abs=1e-11)


def test_an_even_connectivity_has_one_point_and_an_odd_one_two():
    label = np.full((20, 20), IGNORE, np.uint8)
    label[2:6, 2:6] = 13
    assert [len(p.points) for p in seco_sam.thing_prompts(label, (13,), "release")] == [1]
    label[6, 2] = 13
    assert [len(p.points) for p in seco_sam.thing_prompts(label, (13,), "release")] == [2]


def test_small_and_line_like_connectivities_prompt_nothing():
    label = np.full((30, 30), IGNORE, np.uint8)
    label[3:6, 3:6] = 13  # 9 pixels
    label[10, 2:25] = 13  # a line has no area
    assert seco_sam.thing_prompts(label, (13,), "release") == []
    assert len(seco_sam.thing_prompts(label, (13,), "paper")) == 1
    label[:] = IGNORE
    label[0:2, 0:5] = 13  # a class of 10 pixels
    assert seco_sam.thing_prompts(label, (13,), "paper") == []


def test_aligned_class_rules():
    road_and_car = np.zeros(19, int)
    road_and_car[[0, 13]] = 21, 79
    assert seco_sam.aligned_class(road_and_car, CITYSCAPES_19.stuff, "release") == 0
    assert seco_sam.aligned_class(road_and_car, CITYSCAPES_19.stuff, "paper") == IGNORE
    road_and_car[[0, 13]] = 20, 80
    assert (
        seco_sam.aligned_class(road_and_car, CITYSCAPES_19.stuff, "release") == IGNORE
    )  # 0.20 is not exceeded
    tie = np.zeros(19, int)
    tie[[2, 8]] = 5, 5
    assert seco_sam.aligned_class(tie, CITYSCAPES_19.stuff, "release") == 2
    assert seco_sam.aligned_class(np.zeros(19, int), CITYSCAPES_19.stuff, "release") == IGNORE


def test_overlaps_are_painted_over_or_filtered():
    first, second = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    first[:, :4], second[:, 1:6] = True, True  # 12 of 20 pixels of the second are taken
    for recipe, expected in (("release", 16 + 8 - 12), ("paper", 16)):
        painted = torch.full((4, 8), IGNORE, dtype=torch.uint8)
        seco_sam.paint(painted, first, 0, recipe)
        seco_sam.paint(painted, second, 1, recipe)
        assert int((painted != IGNORE).sum()) == (24 if recipe == "release" else 16)
        assert int((painted == 0).sum()) == (4 if recipe == "release" else 16) and expected
    second[:, 1:3] = False  # 4 of 12: the rest is painted, the first one stays
    seco_sam.paint(painted, second, 1, "paper")
    assert int((painted == 0).sum()) == 16 and int((painted == 1).sum()) == 8


def test_images_without_proposals_or_labels(sam):
    image, label = scene(5)
    none = ProposalSettings(points_per_side=2, predicted_iou=2.0)
    empty = np.full_like(label, IGNORE)
    result = seco_sam.aggregate(image, empty, FastSam(sam, none), CITYSCAPES_19)
    assert (result.label == IGNORE).all() and result.prompts == [] and result.aligned == []


def test_connectivities_of_the_ablations(sam):
    """Alone, alignment takes all classes by proposals and prompting prompts for all classes."""
    image, label = scene(6)
    aligned = seco_sam.aggregate(image, label, FastSam(sam, FEW), CITYSCAPES_19, only="alignment")
    prompted = seco_sam.aggregate(image, label, FastSam(sam, FEW), CITYSCAPES_19, only="prompting")
    assert aligned.prompts == [] and aligned.aligned and prompted.aligned == []
    assert {p.class_id for p in prompted.prompts} & set(CITYSCAPES_19.stuff)


def test_cached_proposals_give_the_same_labels(sam, tmp_path):
    """And SAM is not asked for them a second time, whatever the recipe."""
    image, label = scene(8)
    for recipe in ("release", "paper"):
        plain = seco_sam.aggregate(image, label, FastSam(sam, FEW), CITYSCAPES_19, recipe)
        made = seco_sam.aggregate(
            image, label, FastSam(sam, FEW), CITYSCAPES_19, recipe, cache=tmp_path / "x.npz"
        )
        reader = FastSam(sam, FEW)
        reader.proposals = None
        taken = seco_sam.aggregate(
            image, label, reader, CITYSCAPES_19, recipe, cache=tmp_path / "x.npz"
        )
        assert plain.aligned == made.aligned == taken.aligned
        assert (plain.label == taken.label).all() and (plain.label == made.label).all()


def test_batches_decoded_side_by_side_give_what_one_thread_gives(sam):
    image, label = scene(9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            fast = FastSam(sam, FEW, prompt_batch=5)
            results.append(seco_sam.aggregate(image, label, fast, CITYSCAPES_19))
            assert fast.threads == threads == torch.get_num_threads()
            assert all(0 < seconds < 60 for seconds in fast.watch.seconds.values())
    finally:
        torch.set_num_threads(before)
    assert results[0].aligned == results[1].aligned and results[0].prompts
    assert (results[0].label == results[1].label).mean() >= 0.9999


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_exhaustion_halves_the_prompt_batch(sam, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    image, label = scene(7)
    whole, halved = FastSam(sam, FEW, prompt_batch=8), FastSam(sam, FEW, prompt_batch=8)
    real = halved._transformer

    def scarce(points, boxes, drawn):
        if len(points) > 3:
            raise torch.OutOfMemoryError("no memory")
        return real(points, boxes, drawn)

    halved._transformer = scarce
    results = [seco_sam.aggregate(image, label, s, CITYSCAPES_19).label for s in (whole, halved)]
    assert halved.prompt_batch == 2 and (results[0] == results[1]).mean() >= 0.9999


# -------------------------------------------------------------------------------------- the command


def make_root(root: Path, count: int = 4, size: tuple[int, int] = (48, 96)) -> Path:
    """A root with `count` images and labels of experiment `pix`; returns the list."""
    rows = []
    for i in range(count):
        image, label = scene(i, *size)
        save_picture(root / f"images/{i}.png", image)
        write_label(root / f"pix/{i}.png", label, CITYSCAPES_19.palette)
        rows.append((f"images/{i}.png", f"pix/{i}.png"))
    write_list(root / "splits/pix/all.txt", rows)
    return root / "splits/pix/all.txt"


def command(root: Path, *more: str) -> list[str]:
    return [
        "--id-list-path",
        str(root / "splits/pix/all.txt"),
        "--root-path",
        str(root),
        "--sam-type",
        "tiny",
        "--device",
        "cpu",
        *more,
    ]


def run(root: Path, *more: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "seco_sam.py"), *command(root, *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def outputs(root: Path) -> dict[str, bytes]:
    names = [*sorted((root / "pix_tiny").glob("*.png")), root / "splits/pix_tiny/all.txt"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A root with the results of one uninterrupted process."""
    root = tmp_path_factory.mktemp("psa")
    make_root(root)
    result = run(root, "--vis", "1")
    assert result.returncode == 0, result.stderr
    return root


def test_outputs(finished):
    assert [line.split()[1] for line in open(finished / "splits/pix_tiny/all.txt")] == [
        f"pix_tiny/{i}.png" for i in range(4)
    ]
    summary = json.loads((finished / "pix_tiny/summary.json").read_text())
    assert summary["images"] == 4 and 0 < summary["coverage_before"] < 100
    assert summary["manifest"]["inputs"]["sam"]["sha256"]
    assert (finished / "pix_tiny/vis/0.png").is_file()
    assert (finished / "pix/0.png").read_bytes()


def test_a_finished_list_is_not_computed_again(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "pix_tiny").glob("*.png")}
    result = run(finished)
    assert result.returncode == 0 and "4 of 4 images are done" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "pix_tiny").glob("*.png")}


def test_two_processes_give_the_same_bytes(finished, tmp_path):
    make_root(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "seco_sam.py"), *command(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in processes:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    assert outputs(tmp_path) == outputs(finished)


def test_killed_and_started_again_gives_the_same_bytes(finished, tmp_path):
    make_root(tmp_path)
    for count in range(1, 4):  # killed as soon as one more result is there
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "seco_sam.py"), *command(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 120
        while (
            len(list((tmp_path / "pix_tiny").glob("[0-9].png"))) < count and process.poll() is None
        ):
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(tmp_path).returncode == 0
    assert outputs(tmp_path) == outputs(finished)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_limit_leaves_the_whole_list_alone(tmp_path):
    make_root(tmp_path)
    assert run(tmp_path, "--limit", "2").returncode == 0
    lists = sorted(p.name for p in (tmp_path / "splits/pix_tiny").iterdir())
    assert lists == ["all_first2.txt"] and len(list((tmp_path / "pix_tiny").glob("*.png"))) == 2


def test_copied_into_an_empty_folder_it_runs(tmp_path):
    """The script and the files that its header names, nothing else of the repository."""
    make_root(tmp_path, 1)
    kit = tmp_path / "elsewhere"
    for name in (
        "seco_sam.py",
        "model/segmenter.py",
        "model/sam.py",
        "model/sam_fast.py",
        "model/sam_decoder.py",
        "model/sam_tiny.py",
        "model/sam_tiny.pth",
        "util/run.py",
        "util/labels.py",
        "util/connectivity.py",
        "util/pictures.py",
    ):
        (kit / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, kit / name)
    result = subprocess.run(
        [sys.executable, "seco_sam.py", *command(tmp_path)],
        cwd=kit,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "break_it, arguments, said",
    [
        (lambda r: (r / "splits/pix/all.txt").unlink(), [], "no such list"),
        (lambda r: (r / "splits/pix/all.txt").write_text(""), [], "is empty"),
        (lambda r: (r / "images/1.png").unlink(), [], "images/1.png"),
        (lambda r: (r / "pix/2.png").unlink(), [], "pix/2.png"),
        (lambda r: (r / "pix/2.png").write_bytes(b"no picture"), [], "pix/2.png"),
        (
            lambda r: write_label(
                r / "pix/2.png", np.full((48, 96), 33, np.uint8), CITYSCAPES_19.palette
            ),
            [],
            "holds the value 33",
        ),
        (lambda r: None, ["--class-num", "7"], "--stuff and --things"),
        (lambda r: None, ["--sam-checkpoint", "nowhere.pth"], "nowhere.pth"),
        (
            lambda r: None,
            ["--sam-type", "vit_b", "--sam-checkpoint", str(ROOT / "model/sam_tiny.pth")],
            "not of --sam-type vit_b",
        ),
        (
            lambda r: (r / "pix_tiny").write_text("a file where the folder should be"),
            [],
            "pix_tiny",
        ),
        (lambda r: None, ["--limit", "0"], "--limit"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, break_it, arguments, said, capsys, monkeypatch):
    from util.run import run_main

    make_root(tmp_path, 3)
    break_it(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seco_sam.py"])
    code = run_main(lambda: seco_sam.main(command(tmp_path, *arguments)))
    error = capsys.readouterr().err
    assert (
        code == 2
        and said in error.splitlines()[-1]
        and error.splitlines()[-1].startswith("error: ")
    )
    assert (
        not list(tmp_path.glob("pix_tiny/*.png"))
        and not (tmp_path / "splits/pix_tiny/all.txt").exists()
    )


def test_other_settings_or_labels_are_never_mixed(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    assert "amp" in run(root, "--amp", "bf16").stderr
    write_label(root / "pix/0.png", np.zeros((48, 96), np.uint8), CITYSCAPES_19.palette)
    result = run(root)
    assert result.returncode == 2 and "pix/0.png: has changed" in result.stderr


def test_connectivities_come_in_raster_order():
    label = speckled(draw_scene(9, "source", 60, 120).label, 9)
    found = [c for c in connectivities(label, [8])]
    plain = components(label == 8)
    assert len(found) == len(plain)
    for fast, slow in zip(found, plain):
        full = np.zeros(label.shape, bool)
        full[fast.window] = fast.mask
        assert (full == slow).all() and fast.area == slow.sum()
