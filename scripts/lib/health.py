"""What a run's own records say of its labels, without ground truth: a table for its page."""

from __future__ import annotations

from pathlib import Path

from util.outputs import read_json


def health(folders: dict[str, Path]) -> tuple[list[list[str]], list[str]]:
    """(rows of stage, figure and value; warnings) of the stages of a run.

    folders: {stage: its folder}, as scripts.lib.run_folder.stage_folders gives them. The stages
    pixel, psa, scc, split and adapt are read; one that is not there has no row.
    """
    rows, warnings = [], []
    for stage, file, read in (
        ("pixel", "summary.json", of_pixel_labels),
        ("psa", "summary.json", of_psa),
        ("scc", "report/report.json", of_scc),
        ("split", "split.json", of_split),
        ("adapt", "summary.json", of_training),
    ):
        if stage in folders and (folders[stage] / file).is_file():
            record = read_json(folders[stage] / file)
            figures = read(record)
            rows += [[stage, name, value] for name, value in figures.items() if value is not None]
            warnings += record.get("warnings", [])
    return rows, warnings


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} %"


def of_pixel_labels(record: dict) -> dict[str, str | None]:
    return {"pixels with a label": percent(100 * record["coverage"])}


def of_psa(record: dict) -> dict[str, str | None]:
    shares = record.get("of_labeled_pixels", {})
    return {
        "pixels with a label": percent(record["coverage_after"]),
        "of the labeled pixels, keep their class": percent(shares.get("keep_their_class")),
        "get another class": percent(shares.get("get_another")),
        "lose their label": percent(shares.get("lose_it")),
        "mask proposals an image": f"{record['proposals_per_image']:.1f}",
        "accuracy before": percent(record.get("accuracy_before")),
        "accuracy after": percent(record.get("accuracy_after")),
    }


def of_scc(record: dict) -> dict[str, str | None]:
    truth, loss = record.get("ground_truth", {}), record["last loss"]
    return {
        "labels whose class the classifier gives": percent(record["accuracy on its labels"]),
        "share of the largest class": percent(record["largest class"]),
        "loss at the end": None if loss is None else f"{loss:.2f}",
        "loss of chance": f"{record['loss of chance']:.2f}",
        "connectivities kept / corrected / dropped": (
            f"{record['kept']} / {record['corrected']} / {record['dropped']}"
        ),
        "pixels with a label": percent(record["coverage_after"]),
        "classes that lose all their pixels": ", ".join(record["lost classes"]) or "none",
        "accuracy before": percent(truth.get("accuracy_before")),
        "accuracy after": percent(truth.get("accuracy_after")),
    }


def of_split(record: dict) -> dict[str, str | None]:
    counts = {name: c["labeled_images"] for name, c in record["classes"].items()}
    images = record["images"]
    return {
        "images, labeled + unlabeled": f"{images['labeled']} + {images['unlabeled']}",
        "labeled images of each class": ", ".join(f"{n} {c}" for n, c in counts.items()),
        "classes without one": ", ".join(n for n, c in counts.items() if not c) or "none",
        "images without a label": str(len(record["images_without_labels"])),
    }


def of_training(record: dict) -> dict[str, str | None]:
    miou = record["mIoU"]
    return {
        "unlabeled pixels above --conf-thresh": percent(record.get("above_conf_thresh")),
        "validation mIoU, last": f"{miou['last']:.1f}" if miou else "not measured: no list for it",
    }
