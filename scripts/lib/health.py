"""What a run's own records say of its labels, without ground truth: a table for its page."""

from __future__ import annotations

from pathlib import Path

from util.outputs import read_json


def health(folders: dict[str, Path]) -> tuple[list[list[str]], list[str]]:
    """(rows of stage, figure and value; warnings) of the stages of a run.

    folders: {stage: its folder}, as scripts.lib.run_folder.task_folders gives them. The stages
    pixel, psa, scc, split and adapt are read; one that is not there has no row.
    """
    rows, warnings = [], []
    for stage, file, read in (
        ("pixel", "summary.json", lambda record: {"pixels with a label": 100 * record["coverage"]}),
        ("psa", "summary.json", of_psa),
        ("scc", "report/report.json", of_scc),
        ("split", "split.json", of_split),
        ("adapt", "summary.json", of_training),
    ):
        if stage in folders and (folders[stage] / file).is_file():
            record = read_json(folders[stage] / file)
            for name, value in read(record).items():
                if value is not None:
                    shown = value if isinstance(value, str) else f"{value:.1f} %"
                    rows.append([stage, name, shown])
            warnings += record.get("warnings", [])
    return rows, warnings


# Each gives {what: percentage, text or None} of a stage's record.


def of_psa(record: dict) -> dict[str, float | str | None]:
    shares = record.get("of_labeled_pixels", {})
    return {
        "pixels with a label": record["coverage_after"],
        "of the labeled pixels, keep their class": shares.get("keep_their_class"),
        "get another class": shares.get("get_another"),
        "lose their label": shares.get("lose_it"),
        "mask proposals an image": f"{record['proposals_per_image']:.1f}",
        "accuracy before": record.get("accuracy_before"),
        "accuracy after": record.get("accuracy_after"),
    }


def of_scc(record: dict) -> dict[str, float | str | None]:
    truth, loss = record.get("ground_truth", {}), record["last loss"]
    decided = " / ".join(str(record[name]) for name in ("kept", "corrected", "dropped"))
    return {
        "labels whose class the classifier gives": record["accuracy on its labels"],
        "share of the largest class": record["largest class"],
        "loss at the end": None if loss is None else f"{loss:.2f}",
        "loss of chance": f"{record['loss of chance']:.2f}",
        "connectivities kept / corrected / dropped": decided,
        "pixels with a label": record["coverage_after"],
        "classes that lose all their pixels": ", ".join(record["lost classes"]) or "none",
        "accuracy before": truth.get("accuracy_before"),
        "accuracy after": truth.get("accuracy_after"),
    }


def of_split(record: dict) -> dict[str, str]:
    counts = {name: c["labeled_images"] for name, c in record["classes"].items()}
    images = record["images"]
    return {
        "images, labeled + unlabeled": f"{images['labeled']} + {images['unlabeled']}",
        "labeled images of each class": ", ".join(f"{n} {c}" for n, c in counts.items()),
        "classes without one": ", ".join(n for n, c in counts.items() if not c) or "none",
        "images without a label": str(len(record["images_without_labels"])),
    }


def of_training(record: dict) -> dict[str, float | str | None]:
    miou = record["mIoU"]
    return {
        "unlabeled pixels above --conf-thresh": record.get("above_conf_thresh"),
        "validation mIoU, last": f"{miou['last']:.1f}" if miou else "not measured: no list for it",
    }
