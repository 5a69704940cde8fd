"""The report of SCC: histogram of losses, decisions per class, panels, thumbnails, figures, one
page that shows them.

`data` and `verdicts` are those of seco_scc.py. Only a ground-truth list that is given is opened.
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from util.labels import IGNORE, ClassSet, read_label
from util.pictures import (
    COLOURS,
    PAPER,
    Chart,
    colour_label,
    contact_sheet,
    font,
    hatch,
    heat,
    histogram,
    overlay,
    save_picture,
)
from util.run import atomic_path

DECISIONS = {"kept": COLOURS[0], "corrected": COLOURS[1], "dropped": COLOURS[6]}
THUMBNAIL = (96, 96)  # pixels
EXAMPLES = 4  # most and least trusted connectivities shown of a class
MIN_THUMBNAIL_AREA = 40  # pixels; smaller connectivities show nothing


def write_report(
    folder: Path, data, verdicts, classes: ClassSet, gt_rows: dict[str, str] | None, images: int
) -> dict:
    """Write the pictures and index.html into `folder`; return the figures of report.json.

    gt_rows: {image path: ground-truth path} or None. images: how many are shown as panels.
    """
    report = figures(data, verdicts, classes)
    if gt_rows is not None:  # the only ground truth that is ever opened
        report["ground_truth"] = compare_with_ground_truth(data, verdicts, gt_rows)
    pictures = {
        "loss_histogram": ("Losses", loss_histogram(data, verdicts)),
        "decisions": ("Decisions per class", decisions_chart(data, verdicts, classes)),
    }
    if images:
        pictures["panels"] = ("Before and after", panels(data, verdicts, classes, images))
    thumbnails = trust_sheet(data, verdicts, classes)
    if thumbnails is not None:
        pictures["thumbnails"] = ("Most and least trusted connectivities of each class", thumbnails)
    for name, (_, picture) in pictures.items():
        save_picture(folder / f"{name}.png", picture)
    figures_shown = {**report, **report.get("ground_truth", {})}
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th>"
        f"<td>{html.escape(shown(value))}</td></tr>"
        for name, value in figures_shown.items()
        if value is not None and not isinstance(value, dict)
    )
    sections = "".join(
        f"<h2>{html.escape(title)}</h2><img src='{name}.png' style='max-width:100%'>"
        for name, (title, _) in pictures.items()
    )
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(
            "<!doctype html><meta charset='utf-8'><title>SCC</title><body"
            " style='font-family:sans-serif;margin:2em'><h1>SCC:"
            f" {html.escape(data.options.recipe)} recipe</h1><table"
            f" style='text-align:left'>{rows}</table>{sections}",
            encoding="utf-8",
        )
    return report


def shown(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


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
    share = lambda part, of: 100 * float(part.sum() / of.sum()) if of.sum() else None  # noqa: E731
    signal = np.where(np.isnan(verdicts.eta), verdicts.loss, verdicts.eta)
    usable = seen & data.judged & np.isfinite(signal)
    sure = (
        seen
        & (verdicts.score > data.options.tau_cr)
        & (verdicts.predicted != data.index["class_id"])
    )
    return {
        "purity": 100 * float(np.average(purity[seen], weights=data.index["area"][seen])),
        "wrong_connectivities": share(wrong[seen], np.ones(seen.sum())),
        "auroc": (
            float(roc_auc_score(wrong[usable], signal[usable]))
            if 0 < wrong[usable].sum() < usable.sum()
            else None
        ),
        "accuracy_before": share(right_before, known),
        "accuracy_after": share(right_after, known[labeled]),
        "accuracy_wrong_dropped": share(right_before[~wrong], known[~wrong]),
        "kept_right": share(
            (~wrong & (verdicts.decision == "kept"))[seen], (verdicts.decision == "kept")[seen]
        ),
        "changed_right": share(
            (verdicts.final == true)[seen & labeled & changed],
            np.ones((seen & labeled & changed).sum()),
        ),
        "sure_right": share((verdicts.predicted == true)[sure], np.ones(sure.sum())),
        "sure": int(sure.sum()),
        "dropped_wrong": share(
            (wrong & (verdicts.decision == "dropped"))[seen], (verdicts.decision == "dropped")[seen]
        ),
        "not_judged_wrong": share((wrong & ~data.judged)[seen], ~data.judged[seen]),
    }


def loss_histogram(data, verdicts) -> Image.Image:
    """The losses by decision; paper: normalised, with both Gaussians and the loss at tau_ns (the
    paper's Figure 4).
    """
    noise, decision = verdicts.noise, verdicts.decision[data.judged]
    losses = np.where(np.isfinite(verdicts.loss), verdicts.loss, 0)[data.judged]
    colours = (*DECISIONS.values(), COLOURS[2], COLOURS[3])  # the last two: of the Gaussians
    if noise is None:
        limit = verdicts.thresholds["global"]
        threshold = (
            {}
            if limit is None or data.options.filter == "score"
            else {"mean of the classes' thresholds": limit}
        )
        groups = {name: losses[decision == name] for name in DECISIONS}
        return histogram(
            groups,
            "SCC: losses of the connectivities",
            "cross-entropy against the label",
            thresholds=threshold,
            colours=colours,
        )
    x = (losses - noise.low) / max(noise.high - noise.low, 1e-12)
    groups = {name: x[decision == name] for name in DECISIONS}
    curves, thresholds, bins = {}, {}, 60
    if noise.fallback is None:
        grid = np.linspace(0, 1, 300)
        for name, mean, deviation, weight in zip(
            ("clean", "noisy"), noise.means, noise.deviations, noise.weights
        ):
            density = (
                weight
                / (deviation * np.sqrt(2 * np.pi))
                * np.exp(-(((grid - mean) / deviation) ** 2) / 2)
            )
            curves[name] = (grid, np.minimum(density * len(x) / bins, len(x)))
        below = x[noise.eta < verdicts.thresholds["tau_ns"]]
        thresholds = {"tau_ns": float(below.max())} if len(below) else {}
    return histogram(
        groups,
        "SCC: losses of the connectivities",
        "normalised cross-entropy against the label",
        bins,
        curves,
        thresholds,
        colours=colours,
    )


def decisions_chart(data, verdicts, classes: ClassSet) -> Image.Image:
    """Shares of each class's connectivities that are kept, corrected and dropped."""
    present = [c for c in range(classes.count) if (data.index["class_id"] == c).any()]
    chart = Chart(
        "SCC: decisions per class",
        "",
        "% of connectivities",
        (-0.6, len(present) - 0.4),
        (0, 100),
        size=(max(860, 74 * len(present)), 460),
        x_ticks=[(i, classes.names[c].replace("traffic ", "t. ")) for i, c in enumerate(present)],
    )
    for i, class_id in enumerate(present):
        mine, base = data.index["class_id"] == class_id, 0.0
        for name, colour in DECISIONS.items():
            share = 100 * float((mine & (verdicts.decision == name)).sum() / mine.sum())
            if share:
                chart.bar(i - 0.36, i + 0.36, base + share, colour, base=base)
            base += share
        chart.draw.text(
            (chart.x(i), chart.top + 3), str(int(mine.sum())), PAPER, font(13), anchor="ma"
        )
    for name, colour in DECISIONS.items():
        chart.key(name, colour)
    return chart.image


def panels(data, verdicts, classes: ClassSet, images: int) -> Image.Image:
    """Image | labels before | eta (or 1 - score) | labels after, dropped regions hatched."""
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
    doubt_title = "doubt: 1 - probability of the label" if verdicts.noise is None else "eta"
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
