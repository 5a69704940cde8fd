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
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python tests/plant_noise.py`

import numpy as np

from util.labels import (
    class_set,
    connectivities,
    experiment_from,
    in_experiment,
    read_label,
    read_list,
    write_label,
    write_list,
)
from util.options import ClassOptions, CountFrom0, List, ListOptions, Pixels, Share, parse_options
from util.run import progress, run_main


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


def main(argv=None) -> None:
    options = parse_options(Options, __doc__, argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    root, rows = options.root_path, read_list(options.id_list_path)
    exp, _ = experiment_from(rows, options.id_list_path, "planted", options.exp)
    noisy_rows = [(image, in_experiment(label, exp)) for image, label in rows]
    random, large, wrong = np.random.default_rng(options.seed), 0, 0
    for (_, label), (_, target) in zip(progress(rows, "planting"), noisy_rows):
        clean = read_label(root / label, classes.count)
        how = (classes.count, options.share, options.min_area, random)
        noisy, of_image, wrong_here = planted(clean, *how)
        write_label(root / target, noisy, classes.palette)
        large, wrong = large + of_image, wrong + wrong_here
    write_list(options.out_list, noisy_rows)
    print(
        f"{wrong} of {large} connectivities of {options.min_area} pixels or more got a wrong class;"
        f" list: {options.out_list}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
