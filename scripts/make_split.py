"""Split the target images into a labeled and an unlabeled subset by how reliable their corrected
labels are.

Input:   --id-list-path, the list that seco_scc.py wrote (or any list `<image> <label>`);
         connectivities.csv in the labels' experiment folder, where there is one.
Output:  in --out (default: the list's folder) labeled.txt (`<image> <label>`) and unlabeled.txt
         (`<image>`), best first, and split.json: manifest, images of each class, what they
         were made from (of the same, they are not made again).

    python -m scripts.make_split --id-list-path splits/cityscapes/HRDA_seco_vit_h_scc/all.txt \\
        --root-path data/cityscapes --class-num 19

Rule: an image's reliability is its coverage (share of pixels labeled) times the mean trust of its
labeled connectivities, weighted by area; trust is 1 - eta (paper recipe) or the score (release).
Labels that SCC never saw have trust 1. For every class, rarest first, the most reliable images that
show it are taken until --labeled-fraction of them, at least one, is in; the rest of the labeled
subset are the most reliable images left. Ties keep the list's order. An image without a labeled
pixel is unlabeled.

Copied away, this file needs util/.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # for `python scripts/NAME.py`

import numpy as np

from util.labels import (
    IGNORE,
    ClassSet,
    check_files,
    check_pairs,
    chosen_classes,
    label_folder,
    read_list,
    write_list,
)
from util.options import (
    ClassOptions,
    Folder,
    ListOptions,
    Setting,
    ShareAbove0,
    parse_options,
    settings_of,
)
from util.outputs import check_writable, made_before, made_from, read_json, write_json
from util.run import UserError, manifest, run_main

LISTS = ("labeled.txt", "unlabeled.txt")
TRUST = "connectivities.csv"  # SCC's table, in the labels' experiment folder


def labeled_size(fraction: float, images: int) -> int:
    """Images in the labeled subset: the fraction, rounded, at least one."""
    return max(1, round(fraction * images))


def choose_labeled(reliability: np.ndarray, pixels: np.ndarray, fraction: float) -> np.ndarray:
    """Indices of the labeled subset, most reliable first: round(fraction x images), at least one,
    but none without a labeled pixel.

    reliability: float N; pixels: int N x K, labeled pixels of each class in each image.
    """
    ranking = np.argsort(-reliability, kind="stable")
    ranking = ranking[pixels[ranking].any(axis=1)]
    size = min(labeled_size(fraction, len(reliability)), len(ranking))
    chosen = np.zeros(len(reliability), bool)
    for class_id in np.argsort((pixels > 0).sum(axis=0), kind="stable"):
        showing = ranking[pixels[ranking, class_id] > 0]
        left = min(
            labeled_size(fraction, len(showing)) - chosen[showing].sum(), size - chosen.sum()
        )
        chosen[showing[~chosen[showing]][: max(0, left)]] = True
    chosen[ranking[~chosen[ranking]][: size - chosen.sum()]] = True
    return ranking[chosen[ranking]]


# ------------------------------------------------------------------------------------- reliability


def mean_trust(path: Path) -> dict[str, float]:
    """{image path: area-weighted mean trust of its labeled connectivities} from a
    connectivities.csv; {} without one.
    """
    if not path.is_file():
        return {}
    sums: dict[str, list[float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                area, kept = int(row["area"]), int(row["final"]) != IGNORE
                trust = 1 - float(row["eta"]) if row["eta"] else float(row["score"])
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"{path}, line {number}: not a line of seco_scc.py's; run its correction again"
                ) from None
            if kept:
                total = sums.setdefault(row["image"], [0.0, 0.0])
                total[0] += area * trust
                total[1] += area
    return {image: weighted / area for image, (weighted, area) in sums.items()}


def reliabilities(
    root: Path, rows: list[tuple[str, str]], class_num: int, list_path: Path
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Reliability of each image (float N), its labeled pixels of each class (int N x K), and
    whether SCC's trust is in it.
    """
    values = check_pairs(root, rows, list_path, class_num)
    pixels = values[:, :class_num]
    coverage = pixels.sum(axis=1) / values.sum(axis=1)
    if not coverage.any():
        raise UserError(f"{list_path}: no label map of it has a labeled pixel; nothing to split by")
    table = label_folder(root, rows) / TRUST
    trusts = mean_trust(table)
    for row, covered in zip(rows, coverage):
        if trusts and covered and row[0] not in trusts:
            raise UserError(
                f"{table}: has no labeled connectivity of {row[0]}; it belongs to another list: run"
                " seco_scc.py's correction again"
            )
    return coverage * np.array([trusts.get(row[0], 1.0) for row in rows]), pixels, bool(trusts)


@dataclass(kw_only=True)
class Options(ListOptions, ClassOptions):
    """split"""

    labeled_fraction: Setting[ShareAbove0] = 0.5
    "of the images, above 0 and below 1; the authors' logs imply about 3/8 (GTA), 1/2 (SYNTHIA),"
    "1/4 (BDD100K)"
    out: Folder | None = None
    "folder of the two lists (default: the list's own)"


def parse_args(argv: list[str] | None = None) -> Options:
    return parse_options(Options, __doc__, argv)


def make_split(options: Options, rows: list[tuple[str, str]], classes: ClassSet, out: Path) -> dict:
    """Write the two lists; returns what split.json says of them."""
    root, source = options.root_path, options.id_list_path
    reliability, pixels, trusted = reliabilities(root, rows, classes.count, source)
    labeled = choose_labeled(reliability, pixels, options.labeled_fraction)
    ranking = np.argsort(-reliability, kind="stable")
    rest = ranking[~np.isin(ranking, labeled)]
    write_list(out / LISTS[0], [rows[i] for i in labeled])
    write_list(out / LISTS[1], [(rows[i][0],) for i in rest])
    return {
        "trust": "SCC" if trusted else "none, labels not seen by SCC",
        "images": {"labeled": len(labeled), "unlabeled": len(rest)},
        "images_without_labels": [rows[i][0] for i in np.flatnonzero(~pixels.any(axis=1))],
        "classes": {
            name: {
                "images": int((pixels[:, c] > 0).sum()),
                "labeled_images": int((pixels[labeled, c] > 0).sum()),
            }
            for c, name in enumerate(classes.names)
        },
    }


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    root, rows = options.root_path, read_list(options.id_list_path)
    classes = chosen_classes(options, label_folder(root, rows))
    source, fraction = options.id_list_path, options.labeled_fraction
    out = options.out or source.parent
    if labeled_size(fraction, len(rows)) == len(rows):
        raise UserError(f"--labeled-fraction {fraction}: leaves no unlabeled image of {len(rows)}")
    if source.resolve() in [(out / name).resolve() for name in LISTS]:
        raise UserError(f"{source}: would be overwritten; choose another folder with --out")
    record, table = out / "split.json", label_folder(root, rows) / TRUST
    check_files(root, [label for _, label in rows], source)
    check_writable(out)
    inputs = {"list": source, **{label: root / label for _, label in rows}}
    inputs |= {TRUST: table} if table.is_file() else {}
    made = made_from({**settings_of(options), "classes": classes.names}, inputs)
    if made_before(record, made) and all((out / name).is_file() for name in LISTS):
        split = read_json(record)
    else:
        split = make_split(options, rows, classes, out)
        write_json(record, {**split, "manifest": manifest(vars(options)), "made_from": made})
    if without := split["images_without_labels"]:
        count, first = len(without), without[0]
        print(f"note: {count} images without a labeled pixel are unlabeled, first {first}")
    for name, counts in split["classes"].items():
        if not counts["labeled_images"]:
            print(f"note: no labeled image shows {name} ({counts['images']} images do in all)")
    counts, lists = split["images"], ", ".join(str(out / name) for name in LISTS)
    print(f"{counts['labeled']} labeled and {counts['unlabeled']} unlabeled images: {lists}")


if __name__ == "__main__":
    sys.exit(run_main(main))
