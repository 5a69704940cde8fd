"""The results of SCC that people look at: connectivities.csv; a page with a histogram of losses,
decisions per class, panels, thumbnails and figures.

`data` and `verdicts` are those of seco_scc.py. Only a ground-truth list that is given is opened.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from util.labels import COLOURS, IGNORE, ClassSet, read_label
from util.outputs import atomic_path
from util.page import write_page
from util.pictures import colour_label, contact_sheet, hatch, heat, overlay, save_picture

BLUE, ORANGE, GREEN, PURPLE, *_, GREY = (tuple(c / 255 for c in colour) for colour in COLOURS)
DECISIONS = {"kept": BLUE, "corrected": ORANGE, "dropped": GREY}
DPI = 100  # of charts
THUMBNAIL = (96, 96)  # pixels
# A classifier has learned if it gives so many times the largest class's share of the labels their
# class (or half of the rest, where that is less). Of 12 photographs, 60 iterations gave 1.9 and 2.2
# times and ruined the labels, 1,000 gave 3.0 times and helped; CamVid 2.9, the drawn scenes 6.
LEARNED = 2.5
EXAMPLES = 4  # most and least trusted connectivities shown of a class
MIN_THUMBNAIL_AREA = 40  # pixels; smaller connectivities show nothing


def write_report(
    folder: Path,
    data,
    verdicts,
    classes: ClassSet,
    truth: dict[str, str] | None,
    loss: float | None,
) -> dict:
    """Write the pictures and index.html into `folder`; return the figures of report.json.

    Args:
        folder: where the report goes.
        data, verdicts: what was judged, and how.
        classes: of the labels.
        truth: {image path: ground-truth path} or None.
        loss: of the classifier's last iterations, if it is known.
    """
    report = counts(data, verdicts, classes) | health(data, verdicts, classes, loss)
    if truth is not None:  # the only ground truth that is ever opened
        report["ground_truth"] = compare_with_ground_truth(data, verdicts, truth)
    shown = {
        "loss_histogram": ("Losses", loss_histogram(data, verdicts)),
        "decisions": ("Decisions per class", decisions_chart(report["per_class"])),
    }
    for name, (_, figure) in shown.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary)
    pictures = {}
    if data.options.vis:
        pictures["panels"] = ("Before and after", panels(data, verdicts, classes))
    if sheet := trust_sheet(data, verdicts, classes):
        pictures["thumbnails"] = ("Most and least trusted connectivities of each class", sheet)
    for name, (_, picture) in pictures.items():
        save_picture(folder / f"{name}.png", picture)
    rows = [
        (name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value)
        for name, value in {**report, **report.get("ground_truth", {})}.items()
        if value is not None and not isinstance(value, (dict, list))
    ]
    rows += [("classes that lose all their pixels", ", ".join(report["lost classes"]) or "none")]
    rows += [("warning", text) for text in report["warnings"]]
    files = [(f"{name}.png", title) for name, (title, _) in {**shown, **pictures}.items()]
    title = f"SCC: {data.options.recipe} recipe"
    write_page(folder / "index.html", title, [{"rows": rows}, {"figures": files}])
    return report


def write_connectivities(path: Path, data, verdicts) -> None:
    """connectivities.csv: one line each, numbers at full precision."""
    columns = ("image", "id", "class", "area", "x", "y", "width", "height", "loss", "score")
    numbers = (verdicts.loss, verdicts.score, verdicts.predicted, verdicts.eta)
    judged = zip(*(values.tolist() for values in (*numbers, verdicts.decision, verdicts.final)))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "prediction", "eta", "decision", "final"])
        for (image, *place), (loss, score, predicted, eta, *end) in zip(
            data.index.tolist(), judged
        ):
            eta = "" if np.isnan(eta) else eta
            writer.writerow([data.rows[image][0], *place, loss, score, predicted, eta, *end])


def trust(verdicts) -> np.ndarray:
    """How far a connectivity's label is trusted, 0 to 1: 1 - eta in the paper's recipe, the
    classifier's probability of the label in the release one; 0 where the loss is not finite.
    """
    probability = np.exp(-np.where(np.isfinite(verdicts.loss), verdicts.loss, np.inf))
    return np.where(np.isnan(verdicts.eta), probability, 1 - verdicts.eta)


# ------------------------------------------------------------------------------------------ figures


def counts(data, verdicts, classes: ClassSet) -> dict:
    """Counts and shares of the decisions; shares of pixels in percent."""
    areas, labels = data.index["area"].astype(np.int64), data.index["class_id"]
    kept, noise, pixels = verdicts.final != IGNORE, verdicts.noise, 0
    for _, path in data.rows:
        with Image.open(data.root / path) as label:
            pixels += label.width * label.height
    decided = {d: verdicts.decision == d for d in DECISIONS}
    return {
        "images": len(data.rows),
        "connectivities": len(labels),
        "judged": int(data.judged.sum()),
        **{d: int(which.sum()) for d, which in decided.items()},
        "changed class": int((kept & (verdicts.final != labels)).sum()),
        "coverage_before": 100 * float(areas.sum()) / pixels,
        "coverage_after": 100 * float(areas[kept].sum()) / pixels,
        "note": noise and noise.fallback,
        "thresholds": {str(k): v for k, v in verdicts.thresholds.items()},
        "mixture": noise
        and {
            "means": noise.means,
            "deviations": noise.deviations,
            "weights": noise.weights,
            "loss_range": (noise.low, noise.high),
        },
        "per_class": {
            name: {d: int((which & (labels == c)).sum()) for d, which in decided.items()}
            for c, name in enumerate(classes.names)
        },
    }


def health(data, verdicts, classes: ClassSet, loss: float | None) -> dict:
    """Whether the classifier has learned anything, as the labels alone tell.

    In percent: the share of the judged connectivities whose label it predicts, beside that of their
    largest class. The loss of its last iterations, beside that of chance, ln K. The classes that
    lose all their pixels.
    """
    labels, final = data.index["class_id"], verdicts.final
    judged = labels[data.judged]
    right = 100 * float(np.mean(verdicts.predicted[data.judged] == judged))
    largest = 100 * float(np.bincount(judged).max() / len(judged))
    warnings = []
    if right < min(LEARNED * largest, (100 + largest) / 2):
        warnings.append(
            f"the classifier has not learned: of its labels it gives {right:.1f} % their class, and"
            f" the largest class alone is {largest:.1f} %; more --iterations, ImageNet weights"
            " (--backbone-weights imagenet) or a larger --min-area help"
        )
    return {
        "accuracy on its labels": right,
        "largest class": largest,
        "last loss": loss,
        "loss of chance": float(np.log(classes.count)),
        "lost classes": [n for c, n in enumerate(classes.names) if c in labels and c not in final],
        "warnings": warnings,
    }


def in_short(report: dict, class_num: int) -> list[str]:
    """What the figures of a report say, in lines for the terminal."""
    lines = [
        f"the classifier gives {report['accuracy on its labels']:.1f} % of the labels their class;"
        f" the largest class is {report['largest class']:.1f} % of them, chance"
        f" {100 / class_num:.1f} %",
        f"{report['kept']} connectivities kept, {report['corrected']} corrected,"
        f" {report['dropped']} dropped; {report['coverage_before']:.1f} % of the pixels labeled"
        f" before, {report['coverage_after']:.1f} % after",
    ]
    if report["lost classes"]:
        lost = ", ".join(report["lost classes"])
        lines.insert(1, f"note: all pixels of these classes are dropped: {lost}")
    return [f"note: {report['note']}", *lines] if report["note"] else lines


def ground_truth_votes(data, truth: dict[str, str]) -> np.ndarray:
    """Ground-truth pixels of each class in each connectivity: int64 N x K."""
    votes = []
    for image, (path, _) in enumerate(data.rows):
        true, numbers = read_label(data.root / truth[path], data.class_num), data.numbers(image)
        shape, counted = (len(data.of_image(image)), data.class_num), true != IGNORE
        counted &= numbers >= 0
        places = numbers[counted].astype(np.int64) * data.class_num + true[counted]
        votes.append(np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape))
    return np.concatenate(votes)


def compare_with_ground_truth(data, verdicts, truth: dict[str, str]) -> dict:
    """Purity, accuracies in percent, and the AUROC of eta (or the loss) for connectivities of a
    wrong class. The ground truth has the label maps' sizes.

    A connectivity's true class is the most frequent ground-truth class in it, its purity that
    class's share; those on ground-truth 255 alone are left out. accuracy_*: of labeled pixels. The
    rest counts connectivities: kept_right, the share of true labels among those kept;
    changed_right, of true classes among those given another class; dropped_wrong, of wrong labels
    among those dropped.
    """
    votes, labels, final = ground_truth_votes(data, truth), data.index["class_id"], verdicts.final
    each, known, true = np.arange(len(votes)), votes.sum(axis=1), votes.argmax(axis=1)
    seen, wrong, labeled = known > 0, true != labels, final != IGNORE
    right = votes[each, labels]
    right_after = votes[each, np.where(labeled, final, 0)] * labeled
    share = lambda part, of: 100 * float(part.sum() / of.sum()) if of.sum() else None
    among = lambda which, those: share(which & those, those)
    signal = np.where(np.isnan(verdicts.eta), verdicts.loss, verdicts.eta)
    usable = seen & data.judged & np.isfinite(signal)
    two_kinds = 0 < wrong[usable].sum() < usable.sum()
    purity = votes.max(axis=1)[seen] / known[seen]
    return {
        "purity": 100 * float(np.average(purity, weights=data.index["area"][seen])),
        "wrong_connectivities": among(wrong, seen),
        "auroc": float(roc_auc_score(wrong[usable], signal[usable])) if two_kinds else None,
        "accuracy_before": share(right, known),
        "accuracy_after": share(right_after, known[labeled]),
        "kept_right": among(~wrong, seen & (verdicts.decision == "kept")),
        "changed_right": among(final == true, seen & labeled & (final != labels)),
        "dropped_wrong": among(wrong, seen & (verdicts.decision == "dropped")),
    }


# ------------------------------------------------------------------------------- charts, pictures


def new_axes(title: str, x_label: str, height: int):
    """Empty axes with a grid, `height` pixels high, alone on their figure."""
    from matplotlib.figure import Figure

    axes = Figure((8.6, height / DPI), DPI, layout="constrained").subplots()
    axes.set_title(title, loc="left")
    axes.set(xlabel=x_label, axisbelow=True, xmargin=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def loss_histogram(data, verdicts):
    """The losses by decision; paper: normalised, with both Gaussians and the loss at tau_ns (the
    paper's Figure 4). A matplotlib Figure.
    """
    noise, decision, bins = verdicts.noise, verdicts.decision[data.judged], 60
    losses = np.where(np.isfinite(verdicts.loss), verdicts.loss, 0)[data.judged]
    threshold, name = verdicts.thresholds.get("global"), "mean of the classes' thresholds"
    if noise:
        losses = (losses - noise.low) / max(noise.high - noise.low, 1e-12)
        below = losses[noise.eta < verdicts.thresholds["tau_ns"]]
        threshold, name = below.max(initial=0) if not noise.fallback else None, "tau_ns"
    elif data.options.filter == "score":
        threshold = None
    x_label = ("normalised " if noise else "") + "cross-entropy against the label"
    axes = new_axes("SCC: losses of the connectivities", x_label, 460)
    groups, colours = [losses[decision == name] for name in DECISIONS], [*DECISIONS.values()]
    axes.hist(groups, bins, stacked=True, color=colours, label=[*DECISIONS])
    axes.grid(color="#e1e1e1")
    if noise and not noise.fallback:
        grid, gaussians = np.linspace(0, 1, 300), zip(noise.means, noise.deviations, noise.weights)
        for title, colour, (*gaussian, weight) in zip(
            ("clean", "noisy"), (GREEN, PURPLE), gaussians
        ):
            height = np.minimum(weight * norm.pdf(grid, *gaussian) / bins, 1) * len(losses)
            axes.plot(grid, height, color=colour, linewidth=3, label=title)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", label=name)
    axes.set_ylabel("connectivities")
    axes.figure.legend(loc="outside lower center", ncols=6)
    return axes.figure


def decisions_chart(per_class: dict[str, dict[str, int]]):
    """Shares of each class's connectivities that are kept, corrected and dropped. A matplotlib
    Figure.
    """
    names = {f"{n} ({sum(of.values())})": of for n, of in per_class.items() if any(of.values())}
    x_label = "% of the connectivities (their number)"
    axes = new_axes("SCC: decisions per class", x_label, 100 + 30 * len(names))
    table = np.array([[of[decision] for decision in DECISIONS] for of in names.values()]).T
    shares = 100 * table / table.sum(axis=0)
    for decision, share, end in zip(DECISIONS, shares, shares.cumsum(axis=0)):
        axes.barh([*names], share, left=end - share, color=DECISIONS[decision], label=decision)
    axes.invert_yaxis()
    axes.figure.legend(loc="outside lower center", ncols=3)
    return axes.figure


def panels(data, verdicts, classes: ClassSet) -> Image.Image:
    """Image | labels before | eta, or doubt: 1 - probability of the label | labels after, dropped
    regions hatched.
    """
    rows, labels, doubts = [], data.index["class_id"], 1 - trust(verdicts)
    for image in range(min(data.options.vis, len(data.rows))):
        picture, numbers = data.read(image)
        before, after, doubt = (
            np.append(values[data.part(image)], empty)[numbers]
            for values, empty in ((labels, IGNORE), (verdicts.final, IGNORE), (doubts, np.nan))
        )
        corrected = overlay(picture, after, classes.palette, 0.9)
        corrected = hatch(corrected, (before != IGNORE) & (after == IGNORE))
        rows.append([picture, colour_label(before, classes.palette), heat(doubt), corrected])
    doubt = "eta" if verdicts.noise else "doubt"
    columns = ["image", "before", f"{doubt}, blue 0, orange 1", "after, dropped hatched"]
    return contact_sheet(rows, columns, legend=classes, cell_width=400)


def trust_sheet(data, verdicts, classes: ClassSet) -> Image.Image | None:
    """For each class the EXAMPLES most and least trusted connectivities, outlined in their image;
    None where all are too small.
    """
    confidence, chosen, index = trust(verdicts), {}, data.index
    for class_id, name in enumerate(classes.names):
        large = (index["class_id"] == class_id) & (index["area"] >= MIN_THUMBNAIL_AREA)
        mine = np.flatnonzero(large)
        order = mine[np.argsort(-confidence[mine], kind="stable")].tolist()
        if half := min(EXAMPLES, len(order) // 2):
            pad = [None] * (EXAMPLES - half)
            chosen[name] = [*order[:half], *pad, *order[-half:], *pad]
    if not chosen:
        return None
    members = [member for row in chosen.values() for member in row if member is not None]
    tiles = {None: np.full((*THUMBNAIL, 3), 255, np.uint8)}
    for image in np.unique(index["image"][members]):
        picture, numbers = data.read(image)
        for member in members:
            if index["image"][member] == image:
                tiles[member] = thumbnail(picture, numbers, index[member])
    blank = [""] * (EXAMPLES - 1)
    rows = [[tiles[member] for member in row] for row in chosen.values()]
    return contact_sheet(rows, ["most trusted", *blank, "least trusted", *blank], [*chosen])


def thumbnail(picture: np.ndarray, numbers: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A square cut of the image around a connectivity, what is not the connectivity darkened."""
    side = int(max(row["width"], row["height"]) * 1.3) + 8
    x, y = int(row["x"] + (row["width"] - side) / 2), int(row["y"] + (row["height"] - side) / 2)
    shown = np.where((numbers == row["number"])[..., None], picture, picture // 2)
    cut = Image.fromarray(shown).crop((x, y, x + side, y + side))
    return np.asarray(cut.resize(THUMBNAIL, Image.Resampling.BILINEAR))
