"""The confusion matrix, and what is read off it."""

from __future__ import annotations

import numpy as np

from util.labels import IGNORE


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, class_num: int) -> np.ndarray:
    """int64 class_num x (class_num + 1): rows true class, columns predicted class; the last column
    counts labeled ground-truth pixels without a prediction (IGNORE in a pseudo-label map).

    truth, prediction: integer arrays of one shape with train IDs and IGNORE. Ground-truth IGNORE is
    left out.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"ground truth is {truth.shape}, prediction {prediction.shape}")
    counted = truth != IGNORE
    predicted = np.minimum(prediction[counted].astype(np.int64), class_num)
    cells = truth[counted].astype(np.int64) * (class_num + 1) + predicted
    return np.bincount(cells, minlength=class_num * (class_num + 1)).reshape(
        class_num, class_num + 1
    )


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """IoU per class in [0, 1], float64; NaN for a class that is neither in the ground truth nor
    predicted.

    Pixels without a prediction count as missed (they are in the union through the ground truth).
    """
    square = confusion[:, :-1].astype(np.float64)
    hit = np.diag(square)
    union = confusion.sum(axis=1) + square.sum(axis=0) - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(union > 0, hit / union, np.nan)


def summary(confusion: np.ndarray) -> dict:
    """Figures of one confusion matrix, in percent.

    miou: mean over all classes, a class absent from the ground truth counting 0 (the shipped logs'
    convention); miou_present: mean over classes present in the ground truth; iou: per class, None
    where neither in the ground truth nor predicted; coverage: share of ground-truth pixels with a
    prediction; accuracy: share of these that are right.
    """
    iou = class_iou(confusion)
    present = confusion.sum(axis=1) > 0
    total = int(confusion.sum())
    predicted = int(confusion[:, :-1].sum())
    hit = int(np.trace(confusion[:, :-1]))
    return {
        "miou": 100 * float(np.where(present, np.nan_to_num(iou), 0.0).mean()),
        "miou_present": 100 * float(iou[present].mean()) if present.any() else 0.0,
        "iou": [None if np.isnan(value) else 100 * float(value) for value in iou],
        "present": [bool(flag) for flag in present],
        "coverage": 100 * predicted / total if total else 0.0,
        "accuracy": 100 * hit / predicted if predicted else 0.0,
    }
