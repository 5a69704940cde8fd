"""Labels and lists from the official layouts, and every way a data set is known to be broken."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from scripts import prepare_data
from scripts.lib import layouts
from scripts.prepare_data import DATA_SETS
from util.labels import IGNORE, SYNTHIA_16, read_label, read_list
from util.run import run_main

HEIGHT, WIDTH = 1024, 2048


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def image(path, height, width, value=0):
    save(path, np.full((height, width, 3), value, np.uint8))


def blocks(path, values, height, width):
    """A label map of large blocks, so that its PNG is small."""
    grid = np.random.default_rng(len(values)).choice(values, (8, 16)).astype(np.uint8)
    save(path, grid.repeat(height // 8, 0).repeat(width // 16, 1))


def truncate(path, left):
    path.write_bytes(path.read_bytes()[:left])


@pytest.fixture
def cityscapes(tmp_path):
    """Three training and two validation images in the official layout."""
    root = tmp_path / "data"
    for split, city, count in (("train", "aachen", 3), ("val", "munster", 2)):
        for i in range(count):
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            image(root / f"leftImg8bit/{stem}_leftImg8bit.png", HEIGHT, WIDTH, 40 + i)
            blocks(root / f"gtFine/{stem}_gtFine_labelIds.png", range(34), HEIGHT, WIDTH)
            (root / f"gtFine/{stem}_gtFine_color.png").write_bytes(b"not read")
    return root


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the script."""
    code = run_main(lambda: prepare_data.main([str(a) for a in arguments]))
    return code, *capsys.readouterr()


def prepare(capsys, root, *extra, data="cityscapes", expect=(3, 2)):
    folders = ("--root-path", root, "--out", root / "lists")
    return run(capsys, data, *folders, "--expect", *expect, *extra)


def sound(*arguments, **options):
    """stdout of `prepare`, which finds nothing wrong."""
    code, out, err = prepare(*arguments, **options)
    assert code == 0, err
    return out


def test_tables_are_the_official_ones():
    tables = {name: data.table for name, data in DATA_SETS.items()}
    for label in pytest.importorskip("cityscapesscripts.helpers.labels").labels:
        if label.id >= 0:
            wanted = label.trainId if 0 <= label.trainId < 19 else IGNORE
            assert tables["cityscapes"][label.id] == wanted, label.name
            known = wanted < IGNORE and label.name in SYNTHIA_16.names
            wanted = SYNTHIA_16.names.index(label.name) if known else IGNORE
            assert tables["cityscapes_16"][label.id] == wanted, label.name
    assert (tables["cityscapes"][34:] == -1).all()
    assert tables["camvid"][[0, 10, 11, 12]].tolist() == [0, 10, IGNORE, -1]


@pytest.mark.parametrize(
    "class_num, ending, suffix", [(19, "labelTrainIds", ""), (16, "labelTrainIds16", "_16")]
)
def test_cityscapes_is_prepared(cityscapes, capsys, class_num, ending, suffix):
    out = sound(capsys, cityscapes, "--class-num", class_num)
    rows = read_list(cityscapes / f"lists/val{suffix}.txt")
    assert rows[0] == (
        "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png",
        f"gtFine/val/munster/munster_000000_000019_gtFine_{ending}.png",
    )
    assert len(read_list(cityscapes / f"lists/train{suffix}.txt")) == 3
    official = read_label(cityscapes / rows[0][1].replace(ending, "labelIds"))
    label = read_label(cityscapes / rows[0][1], class_num)
    assert np.array_equal(label, DATA_SETS[f"cityscapes{suffix}"].table[official])
    assert "road" in out and ("terrain" in out) == (class_num == 19)
    assert out == sound(capsys, cityscapes, "--class-num", class_num)  # equal labels stay


def test_shipped_lists_are_what_is_prepared():
    for split, count in (("train", 2975), ("val", 500)):
        for suffix, ending in (("", "labelTrainIds"), ("_16", "labelTrainIds16")):
            rows = read_list(ROOT / f"splits/cityscapes/{split}{suffix}.txt")
            assert len(rows) == len(set(rows)) == count
            for picture, label in rows:
                stem = picture.removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png")
                assert stem.startswith(f"{split}/")
                assert label == f"gtFine/{stem}_gtFine_{ending}.png"


def test_readme_of_the_lists_names_what_is_there():
    text = (ROOT / "splits/README.md").read_text()
    named = []
    for row in re.findall(r"^\| (`.*?\.txt`) \|", text, re.MULTILINE):
        files = [Path(file) for file in re.findall(r"`(.*?)`", row)]
        named += [files[0].parent / file.name for file in files]
    assert len(named) == 12 and all((ROOT / "splits" / path).is_file() for path in named)


def test_training_labels_may_be_absent_as_a_whole(cityscapes, capsys):
    shutil.rmtree(cityscapes / "gtFine/train")
    out = sound(capsys, cityscapes)
    assert "no labels here" in out and len(read_list(cityscapes / "lists/train.txt")) == 3


def label_of(root, split="val"):
    return sorted((root / f"gtFine/{split}").rglob("*labelIds.png"))[0]


def image_of(root):
    return sorted((root / "leftImg8bit/val").rglob("*.png"))[0]


def other_train_ids(root):
    name = label_of(root).name.replace("labelIds", "labelTrainIds")
    blocks(label_of(root).with_name(name), [0], HEIGHT, WIDTH)


BROKEN = [
    (lambda root: image_of(root).unlink(), ["1 val images", "is the label of no image"]),
    (lambda root: label_of(root).unlink(), ["munster_000000_000019_leftImg8bit.png: has no label"]),
    (lambda root: label_of(root, "train").unlink(), ["has no label"]),
    (lambda root: blocks(label_of(root), range(34), 512, 1024), ["is 1024x512, its image 2048x"]),
    (lambda root: image(image_of(root), 512, 1024), ["is 1024x512, the official images are 2048x"]),
    (lambda root: image(label_of(root), HEIGHT, WIDTH), ["this one is RGB"]),
    (lambda root: truncate(label_of(root), -300), ["the label map cannot be read"]),
    (lambda root: truncate(image_of(root), -300), ["the image cannot be read"]),
    (lambda root: image_of(root).write_bytes(b"<html>"), ["the image cannot be read"]),
    (lambda root: blocks(label_of(root), [77], HEIGHT, WIDTH), ["77, which no official label ID"]),
    (other_train_ids, ["differs from what"]),
]


@pytest.mark.parametrize("spoil, told", BROKEN, ids=[told[0] for _, told in BROKEN])
def test_broken_cityscapes_is_told_in_one_line_each(cityscapes, capsys, spoil, told):
    spoil(cityscapes)
    code, _, err = prepare(capsys, cityscapes)
    assert code == 2 and "Traceback" not in err and not (cityscapes / "lists").exists()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("problem: ")]
    assert len(lines) == len(told)
    for text in told:
        assert any(text in line for line in lines), (text, lines)
    # the file, and after the semicolon the mend
    assert ";" in lines[0] and str(cityscapes) in lines[0]


def test_counts_are_the_official_ones_by_default(cityscapes, capsys):
    folders = ("--root-path", cityscapes, "--out", cityscapes / "lists")
    code, _, err = run(capsys, "cityscapes", *folders)
    assert code == 2 and "3 train images, the official set has 2975" in err and "has 500" in err
    code, _, err = run(capsys, "bdd", "--root-path", cityscapes / "nothing")
    assert code == 2 and "no such folder" in err and "berkeley" in err


@pytest.mark.parametrize("base", ["", "bdd100k/"])
@pytest.mark.parametrize(
    "images, labels, ending",
    [
        ("images/10k", "labels/sem_seg/masks", ".png"),
        ("seg/images", "seg/labels", "_train_id.png"),
    ],
)
def test_both_layouts_of_bdd(tmp_path, capsys, base, images, labels, ending):
    for split in ("train", "val"):
        for name in ("a", "b"):
            image(tmp_path / base / images / split / f"{name}.jpg", 720, 1280)
            blocks(tmp_path / base / labels / split / f"{name}{ending}", [0, 18, 255], 720, 1280)
    out = sound(capsys, tmp_path, data="bdd", expect=(2, 2))
    row = (f"{base}{images}/train/a.jpg", f"{base}{labels}/train/a{ending}")
    assert read_list(tmp_path / "lists/train.txt")[0] == row and "no pixel of it" in out
    blocks(tmp_path / base / labels / "val" / f"b{ending}", [7, 33], 720, 1280)
    code, _, err = prepare(capsys, tmp_path, data="bdd", expect=(2, 2))
    assert code == 2 and "train IDs of Cityscapes' label IDs" in err


def write_bdd(root, split, numbers, label=(720, 1280), size=(720, 1280)):
    """Images of these numbers; label: the size of their labels, None: they have none."""
    for i in numbers:
        image(root / f"images/10k/{split}/{split}{i}.jpg", *size)
        if label:
            blocks(root / f"labels/sem_seg/masks/{split}/{split}{i}.png", [0, 255], *label)


@pytest.fixture
def bdd(tmp_path):
    """Four training and three validation images, sound."""
    write_bdd(tmp_path, "train", range(4))
    write_bdd(tmp_path, "val", range(3))
    return tmp_path


def names(path):
    return [Path(picture).name for picture, _ in read_list(path)]


def test_bdd_with_its_gaps(bdd, capsys):
    """Training images without labels and portrait images stay, what cannot be used is left out."""
    write_bdd(bdd, "train", [4], label=None)
    write_bdd(bdd, "train", [5], label=(1280, 720), size=(1280, 720))  # portrait, and they agree
    write_bdd(bdd, "train", [6], size=(1280, 720))
    write_bdd(bdd, "val", [3], label=None)
    out = sound(capsys, bdd, data="bdd", expect=(7, 4))
    assert names(bdd / "lists/train.txt") == [f"train{i}.jpg" for i in range(6)]
    assert names(bdd / "lists/val.txt") == [f"val{i}.jpg" for i in range(3)]
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    told = (
        "1 of 7 train images have no label; they are listed",
        "train6.png: is 1280x720, its image 720x1280; a label has the size of its image; left",
        "val3.jpg: has no label; left out",
    )
    assert len(notes) == 3 and all(text in note for note, text in zip(notes, told))


def test_bdd_that_lacks_more_is_refused(bdd, capsys):
    shutil.rmtree(bdd / "labels/sem_seg/masks/val")
    for expect, told in (
        ((4, 3), "3 of 3 val images have no usable label; unpack BDD100K"),
        ((5, 3), "4 train images, the official set has 5; unpack"),  # said by the user: exact
        ((4, 3), "is 640x360, the official images are 1280x720"),
    ):
        if "640x360" in told:
            image(bdd / "images/10k/train/train0.jpg", 360, 640)
        code, _, err = prepare(capsys, bdd, data="bdd", expect=expect)
        assert code == 2 and told in err and not (bdd / "lists").exists()


@pytest.mark.parametrize("found, accepted", [(6996, True), (6930, True), (6929, False), (7001, 0)])
def test_counts_of_bdd(monkeypatch, capsys, found, accepted):
    pairs = [prepare_data.Pair(f"{i}.jpg", f"{i}.png", f"{i}.png") for i in range(found)]
    monkeypatch.setattr(prepare_data, "pairs_of", lambda *_: (pairs, []))
    _, problems = prepare_data.check_pairing(Path("none"), DATA_SETS["bdd"], "train", None)
    notes = capsys.readouterr().out.splitlines()
    assert bool(problems) != bool(accepted) and bool(notes) == bool(accepted)
    [told] = problems + notes
    assert f"{found} train images, the official set has 7000" in told


# ----------------------------------------------------------------------- links, hidden files, .PNG


def real_disk(root, away):
    """Folders and files are links, some lead in a circle; hidden files lie about; upper case."""
    for path in sorted(root.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"of macOS")
        (path.parent / ".cache").mkdir(exist_ok=True)
        (path.parent / ".cache" / path.name).write_bytes(b"of a viewer")
        (away / path.name).symlink_to(path.rename(away / f"{path.stem}_elsewhere.png"))
        path.with_suffix(".PNG").symlink_to(away / path.name)
    for folder in [path for path in root.glob("*/*/*") if path.is_dir()]:
        there = folder.rename(away / "_".join(folder.relative_to(root).parts))
        folder.symlink_to(there)
        (there / "back").symlink_to(there)


def test_layouts_of_real_disks(cityscapes, tmp_path, capsys):
    images = [path.relative_to(cityscapes) for path in sorted(cityscapes.glob("left*/*/*/*.png"))]
    (tmp_path / "away").mkdir()
    real_disk(cityscapes, tmp_path / "away")
    sound(capsys, cityscapes)
    rows = [row for x in ("train", "val") for row in read_list(cityscapes / f"lists/{x}.txt")]
    assert [picture for picture, _ in rows] == [str(path.with_suffix(".PNG")) for path in images]
    for picture, label in rows:
        assert (cityscapes / picture).is_file() and label.endswith("_gtFine_labelTrainIds.png")
        assert read_label(cityscapes / label, 19).shape == (HEIGHT, WIDTH)
    assert layouts.missing_data("cityscapes", cityscapes) == []
    shutil.rmtree(cityscapes / "gtFine/val")
    [(what, where)] = layouts.missing_data("cityscapes", cityscapes)
    files = "0 of 500 files *_gtFine_labelIds.png, for evaluation"
    assert what == f"{cityscapes}/gtFine/val: {files}"
    assert where.endswith(f"(cityscapes-dataset.com, login), unpacked in {cityscapes}")


def test_camvid(tmp_path, capsys):
    for name in ("a", "b"):
        image(tmp_path / f"train/{name}.png", 360, 480)
        blocks(tmp_path / f"trainannot/{name}.png", range(12), 360, 480)
    out = sound(capsys, tmp_path, data="camvid", expect=(2,))
    (_, label), _ = read_list(tmp_path / "lists/train.txt")
    made, official = read_label(tmp_path / label, 11), read_label(tmp_path / "trainannot/a.png")
    assert np.array_equal(made, np.where(official == 11, 255, official)) and "bicyclist" in out


# --------------------------------------------------------------------------------- lists of our own


@pytest.fixture
def listed(tmp_path):
    """A root with two images and pseudo-labels, and the path of their list."""
    for name in ("x", "y"):
        image(tmp_path / f"images/{name}.png", 32, 64)
        blocks(tmp_path / f"pix/{name}.png", [0, 18, 255], 32, 64)
    (tmp_path / "list.txt").write_text("images/x.png pix/x.png\nimages/y.png pix/y.png\n")
    return tmp_path


def edit(change):
    """What spoils a list: its bytes are replaced by change(bytes)."""
    return lambda root: (root / "list.txt").write_bytes(change((root / "list.txt").read_bytes()))


LISTS = [
    (lambda root: None, ""),
    (lambda root: (root / "images/x.png").unlink(), "images/x.png: no such file"),
    (lambda root: (root / "pix/x.png").unlink(), "pix/x.png: no such file"),
    (lambda root: blocks(root / "pix/x.png", [0], 32, 32), "do not show the same as the 64x32"),
    (
        lambda root: blocks(root / "pix/x.png", [7, 26], 32, 64),
        "train IDs of Cityscapes' label IDs",
    ),
    (lambda root: image(root / "pix/x.png", 32, 64), "this one is RGB"),
    (lambda root: truncate(root / "pix/x.png", 60), "pix/x.png"),
    (edit(lambda b: b.replace(b"\n", b"\r\n")), "Windows line ends"),
    (edit(lambda b: b.replace(b"\n", b"\n\n", 1)), "line 2: is blank"),
    (edit(lambda b: b.replace(b"\n", b" more\n", 1)), "line 1: 3 columns"),
    (edit(lambda b: b + b), "x.png is in line 1 already"),
    (edit(lambda b: b""), "the list is empty"),
]


@pytest.mark.parametrize("spoil, told", LISTS, ids=[told or "sound" for _, told in LISTS])
def test_a_list_is_sound_or_broken_in_one_line(listed, capsys, spoil, told):
    spoil(listed)
    code, out, err = run(
        capsys, "list", "--id-list-path", listed / "list.txt", "--root-path", listed
    )
    assert code == (2 if told else 0) and told in err and "Traceback" not in err
    assert ("sound" in out) == (not told)


# ---------------------------------------------------------------------------------------- downloads


def download(tmp_path, *arguments, path="", **environment):
    """(exit code, all that is printed) of download.sh."""
    environment["PATH"] = f"{path}{os.environ['PATH']}"
    environment = {**os.environ, "SAM_DIR": str(tmp_path / "sam"), **environment}
    command = ["bash", str(ROOT / "scripts/download.sh"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_download_does_nothing_unasked(tmp_path):
    code, text = download(tmp_path)
    assert code == 0 and "login" in text and not list(tmp_path.iterdir())
    assert download(tmp_path, "nonsense")[0] == 2


def test_download_checks_what_it_gets(tmp_path):
    (tmp_path / "server").mkdir()
    (tmp_path / "server/sam_vit_b_01ec64.pth").write_bytes(b"not the weights")
    sam = {"SAM_URL": f"file://{tmp_path}/server"}
    code, text = download(tmp_path, "sam", "vit_b", **sam)
    assert code == 2 and "MD5" in text and not list((tmp_path / "sam").glob("*.pth"))
    # A stand-in for md5sum that says what the official file's would: the file is then kept, and not
    # fetched again.
    tool = tmp_path / "server/md5sum"
    tool.write_text("#!/bin/sh\necho 01ec6400000000000000000000000000\n")
    tool.chmod(0o755)
    sam["path"] = f"{tmp_path}/server:"
    assert download(tmp_path, "sam", "vit_b", **sam)[0] == 0
    assert (tmp_path / "sam/sam_vit_b_01ec64.pth").read_bytes() == b"not the weights"
    code, text = download(tmp_path, "sam", "vit_b", **sam | {"SAM_URL": "file:///nowhere"})
    assert code == 0 and "there already" in text
