"""scripts/own_data.sh on small images with five classes: from probability arrays to a page."""

import os
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from processes import warm_python

from dataset.toy import draw_scene
from scripts.lib.page import main as write_page
from util.labels import IGNORE, read_classes, read_label

CLASSES = """road stuff 128,64,128
buildings stuff
greens stuff 107,142,35
sky stuff 70,130,180
moving thing 220,20,60
"""
FIVE = np.array([0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 3, *[4] * 8])  # of Cityscapes' 19
SMALL = {
    "SAM_TYPE": "tiny",
    "SCC": "--backbone resnet10 --backbone-weights none --patch-size 32 64 --batch-size 4"
    " --iterations 2",
    "ADAPT": "--backbone resnet10 --stem torchvision --crop-size 65 --global-batch 2 --epochs 1"
    " --loss-groups 1 --workers 0",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with my/{data,probs,train.txt,classes.txt,val.txt}."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my/data/photos").mkdir(parents=True)
    (folder / "my/data/gt").mkdir()
    (folder / "my/probs/photos").mkdir(parents=True)
    for i in range(2):
        scene = draw_scene(i, "target", 64, 128)
        Image.fromarray(scene.image).save(folder / f"my/data/photos/{i}.png")
        known = scene.label != IGNORE
        label = np.where(known, FIVE[np.minimum(scene.label, 18)], 0).astype(np.uint8)
        Image.fromarray(np.where(known, label, IGNORE).astype(np.uint8)).save(
            folder / f"my/data/gt/{i}.png"
        )
        probabilities = np.full((5, 64, 128), 0.05, np.float16)
        np.put_along_axis(probabilities, label[None], 0.8, axis=0)
        np.save(folder / f"my/probs/photos/{i}.png.npy", probabilities)
    (folder / "my/train.txt").write_text("".join(f"photos/{i}.png\n" for i in range(2)))
    (folder / "my/val.txt").write_text("photos/0.png gt/0.png\n")
    (folder / "my/classes.txt").write_text(CLASSES)
    return folder


def run(own, **values):
    my = own / "my"
    places = {
        "ROOT": my / "data",
        "IMAGES": my / "train.txt",
        "CLASSES": my / "classes.txt",
        "PROBABILITIES": my / "probs",
        "SPLITS": my / "splits",
        "OUT": own / "run",
    }
    values = {**SMALL, **{name: str(path) for name, path in places.items()}, **values}
    environment = {**os.environ, "PYTHON": warm_python(), "OMP_NUM_THREADS": "1", **values}
    return subprocess.run(
        ["bash", "scripts/own_data.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_from_arrays_to_the_page(own):
    first = run(own)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "no --val-id-path: no mIoU was measured" in first.stdout
    assert "of the unlabeled pixels had a confidence of --conf-thresh 0" in first.stdout
    page = (own / "run/index.html").read_text()
    for words in (
        "of the labeled pixels, keep their class",
        "labels whose class the classifier gives",
        "labeled images of each class",
        "unlabeled pixels above --conf-thresh",
        "not measured: no list for it",
        "pictures/side_by_side.png",
    ):
        assert words in page
    # The classes were named once; later commands have them from beside the labels.
    for folder in ("mine", "mine_tiny", "mine_tiny_scc"):
        classes = read_classes(own / f"my/data/{folder}/classes.txt")
        assert classes == read_classes(own / "my/classes.txt")
        assert read_label(own / f"my/data/{folder}/0.png", 5).shape == (64, 128)
    assert first.stdout.count("--classes") == 1

    labels = {p: p.stat().st_mtime_ns for p in own.rglob("mine*/*.png")}
    again = run(own, VALIDATION=str(own / "my/val.txt"), OUT=str(own / "measured"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert {p: p.stat().st_mtime_ns for p in own.rglob("mine*/*.png")} == labels
    page = (own / "measured/index.html").read_text()
    assert "Validation IoU" in page and "not measured" not in page and "<td>greens</td>" in page
    assert "pictures/validation.png" in page  # prediction beside ground truth
    drawn = {p: p.stat().st_mtime_ns for p in own.glob("measured/pictures/*.png")}
    write_page([str(own / "measured")])  # of the same results they are not drawn again
    assert {p: p.stat().st_mtime_ns for p in own.glob("measured/pictures/*.png")} == drawn


def test_what_is_not_there_is_told_first(own):
    for values, told in (
        ({"CLASSES": "nowhere.txt"}, "nowhere.txt: no such file; edit the values"),
        ({"VALIDATION": "nowhere.txt"}, "nowhere.txt: no such file; edit the values"),
    ):
        ended = run(own, OUT=str(own / "other"), **values)
        assert ended.returncode == 2 and told in ended.stderr
    assert not (own / "other").exists()
