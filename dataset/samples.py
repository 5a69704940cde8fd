"""The lists that training reads, and its samples, as pure functions of (seed, epoch, position).

UniMatch walks through three streams in step: labeled images, unlabeled images, and unlabeled images
again to paste from. One item here is one position of all three, already pasted. Its random numbers
are seeded by (seed, stream, epoch, position in the epoch's order), so it does not depend on
workers, on processes, or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dataset import augment
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
from util.run import UserError, process_rank

AUTHORS_PROCESSES = 4  # whose sampler pads the order of images to a multiple of four
LABELED, UNLABELED, UNLABELED_MIX, PASTE, PHOTOMETRIC = range(5)  # streams of random numbers


@dataclass(frozen=True)
class Lists:
    """What the lists of a training run name: (image path, label path) to learn from, images without
    labels, (image path, ground-truth path) to evaluate. pixels: int64 len(labeled) x K, of classes.
    """

    labeled: list[tuple[str, str]]
    unlabeled: list[str]
    validation: list[tuple[str, str]]
    pixels: np.ndarray


def read_lists(args) -> Lists:
    """The lists, with all that they name checked. Only ground truth must have its image's size."""
    labeled_list, unlabeled_list = args.labeled_id_path, args.unlabeled_id_path
    labeled = read_list(labeled_list)
    unlabeled = [row[0] for row in read_list(unlabeled_list, (1, 2))] if unlabeled_list else []
    validation = read_list(args.val_id_path) if args.val_id_path else []
    if both := {image for image, _ in labeled}.intersection(unlabeled):
        raise UserError(
            f"{min(both)}: in {labeled_list} and in {unlabeled_list}; each image is in one of the"
            " two, make both with scripts/make_split.py"
        )
    check_files(args.root_path, unlabeled, unlabeled_list)
    if validation:
        check_pairs(args.root_path, validation, args.val_id_path, args.class_num, same_size=True)
    pixels = check_pairs(args.root_path, labeled, labeled_list, args.class_num)
    pixels = pixels[:, : args.class_num]
    if not pixels.any():
        raise UserError(f"{labeled_list}: no label map has a labeled pixel; nothing can be learned")
    return Lists(labeled, unlabeled, validation, pixels)


def iterations_per_epoch(samples: int, global_batch: int) -> int:
    """UniMatch's floor(ceil(samples / processes) / batch per process) with the authors' processes,
    on any number of them; short lists are repeated to at least one batch.
    """
    padded = -(-samples // AUTHORS_PROCESSES) * AUTHORS_PROCESSES
    return max(padded // global_batch, 1)


def read_cached(path: Path, folder: Path) -> Image.Image:
    """The image of a file, kept decoded in `folder`: to decode a large PNG takes longer than all
    the rest. An entry is named by path, size and time of change, so that it is never outdated.
    """
    state = path.stat()
    what = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    entry = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
    if not entry.is_file():
        with atomic_path(entry) as temporary:
            np.save(temporary, read_image(path))  # its name ends in .npy, so numpy adds nothing
    return Image.fromarray(np.load(entry))


class TrainingSamples(Dataset):
    """All samples of a run by number: an iteration takes the next --global-batch of them. Item →
    dict of uint8 / bool arrays of side --crop-size (S).

    x (S x S x 3), mask_x (S x S, train IDs and 255); with an unlabeled list also w, w_mix (weak
    views), s1, s2 (strong views, already pasted from w_mix's strong views inside box1, box2), box1,
    box2 (bool S x S), ignore, ignore_mix (bool S x S, true on padding).
    """

    def __init__(self, args, lists: Lists):
        self.args, self.lists, self.rare = args, lists, None
        if args.copy_paste:
            where = (lists.labeled, lists.pixels, args.root_path)
            self.rare = RareClassPool(*where, args.copy_paste_classes)
        # The unlabeled list sets the length of an epoch; the labeled one is repeated or cut.
        self.images = len(lists.unlabeled) or len(lists.labeled)
        self.per_epoch = iterations_per_epoch(self.images, args.global_batch)

    def place(self, number: int) -> tuple[int, int]:
        """The epoch of a sample, and its position there."""
        return divmod(number, self.per_epoch * self.args.global_batch)

    def index(self, number: int) -> int:
        """Of a sample's image: an epoch has a permutation of all, cut or begun again at its end."""
        epoch, position = self.place(number)
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        return int(torch.randperm(self.images, generator=generator)[position % self.images])

    def generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self.args.seed, stream, *self.place(number)))

    def read(self, path: str) -> Image.Image:
        file, cache = self.args.root_path / path, self.args.image_cache
        return read_cached(file, cache) if cache else read_picture(file)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        x, mask_x = self.labeled_crop(number)
        sample = {"x": x, "mask_x": mask_x}
        if self.lists.unlabeled:
            sample.update(self.unlabeled_views(number))
        return sample

    def labeled_crop(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = self.lists.labeled[self.index(number) % len(self.lists.labeled)]
        image, label = self.read(image_path), read_label(self.args.root_path / label_path)
        how = (image.height, image.width, self.args.crop_size, self.args.scales)
        crop = augment.draw_crop(self.generator(LABELED, number), *how)
        x, mask_x = augment.cropped_image(image, crop), augment.cropped_label(label, crop, IGNORE)
        if self.rare is not None:
            x, mask_x = self.rare.paste(self.generator(PASTE, number), x, mask_x)
        if self.args.photometric:
            x = augment.strong_view(self.generator(PHOTOMETRIC, number), x)
        return x, mask_x

    def unlabeled_views(self, number: int) -> dict[str, np.ndarray]:
        """The image pasted from is the same one in another crop, as in UniMatch's loaders."""
        image = self.read(self.lists.unlabeled[self.index(number)])
        random = self.generator(UNLABELED, number)
        random_mix = self.generator(UNLABELED_MIX, number)
        how = (image.height, image.width, self.args.crop_size, self.args.scales)
        crop, crop_mix = augment.draw_crop(random, *how), augment.draw_crop(random_mix, *how)
        w, w_mix = augment.cropped_image(image, crop), augment.cropped_image(image, crop_mix)
        sample = {
            "w": w,
            "w_mix": w_mix,
            "ignore": augment.padding_mask(crop),
            "ignore_mix": augment.padding_mask(crop_mix),
        }
        boxes = [augment.cutmix_box(random, self.args.crop_size) for _ in range(2)]
        for which, box in enumerate(boxes, start=1):
            view = augment.strong_view(random, w)
            if box.any():
                view = np.where(box[..., None], augment.strong_view(random_mix, w_mix), view)
            sample[f"s{which}"], sample[f"box{which}"] = view, box
        return sample


def places(args) -> list[range]:
    """Which of an iteration's samples, 0 to --global-batch - 1, this process takes: in step m of
    gradient accumulation, on process r, the b of them from (m x processes + r) b.
    """
    (rank, world), batch = process_rank(), args.batch_per_process
    firsts = range(rank * batch, args.global_batch, world * batch)
    return [range(first, first + batch) for first in firsts]


def loading_processes(wanted: int | None) -> int:
    """`wanted`, or one for each core that this process may use, at most four."""
    if wanted is not None:
        return wanted
    on_macos = not hasattr(os, "sched_getaffinity")
    return min(os.cpu_count() if on_macos else len(os.sched_getaffinity(0)), 4)


def batches(samples: TrainingSamples, iterations: range, workers: int, device) -> DataLoader:
    """This process's batches of the iterations, one a step, as dicts of tensors (B x …). Of a whole
    run, so that no epoch waits for its first.
    """
    count, steps = samples.args.global_batch, places(samples.args)
    return DataLoader(
        samples,
        batch_sampler=([i * count + place for place in step] for i in iterations for step in steps),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
