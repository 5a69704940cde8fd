"""The pictures and tables of the READMEs, made from runs: nothing in them is typed by hand.

    # whatever of runs/{ablation_toy,toy_unseen,camvid_release,camvid_unseen} exists
    python -m scripts.dev.figures
    python -m scripts.dev.figures --image 2           another image for the pipeline picture

Reads runs/<name>/ (results.md, results.json, pictures/, seed0/), model/sam_tiny*.json and
training_logs/. Writes images/, training_logs/ours/<name>/ (results, the first seed's manifests
and the curves of the run, so that its figures can be traced) and what stands between the markers
`<!-- <name>:begin -->` and `<!-- <name>:end -->` in the README that has them: the repository's,
that of training_logs/ours/ or that of model/.
"""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
from PIL import Image

from dataset.scc import numbered
from scripts.lib.report import (
    LABEL_FIGURES,
    cost_table,
    label_table,
    markdown_table,
    mean_and_deviation,
    model_table,
)
from scripts.lib.run_folder import manifest_of, seeds_in, stage_folders
from util.charts import line_chart, save_chart
from util.labels import CITYSCAPES_19, IGNORE, read_image, read_label, read_list
from util.options import CountFrom0, parse_options
from util.outputs import atomic_path, read_json, write_json
from util.pictures import colour_label, contact_sheet, hatch, heat, overlay, save_picture
from util.run import UserError, run_main
from util.training_log import read_training_log

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "training_logs/ours"

DOCUMENTS = ("README.md", "training_logs/ours/README.md", "model/README.md")
PICTURE_WIDTH = 1400  # pixels, at most
# The paper's Tables 6 and 7, GTA to Cityscapes, DTST (source-free), mIoU after adaptation; "no SAM"
# is DTST itself.
PAPER_ABLATION = {"pixel": 52.1, "prompting": 46.7, "alignment": 56.1, "psa": 57.9, "seco": 60.5}
# Stages whose costs are shown.
MAIN_LINE = "source eval_before pixel psa scc split_seco adapt_seco eval_seco".split()
RUNS = {  # below runs/: title of its column
    "ablation_toy": "drawn scenes",
    "toy_unseen": "drawn scenes, seeds not looked at",
    "camvid_release": "photographs, day to dusk",
    "camvid_unseen": "photographs, seeds not looked at",
}
PICTURES = {  # of images/: what it is of
    "side_by_side.jpg": "ablation_toy/pictures/side_by_side.png",
    "scc_loss_histogram.png": "ablation_toy/pictures/scc_loss_histogram.png",
    "ablation.png": "ablation_toy/pictures/ablation.png",
    "sweep.png": "ablation_toy/pictures/sweep.png",
    "camvid.jpg": "camvid_release/pictures/side_by_side.png",
}
SHIPPED = {  # of training_logs/
    "seco_gta": "GTA to Cityscapes",
    "seco_synthia": "SYNTHIA to Cityscapes",
    "seco_bdd": "GTA to BDD100K",
}


@dataclass(kw_only=True)
class Options:
    """pictures"""

    image: CountFrom0 = 4
    "image of the pipeline picture"


def put(name: str, content: str, root: Path = ROOT) -> None:
    """Replace what stands between the markers of `name`, in the document that has them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    paths = [root / document for document in DOCUMENTS if (root / document).is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [path for path, text in texts.items() if begin in text]
    if len(found) != 1 or not texts[found[0]].count(begin) == texts[found[0]].count(end) == 1:
        raise UserError(f"{begin} and {end}: need one place in {', '.join(DOCUMENTS)}")
    head, rest = texts[found[0]].split(begin)
    text = f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"
    with atomic_path(found[0]) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------- of the recorded runs


def keep_records(run: Path) -> None:
    """Results, the first seed's manifests and the figures of all evaluations of a run to
    training_logs/ours/<name>/.
    """
    folder = OURS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "results.md", "sweep.json", "sweep.md"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    for number, seed in enumerate(seeds_in(run)):
        stages, evaluations = stage_folders(seed), {}
        if number == 0:
            manifests = {stage: manifest_of(path) for stage, path in stages.items()}
            write_json(folder / f"{seed.name}_manifests.json", manifests)
        for stage, path in stages.items():
            if not (stage.startswith("adapt_") and (path / "train.log").is_file()):
                continue
            log = read_training_log(path)
            tags = ["eval/mIoU", *(f"eval/{name}_IoU" for name in log.class_names)]
            evaluations[stage] = [
                {"epoch": epoch, "eval_mode": log.eval_mode}
                | dict(zip(tags, (miou, *log.class_iou.get(epoch, ()))))
                for epoch, miou in log.miou.items()
            ]
        write_json(folder / f"{seed.name}_evaluations.json", evaluations)


def ablation_tables(run: Path) -> str:
    """Labels, adapted models beside the paper's figures, the threshold sweep and the costs of an
    ablation, as tables.
    """
    results, sweep = read_json(run / "results.json"), run / "sweep.md"
    seeds = ", ".join(map(str, results["seeds"]))
    tables = [
        f"Seeds: {seeds}. Figures in %, mean ± standard deviation over the seeds.\n",
        label_table(results["labels"]),
        model_table(results["models"], PAPER_ABLATION, "paper (DTST, GTA → Cityscapes)"),
        sweep.read_text(encoding="utf-8").rstrip() + "\n" if sweep.is_file() else "",
        cost_table({stage: results["stages"][stage] for stage in MAIN_LINE}),
    ]
    return "\n".join(table for table in tables if table)


def pipeline_picture(run: Path, index: int) -> Image.Image:
    """One target image on its way: pixel labels with prompts, proposals, PSA, SCC's doubt,
    corrected, ground truth.
    """
    from dataset.psa import prompt_picture, proposal_picture
    from model.sam import build_sam
    from model.sam_fast import FastSam
    from seco_sam import aggregate

    seed, classes = run / "seed0", CITYSCAPES_19
    image_path, pixel_path = read_list(seed / "splits/pix/all.txt")[index]
    psa, corrected = (
        read_label(seed / pixel_path.replace("pix/", f"{folder}/", 1))
        for folder in ("pix_tiny", "pix_tiny_scc")
    )
    image, pixel = read_image(seed / image_path), read_label(seed / pixel_path)
    truth = read_label(seed / image_path.replace("/images/", "/gt/"))
    result = aggregate(image, pixel, FastSam(build_sam("tiny")), classes, keep_masks=True)
    with open(seed / "pix_tiny_scc/connectivities.csv", encoding="utf-8") as file:
        scores = [float(r["score"]) for r in csv.DictReader(file) if r["image"] == image_path]
    doubt = 1 - np.array([*scores, np.nan])[numbered(psa, classes.count)]
    dropped = (psa != IGNORE) & (corrected == IGNORE)
    tiles = {
        "image": image,
        "pixel labels, prompts": prompt_picture(image, pixel, result, classes),
        "mask proposals": proposal_picture(image, result),
        "PSA": colour_label(psa, classes.palette),
        "SCC: doubt (orange)": heat(doubt),
        "corrected, dropped hatched": hatch(colour_label(corrected, classes.palette), dropped),
        "over the image": overlay(image, corrected, classes.palette, 0.6),
        "ground truth (not used)": colour_label(truth, classes.palette),
    }
    names, pictures = list(tiles), list(tiles.values())
    above = contact_sheet([pictures[:4]], names[:4])
    below = contact_sheet([pictures[4:]], names[4:], legend=classes)
    return Image.fromarray(np.vstack([np.asarray(above), np.asarray(below)]))


def ours_table() -> str:
    """The recorded runs side by side: quality of the labels, mIoU of the models."""
    runs = {title: read_json(OURS / name / "results.json") for name, title in RUNS.items()}

    def labels(run: dict, row: str) -> str:
        if row not in run["labels"]:
            return "not run"
        return " / ".join(f"{np.mean(run['labels'][row][key]):.1f}" for key in LABEL_FIGURES)

    def model(run: dict, row: str) -> str:
        if row not in run["models"]:
            return "not run"
        values, before = run["models"][row]["miou"], run["models"]["before"]["miou"]
        gain = "" if row == "before" else f" ({np.mean(values) - np.mean(before):+.1f})"
        return mean_and_deviation(values) + gain

    rows = (
        ("pixel labels: coverage / accuracy / mIoU of labels", labels, "pixel"),
        ("PSA: coverage / accuracy / mIoU of labels", labels, "psa"),
        ("PSA + SCC: coverage / accuracy / mIoU of labels", labels, "scc"),
        ("source model", model, "before"),
        ("UniMatch on pixel labels", model, "pixel"),
        ("**SeCo**", model, "seco"),
        ("upper bound (target ground truth)", model, "bound"),
    )
    head = [f"{title} (seeds {', '.join(map(str, run['seeds']))})" for title, run in runs.items()]
    cells = [[title, *(cell(run, row) for run in runs.values())] for title, cell, row in rows]
    return markdown_table(["", *head], cells)


def toy_output() -> str:
    """What `bash scripts/toy.sh` prints at its end: the main line of the first recorded seed."""
    results = read_json(OURS / "ablation_toy/results.json")

    def first(table: dict, *rows: str) -> dict:
        return {row: {key: values[:1] for key, values in table[row].items()} for row in rows}

    labels = label_table(first(results["labels"], "pixel", "psa", "scc"))
    return f"```\n{labels}\n{model_table(first(results['models'], 'before', 'seco'))}```"


# ------------------------------------------------------------------------------------ of what ships


def shipped_curves():
    """mIoU per epoch of the three shipped logs, and of no run of ours: nobody has run them yet."""
    logs = {title: read_training_log(ROOT / "training_logs" / n) for n, title in SHIPPED.items()}
    series = {title: log.curve for title, log in logs.items()}
    return line_chart(series, "the authors' logs", "epoch", "mIoU (%)")


def sam_table(name: str) -> str:
    """The measurements of a tiny SAM (model/<name>.json) as tables."""
    measured = read_json(ROOT / "model" / f"{name}.json")
    training, results = measured["training"], measured["results"]
    rows, proposals = [], []
    for style, result in results.items():
        for kind, sizes in result["prompts"].items():
            cells = [f"{share(v['iou'])} ({share(v['fill'])})" for v in sizes.values()]
            rows.append([style, kind, *cells])
        found = result["proposals"]
        covered = [f"{100 * found[key]:.0f} %" for key in ("covered", "stuff_covered")]
        proposals.append([style, f"{found['number']:.1f}", share(found["iou"]), *covered])
    columns = ["images", "proposals an image", "mean IoU", "pixels covered", "stuff covered"]
    return (
        f"Training: {training['step']} steps, seed {training['options']['seed']}. Box and point"
        " prompts, mean IoU by the object's size in pixels (in brackets: filling the box):\n\n"
        f"{markdown_table(['images', 'objects', *sizes], rows)}\n"
        "Mask proposals at the official thresholds:\n\n"
        f"{markdown_table(columns, proposals)}"
    )


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main(argv=None) -> None:
    options, runs = parse_options(Options, __doc__, argv), ROOT / "runs"
    for name in RUNS:
        run = runs / name
        if not (run / "results.md").is_file():
            print(f"{run}: no results yet, left out")
            continue
        keep_records(run)
        text = (run / "results.md").read_text(encoding="utf-8")
        if "adapt_bound" in read_json(run / "results.json")["stages"]:
            text = ablation_tables(run)
        put(name, text.replace("### ", "#### "))
    if (runs / "ablation_toy/results.md").is_file():
        picture = pipeline_picture(runs / "ablation_toy", options.image)
        save_picture(ROOT / "images/pipeline.jpg", picture)
    for name, path in PICTURES.items():
        if (runs / path).is_file():
            image = Image.open(runs / path)
            image.thumbnail((PICTURE_WIDTH, image.height))
            save_picture(ROOT / "images" / name, image)
    for name in ("sam_tiny", "sam_tiny_photo"):
        put(name, sam_table(name))
    put("ours", ours_table())
    put("toy_output", toy_output())
    save_chart(ROOT / "images/shipped_logs.png", shipped_curves())


if __name__ == "__main__":
    sys.exit(run_main(main))
