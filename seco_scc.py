"""SCC, semantic connectivity correction: find and correct noisy connectivities of pseudo-labels.

A classifier learns the classes of the connectivities for a short time. It learns clean labels
before noisy ones, so a high loss tells the noise. A connectivity that is judged noisy gets another
class or loses its label (255). No ground truth is used; --gt only adds figures to the report.

Input:   --id-list-path, lines `<image path> <label path>` relative to --root-path: the list that
         seco_sam.py wrote, or any other. The first folder of a label path is the experiment, <exp>.
Output:  <root>/<exp>_scc/ (`--recipe paper`: <exp>_scc_paper/): the corrected labels,
         connectivities.csv, report/index.html, run.json (manifest). Their list:
         splits/<dataset>/<exp>_scc/. Beside them, what a stopped run goes on from
         (util/scc_files.py).

    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt \\
        --root-path data/cityscapes --class-num 19
    # the paper's recipe
    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt \\
        --root-path data/cityscapes --class-num 19 --recipe paper
    # another threshold: only the correction runs again
    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt \\
        --root-path data/cityscapes --class-num 19 --quantile 0.6
    # four GPUs share the scoring; the first one trains
    torchrun --nproc_per_node=4 seco_scc.py \\
        --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt \\
        --root-path data/cityscapes --class-num 19

If it is stopped, run the same command again; it goes on.

The paper does not state its optimizer and network. Its recipe takes those of the released code,
with plain cross-entropy. Ours are: whole images at half size, four an iteration; features at stride
16 (layer 4 dilated); batch statistics in training, running ones in scoring; masks averaged over the
cells of the features.

Needs when copied away: dataset/scc.py, model/{checkpoint,resnet,scc}.py,
util/{charts,connectivity,images,labels,options,outputs,page,pictures,run,scc_files,scc_report}.py.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F

from dataset.scc import (
    Data,
    batches_per_epoch,
    image_batches,
    mask_shares,
    patch_batches,
)
from model.resnet import BLOCKS, STEMS, load_backbone
from model.scc import PatchClassifier, PooledClassifier
from util.images import normalised
from util.labels import (
    IGNORE,
    ClassSet,
    check_pairs,
    class_set,
    read_list,
    renamed_experiment,
    renamed_list,
    write_label,
    write_list,
)
from util.options import (
    add_class_options,
    add_list_options,
    add_run_options,
    check_range,
    check_run_options,
)
from util.outputs import check_writable, folder_lock, read_json, remove_leftovers, write_json
from util.run import (
    Stopwatch,
    UserError,
    ahead,
    exact_mode,
    manifest,
    peak_memory_mb,
    process_group,
    process_rank,
    progress,
    run_main,
    seed_everything,
    select_device,
    sha256,
)
from util.scc_files import (
    prepare_folder,
    read_index,
    read_scores,
    remove_scores,
    save_scores,
    save_state,
    score_path,
    write_connectivities,
)
from util.scc_report import write_report

# Released code.
EPOCHS = 20  # T of the learning rate's decay
DECAY, POWER = 10, 0.75  # learning rate x (1 + DECAY t / T) ^ -POWER
BACKBONE_FACTOR = 0.1  # the backbone's learning rate over the classifier's
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 1e-3, 0.1
# Ours, where paper and released code are silent.
MIN_CONNECTIVITIES = 50  # fewer losses than this are no basis for a mixture
MIN_SEPARATION = 1.0  # least distance of the mixture's means, in root mean square deviations
SAVE_SECONDS = 60  # between checkpoints of the training


# --------------------------------------------------------------- release: patches of connectivities


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


# ----------------------------------------------------------------------------- release: the filter


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
    """A mixture of two Gaussians fitted by EM to the losses (float64 N).

    Paper, equation 4; the losses are min-max-normalised as DivideMix does. Ours: a loss that is not
    finite has eta 1 and no part in the fit. Without a mixture that tells two groups apart eta is 0,
    so the labels are kept, and `fallback` says why.
    """
    finite = np.isfinite(loss)
    model = fit_mixture(loss[finite], seed)
    eta = np.ones(len(loss))
    eta[finite] = model.eta
    fallback, lost = model.fallback, len(loss) - int(finite.sum())
    if fallback and lost:
        fallback = f"{lost} losses are not finite (called noisy); {fallback}"
    return replace(model, eta=eta, fallback=fallback)


def fit_mixture(loss: np.ndarray, seed: int) -> NoiseModel:
    """`noise_posterior` of finite losses."""
    none = np.zeros(len(loss))
    if len(loss) < MIN_CONNECTIVITIES:
        why = f"{len(loss)} connectivities are fewer than {MIN_CONNECTIVITIES}"
        return NoiseModel(none, fallback=f"{why}: no mixture is fitted, the labels are kept")
    low, high = float(loss.min()), float(loss.max())
    if high - low < 1e-9:
        why = "all losses are equal: no mixture is fitted, the labels are kept"
        return NoiseModel(none, low, high, fallback=why)
    x = ((loss - low) / (high - low))[:, None]
    single, mixture = (
        GaussianMixture(k, tol=1e-4, max_iter=200, reg_covar=5e-4, random_state=seed).fit(x)
        for k in (1, 2)
    )
    order = mixture.means_[:, 0].argsort()
    means = tuple(float(v) for v in mixture.means_[order, 0])
    deviations = tuple(float(v) for v in np.sqrt(mixture.covariances_[order, 0, 0]))
    weights = tuple(float(v) for v in mixture.weights_[order])
    model = NoiseModel(none, low, high, means, deviations, weights)
    floor = float(mixture.predict_proba(np.array([[means[0]]]))[0, order[1]])
    why = not_separate(model, single.bic(x), mixture.bic(x), floor)
    if why:
        return replace(model, fallback=f"{why}: the labels are kept")
    # Below the clean mean a wide noisy component would take over again.
    eta = mixture.predict_proba(x)[:, order[1]]
    return replace(model, eta=np.where(x[:, 0] < means[0], np.minimum(eta, floor), eta))


def not_separate(model: NoiseModel, bic_one: float, bic_two: float, floor: float) -> str | None:
    """Why the mixture's components are not two groups, or None.

    bic_one, bic_two: Bayesian information criterion of one Gaussian and of two; floor: eta at the
    clean component's mean.
    """
    if bic_one <= bic_two:
        return (
            "one Gaussian describes the losses as well as two (Bayesian information criterion"
            f" {bic_one:.1f} and {bic_two:.1f}), the components do not separate"
        )
    deviation = np.sqrt(np.mean(np.square(model.deviations)))
    separation = (model.means[1] - model.means[0]) / deviation
    if separation < MIN_SEPARATION:
        return (
            f"the mixture's components do not separate (means {model.means[0]:.3f} and"
            f" {model.means[1]:.3f}, distance {separation:.2f} deviations)"
        )
    if floor >= 0.5:
        return (
            "the mixture's components do not separate (at the clean one's mean"
            f" {model.means[0]:.3f} the noisy one is as likely)"
        )
    return None


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


# ------------------------------------------------------------------------------------ the decisions


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


def judge(data: Data, loss: np.ndarray, score: np.ndarray, predicted: np.ndarray) -> Verdicts:
    """The recipe's decision on every connectivity (loss, score float64 N, predicted uint8 N).

    Those under --min-area have the loss NaN: they are dropped and have no part in the thresholds.
    """
    options, classes = data.options, data.index["class_id"]
    scores = loss, score, predicted
    if options.recipe == "release":
        kept, thresholds = filter_connectivities(*scores, options.filter, options.quantile)
        decision = np.where(kept, np.where(predicted == classes, "kept", "corrected"), "dropped")
        final = np.where(kept, predicted, IGNORE).astype(np.uint8)
        return Verdicts(*scores, np.full(len(loss), np.nan), decision, final, None, thresholds)
    noise = noise_posterior(loss[data.judged], options.seed)
    eta = np.ones(len(loss))
    eta[data.judged] = noise.eta
    decision, final = decide(eta, score, predicted, classes, options.tau_ns, options.tau_cr)
    thresholds = {"tau_ns": options.tau_ns, "tau_cr": options.tau_cr}
    return Verdicts(*scores, eta, decision, final, noise, thresholds)


def corrected_label(numbers: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The label map uint8 H x W in which every connectivity has its final class.

    numbers: int32 H x W, what `numbered` gives; final: uint8, a class or IGNORE per number.
    """
    return np.append(final, np.uint8(IGNORE))[numbers]  # the last entry serves number -1


# --------------------------------------------------------------------------- training and scoring


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


def decayed(lr: float, t: int, total: int) -> float:
    """The learning rate of update t = 1, 2, … of `total` (released code)."""
    return lr * (1 + DECAY * t / total) ** -POWER


def make_optimizer(model, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        [
            {"params": model.backbone.parameters(), "lr": lr * BACKBONE_FACTOR},
            {"params": model.classifier.parameters(), "lr": lr},
        ],
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )


def gradients(model, batch, device: torch.device, options, smoothing: float) -> float:
    """The loss of a training batch, whose gradients are added to the model's."""
    images, second, classes = batch
    logits = logits_of(model, images, second, device, options.amp == "bf16")
    classes = classes.to(device)
    loss = F.cross_entropy(logits, classes, ignore_index=IGNORE, label_smoothing=smoothing)
    loss.backward()
    return loss.item()


def within_memory(model, compute: Callable[[], float]) -> float:
    """compute(). If the device's memory runs out, again with activations computed anew in
    backward, from then on: the same result, for batch norm goes over the whole batch.
    """
    statistics = [buffer.clone() for buffer in model.buffers()]
    try:
        return compute()
    except torch.OutOfMemoryError:
        if model.backbone.recompute:
            raise
    print("the batch does not fit into memory: activations are computed twice (same result)")
    model.backbone.recompute = True
    for buffer, before in zip(model.buffers(), statistics):
        buffer.copy_(before)
    model.zero_grad()
    torch.cuda.empty_cache()
    return compute()


def train(data: Data, out: Path, device: torch.device) -> None:
    """Train the classifier and leave `checkpoint.pth`; goes on from `training.pth`."""
    options, stopped = data.options, out / "training.pth"
    seed_everything(options.seed)
    model = make_classifier(options, data.class_num, device)
    load_backbone(model.backbone, options.backbone_weights)
    optimizer = make_optimizer(model, options.lr)
    base, done = [group["lr"] for group in optimizer.param_groups], 0
    if stopped.is_file():
        state = torch.load(stopped, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["iteration"]
        print(f"training goes on at iteration {done}")
    model.train()
    if options.recipe == "release":
        batches = patch_batches(data, cut_patch, done, options.iterations)
        smoothing = LABEL_SMOOTHING
    else:
        batches, smoothing = image_batches(data, done, options.iterations), 0.0
    total, saved = EPOCHS * batches_per_epoch(data), time.monotonic()
    bar = progress(batches, "SCC training", options.iterations, "it", initial=done)
    for t, batch in enumerate(bar, start=done + 1):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = decayed(lr, t, total)
        optimizer.zero_grad()
        loss = within_memory(model, lambda: gradients(model, batch, device, options, smoothing))
        if not math.isfinite(loss):
            stopped.unlink(missing_ok=True)
            raise UserError(
                f"--lr {options.lr}: SCC's loss is not finite at iteration {t}; give a smaller one"
            )
        optimizer.step()
        if t % 20 == 0:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if time.monotonic() - saved > SAVE_SECONDS:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(stopped, **state, iteration=t)
            saved = time.monotonic()
    save_state(out / "checkpoint.pth", model=model.state_dict(), iteration=options.iterations)
    stopped.unlink(missing_ok=True)


@torch.inference_mode()
def score_image(
    model, data: Data, image: int, read, device: torch.device, pool: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """{"loss", "score", "predicted"} of image i's connectivities: cross-entropy against the label
    (float64), largest probability (float64), its class (uint8).

    Those not judged have NaN, 0 and their label. read: what Data.read or Data.scaled gives; `pool`
    cuts the patches. Batches never span images, so the numbers do not depend on which process
    scores which image.
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
        shares = [mask_shares(numbers, len(rows), picture.shape[:2])]
        every = logits_of(model, torch.from_numpy(picture)[None], shares, device, amp)
        logits.append(every.cpu()[torch.from_numpy(judged)])
    logits = torch.cat(logits).double()
    count = len(rows)
    loss, score, predicted = np.full(count, np.nan), np.zeros(count), rows["class_id"].copy()
    classes = torch.from_numpy(rows["class_id"][judged].astype(np.int64))
    loss[judged] = F.cross_entropy(logits, classes, reduction="none").numpy()
    score[judged], predicted[judged] = (x.numpy() for x in logits.softmax(dim=1).max(dim=1))
    return {"loss": loss, "score": score, "predicted": predicted}


def score(data: Data, out: Path, device: torch.device, rank: int, world: int) -> None:
    """Scores of this process's images to scores/; those that exist are left."""
    todo = [i for i in range(rank, len(data.rows), world) if not score_path(out, i).is_file()]
    if not todo:
        return
    model = make_classifier(data.options, data.class_num, device)
    state = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    model.eval()
    read, count = data.read, data.options.workers
    if data.options.recipe == "paper":
        read = data.scaled
    with ThreadPoolExecutor(count) as readers, ThreadPoolExecutor(count) as cutters:
        coming = ahead(readers, read, todo, count)
        images = progress(zip(todo, coming), "SCC scoring", len(todo), quiet=rank > 0)
        for image, content in images:
            scores = score_image(model, data, image, content, device, cutters)
            save_scores(out, image, scores)


# ------------------------------------------------------------------------------------------ results


@dataclass
class Run:
    """What is corrected, and where the results go."""

    data: Data
    classes: ClassSet
    suffix: str  # of the experiment's name
    out: Path  # folder of the results
    list_path: Path  # list of the corrected labels
    truth: dict[str, str] | None  # {image path: ground-truth path} of --gt


def correct(run: Run) -> Verdicts:
    """Write the corrected labels, connectivities.csv and the list of the labels."""
    data, table = run.data, run.out / "connectivities.csv"
    verdicts = judge(data, *read_scores(run.out, data))
    # Labels of other thresholds may be there; while they are replaced nothing may list them.
    for path in (run.list_path, table):
        path.unlink(missing_ok=True)
    rows = [(image, renamed_experiment(label, run.suffix)) for image, label in data.rows]

    def write(image: int) -> None:
        label = corrected_label(data.numbers(image), verdicts.final[data.part(image)])
        write_label(data.root / rows[image][1], label, run.classes.palette)

    with ThreadPoolExecutor() as pool:
        jobs = pool.map(write, range(len(rows)))
        for _ in progress(jobs, "SCC correction", len(rows)):
            pass
    write_connectivities(table, data, verdicts)
    write_list(run.list_path, rows)
    return verdicts


def write_results(run: Run, watch: Stopwatch) -> None:
    """The correction and its report, and what they say in short."""
    folder = run.out / "report"
    with watch("correct"):
        verdicts = correct(run)
    with watch("report"):
        vis = run.data.options.vis
        report = write_report(folder, run.data, verdicts, run.classes, run.truth, vis)
    write_json(folder / "report.json", report)
    if report["note"]:
        print(f"note: {report['note']}")
    print(
        f"{report['kept']} connectivities kept, {report['corrected']} corrected,"
        f" {report['dropped']} dropped; {report['coverage_before']:.1f} % of the pixels labeled"
        f" before, {report['coverage_after']:.1f} % after\nlabels: {run.out}\nlist:"
        f" {run.list_path}\nreport: {folder / 'index.html'}"
    )


def wait_for_all() -> None:
    """Go on when every process of the run is here."""
    if process_rank()[1] == 1:
        return
    try:
        torch.distributed.barrier()
    except RuntimeError:
        raise UserError("another process of this run has stopped; its message says why") from None


def run_stages(run: Run, device: torch.device) -> None:
    """Training, scoring and correction, or the one of --stage; the manifest."""
    out, options, (rank, world) = run.out, run.data.options, process_rank()
    stage, checkpoint, images = options.stage, out / "checkpoint.pth", len(run.data.rows)
    earlier = read_json(out / "run.json")["seconds"] if (out / "run.json").is_file() else {}
    watch = Stopwatch()
    if stage in ("all", "train") and rank == 0 and not checkpoint.is_file():
        remove_scores(out)
        with watch("train"):
            train(run.data, out, device)
    wait_for_all()
    if stage in ("all", "score"):
        if not checkpoint.is_file():
            raise UserError(f"{checkpoint}: no such file; run --stage train first")
        with watch("score"):
            score(run.data, out, device, rank, world)
    wait_for_all()
    if rank > 0:
        return
    if stage in ("all", "correct"):
        if not all(score_path(out, image).is_file() for image in range(images)):
            raise UserError(f"{out / 'scores'}: not all images are scored; run --stage score first")
        write_results(run, watch)
    record = manifest(vars(options), {"list": options.id_list_path})
    record["seconds"] = earlier | {name: round(spent, 2) for name, spent in watch.seconds.items()}
    write_json(out / "run.json", {**record, "peak_memory": peak_memory_mb(device)})


# ------------------------------------------------------------------------------------------ options


def add_decision_options(parser: argparse.ArgumentParser) -> None:
    """The recipe and its thresholds."""
    parser.add_argument(
        "--recipe",
        default="release",
        choices=("release", "paper"),
        help="what the released code does, or what the paper says (default: %(default)s)",
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


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The classifier and what it sees."""
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


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """How long and how fast it learns."""
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
        "--batch-size",
        type=int,
        metavar="N",
        help=(
            "connectivities (release, default 64) or whole images (paper, default 4, ours) an"
            " iteration; 64 take about 24 GB, or 12 GB where a GPU has less (slower, same result)"
        ),
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.01,
        help="learning rate of the classifier; the backbone's is a tenth (default: %(default)s)",
    )


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """How the run goes; none of them changes what it decides, but --amp by a little."""
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "train", "score", "correct"),
        help="one stage of the three; the earlier ones must have run (default: all)",
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


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_list_options(parser, "labels")
    add_class_options(parser)
    add_decision_options(parser)
    add_network_options(parser)
    add_training_options(parser)
    add_work_options(parser)
    add_run_options(parser)
    options = parser.parse_args(argv)
    check_run_options(options)
    if options.batch_size is None:
        options.batch_size = 64 if options.recipe == "release" else 4
    options.patch_size = tuple(options.patch_size)
    check_range(options, "quantile", "tau_ns", "tau_cr", least=0, most=1)
    check_range(options, "iterations", "min_area", "batch_size", "workers", least=1)
    check_range(options, "lr", "scale", above=0)
    check_range(options, "vis", least=0)
    if min(options.patch_size) < 32 or any(side % 2 for side in options.patch_size):
        height, width = options.patch_size
        raise UserError(f"--patch-size {height} {width}: give even numbers from 32 up")
    weights = options.backbone_weights
    if weights not in ("imagenet", "none") and not Path(weights).is_file():
        raise UserError(
            f"{weights}: no such file; --backbone-weights is imagenet, none or a .pth file"
        )
    return options


# --------------------------------------------------------------------------------------------- main


def output_folder(options: argparse.Namespace, rows: list[tuple[str, str]], suffix: str) -> Path:
    """<root>/<exp>_<suffix>; all labels must be of one experiment."""
    names = {renamed_experiment(label, suffix).partition("/")[0] for _, label in rows}
    if len(names) > 1:
        raise UserError(
            f"{options.id_list_path}: label paths of several experiments; give one list for each"
        )
    return Path(options.root_path) / names.pop()


def settings_of(options: argparse.Namespace) -> dict:
    """What scores depend on. Thresholds are not among it: they may change at will."""
    names = ("recipe", "backbone", "stem", "iterations", "min_area", "batch_size", "lr", "amp")
    names += ("seed", "class_num")
    settings = {name: getattr(options, name) for name in names}
    if options.recipe == "release":
        settings["patch_size"] = list(options.patch_size)
    else:
        settings["scale"] = options.scale
    weights = options.backbone_weights
    settings["backbone_weights"] = sha256(weights) if Path(weights).is_file() else weights
    return settings


def read_ground_truth(path: str, rows: list[tuple[str, str]]) -> dict[str, str]:
    """{image path: ground-truth path} of --gt, which must name every image of the list."""
    truth = dict(read_list(path))
    for image, _ in rows:
        if image not in truth:
            raise UserError(
                f"{path}: names no ground truth for {image}; --gt needs every image of"
                " --id-list-path"
            )
    return truth


def prepare(
    options: argparse.Namespace,
    rows: list[tuple[str, str]],
    out: Path,
    suffix: str,
    truth: dict[str, str] | None,
) -> None:
    """All checks that open files, the index and the settings."""
    root = Path(options.root_path)
    labels = [root / renamed_experiment(label, suffix) for _, label in rows]
    for folder in {out, out / "scores", out / "report", *(path.parent for path in labels)}:
        remove_leftovers(folder)
    prepare_folder(out, settings_of(options), root, rows, labels, options.id_list_path)
    if truth is not None:
        pairs = [(label, truth[image]) for image, label in rows]
        check_pairs(root, pairs, options.gt, options.class_num, same_size=True)


def main(argv=None) -> None:
    options = parse_args(argv)
    classes = class_set(options.class_num, options.stuff, options.things)
    root, rows = Path(options.root_path), read_list(options.id_list_path)
    truth = read_ground_truth(options.gt, rows) if options.gt else None
    suffix = "scc" if options.recipe == "release" else "scc_paper"
    out = output_folder(options, rows, suffix)
    list_path = renamed_list(options.id_list_path, rows[0][1], suffix)
    device = select_device(options.device)
    if options.amp == "none":
        exact_mode()
    check_writable(list_path.parent)
    with folder_lock(out), process_group(torch.device("cpu")) as (rank, _):
        if rank == 0:
            prepare(options, rows, out, suffix, truth)
        wait_for_all()
        data = Data(root, rows, read_index(out), classes.count, options)
        if rank == 0:
            small = len(data.index) - int(data.judged.sum())
            print(
                f"{len(data.index)} connectivities in {len(rows)} images"
                + (f", {small} of them under --min-area" if small else "")
            )
        run_stages(Run(data, classes, suffix, out, list_path, truth), device)


if __name__ == "__main__":
    sys.exit(run_main(main, "use --amp bf16, or a smaller --batch-size (other results)"))
