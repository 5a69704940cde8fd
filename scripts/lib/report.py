"""Tables and pictures of a pipeline run (scripts/toy.sh, scripts/camvid.sh), over all of its seeds.

    python -m scripts.lib.report runs/toy_release --class-num 19 --pictures 8

Reads what the commands left in `<run>/seed<n>/`. Writes `<run>/results.json`, `<run>/results.md`
and `<run>/pictures/`; pictures of the same figures are not drawn again. A row that has not run is
not there, nor is one whose inputs have changed since. Seeds that are not finished are named and
left out.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from PIL import Image

from eval import Mode, label_map
from scripts.lib.run_folder import (
    LABEL_ROWS,
    MODEL_ROWS,
    finished,
    label_lists,
    of_one_setting,
    outdated,
    seeds_in,
    stage_costs,
    truth_list,
)
from util.charts import bar_chart, line_chart, save_chart
from util.labels import ClassSet, chosen_classes, read_image, read_label, read_list
from util.options import Argument, ClassOptions, CountFrom0, Folder, parse_options
from util.outputs import made_before, made_from, read_json, write_json, write_text
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import UserError, run_main, select_device
from util.training_log import read_training_log

LABEL_FIGURES = ("coverage", "accuracy", "miou")


@dataclass(kw_only=True)
class Options(ClassOptions):
    run: Argument[Folder]
    "folder of the run, with seed<n> in it"
    pictures: CountFrom0 = 8
    "images in the side-by-side picture; 0: no such picture"


# ------------------------------------------------------------------------------------------- tables


def gather(
    seed_folders: list[Path], rows: dict[str, str], prefix: str, keys: tuple, old: set[str]
) -> dict:
    """{row: {key: [value per seed]}} from `<seed>/eval/<prefix><row>/metrics.json`; only rows that
    every seed has, and none of an outdated stage (`old`).
    """
    table = {}
    for row in rows:
        files = [folder / "eval" / f"{prefix}{row}" / "metrics.json" for folder in seed_folders]
        if f"{prefix or 'eval_'}{row}" not in old and all(file.is_file() for file in files):
            metrics = [read_json(file) for file in files]
            table[row] = {key: [entry[key] for entry in metrics] for key in keys}
    return table


def mean_and_deviation(values: list[float]) -> str:
    """`51.3 ± 0.8`: mean and sample standard deviation; without the latter for one seed."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def label_table(quality: dict, title: str = "labels") -> str:
    """Coverage, accuracy and mIoU of each row of labels; title: of the first column."""
    header = ["coverage", "accuracy of labeled pixels", "mIoU (unlabeled counts as wrong)"]
    rows = [
        [LABEL_ROWS.get(row, row), *(mean_and_deviation(values[key]) for key in LABEL_FIGURES)]
        for row, values in quality.items()
    ]
    return markdown_table([title, *header], rows)


def model_table(models: dict, reported: dict[str, float] | None = None, title: str = "") -> str:
    """mIoU of every model and its gain over "before"; with a last column `title` of `reported`
    figures where given.
    """
    before, rows = models["before"]["miou"], []
    header = ["model", "mIoU", "gain over before"] + ([title] if reported else [])
    for row, values in models.items():
        gain = mean_and_deviation([a - b for a, b in zip(values["miou"], before)])
        gain = "" if row == "before" else gain
        cells = [MODEL_ROWS[row], mean_and_deviation(values["miou"]), gain]
        rows.append(cells + ([str(reported.get(row, "–"))] if reported else []))
    return markdown_table(header, rows)


def cost_table(costs: dict[str, dict]) -> str:
    """A dash where no manifest has a cost."""
    shown = lambda value: "–" if value is None else f"{value:.0f}"
    rows = [[n, shown(c["seconds"]), shown(c["peak_memory_mb"])] for n, c in costs.items()]
    return markdown_table(["stage", "seconds", "peak memory (MB)"], rows)


# ----------------------------------------------------------------------------------------- pictures


def on_their_way(
    root: Path,
    images: list[str],
    maps: dict[str, dict],
    models: dict[str, Path],
    classes: ClassSet,
    mode: Mode = "original",
    crop_size: int = 769,
) -> Image.Image:
    """A picture of images, a row each: the image, its label maps, predictions.

    Args:
        root: folder that paths start from.
        images: their paths.
        maps: {title: {image path: path of its label map}}; ground truth comes last.
        models: {title: checkpoint}, shown before the ground truth.
        classes: of all of them.
        mode, crop_size: how images go through the models, as eval.py has them.
    """
    from model.network import load_network

    device = select_device("auto")
    networks = {n: load_network(path, device, classes.count) for n, path in models.items()}
    rows = []
    for name in images:
        image = read_image(root / name)
        labels = {title: read_label(root / found[name]) for title, found in maps.items()}
        for title, network in networks.items():
            labels[title] = label_map(network, image, mode, crop_size)
        if "ground truth" in labels:  # last
            labels["ground truth"] = labels.pop("ground truth")
        rows.append([image, *(colour_label(label, classes.palette) for label in labels.values())])
    return contact_sheet(rows, ["image", *labels], legend=classes, cell_width=288)


def spread(images: list[str], count: int) -> list[str]:
    """`count` of the images, spread over them in the order of their names."""
    return sorted(images)[:: max(1, len(images) // count)][:count]


def side_by_side(seed: Path, classes: ClassSet, count: int) -> None:
    """image | pixel labels | PSA | SCC | prediction before | after | ground truth, for images
    spread over the list.
    """
    lists = label_lists(seed)
    suffix = "" if "psa" in lists else "_paper"
    titles = {"pixel": "pixel labels", f"psa{suffix}": "PSA", f"scc{suffix}": "SCC"}
    labels = {title: dict(read_list(lists[row])) for row, title in titles.items() if row in lists}
    labels["ground truth"] = truth = dict(read_list(truth_list(seed, "pixel")))
    models = {"prediction before": "source", "prediction after": f"adapt_seco{suffix}"}
    models = {title: seed / name / "latest.pth" for title, name in models.items()}
    models = {title: path for title, path in models.items() if path.is_file()}
    sheet = on_their_way(seed, spread(truth, count), labels, models, classes)
    save_picture(seed.parent / "pictures/side_by_side.png", sheet)


def miou_curve(seed: Path) -> None:
    """Validation mIoU after each epoch, of every adaptation of a seed."""
    folders = {title: seed / f"adapt_{row}" for row, title in MODEL_ROWS.items()}
    begun = {title: path for title, path in folders.items() if (path / "train.log").is_file()}
    logs = {title: read_training_log(path) for title, path in begun.items()}
    if series := {title: log.curve for title, log in logs.items() if log.miou}:
        chart = line_chart(series, "", "epoch", "target validation mIoU (%)")
        save_chart(seed.parent / "pictures/miou_curve.png", chart)


def ablation_chart(models: dict):
    """Validation mIoU of every model as bars; with standard deviations where there are seeds."""
    titles = {row: MODEL_ROWS[row].replace("UniMatch on ", "").split(" (")[0] for row in models}
    values = {title: models[row]["miou"] for row, title in titles.items()}
    means = {title: statistics.mean(found) for title, found in values.items()}
    deviations = {t: statistics.stdev(found) for t, found in values.items() if len(found) > 1}
    return bar_chart(means, "target validation mIoU (%)", deviations)


def draw(options: Options, seed: Path, classes: ClassSet, models: dict) -> None:
    """All pictures of a run, of its first seed; none if they were drawn of the same figures."""
    pictures = options.run / "pictures"
    figures = sorted(options.run.glob("seed*/eval/*/metrics.json"))
    inputs = {str(path.relative_to(options.run)): path for path in figures}
    source = made_from({"pictures": options.pictures}, inputs)
    if made_before(pictures / "made_from.json", source):
        return
    pictures.mkdir(exist_ok=True)
    if options.pictures:
        side_by_side(seed, classes, options.pictures)
    miou_curve(seed)
    if len(models) > 2:
        save_chart(pictures / "ablation.png", ablation_chart(models))
    lists = label_lists(seed)
    if scc := lists.get("scc") or lists.get("scc_paper"):
        for picture in (seed / scc.parent.name / "report").glob("*.png"):
            shutil.copyfile(picture, pictures / f"scc_{picture.name}")
    write_json(pictures / "made_from.json", {"made_from": source})


# --------------------------------------------------------------------------------------------- main


def reported_seeds(run: Path) -> tuple[list[Path], set[str], list[int]]:
    """(the seeds, stages that are left out, numbers of unfinished seeds)."""
    everyone = seeds_in(run)
    seeds = finished(everyone)
    if not seeds:
        raise UserError(f"{run}: no finished seed<n> folder in it; run scripts/toy.sh first")
    old = set().union(*map(outdated, seeds))
    for stage in stage_costs(seeds):
        if stage not in old and not of_one_setting(seeds, stage):
            raise UserError(
                f"{run}: its seeds have stage {stage} with other options; run all of them again"
                " (SEEDS), or move the folders of the old ones away"
            )
    return seeds, old, [int(seed.name[4:]) for seed in everyone if seed not in seeds]


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, __doc__, argv)
    run, classes = options.run, chosen_classes(options)
    seeds, old, unfinished = reported_seeds(run)
    if old:
        print(f"left out, from inputs that have changed since: {', '.join(sorted(old))}")
    numbers = [int(seed.name[4:]) for seed in seeds]
    quality = gather(seeds, LABEL_ROWS, "quality_", LABEL_FIGURES, old)
    models = gather(seeds, MODEL_ROWS, "", ("miou",), old)
    costs = {name: cost for name, cost in stage_costs(seeds).items() if name not in old}
    known = [cost for cost in costs.values() if cost["seconds"] is not None]
    total = {
        "seconds": sum(cost["seconds"] for cost in known),
        "peak_memory_mb": max((cost["peak_memory_mb"] for cost in known), default=None),
    }

    names = ", ".join(map(str, numbers))
    text = f"Seeds: {names}. Figures in %, mean ± standard deviation over the seeds.\n\n"
    if unfinished:
        line = f"Not finished, left out: seeds {', '.join(map(str, unfinished))}."
        print(line)
        text += f"{line}\n\n"
    text += "### Pseudo-labels of the target's training images\n\n" + label_table(quality)
    if "before" in models:
        text += "\n### Target validation mIoU (last checkpoint)\n\n" + model_table(models)
    text += "\n### Cost of each stage\n\n" + cost_table({**costs, "total": total})
    results = {"seeds": numbers, "unfinished": unfinished, "labels": quality, "models": models}
    write_json(run / "results.json", {**results, "stages": costs})
    write_text(run / "results.md", text)
    draw(options, seeds[0], classes, models)
    print(f"tables: {run / 'results.md'}, {run / 'results.json'}; pictures: {run / 'pictures'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
