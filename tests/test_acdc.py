"""Cityscapes → ACDC in miniature: both layouts of the data, ready-made labels, every command of the
task with a checkpoint in CMA's format, the zip for the server."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_page import check_page
from test_prepare_data import blocks, image, prepare, run, sound
from test_tasks import rehearsed_task, times

from scripts.lib import layouts
from util.labels import read_label, read_list

SIZE = (1080, 1920)
RECORDINGS = {"fog": "GOPR0475", "night": "GOPR0351", "rain": "GOPR0400", "snow": "GP010122"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One training, validation and test image of each condition, with all that lies beside them."""
    root = tmp_path_factory.mktemp("acdc")
    for condition, recording in RECORDINGS.items():
        for split in ("train", "val", "test"):
            stem = f"{condition}/{split}/{recording}/{recording}_frame_000001"
            image(root / f"rgb_anon/{stem}_rgb_anon.png", *SIZE)
            reference = stem.replace(f"/{split}/", f"/{split}_ref/")
            image(root / f"rgb_anon/{reference}_rgb_ref_anon.png", *SIZE)
            if split != "test":
                blocks(root / f"gt/{stem}_gt_labelTrainIds.png", [0, 10, 18, 255], *SIZE)
                blocks(root / f"gt/{stem}_gt_labelIds.png", [7, 33], *SIZE)
    return root


@pytest.fixture
def downloaded(made, tmp_path):
    return shutil.copytree(made, tmp_path / "acdc")


def flattened(root):
    """The layout that DAFormer's commands leave, without test images."""
    for split in ("train", "val"):
        for kind, ending in (("rgb_anon", "rgb_anon"), ("gt", "gt_labelTrainIds")):
            (root / f"flat/{kind}/{split}").mkdir(parents=True)
            for path in root.glob(f"{kind}/*/{split}/*/*_{ending}.png"):
                shutil.copy(path, root / f"flat/{kind}/{split}")
    return root / "flat"


def test_the_layout_as_downloaded(downloaded, capsys):
    out = sound(capsys, downloaded, data="acdc", expect=(4, 4, 4))
    lists = downloaded / "lists"
    assert {path.name for path in lists.glob("*.txt")} == {
        *("train.txt", "val.txt", "test.txt"),
        *(f"val_{condition}.txt" for condition in RECORDINGS),
    }
    stem = "night/val/GOPR0351/GOPR0351_frame_000001"
    row = (f"rgb_anon/{stem}_rgb_anon.png", f"gt/{stem}_gt_labelTrainIds.png")
    assert read_list(lists / "val_night.txt") == [row] and row in read_list(lists / "val.txt")
    assert (
        len(read_list(lists / "train.txt")) == 4 and len(read_list(lists / "test.txt", (1,))) == 4
    )
    assert "conditions are unknown" not in out
    assert layouts.missing_data("acdc", downloaded) == []


def test_the_flattened_layout_without_training_labels(downloaded, capsys):
    flat = flattened(downloaded)
    shutil.rmtree(flat / "gt/train")
    out = sound(capsys, flat, data="acdc", expect=(4, 4))
    assert "in this layout the conditions are unknown" in out
    assert {path.name for path in (flat / "lists").glob("*.txt")} == {"train.txt", "val.txt"}
    label = "gt/val/GOPR0351_frame_000001_gt_labelTrainIds.png"
    assert label in dict(read_list(flat / "lists/val.txt")).values()


@pytest.mark.parametrize(
    "spoil, told",
    [
        ("rgb_anon/snow/test/GP010122/GP010122_frame_000001_rgb_anon.png", "3 test images"),
        ("gt/fog/val/GOPR0475/GOPR0475_frame_000001_gt_labelTrainIds.png", "has no label"),
        ("gt/fog/train/GOPR0475/GOPR0475_frame_000001_gt_labelTrainIds.png", "has no label"),
    ],
)
def test_a_download_that_lacks_a_file(downloaded, capsys, spoil, told):
    (downloaded / spoil).unlink()
    code, _, err = prepare(capsys, downloaded, data="acdc", expect=(4, 4, 4))
    assert code == 2 and told in err and not (downloaded / "lists").exists()


def test_ready_made_labels(downloaded, tmp_path, capsys):
    sound(capsys, downloaded, data="acdc", expect=(4, 4, 4))
    rows, folder = read_list(downloaded / "lists/train.txt"), tmp_path / "ready"
    options = ("--id-list-path", downloaded / "lists/train.txt", "--root-path", downloaded)
    options += ("--labels", folder, "--exp", "CMA", "--out-list", tmp_path / "CMA.txt")
    for number, (picture, _) in enumerate(rows):
        blocks(folder / picture.rpartition("/")[2], [number, 255], *SIZE)
    code, _, err = run(capsys, "labels", *options)
    assert code == 0, err
    made = read_list(tmp_path / "CMA.txt")
    assert [picture for picture, _ in made] == [picture for picture, _ in rows]
    for number, (picture, label) in enumerate(made):
        assert label == picture.replace("rgb_anon", "CMA", 1)
        assert set(np.unique(read_label(downloaded / label, 19))) == {number, 255}
    blocks(folder / rows[0][0].rpartition("/")[2], [5], *SIZE)
    code, _, err = run(capsys, "labels", *options)
    assert code == 2 and "differs from what" in err
    (folder / rows[0][0].rpartition("/")[2]).unlink()
    code, _, err = run(capsys, "labels", *options)
    assert code == 2 and "no such label map (1 of 4 images lack theirs)" in err


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every command, a second time nothing; then from ready-made labels, without SCC."""
    out = tmp_path / "run"
    result = rehearsed_task("cs2acdc", out)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "expected value: not published" in result.stdout
    assert "rehearsal complete" in result.stdout
    for name in ("", "_fog", "_night"):
        for moment in ("before", "after"):
            metrics = json.loads((out / f"eval_{moment}{name}/metrics.json").read_text())
            assert metrics["images"] == (1 if name else 2)
    with zipfile.ZipFile(out / "acdc_test.zip") as file:
        names = [name for name in file.namelist() if not name.endswith("/")]
        assert names == ["labelTrainIds/GOPR0122_frame_000000_rgb_anon.png"]
        with file.open(names[0]) as content, Image.open(content) as picture:
            values = np.array(picture)
    assert values.shape == SIZE and values.dtype == np.uint8 and values.max() < 19
    check_page(out / "index.html", "validation IoU (%)", "mIoU", "seco_scc.py")
    rows = read_list(out / "splits/CMA/train.txt")
    assert len(rows) == 2 and (out / "adapt/latest.pth").is_file()

    before = times(out)
    again = rehearsed_task("cs2acdc", out)
    assert again.returncode == 0 and times(out) == before and len(before) > 9

    (tmp_path / "ready").mkdir()
    for picture, label in rows:
        shutil.copy(out / "inputs/data" / label, tmp_path / "ready" / picture.rpartition("/")[2])
    for folder in ("adapt", "val", "test", "server"):
        shutil.rmtree(out / folder)
    options = {"LABELS": tmp_path / "ready", "EXP": "ready", "USE_SCC": 0}
    result = rehearsed_task("cs2acdc", out, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "before: skipped" in result.stdout and "seco_scc.py" not in result.stdout
    assert "ready_tiny/labeled.txt" in (out / "adapt/manifest.json").read_text(encoding="utf-8")
