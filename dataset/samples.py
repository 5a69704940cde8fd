"""The lists that training reads, and its samples, of UniMatch and of supervised training, as pure
functions of (seed, epoch, position).

UniMatch walks through three streams in step: labeled images, unlabeled images, and unlabeled images
again to paste from. One item here is one position of all three, already pasted. Its random numbers
are seeded by (seed, stream, epoch, position in the epoch's order), so it does not depend on
workers, on processes, or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dataset.augment import (
    SCALES,
    cropped_image,
    cropped_label,
    cutmix,
    cutmix_box,
    draw_crop,
    padding_mask,
    strong_view,
)
from dataset.copy_paste import RareClassPool
from util.labels import (
    IGNORE,
    check_files,
    check_pairs,
    read_image,
    read_label,
    read_list,
    read_picture,
)
from util.outputs import atomic_path
from util.run import UserError

# The authors ran four processes, whose sampler pads the order of images to a multiple of four. It
# is done here on any number of processes, so that an epoch has as many iterations as theirs.
AUTHORS_PROCESSES = 4
MOST_WORKERS = 4  # loading processes, unless --workers says otherwise
LABELED, UNLABELED, UNLABELED_MIX, PASTE, PHOTOMETRIC = range(5)  # streams of random numbers


# -------------------------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class Lists:
    """What the lists of a training run name: (image path, label path) to learn from, images without
    labels, (image path, ground-truth path) to evaluate. pixels: int64 len(labeled) x K, of each
    class in each label to learn from.
    """

    labeled: list[tuple[str, str]]
    unlabeled: list[str]
    validation: list[tuple[str, str]]
    pixels: np.ndarray

    def files(self, root: Path) -> dict[str, Path]:
        """{path in a list: file} of all of them."""
        names = [*chain(*self.labeled, *self.validation), *self.unlabeled]
        return {name: root / name for name in names}


def read_lists(
    root: Path, labeled_list: Path, unlabeled_list: Path | None, val_list: Path | None, classes: int
) -> Lists:
    """The lists, with all that they name checked. Evaluation needs ground truth in its image's
    size; a training label may be smaller or larger.
    """
    labeled = read_list(labeled_list)
    unlabeled = [row[0] for row in read_list(unlabeled_list, (1, 2))] if unlabeled_list else []
    validation = read_list(val_list) if val_list else []
    if both := {image for image, _ in labeled}.intersection(unlabeled):
        raise UserError(
            f"{min(both)}: in {labeled_list} and in {unlabeled_list}; each image is in one of the"
            " two, make both with scripts/make_split.py"
        )
    check_files(root, unlabeled, unlabeled_list)
    if validation:
        check_pairs(root, validation, val_list, classes, same_size=True)
    pixels = check_pairs(root, labeled, labeled_list, classes)
    if not pixels.any():
        raise UserError(
            f"{labeled_list}: no label map of it has a labeled pixel; nothing can be learned"
        )
    return Lists(labeled, unlabeled, validation, pixels)


# ------------------------------------------------------------------------------------------ samples


def iterations_per_epoch(samples: int, global_batch: int) -> int:
    """UniMatch's floor(ceil(samples / processes) / batch per process) with the authors' four
    processes, for any number of processes; short lists are repeated to at least one batch.
    """
    padded = -(-samples // AUTHORS_PROCESSES) * AUTHORS_PROCESSES
    return max(padded // global_batch, 1)


def epoch_order(samples: int, seed: int, epoch: int, length: int) -> np.ndarray:
    """The indices visited in an epoch: a permutation, wrapped around or cut to `length`."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return np.resize(torch.randperm(samples, generator=generator).numpy(), length)


@dataclass(frozen=True)
class Key:
    """Names one training sample: its epoch, its position in the epoch's order, the index there of
    both lists.
    """

    epoch: int
    position: int
    index: int


class ImageCache:
    """Reads images; with a folder, keeps them there decoded, since decoding a large PNG takes
    longer than all the rest.

    6 MB for each 2048 x 1024 image (19 GB for Cityscapes' training images). An entry is named by
    the file's path, size and time of change, so that a changed file is read anew.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def read(self, path: Path) -> Image.Image:
        if self.folder is None:
            return read_picture(path)
        state = path.stat()
        what = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
        entry = self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
        if not entry.is_file():
            with atomic_path(entry) as temporary:
                np.save(temporary, read_image(path))  # its name ends in .npy, so numpy adds nothing
        return Image.fromarray(np.load(entry))


class TrainingSamples(Dataset):
    """Item `Key` → dict of uint8 / bool arrays of side `crop_size` (S).

    x (S x S x 3), mask_x (S x S, train IDs and 255); with an unlabeled list also w, w_mix (weak
    views), s1, s2 (strong views, already pasted from w_mix's strong views inside box1, box2), box1,
    box2 (bool S x S), ignore, ignore_mix (bool S x S, true on padding).
    """

    def __init__(
        self,
        labeled: list[tuple[str, str]],
        unlabeled: list[str],
        root: Path,
        crop_size: int,
        seed: int,
        rare: RareClassPool | None = None,
        image_cache: Path | None = None,
        scales: tuple[float, float] = SCALES,
        photometric: bool = False,
    ):
        """photometric: x is a strong view of its crop."""
        self.labeled, self.unlabeled, self.root = labeled, unlabeled, root
        self.crop_size, self.seed = crop_size, seed
        self.rare, self.images, self.scales = rare, ImageCache(image_cache), tuple(scales)
        self.photometric = photometric

    def __len__(self) -> int:
        """The unlabeled list sets the length of an epoch: a shorter labeled list is repeated, a
        longer one is cut.
        """
        return len(self.unlabeled) or len(self.labeled)

    def generator(self, stream: int, key: Key) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream, key.epoch, key.position))

    def __getitem__(self, key: Key) -> dict[str, np.ndarray]:
        x, mask_x = self.labeled_crop(key)
        sample = {"x": x, "mask_x": mask_x}
        if self.unlabeled:
            sample.update(self.unlabeled_views(key))
        return sample

    def labeled_crop(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = self.labeled[key.index % len(self.labeled)]
        image, label = self.images.read(self.root / image_path), read_label(self.root / label_path)
        how = (image.height, image.width, self.crop_size, self.scales)
        crop = draw_crop(self.generator(LABELED, key), *how)
        x, mask_x = cropped_image(image, crop), cropped_label(label, crop, IGNORE)
        if self.rare is not None:
            x, mask_x = self.rare.paste(self.generator(PASTE, key), x, mask_x)
        if self.photometric:
            x = strong_view(self.generator(PHOTOMETRIC, key), x)
        return x, mask_x

    def unlabeled_views(self, key: Key) -> dict[str, np.ndarray]:
        """The image is decoded once for both unlabeled streams: UniMatch's loaders walk the same
        order, so that the image pasted from is the same one in another crop. Strong views to paste
        are made only where a box was drawn.
        """
        image = self.images.read(self.root / self.unlabeled[key.index])
        random, random_mix = self.generator(UNLABELED, key), self.generator(UNLABELED_MIX, key)
        how = (image.height, image.width, self.crop_size, self.scales)
        crop, crop_mix = draw_crop(random, *how), draw_crop(random_mix, *how)
        w, w_mix = cropped_image(image, crop), cropped_image(image, crop_mix)
        sample = {
            "w": w,
            "w_mix": w_mix,
            "ignore": padding_mask(crop, 1).astype(bool),
            "ignore_mix": padding_mask(crop_mix, 1).astype(bool),
        }
        boxes = [cutmix_box(random, self.crop_size) for _ in range(2)]
        for number, box in enumerate(boxes, start=1):
            view = strong_view(random, w)
            if box.any():
                view = cutmix(view, strong_view(random_mix, w_mix), box[..., None])
            sample[f"s{number}"], sample[f"box{number}"] = view, box
        return sample


def batch_per_process(global_batch: int, wanted: int | None, world: int) -> int:
    """Samples per process and accumulation step: `wanted`, or all that fall to each of `world`
    processes. UserError if they do not make up the global batch.
    """
    if global_batch % world:
        raise UserError(
            f"--global-batch {global_batch}: it must be a multiple of the number of processes,"
            f" {world}"
        )
    share = global_batch // world
    if wanted and share % wanted:
        raise UserError(
            f"--batch-per-process {wanted}: {share} samples of the global batch fall to each of"
            f" {world} processes; give a divisor of {share}"
        )
    return wanted or share


class MicroBatches:
    """Sampler of a run's batches for one process: lists of Keys, from iteration `start` to the
    last.

    Iteration i of an epoch takes positions [i G, (i + 1) G) of its order, G the global batch; its
    step m (of gradient accumulation) on process r the b of them from (m x processes + r) b.
    """

    def __init__(
        self,
        samples: int,
        epochs: int,
        global_batch: int,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        start: int = 0,
    ):
        self.samples, self.global_batch, self.batch = samples, global_batch, batch
        self.rank, self.world, self.seed, self.start = rank, world, seed, start
        self.per_epoch = iterations_per_epoch(samples, global_batch)
        self.total = self.per_epoch * epochs
        self.steps = global_batch // (batch * world)

    def __len__(self) -> int:
        return (self.total - self.start) * self.steps

    def __iter__(self) -> Iterator[list[Key]]:
        order, order_epoch = None, None
        for iteration in range(self.start, self.total):
            epoch, within = divmod(iteration, self.per_epoch)
            if epoch != order_epoch:
                length, order_epoch = self.per_epoch * self.global_batch, epoch
                order = epoch_order(self.samples, self.seed, epoch, length)
            for step in range(self.steps):
                first = within * self.global_batch + self.slot(step)
                yield [Key(epoch, p, int(order[p])) for p in range(first, first + self.batch)]

    def slot(self, step: int) -> int:
        """Where this process's share of accumulation step `step` starts within the global batch."""
        return (step * self.world + self.rank) * self.batch


def loading_processes(wanted: int | None) -> int:
    """`wanted`, or one for each core that this process may use, at most MOST_WORKERS."""
    if wanted is not None:
        return wanted
    several = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if several else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def batches(samples: TrainingSamples, sampler: MicroBatches, workers: int, device) -> DataLoader:
    """Batches as dicts of tensors (B x …). Workers live for the whole run, so that no epoch waits
    for its first batch.
    """
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if workers else None,
    )


def training_samples(args, lists: Lists) -> TrainingSamples:
    """The samples of the lists, cropped and changed as train_unimatch.py's options say."""
    rare = None
    if args.copy_paste:
        where = (lists.labeled, lists.pixels, args.root_path)
        rare = RareClassPool(*where, tuple(args.copy_paste_classes))
    what = (lists.labeled, lists.unlabeled, args.root_path, args.crop_size, args.seed)
    return TrainingSamples(*what, rare, args.image_cache, args.scales, args.photometric)
