"""scripts/make_split.py: the ranking and the choice against a slow oracle, rare classes, files,
wrong input."""

import json
import shutil

import numpy as np
import pytest

from scripts import make_split
from util.labels import CITYSCAPES_19, IGNORE, read_label, read_list, write_label, write_list
from util.run import UserError

COUNT, RARE = 24, (5, 11, 20)  # images; those that show a train


@pytest.fixture
def root(tmp_path):
    """24 small label maps of different coverage; a train (16) in RARE only, which have few
    labels.
    """
    random, rows = np.random.default_rng(0), []
    for i in range(COUNT):
        label = random.choice([0, 2, 8, 10, 13], (20, 30)).astype(np.uint8)
        empty = 0.9 if i in RARE else random.random() * 0.6
        label[random.random(label.shape) < empty] = IGNORE
        if i in RARE:
            label[3:6, 4:9] = 16
        rows.append((f"images/a/{i:02d}.png", f"pix_scc/a/{i:02d}.png"))
        for path in rows[-1]:
            write_label(tmp_path / path, label, CITYSCAPES_19.palette)
    write_list(tmp_path / "splits/pix_scc/train.txt", rows)
    return tmp_path


def empty_labels(root, first):
    """No label in the images from number `first` on."""
    for i in range(first, COUNT):
        label = np.full((20, 30), IGNORE, np.uint8)
        write_label(root / f"pix_scc/a/{i:02d}.png", label, CITYSCAPES_19.palette)


def write_csv(root, recipe):
    """A connectivities.csv with three connectivities an image, one of them dropped; returns {image:
    expected trust}.
    """
    random, expected = np.random.default_rng(1), {}
    lines = ["image,area,score,eta,final"]
    for i in range(COUNT):
        image = f"images/a/{i:02d}.png"
        areas, values = random.integers(1, 90, 3), random.random(3)
        for area, value, final in zip(areas, values, (8, 10, IGNORE)):
            lines.append(f"{image},{area},{value},{value if recipe == 'paper' else ''},{final}")
        trusts = (1 - values if recipe == "paper" else values)[:2]
        expected[image] = (areas[:2] * trusts).sum() / areas[:2].sum()
    (root / "pix_scc/connectivities.csv").write_text("\n".join(lines) + "\n")
    return expected


def split(root, *extra):
    """The rows of both lists."""
    words = ["--id-list-path", root / "splits/pix_scc/train.txt", "--root-path", root]
    make_split.main([*map(str, [*words, "--out", root / "out"]), *extra])
    return tuple(read_list(root / "out" / name, columns=(1, 2)) for name in make_split.LISTS)


def test_choice_against_an_oracle():
    """Only common classes: simply the most reliable. With a rare one: its share first, from the
    most reliable of its images.
    """
    random = np.random.default_rng(2)
    for _ in range(50):
        reliability, pixels = random.random(20).round(1), np.zeros((20, 3), int)  # many ties
        pixels[:, 0] = 5
        best = sorted(range(20), key=lambda i: (-reliability[i], i))
        assert make_split.choose_labeled(reliability, pixels, 0.3).tolist() == best[:6]
        count, share = ((1, 1), (5, 2))[random.integers(2)]  # share: round(0.3 x count), or one
        rare = random.choice(20, count, replace=False)
        pixels[rare, 2] = 1
        first = sorted(rare, key=lambda i: (-reliability[i], i))[:share]
        rest = [i for i in best if i not in first][: 6 - len(first)]
        chosen = make_split.choose_labeled(reliability, pixels, 0.3).tolist()
        assert chosen == [i for i in best if i in {*first, *rest}]


def test_images_without_a_labeled_pixel_are_unlabeled(root, capsys):
    """Of 24 images 20 are empty: half of the images would be 12, but 4 have labels."""
    empty_labels(root, 4)
    labeled, unlabeled = split(root)
    assert sorted(row[0] for row in labeled) == [f"images/a/{i:02d}.png" for i in range(4)]
    assert len(unlabeled) == 20
    assert "20 images without a labeled pixel are unlabeled, first " in capsys.readouterr().out
    empty_labels(root, 0)
    with pytest.raises(UserError, match=r"train\.txt: no label map of it has a labeled pixel"):
        split(root)


@pytest.mark.parametrize("recipe", [None, "release", "paper"])
def test_files(root, recipe):
    trust = write_csv(root, recipe) if recipe else {}
    rows = read_list(root / "splits/pix_scc/train.txt")
    labeled, unlabeled = split(root, "--labeled-fraction", "0.25")
    assert len(labeled) == 6 and len(unlabeled) == 18
    assert {p.name for p in (root / "out").iterdir()} == {*make_split.LISTS, "split.json"}
    assert {row[0] for row in labeled} | {row[0] for row in unlabeled} == {row[0] for row in rows}
    assert all(row in rows for row in labeled) and all(len(row) == 1 for row in unlabeled)
    reliability = {}
    for image, label in rows:
        reliability[image] = (read_label(root / label) != IGNORE).mean() * trust.get(image, 1)
    for part in (labeled, unlabeled):
        values = [reliability[row[0]] for row in part]
        assert values == sorted(values, reverse=True)
    trains = {f"images/a/{i:02d}.png" for i in RARE}
    best = max(trains, key=reliability.get)  # of these three images a quarter: the best one
    others = sorted((image for image in reliability if image != best), key=reliability.get)
    assert {row[0] for row in labeled} == {best, *others[-5:]} and not trains & set(others[-5:])

    summary = json.loads((root / "out/split.json").read_text())
    assert summary["images"] == {"labeled": 6, "unlabeled": 18}
    assert summary["images_without_labels"] == []
    train, rider = summary["classes"]["train"], summary["classes"]["rider"]
    assert train["images"] == 3 and train["labeled_images"] == 1
    assert rider == {"images": 0, "labeled_images": 0}
    assert (summary["trust"] == "SCC") == (recipe is not None)


def test_a_finished_split_is_not_made_again(root, monkeypatch, capsys):
    """Of the same list, labels, table and options, while its lists are as they were written."""
    write_csv(root, "paper")
    empty_labels(root, 20)
    first, said, calls = split(root), capsys.readouterr().out, []
    real = make_split.make_split
    monkeypatch.setattr(make_split, "make_split", lambda *a: calls.append(1) or real(*a))
    assert split(root) == first and capsys.readouterr().out == said and not calls
    changes = [
        lambda: (root / "out/labeled.txt").unlink(),
        lambda: write_csv(root, "release"),
        lambda: empty_labels(root, 19),
        lambda: (root / "out/split.json").write_text("{"),
    ]
    for count, change in enumerate(changes, start=1):
        change()
        split(root)
        assert len(calls) == count
    split(root, "--labeled-fraction", "0.25")
    assert len(calls) == 1 + len(changes)


def test_the_default_folder_is_that_of_the_list_which_is_not_overwritten(root):
    train, labeled = root / "splits/pix_scc/train.txt", root / "splits/pix_scc/labeled.txt"
    rows, expected = read_list(train), split(root)[0]
    arguments = ["--root-path", str(root), "--id-list-path"]
    make_split.main([*arguments, str(train)])
    assert read_list(train) == rows and read_list(labeled) == expected
    with pytest.raises(UserError, match="labeled.txt: would be overwritten"):
        make_split.main([*arguments, str(labeled)])
    assert read_list(labeled) == expected


def test_wrong_input(root):
    for fraction, words in (("0", "a number above 0"), ("0.99", "leaves no unlabeled image")):
        with pytest.raises(UserError, match=f"--labeled-fraction {fraction}.*{words}"):
            split(root, "--labeled-fraction", fraction)
    write_csv(root, "paper")
    for new in ("new.png", "pix_scc/a/new.png"):
        shutil.copy(root / "pix_scc/a/00.png", root / new)
    train = root / "splits/pix_scc/train.txt"
    write_list(train, [*read_list(train), ("new.png", "pix_scc/a/new.png")])
    with pytest.raises(UserError, match="no labeled connectivity of new.png"):
        split(root)
    with open(root / "pix_scc/connectivities.csv", "a") as file:
        file.write("x.png,0\n")
    with pytest.raises(UserError, match="connectivities.csv, line 74: not a line of"):
        split(root)
    (root / "pix_scc/a/03.png").unlink()
    with pytest.raises(UserError, match="03.png: no such file"):
        split(root)
    write_list(train, [("images/a/00.png", "pix_scc/a/00.png")])
    with pytest.raises(UserError, match="no unlabeled image of 1"):
        split(root)
    assert not (root / "out/labeled.txt").exists()
