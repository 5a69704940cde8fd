"""The paper's Figure 6 on the quality of the labels: SCC's thresholds tau_ns and tau_cr, each over
its range.

    python -m scripts.dev.sweep_thresholds runs/ablation_toy --class-num 19

Reads, in every `<run>/seed<n>/` in which the paper's recipe of SCC has run, connectivities.csv,
PSA's labels and the target's ground truth (a diagnostic). Nothing is trained: a threshold changes
only which connectivities keep their class. Writes `<run>/{sweep.json,sweep.md,pictures/sweep.png}`.
"""

from __future__ import annotations

import csv
import statistics
import sys
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np

from dataset.scc import numbered
from eval import labels_in_folder
from model.scc import decide
from scripts.lib.page import markdown
from scripts.lib.report import LABEL_FIGURES, sweep_tables
from scripts.lib.run_folder import seed_folders, truth_of
from seco_scc import corrected_label
from util.charts import line_chart, save_chart
from util.labels import chosen_classes, read_label
from util.metrics import confusion_matrix, metrics_of
from util.options import Argument, ClassOptions, Folder, parse_options
from util.outputs import write_json
from util.run import UserError, run_main

PAPER = {"tau_ns": 0.60, "tau_cr": 0.95}  # section 3
SWEEPS = {  # Figure 6: stable in 0.2 to 0.8 and in 0.85 to 0.99
    "tau_ns": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "tau_cr": (0.85, 0.90, 0.95, 0.99),
}


@dataclass(kw_only=True)
class Options(ClassOptions):
    """the run"""

    run: Argument[Folder]
    "folder of the run, with seed<n> in it"
    seeds: Annotated[list[int], "N"] | None = None
    "its seeds (default: all that are there)"


def sweep_seed(seed: Path, class_num: int) -> dict[tuple[str, float], dict]:
    """{(threshold, value): `metrics_of` of SCC's labels}; the other threshold has the
    paper's value.
    """
    folders = seed_folders(seed)
    if "scc_paper" not in folders:
        raise UserError(
            f"{seed}: no SCC of the paper's recipe; run scripts/ablation.sh, or RECIPE=paper bash"
            " scripts/toy.sh"
        )
    truth = truth_of(folders["quality_scc_paper"])
    labels = labels_in_folder(folders["psa_paper"], [*truth])
    table = folders["scc_paper"] / "connectivities.csv"
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    confusions = dict.fromkeys(((name, value) for name in SWEEPS for value in SWEEPS[name]), 0)
    for image, found in groupby(rows, itemgetter("image")):
        found = list(found)
        columns = [
            np.array([float(row[name] or "nan") for row in found])
            for name in ("eta", "score", "prediction", "class")
        ]
        gt = read_label(seed / truth[image], class_num)
        numbers = numbered(read_label(labels[image], class_num), class_num)
        for name, value in confusions:
            _, final = decide(*columns, **{**PAPER, name: value})
            label = corrected_label(numbers, final)
            confusions[name, value] += confusion_matrix(gt, label, class_num)
    names = tuple(map(str, range(class_num)))
    return {key: metrics_of(confusion, names) for key, confusion in confusions.items()}


def main(argv=None) -> None:
    options = parse_options(Options, __doc__, argv)
    class_num = chosen_classes(options).count
    seeds = [options.run / f"seed{number}" for number in options.seeds or ()]
    seeds = seeds or sorted(options.run.glob("seed*[0-9]"))
    of_seeds = [sweep_seed(seed, class_num) for seed in seeds]
    results, series = {"seeds": [seed.name for seed in seeds]}, {}
    for name, value in of_seeds[0]:  # results: {threshold: {value: {figure: [per seed]}}}
        found = {f: [of_seed[name, value][f] for of_seed in of_seeds] for f in LABEL_FIGURES}
        results.setdefault(name, {})[str(value)] = found
        for figure, of_all in found.items():
            points = series.setdefault(f"{figure}, {name}", ([], []))
            points[0].append(value)
            points[1].append(statistics.mean(of_all))
    chart = line_chart(series, "", "threshold", "labels after SCC (%)")
    chart.axes[0].set_ylim(0, 100)
    save_chart(options.run / "pictures/sweep.png", chart)
    write_json(options.run / "sweep.json", results)
    text = markdown(sweep_tables(options.run))
    (options.run / "sweep.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
