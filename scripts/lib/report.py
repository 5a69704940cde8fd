"""Tables, pictures and the page of a pipeline run (scripts/toy.sh, scripts/camvid.sh), over seeds.

    python -m scripts.lib.report runs/x --seeds 0 1 --labels pixel psa scc --models before seco

Reads what the commands left in `<run>/seed<n>/`. Seeds and rows are named by the script that has
just run them all, so that nothing is shown whose inputs have changed since. Writes results.json,
results.md, index.html and pictures/ in the run's folder and, where SCC ran by the paper's recipe,
sweep.json and sweep.md.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from scripts.lib.page import cost_table, draw_images, markdown, spread, write_results
from scripts.lib.run_folder import (
    LABEL_FIGURES,
    LABEL_ROWS,
    MODEL_ROWS,
    seed_folders,
    stage_costs,
    truth_of,
)
from scripts.lib.sweep import sweep
from util.charts import CYCLE, line_chart, new_chart, save_chart
from util.labels import ClassSet, read_classes
from util.options import Argument, Folder, parse_options
from util.outputs import read_json, write_json, write_text
from util.run import run_main
from util.training_log import read_training_log


@dataclass(kw_only=True)
class Options:
    run: Argument[Folder]
    "folder of the run, with seed<n> in it"
    seeds: Annotated[list[int], "N"]
    "seeds that have run"
    labels: Annotated[list[str], "ROW"]
    "rows of labels that every seed has"
    models: Annotated[list[str], "ROW"]
    "rows of models that every seed has"


# ------------------------------------------------------------------------------------------- tables


def gather(seeds: list[Path], rows: list[str], prefix: str, keys: tuple) -> dict:
    """{row: {key: [value per seed]}} from `<seed>/eval/<prefix><row>/metrics.json`."""
    table = {}
    for row in rows:
        metrics = [read_json(seed / f"eval/{prefix}{row}/metrics.json") for seed in seeds]
        table[row] = {key: [entry[key] for entry in metrics] for key in keys}
    return table


def mean_and_deviation(values: list[float]) -> str:
    """`51.3 ± 0.8`: mean and sample standard deviation; without the latter for one seed."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


# Each table is a part of a page (util/page.py).


def label_table(quality: dict, title: str = "labels") -> dict:
    """Coverage, accuracy and mIoU of each row of labels; title: of the first column."""
    head = [title, "coverage", "accuracy of labeled pixels", "mIoU (unlabeled counts as wrong)"]
    rows = [
        [LABEL_ROWS.get(row, row), *(mean_and_deviation(values[key]) for key in LABEL_FIGURES)]
        for row, values in quality.items()
    ]
    return {"head": head, "rows": rows}


def model_table(models: dict, reported: dict[str, float] | None = None) -> dict:
    """mIoU of every model and its gain over "before"; reported: as of tables_of."""
    before, rows = models["before"]["miou"], []
    for row, values in models.items():
        gain = mean_and_deviation([a - b for a, b in zip(values["miou"], before)])
        gain = "" if row == "before" else gain
        cells = [MODEL_ROWS[row], mean_and_deviation(values["miou"]), gain]
        rows.append(cells + ([str(reported.get(row, "–"))] if reported else []))
    head = ["model", "mIoU", "gain over before"]
    head += ["paper (DTST, GTA → Cityscapes)"] if reported else []
    return {"head": head, "rows": rows}


def tables_of(results: dict, reported: dict[str, float] | None = None) -> list[dict]:
    """All tables of results.json. reported: of models, the paper's figures, in a last column."""
    costs, names = results["stages"], ", ".join(map(str, results["seeds"]))
    total = {
        "seconds": sum(cost["seconds"] for cost in costs.values()),
        "peak_memory_mb": max(cost["peak_memory_mb"] for cost in costs.values()),
    }
    labels = label_table(results["labels"])
    models = model_table(results["models"], reported)
    return [
        {"text": f"Seeds: {names}. Figures in %, mean ± standard deviation over the seeds."},
        {"heading": "Pseudo-labels of the target's training images", **labels},
        {"heading": "Target validation mIoU (last checkpoint)", **models},
        {"heading": "Cost of each stage", **cost_table({**costs, "total": total})},
    ]


def sweep_tables(results: dict) -> list[dict]:
    """Of sweep.json (scripts/lib/sweep.py)."""
    return [
        {"heading": f"Pseudo-labels at other {name}", **label_table(rows, name)}
        for name, rows in results.items()
        if name != "seeds"
    ]


# ----------------------------------------------------------------------------------------- pictures


def ablation_chart(models: dict):
    """Validation mIoU of every model as bars; with standard deviations where there are seeds."""
    names = [MODEL_ROWS[row].replace("UniMatch on ", "").split(" (")[0] for row in models]
    seeds = [found["miou"] for found in models.values()]
    spread = [statistics.stdev(mious) for mious in seeds] if len(seeds[0]) > 1 else None
    axes = new_chart("", "target validation mIoU (%)", "", 90 + 30 * max(4, len(names)))
    means = [statistics.mean(mious) for mious in seeds]
    bars = axes.barh(names, means, xerr=spread, capsize=4, color=CYCLE[0])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.08)  # room for the figures
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return axes.figure


def draw(run: Path, folders: dict[str, Path], classes: ClassSet, models: dict) -> None:
    """All pictures of a run: of its first seed, whose folders are given, and the bars."""
    logs = {row: read_training_log(folders[f"adapt_{row}"]) for row in models if row != "before"}
    series = {MODEL_ROWS[row]: log.curve for row, log in logs.items() if log.miou}
    chart = line_chart(series, "", "epoch", "target validation mIoU (%)")
    save_chart(run / "pictures/miou_curve.png", chart)
    save_chart(run / "pictures/ablation.png", ablation_chart(models))
    truth, end = truth_of(folders["quality_pixel"]), "" if "psa" in folders else "_paper"
    titles = {"pixel labels": "pixel", "PSA": f"psa{end}", "SCC": f"scc{end}"}
    stages = {"prediction before": "source", "prediction after": f"adapt_seco{end}"}
    draw_images(
        run / "pictures/side_by_side.png",
        folders["source"].parent,
        spread([*truth], 8),
        {title: folders[stage] for title, stage in titles.items()},
        {title: folders[stage] / "latest.pth" for title, stage in stages.items()},
        truth,
        classes,
        "original",
        769,
    )


# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, __doc__, argv)
    run = options.run
    seeds = [run / f"seed{number}" for number in options.seeds]
    labels = [row for row in LABEL_ROWS if row in options.labels]
    models = [row for row in MODEL_ROWS if row in options.models]
    stages = [seed_folders(seed, labels, models) for seed in seeds]
    results = {
        "seeds": options.seeds,
        "unfinished": [],  # the report comes when all of its seeds are done
        "labels": gather(seeds, labels, "quality_", LABEL_FIGURES),
        "models": gather(seeds, models, "", ("miou",)),
        "stages": stage_costs(stages),
    }
    write_json(run / "results.json", results)
    classes = read_classes(stages[0]["source"] / "classes.txt")
    draw(run, stages[0], classes, results["models"])
    folders = {
        f"{seed.name}/{stage}": folder
        for seed, found in zip(seeds, stages)
        for stage, folder in found.items()
    }
    more = []
    if "scc_paper" in labels:
        more = sweep_tables(sweep(run, stages, classes.count))
        write_text(run / "sweep.md", markdown(more))
    write_results(run, tables_of(results), more, folders)


if __name__ == "__main__":
    sys.exit(run_main(main))
