"""IoU and accuracy, read off one confusion matrix."""

from __future__ import annotations

import numpy as np

from util.labels import IDS_13_IN_16, IDS_16_IN_19, IGNORE


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, class_num: int) -> np.ndarray:
    """int64 class_num x (class_num + 1): rows true class, columns predicted class; the last column
    counts labeled ground-truth pixels without a prediction (IGNORE in a pseudo-label map).

    truth, prediction: integer arrays of one shape with train IDs and IGNORE. Ground-truth IGNORE is
    left out.
    """
    counted = truth != IGNORE
    predicted = np.minimum(prediction[counted].astype(np.int64), class_num)
    cells = truth[counted].astype(np.int64) * (class_num + 1) + predicted
    shape = (class_num, class_num + 1)
    return np.bincount(cells, minlength=class_num * (class_num + 1)).reshape(shape)


def metrics_of(confusion: np.ndarray, names: tuple[str, ...]) -> dict:
    """What is read off a confusion matrix (K x (K + 1)), in percent. names: of the K classes.

    miou: mean over all classes, a class absent from the ground truth counting 0 (the shipped logs'
    convention); miou_present: mean over classes present in the ground truth; accuracy: share of the
    predicted pixels that are right; coverage: share of ground-truth pixels with a prediction;
    miou_16, miou_13: means over the classes that SYNTHIA papers give, of 19 and of 16 classes;
    iou: per class, None where neither in the ground truth nor predicted; absent: the classes that
    the ground truth lacks.
    """
    square, truth = confusion[:, :-1].astype(np.float64), confusion.sum(axis=1)
    union = truth + square.sum(axis=0) - np.diag(square)  # pixels without a prediction are missed
    iou = np.where(union > 0, np.diag(square) / np.maximum(union, 1), np.nan)
    present, counted = truth > 0, np.nan_to_num(iou)
    total, predicted, hit = int(truth.sum()), int(square.sum()), int(np.trace(square))
    metrics = {
        "miou": 100 * float(counted.mean()),
        "miou_present": 100 * float(iou[present].mean()) if present.any() else 0.0,
        "coverage": 100 * predicted / total if total else 0.0,
        "accuracy": 100 * hit / predicted if predicted else 0.0,
    }
    ids_13 = [IDS_16_IN_19[i] for i in IDS_13_IN_16]
    parts = {19: {"miou_16": IDS_16_IN_19, "miou_13": ids_13}, 16: {"miou_13": IDS_13_IN_16}}
    for name, ids in parts.get(len(confusion), {}).items():
        metrics[name] = float(np.mean([100 * float(counted[i]) for i in ids]))
    found = [None if np.isnan(value) else 100 * float(value) for value in iou]
    metrics["iou"] = dict(zip(names, found))
    metrics["absent"] = [name for name, there in zip(names, present) if not there]
    return metrics


def table(metrics: dict, header: str) -> str:
    """The figures as text: one class a line, then the means, named by their convention."""
    width = max(len(name) for name in metrics["iou"])
    lines = [header]
    for number, (name, value) in enumerate(metrics["iou"].items()):
        shown = "-" if value is None else f"{value:.2f}"
        absent = "   absent from the ground truth" if name in metrics["absent"] else ""
        lines.append(f"  {number:3d} {name:{width}s} {shown:>6s}{absent}")
    count = len(metrics["iou"])
    means = {
        "miou": f"over all {count} classes, one absent from the ground truth counting 0 (as in the"
        " shipped logs)",
        "miou_present": f"over the {count - len(metrics['absent'])} classes present in the ground"
        " truth",
        "miou_16": "over SYNTHIA's 16 classes, absent = 0",
        "miou_13": "over SYNTHIA's 13 classes (without wall, fence, pole), absent = 0",
    }
    lines += [
        f"mIoU {metrics[name]:.2f} %  {words}" for name, words in means.items() if name in metrics
    ]
    lines.append(
        f"accuracy {metrics['accuracy']:.2f} % of labeled pixels; coverage"
        f" {metrics['coverage']:.2f} % of the ground truth's pixels are labeled"
    )
    return "\n".join(lines)
