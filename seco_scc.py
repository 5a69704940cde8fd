"""SCC, semantic connectivity correction: find and correct the noisy connectivities of
pseudo-labels, without ground truth.

A classifier learns the connectivities' classes for a short while: clean labels are learned before
noisy ones, so a high loss tells the noise. What is judged noisy is relabeled or loses its label
(255).

Input:   --id-list-path, lines `<image path> <label path>` relative to --root-path: the list that
         seco_sam.py wrote, or any labels' list.
Output:  <root>/<exp>_scc/ (`--recipe paper`: <exp>_scc_paper/): the corrected labels,
         connectivities.csv, report/ (open report/index.html), run.json (manifest), and what a
         stopped run goes on from: settings.json, index.npz, checkpoint.pth, scores/. The list of
         the corrected labels goes to splits/<dataset>/<exp>_scc/.

    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt --class-num 19
    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt --class-num 19 \\
        --recipe paper
    # other thresholds: only the correction runs again
    python seco_scc.py … --quantile 0.6
    # the scoring is shared; training uses the first process
    torchrun --nproc_per_node=4 seco_scc.py …

Where the paper is silent, its recipe does as the released code (ResNet-101, SGD, learning rate,
mirror) with plain cross-entropy; ours are: whole images at half resolution, four an iteration,
features at stride 16 (layer 4 dilated), batch norm of the batch in training and of the running
statistics in scoring, masks averaged over the features' cells. Nothing here opens a target ground
truth, unless --gt names one for the report. Needs when copied away:
model/{scc,resnet,checkpoint}.py, dataset/augment.py, util/{run,labels,connectivity,pictures,
scc_report}.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F
from tqdm import tqdm

from model.resnet import BLOCKS, STEMS, load_backbone
from model.scc import MaskShares, PatchClassifier, PooledClassifier
from util.connectivity import connectivities
from util.images import normalised
from util.labels import (
    IGNORE,
    check_files,
    class_set,
    image_size,
    read_image,
    read_label,
    read_list,
    renamed_experiment,
    renamed_list,
    write_label,
    write_list,
)
from util.options import add_class_options, add_list_options, add_run_options
from util.run import (
    Stopwatch,
    UserError,
    atomic_path,
    check_settings,
    check_writable,
    exact_mode,
    manifest,
    peak_memory_mb,
    process_rank,
    read_json,
    remove_leftovers,
    run_main,
    seed_everything,
    select_device,
    sha256,
    wait_for,
    write_json,
)
from util.scc_report import write_report

# Released code.
EPOCHS = 20  # T of the learning rate's decay
DECAY, POWER = 10, 0.75  # learning rate x (1 + DECAY t / T) ^ -POWER, t = 1 at the first update
BACKBONE_FACTOR = 0.1  # the backbone's learning rate over the classifier's
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 1e-3, 0.1
# Ours, where paper and released code are silent.
POOL = 1024  # patches in memory, 0.4 GB at 256x512, from which training batches are drawn
MIN_CONNECTIVITIES = 50  # fewer losses than this are no basis for a mixture
MIN_SEPARATION = (
    1.0  # least distance of the mixture's means, in units of their root mean square deviation
)
SAVE_SECONDS = 60  # between checkpoints of the training

INDEX = np.dtype(
    [
        ("image", "i4"),
        ("number", "i4"),
        ("class_id", "u1"),
        ("area", "i4"),
        ("x", "i4"),
        ("y", "i4"),
        ("width", "i4"),
        ("height", "i4"),
    ]
)


# -------------------------------------------------------------------------------------------- index


def index_image(path: Path, image: int, class_num: int) -> np.ndarray:
    """The connectivities of one label map as INDEX rows. Masks are not kept: `numbered` makes them
    again.
    """
    label = read_label(path, class_num)
    return np.array(
        [
            (image, number, c.class_id, c.area, *c.box)
            for number, c in enumerate(connectivities(label, range(class_num)))
        ],
        dtype=INDEX,
    )


def numbered(label: np.ndarray, class_num: int) -> np.ndarray:
    """int32 H x W: the number of the connectivity that each pixel belongs to, -1 where there is no
    label.
    """
    numbers = np.full(label.shape, -1, dtype=np.int32)
    for number, c in enumerate(connectivities(label, range(class_num))):
        numbers[c.window][c.mask] = number
    return numbers


# ------------------------------------------------------------------------- release: patches, filter


def patch_window(
    box: tuple[int, int, int, int], height: int, width: int, patch: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(y0, x0, y1, x1) of the image's part that shows a connectivity (released code, exactly).

    box: (x, y, width, height); height, width: of the image; patch: (h, w); all in pixels. The
    window is `patch` around the box's centre, grown at the same aspect ratio if the box is larger,
    shifted into the image, and cut where the image is smaller.
    """
    x, y, box_width, box_height = (int(value) for value in box)
    high, wide = patch
    if box_width > wide or box_height > high:
        grow = max(box_height / high, box_width / wide)
        high, wide = int(grow * high), int(grow * wide)
    y0, y1 = span(int(y + box_height / 2), high, height)
    x0, x1 = span(int(x + box_width / 2), wide, width)
    return y0, x0, y1, x1


def span(centre: int, length: int, limit: int) -> tuple[int, int]:
    """(start, end) of about `length` pixels around `centre`, shifted and cut to 0 .. limit."""
    start, end = centre - length // 2, centre + length // 2
    if start < 0:
        start, end = 0, end - start
    if end > limit:
        start, end = start - (end - limit), limit
    return max(start, 0), end


def cut_patch(
    image: np.ndarray, numbers: np.ndarray, row: np.ndarray, patch: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(patch uint8 h x w x 3, mask uint8 h/2 x w/2 of 0 and 1) of an INDEX row.

    image: uint8 H x W x 3; numbers: int32 H x W, what `numbered` gives. The patch is resized
    bilinearly, the mask to the nearest pixel, first to h x w and then to the stem's h/2 x w/2
    (released code; it does not round the resized patch to whole numbers).
    """
    y0, x0, y1, x1 = patch_window(
        (row["x"], row["y"], row["width"], row["height"]), *numbers.shape, patch
    )
    picture = cv2.resize(image[y0:y1, x0:x1], patch[::-1], interpolation=cv2.INTER_LINEAR)
    mask = (numbers[y0:y1, x0:x1] == row["number"]).astype(np.uint8)
    mask = cv2.resize(mask, patch[::-1], interpolation=cv2.INTER_NEAREST)
    return picture, np.ascontiguousarray(mask[::2, ::2])


def quantile_threshold(values: np.ndarray, quantile: float) -> float:
    """sorted[min(int(n q), n - 1)] (released code)."""
    return float(np.sort(values)[min(int(len(values) * quantile), len(values) - 1)])


def filter_connectivities(
    loss: np.ndarray, score: np.ndarray, predicted: np.ndarray, rule: str, quantile: float
) -> tuple[np.ndarray, dict]:
    """Which connectivities are kept (bool N), and the thresholds (released code).

    loss, score: float64 N; predicted: int N. A predicted class's threshold is the quantile q of its
    connectivities' losses, or 1 - q of their scores. The global threshold is the mean of these over
    all connectivities. A connectivity is dropped by rule
    - "both_loss": if its loss exceeds both thresholds;
    - "loss" (the release's local_loss): if its loss exceeds its class's;
    - "score" (local_score): if its score is below its class's.
    Ours: one whose loss or score is not finite is dropped and has no part in the thresholds.
    """
    if rule == "score":
        quantile = 1 - quantile
    values, finite = score if rule == "score" else loss, np.isfinite(loss) & np.isfinite(score)
    per_class = {
        int(c): quantile_threshold(values[finite & (predicted == c)], quantile)
        for c in np.unique(predicted[finite])
    }
    local = np.array([per_class.get(int(c), np.nan) for c in predicted])
    overall = float(local[finite].mean()) if finite.any() else None
    if overall is None:
        return finite, {"per_class": {}, "global": None}
    kept = {
        "both_loss": (loss <= local) | (loss <= overall),
        "loss": loss <= local,
        "score": score >= local,
    }[rule]
    return kept & finite, {"per_class": per_class, "global": overall}


# --------------------------------------------------------------------------- paper: the noise model


@dataclass(frozen=True)
class NoiseModel:
    """eta: posterior of the noisy component for each connectivity, float64 N. means, deviations,
    weights: of the two components (clean, noisy) in min-max-normalised losses; low, high: of the
    normalisation. fallback: why there is no mixture, or None.
    """

    eta: np.ndarray
    low: float = 0.0
    high: float = 1.0
    means: tuple[float, float] = (0.0, 0.0)
    deviations: tuple[float, float] = (0.0, 0.0)
    weights: tuple[float, float] = (0.0, 0.0)
    fallback: str | None = None


def noise_posterior(loss: np.ndarray, seed: int) -> NoiseModel:
    """A mixture of two Gaussians fitted by EM to the losses, min-max-normalised as DivideMix does
    (paper, equation 4).

    A loss that is not finite makes a connectivity noisy (eta 1) and is left out of the fit. Without
    a mixture that tells two groups apart nothing else can be called noise: eta is 0, the labels are
    kept, and `fallback` says why. That is so with fewer than MIN_CONNECTIVITIES losses, equal ones,
    ones that a single Gaussian describes as well (Bayesian information criterion), means closer
    than MIN_SEPARATION, or a noisy component that is likelier even at the clean one's mean. Below
    the clean component's mean eta is not allowed to rise again, which a wide noisy component would
    make it do.
    """
    eta = np.where(np.isfinite(loss), 0.0, 1.0)
    finite = loss[np.isfinite(loss)]
    lost = (
        ""
        if len(finite) == len(loss)
        else f"{len(loss) - len(finite)} losses are not finite (called noisy); "
    )
    if len(finite) < MIN_CONNECTIVITIES:
        return NoiseModel(
            eta,
            fallback=(
                f"{lost}{len(finite)} connectivities are fewer than {MIN_CONNECTIVITIES}: "
                "no mixture is fitted, the labels are kept"
            ),
        )
    low, high = float(finite.min()), float(finite.max())
    if high - low < 1e-9:
        return NoiseModel(
            eta,
            low,
            high,
            fallback=f"{lost}all losses are equal: no mixture is fitted, the labels are kept",
        )
    x = ((finite - low) / (high - low))[:, None]
    single, mixture = (
        GaussianMixture(k, tol=1e-4, max_iter=200, reg_covar=5e-4, random_state=seed).fit(x)
        for k in (1, 2)
    )
    order = mixture.means_[:, 0].argsort()
    means = tuple(float(v) for v in mixture.means_[order, 0])
    deviations = tuple(float(v) for v in np.sqrt(mixture.covariances_[order, 0, 0]))
    weights = tuple(float(v) for v in mixture.weights_[order])
    model = dict(low=low, high=high, means=means, deviations=deviations, weights=weights)
    if single.bic(x) <= mixture.bic(x):
        return NoiseModel(
            eta,
            **model,
            fallback=(
                f"{lost}one Gaussian describes the losses as well as two (Bayesian information"
                f" criterion {single.bic(x):.1f} and {mixture.bic(x):.1f}), the components do not"
                " separate: the labels are kept"
            ),
        )
    separation = (means[1] - means[0]) / np.sqrt((deviations[0] ** 2 + deviations[1] ** 2) / 2)
    if separation < MIN_SEPARATION:
        return NoiseModel(
            eta,
            **model,
            fallback=(
                f"{lost}the mixture's components do not separate (means {means[0]:.3f} and"
                f" {means[1]:.3f}, distance {separation:.2f} deviations): the labels are kept"
            ),
        )
    floor = float(mixture.predict_proba(np.array([[means[0]]]))[0, order[1]])
    if floor >= 0.5:
        return NoiseModel(
            eta,
            **model,
            fallback=(
                f"{lost}the mixture's components do not separate (at the clean one's mean "
                f"{means[0]:.3f} the noisy one is as likely): the labels are kept"
            ),
        )
    posterior = mixture.predict_proba(x)[:, order[1]]
    posterior = np.where(x[:, 0] < means[0], np.minimum(posterior, floor), posterior)
    eta[np.isfinite(loss)] = posterior
    return NoiseModel(eta, **model)


def decide(
    eta: np.ndarray,
    score: np.ndarray,
    predicted: np.ndarray,
    class_id: np.ndarray,
    tau_ns: float,
    tau_cr: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(decision, final class) by the paper's thresholds: clean (eta < tau_ns) keeps its label, a
    noisy connectivity whose largest probability exceeds tau_cr gets that class, the others are
    dropped (IGNORE).
    """
    clean, sure = eta < tau_ns, score > tau_cr
    decision = np.where(clean, "kept", np.where(sure, "corrected", "dropped"))
    return decision, np.where(clean, class_id, np.where(sure, predicted, IGNORE)).astype(np.uint8)


# ----------------------------------------------------------------------------------------- training


class Data:
    """The images of a list with their connectivities. rows: of the list; index: INDEX; starts:
    where each image's begin in it; judged: bool, those of --min-area pixels or more, which are
    learned from and scored.
    """

    def __init__(
        self, root: Path, rows: list[tuple[str, str]], index: np.ndarray, class_num: int, options
    ):
        self.root, self.rows, self.index, self.class_num, self.options = (
            root,
            rows,
            index,
            class_num,
            options,
        )
        self.starts = np.searchsorted(index["image"], np.arange(len(rows) + 1))
        self.judged = index["area"] >= options.min_area

    def part(self, image: int) -> slice:
        """Where the connectivities of image i are in the index, and in all that has one entry for
        each connectivity.
        """
        return slice(self.starts[image], self.starts[image + 1])

    def of_image(self, image: int) -> np.ndarray:
        return self.index[self.part(image)]

    def numbers(self, image: int) -> np.ndarray:
        """int32 H x W: the number of each pixel's connectivity in image i, or -1."""
        return numbered(read_label(self.root / self.rows[image][1], self.class_num), self.class_num)

    def read(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """(picture uint8 H x W x 3, numbered connectivities) of image i; the picture is resized to
        its label map.
        """
        numbers = self.numbers(image)
        picture = read_image(self.root / self.rows[image][0])
        if picture.shape[:2] != numbers.shape:
            picture = cv2.resize(picture, numbers.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return picture, numbers

    def scaled(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, the picture at --scale."""
        picture, numbers = self.read(image)
        size = (
            max(16, round(numbers.shape[1] * self.options.scale)),
            max(16, round(numbers.shape[0] * self.options.scale)),
        )
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), numbers


def release_order(data: Data, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(order of an epoch's judged connectivities, visits): what each image visited in turn adds to
    the pool they are drawn from.

    The images come in random order, one with more than POOL connectivities in several visits.
    Whenever the pool holds more than POOL, connectivities are drawn from it at random; what is left
    at the end is shuffled. So the order is random, each connectivity comes once, an image is
    decoded once, and at most POOL and one visit are in memory.
    """
    random = np.random.default_rng([data.options.seed, epoch])
    pool, order, visits = [], [], []
    for image in random.permutation(len(data.rows)):
        members = data.starts[image] + np.flatnonzero(data.judged[data.part(image)])
        for visit in np.split(members, range(POOL, len(members), POOL)):
            visits.append(visit)
            pool.extend(visit.tolist())
            while len(pool) > POOL:
                place = int(random.integers(len(pool)))
                pool[place], pool[-1] = pool[-1], pool[place]
                order.append(pool.pop())
    return np.array(order + random.permutation(pool).tolist(), dtype=np.int64), [
        v for v in visits if len(v)
    ]


def patch_batches(
    data: Data, start: int, stop: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Training batches start..stop of the release recipe: patches uint8 B x h x w x 3, masks B x 1
    x h/2 x w/2, classes.

    Everything follows from the seed and the batch's number, so a stopped training goes on exactly.
    An incomplete last batch of an epoch is left out. --workers images are read and cut ahead.
    """
    options, size, per_epoch = data.options, data.options.batch_size, batches_per_epoch(data)

    def cut(members: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        picture, numbers = data.read(int(data.index["image"][members[0]]))
        return {
            int(m): cut_patch(picture, numbers, data.index[m], options.patch_size) for m in members
        }

    with ThreadPoolExecutor(max(1, options.workers)) as readers:
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            order, visits = release_order(data, epoch)
            mirrored = np.random.default_rng([options.seed, epoch, 1]).random(len(order)) < 0.5
            batches = range(
                max(start - epoch * per_epoch, 0), min(stop - epoch * per_epoch, per_epoch)
            )
            wanted = np.zeros(len(data.index), bool)
            wanted[order[batches.start * size : batches.stop * size]] = True
            todo = (members[wanted[members]] for members in visits if wanted[members].any())
            jobs = [
                readers.submit(cut, members)
                for members in itertools.islice(todo, max(1, options.workers))
            ]
            pool: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for batch in batches:
                part = slice(batch * size, (batch + 1) * size)
                for member in order[part].tolist():
                    while member not in pool:
                        pool.update(jobs.pop(0).result())
                        jobs.extend(
                            readers.submit(cut, members) for members in itertools.islice(todo, 1)
                        )
                patches, masks = (
                    np.stack(x) for x in zip(*(pool.pop(member) for member in order[part].tolist()))
                )
                flip = mirrored[part]
                patches[flip], masks[flip] = patches[flip][:, :, ::-1], masks[flip][:, :, ::-1]
                yield (
                    torch.from_numpy(patches),
                    torch.from_numpy(masks)[:, None],
                    torch.from_numpy(data.index["class_id"][order[part]].astype(np.int64)),
                )


def image_batches(
    data: Data, start: int, stop: int
) -> Iterator[tuple[torch.Tensor, list[MaskShares], torch.Tensor]]:
    """Training batches start..stop of the paper recipe: whole images uint8 B x H x W x 3 (of one
    size, the first one's), the masks of all their connectivities, their classes (IGNORE for those
    not judged). An incomplete last batch of an epoch is left out.
    """
    options = data.options
    images = judged_images(data)
    size = min(options.batch_size, len(images))
    per_epoch = batches_per_epoch(data)
    with ThreadPoolExecutor(max(1, options.workers)) as reader:

        def load(iteration: int):
            random = np.random.default_rng([options.seed, iteration // per_epoch])
            chosen = random.permutation(images)[iteration % per_epoch * size :][:size]
            mirrored = random.random(len(images))[iteration % per_epoch * size :][:size] < 0.5
            pictures, shares, classes = [], [], []
            for image, mirror in zip(chosen, mirrored):
                picture, numbers = data.scaled(image)
                if pictures and picture.shape != pictures[0].shape:
                    picture = cv2.resize(
                        picture, pictures[0].shape[1::-1], interpolation=cv2.INTER_AREA
                    )
                shares.append(
                    mask_shares(numbers, len(data.of_image(image)), picture.shape[:2], mirror)
                )
                pictures.append(np.ascontiguousarray(picture[:, ::-1]) if mirror else picture)
                classes.append(
                    np.where(
                        data.judged[data.part(image)], data.of_image(image)["class_id"], IGNORE
                    ).astype(np.int64)
                )
            return (
                torch.from_numpy(np.stack(pictures)),
                shares,
                torch.from_numpy(np.concatenate(classes)),
            )

        ahead = max(1, options.workers)
        jobs = [reader.submit(load, i) for i in range(start, min(start + ahead, stop))]
        for iteration in range(start, stop):
            batch = jobs.pop(0).result()
            if iteration + ahead < stop:
                jobs.append(reader.submit(load, iteration + ahead))
            yield batch


def mask_shares(
    numbers: np.ndarray, count: int, size: tuple[int, int], mirror: bool = False
) -> MaskShares:
    """The masks at the resolution of the features of an image of `size`: stride 16, rounded up by
    the convolutions.
    """
    return MaskShares(numbers, count, -(-size[0] // 16), -(-size[1] // 16), mirror)


def batches_per_epoch(data: Data) -> int:
    """Release: full batches; paper: groups of whole images. At least one."""
    if data.options.recipe == "release":
        return max(1, int(data.judged.sum()) // data.options.batch_size)
    images = len(judged_images(data))
    return images // min(data.options.batch_size, images)


def judged_images(data: Data) -> np.ndarray:
    """The images that have a judged connectivity."""
    return np.unique(data.index["image"][data.judged])


def make_classifier(options: argparse.Namespace, class_num: int, device: torch.device):
    kind = PatchClassifier if options.recipe == "release" else PooledClassifier
    model = kind(int(options.backbone.removeprefix("resnet")), options.stem, class_num)
    if options.amp == "bf16":
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def logits_of(model, images: torch.Tensor, second, device: torch.device, amp: bool) -> torch.Tensor:
    """The classifier on uint8 images or patches B x h x w x 3, and masks or mask shares."""
    second = second.to(device) if torch.is_tensor(second) else second
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(normalised(images.to(device)), second).float()


def train(data: Data, out: Path, device: torch.device) -> None:
    """Train the classifier and leave `checkpoint.pth`; goes on from `training.pth`, where a stopped
    run left off.
    """
    options = data.options
    seed_everything(options.seed)
    model = make_classifier(options, data.class_num, device)
    load_backbone(model.backbone, options.backbone_weights)
    optimizer = torch.optim.SGD(
        [
            {"params": model.backbone.parameters(), "lr": options.lr * BACKBONE_FACTOR},
            {"params": model.classifier.parameters(), "lr": options.lr},
        ],
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    base = [group["lr"] for group in optimizer.param_groups]
    total, done = EPOCHS * batches_per_epoch(data), 0
    if (out / "training.pth").is_file():
        state = torch.load(out / "training.pth", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["iteration"]
        print(f"training goes on at iteration {done}")

    def save(path: Path, **content) -> None:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    model.train()
    smoothing = LABEL_SMOOTHING if options.recipe == "release" else 0.0
    batches = (patch_batches if options.recipe == "release" else image_batches)(
        data, done, options.iterations
    )
    saved = time.monotonic()
    bar = tqdm(batches, desc="SCC training", unit="it", initial=done, total=options.iterations)
    for iteration, (images, second, classes) in enumerate(bar, start=done):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * (1 + DECAY * (iteration + 1) / total) ** -POWER
        loss = F.cross_entropy(
            logits_of(model, images, second, device, options.amp == "bf16"),
            classes.to(device),
            ignore_index=IGNORE,
            label_smoothing=smoothing,
        )
        if not torch.isfinite(loss):
            raise UserError(
                f"SCC training: the loss is not finite at iteration {iteration}; use a smaller --lr"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(
                out / "training.pth",
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                iteration=iteration + 1,
            )
            saved = time.monotonic()
    save(out / "checkpoint.pth", model=model.state_dict(), iteration=options.iterations)
    (out / "training.pth").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def score_image(
    model, data: Data, image: int, read, device: torch.device, pool: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """loss (cross-entropy against the label, float64), score (largest probability, float64) and
    prediction (uint8) of the connectivities of image i, given what Data.read or Data.scaled says of
    it; NaN, 0 and the label of those not judged. `pool` cuts the patches.

    Batches never span images, so that the numbers do not depend on which process scores which
    image.
    """
    options, rows, (picture, numbers) = data.options, data.of_image(image), read
    judged = data.judged[data.part(image)]
    amp, logits = options.amp == "bf16", [torch.zeros(0, data.class_num)]
    if options.recipe == "release":
        seen = rows[judged]
        for start in range(0, len(seen), options.batch_size):
            cut = pool.map(
                lambda row: cut_patch(picture, numbers, row, options.patch_size),
                seen[start : start + options.batch_size],
            )
            patches, masks = (torch.from_numpy(np.stack(x)) for x in zip(*cut))
            logits.append(logits_of(model, patches, masks[:, None], device, amp).cpu())
    elif judged.any():
        every = logits_of(
            model,
            torch.from_numpy(picture)[None],
            [mask_shares(numbers, len(rows), picture.shape[:2])],
            device,
            amp,
        )
        logits.append(every.cpu()[torch.from_numpy(judged)])
    logits = torch.cat(logits).double()
    loss, certainty, predicted = (
        np.full(len(rows), np.nan),
        np.zeros(len(rows)),
        rows["class_id"].copy(),
    )
    classes = torch.from_numpy(rows["class_id"][judged].astype(np.int64))
    loss[judged] = F.cross_entropy(logits, classes, reduction="none").numpy()
    certainty[judged], predicted[judged] = (x.numpy() for x in logits.softmax(dim=1).max(dim=1))
    return {"loss": loss, "score": certainty, "predicted": predicted}


def score(data: Data, out: Path, device: torch.device, rank: int, world: int) -> None:
    """Scores of this process's images to scores/<image>.npz; those that exist are left. --workers
    images are read ahead.
    """
    todo = [i for i in range(rank, len(data.rows), world) if not score_path(out, i).is_file()]
    if not todo:
        return
    model = make_classifier(data.options, data.class_num, device)
    model.load_state_dict(
        torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=True)["model"]
    )
    model.eval()
    read, ahead = (
        data.read if data.options.recipe == "release" else data.scaled,
        max(1, data.options.workers),
    )
    with ThreadPoolExecutor(ahead) as readers, ThreadPoolExecutor(ahead) as cutters:
        jobs = [readers.submit(read, image) for image in todo[:ahead]]
        for place, image in enumerate(tqdm(todo, desc="SCC scoring", unit="img", disable=rank > 0)):
            scores = score_image(model, data, image, jobs.pop(0).result(), device, cutters)
            jobs.extend(
                readers.submit(read, following)
                for following in todo[place + ahead : place + ahead + 1]
            )
            with atomic_path(score_path(out, image)) as temporary, open(temporary, "wb") as file:
                np.savez(file, **scores)


def score_path(out: Path, image: int) -> Path:
    return out / "scores" / f"{image:06d}.npz"


# --------------------------------------------------------------------------------------- correction


@dataclass
class Verdicts:
    """One entry per connectivity, in the index's order."""

    loss: np.ndarray
    score: np.ndarray
    predicted: np.ndarray
    eta: np.ndarray  # NaN in the release recipe
    decision: np.ndarray  # "kept", "corrected" or "dropped"
    final: np.ndarray  # class or IGNORE
    noise: NoiseModel | None  # fitted to the judged ones, whose eta it has
    thresholds: dict


def judge(data: Data, out: Path) -> Verdicts:
    """The recipe's decision on every connectivity, from the scores."""
    options, classes = data.options, data.index["class_id"]
    loss, certainty, predicted = (
        np.empty(len(classes)),
        np.empty(len(classes)),
        np.empty(len(classes), np.uint8),
    )
    for image in range(len(data.rows)):
        part = data.part(image)
        with np.load(score_path(out, image)) as scores:
            loss[part], certainty[part], predicted[part] = (
                scores["loss"],
                scores["score"],
                scores["predicted"],
            )
    if options.recipe == "paper":
        noise = noise_posterior(loss[data.judged], options.seed)
        eta = np.ones(len(loss))
        eta[data.judged] = noise.eta
        decision, final = decide(eta, certainty, predicted, classes, options.tau_ns, options.tau_cr)
        return Verdicts(
            loss,
            certainty,
            predicted,
            eta,
            decision,
            final,
            noise,
            {"tau_ns": options.tau_ns, "tau_cr": options.tau_cr},
        )
    kept, thresholds = filter_connectivities(
        loss, certainty, predicted, options.filter, options.quantile
    )
    decision = np.where(kept, np.where(predicted == classes, "kept", "corrected"), "dropped")
    return Verdicts(
        loss,
        certainty,
        predicted,
        np.full(len(loss), np.nan),
        decision,
        np.where(kept, predicted, IGNORE).astype(np.uint8),
        None,
        thresholds,
    )


def corrected_label(label: np.ndarray, numbers: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The label map with every connectivity given its final class (uint8 per connectivity
    number).
    """
    table = np.append(final, np.uint8(IGNORE))  # the last entry serves number -1
    return table[numbers]


def write_connectivities(path: Path, data: Data, verdicts: Verdicts) -> None:
    """connectivities.csv: one line each, numbers at full precision."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "image",
                "id",
                "class",
                "area",
                "x",
                "y",
                "width",
                "height",
                "loss",
                "score",
                "prediction",
                "eta",
                "decision",
                "final",
            ]
        )
        for row, loss, certainty, predicted, eta, decision, final in zip(
            data.index,
            verdicts.loss,
            verdicts.score,
            verdicts.predicted,
            verdicts.eta,
            verdicts.decision,
            verdicts.final,
        ):
            writer.writerow(
                [
                    data.rows[row["image"]][0],
                    *(int(v) for v in list(row)[1:]),
                    repr(float(loss)),
                    repr(float(certainty)),
                    int(predicted),
                    "" if np.isnan(eta) else repr(float(eta)),
                    decision,
                    int(final),
                ]
            )


def correct(data: Data, out: Path, classes, suffix: str, list_path: Path) -> Verdicts:
    """Write the corrected labels, their list and connectivities.csv."""
    verdicts = judge(data, out)
    # Labels of other thresholds may be there; while they are replaced nothing may list them.
    for path in (list_path, out / "connectivities.csv"):
        path.unlink(missing_ok=True)

    def write(image: int) -> None:
        label_path = data.rows[image][1]
        label = read_label(data.root / label_path, data.class_num)
        final = verdicts.final[data.part(image)]
        write_label(
            data.root / renamed_experiment(label_path, suffix),
            corrected_label(label, numbered(label, data.class_num), final),
            classes.palette,
        )

    with ThreadPoolExecutor() as pool:
        list(
            tqdm(
                pool.map(write, range(len(data.rows))),
                desc="SCC correction",
                total=len(data.rows),
                unit="img",
            )
        )
    write_connectivities(out / "connectivities.csv", data, verdicts)
    write_list(list_path, [(row[0], renamed_experiment(row[1], suffix)) for row in data.rows])
    return verdicts


# --------------------------------------------------------------------------------------------- main


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_list_options(parser, "labels")
    add_class_options(parser)
    parser.add_argument(
        "--recipe",
        default="release",
        choices=("release", "paper"),
        help="what the released code does, or what the paper says (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "train", "score", "correct"),
        help="one stage of the three; the earlier ones must have run (default: all)",
    )
    parser.add_argument(
        "--backbone",
        default="resnet101",
        choices=[f"resnet{d}" for d in BLOCKS],
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--stem",
        default="torchvision",
        choices=STEMS,
        help=(
            "first layers of the backbone; torchvision's for ImageNet weights (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--backbone-weights",
        default="imagenet",
        metavar="imagenet|none|FILE",
        help=(
            "torchvision's ImageNet weights, none, or a file: a backbone or a segmentation"
            " checkpoint (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=5000,
        metavar="N",
        help=(
            "where the training stops, before it learns the noise; the authors: 5000 (GTA and the"
            " paper), 10000 (SYNTHIA), 50000 (BDD100K); about one pass over the connectivities of"
            " 3,000 images, so fewer images need fewer. The learning rate decays over 20 epochs,"
            " whatever N is (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--min-area",
        type=int,
        default=1,
        metavar="PIXELS",
        help=(
            "smaller connectivities lose their label unseen: slivers where SAM's masks meet are"
            " mostly mislabeled and can be half of what is learned from; the released code has a"
            " limit of 100, commented out (default: 1, all are judged)"
        ),
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=(
            "connectivities (release, default 64) or whole images (paper, default 4, ours) an"
            " iteration"
        ),
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.01,
        help="learning rate of the classifier; the backbone's is a tenth (default: %(default)s)",
    )
    parser.add_argument(
        "--patch-size",
        type=int,
        nargs=2,
        default=(256, 512),
        metavar=("H", "W"),
        help="release: pixels of a connectivity's patch, even (default: 256 512)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=0.5,
        help=(
            "paper: size of the images that the features are taken of, over the label maps'"
            " (default: 0.5)"
        ),
    )
    parser.add_argument(
        "--filter",
        default="both_loss",
        choices=("both_loss", "loss", "score"),
        help="release: what drops a connectivity (default: %(default)s)",
    )
    parser.add_argument(
        "--quantile",
        type=float,
        default=0.5,
        help=(
            "release: of the losses or scores of a class, its threshold, 0 to 1 (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--tau-ns",
        type=float,
        default=0.60,
        help=(
            "paper: noise threshold; from this eta on a connectivity is noisy, 0 to 1 (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--tau-cr",
        type=float,
        default=0.95,
        help=(
            "paper: correction threshold; above this probability a noisy one gets the predicted"
            " class, 0 to 1 (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--amp",
        default="none",
        choices=("none", "bf16"),
        help="bf16 is faster (default: exact fp32)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=4,
        metavar="N",
        help=(
            "threads that read images ahead, 1 or more; results do not depend on it (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--vis",
        type=int,
        default=8,
        metavar="N",
        help="images in the report (default: %(default)s)",
    )
    parser.add_argument(
        "--gt",
        metavar="LIST",
        help=(
            "list `<image path> <ground-truth path>`: adds purity, accuracy and "
            "AUROC to the report, changes nothing else"
        ),
    )
    add_run_options(parser)
    options = parser.parse_args(argv)
    if options.batch_size is None:
        options.batch_size = 64 if options.recipe == "release" else 4
    options.patch_size = tuple(options.patch_size)
    for name in ("quantile", "tau_ns", "tau_cr"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: give a number from 0 to 1"
            )
    for name in ("iterations", "min_area", "batch_size", "lr", "scale", "workers"):
        if getattr(options, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: give a number above 0"
            )
    if min(options.patch_size) < 32 or any(side % 2 for side in options.patch_size):
        raise UserError(
            f"--patch-size {options.patch_size[0]} {options.patch_size[1]}: give even numbers from"
            " 32 up"
        )
    return options


def check_ground_truth(
    gt: dict[str, str], rows: list[tuple[str, str]], root: Path, gt_list: str
) -> None:
    """Fail before any work if --gt does not cover the list."""
    for image, _ in rows:
        if image not in gt:
            raise UserError(
                f"{gt_list}: names no ground truth for {image}; --gt needs every image of"
                " --id-list-path"
            )
    check_files(root, [gt[image] for image, _ in rows], gt_list)


def make_index(
    rows: list[tuple[str, str]], root: Path, class_num: int, out: Path, list_path: str
) -> np.ndarray:
    """The index of all connectivities, from out/index.npz if the label maps are still the same
    ones.
    """
    check_files(root, [path for row in rows for path in row], list_path)
    with ThreadPoolExecutor() as pool:
        digests = np.array(list(pool.map(lambda row: sha256(root / row[1]), rows)))
        if (out / "index.npz").is_file():
            stored = np.load(out / "index.npz")
            if not np.array_equal(stored["digests"], digests):
                raise UserError(
                    f"{out}: was made from other label maps than {list_path} names now; remove the"
                    " folder or rename the experiment"
                )
            return stored["index"]
        for row in rows:
            image_size(root / row[0])
        parts = list(
            tqdm(
                pool.map(
                    lambda item: index_image(root / item[1][1], item[0], class_num), enumerate(rows)
                ),
                desc="SCC index",
                total=len(rows),
                unit="img",
            )
        )
    index = np.concatenate(parts)
    if not len(index):
        raise UserError(
            f"{list_path}: its label maps hold no label at all (only 255); check --root-path and"
            " the list"
        )
    with atomic_path(out / "index.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, index=index, digests=digests)
    return index


def main(argv=None) -> None:
    options = parse_args(argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    root, suffix = Path(options.root_path), "scc" if options.recipe == "release" else "scc_paper"
    rows = read_list(options.id_list_path)
    gt_rows = dict(read_list(options.gt)) if options.gt else None
    out = root / renamed_experiment(rows[0][1], suffix).split("/")[0]
    if {renamed_experiment(row[1], suffix).split("/")[0] for row in rows} != {out.name}:
        raise UserError(
            f"{options.id_list_path}: label paths of several experiments; give one list for each"
        )
    list_path = renamed_list(options.id_list_path, rows[0][1], suffix)
    rank, world = process_rank()
    device = select_device(options.device)
    if options.amp == "none":
        exact_mode()
    weights = Path(options.backbone_weights)
    if options.backbone_weights not in ("imagenet", "none") and not weights.is_file():
        raise UserError(
            f"{weights}: no such file; --backbone-weights is imagenet, none or a .pth file"
        )
    if gt_rows is not None:
        check_ground_truth(gt_rows, rows, root, options.gt)
    check_writable(out)
    check_writable(list_path.parent)
    if world == 1:
        for folder in {
            out,
            out / "scores",
            out / "report",
            *((root / renamed_experiment(row[1], suffix)).parent for row in rows),
        }:
            remove_leftovers(folder)
    settings = {
        "recipe": options.recipe,
        "images_sha256": hashlib.sha256("\n".join(image for image, _ in rows).encode()).hexdigest(),
        "backbone": options.backbone,
        "stem": options.stem,
        "backbone_weights": sha256(weights) if weights.is_file() else options.backbone_weights,
        "iterations": options.iterations,
        "min_area": options.min_area,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "patch_size": list(options.patch_size) if options.recipe == "release" else None,
        "scale": options.scale if options.recipe == "paper" else None,
        "amp": options.amp,
        "seed": options.seed,
        "class_num": classes.count,
    }
    if rank > 0:
        wait_for([out / "index.npz"], "the index")
    index = make_index(rows, root, classes.count, out, options.id_list_path)
    if not (index["area"] >= options.min_area).any():
        raise UserError(
            f"--min-area {options.min_area}: the largest connectivity has {index['area'].max()}"
            " pixels; give fewer"
        )
    if rank > 0:
        wait_for([out / "settings.json"], "the index")
    check_settings(
        out / "settings.json", settings
    )  # thresholds are not among them: they may change at will
    data, watch, checkpoint = (
        Data(root, rows, index, classes.count, options),
        Stopwatch(),
        out / "checkpoint.pth",
    )
    if rank == 0:
        small = len(index) - int(data.judged.sum())
        print(
            f"{len(index)} connectivities in {len(rows)} images"
            + (f", {small} of them under --min-area" if small else "")
        )
        earlier = read_json(out / "run.json")["seconds"] if (out / "run.json").is_file() else {}

    if options.stage in ("all", "train") and rank == 0 and not checkpoint.is_file():
        with watch("train"):
            train(data, out, device)
    if options.stage in ("all", "score"):
        if options.stage == "score" and not checkpoint.is_file():
            raise UserError(f"{checkpoint}: no such file; run --stage train first")
        wait_for([checkpoint], "the training")
        with watch("score"):
            score(data, out, device, rank, world)
    if options.stage in ("all", "correct") and rank == 0:
        scored = [score_path(out, i) for i in range(len(rows))]
        if options.stage == "correct" and not all(path.is_file() for path in scored):
            raise UserError(f"{out / 'scores'}: not all images are scored; run --stage score first")
        wait_for(scored, "the other processes")
        with watch("correct"):
            verdicts = correct(data, out, classes, suffix, list_path)
        with watch("report"):
            report = write_report(out / "report", data, verdicts, classes, gt_rows, options.vis)
        write_json(out / "report" / "report.json", report)
        if verdicts.noise is not None and verdicts.noise.fallback:
            print(f"note: {verdicts.noise.fallback}")
        counts = {
            name: int((verdicts.decision == name).sum())
            for name in ("kept", "corrected", "dropped")
        }
        print(
            f"{counts['kept']} connectivities kept, {counts['corrected']} corrected,"
            f" {counts['dropped']} dropped; {report['coverage_before']:.1f} % of the pixels labeled"
            f" before, {report['coverage_after']:.1f} % after\nlabels: {out}\nlist:"
            f" {list_path}\nreport: {out / 'report' / 'index.html'}"
        )
    if rank == 0:
        seconds = earlier | {stage: round(spent, 2) for stage, spent in watch.seconds.items()}
        write_json(
            out / "run.json",
            {
                **manifest(vars(options), {"list": options.id_list_path}),
                "seconds": seconds,
                "peak_memory": peak_memory_mb(device),
            },
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
