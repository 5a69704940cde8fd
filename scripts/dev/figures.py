"""The pictures and tables of the READMEs, made from runs: nothing in them is typed by hand.

    python -m scripts.dev.figures        # whatever of the runs in RUNS is in runs/

Reads runs/<name>/ (results.md, results.json, pictures/, seed0/) and training_logs/. Writes images/,
training_logs/ours/<name>/ (results, the first seed's manifests and the curves of the run, so that
its figures can be traced) and what stands between the markers `<!-- <name>:begin -->` and
`<!-- <name>:end -->` in the README that has them: the repository's or that of training_logs/ours/.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
from PIL import Image

from dataset.scc import numbered
from scripts.lib import report
from scripts.lib.page import markdown
from scripts.lib.run_folder import LABEL_FIGURES, manifest_of, seed_folders
from util.charts import line_chart, save_chart
from util.labels import CITYSCAPES_19, IGNORE, read_image, read_label, read_list
from util.outputs import read_json, write_json
from util.pictures import colour_label, contact_sheet, overlay, save_picture
from util.run import UserError, run_main
from util.training_log import MIOU_TAG, read_training_log

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "training_logs/ours"

PICTURE_WIDTH = 1400  # pixels, at most
PIPELINE_IMAGE = 4  # of the list, in the pipeline picture
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
    "scc_loss_histogram.png": "ablation_toy/seed0/pix_tiny_scc/report/loss_histogram.png",
    "ablation.png": "ablation_toy/pictures/ablation.png",
    "sweep.png": "ablation_toy/pictures/sweep.png",
    "camvid.jpg": "camvid_release/pictures/side_by_side.png",
}
SHIPPED = {  # of training_logs/
    "seco_gta": "GTA to Cityscapes",
    "seco_synthia": "SYNTHIA to Cityscapes",
    "seco_bdd": "GTA to BDD100K",
}


def put(path: Path, name: str, content: str) -> None:
    """Replace what stands between the markers of `name` in a document."""
    marked = re.compile(f"(<!-- {name}:begin -->).*?(<!-- {name}:end -->)", re.S)
    new = lambda marks: f"{marks[1]}\n{content.strip()}\n{marks[2]}"
    text, count = marked.subn(new, path.read_text(encoding="utf-8"))
    if count != 1:
        raise UserError(f"{path}: need <!-- {name}:begin --> … end in one place")
    path.write_text(text, encoding="utf-8")


def keep_records(run: Path) -> None:
    """Results, the first seed's manifests and the figures of all evaluations of a run to
    training_logs/ours/<name>/.
    """
    folder = OURS / run.name
    seeds = [run / f"seed{number}" for number in read_json(run / "results.json")["seeds"]]
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*run.glob("results.*"), *run.glob("sweep.*")]:
        shutil.copyfile(path, folder / path.name)
    manifests = {stage: manifest_of(path) for stage, path in seed_folders(seeds[0]).items()}
    write_json(folder / f"{seeds[0].name}_manifests.json", manifests)
    for seed in seeds:
        stages, evaluations = seed_folders(seed), {}
        for stage in [s for s in stages if s.startswith("adapt_")]:
            log = read_training_log(stages[stage])
            evaluations[stage] = [
                {"epoch": epoch, "eval_mode": log.eval_mode, MIOU_TAG: miou}
                | {f"eval/{n}_IoU": iou for n, iou in log.class_iou.get(epoch, {}).items()}
                for epoch, miou in log.miou.items()
            ]
        write_json(folder / f"{seed.name}_evaluations.json", evaluations)


def tables_of(run: Path) -> str:
    """The tables of a recorded run with the paper's figures, costs of the main line only, and the
    sweep of thresholds.
    """
    results, sweep = read_json(run / "results.json"), run / "sweep.json"
    results["stages"] = {stage: results["stages"][stage] for stage in MAIN_LINE}
    tables = report.tables_of(results, PAPER_ABLATION)
    tables += report.sweep_tables(read_json(sweep) if sweep.is_file() else {})
    return markdown(tables).replace("### ", "#### ")


def pipeline_picture(run: Path) -> Image.Image:
    """One target image on its way: pixel labels with prompts, proposals, PSA, SCC's doubt,
    corrected, ground truth.
    """
    from dataset.psa import prompt_picture, proposal_picture
    from dataset.scc_report import hatch, heat
    from model.sam import load_segmenter
    from seco_sam import aggregate

    seed, classes = run / "seed0", CITYSCAPES_19
    image_path, pixel_path = read_list(seed / "splits/pix/all.txt")[PIPELINE_IMAGE]
    psa, corrected = (
        read_label(seed / pixel_path.replace("pix/", f"{folder}/", 1))
        for folder in ("pix_tiny", "pix_tiny_scc")
    )
    image, pixel = read_image(seed / image_path), read_label(seed / pixel_path)
    truth = read_label(seed / image_path.replace("/images/", "/gt/"))
    result = aggregate(image, pixel, load_segmenter("tiny"), classes, keep_masks=True)
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
    return contact_sheet([pictures[:4], pictures[4:]], names, classes)


def ours_table() -> str:
    """The recorded runs side by side: quality of the labels, mIoU of the models."""
    runs = {title: read_json(OURS / name / "results.json") for name, title in RUNS.items()}

    def cell(run: dict, table: str, row: str) -> str:
        if row not in run[table]:
            return "not run"
        values, before = run[table][row], run["models"]["before"]["miou"]
        if table == "labels":
            return " / ".join(f"{np.mean(values[key]):.1f}" for key in LABEL_FIGURES)
        gain = f" ({np.mean(values['miou']) - np.mean(before):+.1f})"
        return report.mean_and_deviation(values["miou"]) + ("" if row == "before" else gain)

    rows = (
        ("pixel labels: coverage / accuracy / mIoU of labels", "labels", "pixel"),
        ("PSA: coverage / accuracy / mIoU of labels", "labels", "psa"),
        ("PSA + SCC: coverage / accuracy / mIoU of labels", "labels", "scc"),
        ("source model", "models", "before"),
        ("UniMatch on pixel labels", "models", "pixel"),
        ("**SeCo**", "models", "seco"),
        ("upper bound (target ground truth)", "models", "bound"),
    )
    head = [f"{title} (seeds {', '.join(map(str, run['seeds']))})" for title, run in runs.items()]
    cells = [[title, *(cell(run, *place) for run in runs.values())] for title, *place in rows]
    return markdown([{"head": ["", *head], "rows": cells}])


def toy_output() -> str:
    """What `bash scripts/toy.sh` prints at its end: the main line of the first recorded seed."""
    results = read_json(OURS / "ablation_toy/results.json")

    def first(table: dict, *rows: str) -> dict:
        return {row: {key: values[:1] for key, values in table[row].items()} for row in rows}

    labels = report.label_table(first(results["labels"], "pixel", "psa", "scc"))
    models = report.model_table(first(results["models"], "before", "seco"))
    return f"```\n{markdown([labels, models])}```"


def shipped_curves():
    """mIoU per epoch of the three shipped logs, and of no run of ours: nobody has run them yet."""
    logs = {title: read_training_log(ROOT / "training_logs" / n) for n, title in SHIPPED.items()}
    series = {title: log.curve for title, log in logs.items()}
    return line_chart(series, "the authors' logs", "epoch", "mIoU (%)")


def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    runs = ROOT / "runs"
    for name in RUNS:
        run = runs / name
        if (run / "results.md").is_file():
            keep_records(run)
        else:
            print(f"{run}: no results, as recorded")
        put(OURS / "README.md", name, tables_of(OURS / name))
    if (toy := runs / "ablation_toy").is_dir():
        save_picture(ROOT / "images/pipeline.jpg", pipeline_picture(toy))
    for name, path in PICTURES.items():
        if (runs / path).is_file():
            image = Image.open(runs / path)
            image.thumbnail((PICTURE_WIDTH, image.height))
            save_picture(ROOT / "images" / name, image)
    put(ROOT / "README.md", "ours", ours_table())
    put(ROOT / "README.md", "toy_output", toy_output())
    save_chart(ROOT / "images/shipped_logs.png", shipped_curves())


if __name__ == "__main__":
    sys.exit(run_main(main))
