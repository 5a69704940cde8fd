"""results.md of a task and its page: index.html in its folder, to be read in a browser without
network.

    python -m scripts.lib.page runs/gta2cs

Reads what the commands left: metrics and manifests of all stages, compare.txt
(scripts/compare_logs.py) and pictures/; draws images with their labels and predictions. Files
elsewhere, as a data set's label folders, are linked from where they are. scripts/lib/report.py is
the same for a run of several seeds.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from eval import Mode, label_map, labels_in_folder
from scripts.lib.health import health
from scripts.lib.run_folder import manifest_of, stage_costs, task_folders
from util.labels import ClassSet, read_classes, read_image, read_label, read_list
from util.options import Argument, Folder, parse_options
from util.outputs import made_before, made_from, read_json, write_json, write_text
from util.page import write_page
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import UserError, run_main, select_device

CAPTIONS = {  # of the pictures, in the order in which they are shown
    "side_by_side": "Target images on their way: starting labels, PSA, SCC, predictions",
    "validation": "Target validation images: predictions before and after, ground truth",
    "miou_curve": "Target validation mIoU after each evaluated epoch",
    "compare": "This run beside the authors' log",
    "ablation": "Target validation mIoU of every row",
    "sweep": "Labels after SCC at other thresholds",
}
LINKED = {"report/index.html": "SCC's page", "train.log": "training log"}
PANELS = 4  # shown of each folder that PSA made


# ------------------------------------------------------------------------------- tables, any run's


def markdown(parts: list[dict]) -> str:
    """Headings, texts and tables of a page's parts (util/page.py) as Markdown."""
    blocks = []
    for part in parts:
        if "heading" in part:
            blocks.append(f"### {part['heading']}\n")
        if "text" in part:
            blocks.append(f"{part['text']}\n")
        if "head" in part:
            rows = ["| " + " | ".join(row) + " |\n" for row in (part["head"], *part["rows"])]
            rows.insert(1, "|" + "---|" * len(part["head"]) + "\n")
            blocks.append("".join(rows))
    return "\n".join(blocks)


def cost_table(costs: dict[str, dict]) -> dict:
    """Part of a page: costs as stage_costs gives them."""
    rows = [[n, f"{c['seconds']:.0f}", f"{c['peak_memory_mb']:.0f}"] for n, c in costs.items()]
    return {"head": ["stage", "seconds", "peak memory (MB)"], "rows": rows}


# ----------------------------------------------------------------------------- pictures, any run's


def draw_images(
    picture: Path,
    root: Path,
    images: list[str],
    labels: dict[str, Path | None],
    models: dict[str, Path],
    truth: dict[str, str],
    classes: ClassSet,
    mode: Mode,
    crop_size: int,
) -> None:
    """Draw images, a row each: the image, its label maps, predictions, ground truth. Not again if
    nothing has changed since.

    Args:
        picture: the file, PNG; a record of what it was made from is beside it.
        root: folder that paths of images and of the ground truth start from.
        images: their paths.
        labels: {title: folder of label maps}; None, or one that lacks an image, is left out.
        models: {title: checkpoint}.
        truth: {image: path of its ground truth}; {} where there is none.
        classes: of all of them.
        mode, crop_size: how images go through the models, as eval.py has them.
    """
    from model.network import load_network

    maps = {t: labels_in_folder(folder, images) for t, folder in labels.items() if folder}
    maps = {title: found for title, found in maps.items() if len(found) == len(images)}
    files = [root / image for image in images] + [*models.values()]
    files += [path for found in maps.values() for path in found.values()]
    files += [root / truth[image] for image in images if truth]
    settings = {"titles": [*maps, *models], "names": classes.names, "mode": [mode, crop_size]}
    source, record = made_from(settings, {str(p): p for p in files}), picture.with_suffix(".json")
    if picture.is_file() and made_before(record, source):
        return
    device = select_device("auto")
    networks = {n: load_network(path, device, classes.count) for n, path in models.items()}
    rows = []
    for name in images:
        image = read_image(root / name)
        shown = {title: read_label(found[name]) for title, found in maps.items()}
        shown |= {t: label_map(net, image, mode, crop_size) for t, net in networks.items()}
        if truth:
            shown["ground truth"] = read_label(root / truth[name])
        rows.append([image, *(colour_label(label, classes.palette) for label in shown.values())])
    save_picture(picture, contact_sheet(rows, ["image", *shown], legend=classes, cell_width=288))
    write_json(record, {"made_from": source})


def spread(images: list[str], count: int) -> list[str]:
    """`count` of the images, spread over them in the order of their names."""
    return sorted(images)[:: max(1, len(images) // count)][:count]


# --------------------------------------------------------------------------------- page, any run's


def address(path: Path, run: Path) -> str:
    """The path as the page links it."""
    return quote(Path(os.path.relpath(path, run)).as_posix())


def pictures(run: Path, folders: dict[str, Path]) -> list[tuple[str, str]]:
    """(address, caption) of the run's pictures, and a few of PSA's and SCC's of the first seed."""
    files = {run / f"pictures/{name}.png": caption for name, caption in CAPTIONS.items()}
    first = Path(next(iter(folders))).parent  # `seed0`, or `.` of a task
    for name in ("psa", "psa_paper", "scc", "scc_paper"):
        if folder := folders.get(str(first / name)):
            found = sorted((folder / "vis").rglob("*.png"))[:PANELS]
            found += sorted((folder / "report").glob("*.png"))
            files |= {path: f"{folder.name}: {path.stem}" for path in found}
    return [(address(path, run), caption) for path, caption in files.items() if path.is_file()]


def write_results(
    run: Path, tables: list[dict], more: list[dict], folders: dict[str, Path]
) -> None:
    """Write results.md and the page.

    Args:
        run: folder that they go to.
        tables: parts of a page (util/page.py) with what both have.
        more: parts that only the page has, after the tables.
        folders: {"psa" or "seed0/psa": folder} of all stages.
    """
    write_text(run / "results.md", markdown(tables))
    manifests = {n: made for n, folder in folders.items() if (made := manifest_of(folder))}
    links = [
        (address(folder / file, run), f"{title}: {name}")
        for name, folder in folders.items()
        for file, title in LINKED.items()
        if (folder / file).is_file()
    ]
    parts = tables + more
    for heading, kind, content in (
        ("Pictures", "figures", pictures(run, folders)),
        ("More", "links", links),
        ("Commands", "details", [(n, made["command"]) for n, made in manifests.items()]),
        ("Manifests", "details", [(n, json.dumps(m, indent=1)) for n, m in manifests.items()]),
    ):
        if content:
            parts.append({"heading": heading, kind: content})
    page = run / "index.html"
    write_page(page, f"SeCo: {run.resolve().name}", parts)
    print(f"tables: {run / 'results.md'}; page: {page}")


# ------------------------------------------------------------------------------------------ a task


@dataclass(kw_only=True)
class Options:
    run: Argument[Folder]
    "folder of the run"


def task_tables(run: Path, folders: dict[str, Path]) -> list[dict]:
    """IoU of each class before and after, what the labels tell of themselves, and the cost of each
    stage, as parts of a page.
    """
    files = {name: run / f"eval_{name}/metrics.json" for name in ("before", "after")}
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    if not found and not (run / "adapt/summary.json").is_file():
        raise UserError(
            f"{run}: holds no eval_after/metrics.json and no finished adapt/; finish the run"
        )
    parts = []
    if found:
        shown = lambda value: "–" if value is None else f"{value:.2f}"
        rows = [["mIoU", *(shown(metrics["miou"]) for metrics in found.values())]]
        for name in next(iter(found.values()))["iou"]:
            rows.append([name, *(shown(metrics["iou"][name]) for metrics in found.values())])
        parts += [{"heading": "Validation IoU (%)", "head": ["class", *found], "rows": rows}]
    rows, warnings = health(folders)
    if rows:
        parts.append({"heading": "The labels, as they tell of themselves"})
        parts += [{"text": f"Warning: {warning}."} for warning in warnings]
        parts.append({"head": ["stage", "what", "figure"], "rows": rows})
    return [*parts, {"heading": "Cost of each stage", **cost_table(stage_costs([folders]))}]


def draw_task(run: Path, folders: dict[str, Path]) -> None:
    """side_by_side.png, a few images with their labels at each stage; validation.png, a few of the
    validation images with predictions before and after and the ground truth.
    """
    adapted = run / "adapt/latest.pth"
    if not adapted.is_file():
        return
    options = manifest_of(run / "adapt")["options"]
    root, classes = Path(options["root_path"]), read_classes(run / "adapt/classes.txt")
    how = classes, options["eval_mode"], options["crop_size"]
    lists = [options[f"{name}_id_path"] for name in ("labeled", "unlabeled")]
    images = spread([row[0] for path in lists if path for row in read_list(path, (1, 2))], 4)
    titles = {"starting labels": "pixel", "PSA": "psa", "SCC": "scc"}
    labels = {title: folders.get(stage) for title, stage in titles.items()}
    picture = run / "pictures/side_by_side.png"
    draw_images(picture, root, images, labels, {"prediction": adapted}, {}, *how)
    if options["val_id_path"]:
        truth, labels = dict(read_list(options["val_id_path"])), folders.get("before_labels")
        picture, images = run / "pictures/validation.png", spread([*truth], 4)
        draw_images(picture, root, images, {"before": labels}, {"after": adapted}, truth, *how)


def main(argv: list[str] | None = None) -> None:
    run = parse_options(Options, __doc__, argv).run
    folders, compared = task_folders(run), run / "compare.txt"
    tables, more = task_tables(run, folders), []
    draw_task(run, folders)
    if compared.is_file():
        text = compared.read_text(encoding="utf-8").strip()
        more = [{"heading": "Beside the authors' log", "verbatim": text}]
    write_results(run, tables, more, folders)


if __name__ == "__main__":
    sys.exit(run_main(main))
