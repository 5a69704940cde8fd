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

from util.charts import CYCLE, bar_chart, histogram, save_chart
from util.labels import IGNORE, ClassSet, read_label
from util.outputs import atomic_path
from util.page import write_page
from util.pictures import colour_label, contact_sheet, hatch, heat, overlay, save_picture

DECISIONS = {"kept": CYCLE[0], "corrected": CYCLE[1], "dropped": CYCLE[6]}
THUMBNAIL = (96, 96)  # pixels
# A classifier has learned if it gives so many times the largest class's share of the labels their
# class (or half of the rest, where that is less). Of 12 photographs, 60 iterations gave 1.9 times
# and ruined the labels, 1,000 gave 3.0 times and helped.
LEARNED = 2.0
EXAMPLES = 4  # most and least trusted connectivities shown of a class
MIN_THUMBNAIL_AREA = 40  # pixels; smaller connectivities show nothing


def write_report(
    folder: Path,
    data,
    verdicts,
    classes: ClassSet,
    gt_rows: dict[str, str] | None,
    images: int,
    loss: float | None,
) -> dict:
    """Write the pictures and index.html into `folder`; return the figures of report.json.

    Args:
        folder: where the report goes.
        data, verdicts: what was judged, and how.
        classes: of the labels.
        gt_rows: {image path: ground-truth path} or None.
        images: how many are shown as panels.
        loss: of the classifier's last iterations, if it is known.
    """
    report = figures(data, verdicts, classes) | health(data, verdicts, classes, loss)
    if gt_rows is not None:  # the only ground truth that is ever opened
        report["ground_truth"] = compare_with_ground_truth(data, verdicts, gt_rows)
    charts = {
        "loss_histogram": ("Losses", loss_histogram(data, verdicts)),
        "decisions": ("Decisions per class", decisions_chart(data, verdicts, classes)),
    }
    pictures = {}
    if images:
        pictures["panels"] = ("Before and after", panels(data, verdicts, classes, images))
    thumbnails = trust_sheet(data, verdicts, classes)
    if thumbnails is not None:
        pictures["thumbnails"] = ("Most and least trusted connectivities of each class", thumbnails)
    for save, shown in ((save_chart, charts), (save_picture, pictures)):
        for name, (_, picture) in shown.items():
            save(folder / f"{name}.png", picture)
    rows = [
        (name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value)
        for name, value in {**report, **report.get("ground_truth", {})}.items()
        if value is not None and not isinstance(value, (dict, list))
    ]
    rows += [("classes that lose all their pixels", ", ".join(report["lost classes"]) or "none")]
    rows += [("warning", text) for text in report["warnings"]]
    figures_shown = [(f"{name}.png", title) for name, (title, _) in {**charts, **pictures}.items()]
    parts = [{"rows": rows}, {"figures": figures_shown}]
    write_page(folder / "index.html", f"SCC: {data.options.recipe} recipe", parts)
    return report


def write_connectivities(path: Path, data, verdicts) -> None:
    """connectivities.csv: one line each, numbers at full precision. verdicts: seco_scc's."""
    columns = ("image", "id", "class", "area", "x", "y", "width", "height", "loss", "score")
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "prediction", "eta", "decision", "final"])
        for i, row in enumerate(data.index):
            eta = float(verdicts.eta[i])
            writer.writerow(
                [
                    data.rows[row["image"]][0],
                    *(int(value) for value in list(row)[1:]),
                    repr(float(verdicts.loss[i])),
                    repr(float(verdicts.score[i])),
                    int(verdicts.predicted[i]),
                    "" if np.isnan(eta) else repr(eta),
                    verdicts.decision[i],
                    int(verdicts.final[i]),
                ]
            )


def trust(verdicts) -> np.ndarray:
    """How far a connectivity's label is trusted, 0 to 1: 1 - eta in the paper's recipe, the
    classifier's probability of the label in the release one; 0 where the loss is not finite.
    """
    probability = np.exp(-np.where(np.isfinite(verdicts.loss), verdicts.loss, np.inf))
    return np.where(np.isnan(verdicts.eta), probability, 1 - verdicts.eta)


def figures(data, verdicts, classes: ClassSet) -> dict:
    """Counts and shares of the decisions; shares of pixels in percent."""
    areas = data.index["area"].astype(np.int64)
    sizes = sum(label_size(data, i) for i in range(len(data.rows)))
    per_class = {}
    for class_id, name in enumerate(classes.names):
        mine = data.index["class_id"] == class_id
        per_class[name] = {d: int((mine & (verdicts.decision == d)).sum()) for d in DECISIONS}
    noise = verdicts.noise
    return {
        "images": len(data.rows),
        "connectivities": len(data.index),
        "judged": int(data.judged.sum()),
        **{d: int((verdicts.decision == d).sum()) for d in DECISIONS},
        "changed class": int(
            ((verdicts.final != data.index["class_id"]) & (verdicts.final != IGNORE)).sum()
        ),
        "coverage_before": 100 * float(areas.sum()) / sizes,
        "coverage_after": 100 * float(areas[verdicts.final != IGNORE].sum()) / sizes,
        "note": noise.fallback if noise is not None else None,
        "thresholds": {str(k): v for k, v in verdicts.thresholds.items()},
        "mixture": (
            None
            if noise is None
            else {
                "means": noise.means,
                "deviations": noise.deviations,
                "weights": noise.weights,
                "loss_range": (noise.low, noise.high),
            }
        ),
        "per_class": per_class,
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
    lost = [n for c, n in enumerate(classes.names) if c in labels and c not in final]
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
        "lost classes": lost,
        "warnings": warnings,
    }


def in_short(figures: dict, class_num: int) -> list[str]:
    """What the figures of a report say, in lines for the terminal."""
    right, largest = figures["accuracy on its labels"], figures["largest class"]
    lost = ", ".join(figures["lost classes"])
    lines = [
        f"note: {figures['note']}",
        f"the classifier gives {right:.1f} % of the labels their class; the largest class is"
        f" {largest:.1f} % of them, chance {100 / class_num:.1f} %",
        f"note: all pixels of these classes are dropped: {lost}",
        f"{figures['kept']} connectivities kept, {figures['corrected']} corrected,"
        f" {figures['dropped']} dropped; {figures['coverage_before']:.1f} % of the pixels labeled"
        f" before, {figures['coverage_after']:.1f} % after",
    ]
    there = (figures["note"], True, lost, True)
    return [line for line, is_there in zip(lines, there) if is_there]


def label_size(data, image: int) -> int:
    with Image.open(data.root / data.rows[image][1]) as label:
        return label.width * label.height


def votes_of_image(data, image: int, truth_path: str) -> np.ndarray:
    """Ground-truth pixels of each class in each connectivity of image i: int64 N x K."""
    truth, numbers = read_label(data.root / truth_path, data.class_num), data.numbers(image)
    count, counted = len(data.of_image(image)), (numbers >= 0) & (truth != IGNORE)
    places = numbers[counted].astype(np.int64) * data.class_num + truth[counted]
    return np.bincount(places, minlength=count * data.class_num).reshape(count, data.class_num)


def compare_with_ground_truth(data, verdicts, gt_rows: dict[str, str]) -> dict:
    """Purity, accuracies in percent, and the AUROC of eta (or the loss) for connectivities of a
    wrong class. The ground truth has the label maps' sizes.

    A connectivity's true class is the most frequent ground-truth class in it, its purity that
    class's share; those on ground-truth 255 alone are left out. accuracy_*: of labeled pixels,
    before, after, and if exactly the connectivities of a wrong class were dropped, as a perfect
    noise model would. The rest counts connectivities:
    - kept_right: the share of true labels among those kept;
    - changed_right: of true classes among those given another class;
    - dropped_wrong: of wrong labels among those dropped;
    - sure_right: of true classes among predictions other than the label whose probability exceeds
      tau_cr, whatever was decided;
    - not_judged_wrong: of wrong labels among those under --min-area.
    """
    true, purity, right_before, right_after, known = (np.zeros(len(data.index)) for _ in range(5))
    for image, (image_path, _) in enumerate(data.rows):
        votes, part = votes_of_image(data, image, gt_rows[image_path]), data.part(image)
        each, final = np.arange(len(votes)), verdicts.final[part]
        true[part], known[part] = votes.argmax(axis=1), votes.sum(axis=1)
        purity[part] = votes.max(axis=1) / np.maximum(known[part], 1)
        right_before[part] = votes[each, data.index["class_id"][part]]
        right_after[part] = np.where(
            final == IGNORE, 0, votes[each, np.minimum(final, data.class_num - 1)]
        )
    seen = known > 0
    wrong = true != data.index["class_id"]
    labeled, changed = verdicts.final != IGNORE, verdicts.final != data.index["class_id"]
    share = lambda part, of: 100 * float(part.sum() / of.sum()) if of.sum() else None
    among = lambda which, those: share(which[those], np.ones(those.sum()))
    signal = np.where(np.isnan(verdicts.eta), verdicts.loss, verdicts.eta)
    usable = seen & data.judged & np.isfinite(signal)
    sure = seen & (verdicts.score > data.options.tau_cr)
    sure &= verdicts.predicted != data.index["class_id"]
    return {
        "purity": 100 * float(np.average(purity[seen], weights=data.index["area"][seen])),
        "wrong_connectivities": among(wrong, seen),
        "auroc": (
            float(roc_auc_score(wrong[usable], signal[usable]))
            if 0 < wrong[usable].sum() < usable.sum()
            else None
        ),
        "accuracy_before": share(right_before, known),
        "accuracy_after": share(right_after, known[labeled]),
        "accuracy_wrong_dropped": share(right_before[~wrong], known[~wrong]),
        "kept_right": among(~wrong, seen & (verdicts.decision == "kept")),
        "changed_right": among(verdicts.final == true, seen & labeled & changed),
        "sure_right": among(verdicts.predicted == true, sure),
        "sure": int(sure.sum()),
        "dropped_wrong": among(wrong, seen & (verdicts.decision == "dropped")),
        "not_judged_wrong": among(wrong, seen & ~data.judged),
    }


def loss_histogram(data, verdicts):
    """The losses by decision; paper: normalised, with both Gaussians and the loss at tau_ns (the
    paper's Figure 4). A matplotlib Figure.
    """
    noise, decision = verdicts.noise, verdicts.decision[data.judged]
    losses = np.where(np.isfinite(verdicts.loss), verdicts.loss, 0)[data.judged]
    curves, thresholds, bins = {}, {}, 60
    if noise is None:
        limit = verdicts.thresholds["global"]
        if limit is not None and data.options.filter != "score":
            thresholds = {"mean of the classes' thresholds": limit}
    else:
        losses = (losses - noise.low) / max(noise.high - noise.low, 1e-12)
        if noise.fallback is None:
            grid = np.linspace(0, 1, 300)
            for name, *gaussian, weight in zip(
                ("clean", "noisy"), noise.means, noise.deviations, noise.weights
            ):
                height = weight * norm.pdf(grid, *gaussian) * len(losses) / bins
                curves[name] = (grid, np.minimum(height, len(losses)))
            below = losses[noise.eta < verdicts.thresholds["tau_ns"]]
            thresholds = {"tau_ns": float(below.max())} if len(below) else {}
    return histogram(
        {name: losses[decision == name] for name in DECISIONS},
        "SCC: losses of the connectivities",
        ("" if noise is None else "normalised ") + "cross-entropy against the label",
        "connectivities",
        bins,
        curves,
        thresholds,
        colours=(*DECISIONS.values(), CYCLE[2], CYCLE[3]),  # the last two: of the Gaussians
    )


def decisions_chart(data, verdicts, classes: ClassSet):
    """Shares of each class's connectivities that are kept, corrected and dropped. A matplotlib
    Figure.
    """
    shares: dict[str, dict[str, float]] = {decision: {} for decision in DECISIONS}
    for class_id in np.unique(data.index["class_id"]):
        mine = data.index["class_id"] == class_id
        for decision in DECISIONS:
            share = 100 * np.mean(verdicts.decision[mine] == decision)
            shares[decision][f"{classes.names[class_id]} ({mine.sum()})"] = share
    return bar_chart(
        shares,
        "SCC: decisions per class",
        "% of the connectivities (their number)",
        colours=DECISIONS.values(),
    )


def panels(data, verdicts, classes: ClassSet, images: int) -> Image.Image:
    """Image | labels before | eta, or doubt: 1 - probability of the label | labels after, dropped
    regions hatched.
    """
    rows = []
    for image in range(min(images, len(data.rows))):
        picture, numbers = data.read(image)
        part = data.part(image)
        take = lambda values, empty: np.append(values[part], empty)[numbers]  # noqa: E731
        before = take(data.index["class_id"], IGNORE)
        after = take(verdicts.final, IGNORE)
        doubt = take((1 - trust(verdicts)).astype(float), np.nan)
        after_picture = hatch(
            overlay(picture, after, classes.palette, 0.9), (before != IGNORE) & (after == IGNORE)
        )
        rows.append([picture, colour_label(before, classes.palette), heat(doubt), after_picture])
    doubt_title = "doubt" if verdicts.noise is None else "eta"
    return contact_sheet(
        rows,
        ["image", "before", f"{doubt_title}, blue 0, orange 1", "after, dropped hatched"],
        legend=classes,
        cell_width=400,
    )


def trust_sheet(data, verdicts, classes: ClassSet) -> Image.Image | None:
    """For each class the EXAMPLES most and least trusted connectivities, outlined in their
    image.
    """
    confidence, chosen = trust(verdicts), {}
    for class_id in range(classes.count):
        mine = np.flatnonzero(
            (data.index["class_id"] == class_id) & (data.index["area"] >= MIN_THUMBNAIL_AREA)
        )
        if len(mine) >= 2:
            order = mine[np.argsort(-confidence[mine], kind="stable")]
            half = min(EXAMPLES, len(order) // 2)
            chosen[class_id] = ([*order[:half]], [*order[-half:]])
    if not chosen:
        return None
    wanted: dict[int, list[int]] = {}
    for best, worst in chosen.values():
        for member in (*best, *worst):
            wanted.setdefault(int(data.index["image"][member]), []).append(int(member))
    tiles = {}
    for image, members in wanted.items():
        picture, numbers = data.read(image)
        for member in members:
            tiles[member] = thumbnail(picture, numbers, data.index[member])
    empty = np.full((*THUMBNAIL, 3), 255, np.uint8)
    rows = []
    for best, worst in chosen.values():
        pad = [empty] * (EXAMPLES - len(best))
        rows.append([*(tiles[int(m)] for m in best), *pad, *(tiles[int(m)] for m in worst), *pad])
    return contact_sheet(
        rows,
        ["most trusted", *[""] * (EXAMPLES - 1), "least trusted", *[""] * (EXAMPLES - 1)],
        [classes.names[c] for c in chosen],
    )


def thumbnail(picture: np.ndarray, numbers: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A square cut of the image around a connectivity, what is not the connectivity darkened."""
    side = int(max(row["width"], row["height"]) * 1.3) + 8
    y, x = (int(row[a] + row[s] / 2 - side / 2) for a, s in (("y", "height"), ("x", "width")))
    cut = (
        Image.fromarray(picture)
        .crop((x, y, x + side, y + side))
        .resize(THUMBNAIL, Image.Resampling.BILINEAR)
    )
    mask = Image.fromarray((numbers == row["number"]).astype(np.uint8) * 255).crop(
        (x, y, x + side, y + side)
    )
    inside = np.asarray(mask.resize(THUMBNAIL, Image.Resampling.BILINEAR))[..., None] / 255
    return (np.asarray(cut) * (0.45 + 0.55 * inside)).astype(np.uint8)
