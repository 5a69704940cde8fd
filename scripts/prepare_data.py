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
         prepared.json (prepared_16.json) beside them: of the same files, nothing is done again

Checked: counts (of a subset on purpose --expect tells them), pairing, sizes, every image and label
decodes, allowed values, pixels per class. One line per problem, with the mend, on stderr; exit code
2, and then no list is written. No stage needs labels of the training images; they may be absent
altogether.

BDD100K is published with gaps: some images lack a label, some are portrait. A training image
without a label is listed. Left out, with a note, are validation images without a label and images
whose label has another size. Up to 1 % of a split, or ten images, may be short or left out.

Copied away, this file needs util/ and scripts/lib/layouts.py.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
    check_files,
    check_label_values,
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
from util.outputs import made_before, made_from, write_json
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


@dataclass
class Checked:
    """The pairs of a split or of a list, and what the checks found in them: lines that stop the
    work, lines that do not, images to leave out, pixels per label value.
    """

    pairs: list[Pair]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))


class UnequalSizes(UserError):
    """Image and label do not belong together; in a data set with gaps the image is left out."""


def check_pairing(root: Path, data: DataSet, split: str, stated: int | None) -> Checked:
    """Counts and pairing. stated: the number of images that the user gave with --expect.

    Training labels may be absent as a whole; in part only in a data set with gaps.
    """
    pairs, orphans = pairs_of(data, root, split)
    found, expected = Checked(pairs), data.counts[split] if stated is None else stated
    mend = f"unpack {data.source} here again"
    if len(pairs) != expected:
        count = f"{root}: {len(pairs)} {split} images, the official set has {expected}"
        if data.has_gaps and stated is None and 0 < expected - len(pairs) <= few(expected):
            found.notes.append(f"{count}; going on with these")
        else:
            subset = "a subset on purpose: say its size with --expect"
            found.problems.append(f"{count}; {mend} ({subset})")
    if split in data.unlabeled:
        return found
    without = [pair for pair in pairs if not (pair.official or (root / pair.label).is_file())]
    lines = [f"{root / label}: is the label of no image" for label in orphans]
    if split == "train" and (data.has_gaps or len(without) == len(pairs)):
        if without:
            count = f"{len(without)} of {len(pairs)} {split} images have no label"
            found.notes.append(f"{root}: {count}; they are listed, no stage needs it")
    else:
        lines += [f"{root / pair.image}: has no label" for pair in without]
        found.left_out |= {pair.image for pair in without}
    told, mend = (found.notes, "left out") if data.has_gaps else (found.problems, mend)
    told += [f"{line}; {mend}" for line in lines]
    return found


def prepared_label(root: Path, data: DataSet, pair: Pair) -> np.ndarray | None:
    """Check one image and its official label, and write the train-ID label. UserError tells what is
    wrong. Returns the train IDs (uint8 H x W), or None without a label.
    """
    shape = read_image(root / pair.image).shape[:2]
    turned = data.has_gaps and shape == data.size[::-1]
    if data.size and shape != data.size and not turned:
        raise UserError(
            f"{root / pair.image}: is {shape[1]}x{shape[0]}, the official images are"
            f" {data.size[1]}x{data.size[0]}; use the full-size download"
        )
    if pair.official is None and not (pair.label and (root / pair.label).is_file()):
        return None
    target, source = root / pair.label, root / (pair.official or pair.label)
    label = read_label(source)
    if label.shape != shape:
        raise UnequalSizes(
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


def check_labels(found: Checked, check: Callable, title: str, has_gaps: bool = False) -> None:
    """Add to `found` what `check` says of every pair: it returns a label (or None) or raises.

    In threads, for Pillow decodes outside Python's lock. has_gaps: pairs of unequal sizes are left
    out.
    """

    def attempt(pair: Pair) -> np.ndarray | UserError | None:
        try:
            label = check(pair)
        except UserError as error:
            return error
        return None if label is None else pixels_of_values(label)

    pairs = [pair for pair in found.pairs if pair.image not in found.left_out]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = progress(pool.map(attempt, pairs), title, len(pairs))
        for pair, result in zip(pairs, results):
            if isinstance(result, UnequalSizes) and has_gaps:
                found.left_out.add(pair.image)
                found.notes.append(f"{result}; left out")
            elif isinstance(result, UserError):
                found.problems.append(str(result))
            elif result is not None:
                found.histogram += result


def check_list(path: Path, root: Path, classes: ClassSet) -> None:
    """Check a list of ours: its form, that images and labels are there, decode, pair up and hold
    train IDs.
    """
    found = Checked([Pair(image, label, label) for image, label in read_list(path)])
    text = path.read_bytes()
    if b"\r" in text:
        stumbles = "has Windows line ends; other UniMatch code stumbles over them"
        found.problems.append(f"{path}: {stumbles}; mend: sed -i 's/\\r$//' {path}")
    if b"" in (lines := [line.strip() for line in text.splitlines()]):
        blank = "is blank; other UniMatch code stumbles over it; remove the line"
        found.problems.append(f"{path}, line {lines.index(b'') + 1}: {blank}")
    check_labels(found, partial(listed_label, root, classes), path.name)
    stop_at(found.problems)
    check_classes(found.histogram, classes.count, path)
    print_histogram(f"{path}", found.histogram, classes)
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
    if len(set(sources.values())) < len(images):
        raise UserError(f"{options.id_list_path}: images of one name would share a label map")
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


def prepare_split(root: Path, data: DataSet, name: str, split: str, found: Checked) -> None:
    """Check a split's files, make its labels, and say what is in them. name: of the data set."""
    check_labels(found, partial(prepared_label, root, data), f"{name} {split}", data.has_gaps)
    count = len(found.pairs)
    print_histogram(f"{name} {split}, {count} images", found.histogram, data.classes)
    lacking = len(found.left_out)
    if lacking == count or lacking > few(data.counts[split]):
        found.problems.append(
            f"{root}: {lacking} of {count} {split} images have no usable label; unpack"
            f" {data.source} here again"
        )
    tell("note", found.notes)


def prepare(options: DataSetOptions) -> None:
    """Check and prepare one data set, split by split; the lists are written when all splits are
    sound. What was prepared before from the same files is found.
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
    found = {split: check_pairing(root, data, split, n) for split, n in zip(splits, stated)}
    # before the long work of decoding everything
    stop_at([line for checked in found.values() for line in checked.problems])
    folder = options.out or Path("splits") / name
    record, settings = folder / f"prepared{data.suffix}.json", {"data": name, "expect": stated}
    lists = {split: folder / f"{split}{data.suffix}.txt" for split in lists_of(found)}
    source = lambda: made_from(settings, files_of(root, found, lists))
    if all(path.is_file() for path in (record, *lists.values())) and made_before(record, source()):
        print(f"{', '.join(map(str, lists.values()))}: checked before, nothing has changed")
        return
    for split, checked in found.items():
        prepare_split(root, data, name, split, checked)
    stop_at([line for checked in found.values() for line in checked.problems])
    if name == "acdc" and len(lists) == len(found):
        print("note: in this layout the conditions are unknown; there is no list of each")
    for split, rows in lists_of(found).items():
        write_list(lists[split], rows)
        print(f"{lists[split]}: {len(rows)} rows")
    write_json(record, {**manifest(vars(options)), "made_from": source()})


def files_of(root: Path, found: dict[str, Checked], lists: dict[str, Path]) -> dict[str, Path]:
    """{name: file} of all images, labels and lists of a data set."""
    pairs = [pair for checked in found.values() for pair in checked.pairs]
    names = {name for pair in pairs for name in (pair.image, pair.official, pair.label) if name}
    files = {name: root / name for name in sorted(names) if (root / name).is_file()}
    return files | {f"list {split}": path for split, path in lists.items()}


def lists_of(found: dict[str, Checked]) -> dict[str, list[tuple[str, ...]]]:
    """{name of a list: rows}: of each split, and of each condition of the validation images."""
    rows = defaultdict(list)
    for split, checked in found.items():
        for pair in checked.pairs:
            if pair.image not in checked.left_out:
                row = (pair.image, pair.label) if pair.label else (pair.image,)
                rows[split].append(row)
                if split == "val" and pair.condition:
                    rows[f"val_{pair.condition}"].append(row)
    return rows


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
