"""scripts/lib/sweep.py against SCC's own labels."""

import csv

import numpy as np

from dataset.scc import numbered
from eval import confusion_matrix, metrics_of
from model.scc import decide
from scripts.lib import sweep
from scripts.lib.report import sweep_tables
from scripts.lib.run_folder import seed_folders
from seco_scc import corrected_label
from util.labels import CITYSCAPES_19, IGNORE, read_label, write_label, write_list
from util.outputs import read_json, write_json


def test_sweep_equals_writing_and_measuring_the_labels(tmp_path):
    """Random labels, scores and posteriors of four small images; the paper's and two other pairs of
    thresholds.
    """
    rng, folder, rows = np.random.default_rng(0), tmp_path / "seed0", []
    lists = {"psa": [], "gt": [], "scc": []}
    for image in [f"images/{number}.png" for number in range(4)]:
        cells = rng.choice([0, 2, 11, 13, IGNORE], (6, 8)).astype(np.uint8)
        label = cells.repeat(4, axis=0).repeat(4, axis=1)
        other = rng.choice([0, 1, 13, IGNORE], label.shape).astype(np.uint8)
        gt = np.where(rng.random(label.shape) < 0.3, other, label)
        for kind, array in (("psa", label), ("gt", gt), ("scc", label)):
            lists[kind].append((image, image.replace("images", kind)))
            write_label(folder / lists[kind][-1][1], array, CITYSCAPES_19.palette)
        numbers = numbered(label, 19)
        for number in range(numbers.max() + 1):
            class_id = int(label[numbers == number][0])
            row = {"image": image, "id": number, "class": class_id, "score": rng.uniform(0.8, 1)}
            prediction = int(rng.choice([class_id, 3]))
            rows.append({**row, "prediction": prediction, "eta": rng.random()})
    for kind, entries in lists.items():
        write_list(folder / f"splits/{kind}/all.txt", entries)
    for kind in ("psa", "scc"):
        read = {"labels": kind, "id_list_path": "gt"}
        options = {name: str(folder / f"splits/{value}/all.txt") for name, value in read.items()}
        write_json(folder / f"eval/quality_{kind}_paper/run.json", {"options": options})
    with open(folder / "scc/connectivities.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    (folder / "source").mkdir()
    found = sweep.sweep(tmp_path, [seed_folders(folder)], 19)
    assert found == read_json(tmp_path / "sweep.json")
    for name, value, tau_ns, tau_cr in (
        ("tau_ns", "0.6", 0.6, 0.95),
        ("tau_ns", "0.3", 0.3, 0.95),
        ("tau_cr", "0.85", 0.6, 0.85),
    ):
        confusion = np.zeros((19, 20), np.int64)
        for (image, psa), (_, truth) in zip(lists["psa"], lists["gt"]):
            mine = [row for row in rows if row["image"] == image]
            columns = (
                np.array([row[key] for row in mine])
                for key in ("eta", "score", "prediction", "class")
            )
            _, final = decide(*columns, tau_ns, tau_cr)
            final = corrected_label(numbered(read_label(folder / psa), 19), final)
            confusion += confusion_matrix(read_label(folder / truth), final, 19)
        expected = metrics_of(confusion, CITYSCAPES_19.names)
        assert {key: values[0] for key, values in found[name][value].items()} == {
            key: expected[key] for key in ("coverage", "accuracy", "miou")
        }
    assert found["seeds"] == ["seed0"] and found["tau_ns"]["0.3"] != found["tau_ns"]["0.6"]
    tables = sweep_tables(found)
    assert [len(table["rows"]) for table in tables] == [7, 4]
    assert (tmp_path / "pictures/sweep.png").is_file()
