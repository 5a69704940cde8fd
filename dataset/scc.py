"""What SCC reads: the connectivities of a list's label maps, and training batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import torch

from util.labels import IGNORE, Experiment, check_pairs, connectivities, read_image, read_label
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


class Job(Experiment):
    """What is corrected, where the results go and, once `take` has them, the connectivities.

    index: INDEX rows of all images, in the list's order; starts: where each image's begin in it;
    judged: bool, those of --min-area pixels or more, which are learned from and scored.
    """

    def take(self, index: np.ndarray) -> None:
        self.index = index
        self.starts = np.searchsorted(index["image"], np.arange(len(self.rows) + 1))
        self.judged = index["area"] >= self.options.min_area

    def read_index(self) -> None:
        """Take what `make_index` left."""
        with np.load(self.out / "index.npz") as stored:
            self.take(stored["index"])

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
        label = read_label(self.root / self.rows[image][1], self.classes.count)
        return numbered(label, self.classes.count)

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

    def score_path(self, image: int) -> Path:
        """Loss, score and prediction of the connectivities of image i."""
        return self.out / "scores" / f"{image:06d}.npz"

    def scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss float64, score float64, predicted uint8) of all connectivities, in the index's
        order.
        """
        parts = [dict(np.load(self.score_path(image))) for image in range(len(self.rows))]
        names = ("loss", "score", "predicted")
        return tuple(np.concatenate([part[name] for part in parts]) for name in names)


def batches_per_epoch(job: Job) -> int:
    """Release: full batches of connectivities; paper: of whole images. At least one."""
    if job.options.recipe == "release":
        return max(1, int(job.judged.sum()) // job.options.batch_size)
    images = len(job.judged_images())
    return images // min(job.options.batch_size, images)


def make_index(job: Job) -> None:
    """Leave the INDEX rows of all connectivities of the list in index.npz. UserError if an input is
    unreadable or unfit.
    """
    class_num, labels = job.classes.count, [job.root / label for _, label in job.rows]
    check_pairs(job.root, job.rows, job.options.id_list_path, class_num)
    with ThreadPoolExecutor() as pool:
        found = pool.map(index_image, labels, range(len(labels)), repeat(class_num))
        index = np.concatenate(list(progress(found, "SCC index", len(labels))))
    with atomic_path(job.out / "index.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, index=index)


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
    `Job.read`.

    The patch is resized bilinearly, the mask to the nearest pixel, first to h x w and then to the
    stem's h/2 x w/2 (released code; it does not round the resized patch to whole numbers).
    """
    box = (row["x"], row["y"], row["width"], row["height"])
    y0, x0, y1, x1 = patch_window(box, *numbers.shape, patch)
    picture = cv2.resize(image[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_LINEAR)
    mask = (numbers[y0:y1, x0:x1] == row["number"]).astype(np.uint8)
    mask = cv2.resize(mask, patch[::-1], interpolation=cv2.INTER_NEAREST)
    return picture, np.ascontiguousarray(mask[::2, ::2])


def shuffle(job: Job, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The plan of an epoch's shuffle buffer: (order in which the judged connectivities leave it,
    visits: what each image visited in turn adds to it), places in the index.

    The images come in random order, one with more than BUFFER connectivities in several visits.
    Whenever the buffer holds more than BUFFER, connectivities are drawn from it at random; what is
    left at the end is shuffled. So the order is random, each connectivity comes once, an image is
    decoded once, and at most BUFFER and one visit are in memory.
    """
    random = np.random.default_rng([job.options.seed, epoch])
    buffer, order, visits = [], [], []
    for image in random.permutation(len(job.rows)):
        members = job.starts[image] + np.flatnonzero(job.judged[job.part(image)])
        for visit in np.split(members, range(BUFFER, len(members), BUFFER)):
            visits.append(visit)
            buffer.extend(visit.tolist())
            while len(buffer) > BUFFER:
                place = int(random.integers(len(buffer)))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                order.append(buffer.pop())
    order = np.array(order + random.permutation(buffer).tolist(), dtype=np.int64)
    return order, [visit for visit in visits if len(visit)]


def patch_batches(job: Job, start: int, stop: int) -> Iterator[tuple]:
    """Training batches start .. stop - 1, drawn from a shuffle buffer: (patches uint8 B x h x w x
    3, masks uint8 B x 1 x h/2 x w/2 of 0 and 1, classes int64 B).

    A batch follows from the seed and its number alone, so a stopped training goes on exactly. An
    incomplete last batch of an epoch is left out. --workers visits are read and cut ahead.
    """
    options, size, per_epoch = job.options, job.options.batch_size, batches_per_epoch(job)

    def cut(members: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        picture, numbers = job.read(int(job.index["image"][members[0]]))
        patch = options.patch_size
        return {int(m): cut_patch(picture, numbers, job.index[m], patch) for m in members}

    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        order, visits = shuffle(job, epoch)
        mirrored = np.random.default_rng([options.seed, epoch, 1]).random(len(order)) < 0.5
        first, last = max(start - epoch * per_epoch, 0), min(stop - epoch * per_epoch, per_epoch)
        wanted = np.zeros(len(job.index), bool)
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
                classes = torch.from_numpy(job.index["class_id"][members].astype(np.int64))
                yield torch.from_numpy(patches), torch.from_numpy(masks)[:, None], classes


# --------------------------------------------------------------------------- paper: of whole images


def image_batches(job: Job, start: int, stop: int) -> Iterator[tuple]:
    """Training batches start .. stop - 1, of which --workers are read ahead: (pictures uint8 B x H
    x W x 3, of each its masks as `mask_shares` gives them, classes int64 N of all connectivities).

    The pictures have the first one's size. The class of a connectivity that is not judged is
    IGNORE. An incomplete last batch of an epoch is left out.
    """
    images, per_epoch, workers = job.judged_images(), batches_per_epoch(job), job.options.workers
    size = min(job.options.batch_size, len(images))

    def batch(iteration: int) -> tuple:
        random = np.random.default_rng([job.options.seed, iteration // per_epoch])
        first = iteration % per_epoch * size
        chosen = random.permutation(images)[first : first + size]
        mirrored = random.random(len(images))[first : first + size] < 0.5
        pictures, shares, classes = [], [], []
        for image, mirror in zip(chosen, mirrored):
            picture, numbers = job.scaled(image)
            if pictures and picture.shape != pictures[0].shape:
                one_size = pictures[0].shape[1::-1]
                picture = cv2.resize(picture, one_size, interpolation=cv2.INTER_AREA)
            rows = job.of_image(image)
            shares.append(mask_shares(numbers, len(rows), picture.shape[:2], mirror))
            pictures.append(picture[:, ::-1] if mirror else picture)
            classes.append(np.where(job.judged[job.part(image)], rows["class_id"], IGNORE))
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
