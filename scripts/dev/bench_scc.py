#!/usr/bin/env python
"""Connectivities per second of SCC's data side, and its memory over a list of full-size images; one
process, one run.

    python -m scripts.dev.bench_scc --out bench_scc.json

Images and label maps of 2048 x 1024 with about 100 connectivities are made here; the list names a
few files again and again, so that 3,000 images need no 10 GB of disk. Two figures:

- patches of the release recipe's training, cut by dataset.scc.patch_batches (an image is opened
  once for all of its connectivities), beside an oracle that does what the released loader does:
  opens the image for each connectivity, and decodes a mask that is stored at full size. Only the
  cutting is measured, no network.
- memory: the index of the list and the streaming of patches, as resident memory at each tenth of
  the batches.

CPU seconds of this process, so that other load on the machine does not blur them.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import cv2
import numpy as np
from PIL import Image, ImageFilter

import seco_scc as scc
from dataset.scc import POOL, Data, index_image, patch_batches
from util.connectivity import connectivities
from util.labels import CITYSCAPES_19, read_image, read_label, write_label, write_list
from util.progress import progress
from util.run import peak_memory_mb, run_main, write_json

HEIGHT, WIDTH = 1024, 2048
FILES = 8  # different images on disk


def make_images(root: Path, images: int) -> list[tuple[str, str]]:
    """FILES full-size images (smooth colours with sensor noise) and label maps (a background of
    large areas and 90 objects); the rows of a list that names them `images` times in all.
    """
    random = np.random.default_rng(0)
    for number in range(FILES):
        small = Image.fromarray(random.integers(0, 256, (16, 32, 3), dtype=np.uint8))
        image = np.asarray(
            small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).filter(
                ImageFilter.GaussianBlur(2)
            )
        )
        noise = random.integers(-2, 3, image.shape, dtype=np.int16)
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).save(
            root / f"images/{number}.png", compress_level=1
        )
        label = np.full((HEIGHT, WIDTH), 8, np.uint8)
        label[:350], label[600:] = 10, 0
        for _ in range(90):
            x, y, w, h = (
                int(v) for v in random.integers((0, 200, 6, 6), (WIDTH, HEIGHT - 60, 160, 120))
            )
            label[y : y + h, x : x + w] = random.choice([2, 5, 7, 11, 13, 18])
        write_label(root / f"pix/{number}.png", label, CITYSCAPES_19.palette)
    return [(f"images/{i % FILES}.png", f"pix/{i % FILES}.png") for i in range(images)]


def store_masks(root: Path, data: Data, members) -> None:
    """Every connectivity's mask as a PNG at full size, as the released loader reads them (it keeps
    them as run lengths).
    """
    (root / "masks").mkdir(exist_ok=True)
    for image in sorted({int(data.index["image"][m]) for m in members}):
        for number, c in enumerate(
            connectivities(read_label(data.root / data.rows[image][1]), range(19))
        ):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[c.window][c.mask] = 1
            Image.fromarray(mask).save(root / f"masks/{image}_{number}.png", compress_level=1)


def oracle_patch(
    root: Path, data: Data, member: int, patch: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """seco_scc.cut_patch the long way: open the image and the stored mask for this one
    connectivity.
    """
    row = data.index[member]
    image = read_image(data.root / data.rows[row["image"]][0])
    mask = np.array(Image.open(root / f"masks/{row['image']}_{row['number']}.png"))
    y0, x0, y1, x1 = scc.patch_window(
        (row["x"], row["y"], row["width"], row["height"]), HEIGHT, WIDTH, patch
    )
    picture = cv2.resize(image[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_NEAREST)
    return picture, mask[::2, ::2]


def make_data(root: Path, rows: list[tuple[str, str]]) -> Data:
    """The index of the list, each different label map indexed once and its rows repeated."""
    write_list(root / "all.txt", rows)
    options = scc.parse_args(
        ["--id-list-path", str(root / "all.txt"), "--root-path", str(root), "--workers", "1"]
    )
    parts = [index_image(root / rows[i][1], i, 19) for i in range(FILES)]
    repeated = []
    for image in range(len(rows)):
        part = parts[image % FILES].copy()
        part["image"] = image
        repeated.append(part)
    return Data(root, rows, np.concatenate(repeated), 19, options)


def resident_mb() -> float:
    """Resident memory now, in MB; peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 1e6
    return peak_memory_mb()["host_mb"]


def oracle_rate(root: Path, data: Data, count: int) -> float:
    """Connectivities per second of the oracle, for `count` of them; each of its patches must be
    that of seco_scc.cut_patch.
    """
    chosen = np.random.default_rng(1).permutation(data.starts[FILES])[:count].tolist()
    store_masks(root, data, chosen)
    start = time.process_time()
    slow = [oracle_patch(root, data, member, data.options.patch_size) for member in chosen]
    rate = len(chosen) / (time.process_time() - start)
    for member, (patch, mask) in zip(chosen, slow):
        picture, numbers = data.read(int(data.index["image"][member]))
        fast = scc.cut_patch(picture, numbers, data.index[member], data.options.patch_size)
        assert (fast[0] == patch).all() and (fast[1] == mask).all(), (
            f"connectivity {member} differs"
        )
    return rate


def stream_rate(data: Data, batches: int) -> tuple[float, list[float]]:
    """(connectivities per second of the training's batches, resident MB at ten times)."""
    start, readings = time.process_time(), []
    stream = patch_batches(data, scc.cut_patch, 0, batches)
    for number, _ in enumerate(progress(stream, "patches", batches, "batch"), start=1):
        if number % max(1, batches // 10) == 0:
            readings.append(round(resident_mb(), 0))
    # The pool is filled before the first batch: its patches are work done as well.
    drawn = batches * data.options.batch_size + POOL
    return drawn / (time.process_time() - start), readings


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=3000, metavar="N", help="in the list (default: %(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=60,
        metavar="N",
        help="of 64 patches for the memory figure, spread over ten readings (default: %(default)s)",
    )
    parser.add_argument(
        "--oracle",
        type=int,
        default=24,
        metavar="N",
        help="connectivities the oracle cuts (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    options = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = make_images(root, options.images)
        before = resident_mb()
        data = make_data(root, rows)
        index_mb = resident_mb() - before
        print(
            f"{len(data.index)} connectivities in {len(rows)} images of {WIDTH} x {HEIGHT}; "
            f"index: {data.index.nbytes / 1e6:.1f} MB, resident memory grew by {index_mb:.0f} MB"
        )
        slow_rate = oracle_rate(root, data, options.oracle)
        fast_rate, readings = stream_rate(data, options.batches)
    print(
        f"cutting patches: {fast_rate:.0f} connectivities/s, opening the image for each:"
        f" {slow_rate:.1f}/s, {fast_rate / slow_rate:.1f}x\nresident memory while streaming, MB:"
        f" {', '.join(f'{r:.0f}' for r in readings)}"
    )
    if options.out:
        write_json(
            options.out,
            {
                "images": len(rows),
                "connectivities": len(data.index),
                "index_mb": round(index_mb, 1),
                "patches_per_second": round(fast_rate, 1),
                "oracle_per_second": round(slow_rate, 1),
                "resident_mb": readings,
            },
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
