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

import argparse
import csv
import shutil
import sys
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
from scripts.lib.run_folder import seeds_in
from util.charts import line_chart, save_chart
from util.labels import CITYSCAPES_19, IGNORE, read_image, read_label, read_list
from util.outputs import atomic_path, read_json, write_json
from util.pictures import (
    colour_label,
    contact_sheet,
    hatch,
    heat,
    overlay,
    save_picture,
)
from util.run import UserError, run_main
from util.training_log import read_training_log

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = ("README.md", "training_logs/ours/README.md", "model/README.md")
PICTURE_WIDTH = 1400  # pixels, at most
# The paper's Tables 6 and 7, GTA to Cityscapes, DTST (source-free), mIoU after adaptation; "no SAM"
# is DTST itself.
PAPER_ABLATION = {"pixel": 52.1, "prompting": 46.7, "alignment": 56.1, "psa": 57.9, "seco": 60.5}

MAIN_LINE = (
    "source",
    "eval_before",
    "pixel",
    "psa",
    "scc",
    "split_seco",
    "adapt_seco",
    "eval_seco",
)  # whose costs are shown


def put(name: str, content: str, root: Path = ROOT) -> None:
    """Replace what stands between the markers of `name`, in the document that has them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in (root / document for document in DOCUMENTS)
        if path.is_file()
    }
    found = [path for path, text in texts.items() if begin in text]
    if len(found) != 1 or not texts[found[0]].count(begin) == texts[found[0]].count(end) == 1:
        raise UserError(f"{begin} and {end}: need one place in {', '.join(DOCUMENTS)}")
    head, rest = texts[found[0]].split(begin)
    with atomic_path(found[0]) as temporary:
        temporary.write_text(
            f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}", encoding="utf-8"
        )


def keep_records(run: Path) -> None:
    """Results, the first seed's manifests and the figures of all evaluations of a run to
    training_logs/ours/<name>/.
    """
    folder = ROOT / "training_logs/ours" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "results.md", "sweep.json", "sweep.md"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    for number, seed in enumerate(seeds_in(run)):
        records, evaluations = {}, {}
        for pattern in ("*/manifest.json", "*/summary.json", "*/report/report.json"):
            for path in sorted(seed.glob(pattern)):
                name, content = path.parent.relative_to(seed).as_posix(), read_json(path)
                if "." not in name and (path.name == "manifest.json" or "manifest" in content):
                    records[name] = content
        if number == 0:
            write_json(folder / f"{seed.name}_manifests.json", records)
        for path in sorted(seed.glob("adapt_*/train.log")):
            if "." in path.parent.name:
                continue
            log = read_training_log(path.parent)
            tags = ["eval/mIoU", *(f"eval/{name}_IoU" for name in log.class_names)]
            evaluations[path.parent.name] = [
                {"epoch": epoch, "eval_mode": log.eval_mode}
                | dict(zip(tags, (miou, *log.class_iou.get(epoch, ()))))
                for epoch, miou in log.miou.items()
            ]
        write_json(folder / f"{seed.name}_evaluations.json", evaluations)


def ablation_tables(run: Path) -> str:
    """Labels, adapted models beside the paper's figures, the threshold sweep and the costs of an
    ablation, as tables.
    """
    results = read_json(run / "results.json")
    text = (
        f"Seeds: {', '.join(map(str, results['seeds']))}. Figures in %, mean ± standard deviation"
        " over the seeds.\n\n"
    )
    sweep = run / "sweep.md"
    tables = (
        label_table(results["labels"]),
        model_table(results["models"], PAPER_ABLATION, "paper (DTST, GTA → Cityscapes)"),
        *([sweep.read_text(encoding="utf-8").rstrip() + "\n"] if sweep.is_file() else []),
        cost_table({stage: results["stages"][stage] for stage in MAIN_LINE}),
    )
    return text + "\n".join(tables)


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
    image, pixel = read_image(seed / image_path), read_label(seed / pixel_path)
    sam = FastSam(build_sam("tiny"))
    result = aggregate(image, pixel, sam, classes, keep_masks=True)
    psa = read_label(seed / pixel_path.replace("pix/", "pix_tiny/", 1))
    corrected = read_label(seed / pixel_path.replace("pix/", "pix_tiny_scc/", 1))
    truth = read_label(seed / image_path.replace("/images/", "/gt/"))
    with open(seed / "pix_tiny_scc/connectivities.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == image_path]
    doubt = np.array([1 - float(row["score"]) for row in rows] + [np.nan])[
        numbered(psa, classes.count)
    ]
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
    halves = (
        contact_sheet([pictures[:4]], names[:4]),
        contact_sheet([pictures[4:]], names[4:], legend=classes),
    )
    return Image.fromarray(np.vstack([np.asarray(half) for half in halves]))


def shipped_curves():
    """mIoU per epoch of the three shipped logs, and of no run of ours: nobody has run them yet."""
    series = {}
    for name, title in (
        ("seco_gta", "GTA to Cityscapes"),
        ("seco_synthia", "SYNTHIA to Cityscapes"),
        ("seco_bdd", "GTA to BDD100K"),
    ):
        series[title] = read_training_log(ROOT / "training_logs" / name).curve
    return line_chart(series, "the authors' logs", "epoch", "mIoU (%)")


def sam_table(name: str) -> str:
    """The measurements of a tiny SAM (model/<name>.json) as tables."""
    measured = read_json(ROOT / "model" / f"{name}.json")
    training, results = measured["training"], measured["results"]
    sizes = list(next(iter(next(iter(results.values()))["prompts"].values())))
    show = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    rows = [
        [style, kind, *(f"{show(v['iou'])} ({show(v['fill'])})" for v in bins.values())]
        for style, result in results.items()
        for kind, bins in result["prompts"].items()
    ]
    proposals = [
        [
            style,
            f"{p['number']:.1f}",
            show(p["iou"]),
            f"{100 * p['covered']:.0f} %",
            f"{100 * p['stuff_covered']:.0f} %",
        ]
        for style, p in ((style, result["proposals"]) for style, result in results.items())
    ]
    return "\n".join(
        (
            f"Training: {training['step']} steps, seed {training['options']['seed']}. Box and point"
            " prompts, mean IoU by the object's size in pixels (in brackets: filling the box):\n",
            markdown_table(["images", "objects", *sizes], rows),
            "Mask proposals at the official thresholds:\n",
            markdown_table(
                ["images", "proposals an image", "mean IoU", "pixels covered", "stuff covered"],
                proposals,
            ),
        )
    )


# ---------------------------------------------------------------------------------- README's tables

OURS = {  # run below runs/, recorded in training_logs/ours: title of its column
    "ablation_toy": "drawn scenes",
    "toy_unseen": "drawn scenes, seeds not looked at",
    "camvid_release": "photographs, day to dusk",
    "camvid_unseen": "photographs, seeds not looked at",
}


def ours_table() -> str:
    """The recorded runs side by side: quality of the labels, mIoU of the models."""
    runs = {
        title: read_json(ROOT / "training_logs/ours" / name / "results.json")
        for name, title in OURS.items()
    }

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
    return markdown_table(
        ["", *(f"{title} (seeds {', '.join(map(str, r['seeds']))})" for title, r in runs.items())],
        [[title, *(cell(run, row) for run in runs.values())] for title, cell, row in rows],
    )


def toy_output() -> str:
    """What `bash scripts/toy.sh` prints at its end: the main line of the first recorded seed."""
    results = read_json(ROOT / "training_logs/ours/ablation_toy/results.json")

    def first(table: dict, *rows: str) -> dict:
        return {row: {key: values[:1] for key, values in table[row].items()} for row in rows}

    tables = (
        label_table(first(results["labels"], "pixel", "psa", "scc")),
        model_table(first(results["models"], "before", "seco")),
    )
    return "```\n" + "\n".join(tables) + "```"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image",
        type=int,
        default=4,
        metavar="N",
        help="image of the pipeline picture (default: 4)",
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    options = parse_args(argv)
    images = ROOT / "images"
    for name in OURS:
        run = ROOT / "runs" / name
        if not (run / "results.md").is_file():
            print(f"{run}: no results yet, left out")
            continue
        keep_records(run)
        tables = (
            ablation_tables(run)
            if "adapt_bound" in read_json(run / "results.json")["stages"]
            else (run / "results.md").read_text(encoding="utf-8")
        )
        put(name, tables.replace("### ", "#### "))
    toy, camvid = (ROOT / "runs" / name for name in ("ablation_toy", "camvid_release"))
    if (toy / "results.md").is_file():
        save_picture(images / "pipeline.jpg", pipeline_picture(toy, options.image))
    for run, picture, name in (
        (toy, "side_by_side.png", "side_by_side.jpg"),
        (toy, "scc_loss_histogram.png", "scc_loss_histogram.png"),
        (toy, "ablation.png", "ablation.png"),
        (toy, "sweep.png", "sweep.png"),
        (camvid, "side_by_side.png", "camvid.jpg"),
    ):
        if (run / "pictures" / picture).is_file():
            image = Image.open(run / "pictures" / picture)
            image.thumbnail((PICTURE_WIDTH, image.height))
            save_picture(images / name, image)
    for name in ("sam_tiny", "sam_tiny_photo"):
        put(name, sam_table(name))
    put("ours", ours_table())
    put("toy_output", toy_output())
    save_chart(images / "shipped_logs.png", shipped_curves())


if __name__ == "__main__":
    sys.exit(run_main(main))
