"""What PSA leaves beside its labels: a record of each image, a list's summary, mask proposals.

Records are JSON, one file an image, in stats/ of the folder of labels. An image is done when its
label and its record are there and the record names the image and the pixel label as they are now.
"""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.segmenter import ProposalMask
from util.connectivity import connectivities
from util.labels import (
    IGNORE,
    ClassSet,
    holds_pictures,
    renamed_experiment,
    renamed_list,
    write_list,
)
from util.outputs import atomic_path, check_settings, read_json, write_json
from util.run import UserError, progress, sha256, wait_for

Row = tuple[str, str]  # of a list: image path, path of the pixel label


@dataclass(frozen=True)
class Places:
    """Where everything of a list is.

    root: what paths start from. suffix: of the experiment's name. out: the folder of the labels.
    list_path: the list of results. shown: the label paths of the rows that get a picture.
    """

    root: Path
    suffix: str
    out: Path
    list_path: Path
    summary: Path
    shown: frozenset[str]

    def label(self, row: Row) -> Path:
        return self.root / renamed_experiment(row[1], self.suffix)

    def record(self, row: Row) -> Path:
        return self.out / "stats" / (row[1].partition("/")[2] + ".json")

    def picture(self, row: Row) -> Path:
        return self.out / "vis" / row[1].partition("/")[2]


def places_of(
    rows: list[Row], list_path: str, root: str, suffix: str, limit: int | None, vis: int
) -> Places:
    """The places of a list's results; UserError where they could not be told from its inputs.

    limit: the list's first rows are taken, whose list and summary get names of their own. vis: how
    many of them get a picture.
    """
    experiments = {row[1].partition("/")[0] for row in rows}
    if len(experiments) > 1:
        raise UserError(
            f"{list_path}: label paths of several experiments ({', '.join(sorted(experiments))});"
            " give one list for each"
        )
    out = Path(root) / renamed_experiment(rows[0][1], suffix).partition("/")[0]
    for image, label in rows:
        if image.partition("/")[0] == out.name:
            raise UserError(f"{list_path}: {image} lies in {out}, where results go; rename one")
        if label.split("/")[1] in ("stats", "vis"):
            raise UserError(
                f"{list_path}: {label} lies in a folder named as one of the results' own, stats/"
                " and vis/; rename it"
            )
    first = f"_first{limit}" if limit else ""
    new_list = renamed_list(list_path, rows[0][1], suffix)
    new_list = new_list.with_stem(new_list.stem + first)
    shown = frozenset(row[1] for row in rows[:vis])
    return Places(Path(root), suffix, out, new_list, out / f"summary{first}.json", shown)


def check_folder(places: Places, rows: list[Row], settings: dict) -> None:
    """Labels of other settings, or not of PSA at all, are neither mixed with ours nor overwritten.

    Another process may be at work already: it notes the settings before it writes the first label.
    """
    begun = any(places.label(row).is_file() for row in rows) or holds_pictures(places.out)
    check_settings(places.out / "settings.json", settings, begun=begun)


def rows_to_do(rows: list[Row], places: Places, quiet: bool) -> list[Row]:
    """The rows whose results are not there yet."""
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda row: is_done(row, places), rows)
        done = list(progress(done, "looking for earlier results", len(rows), quiet=quiet))
    if any(done) and not quiet:
        print(f"{sum(done)} of {len(rows)} images are done already")
    return [row for row, there in zip(rows, done) if not there]


def is_done(row: Row, places: Places) -> bool:
    """Whether an image's results are there; UserError if what they were made from has changed."""
    record = read_record(places.record(row))
    if record is None or not places.label(row).is_file():
        return False
    for path, (name, digest) in zip(row, row_digests(places.root, row).items()):
        if record[name] != digest:
            raise UserError(
                f"{places.root / path}: has changed since {places.label(row)} was made from it;"
                f" remove {places.out} or rename the experiment"
            )
    return row[1] not in places.shown or places.picture(row).is_file()


# ------------------------------------------------------------------------------- records, summary


def row_digests(root: Path, row: Row) -> dict[str, str]:
    """SHA-256 of a row's image and pixel label, as records have them."""
    return {"image_sha256": sha256(root / row[0]), "label_sha256": sha256(root / row[1])}


def read_record(path: Path) -> dict | None:
    """The record of an image; None if there is none or it is none of ours: it is made again."""
    try:
        record = read_json(path)
    except UserError:
        return None
    return record if isinstance(record, dict) and "label_sha256" in record else None


def image_record(
    row: Row, label: np.ndarray, result, digests: dict[str, str], classes: ClassSet
) -> dict:
    """The record of an image, of which `summarise` makes sums. result: seco_sam.Aggregation."""
    made = [c.class_id for c in connectivities(result.label, range(classes.count))]
    return {
        "image": row[0],
        "label": row[1],
        **digests,
        "pixels": int(label.size),
        "labeled_before": int(np.count_nonzero(label != IGNORE)),
        "labeled_after": int(np.count_nonzero(result.label != IGNORE)),
        "proposals": len(result.aligned),
        "aligned": sum(c != IGNORE for c in result.aligned),
        "prompts": _counts([p.class_id for p in result.prompts]),
        "connectivities": _counts(made),
    }


def _counts(class_ids: list[int]) -> dict[str, int]:
    """{class: how often}, keys as JSON has them."""
    return {str(c): class_ids.count(c) for c in sorted(set(class_ids))}


def summarise(records: list[dict], classes: ClassSet) -> dict:
    """The summary of a list from its images' records: shares in percent, times in seconds."""
    total = lambda key: sum(record[key] for record in records)
    per_class = lambda key: {
        name: sum(record[key].get(str(i), 0) for record in records)
        for i, name in enumerate(classes.names)
    }
    seconds: dict[str, float] = {}
    for record in records:
        for stage, value in record["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    summary = {
        "images": len(records),
        "coverage_before": 100 * total("labeled_before") / total("pixels"),
        "coverage_after": 100 * total("labeled_after") / total("pixels"),
        "proposals_per_image": total("proposals") / len(records),
        "proposals_with_a_class_per_image": total("aligned") / len(records),
        "prompts_per_class": per_class("prompts"),
        "connectivities_per_class": per_class("connectivities"),
        "seconds_per_stage": {stage: round(value, 2) for stage, value in seconds.items()},
        "seconds_per_image": round(total("total_seconds") / len(records), 3),
    }
    agreement = {r["image"]: r["bf16_agreement"] for r in records if "bf16_agreement" in r}
    return summary | ({"bf16_agreement": agreement} if agreement else {})


def write_summary(rows: list[Row], classes: ClassSet, places: Places, more: dict) -> str:
    """The list of results and its summary with `more`, when all processes have made their part;
    what to tell of it.
    """
    made = [path for row in rows for path in (places.record(row), places.label(row))]
    wait_for(made, "the other processes")
    write_list(places.list_path, [(r[0], renamed_experiment(r[1], places.suffix)) for r in rows])
    summary = summarise([read_json(places.record(row)) for row in rows], classes)
    write_json(places.summary, summary | more)
    return (
        f"{len(rows)} images: {summary['coverage_before']:.1f} % of the pixels labeled before,"
        f" {summary['coverage_after']:.1f} % after; {summary['proposals_per_image']:.0f}"
        f" proposals an image\nlabels: {places.out}\nlist: {places.list_path}"
    )


# ---------------------------------------------------------------------------------------- proposals


def save_proposals(path: Path, masks: list[ProposalMask]) -> None:
    """The masks to a file, as bits, compressed: a few hundred kilobytes for an image of
    2048x1024.
    """
    boxes = np.array([box for _, box in masks], dtype=np.int32).reshape(-1, 4)
    bits = np.packbits(
        np.concatenate([m.cpu().numpy().ravel() for m, _ in masks] or [np.zeros(0, bool)])
    )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, boxes=boxes, bits=bits)


def load_proposals(path: Path, device: torch.device) -> list[ProposalMask]:
    """What `save_proposals` wrote."""
    try:
        with np.load(path) as file:
            boxes, bits = file["boxes"].tolist(), np.unpackbits(file["bits"]).astype(bool)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not mask proposals of this script ({error}); remove the file"
        ) from None
    masks, start = [], 0
    for x0, y0, x1, y1 in boxes:
        height, width = y1 - y0 + 1, x1 - x0 + 1
        mask = torch.from_numpy(bits[start : start + height * width].reshape(height, width))
        masks.append((mask.to(device), (x0, y0, x1, y1)))
        start += height * width
    return masks
