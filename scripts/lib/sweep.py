"""The paper's Figure 6 on the quality of the labels: SCC's thresholds tau_ns and tau_cr, each over
its range, with the paper's recipe.

Reads connectivities.csv, PSA's labels and the target's ground truth (a diagnostic). Nothing is
trained: a threshold changes only which connectivities keep their class.
"""

from __future__ import annotations

import csv
import statistics
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from dataset.scc import numbered
from eval import labels_in_folder
from model.scc import decide
from scripts.lib.run_folder import LABEL_FIGURES, truth_of
from seco_scc import corrected_label
from util.charts import line_chart, save_chart
from util.labels import read_label
from util.metrics import confusion_matrix, metrics_of
from util.outputs import write_json

PAPER = {"tau_ns": 0.60, "tau_cr": 0.95}  # section 3
SWEEPS = {  # Figure 6: stable in 0.2 to 0.8 and in 0.85 to 0.99
    "tau_ns": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "tau_cr": (0.85, 0.90, 0.95, 0.99),
}


def sweep_seed(folders: dict[str, Path], class_num: int) -> dict[tuple[str, float], dict]:
    """{(threshold, value): `metrics_of` of SCC's labels}; the other threshold has the paper's
    value. folders: of the seed's stages.
    """
    seed, table = folders["source"].parent, folders["scc_paper"] / "connectivities.csv"
    truth = truth_of(folders["quality_scc_paper"])
    labels = labels_in_folder(folders["psa_paper"], [*truth])
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


def sweep(run: Path, stages: list[dict[str, Path]], class_num: int) -> dict:
    """Write <run>/sweep.json and pictures/sweep.png; stages: of each seed. Returns what the JSON
    file has, {threshold: {value: {figure: [per seed]}}} and the seeds.
    """
    of_seeds = [sweep_seed(folders, class_num) for folders in stages]
    results, series = {"seeds": [folders["source"].parent.name for folders in stages]}, {}
    for name, values in SWEEPS.items():
        results[name] = {
            str(value): {f: [found[name, value][f] for found in of_seeds] for f in LABEL_FIGURES}
            for value in values
        }
        for figure in LABEL_FIGURES:
            means = [statistics.mean(found[figure]) for found in results[name].values()]
            series[f"{figure}, {name}"] = values, means
    chart = line_chart(series, "", "threshold", "labels after SCC (%)")
    chart.axes[0].set_ylim(0, 100)
    save_chart(run / "pictures/sweep.png", chart)
    write_json(run / "sweep.json", results)
    return results
