"""What a run has left: folders of its stages, each with the manifest of the command that made it.

Folders of a seed (scripts/lib/rows.sh): source, pix… (labels), splits/split_<row>, adapt_<row>,
eval/<row> and, of labels, eval/quality_<row>. Of a task: eval_before, adapt, eval_after, and the
folders of labels beside its data.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from util.outputs import digests, read_json

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
MANIFESTS = ("run.json", "manifest.json", "split.json", "summary.json")


def seeds_in(run: Path) -> list[Path]:
    """The folders `seed<number>` of a run, in order; not others, as `seed1.old`."""
    found = [path for path in run.glob("seed*") if re.fullmatch("seed[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name[4:]))


def manifest_of(folder: Path) -> dict:
    """The manifest that a command has left in its folder; {} without one."""
    for name in MANIFESTS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            record = record.get("manifest", record)
            if "options" in record:
                return record
    return {}


def stage_folders(run: Path) -> dict[str, Path]:
    """{stage: its folder} of a seed or a task; only those that are there."""
    found = task_folders(run) if (run / "adapt").is_dir() else seed_folders(run)
    return {stage: folder for stage, folder in found.items() if folder.is_dir()}


def seed_folders(seed: Path) -> dict[str, Path]:
    """The source model, labels, adapted models."""
    found = {"source": seed / "source", "eval_before": seed / "eval/before"}
    for row, labels in label_lists(seed).items():
        found |= {row: seed / labels.parent.name, f"quality_{row}": seed / f"eval/quality_{row}"}
    for row in MODEL_ROWS:
        found[f"split_{row}"] = seed / f"splits/split_{row}"
        found |= {f"adapt_{row}": seed / f"adapt_{row}", f"eval_{row}": seed / f"eval/{row}"}
    return found


def label_lists(seed: Path) -> dict[str, Path]:
    """{row of labels: its list}, as their evaluations name them."""
    lists = {}
    for row in LABEL_ROWS:
        if options := manifest_of(seed / f"eval/quality_{row}").get("options"):
            lists[row] = seed / "splits" / Path(*Path(options["labels"]).parts[-2:])
    return lists


def truth_list(seed: Path, row: str) -> Path:
    """The list of the ground truth that a row of labels was evaluated with."""
    return Path(manifest_of(seed / f"eval/quality_{row}")["options"]["id_list_path"])


def task_folders(run: Path) -> dict[str, Path]:
    """In the order of the work. Labels lead back from the adaptation, by their lists."""
    training = manifest_of(run / "adapt").get("options", {})
    root, made_from = Path(training.get("root_path", "")), training.get("labeled_id_path")
    labels: list[Path] = []
    while made_from:
        labels.insert(0, root / Path(made_from).parent.name)
        made_from = manifest_of(labels[0]).get("options", {}).get("id_list_path")
    before = manifest_of(run / "eval_before").get("options", {}).get("labels")
    found = {"before_labels": root / Path(before).parent.name} if before else {}
    found |= {"before": run / "eval_before", **dict(zip(("pixel", "psa", "scc"), labels[1:]))}
    if training:
        found["split"] = Path(training["labeled_id_path"]).parent
    return found | {"adapt": run / "adapt", "after": run / "eval_after"}


# ---------------------------------------------------------------------- which of them are reported


def finished(seeds: list[Path]) -> list[Path]:
    """The seeds that no other one is ahead of: left out are those without the source model's or
    SeCo's evaluation, if another has it, and those in the middle of a row that another has ended.
    """
    rows = {f"adapt_{row}": row for row in MODEL_ROWS}  # {folder: evaluation that ends its row}
    for seed in seeds:
        rows |= {path.parent.name: f"quality_{row}" for row, path in label_lists(seed).items()}
    ended = {s: {path.parent.name for path in s.glob("eval/*/metrics.json")} for s in seeds}
    every = set().union(*ended.values())
    begun = {s: {row for folder, row in rows.items() if (s / folder).is_dir()} for s in seeds}
    behind = {seed for seed in seeds if begun[seed] & every - ended[seed]}
    for row in ("before", "seco*"):
        seeds = [seed for seed in seeds if any(seed.glob(f"eval/{row}/metrics.json"))] or seeds
    return [seed for seed in seeds if seed not in behind]


def of_one_setting(seeds: list[Path], stage: str) -> bool:
    """Whether the seeds have equal options of a stage, but for the seed and where files are."""
    shown = set()
    for seed in seeds:
        if options := manifest_of(stage_folders(seed).get(stage, seed)).get("options"):
            options = {n: Path(v).name if "/" in str(v) else v for n, v in options.items()}
            text = json.dumps({**options, "seed": None}, sort_keys=True)
            shown.add(re.sub(r"\bseed\d+", "seed", text))
    return len(shown) <= 1


def outdated(seed: Path) -> set[str]:
    """Stages of a seed of which a file that their manifests name has changed since, and the later
    stages of the same row. A run that leaves out a row leaves it behind like this.
    """
    folders, old = stage_folders(seed), set()
    for stage, folder in folders.items():
        inputs = manifest_of(folder).get("inputs", {}).values()
        noted = {i["path"]: i["sha256"] for i in inputs if Path(i["path"]).is_file()}
        if digests({path: path for path in noted}) != noted:
            old.add(stage)
    for row in LABEL_ROWS.keys() | MODEL_ROWS.keys():
        for stages in ((row, f"quality_{row}"), (f"split_{row}", f"adapt_{row}", f"eval_{row}")):
            first = next((i for i, stage in enumerate(stages) if stage in old), len(stages))
            old |= {stage for stage in stages[first:] if stage in folders}
    return old


# -------------------------------------------------------------------------------------------- costs


def stage_costs(runs: list[Path]) -> dict[str, dict]:
    """{stage: seconds (mean over seeds), peak_memory_mb (largest)} of seeds or a task; None where
    no manifest has it.
    """
    folders, costs = [stage_folders(run) for run in runs], {}
    for stage in folders[0]:
        manifests = [manifest_of(found[stage]) for found in folders if stage in found]
        found = [record["cost"] for record in manifests if "cost" in record]
        seconds = round(statistics.mean(c["seconds"] for c in found), 1) if found else None
        memory = max((round(c["host_mb"]) for c in found), default=None)
        costs[stage] = {"seconds": seconds, "peak_memory_mb": memory}
    return costs
