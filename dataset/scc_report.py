"""The results of SCC that people look at: connectivities.csv; a page with figures, decisions per
class, a histogram of losses and panels.

job: dataset.scc.Job; verdicts: seco_scc.Verdicts.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from util.charts import CYCLE, new_chart, save_chart
from util.labels import COLOURS, IGNORE, read_label
from util.outputs import atomic_path, write_json
from util.page import write_page
from util.pictures import colour_label, contact_sheet, overlay, save_picture

BLUE, ORANGE, GREEN, PURPLE, *_, GREY = CYCLE
DECISIONS = {"kept": BLUE, "corrected": ORANGE, "dropped": GREY}
BINS = 60  # of the histogram
# A classifier has learned if it gives so many times the largest class's share of the labels their
# class (or half of the rest, where that is less). Of 12 photographs, 60 iterations gave 1.9 and 2.2
# times and ruined the labels, 1,000 gave 3.0 times and helped; CamVid 2.9, the drawn scenes 6.
LEARNED = 2.5


def write_report(job, verdicts, pixels: int, loss: float | None) -> None:
    """Write report/: index.html with its pictures, and report.json; tell its figures in short.

    pixels: of all label maps; loss: of the classifier's last iterations, if it is known.
    """
    classes, folder = job.classes, job.out / "report"
    report = figures_of(job, verdicts, pixels, loss)
    if job.truth:  # the only ground truth that is ever opened
        report["ground_truth"] = compare_with_ground_truth(job, verdicts)
    write_json(folder / "report.json", report)
    pictures = [("loss_histogram.png", "Losses")]
    save_chart(folder / "loss_histogram.png", loss_histogram(job, verdicts))
    if job.options.vis:
        pictures.append(("panels.png", "Before and after"))
        save_picture(folder / "panels.png", panels(job, verdicts))
    rows = [
        (name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value)
        for name, value in {**report, **report.get("ground_truth", {})}.items()
        if value is not None and not isinstance(value, (dict, list))
    ]
    rows += [("classes that lose all their pixels", ", ".join(report["lost classes"]) or "none")]
    rows += [("warning", text) for text in report["warnings"]]
    decisions = [(name, *counts.values()) for name, counts in report["per_class"].items()]
    parts = [{"rows": rows}, {"head": ["class", *DECISIONS], "rows": decisions}]
    title = f"SCC: {job.options.recipe} recipe"
    write_page(folder / "index.html", title, [*parts, {"figures": pictures}])
    tell(report, classes.count)


def tell(report: dict, class_num: int) -> None:
    """What the figures of a report say, in lines for the terminal."""
    if report["note"]:
        print(f"note: {report['note']}")
    print(
        f"the classifier gives {report['accuracy on its labels']:.1f} % of the labels their class;"
        f" the largest class is {report['largest class']:.1f} % of them, chance"
        f" {100 / class_num:.1f} %"
    )
    if report["lost classes"]:
        print(f"note: all pixels of these classes are dropped: {', '.join(report['lost classes'])}")
    print(
        f"{report['kept']} connectivities kept, {report['corrected']} corrected,"
        f" {report['dropped']} dropped; {report['coverage_before']:.1f} % of the pixels labeled"
        f" before, {report['coverage_after']:.1f} % after"
    )
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def write_connectivities(path: Path, job, verdicts) -> None:
    """connectivities.csv: one line each, numbers at full precision."""
    columns = ("image", "id", "class", "area", "x", "y", "width", "height", "loss", "score")
    names = ("loss", "score", "predicted", "eta", "decision", "final")
    values = (getattr(verdicts, name).tolist() for name in names)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "prediction", "eta", "decision", "final"])
        for (image, *place), *numbers, eta, decision, final in zip(job.index.tolist(), *values):
            eta = "" if np.isnan(eta) else eta
            writer.writerow([job.rows[image][0], *place, *numbers, eta, decision, final])


# ------------------------------------------------------------------------------------------ figures


def figures_of(job, verdicts, pixels: int, loss: float | None) -> dict:
    """What the labels alone tell, shares in percent.

    Counts of the decisions, and the pixels with a label. Whether the classifier has learned: the
    share of the judged connectivities whose label it predicts, beside that of their largest class;
    the loss of its last iterations, beside that of chance, ln K.
    """
    areas, labels = job.index["area"].astype(np.int64), job.index["class_id"]
    final, noise, names = verdicts.final, verdicts.noise, job.classes.names
    judged = labels[job.judged]
    decided = {d: verdicts.decision == d for d in DECISIONS}
    right = 100 * float(np.mean(verdicts.predicted[job.judged] == judged))
    largest = 100 * float(np.bincount(judged).max() / len(judged))
    warnings = []
    if right < min(LEARNED * largest, (100 + largest) / 2):
        warnings.append(
            f"the classifier has not learned: of its labels it gives {right:.1f} % their class, and"
            f" the largest class alone is {largest:.1f} %; more --iterations, ImageNet weights"
            " (--backbone-weights imagenet) or a larger --min-area help"
        )
    return {
        "images": len(job.rows),
        "connectivities": len(labels),
        "judged": len(judged),
        **{d: int(which.sum()) for d, which in decided.items()},
        "changed class": int(((final != IGNORE) & (final != labels)).sum()),
        "coverage_before": 100 * float(areas.sum()) / pixels,
        "coverage_after": 100 * float(areas[final != IGNORE].sum()) / pixels,
        "note": noise and noise.fallback,
        "thresholds": {str(k): v for k, v in verdicts.thresholds.items()},
        "mixture": noise and {n: value for n, value in vars(noise).items() if n != "eta"},
        "per_class": {
            name: {d: int((which & (labels == c)).sum()) for d, which in decided.items()}
            for c, name in enumerate(names)
        },
        "accuracy on its labels": right,
        "largest class": largest,
        "last loss": loss,
        "loss of chance": float(np.log(len(names))),
        "lost classes": [n for c, n in enumerate(names) if c in labels and c not in final],
        "warnings": warnings,
    }


def compare_with_ground_truth(job, verdicts) -> dict:
    """Purity and accuracies in percent, and the AUROC of eta (or the loss) for connectivities of a
    wrong class. The ground truth has the label maps' sizes.

    A connectivity's true class is the most frequent ground-truth class in it, its purity that
    class's share; those on ground-truth 255 alone are left out. accuracy_*: of labeled pixels.
    """
    labels, final, class_num = job.index["class_id"], verdicts.final, job.classes.count
    votes = np.zeros((len(labels), class_num), np.int64)  # pixels of each true class
    for image, (path, _) in enumerate(job.rows):
        true, numbers = read_label(job.root / job.truth[path], class_num), job.numbers(image)
        counted = (true != IGNORE) & (numbers >= 0)
        np.add.at(votes[job.part(image)], (numbers[counted], true[counted]), 1)
    each, known, labeled = np.arange(len(votes)), votes.sum(axis=1), final != IGNORE
    seen, wrong = known > 0, votes.argmax(axis=1) != labels
    signal = np.where(np.isnan(verdicts.eta), verdicts.loss, verdicts.eta)
    usable = seen & job.judged & np.isfinite(signal)
    two_kinds = 0 < wrong[usable].sum() < usable.sum()
    purity = votes.max(axis=1)[seen] / known[seen]
    right_after, known_after = votes[each[labeled], final[labeled]].sum(), known[labeled].sum()
    return {
        "purity": 100 * float(np.average(purity, weights=job.index["area"][seen])),
        "auroc": float(roc_auc_score(wrong[usable], signal[usable])) if two_kinds else None,
        "accuracy_before": 100 * float(votes[each, labels].sum() / known.sum()),
        "accuracy_after": 100 * float(right_after / known_after) if known_after else None,
    }


# ----------------------------------------------------------------------------------------- pictures


def loss_histogram(job, verdicts):
    """The losses by decision; paper: normalised, with both Gaussians (the paper's Figure 4). A
    matplotlib Figure.
    """
    noise, losses = verdicts.noise, np.where(np.isfinite(verdicts.loss), verdicts.loss, 0)
    if noise:
        losses = (losses - noise.low) / max(noise.high - noise.low, 1e-12)
    x_label = ("normalised " if noise else "") + "cross-entropy against the label"
    axes = new_chart("SCC: losses of the connectivities", x_label, "connectivities")
    groups = [losses[job.judged & (verdicts.decision == name)] for name in DECISIONS]
    axes.hist(groups, BINS, stacked=True, color=[*DECISIONS.values()], label=[*DECISIONS])
    if noise and not noise.fallback:
        grid = np.linspace(0, 1, 300)
        for k, (title, colour) in enumerate((("clean", GREEN), ("noisy", PURPLE))):
            density = noise.weights[k] * norm.pdf(grid, noise.means[k], noise.deviations[k])
            height = np.minimum(density / BINS, 1) * len(noise.eta)
            axes.plot(grid, height, color=colour, linewidth=3, label=title)
    return axes.figure


def panels(job, verdicts) -> Image.Image:
    """Image | labels before | eta, or doubt: 1 - probability of the label (1 where the loss is not
    finite) | labels after, dropped regions hatched.
    """
    loss = np.where(np.isfinite(verdicts.loss), verdicts.loss, np.inf)
    doubts = np.where(np.isnan(verdicts.eta), 1 - np.exp(-loss), verdicts.eta)
    labels, classes, rows = job.index["class_id"], job.classes, []
    for image in range(min(job.options.vis, len(job.rows))):
        picture, numbers = job.read(image)
        before, after, doubt = (
            np.append(values[job.part(image)], empty)[numbers]
            for values, empty in ((labels, IGNORE), (verdicts.final, IGNORE), (doubts, np.nan))
        )
        corrected = overlay(picture, after, classes.palette, 0.9)
        corrected = hatch(corrected, (before != IGNORE) & (after == IGNORE))
        rows.append([picture, colour_label(before, classes.palette), heat(doubt), corrected])
    doubt = "eta" if verdicts.noise else "doubt"
    columns = ["image", "before", f"{doubt}, blue 0, orange 1", "after, dropped hatched"]
    return contact_sheet(rows, columns, legend=classes, cell_width=400)


def hatch(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of an RGB picture with white diagonal lines where `mask` (bool H x W) is true."""
    rows, columns = np.indices(mask.shape)
    lines = ((rows + columns) % 8 < 2) & mask
    return np.where(lines[..., None], np.uint8(255), picture)


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (H x W, NaN allowed) → RGB from blue (0) over white to orange (1); NaN is
    black.
    """
    colours = np.array([COLOURS[0], (245, 245, 245), COLOURS[4]])
    rgb = [np.interp(values, (0, 0.5, 1), colours[:, channel]) for channel in range(3)]
    return np.nan_to_num(np.stack(rgb, axis=-1)).round().astype(np.uint8)
