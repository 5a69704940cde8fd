"""The page of a run: index.html in its folder, to be read in a browser without network.

    python -m scripts.lib.page runs/toy_release

Reads what the commands left: results.md and sweep.md (scripts/lib/report.py, sweep_thresholds.py),
compare.txt (scripts/compare_logs.py), pictures/ and the manifests of all stages. A task's run has
no results.md yet: it is written here. Files elsewhere, as a data set's label folders, are linked
from where they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from eval import labels_in_folder
from scripts.lib.health import health
from scripts.lib.report import cost_table, markdown_table, on_their_way, spread
from scripts.lib.run_folder import MANIFESTS, manifest_of, seeds_in, stage_costs, stage_folders
from util.labels import read_classes, read_list
from util.options import Argument, Folder, parse_options
from util.outputs import made_before, made_from, read_json, write_json, write_text
from util.page import write_page
from util.pictures import save_picture
from util.run import UserError, run_main

CAPTIONS = {  # of the pictures, in the order in which they are shown
    "side_by_side": "Target images on their way: starting labels, PSA, SCC, predictions",
    "validation": "Target validation images: predictions before and after, ground truth",
    "miou_curve": "Target validation mIoU after each evaluated epoch",
    "compare": "This run beside the authors' log",
    "ablation": "Target validation mIoU of every row",
    "sweep": "Labels after SCC at other thresholds",
    "scc_loss_histogram": "SCC: losses of the connectivities",
    "scc_panels": "SCC: labels before and after",
}
LINKED = {"report/index.html": "SCC's page", "train.log": "training log"}
PSA_PANELS = 4  # shown of each folder that PSA made


@dataclass(kw_only=True)
class Options:
    run: Argument[Folder]
    "folder of the run"


def parts_of(markdown: str) -> list[dict]:
    """Headings, tables and paragraphs of a results.md as parts of a page."""
    parts = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines, part = block.splitlines(), {}
        if lines[0].startswith("#"):
            part["heading"] = lines.pop(0).lstrip("# ")
        rows = [
            [cell.strip() for cell in line.strip()[1:-1].split("|")]
            for line in lines
            if line.startswith("|")
        ]
        if len(rows) > 1:  # the second one is the ruler
            part |= {"head": rows[0], "rows": rows[2:]}
        else:
            part["text"] = " ".join(lines)
        parts.append(part)
    return parts


def folders_of(run: Path) -> dict[str, Path]:
    """{"psa" or "seed0/psa": folder} of all stages, of a task or of all seeds."""
    seeds = seeds_in(run)
    if not seeds:
        return stage_folders(run)
    return {
        f"{s.name}/{stage}": folder for s in seeds for stage, folder in stage_folders(s).items()
    }


def address(path: Path, run: Path) -> str:
    """The path as the page links it."""
    return quote(Path(os.path.relpath(path, run)).as_posix())


def pictures(run: Path, folders: dict[str, Path]) -> list[tuple[str, str]]:
    """The run's pictures, and a few of PSA's panels of the first seed: (address, caption) each."""
    found = {path.stem: path for path in sorted((run / "pictures").glob("*.png"))}
    order = [name for name in CAPTIONS if name in found] + sorted(found.keys() - CAPTIONS)
    shown = [(address(found[name], run), CAPTIONS.get(name, name)) for name in order]
    first = f"{seeds[0].name}/" if (seeds := seeds_in(run)) else ""
    for name in (f"{first}psa", f"{first}psa_paper"):
        if name in folders:
            panels = sorted((folders[name] / "vis").rglob("*.png"))[:PSA_PANELS]
            caption = f"PSA: {folders[name].name}, "
            shown += [(address(path, run), caption + path.stem) for path in panels]
    return shown


def task_results(run: Path) -> str:
    """A task's tables: IoU of each class before and after, and the cost of each stage."""
    found = {
        name: read_json(run / f"eval_{name}" / "metrics.json")
        for name in ("before", "after")
        if (run / f"eval_{name}" / "metrics.json").is_file()
    }
    if not found and not (run / "adapt/summary.json").is_file():
        raise UserError(
            f"{run}: holds no results.md, no eval_after/metrics.json and no finished adapt/; finish"
            " the run"
        )
    shown = lambda value: "–" if value is None else f"{value:.2f}"
    text = ""
    if found:
        rows = [["mIoU", *(shown(metrics["miou"]) for metrics in found.values())]]
        for name in next(iter(found.values()))["iou"]:
            rows.append([name, *(shown(metrics["iou"][name]) for metrics in found.values())])
        text = "### Validation IoU (%)\n\n" + markdown_table(["class", *found], rows) + "\n"
    rows, warnings = health(stage_folders(run))
    if rows:
        text += "### The labels, as they tell of themselves\n\n"
        text += "".join(f"Warning: {warning}.\n\n" for warning in warnings)
        text += markdown_table(["stage", "what", "figure"], rows) + "\n"
    return text + "### Cost of each stage\n\n" + cost_table(stage_costs([run]))


def draw_task(run: Path, count: int = 4) -> None:
    """Pictures of a task, not drawn again if nothing has changed since: side_by_side.png, a few
    images with their labels at each stage; validation.png, a few of the validation images with
    predictions before and after and the ground truth.
    """
    folders, record = stage_folders(run), run / "pictures/made_from.json"
    options, models = manifest_of(run / "adapt").get("options"), {"after": run / "adapt/latest.pth"}
    if not options or not models["after"].is_file():
        return
    made = [folder / name for folder in folders.values() for name in MANIFESTS]
    inputs = {str(path): path for path in [*models.values(), *made] if path.is_file()}
    source = made_from({"images": count}, inputs)
    if made_before(record, source):
        return
    root, classes = Path(options["root_path"]), read_classes(run / "adapt/classes.txt")
    how = classes, options["eval_mode"], options["crop_size"]

    def draw(name: str, images: list[str], titles: dict[str, str], truth: dict, models: dict):
        images = spread(images, count)
        maps = {t: labels_in_folder(folders[s], images) for s, t in titles.items() if s in folders}
        maps = {title: found for title, found in maps.items() if len(found) == len(images)}
        sheet = on_their_way(root, images, maps | truth, models, *how)
        save_picture(run / f"pictures/{name}.png", sheet)

    lists = [options[f"{name}_id_path"] for name in ("labeled", "unlabeled")]
    images = [row[0] for path in lists if path for row in read_list(path, (1, 2))]
    titles = {"pixel": "starting labels", "psa": "PSA", "scc": "SCC"}
    draw("side_by_side", images, titles, {}, {"prediction": models["after"]})
    if options["val_id_path"]:
        truth = dict(read_list(options["val_id_path"]))
        draw("validation", [*truth], {"before_labels": "before"}, {"ground truth": truth}, models)
    write_json(record, {"made_from": source})


def page_of(run: Path) -> Path:
    """Write <run>/index.html; returns its path."""
    of_task = (run / "eval_after").is_dir() or (run / "adapt/summary.json").is_file()
    if of_task or not (run / "results.md").is_file():
        write_text(run / "results.md", task_results(run))
        draw_task(run)
    folders = folders_of(run)
    manifests = {n: made for n, folder in folders.items() if (made := manifest_of(folder))}
    parts = []
    for name in ("results.md", "sweep.md"):
        if (run / name).is_file():
            parts += parts_of((run / name).read_text(encoding="utf-8"))
    if (run / "compare.txt").is_file():
        text = (run / "compare.txt").read_text(encoding="utf-8").strip()
        parts.append({"heading": "Beside the authors' log", "verbatim": text})
    links = [
        (address(folder / file, run), f"{title}: {name}")
        for name, folder in folders.items()
        for file, title in LINKED.items()
        if (folder / file).is_file()
    ]
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
    return page


def main(argv: list[str] | None = None) -> None:
    print(f"page: {page_of(parse_options(Options, __doc__, argv).run)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
