"""scripts/dev/sweep_thresholds.py against SCC's own labels."""

import csv

import numpy as np

from dataset.scc import numbered
from scripts.dev import sweep_thresholds
from seco_scc import corrected_label, decide
from util.labels import CITYSCAPES_19, IGNORE, read_label, write_label, write_list
from util.metrics import confusion_matrix, summary
from util.outputs import write_json


def test_sweep_equals_writing_and_measuring_the_labels(tmp_path):
    """Random labels, scores and posteriors of four small images; the paper's and two other pairs of
    thresholds.
    """
    rng, folder, rows = np.random.default_rng(0), tmp_path / "seed0", []
    psa, truth, scc = [], [], []
    for image in range(4):
        label = np.repeat(
            np.repeat(rng.choice([0, 2, 11, 13, IGNORE], (6, 8)).astype(np.uint8), 4, 0), 4, 1
        )
        gt = np.where(
            rng.random(label.shape) < 0.3, rng.choice([0, 1, 13, IGNORE], label.shape), label
        ).astype(np.uint8)
        for name, array, entries in (("psa", label, psa), ("gt", gt, truth), ("scc", label, scc)):
            path = f"{name}/{image}.png"
            write_label(folder / path, array, CITYSCAPES_19.palette)
            entries.append((f"images/{image}.png", path))
        for number in range(numbered(label, 19).max() + 1):
            class_id = int(label[numbered(label, 19) == number][0])
            rows.append(
                {
                    "image": f"images/{image}.png",
                    "id": number,
                    "class": class_id,
                    "score": rng.uniform(0.8, 1),
                    "prediction": int(rng.choice([class_id, 3])),
                    "eta": rng.random(),
                }
            )
    for name, entries in (("psa", psa), ("gt", truth), ("scc", scc)):
        write_list(folder / f"splits/{name}/all.txt", entries)
    for row, name in (("psa_paper", "psa"), ("scc_paper", "scc")):
        lists = {
            "labels": str(folder / f"splits/{name}/all.txt"),
            "id_list_path": str(folder / "splits/gt/all.txt"),
        }
        write_json(folder / f"eval/quality_{row}/run.json", {"options": lists})
    with open(folder / "scc/connectivities.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    found = sweep_thresholds.sweep([folder], 19)
    for name, value, tau_ns, tau_cr in (
        ("tau_ns", "0.6", 0.6, 0.95),
        ("tau_ns", "0.3", 0.3, 0.95),
        ("tau_cr", "0.85", 0.6, 0.85),
    ):
        confusion = np.zeros((19, 20), np.int64)
        for image in range(4):
            mine = [row for row in rows if row["image"] == f"images/{image}.png"]
            column = lambda key: np.array([row[key] for row in mine])  # noqa: E731
            _, final = decide(
                column("eta"),
                column("score"),
                column("prediction"),
                column("class"),
                tau_ns,
                tau_cr,
            )
            label, gt = (read_label(folder / f"{kind}/{image}.png") for kind in ("psa", "gt"))
            confusion += confusion_matrix(gt, corrected_label(numbered(label, 19), final), 19)
        expected = summary(confusion)
        assert {key: values[0] for key, values in found[name][value].items()} == {
            key: expected[key] for key in ("coverage", "accuracy", "miou")
        }
    assert found["tau_ns"]["0.3"] != found["tau_ns"]["0.6"]
    sweep_thresholds.main([str(tmp_path), "--class-num", "19"])
    assert (tmp_path / "sweep.md").is_file() and (tmp_path / "pictures/sweep.png").is_file()
