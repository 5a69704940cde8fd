"""Measure the tiny SAM on held-out toy scenes and on photographs, as the two ways in which PSA
uses a SAM.

Box and points: every thing instance and stuff object is prompted with an imperfect box and one or
two points (as in the training: fragments, enlarged boxes), single-mask output; mean IoU by object
size, beside the control of filling the box. Proposals: SamAutomaticMaskGenerator with its official
thresholds; how many, how good, and how much of the image and of its stuff they cover.

Inputs:  --checkpoint (model/sam_tiny.pth); scenes are drawn by dataset/toy.py from seeds 9,000,000
         up, which neither the training nor the benchmark has. --photos LIST ... --root-path
         --class-num ...: labeled photographs, shown as SAM sees them, whole; what has no label
         (255) is not measured. Labels are read, being what is measured against.
Outputs: a table; --out (model/sam_tiny.json) with all numbers, seed, steps, minutes and hardware of
         the training. A list's results are under its file's name.

    # about 5 minutes on 2 cores
    python -m scripts.dev.eval_sam_tiny
    python -m scripts.dev.eval_sam_tiny --scenes 4 --out quick.json
    # also on the day photographs that the training left out and, as a diagnostic, on dusk
    python -m scripts.dev.eval_sam_tiny --checkpoint model/sam_tiny_photo.pth \\
        --out model/sam_tiny_photo.json --class-num 11 --stuff 0 1 3 4 5 7 --things 2 6 8 9 10 \\
        --photos splits/camvid/sam_holdout.txt splits/camvid/dusk_gt.txt

Needs when copied away: model/, scripts/dev/train_sam_tiny.py, dataset/toy/,
util/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from dataset.toy import draw_scene
from model.sam import build_sam
from model.sam_tiny import TINY_CHECKPOINT
from scripts.dev.train_sam_tiny import (
    HEIGHT,
    MIN_AREA,
    VOID,
    WIDTH,
    Photographs,
    box_target,
    imperfect_box,
    labeled_components,
    photo_window,
    read_photographs,
    segment_table,
    stuff_components,
)
from util.labels import CITYSCAPES_19, class_set
from util.options import (
    add_class_options,
    add_run_options,
    check_range,
    check_run_options,
)
from util.progress import progress
from util.run import run_main, select_device, write_json

ROOT = Path(__file__).resolve().parents[2]

FIRST_SEED = 9_000_000  # scene seeds of this measurement
STYLES = ("target", "source", "random")
SIZE_BINS = (
    ("under 50", 0, 50),
    ("50 to 150", 50, 150),
    ("150 to 500", 150, 500),
    ("500 to 2000", 500, 2000),
    ("above 2000", 2000, HEIGHT * WIDTH + 1),
)  # pixels of the object
GOOD_IOU = 0.9


@dataclass(frozen=True)
class Example:
    """A picture to measure on: image [H, W, 3] uint8, label [H, W] uint8, segment [H, W] (VOID: not
    measured), whole stuff components [H, W] (ids from 1, or 0), and the train IDs of stuff.
    """

    image: np.ndarray
    label: np.ndarray
    segment: np.ndarray
    component: np.ndarray
    stuff: tuple[int, ...]

    @property
    def known(self) -> np.ndarray:
        return self.segment != VOID


def drawing(number: int, style: str) -> Example:
    """The `number`-th held-out scene of a style."""
    seed = FIRST_SEED + 100_000 * STYLES.index(style) + number
    return example_of(draw_scene(seed, style, HEIGHT, WIDTH))


def example_of(scene) -> Example:
    """A scene of dataset/toy.py as an example."""
    segment, component = np.asarray(scene.segment, np.int32), stuff_components(scene.label)
    return Example(scene.image, scene.label, segment, component, CITYSCAPES_19.stuff)


def photograph(number: int, photographs: Photographs, count: int) -> Example:
    """The `number`-th of `count` photographs spread evenly over the list, whole."""
    image, label = photographs.read(number * len(photographs.rows) // count)
    image, label = photo_window(image, label, photographs.size, 1, np.array([0.5, 0.5]))
    segment = labeled_components(label, photographs.classes)
    return Example(image, label, segment, np.zeros_like(segment), photographs.classes.stuff)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two bool masks of one shape; 0 for two empty ones."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def prompt_scene(predictor: SamPredictor, scene: Example, rng: np.random.Generator) -> list[dict]:
    """One imperfect box-and-points prompt for every segment: its area, whether it is a thing, the
    IoU of SAM's mask and of the filled box, and SAM's own estimate.
    """
    predictor.set_image(scene.image)
    rows = []
    table = segment_table(scene.segment, scene.label, scene.stuff)
    for index, area, y0, y1, x0, x1, is_thing in table:
        if area < MIN_AREA:
            continue
        truth = scene.segment == index
        box, points, fragment = imperfect_box(
            rng, truth[y0:y1, x0:x1], (y0, x0), int(rng.integers(1, 3)), truth.shape
        )
        truth = box_target(truth, box, fragment, bool(is_thing))
        masks, predicted, _ = predictor.predict(
            point_coords=points,
            point_labels=np.ones(len(points), int),
            box=box,
            multimask_output=False,
        )
        filled = np.zeros_like(truth)
        bx0, by0, bx1, by1 = box.astype(int)
        filled[by0 : by1 + 1, bx0 : bx1 + 1] = True
        rows.append(
            {
                "area": np.count_nonzero(truth),
                "thing": bool(is_thing),
                "iou": mask_iou(masks[0] & scene.known, truth),
                "fill": mask_iou(filled & scene.known, truth),
                "predicted": float(predicted[0]),
            }
        )
    return rows


def propose_scene(generator: SamAutomaticMaskGenerator, scene: Example) -> dict:
    """Proposals of one scene against its segments and whole stuff components.

    A proposal's quality is its best IoU with any of them. Covered pixels lie in a proposal whose
    quality exceeds GOOD_IOU; stuff pixels are counted apart.
    """
    known, component = scene.known, scene.component
    stuff = np.isin(scene.label, scene.stuff) & known
    truths = [scene.segment == index for index in np.unique(scene.segment[known])]
    truths += [component == index for index in np.unique(component[component > 0])]
    covered, good = np.zeros(stuff.shape, bool), np.zeros(stuff.shape, bool)
    qualities = []
    for proposal in generator.generate(scene.image):
        mask = proposal["segmentation"] & known
        if not mask.any():  # all of it where nothing is measured
            continue
        qualities.append(max(mask_iou(mask, truth) for truth in truths))
        covered |= mask
        good |= mask & (qualities[-1] > GOOD_IOU)
    return {
        "number": len(qualities),
        "iou": qualities,
        "covered": float(covered[known].mean()),
        "covered_well": float(good[known].mean()),
        "stuff_covered": float(covered[stuff].mean()),
        "stuff_covered_well": float(good[stuff].mean()),
    }


def summarise_prompts(rows: list[dict]) -> dict:
    """Means by size for things and for all; `n` objects each."""
    summary = {}
    for kind, chosen in (("things", [r for r in rows if r["thing"]]), ("all", rows)):
        bins = {}
        for name, low, high in (*SIZE_BINS, ("every size", 0, HEIGHT * WIDTH + 1)):
            inside = [r for r in chosen if low <= r["area"] < high]
            means = {
                key: round(float(np.mean([r[key] for r in inside])), 3) if inside else None
                for key in ("iou", "fill", "predicted")
            }
            bins[name] = {"n": len(inside), **means}
        summary[kind] = bins
    return summary


def summarise_proposals(rows: list[dict]) -> dict:
    """Means over scenes; `iou` is the mean, `good` the share of all proposals above GOOD_IOU."""
    quality = np.concatenate([r["iou"] for r in rows]) if rows else np.zeros(0)
    summary = {
        key: round(float(np.mean([r[key] for r in rows])), 3)
        for key in ("number", "covered", "covered_well", "stuff_covered", "stuff_covered_well")
    }
    summary["iou"] = round(float(quality.mean()), 3) if quality.size else None
    summary["good"] = round(float((quality > GOOD_IOU).mean()), 3) if quality.size else None
    return summary


def evaluate(
    sam, name: str, example: Callable[[int], Example], scenes: int, proposal_scenes: int, seed: int
) -> dict:
    """Both measurements on `example(0)` up to `scenes`; proposals, being slow, on
    `proposal_scenes` of them, spread evenly.
    """
    predictor, generator = SamPredictor(sam), SamAutomaticMaskGenerator(sam)
    chosen = {number * scenes // proposal_scenes for number in range(proposal_scenes)}
    prompts, proposals = [], []
    for number in progress(range(scenes), name):
        scene = example(number)
        prompts += prompt_scene(predictor, scene, np.random.default_rng((seed, number)))
        if number in chosen:
            proposals.append(propose_scene(generator, scene))
    return {
        "scenes": scenes,
        "proposal_scenes": proposal_scenes,
        "prompts": summarise_prompts(prompts),
        "proposals": summarise_proposals(proposals),
    }


def format_table(results: dict) -> str:
    """The results of all styles as text."""
    show = lambda value: "   -" if value is None else f"{value:.2f}"  # noqa: E731
    lines = [
        "box and points, mean IoU (in brackets: filling the box; number of objects)",
        f"{'':20}" + "".join(f"{name:>22}" for name in (*(b[0] for b in SIZE_BINS), "every size")),
    ]
    for style, result in results.items():
        for kind, bins in result["prompts"].items():
            lines.append(
                f"{style + ' ' + kind:20}"
                + "".join(
                    f"{show(v['iou']) + ' (' + show(v['fill']) + '; ' + str(v['n']) + ')':>22}"
                    for v in bins.values()
                )
            )
    lines.append(
        "proposals at the official thresholds: number an image, mean IoU, share above 0.9, pixels"
        " covered (by proposals above 0.9), stuff pixels covered (by proposals above 0.9)"
    )
    for style, result in results.items():
        p = result["proposals"]
        lines.append(
            f"{style:20}{p['number']:.1f}  {show(p['iou'])}  {show(p['good'])}  {p['covered']:.2f} "
            f"({p['covered_well']:.2f})  {p['stuff_covered']:.2f} ({p['stuff_covered_well']:.2f})"
        )
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=TINY_CHECKPOINT, help="weights (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=TINY_CHECKPOINT.with_suffix(".json"),
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=30,
        help="scenes a style, and photographs a list, for the prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--proposal-scenes",
        type=int,
        default=10,
        help="of these, scenes for the proposals, seconds each (default: %(default)s)",
    )
    parser.add_argument(
        "--styles", nargs="*", choices=STYLES, default=STYLES, help="(default: all)"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="*",
        default=[],
        metavar="LIST",
        help="lists of labeled photographs, `<image> <label>` a line (default: none)",
    )
    parser.add_argument(
        "--root-path",
        type=Path,
        default=ROOT / "data",
        help="folder that the paths of --photos start at (default: %(default)s)",
    )
    add_class_options(parser)
    parser.add_argument(
        "--train-log",
        type=Path,
        default=ROOT / "data/sam_tiny_run/training.json",
        help="record of the training, copied into --out if it is there (default: %(default)s)",
    )
    add_run_options(parser)
    args = parser.parse_args(argv)
    check_run_options(args)
    check_range(args, "scenes", least=1)
    check_range(args, "proposal_scenes", least=0)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    sets = {style: (partial(drawing, style=style), args.scenes) for style in args.styles}
    for path in args.photos:
        classes = class_set(args.class_num, args.stuff, args.things)
        photographs = read_photographs(path, args.root_path, classes)
        count = min(args.scenes, len(photographs.rows))
        sets[path.stem] = (partial(photograph, photographs=photographs, count=count), count)
    sam = build_sam("tiny", args.checkpoint, select_device(args.device))
    results = {
        name: evaluate(sam, name, example, count, min(count, args.proposal_scenes), args.seed)
        for name, (example, count) in sets.items()
    }
    print(format_table(results))
    training = (
        json.loads(args.train_log.read_text(encoding="utf-8")) if args.train_log.is_file() else None
    )
    write_json(
        args.out,
        {
            "training": training,
            "seed": args.seed,
            "first_scene_seed": FIRST_SEED,
            "results": results,
        },
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
