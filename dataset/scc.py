"""What SCC reads: the connectivities of a list's label maps, and training batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from util.labels import IGNORE, check_pairs, connectivities, read_image, read_label
from util.outputs import atomic_path
from util.run import ahead, progress

BUFFER = 1024  # patches in the shuffle buffer, 0.4 GB at 256x512 (ours)

# One row per connectivity: its image's place in the list, its number in the image, class and area,
# and its box in pixels of the label map.
INDEX = np.dtype(
    [("image", "i4"), ("number", "i4"), ("class_id", "u1"), ("area", "i4")]
    + [("x", "i4"), ("y", "i4"), ("width", "i4"), ("height", "i4")]
)


def index_image(path: Path, image: int, class_num: int) -> np.ndarray:
    """The connectivities of one label map as INDEX rows. `numbered` makes their masks again."""
    label = read_label(path, class_num)
    found = enumerate(connectivities(label, range(class_num)))
    rows = [(image, number, c.class_id, c.area, *c.box) for number, c in found]
    return np.array(rows, dtype=INDEX)


def numbered(label: np.ndarray, class_num: int) -> np.ndarray:
    """int32 H x W: the number of each pixel's connectivity, -1 where there is no label."""
    numbers = np.full(label.shape, -1, dtype=np.int32)
    for number, c in enumerate(connectivities(label, range(class_num))):
        numbers[c.window][c.mask] = number
    return numbers


def make_index(folder: Path, root: Path, rows: list, class_num: int, list_path: Path) -> None:
    """The INDEX rows of all connectivities of a list, left in index.npz in `folder`. UserError if
    an input is unreadable or unfit.
    """
    check_pairs(root, rows, list_path, class_num)
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(lambda i: index_image(root / rows[i][1], i, class_num), range(len(rows)))
        index = np.concatenate(list(progress(jobs, "SCC index", len(rows))))
    with atomic_path(folder / "index.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, index=index)


def read_index(folder: Path) -> np.ndarray:
    """What `make_index` left."""
    with np.load(folder / "index.npz") as stored:
        return stored["index"]


def score_path(folder: Path, image: int) -> Path:
    """Loss, score and prediction of the connectivities of image i of the list."""
    return folder / "scores" / f"{image:06d}.npz"


class Data:
    """The images of a list with their connectivities.

    rows: (image path, label path) of the list, below `root`; index: INDEX rows of all images, in
    the list's order; starts: where each image's begin in it; judged: bool, those of --min-area
    pixels or more, which are learned from and scored; options: those of seco_scc.py.
    """

    def __init__(self, root: Path, rows: list, index: np.ndarray, class_num: int, options):
        self.root, self.rows, self.index = root, rows, index
        self.class_num, self.options = class_num, options
        self.starts = np.searchsorted(index["image"], np.arange(len(rows) + 1))
        self.judged = index["area"] >= options.min_area

    def part(self, image: int) -> slice:
        """Where image i's connectivities are in the index, and in all that goes along with it."""
        return slice(self.starts[image], self.starts[image + 1])

    def of_image(self, image: int) -> np.ndarray:
        """Its INDEX rows."""
        return self.index[self.part(image)]

    def judged_images(self) -> np.ndarray:
        """The images that have a judged connectivity."""
        return np.unique(self.index["image"][self.judged])

    def numbers(self, image: int) -> np.ndarray:
        """int32 H x W: the number of each pixel's connectivity in image i, or -1."""
        return numbered(read_label(self.root / self.rows[image][1], self.class_num), self.class_num)

    def read(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """(picture uint8 H x W x 3, numbers int32 H x W) of image i.

        The picture is resized to its label map, so all sizes count the label map's pixels (ours;
        the released code enlarges labels that are smaller than their image).
        """
        numbers = self.numbers(image)
        picture = read_image(self.root / self.rows[image][0])
        if picture.shape[:2] != numbers.shape:
            picture = cv2.resize(picture, numbers.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return picture, numbers

    def scaled(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, the picture at --scale."""
        picture, numbers = self.read(image)
        height, width = (max(16, round(side * self.options.scale)) for side in numbers.shape)
        return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), numbers

    def scores(self, out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss float64, score float64, predicted uint8) of all connectivities, in the index's
        order, from the files of each image below `out`.
        """
        count = len(self.index)
        loss, score, predicted = np.empty(count), np.empty(count), np.empty(count, np.uint8)
        for image in range(len(self.rows)):
            part = self.part(image)
            with np.load(score_path(out, image)) as scores:
                loss[part], score[part] = scores["loss"], scores["score"]
                predicted[part] = scores["predicted"]
        return loss, score, predicted


def batches_per_epoch(data: Data) -> int:
    """Release: full batches of connectivities; paper: of whole images. At least one."""
    if data.options.recipe == "release":
        return max(1, int(data.judged.sum()) // data.options.batch_size)
    images = len(data.judged_images())
    return images // min(data.options.batch_size, images)


# ------------------------------------------------------------------------------ release: of patches


def patch_window(
    box: tuple[int, int, int, int], height: int, width: int, patch: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(y0, x0, y1, x1) of the image's part that shows a connectivity (released code, exactly):
    `patch` around the box's centre, grown at the same aspect ratio if the box is larger, shifted
    into the image, and cut where the image is smaller.

    box: (x, y, width, height); height, width: of the image; patch: (h, w); all in pixels.
    """
    x, y, box_width, box_height = (int(value) for value in box)
    grow = max(1, box_height / patch[0], box_width / patch[1])
    y0, y1 = span(int(y + box_height / 2), int(grow * patch[0]), height)
    x0, x1 = span(int(x + box_width / 2), int(grow * patch[1]), width)
    return y0, x0, y1, x1


def span(centre: int, length: int, limit: int) -> tuple[int, int]:
    """(start, end) of about `length` pixels around `centre`, shifted and cut to 0 .. limit."""
    half = length // 2
    start = min(max(centre - half, 0), limit - 2 * half)
    return max(start, 0), start + 2 * half


def cut_patch(
    image: np.ndarray, numbers: np.ndarray, row: np.ndarray, patch: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(patch uint8 h x w x 3, mask uint8 h/2 x w/2 of 0 and 1) of an INDEX row. image, numbers: of
    `Data.read`.

    The patch is resized bilinearly, the mask to the nearest pixel, first to h x w and then to the
    stem's h/2 x w/2 (released code; it does not round the resized patch to whole numbers).
    """
    box = (row["x"], row["y"], row["width"], row["height"])
    y0, x0, y1, x1 = patch_window(box, *numbers.shape, patch)
    picture = cv2.resize(image[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_LINEAR)
    mask = (numbers[y0:y1, x0:x1] == row["number"]).astype(np.uint8)
    mask = cv2.resize(mask, patch[::-1], interpolation=cv2.INTER_NEAREST)
    return picture, np.ascontiguousarray(mask[::2, ::2])


def shuffle(data: Data, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The plan of an epoch's shuffle buffer: (order in which the judged connectivities leave it,
    visits: what each image visited in turn adds to it), places in the index.

    The images come in random order, one with more than BUFFER connectivities in several visits.
    Whenever the buffer holds more than BUFFER, connectivities are drawn from it at random; what is
    left at the end is shuffled. So the order is random, each connectivity comes once, an image is
    decoded once, and at most BUFFER and one visit are in memory.
    """
    random = np.random.default_rng([data.options.seed, epoch])
    buffer, order, visits = [], [], []
    for image in random.permutation(len(data.rows)):
        members = data.starts[image] + np.flatnonzero(data.judged[data.part(image)])
        for visit in np.split(members, range(BUFFER, len(members), BUFFER)):
            visits.append(visit)
            buffer.extend(visit.tolist())
            while len(buffer) > BUFFER:
                place = int(random.integers(len(buffer)))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                order.append(buffer.pop())
    order = np.array(order + random.permutation(buffer).tolist(), dtype=np.int64)
    return order, [visit for visit in visits if len(visit)]


def patch_batches(data: Data, start: int, stop: int) -> Iterator[tuple]:
    """Training batches start .. stop - 1, drawn from a shuffle buffer: (patches uint8 B x h x w x
    3, masks uint8 B x 1 x h/2 x w/2 of 0 and 1, classes int64 B).

    A batch follows from the seed and its number alone, so a stopped training goes on exactly. An
    incomplete last batch of an epoch is left out. --workers visits are read and cut ahead.
    """
    options, size, per_epoch = data.options, data.options.batch_size, batches_per_epoch(data)

    def cut(members: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        picture, numbers = data.read(int(data.index["image"][members[0]]))
        patch = options.patch_size
        return {int(m): cut_patch(picture, numbers, data.index[m], patch) for m in members}

    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        order, visits = shuffle(data, epoch)
        mirrored = np.random.default_rng([options.seed, epoch, 1]).random(len(order)) < 0.5
        first, last = max(start - epoch * per_epoch, 0), min(stop - epoch * per_epoch, per_epoch)
        wanted = np.zeros(len(data.index), bool)
        wanted[order[first * size : last * size]] = True
        visits = [visit[wanted[visit]] for visit in visits if wanted[visit].any()]
        with ThreadPoolExecutor(options.workers) as readers:
            coming = ahead(readers, cut, visits, options.workers)
            buffer: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for batch in range(first, last):
                members = order[batch * size : (batch + 1) * size]
                flip = mirrored[batch * size : (batch + 1) * size]
                while not buffer.keys() >= set(members.tolist()):
                    buffer.update(next(coming))
                patches, masks = (np.stack(x) for x in zip(*map(buffer.pop, members.tolist())))
                patches[flip], masks[flip] = patches[flip][:, :, ::-1], masks[flip][:, :, ::-1]
                classes = torch.from_numpy(data.index["class_id"][members].astype(np.int64))
                yield torch.from_numpy(patches), torch.from_numpy(masks)[:, None], classes


# --------------------------------------------------------------------------- paper: of whole images


def image_batches(data: Data, start: int, stop: int) -> Iterator[tuple]:
    """Training batches start .. stop - 1, of which --workers are read ahead: (pictures uint8 B x H
    x W x 3, of each its masks as `mask_shares` gives them, classes int64 N of all connectivities).

    The pictures have the first one's size. The class of a connectivity that is not judged is
    IGNORE. An incomplete last batch of an epoch is left out.
    """
    images, per_epoch, workers = data.judged_images(), batches_per_epoch(data), data.options.workers
    size = min(data.options.batch_size, len(images))

    def batch(iteration: int) -> tuple:
        random = np.random.default_rng([data.options.seed, iteration // per_epoch])
        first = iteration % per_epoch * size
        chosen = random.permutation(images)[first : first + size]
        mirrored = random.random(len(images))[first : first + size] < 0.5
        pictures, shares, classes = [], [], []
        for image, mirror in zip(chosen, mirrored):
            picture, numbers = data.scaled(image)
            if pictures and picture.shape != pictures[0].shape:
                one_size = pictures[0].shape[1::-1]
                picture = cv2.resize(picture, one_size, interpolation=cv2.INTER_AREA)
            rows = data.of_image(image)
            shares.append(mask_shares(numbers, len(rows), picture.shape[:2], mirror))
            pictures.append(picture[:, ::-1] if mirror else picture)
            classes.append(np.where(data.judged[data.part(image)], rows["class_id"], IGNORE))
        classes = torch.from_numpy(np.concatenate(classes).astype(np.int64))
        return torch.from_numpy(np.stack(pictures)), shares, classes

    with ThreadPoolExecutor(workers) as readers:
        yield from ahead(readers, batch, range(start, stop), workers)


def mask_shares(
    numbers: np.ndarray, count: int, size: tuple[int, int], mirror: bool = False
) -> torch.Tensor:
    """The masks of an image's connectivities at the resolution of the features of a picture of
    `size` (stride 16, rounded up): float32 count x cells, rows that add up to 1.

    numbers: int H x W, what `numbered` gives. A mask is averaged over the pixels of each cell, so
    that the smallest connectivity still has weight.
    """
    if mirror:
        numbers = numbers[:, ::-1]
    height, width = (-(-side // 16) for side in size)
    rows = np.arange(numbers.shape[0]) * height // numbers.shape[0]
    columns = np.arange(numbers.shape[1]) * width // numbers.shape[1]
    cells = rows[:, None] * width + columns
    places = (numbers.astype(np.intp) + 1) * (height * width) + cells
    pixels = np.bincount(places.ravel(), minlength=(count + 1) * height * width)
    pixels = pixels.reshape(count + 1, -1)
    shares = pixels[1:] / np.maximum(pixels.sum(axis=0), 1)
    total = shares.cumsum(axis=1)[:, -1:]  # added up cell by cell
    return torch.from_numpy((shares / np.where(total > 0, total, 1)).astype(np.float32))
