"""The benchmark's files: images, ground truth and lists of the scenes of a data seed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from PIL import Image

from dataset.toy.objects import HEIGHT, STYLES, WIDTH
from dataset.toy.street import draw_scene
from util.labels import CITYSCAPES_19, write_label, write_list
from util.options import Bounds, Folder, parse_options
from util.outputs import atomic_path, read_json, write_json
from util.run import UserError, progress

VERSION = 4  # of what is drawn; a cache made by another version is not used
# (domain, split): number of scenes. Each scene's own seed is built from (data seed, split, index),
# see `scene_seed`.
SPLITS = {("source", "train"): 600, ("target", "train"): 60, ("target", "val"): 80}
# Seeds from here on are never used for the benchmark: scripts/dev/sam_tiny.py takes its
# scenes from there.
FIRST_FREE_SEED = 10_000_000


def scene_seed(seed: int, split: str, index: int) -> int:
    """Data seeds 0..99, at most 10,000 scenes of a split: no two scenes of one style share a
    seed.
    """
    return seed * 100_000 + ("train", "val").index(split) * 10_000 + index


def _write_scene(folder: Path, seed: int, scene: tuple[str, str, int]) -> None:
    """Draw and save one scene (domain, split, index), unless both files are there."""
    domain, split, index = scene
    image_path = folder / domain / split / "images" / f"{index:05d}.png"
    label_path = folder / domain / split / "gt" / f"{index:05d}.png"
    if image_path.is_file() and label_path.is_file():
        return
    drawn = draw_scene(scene_seed(seed, split, index), domain)
    with atomic_path(image_path) as temporary:
        Image.fromarray(drawn.image).save(temporary, format="PNG", compress_level=1)
    write_label(label_path, drawn.label, CITYSCAPES_19.palette)


def make_toy(root: Path, seed: int, sizes: dict[tuple[str, str], int] = SPLITS) -> Path:
    """Make the benchmark of a data seed under `<root>/toy/s<seed>/`, or finish it; returns that
    folder.

    Writes `<domain>/<split>/images/*.png`, `<domain>/<split>/gt/*.png` and, in `lists/`,
    source_train.txt (image and label), target_train.txt (image only), target_train_gt.txt and
    target_val.txt (image and label; for evaluation and diagnostics). Paths in the lists are
    relative to `root`.
    """
    folder = root / "toy" / f"s{seed}"
    made = {
        "version": VERSION,
        "seed": seed,
        "size": [HEIGHT, WIDTH],
        "scenes": {f"{domain}/{split}": count for (domain, split), count in sizes.items()},
    }
    marker = folder / "made.json"
    if marker.is_file():
        if read_json(marker) == made:
            return folder
        raise UserError(
            f"{folder}: holds scenes of another version or number; delete the folder and start"
            " again"
        )
    # The lists come first: they say what an unfinished folder is to become.
    for (domain, split), count in sizes.items():
        base = f"toy/s{seed}/{domain}/{split}"
        rows = [(f"{base}/images/{i:05d}.png", f"{base}/gt/{i:05d}.png") for i in range(count)]
        if (domain, split) == ("target", "train"):
            write_list(folder / "lists/target_train_gt.txt", rows)
            rows = [(image,) for image, _ in rows]
        write_list(folder / f"lists/{domain}_{split}.txt", rows)
    scenes = [(*where, i) for where, count in sizes.items() for i in range(count)]
    with ProcessPoolExecutor(2) as pool:
        written = pool.map(partial(_write_scene, folder, seed), scenes, chunksize=8)
        for _ in progress(written, "drawing", len(scenes)):
            pass
    write_json(marker, made)
    return folder


def preview(path: Path) -> None:
    """A picture of the first scenes of every style, each beside its labels."""
    from util.pictures import colour_label, contact_sheet, save_picture

    sheet = []
    for index in range(4):
        sheet.append([])
        for style in STYLES:
            scene = draw_scene(scene_seed(0, "train", index), style)
            sheet[-1] += [scene.image, colour_label(scene.label, CITYSCAPES_19.palette)]
    titles = [title for style in STYLES for title in (f"{style} style", "labels")]
    save_picture(path, contact_sheet(sheet, titles, legend=CITYSCAPES_19))


SceneCount = Annotated[int, Bounds(least=1, most=10_000), "SOURCE TARGET VAL"]


@dataclass(kw_only=True)
class Options:
    """scenes"""

    seed: Annotated[int, Bounds(least=0, most=99)] = 0
    "data seed, 0 to 99"
    root_path: Folder = Path("data")
    "folder for toy/s<seed>/"
    scenes: tuple[SceneCount, SceneCount, SceneCount] = tuple(SPLITS.values())
    "number of source training, target training and target validation scenes, 1 to 10000 each"
    preview: Annotated[Path, "PNG"] | None = None
    "only draw a picture of some scenes to this file"


def main(argv: list[str] | None = None) -> None:
    options = parse_options(Options, "Makes the embedded benchmark.", argv)
    if options.preview:
        preview(options.preview)
    else:
        make_toy(options.root_path, options.seed, dict(zip(SPLITS, options.scenes)))
