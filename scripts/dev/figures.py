"""The pictures and tables of the READMEs, made from runs: nothing in them is typed by hand.

    # whatever of runs/{ablation_toy,toy_unseen,camvid_release} exists
    python -m scripts.dev.figures
    python -m scripts.dev.figures --image 2           another image for the pipeline picture

Reads runs/<name>/ (results.md, results.json, pictures/, seed0/), model/sam_tiny.json and
training_logs/. Writes images/*.png, training_logs/ours/<name>/ (results, the first seed's manifests
and the curves of the run, so that its figures can be traced) and what stands between the markers
`<!-- <name>:begin -->` and `<!-- <name>:end -->` in the README that has them: the repository's,
that of training_logs/ours/ or that of model/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.scc import numbered
from scripts.lib.report import cost_table, label_table, model_table
from util.labels import CITYSCAPES_19, IGNORE, read_image, read_label, read_list
from util.pictures import (
    class_legend,
    colour_label,
    contact_sheet,
    hatch,
    heat,
    line_chart,
    overlay,
    save_picture,
)
from util.run import UserError, atomic_path, read_json, run_main, write_json

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = ("README.md", "training_logs/ours/README.md", "model/README.md")
RUNS = ("ablation_toy", "toy_unseen", "camvid_release")
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
    for number, seed in enumerate(sorted(run.glob("seed*"))):
        records, evaluations = {}, {}
        for pattern in ("*/manifest.json", "*/summary.json", "*/report/report.json"):
            for path in sorted(seed.glob(pattern)):
                name, content = path.parent.relative_to(seed).as_posix(), read_json(path)
                # (a dot: set aside by scripts/lib/stage.py)
                if "." not in name and (path.name == "manifest.json" or "manifest" in content):
                    records[name] = content
        if number == 0:
            write_json(folder / f"{seed.name}_manifests.json", records)
        for path in sorted(seed.glob("adapt_*/metrics.jsonl")):
            if "." in path.parent.name:
                continue
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            evaluations[path.parent.name] = [e for e in entries if "eval/mIoU" in e]
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
    tables = (
        label_table(results["labels"]),
        model_table(results["models"], PAPER_ABLATION, "paper (DTST, GTA → Cityscapes)"),
        (run / "sweep.md").read_text(encoding="utf-8").rstrip() + "\n",
        cost_table({stage: results["stages"][stage] for stage in MAIN_LINE}),
    )
    return text + "\n".join(tables)


def pipeline_picture(run: Path, index: int) -> Image.Image:
    """One target image on its way: pixel labels with prompts, proposals, PSA, SCC's doubt,
    corrected, ground truth.
    """
    from model.sam import build_sam
    from model.sam_fast import FastSam
    from seco_sam import aggregate
    from util.psa_panel import prompt_picture, proposal_picture

    seed, classes = run / "seed0", CITYSCAPES_19
    image_path, pixel_path = read_list(seed / "splits/pix/all.txt")[index]
    image, pixel = read_image(seed / image_path), read_label(seed / pixel_path)
    sam = FastSam(build_sam("tiny"))
    result = aggregate(image, pixel, sam, classes, keep_masks=True)
    psa = read_label(seed / pixel_path.replace("pix/", "pix_tiny/", 1))
    corrected = read_label(seed / pixel_path.replace("pix/", "pix_tiny_scc/", 1))
    truth = read_label(seed / image_path.replace("/images/", "/gt/"))
    with open(seed / "pix_tiny_scc/connectivities.csv", encoding="utf-8") as file:
        header = file.readline().strip().split(",")
        rows = [
            dict(zip(header, line.strip().split(",")))
            for line in file
            if line.startswith(image_path + ",")
        ]
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
    halves = [contact_sheet([pictures[i : i + 4]], names[i : i + 4]) for i in (0, 4)]
    key = class_legend(classes, halves[0].width, 16)
    sheet = Image.new(
        "RGB", (halves[0].width, sum(h.height for h in halves) + key.height + 12), (255, 255, 255)
    )
    y = 0
    for part in (*halves, key):
        sheet.paste(part, (0, y))
        y += part.height + 6
    return sheet


def shipped_curves() -> Image.Image:
    """mIoU per epoch of the three shipped logs, and of no run of ours: nobody has run them yet."""
    series = {}
    for name, title in (
        ("seco_gta", "GTA to Cityscapes"),
        ("seco_synthia", "SYNTHIA to Cityscapes"),
        ("seco_bdd", "GTA to BDD100K"),
    ):
        lines = (ROOT / "training_logs" / name / "epochs.csv").read_text().splitlines()
        columns = lines[0].split(",")
        rows = [
            row for line in lines[1:] if (row := line.split(","))[columns.index("mIoU")]
        ]  # the last may be cut off
        series[title] = (
            [int(r[columns.index("epoch")]) for r in rows],
            [float(r[columns.index("mIoU")]) for r in rows],
        )
    return line_chart(series, "the authors' logs", "epoch", "mIoU (%)")


def sam_table() -> str:
    """The tiny SAM's measurements (model/sam_tiny.json) as tables."""
    measured = read_json(ROOT / "model" / "sam_tiny.json")
    training, results = measured["training"], measured["results"]
    sizes = list(next(iter(next(iter(results.values()))["prompts"].values())))
    lines = [
        (
            f"Training: {training['step']} steps, {training['minutes'] / 60:.1f} hours on"
            f" {training['hardware']['cores']} CPU cores, seed {training['options']['seed']}."
            if training and "minutes" in training
            else ""
        ),
        "",
        (
            "Box and point prompts, mean IoU by the object's size in pixels (in brackets: filling"
            " the box instead):"
        ),
        "",
        "| scenes | objects | " + " | ".join(sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    ]
    show = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    for style, result in results.items():
        for kind, bins in result["prompts"].items():
            lines.append(
                f"| {style} | {kind} | "
                + " | ".join(f"{show(v['iou'])} ({show(v['fill'])})" for v in bins.values())
                + " |"
            )
    lines += [
        "",
        "Mask proposals at the official thresholds:",
        "",
        "| scenes | proposals an image | mean IoU | pixels covered | stuff pixels covered |",
        "|---|---|---|---|---|",
    ]
    for style, result in results.items():
        p = result["proposals"]
        lines.append(
            f"| {style} | {p['number']:.1f} | {show(p['iou'])} | {100 * p['covered']:.0f} % | "
            f"{100 * p['stuff_covered']:.0f} % |"
        )
    return "\n".join(lines)


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
    for name in RUNS:
        run = ROOT / "runs" / name
        if not (run / "results.md").is_file():
            print(f"{run}: no results yet, left out")
            continue
        keep_records(run)
        tables = (
            ablation_tables(run)
            if name == "ablation_toy"
            else (run / "results.md").read_text(encoding="utf-8")
        )
        put(name, tables.replace("### ", "#### "))
    toy, camvid = (ROOT / "runs" / name for name in ("ablation_toy", "camvid_release"))
    if (toy / "results.md").is_file():
        save_picture(images / "pipeline.png", pipeline_picture(toy, options.image))
    for run, picture, name in (
        (toy, "side_by_side", "side_by_side"),
        (toy, "scc_loss_histogram", "scc_loss_histogram"),
        (toy, "ablation", "ablation"),
        (toy, "sweep", "sweep"),
        (camvid, "side_by_side", "camvid"),
    ):
        if (run / "pictures" / f"{picture}.png").is_file():
            shutil.copyfile(run / "pictures" / f"{picture}.png", images / f"{name}.png")
    if (ROOT / "model/sam_tiny.json").is_file():
        put("sam_tiny", sam_table())
    save_picture(images / "shipped_logs.png", shipped_curves())


if __name__ == "__main__":
    sys.exit(run_main(main))
