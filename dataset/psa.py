"""PSA of a list: what it reads and where its results go; a record and a picture of each image, a
summary.

Records are in stats/ of the folder of labels, a JSON file each. An image is done when its label and
its record are there and the record names the image and the pixel label as they are. `result` is a
seco_sam.Aggregation.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from util.labels import (
    COLOURS,
    IGNORE,
    ClassSet,
    Experiment,
    connectivities,
    in_experiment,
    read_label,
    write_list,
)
from util.outputs import read_json, write_json
from util.pictures import colour_label, contact_sheet, overlay
from util.run import UserError, process_rank, progress, sha256

# Below them PSA doubts its segmenter. Read off runs: of photographs' labels the tiny SAM of drawn
# scenes kept 25 %, that of photographs 63 %; CamVid's good runs have 6 proposals an image.
MIN_KEPT = 50.0  # percent of the labeled pixels
MIN_PROPOSALS = 3  # an image

Row = tuple[str, str]  # of a list: image path, path of the pixel label


class Job(Experiment):
    """What is aggregated, and where the results go. shown: label paths of the rows that get a
    picture.
    """

    def __init__(self, options):
        """options: of seco_sam.py."""
        super().__init__(options, options.suffix, options.limit)
        for _, label in self.rows:
            if label.split("/")[1] in ("stats", "vis"):
                raise UserError(
                    f"{options.id_list_path}: {label} lies in a folder named as one of the results'"
                    " own; rename it"
                )
        first = f"_first{options.limit}" if options.limit else ""
        self.list_path = self.list_path.with_stem(self.list_path.stem + first)
        self.summary = self.out / f"summary{first}.json"
        self.shown = {label for _, label in self.rows[: options.vis]}

    def label(self, row: Row) -> Path:
        return self.root / in_experiment(row[1], self.name)

    def record(self, row: Row) -> Path:
        return self.out / "stats" / (row[1].partition("/")[2] + ".json")

    def picture(self, row: Row) -> Path:
        return self.out / "vis" / row[1].partition("/")[2]

    def digests(self, row: Row) -> dict[str, str]:
        """SHA-256 of a row's image and pixel label, as records have them."""
        image, label = (sha256(self.root / path) for path in row)
        return {"image_sha256": image, "label_sha256": label}

    def is_done(self, row: Row) -> bool:
        """Whether an image's results are there; UserError if their inputs have changed."""
        if not (self.record(row).is_file() and self.label(row).is_file()):
            return False
        record = read_json(self.record(row))
        if not {"kept", "seconds"} <= record.keys():  # of an older form
            return False
        for path, (name, digest) in zip(row, self.digests(row).items()):
            if record[name] != digest:
                raise UserError(
                    f"{self.root / path}: has changed since {self.label(row)} was made from it;"
                    " remove that label map to have it made again, or rename the experiment"
                )
        return row[1] not in self.shown or self.picture(row).is_file()

    def rows_to_do(self) -> list[Row]:
        """This process's rows whose results are not there yet."""
        rank, world = process_rank()
        rows = self.rows[rank::world]
        with ThreadPoolExecutor() as pool:
            done = pool.map(self.is_done, rows)
            done = list(progress(done, "looking for earlier results", len(rows)))
        if any(done) and rank == 0:
            print(f"{sum(done)} of {len(rows)} images are done already")
        return [row for row, there in zip(rows, done) if not there]


# ------------------------------------------------------------------------------- records, summary


def image_record(row: Row, label: np.ndarray, result) -> dict:
    """The record of an image, for `summarise`. label: the pixel label, uint8 H x W."""
    made = connectivities(result.label, range(IGNORE))
    before, after = label != IGNORE, result.label != IGNORE
    return {
        "image": row[0],
        "label": row[1],
        "pixels": int(label.size),
        "labeled_before": int(np.count_nonzero(before)),
        "labeled_after": int(np.count_nonzero(after)),
        "kept": int(np.count_nonzero(before & (result.label == label))),
        "lost": int(np.count_nonzero(before & ~after)),
        "proposals": len(result.aligned),
        "aligned": sum(c != IGNORE for c in result.aligned),
        "prompts": dict(sorted(Counter(p.class_id for p in result.prompts).items())),
        "connectivities": dict(sorted(Counter(c.class_id for c in made).items())),
        "seconds": result.seconds,
    }


def summarise(records: list[dict], classes: ClassSet) -> dict:
    """The summary of a list from its images' records: shares in percent, times in seconds."""
    total = lambda key: sum(record[key] for record in records)
    per_class = lambda key: {
        name: sum(record[key].get(str(i), 0) for record in records)
        for i, name in enumerate(classes.names)
    }
    seconds: dict[str, float] = Counter()
    for record in records:
        seconds.update(record["seconds"])
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
    if total("labeled_before"):
        share = lambda pixels: 100 * pixels / total("labeled_before")
        kept, lost = total("kept"), total("lost")
        summary["of_labeled_pixels"] = {
            "keep_their_class": share(kept),
            "get_another": share(total("labeled_before") - kept - lost),
            "lose_it": share(lost),
        }
    agreement = {r["image"]: r["bf16_agreement"] for r in records if "bf16_agreement" in r}
    return summary | ({"bf16_agreement": agreement} if agreement else {})


def write_summary(job: Job, made: dict) -> None:
    """The list of results and the summary, when all processes are done. made: the manifest."""
    results = [path for row in job.rows for path in (job.record(row), job.label(row))]
    if process_rank()[1] > 1:
        print("waiting for the other processes")
    while not all(path.is_file() for path in results):
        time.sleep(0.5)
    write_list(job.list_path, job.results)
    summary = summarise([read_json(job.record(row)) for row in job.rows], job.classes)
    if job.truth:
        summary |= accuracies(job)
    summary["warnings"] = doubts(summary)
    peak = {name: made["cost"][name] for name in made["cost"] if name != "seconds"}
    write_json(job.summary, summary | {"peak_memory": peak, "manifest": made})
    print(
        f"{len(job.rows)} images: {summary['coverage_before']:.1f} % of the pixels labeled before,"
        f" {summary['coverage_after']:.1f} % after; {summary['proposals_per_image']:.0f}"
        " proposals an image"
    )
    if shares := summary.get("of_labeled_pixels"):
        words = ", ".join(f"{share:.1f} % {what}" for what, share in shares.items())
        print(f"of the pixels that had a label: {words.replace('_', ' ')}")
    if summary.get("accuracy_after") is not None:
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        print(f"accuracy of the labeled pixels: {before:.1f} % before, {after:.1f} % after")
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"labels: {job.out}\nlist: {job.list_path}")


def accuracies(job: Job) -> dict:
    """Accuracy in percent of labeled pixels before and after, None where no pixel is labeled; label
    maps are resized to the ground truth's size.
    """
    right, labeled = np.zeros(2), np.zeros(2)
    for row in progress(job.rows, "accuracy"):
        known = read_label(job.root / job.truth[row[0]], job.classes.count)
        for when, path in enumerate((job.root / row[1], job.label(row))):
            label = Image.fromarray(read_label(path, job.classes.count))
            label = np.asarray(label.resize(known.shape[::-1], Image.Resampling.NEAREST))
            counted = (label != IGNORE) & (known != IGNORE)
            labeled[when] += np.count_nonzero(counted)
            right[when] += np.count_nonzero(counted & (label == known))
    names = ("accuracy_before", "accuracy_after")
    return {n: 100 * r / c if c else None for n, r, c in zip(names, right, labeled)}


def doubts(summary: dict) -> list[str]:
    """Warnings where the labels themselves say that the segmenter may not suit the images."""
    found, shares = [], summary.get("of_labeled_pixels")
    if shares and shares["keep_their_class"] < MIN_KEPT:
        found.append(f"under {MIN_KEPT:g} % of the labeled pixels keep their class")
    if 0 < summary["proposals_per_image"] < MIN_PROPOSALS:
        found.append(f"fewer than {MIN_PROPOSALS} proposals an image")
    remedy = "look at some pictures (--vis 8) and try another --sam-type, as vit_h or tiny_photo"
    return [f"{text}: the segmenter may not suit these images; {remedy}" for text in found]


# --------------------------------------------------------------------------------------- pictures


def panel(image: np.ndarray, label: np.ndarray, result, classes: ClassSet) -> Image.Image:
    """Image, pixel labels with the prompts, the result's masks, PSA, two by two.

    image: uint8 H x W x 3, RGB; label: uint8 H x W, the pixel-level pseudo-label.
    """
    return contact_sheet(
        [
            [image, prompt_picture(image, label, result, classes)],
            [proposal_picture(image, result), colour_label(result.label, classes.palette)],
        ],
        ["image", "pixel labels, prompts", "proposals", "PSA"],
        legend=classes,
    )


def prompt_picture(image: np.ndarray, label: np.ndarray, result, classes: ClassSet) -> np.ndarray:
    """The pixel labels over the image, with the boxes and points of the prompts."""
    picture = overlay(image, label, classes.palette, 0.75)
    for prompt in result.prompts:
        x0, y0, x1, y1 = (round(v) for v in prompt.box.tolist())
        cv2.rectangle(picture, (x0, y0), (x1, y1), (255, 255, 255), 1)
        for x, y in prompt.points:
            cv2.circle(picture, (round(x), round(y)), 2, (255, 255, 0), -1)
    return picture


def proposal_picture(image: np.ndarray, result) -> np.ndarray:
    """The mask proposals in changing colours over the darkened image."""
    picture = (image * 0.35).astype(np.uint8)
    for i, (mask, (x0, y0, x1, y1)) in enumerate(result.masks):
        window, inside = (slice(y0, y1 + 1), slice(x0, x1 + 1)), mask.cpu().numpy()
        colour = np.array(COLOURS[i % len(COLOURS)])
        picture[window][inside] = (0.35 * image[window][inside] + 0.65 * colour).astype(np.uint8)
    return picture
