"""Tables and pictures of a pipeline run (scripts/toy.sh, scripts/camvid.sh), over all of its seeds.

    python -m scripts.lib.report runs/toy_release --class-num 19 --pictures 8

Reads what the stages left in `<run>/seed<n>/`: eval/*/metrics.json, stages/*.json, label maps,
checkpoints. Writes `<run>/results.json`, `<run>/results.md` and `<run>/pictures/`. A stage that has
not run has no row, nor has one whose inputs have changed since. Seeds that are not finished are
named and left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from scripts.lib.stage import of_one_setting, outdated, seeds_in
from util.charts import bar_chart, line_chart, save_chart
from util.labels import class_set, read_image, read_label, read_list
from util.options import add_class_options, check_range
from util.outputs import read_json, write_json
from util.pictures import colour_label, contact_sheet, save_picture
from util.run import UserError, run_main
from util.training_log import read_training_log

LABEL_ROWS = {
    "pixel": "pixel-level (no SAM)",
    "prompting": "prompting only",
    "alignment": "semantic alignment only",
    "scc_pixel": "SCC without PSA",
    "psa": "PSA",
    "fill": "PSA, pixel label where no mask reaches",
    "scc": "PSA + SCC",
    "psa_paper": "PSA, paper's recipe",
    "scc_paper": "PSA + SCC, paper's recipe",
}
LABEL_FIGURES = ("coverage", "accuracy", "miou")
MODEL_ROWS = {
    "before": "before (source model)",
    "pixel": "UniMatch on pixel-level labels",
    "prompting": "UniMatch on prompting only",
    "alignment": "UniMatch on semantic alignment only",
    "scc_pixel": "UniMatch on SCC without PSA",
    "psa": "UniMatch on PSA",
    "fill": "UniMatch on PSA, pixel label where no mask reaches",
    "seco": "SeCo (UniMatch on PSA + SCC)",
    "psa_paper": "UniMatch on PSA, paper's recipe",
    "seco_paper": "SeCo, paper's recipe",
    "bound": "upper bound (target ground truth)",
}


def finished(seeds: list[Path]) -> list[Path]:
    """The seeds that no other one is ahead of: left out are those without the source model's or
    SeCo's evaluation, if another has it, and those in the middle of a stage that another has ended.
    """
    done = {
        seed: {file.stem: read_json(file)["done"] for file in (seed / "stages").glob("*.json")}
        for seed in seeds
    }
    ended = {name for stages in done.values() for name, value in stages.items() if value}
    behind = {seed for seed, stages in done.items() for n in stages if n in ended and not stages[n]}
    for row in ("before", "seco*"):
        seeds = [seed for seed in seeds if any(seed.glob(f"eval/{row}/metrics.json"))] or seeds
    return [seed for seed in seeds if seed not in behind]


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


def stage_costs(seed_folders: list[Path]) -> dict[str, dict]:
    """{stage: seconds (mean over seeds), peak_memory_mb (largest)} in the order in which the first
    seed ran them.
    """
    files = sorted(
        (seed_folders[0] / "stages").glob("*.json"), key=lambda file: file.stat().st_mtime
    )
    costs = {}
    for file in files:
        records = [
            read_json(folder / "stages" / file.name)
            for folder in seed_folders
            if (folder / "stages" / file.name).is_file()
        ]
        records = [record for record in records if record["done"]]
        if records:
            costs[file.stem] = {
                "seconds": round(statistics.mean(r["seconds"] for r in records), 1),
                "peak_memory_mb": max(r["peak_memory_mb"] for r in records),
            }
    return costs


def label_table(quality: dict, title: str = "labels") -> str:
    """Coverage, accuracy and mIoU of each row of labels; title: of the first column."""
    return markdown_table(
        [title, "coverage", "accuracy of labeled pixels", "mIoU (unlabeled counts as wrong)"],
        [
            [LABEL_ROWS.get(row, row), *(mean_and_deviation(values[key]) for key in LABEL_FIGURES)]
            for row, values in quality.items()
        ],
    )


def model_table(models: dict, reported: dict[str, float] | None = None, title: str = "") -> str:
    """mIoU of every model and its gain over "before"; with a last column `title` of `reported`
    figures where given.
    """
    before = models["before"]["miou"]
    rows = [
        [
            MODEL_ROWS[row],
            mean_and_deviation(values["miou"]),
            (
                ""
                if row == "before"
                else mean_and_deviation([a - b for a, b in zip(values["miou"], before)])
            ),
        ]
        + ([str(reported.get(row, "–"))] if reported else [])
        for row, values in models.items()
    ]
    return markdown_table(
        ["model", "mIoU", "gain over before"] + ([title] if reported else []), rows
    )


def cost_table(costs: dict[str, dict]) -> str:
    return markdown_table(
        ["stage", "seconds", "peak memory (MB)"],
        [
            [stage, f"{cost['seconds']:.0f}", str(cost["peak_memory_mb"])]
            for stage, cost in costs.items()
        ],
    )


def label_lists(seed_folder: Path) -> dict[str, Path]:
    """The list behind each row of pseudo-labels, read from the commands of the stages that measured
    them.
    """
    lists = {}
    for row in LABEL_ROWS:
        record = seed_folder / "stages" / f"quality_{row}.json"
        if record.is_file():
            command = read_json(record)["command"]
            lists[row] = Path(command[command.index("--labels") + 1])
    return lists


def side_by_side(seed_folder: Path, classes, count: int) -> None:
    """image | pixel labels | PSA | SCC | prediction before | after | ground truth, for images
    spread over the list.
    """
    import torch

    from eval import predict
    from model.network import load_network
    from util.images import to_tensor

    lists = label_lists(seed_folder)
    suffix = "" if "psa" in lists else "_paper"
    columns = [row for row in ("pixel", f"psa{suffix}", f"scc{suffix}") if row in lists]
    labels = {row: dict(read_list(lists[row])) for row in columns}
    command = read_json(seed_folder / "stages" / "quality_pixel.json")["command"]
    truth = dict(read_list(command[command.index("--id-list-path") + 1]))
    checkpoints = {
        "before": seed_folder / "source" / "latest.pth",
        "after": seed_folder / f"adapt_seco{suffix}" / "latest.pth",
    }
    models = {
        name: load_network(path, torch.device("cpu"), classes.count).model
        for name, path in checkpoints.items()
        if path.is_file()
    }
    images = sorted(truth)
    rows = []
    for image_path in images[:: max(1, len(images) // count)][:count]:
        image = read_image(seed_folder / image_path)
        row = [image] + [
            colour_label(read_label(seed_folder / labels[name][image_path]), classes.palette)
            for name in columns
        ]
        for model in models.values():
            with torch.inference_mode():
                prediction = predict(model, to_tensor(image)[None], "original", None).argmax(1)[0]
            row.append(colour_label(prediction.numpy().astype("uint8"), classes.palette))
        rows.append(
            row + [colour_label(read_label(seed_folder / truth[image_path]), classes.palette)]
        )
    titles = {"pixel": "pixel labels", "psa": "PSA", "scc": "SCC"}
    titles = [
        "image",
        *(titles[name.removesuffix("_paper")] for name in columns),
        *(f"prediction {name}" for name in models),
        "ground truth",
    ]
    save_picture(
        seed_folder.parent / "pictures" / "side_by_side.png",
        contact_sheet(rows, titles, legend=classes, cell_width=288),
    )


def miou_curve(seed_folder: Path) -> None:
    """Validation mIoU after each epoch, of every adaptation of a seed."""
    logs = {
        title: read_training_log(seed_folder / f"adapt_{row}")
        for row, title in MODEL_ROWS.items()
        if (seed_folder / f"adapt_{row}" / "train.log").is_file()
    }
    series = {title: log.curve for title, log in logs.items() if log.miou}
    if series:
        save_chart(
            seed_folder.parent / "pictures" / "miou_curve.png",
            line_chart(series, "", "epoch", "target validation mIoU (%)"),
        )


def ablation_chart(models: dict):
    """Validation mIoU of every model as bars; with standard deviations where there are seeds."""
    values = {
        MODEL_ROWS[row].replace("UniMatch on ", "").split(" (")[0]: found["miou"]
        for row, found in models.items()
    }
    several = len(next(iter(values.values()))) > 1
    return bar_chart(
        {"": {title: statistics.mean(found) for title, found in values.items()}},
        "",
        "target validation mIoU (%)",
        {title: statistics.stdev(found) for title, found in values.items()} if several else None,
    )


def copy_scc_pictures(seed_folder: Path, pictures: Path) -> None:
    """Those of SCC's report, as scc_<name>."""
    lists = label_lists(seed_folder)
    if scc := lists.get("scc") or lists.get("scc_paper"):
        for picture in (seed_folder / scc.parent.name / "report").glob("*.png"):
            shutil.copyfile(picture, pictures / f"scc_{picture.name}")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, with seed<n> in it")
    parser.add_argument(
        "--pictures",
        type=int,
        default=8,
        help="images in the side-by-side picture; 0: no such picture (default: 8)",
    )
    add_class_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    check_range(args, "pictures", least=0)
    classes = class_set(args.class_num, args.stuff, args.things)
    there = seeds_in(args.run)
    seeds = finished(there)
    numbers = [int(folder.name[4:]) for folder in seeds]
    unfinished = [int(folder.name[4:]) for folder in there if folder not in seeds]
    if not seeds:
        raise UserError(f"{args.run}: no finished seed<n> folder in it; run scripts/toy.sh first")
    old = set().union(*(outdated(args.run, folder / "stages") for folder in seeds))
    for name in stage_costs(seeds).keys() - old:
        if not of_one_setting([folder / "stages" for folder in seeds], name):
            raise UserError(
                f"{args.run}: its seeds have stage {name} with other options; run all of them again"
                " (SEEDS), or move the folders of the old ones away"
            )
    if old:
        print(f"left out, from inputs that have changed since: {', '.join(sorted(old))}")
    quality = gather(seeds, LABEL_ROWS, "quality_", LABEL_FIGURES, old)
    models = gather(seeds, MODEL_ROWS, "", ("miou",), old)
    costs = {name: cost for name, cost in stage_costs(seeds).items() if name not in old}

    names = ", ".join(map(str, numbers))
    text = f"Seeds: {names}. Figures in %, mean ± standard deviation over the seeds.\n\n"
    if unfinished:
        line = f"Not finished, left out: seeds {', '.join(map(str, unfinished))}."
        print(line)
        text += f"{line}\n\n"
    text += "### Pseudo-labels of the target's training images\n\n" + label_table(quality)
    if "before" in models:
        text += "\n### Target validation mIoU (last checkpoint)\n\n" + model_table(models)
    total = {
        "seconds": sum(c["seconds"] for c in costs.values()),
        "peak_memory_mb": max((c["peak_memory_mb"] for c in costs.values()), default=0),
    }
    text += "\n### Cost of each stage\n\n" + cost_table({**costs, "total": total})

    write_json(
        args.run / "results.json",
        {
            "seeds": numbers,
            "unfinished": unfinished,
            "labels": quality,
            "models": models,
            "stages": costs,
        },
    )
    (args.run / "results.md").write_text(text, encoding="utf-8")
    pictures = args.run / "pictures"
    pictures.mkdir(exist_ok=True)
    if args.pictures:
        side_by_side(seeds[0], classes, args.pictures)
    miou_curve(seeds[0])
    if len(models) > 2:
        save_chart(pictures / "ablation.png", ablation_chart(models))
    copy_scc_pictures(seeds[0], pictures)
    print(f"tables: {args.run / 'results.md'}, {args.run / 'results.json'}; pictures: {pictures}")


if __name__ == "__main__":
    sys.exit(run_main(main))
