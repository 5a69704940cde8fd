#!/usr/bin/env python
"""Make train-ID labels and lists from the official downloads, and check a data set before any work
is done with it.

    python -m scripts.prepare_data cityscapes --root-path data/cityscapes
    python -m scripts.prepare_data cityscapes --root-path data/cityscapes --class-num 16
    python -m scripts.prepare_data bdd --root-path data/bdd    # acdc and camvid alike
    # check a list
    python -m scripts.prepare_data list --id-list-path splits/cityscapes/val.txt \\
        --root-path data/cityscapes
    # take over label maps that are ready: one folder of PNGs, named as the images are
    python -m scripts.prepare_data labels --id-list-path splits/acdc/train.txt \\
        --root-path data/acdc --labels pseudo_labels --exp CMA --out-list splits/acdc/CMA/train.txt

Inputs   cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and
             gtFine/{train,val}/<city>/*_gtFine_labelIds.png
         bdd, with or without a bdd100k/ folder around it:
             images/10k/{train,val}/*.jpg with labels/sem_seg/masks/{train,val}/*.png, or
             seg/images/{train,val}/*.jpg with seg/labels/{train,val}/*_train_id.png
         acdc: rgb_anon/<condition>/{train,val,test}/<recording>/*_rgb_anon.png with
             gt/<condition>/{train,val}/<recording>/*_gt_labelTrainIds.png; or flattened by
             DAFormer's commands, rgb_anon/{train,val}/*.png with gt/{train,val}/*.png, where the
             conditions are unknown and test may be absent
         camvid: {train,val,test}/*.png with {train,val,test}annot/*.png (SegNet's copy)
         Links are followed, hidden files (`._x.png`) passed over; endings may be in upper case.
Outputs  cityscapes: *_gtFine_labelTrainIds.png (*_labelTrainIds16.png for SYNTHIA's 16 classes)
             beside the official labels; camvid: {train,val,test}labels/*.png; bdd, acdc: no labels,
             the official ones are train IDs already
         lists in --out (default: splits/<data set>): train.txt, val.txt (train_16.txt, val_16.txt
         for 16 classes); acdc: test.txt too, of images alone, and val_<condition>.txt

Checked: counts (of a subset on purpose --expect tells them), pairing, sizes, every image and label
decodes, allowed values, pixels per class. One line per problem, with the mend, on stderr; exit code
2, and then no list is written. No stage needs labels of the training images; they may be absent
altogether.

BDD100K is published with gaps: some images lack a label, some are portrait. A training image
without a label is listed. Left out, with a note, are validation images without a label and images
whose label has another size. Up to 1 % of a split, or ten images, may be short or left out.

Copied away, this file needs util/, scripts/lib/layouts.py and splits/camvid/classes.txt.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np

from scripts.lib.layouts import OFFICIAL, Official, few
from util.labels import (
    CITYSCAPES_19,
    IDS_16_IN_19,
    IGNORE,
    LABEL_IDS_OF_19,
    SYNTHIA_16,
    ClassSet,
    check_classes,
    check_experiment,
    check_files,
    check_label_values,
    check_one_each,
    check_same_shape,
    chosen_classes,
    image_size,
    in_experiment,
    pixels_of_values,
    read_classes,
    read_image,
    read_label,
    read_list,
    write_classes,
    write_label,
    write_list,
)
from util.options import ClassOptions, Count, Folder, List, ListOptions, parse_options
from util.outputs import write_json
from util.run import UserError, manifest, progress, run_main

LINES_SHOWN = 20  # problems printed before the rest is counted only


def value_table(values: Sequence[int], void: Iterable[int]) -> np.ndarray:
    """int16 256: official value → train ID, its place in `values`; 255 for other void ones; -1 for
    values that no official label has.
    """
    table = np.full(256, -1, dtype=np.int16)
    table[list(void)] = IGNORE
    table[list(values)] = np.arange(len(values))
    return table


# ------------------------------------------------------------------------------------ the data sets


@dataclass(frozen=True, kw_only=True)
class DataSet(Official):
    """Official files, and what their labels are. table: `value_table`, of those that are no train
    IDs.
    """

    classes: ClassSet = CITYSCAPES_19
    table: np.ndarray | None = None


CAMVID = read_classes(Path(__file__).resolve().parents[1] / "splits/camvid/classes.txt")
LABELS = {
    "cityscapes": {"table": value_table(LABEL_IDS_OF_19, void=range(34))},
    "cityscapes_16": {
        "table": value_table([LABEL_IDS_OF_19[i] for i in IDS_16_IN_19], void=range(34)),
        "classes": SYNTHIA_16,
    },
    "camvid": {"table": value_table(range(11), void=(11, IGNORE)), "classes": CAMVID},
}
DATA_SETS = {x: DataSet(**vars(OFFICIAL[x]), **LABELS.get(x, {})) for x in OFFICIAL}


@dataclass(frozen=True)
class Pair:
    """One image: its path, the official label (None if there is none) and the train-ID label (None
    where none is published), relative to the root; its condition, where it is known.
    """

    image: str
    official: str | None
    label: str | None
    condition: str = ""


def pairs_of(data: DataSet, root: Path, split: str) -> tuple[list[Pair], list[str]]:
    """Pairs of a split, and labels that belong to no image."""
    layout = data.layout(root, split)
    images = layout.files(root, "images", split)
    if split in data.unlabeled:
        return [Pair(image, None, None, key[0]) for key, image in images.items()], []
    labels = layout.files(root, "labels", split)
    folder, ending = layout.made or layout.labels
    pairs = []
    for (condition, name), image in images.items():
        made = f"{folder.format(split=split, condition=condition)}/{name}{ending}"
        official = labels.get((condition, name))
        pairs.append(Pair(image, official, made if layout.made else official or made, condition))
    return pairs, [label for key, label in labels.items() if key not in images]


# ------------------------------------------------------------------------------------------- checks


class LeftOut(UserError):
    """What is wrong with an image that is left out, since its data set is published with such."""


def check_pairing(
    root: Path, data: DataSet, split: str, stated: int | None
) -> tuple[list[Pair], list[str]]:
    """Pairs of a split, and a line for each problem with their number and with what is paired.

    stated: the number of images that the user gave with --expect. Training labels may be absent as
    a whole. In a data set with gaps pairs may lack their label.
    """
    pairs, orphans = pairs_of(data, root, split)
    expected, problems = data.counts[split] if stated is None else stated, []
    mend = f"unpack {data.source} here again"
    if len(pairs) != expected:
        count = f"{root}: {len(pairs)} {split} images, the official set has {expected}"
        if data.has_gaps and stated is None and 0 < expected - len(pairs) <= few(expected):
            print(f"note: {count}; going on with these")
        else:
            subset = "a subset on purpose: say its size with --expect"
            problems.append(f"{count}; {mend} ({subset})")
    if split in data.unlabeled:
        return pairs, problems
    without = [pair for pair in pairs if not has_label(root, pair)]
    if data.has_gaps:
        if without and split == "train":
            count = f"{len(without)} of {len(pairs)} {split} images have no label"
            print(f"note: {root}: {count}; they are listed, no stage needs it")
        return pairs, problems
    if split == "train" and len(without) == len(pairs):
        without = []
    lines = [f"{root / label}: is the label of no image" for label in orphans]
    lines += [f"{root / pair.image}: has no label" for pair in without]
    return pairs, problems + [f"{line}; {mend}" for line in lines]


def has_label(root: Path, pair: Pair) -> bool:
    """Whether an image has its official label or at least the train-ID label made of it."""
    return bool(pair.official or pair.label and (root / pair.label).is_file())


def prepared_label(root: Path, data: DataSet, split: str, pair: Pair) -> np.ndarray | None:
    """Check one image and its official label, and write the train-ID label. Returns the train IDs
    (uint8 H x W), or None without a label, which only evaluation needs.

    UserError tells what is wrong; in a data set with gaps it is LeftOut for an image that lacks its
    label or has one of another size.
    """
    unusable = LeftOut if data.has_gaps else UserError
    shape = read_image(root / pair.image).shape[:2]
    turned = data.has_gaps and shape == data.size[::-1]
    if data.size and shape != data.size and not turned:
        raise UserError(
            f"{root / pair.image}: is {shape[1]}x{shape[0]}, the official images are"
            f" {data.size[1]}x{data.size[0]}; use the full-size download"
        )
    if not has_label(root, pair):
        if split == "val":
            raise unusable(f"{root / pair.image}: has no label")
        return None
    target, source = root / pair.label, root / (pair.official or pair.label)
    label = read_label(source)
    if label.shape != shape:
        raise unusable(
            f"{source}: is {label.shape[1]}x{label.shape[0]}, its image {shape[1]}x{shape[0]}; a"
            " label has the size of its image"
        )
    if data.table is None or pair.official is None:
        check_label_values(label, data.classes.count, target)
        return label
    train_ids = data.table[label]
    if (train_ids < 0).any():
        raise UserError(
            f"{source}: holds the value {label[train_ids < 0].flat[0]}, which no official label ID"
            " has; fetch the official label again"
        )
    train_ids = train_ids.astype(np.uint8)
    write_once(target, train_ids, pair.official, data.classes)
    return train_ids


def write_once(path: Path, label: np.ndarray, source: str | Path, classes: ClassSet) -> None:
    """Write a label map; one that is there must be equal. source: what it is made from."""
    if not path.is_file():
        write_label(path, label, classes.palette)
    elif not np.array_equal(read_label(path), label):
        raise UserError(f"{path}: differs from what {source} gives; remove it and run this again")


def listed_label(root: Path, classes: ClassSet, pair: Pair) -> np.ndarray:
    """Check one image of a list and its label, which has the image's aspect ratio; returns it."""
    image, path = root / pair.image, root / pair.label
    size, label = read_image(image).shape[:2], read_label(path, classes.count)
    check_same_shape(path, label.shape, image, size)
    return label


def check_labels(
    pairs: list[Pair], check: Callable, title: str
) -> tuple[list[Pair], np.ndarray, list[str]]:
    """Check every pair, in threads, for Pillow decodes outside Python's lock.

    check: of a pair; returns its label, or None if it has none, or raises a UserError. Returns the
    pairs that are not left out, the pixels of each value in their labels (int64 256), and a line
    for each problem.
    """

    def attempt(pair: Pair) -> np.ndarray | UserError:
        try:
            label = check(pair)
        except UserError as error:
            return error
        return np.zeros(256, dtype=np.int64) if label is None else pixels_of_values(label)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(progress(pool.map(attempt, pairs), title, len(pairs)))
    tell("note", [f"{result}; left out" for result in results if isinstance(result, LeftOut)])
    kept = [(p, result) for p, result in zip(pairs, results) if not isinstance(result, LeftOut)]
    problems = [str(result) for _, result in kept if isinstance(result, UserError)]
    histogram = np.zeros(256, dtype=np.int64)
    histogram += sum(result for result in results if isinstance(result, np.ndarray))
    return [pair for pair, _ in kept], histogram, problems


def check_list(path: Path, root: Path, classes: ClassSet) -> None:
    """Check a list of ours: its form, that images and labels are there, decode, pair up and hold
    train IDs.
    """
    pairs = [Pair(image, label, label) for image, label in read_list(path)]
    _, histogram, problems = check_labels(pairs, partial(listed_label, root, classes), path.name)
    text = path.read_bytes()
    if b"\r" in text:
        stumbles = "has Windows line ends; other UniMatch code stumbles over them"
        problems.append(f"{path}: {stumbles}; mend: sed -i 's/\\r$//' {path}")
    if b"" in (lines := [line.strip() for line in text.splitlines()]):
        blank = "is blank; other UniMatch code stumbles over it; remove the line"
        problems.append(f"{path}, line {lines.index(b'') + 1}: {blank}")
    stop_at(problems)
    check_classes(histogram, classes.count, path)
    print_histogram(f"{path}", histogram, classes)
    print(f"{path}: sound")


# ------------------------------------------------------------------------------------ ready labels


def take_labels(options: LabelOptions) -> None:
    """Copy the label maps of one folder to <root>/<exp>, where the stages have theirs, and write
    their list.
    """
    root, classes, exp = options.root_path, chosen_classes(options), options.exp
    images = [row[0] for row in read_list(options.id_list_path, (1, 2))]
    check_files(root, images, options.id_list_path)
    sources = {image: options.labels / Path(image).with_suffix(".png").name for image in images}
    if missing := [path for path in sources.values() if not path.is_file()]:
        count = f"{len(missing)} of {len(images)} images lack theirs"
        raise UserError(f"{missing[0]}: no such label map ({count}); it is named as its image")
    check_experiment(exp, images)
    check_one_each(sources, "label map")
    rows = []
    for image, source in progress(sources.items(), "labels"):
        label = read_label(source, classes.count)
        check_same_shape(source, label.shape, root / image, image_size(root / image))
        path = str(PurePosixPath(in_experiment(image, exp)).with_suffix(".png"))
        write_once(root / path, label, source, classes)
        rows.append((image, path))
    write_classes(root / exp, classes)
    write_list(options.out_list, rows)
    write_json(root / exp / "run.json", manifest(vars(options)))  # by which a page finds them
    print(f"{options.out_list}: {len(rows)} labels of {options.labels}, in {root / exp}")


# ------------------------------------------------------------------------------------------ reports


def print_histogram(title: str, histogram: np.ndarray, classes: ClassSet) -> None:
    total = histogram.sum()
    if not total:
        print(f"{title}: no labels here (only evaluation and diagnostics need them)")
        return
    print(f"{title}: share of the pixels per class")
    names = (*classes.names, "no label")
    for name, pixels in zip(names, (*histogram[: classes.count], histogram[IGNORE])):
        note = "" if pixels or name == "no label" else "   no pixel of it"
        print(f"  {name:<14} {100 * pixels / total:7.3f} %{note}")


def tell(kind: str, lines: list[str], file=None) -> None:
    """Print the first lines, and how many more there are."""
    for line in lines[:LINES_SHOWN]:
        print(f"{kind}: {line}", file=file)
    if len(lines) > LINES_SHOWN:
        print(f"{kind}: {len(lines) - LINES_SHOWN} more of these", file=file)


def stop_at(problems: list[str]) -> None:
    if problems:
        tell("problem", problems, sys.stderr)
        raise UserError(f"problems in the data: {len(problems)}; nothing was listed")


# --------------------------------------------------------------------------------------------- main


def prepare(options: DataSetOptions) -> None:
    """Check and prepare one data set, split by split; the lists are written when all splits are
    sound.
    """
    name, root = options.data, options.root_path
    data = DATA_SETS[f"{name}_16" if getattr(options, "class_num", 19) == 16 else name]
    splits = [x for x in data.counts if x not in data.optional or pairs_of(data, root, x)[0]]
    splits = splits or list(data.counts)
    stated = options.expect or [None] * len(splits)
    if len(stated) != len(splits):
        raise UserError(f"--expect: give {len(splits)} numbers, for {', '.join(splits)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put {data.source} there")
    found, problems = {}, []
    for split, number in zip(splits, stated):
        found[split], lines = check_pairing(root, data, split, number)
        problems += lines
    stop_at(problems)  # before the long work of decoding everything
    for split, pairs in found.items():
        title, check = f"{name} {split}", partial(prepared_label, root, data, split)
        found[split], histogram, lines = check_labels(pairs, check, title)
        print_histogram(f"{title}, {len(pairs)} images", histogram, data.classes)
        problems += lines
        lacking = len(pairs) - len(found[split])
        if not found[split] or lacking > few(data.counts[split]):
            problems.append(
                f"{root}: {lacking} of {len(pairs)} {split} images have no usable label; unpack"
                f" {data.source} here again"
            )
    stop_at(problems)
    lists = dict(found)
    for pair in found.get("val", []):
        if pair.condition:
            lists.setdefault(f"val_{pair.condition}", []).append(pair)
    if name == "acdc" and len(lists) == len(found):
        print("note: in this layout the conditions are unknown; there is no list of each")
    for part, pairs in lists.items():
        path = (options.out or Path("splits") / name) / f"{part}{data.suffix}.txt"
        write_list(path, [tuple(filter(None, (pair.image, pair.label))) for pair in pairs])
        print(f"{path}: {len(pairs)} rows")


@dataclass(kw_only=True)
class DataSetOptions:
    """data set"""

    root_path: Folder
    "folder that the official downloads are unpacked in"
    out: Annotated[Folder, "--lists"] | None = None
    "folder for the lists (default: splits/<data set>)"
    expect: list[Count] | None = None
    "images per split, if it is a subset on purpose (default: the official counts)"


@dataclass(kw_only=True)
class CityscapesOptions(DataSetOptions):
    """classes"""

    class_num: Literal[19, 16] = 19
    "19 train IDs, or SYNTHIA's 16"


@dataclass(kw_only=True)
class CheckOptions(ClassOptions):
    """list"""

    id_list_path: Annotated[List, "--list"]
    "list of images and labels"
    root_path: Folder = Path("data")
    "folder that the list's paths start from"


@dataclass(kw_only=True)
class LabelOptions(ListOptions, ClassOptions):
    """ready labels"""

    labels: Folder
    "one folder with all label maps, <image name>.png"
    exp: str
    "name of the experiment: the labels' first folder"
    out_list: List
    "list to write, rows `<image> <label>`"


COMMANDS = {
    "cityscapes": CityscapesOptions,
    **dict.fromkeys(("bdd", "acdc", "camvid"), DataSetOptions),
    "labels": LabelOptions,
    "list": CheckOptions,
}


def parse_args(argv: list[str] | None = None) -> DataSetOptions | CheckOptions | LabelOptions:
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=COMMANDS, help="what to prepare or check; each has --help")
    data = parser.parse_args(argv[:1]).data
    options = parse_options(COMMANDS[data], f"prepare_data {data}", argv[1:])
    options.data = data
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    if options.data == "list":
        check_list(options.id_list_path, options.root_path, chosen_classes(options))
    elif options.data == "labels":
        take_labels(options)
    else:
        prepare(options)


if __name__ == "__main__":
    sys.exit(run_main(main))
