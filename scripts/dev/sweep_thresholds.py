"""The paper's Figure 6 on the quality of the labels: SCC's thresholds tau_ns and tau_cr, each over
its range.

    python -m scripts.dev.sweep_thresholds runs/ablation_toy --class-num 19

Reads, in every `<run>/seed<n>/` in which the paper's recipe of SCC has run, connectivities.csv,
PSA's labels and the target's ground truth (a diagnostic: nothing is trained with it). Nothing is
trained or written again: a threshold changes only which connectivities keep their class. Writes
`<run>/sweep.json`, `<run>/sweep.md`, `<run>/pictures/sweep.png`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np

from dataset.scc import numbered
from scripts.lib.report import LABEL_FIGURES, label_table
from scripts.lib.run_folder import label_lists, seeds_in, truth_list
from seco_scc import decide
from util.charts import line_chart, save_chart
from util.labels import IGNORE, class_set, read_label, read_list
from util.metrics import summary
from util.options import add_class_options
from util.outputs import write_json
from util.run import UserError, run_main

TAU_NS, TAU_CR = 0.60, 0.95  # paper, section 3
SWEEPS = {
    "tau_ns": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),  # paper, Figure 6: stable in 0.2 to 0.8
    "tau_cr": (0.85, 0.90, 0.95, 0.99),
}  # 0.85 to 0.99


def connectivity_table(
    seed_folder: Path, class_num: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Columns of connectivities.csv (class, eta, score, prediction), the pixels of every
    connectivity by true class [N, class_num] int64, and the pixels by true class without a label
    [class_num] int64.
    """
    lists = label_lists(seed_folder)
    labels = dict(read_list(lists["psa_paper"]))
    truth = dict(read_list(truth_list(seed_folder, "scc_paper")))
    corrected = Path(next(iter(dict(read_list(lists["scc_paper"])).values())))
    with open(
        seed_folder / corrected.parts[0] / "connectivities.csv", newline="", encoding="utf-8"
    ) as file:
        rows = list(csv.DictReader(file))
    columns = {
        "class": np.array([int(row["class"]) for row in rows], np.uint8),
        "eta": np.array([float(row["eta"] or "nan") for row in rows]),
        "score": np.array([float(row["score"]) for row in rows]),
        "prediction": np.array([int(row["prediction"]) for row in rows], np.uint8),
    }
    pixels, unlabeled, start = (
        np.zeros((len(rows), class_num), np.int64),
        np.zeros(class_num, np.int64),
        0,
    )
    for image in dict.fromkeys(row["image"] for row in rows):
        gt = read_label(seed_folder / truth[image], class_num)
        numbers = numbered(read_label(seed_folder / labels[image], class_num), class_num)
        counted = gt != IGNORE
        inside = counted & (numbers >= 0)
        np.add.at(pixels, (start + numbers[inside], gt[inside]), 1)
        unlabeled += np.bincount(gt[counted & (numbers < 0)], minlength=class_num)
        start += numbers.max() + 1
    return columns, pixels, unlabeled


def quality(final: np.ndarray, pixels: np.ndarray, unlabeled: np.ndarray) -> dict:
    """`util.metrics.summary` of the labels in which connectivity i has class `final[i]` (IGNORE:
    dropped).
    """
    class_num = pixels.shape[1]
    confusion = np.zeros((class_num, class_num + 1), np.int64)
    np.add.at(confusion.T, np.minimum(final, class_num), pixels)
    confusion[:, class_num] += unlabeled
    return summary(confusion)


def sweep(seed_folders: list[Path], class_num: int) -> dict:
    """{threshold: {value: {figure: [per seed]}}}; the other threshold has the paper's value."""
    tables = [connectivity_table(folder, class_num) for folder in seed_folders]
    results = {}
    for name, values in SWEEPS.items():
        results[name] = {}
        for value in values:
            taus = {"tau_ns": TAU_NS, "tau_cr": TAU_CR, name: value}
            found = [
                quality(
                    decide(c["eta"], c["score"], c["prediction"], c["class"], **taus)[1],
                    pixels,
                    unlabeled,
                )
                for c, pixels, unlabeled in tables
            ]
            results[name][str(value)] = {
                figure: [f[figure] for f in found] for figure in LABEL_FIGURES
            }
    return results


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, with seed<n> in it")
    add_class_options(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    classes = class_set(args.class_num, args.stuff, args.things)
    seeds = [folder for folder in seeds_in(args.run) if "scc_paper" in label_lists(folder)]
    if not seeds:
        raise UserError(
            f"{args.run}: no seed<n> folder with SCC of the paper's recipe; run"
            " scripts/ablation.sh, or RECIPE=paper bash scripts/toy.sh"
        )
    results = sweep(seeds, classes.count)
    text = "".join(label_table(rows, name) + "\n" for name, rows in results.items())
    series = {
        f"{figure}, {name}": (
            [float(value) for value in rows],
            [statistics.mean(found[figure]) for found in rows.values()],
        )
        for name, rows in results.items()
        for figure in LABEL_FIGURES
    }
    write_json(args.run / "sweep.json", {"seeds": [folder.name for folder in seeds], **results})
    (args.run / "sweep.md").write_text(text, encoding="utf-8")
    save_chart(
        args.run / "pictures/sweep.png",
        line_chart(series, "", "threshold", "labels after SCC (%)", y_range=(0, 100)),
    )
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
