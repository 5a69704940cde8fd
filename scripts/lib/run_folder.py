"""What a run has left: folders of its stages, each with the manifest of the command that made it.

Folders of a seed (scripts/lib/rows.sh): source, pix… (labels), splits/split_<row>, adapt_<row>,
eval/<row> and, of labels, eval/quality_<row>. Of a task: eval_before, adapt, eval_after, and the
folders of labels beside its data.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from util.labels import read_list
from util.outputs import read_json

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
LABEL_FIGURES = ("coverage", "accuracy", "miou")  # that the tables show of labels
MANIFESTS = ("run.json", "manifest.json", "split.json", "summary.json")


def manifest_of(folder: Path) -> dict:
    """The manifest that a command has left in its folder; {} without one."""
    for name in MANIFESTS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            record = record.get("manifest", record)
            if "options" in record:
                return record
    return {}


def seed_folders(
    seed: Path, labels: Iterable[str] = LABEL_ROWS, models: Iterable[str] = MODEL_ROWS
) -> dict[str, Path]:
    """{stage: its folder} of a seed's source model and of these rows; only those that are there.
    Folders of labels are those that their evaluations name.
    """
    found = {"source": seed / "source", "eval_before": seed / "eval/before"}
    for row in labels:
        evaluation = seed / f"eval/quality_{row}"
        if options := manifest_of(evaluation).get("options"):
            found[row] = seed / Path(options["labels"]).parent.name
            found[f"quality_{row}"] = evaluation
    for row in models:
        found[f"split_{row}"] = seed / f"splits/split_{row}"
        found |= {f"adapt_{row}": seed / f"adapt_{row}", f"eval_{row}": seed / f"eval/{row}"}
    return {stage: folder for stage, folder in found.items() if folder.is_dir()}


def truth_of(evaluation: Path) -> dict[str, str]:
    """{image: ground truth} of the list that labels were evaluated with."""
    return dict(read_list(manifest_of(evaluation)["options"]["id_list_path"]))


def task_folders(run: Path) -> dict[str, Path]:
    """{stage: its folder} of a task, in the order of the work; only those that are there. Labels
    lead back from the adaptation, by their lists.
    """
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
    found |= {"adapt": run / "adapt", "after": run / "eval_after"}
    return {stage: folder for stage, folder in found.items() if folder.is_dir()}


def stage_costs(runs: list[dict[str, Path]]) -> dict[str, dict]:
    """{stage: seconds (mean over seeds), peak_memory_mb (largest)} of the stages, as above, of a
    task or of several seeds; a stage without a manifest is left out.
    """
    costs = {}
    for stage in runs[0]:
        found = [made["cost"] for folders in runs if (made := manifest_of(folders[stage]))]
        if found:
            seconds = round(statistics.mean(cost["seconds"] for cost in found), 1)
            memory = max(round(cost["host_mb"]) for cost in found)
            costs[stage] = {"seconds": seconds, "peak_memory_mb": memory}
    return costs
