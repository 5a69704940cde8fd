"""Labels with planted noise: true labels in which a share of the connectivities gets a wrong class.
For checking SCC.

Input:   --id-list-path, lines `<image> <label>` relative to --root-path, whose labels are right.
Output:  the labels with noise in <root>/<--exp>/, their list at --out-list.

SCC must find them; its --gt, given the first list, says how well it did (AUROC, accuracy of what is
kept):

    python tests/plant_noise.py --id-list-path data/toy/s0/lists/target_train_gt.txt \\
        --out-list splits/planted/all.txt
    python seco_scc.py --id-list-path splits/planted/all.txt \\
        --gt data/toy/s0/lists/target_train_gt.txt \\
        --backbone resnet10 --backbone-weights runs/toy_release/seed0/source/latest.pth \\
        --min-area 30 --patch-size 64 128 --iterations 600 --lr 0.1
    python seco_scc.py --id-list-path splits/planted/all.txt \\
        --gt data/toy/s0/lists/target_train_gt.txt \\
        --backbone resnet10 --backbone-weights runs/toy_release/seed0/source/latest.pth \\
        --min-area 30 --recipe paper --scale 1 --iterations 600 --lr 0.05
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python tests/plant_noise.py`

import numpy as np

from util.labels import (
    check_files,
    class_set,
    connectivities,
    read_label,
    read_list,
    write_label,
    write_list,
)
from util.options import ClassOptions, CountFrom0, List, ListOptions, Pixels, Share, parse_options
from util.outputs import check_writable
from util.run import UserError, progress, run_main


@dataclass(kw_only=True)
class Options(ClassOptions, ListOptions):
    """noise"""

    out_list: List
    "list to write"
    exp: str = "planted"
    "the written labels' first folder"
    share: Share = 0.2
    "of the connectivities that get a wrong class"
    min_area: Pixels = 20
    "smaller connectivities keep their class"
    seed: CountFrom0 = 0
    "of the random numbers"


def planted(
    label: np.ndarray, class_num: int, share: float, min_area: int, random: np.random.Generator
) -> tuple[np.ndarray, int, int]:
    """(the label map with noise, connectivities of at least min_area pixels, how many of them got a
    wrong class).

    Each such connectivity gets, with chance `share`, another class, uniformly over the others.
    label: uint8 H x W.
    """
    noisy, large, wrong = label.copy(), 0, 0
    for c in connectivities(label, range(class_num)):
        if c.area >= min_area:
            large += 1
            if random.random() < share:
                noisy[c.window][c.mask] = (c.class_id + random.integers(1, class_num)) % class_num
                wrong += 1
    return noisy, large, wrong


def targets_of(rows: list[tuple[str, str]], exp: str, list_path: Path) -> list[str]:
    """Where the labels go: their paths with the first folder named `exp`; never an input's path."""
    if not exp or Path(exp).name != exp:
        raise UserError(f"--exp {exp}: give the name of a folder, without a path")
    targets = [f"{exp}/{label.partition('/')[2]}" for _, label in rows]
    taken = {name for row in rows for name in row}
    for (_, label), target in zip(rows, targets):
        if target in taken or "/" not in label:
            raise UserError(
                f"--exp {exp}: would write {label} of {list_path} over another file; give another"
                " name"
            )
        taken.add(target)
    return targets


def main(argv=None) -> None:
    options = parse_options(Options, __doc__, argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    if classes.count < 2:
        raise UserError(f"--class-num {classes.count}: a wrong class needs two classes or more")
    root, rows = options.root_path, read_list(options.id_list_path)
    targets = targets_of(rows, options.exp, options.id_list_path)
    check_files(root, [row[1] for row in rows], options.id_list_path)
    check_writable(root / options.exp)
    random, large, wrong = np.random.default_rng(options.seed), 0, 0
    for (_, label), target in zip(progress(rows, "planting"), targets):
        clean = read_label(root / label, classes.count)
        how = (classes.count, options.share, options.min_area, random)
        noisy, of_image, wrong_here = planted(clean, *how)
        write_label(root / target, noisy, classes.palette)
        large, wrong = large + of_image, wrong + wrong_here
    write_list(options.out_list, [(image, to) for (image, _), to in zip(rows, targets)])
    print(
        f"{wrong} of {large} connectivities of {options.min_area} pixels or more got a wrong class;"
        f" list: {options.out_list}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
