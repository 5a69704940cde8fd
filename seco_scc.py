"""SCC, semantic connectivity correction: find and correct noisy connectivities of pseudo-labels.

A classifier learns the classes of the connectivities for a short time. It learns clean labels
before noisy ones, so a high loss tells the noise. A connectivity that is judged noisy gets another
class or loses its label (255). No ground truth is used; --gt only adds figures to the report.

Input:   --id-list-path, lines `<image path> <label path>` relative to --root-path: the list that
         seco_sam.py wrote, or any other. The first folder of a label path is the experiment, <exp>.
Output:  <root>/<exp>_scc/ (`--recipe paper`: <exp>_scc_paper/): the corrected labels,
         connectivities.csv, report/index.html, run.json (manifest). Their list:
         splits/<dataset>/<exp>_scc/. Beside them, what a stopped run goes on from: settings.json,
         inputs.json, index.npz (the connectivities), training.pth, checkpoint.pth (the trained
         classifier), scores/ (loss, score and prediction of each image's connectivities).

    python seco_scc.py --id-list-path splits/cityscapes/HRDA_seco_vit_h/all.txt \\
        --root-path data/cityscapes --class-num 19
    python seco_scc.py … --recipe paper
    torchrun --nproc_per_node=4 seco_scc.py …    # four GPUs share the scoring; the first one trains

If it is stopped, run the same command again; it goes on. With other thresholds only the correction
runs again.

The paper does not state its optimizer and network. Its recipe takes those of the released code,
with plain cross-entropy. Ours are: whole images at half size, four an iteration; features at stride
16 (layer 4 dilated); batch statistics in training, running ones in scoring; masks averaged over the
cells of the features.

Needs when copied away: dataset/{scc,scc_report}.py, model/{resnet,scc}.py,
util/{charts,labels,options,outputs,page,pictures,run}.py.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn import functional as F

from dataset.scc import (
    Job,
    batches_per_epoch,
    cut_patch,
    image_batches,
    make_index,
    mask_shares,
    patch_batches,
)
from dataset.scc_report import write_connectivities, write_report
from model.resnet import BLOCKS, STEMS, load_backbone
from model.scc import (
    EPOCHS,
    LABEL_SMOOTHING,
    NoiseModel,
    decayed,
    decide,
    default_iterations,
    filter_connectivities,
    gradients,
    logits_of,
    make_classifier,
    make_optimizer,
    noise_posterior,
    within_memory,
)
from util.labels import IGNORE, check_files, check_pairs, write_classes, write_label, write_list
from util.options import (
    Bounds,
    ClassOptions,
    Count,
    CountFrom0,
    List,
    ListOptions,
    Pixels,
    Positive,
    RunOptions,
    Setting,
    Share,
    parse_options,
    settings_of,
)
from util.outputs import Outputs, atomic_path, check_writable, made_from, read_json, write_json
from util.run import (
    UserError,
    ahead,
    exact_mode,
    manifest,
    process_group,
    process_rank,
    progress,
    run_main,
    seed_everything,
    select_device,
    sha256,
    wait_for_all,
)

SAVE_SECONDS = 60  # between checkpoints of the training (ours)
RECENT = 20  # iterations whose mean loss is told at the end


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


# ---------------------------------------------------------------------------------------------- SCC


def correct(job: Job, device: torch.device) -> None:
    """Train the classifier, score every connectivity, judge and correct them; or the one of the
    three that --stage names. What is there already is not made again.
    """
    out, stage, rank = job.out, job.options.stage, process_rank()[0]
    checkpoint, record = out / "checkpoint.pth", out / "run.json"
    if stage in ("all", "train") and rank == 0 and not checkpoint.is_file():
        for path in (out / "scores").glob("*.npz"):  # of a classifier that is gone
            path.unlink()
        train(job, device)
    wait_for_all()
    if stage in ("all", "score"):
        if not checkpoint.is_file():
            raise UserError(f"{checkpoint}: no such file; run --stage train first")
        score(job, device)
    wait_for_all()
    if rank > 0:
        return
    before, decided = read_json(record) if record.is_file() else {}, {}
    if stage in ("all", "correct"):
        if not all(job.score_path(image).is_file() for image in range(len(job.rows))):
            raise UserError(f"{out / 'scores'}: not all images are scored; run --stage score first")
        decided = {"made_from": decided_by(job)}
        if corrected_before(job, before.get("made_from"), decided["made_from"]):
            print(f"{out}: corrected before; list: {job.list_path}")
            return
        verdicts = RECIPES[job.options.recipe].judge(job, *job.scores())
        pixels = write_labels(job, verdicts)
        loss = torch.load(checkpoint, map_location="cpu", weights_only=True).get("loss")
        write_report(job, verdicts, pixels, loss)
        print(f"labels: {out}\nlist: {job.list_path}\nreport: {out / 'report/index.html'}")
    seconds = before.get("cost", {}).get("seconds", 0)
    write_json(record, manifest(vars(job.options), device, seconds) | decided)


def corrected_before(job: Job, old: dict | None, now: dict) -> bool:
    """Whether all results are there, made as now. Says so where those of other thresholds are to
    be replaced. old, now: what `decided_by` gives.
    """
    results = [job.list_path, job.out / "connectivities.csv", job.out / "report/index.html"]
    results += [job.root / label for _, label in job.results]
    if not old or not all(path.is_file() for path in results):
        return False
    changed = [n for n, value in old["settings"].items() if value != now["settings"].get(n)]
    if changed:
        other = ", ".join(f"--{name} {old['settings'][name]}" for name in changed)
        print(f"the labels of {other} are replaced; --exp NAME would keep both")
    return old == now


def corrected_label(numbers: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The label map uint8 H x W in which every connectivity has its final class.

    numbers: int32 H x W, what `numbered` gives; final: uint8, a class or IGNORE per number.
    """
    return np.append(final, np.uint8(IGNORE))[numbers]  # the last entry serves number -1


# ------------------------------------------------------------------------------- the release recipe


class Release:
    """The released code: patches of connectivities, thresholds by rank of the losses."""

    suffix, batch_size, smoothing = "scc", 64, LABEL_SMOOTHING
    not_used = ("scale",)  # of the settings

    batches, read = staticmethod(patch_batches), Job.read

    @staticmethod
    def inputs(job: Job, image: int, read: tuple, pool: ThreadPoolExecutor) -> Iterator[tuple]:
        """Of image i, in parts: (places of connectivities among its own, what `logits_of` takes of
        them). read: what `read` gave; `pool` cuts the patches. Batches never span images, so the
        numbers do not depend on which process scores which image.
        """
        (picture, numbers), rows, size = read, job.of_image(image), job.options.batch_size
        judged = np.flatnonzero(job.judged[job.part(image)])
        for start in range(0, len(judged), size):
            places = judged[start : start + size]
            cut = pool.map(
                lambda row: cut_patch(picture, numbers, row, job.options.patch_size), rows[places]
            )
            patches, masks = (torch.from_numpy(np.stack(x)) for x in zip(*cut))
            yield places, patches, masks[:, None]

    @staticmethod
    def judge(job: Job, loss, score, predicted) -> Verdicts:
        """The decision on every connectivity (loss, score float64 N, predicted uint8 N).

        Those under --min-area have the loss NaN: they are dropped and have no part in the
        thresholds.
        """
        options, classes = job.options, job.index["class_id"]
        kept, thresholds = filter_connectivities(
            loss, score, predicted, options.filter, options.quantile
        )
        decision = np.where(kept, np.where(predicted == classes, "kept", "corrected"), "dropped")
        final = np.where(kept, predicted, IGNORE).astype(np.uint8)
        eta = np.full(len(loss), np.nan)
        return Verdicts(loss, score, predicted, eta, decision, final, None, thresholds)


# --------------------------------------------------------------------------------- the paper recipe


class Paper:
    """The paper: features of whole images, a mixture of two Gaussians over the losses."""

    suffix, batch_size, smoothing = "scc_paper", 4, 0.0
    not_used = ("patch_size",)

    batches, read = staticmethod(image_batches), Job.scaled

    @staticmethod
    def inputs(job: Job, image: int, read: tuple, pool: ThreadPoolExecutor) -> Iterator[tuple]:
        """As `Release.inputs`; one pass over the image serves all its connectivities."""
        (picture, numbers), judged = read, job.judged[job.part(image)]
        if judged.any():
            shares = [mask_shares(numbers, len(judged), picture.shape[:2])]
            yield slice(None), torch.from_numpy(picture)[None], shares

    @staticmethod
    def judge(job: Job, loss, score, predicted) -> Verdicts:
        options, classes = job.options, job.index["class_id"]
        noise = noise_posterior(loss[job.judged], options.seed)
        eta = np.ones(len(loss))
        eta[job.judged] = noise.eta
        decision, final = decide(eta, score, predicted, classes, options.tau_ns, options.tau_cr)
        thresholds = {"tau_ns": options.tau_ns, "tau_cr": options.tau_cr}
        return Verdicts(loss, score, predicted, eta, decision, final, noise, thresholds)


RECIPES = {"release": Release, "paper": Paper}

# --------------------------------------------------------------------------- training and scoring


def train(job: Job, device: torch.device) -> None:
    """Train the classifier and leave `checkpoint.pth`; goes on from `training.pth`."""
    options, stopped = job.options, job.out / "training.pth"
    seed_everything(options.seed)
    model = make_classifier(options, job.classes.count, device)
    load_backbone(model.backbone, options.backbone_weights)
    optimizer = make_optimizer(model, options.lr)
    base, done = [group["lr"] for group in optimizer.param_groups], 0
    recent = deque(maxlen=RECENT)
    if stopped.is_file():
        state = torch.load(stopped, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["iteration"]
        recent.extend(state["losses"])
        print(f"training goes on at iteration {done}")
    model.train()
    recipe, amp = RECIPES[options.recipe], options.amp == "bf16"
    batches = recipe.batches(job, done, options.iterations)
    total, saved = EPOCHS * batches_per_epoch(job), time.monotonic()

    def save(path: Path, **state) -> None:
        with atomic_path(path) as temporary:
            torch.save({"model": model.state_dict(), **state}, temporary)

    bar = progress(batches, "SCC training", options.iterations, "it", initial=done)
    for t, batch in enumerate(bar, start=done + 1):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = decayed(lr, t, total)
        optimizer.zero_grad()
        loss = within_memory(model, lambda: gradients(model, batch, device, amp, recipe.smoothing))
        if not math.isfinite(loss):
            stopped.unlink(missing_ok=True)
            raise UserError(
                f"--lr {options.lr}: SCC's loss is not finite at iteration {t}; give a smaller one"
            )
        optimizer.step()
        recent.append(loss)
        if t % 20 == 0:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(stopped, optimizer=optimizer.state_dict(), iteration=t, losses=list(recent))
            saved = time.monotonic()
    loss = sum(recent) / max(len(recent), 1)
    save(job.out / "checkpoint.pth", iteration=options.iterations, loss=loss)
    stopped.unlink(missing_ok=True)


@torch.inference_mode()
def score_image(
    model, job: Job, image: int, read: tuple, device: torch.device, pool: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """{"loss", "score", "predicted"} of image i's connectivities: cross-entropy against the label
    (float64), largest probability (float64), its class (uint8).

    Those not judged have NaN, 0 and their label. read: what the recipe's `read` gives.
    """
    options, labels = job.options, job.of_image(image)["class_id"]
    judged, logits = job.judged[job.part(image)], torch.zeros(len(labels), job.classes.count)
    for places, images, masks in RECIPES[options.recipe].inputs(job, image, read, pool):
        logits[places] = logits_of(model, images, masks, device, options.amp == "bf16").cpu()
    logits = logits[judged].double()
    loss, score, predicted = np.full(len(labels), np.nan), np.zeros(len(labels)), labels.copy()
    classes = torch.from_numpy(labels[judged].astype(np.int64))
    loss[judged] = F.cross_entropy(logits, classes, reduction="none").numpy()
    score[judged], predicted[judged] = (x.numpy() for x in logits.softmax(dim=1).max(dim=1))
    return {"loss": loss, "score": score, "predicted": predicted}


def score(job: Job, device: torch.device) -> None:
    """Scores of this process's images to scores/; those that exist are left."""
    rank, world = process_rank()
    todo = [i for i in range(rank, len(job.rows), world) if not job.score_path(i).is_file()]
    if not todo:
        return
    model = make_classifier(job.options, job.classes.count, device)
    state = torch.load(job.out / "checkpoint.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    model.eval()
    recipe, count = RECIPES[job.options.recipe], job.options.workers
    with ThreadPoolExecutor(count) as readers, ThreadPoolExecutor(count) as cutters:
        coming = ahead(readers, lambda image: recipe.read(job, image), todo, count)
        for image, content in progress(zip(todo, coming), "SCC scoring", len(todo)):
            scores = score_image(model, job, image, content, device, cutters)
            with atomic_path(job.score_path(image)) as temporary, open(temporary, "wb") as file:
                np.savez(file, **scores)


# ------------------------------------------------------------------------------------------ results


def write_labels(job: Job, verdicts: Verdicts) -> int:
    """Write the corrected labels, connectivities.csv and the list of the labels; the number of
    their pixels.
    """
    table = job.out / "connectivities.csv"
    # Labels of other thresholds may be there; while they are replaced nothing may list them.
    for path in (job.list_path, table, job.out / "run.json"):
        path.unlink(missing_ok=True)

    def write(image: int) -> int:
        label = corrected_label(job.numbers(image), verdicts.final[job.part(image)])
        write_label(job.root / job.results[image][1], label, job.classes.palette)
        return label.size

    count = len(job.rows)
    with ThreadPoolExecutor() as pool:
        pixels = sum(progress(pool.map(write, range(count)), "SCC correction", count))
    write_connectivities(table, job, verdicts)
    write_list(job.list_path, job.results)
    return pixels


def decided_by(job: Job) -> dict:
    """What decisions and report depend on, beside the scores."""
    options = job.options
    names = ("filter", "quantile", "tau_ns", "tau_cr", "stuff", "things", "vis")
    files = {"ground truth list": options.gt} if options.gt else {}
    files |= {truth: job.root / truth for truth in (job.truth or {}).values()}
    return made_from({name: getattr(options, name) for name in names}, files)


# ------------------------------------------------------------------------------------------ options


@dataclass(kw_only=True)
class Options(ListOptions, ClassOptions, RunOptions):
    """SCC"""

    recipe: Setting[Literal["release", "paper"]] = "release"
    "what the released code does, or what the paper says"
    filter: Literal["both_loss", "loss", "score"] = "both_loss"
    "release: what drops a connectivity"
    quantile: Share = 0.5
    "release: of the losses or scores of a class, its threshold, 0 to 1"
    tau_ns: Share = 0.60
    "paper: noise threshold; from this eta on a connectivity is noisy, 0 to 1"
    tau_cr: Share = 0.95
    "paper: correction threshold; above this probability a noisy one gets the predicted class, 0"
    "to 1"
    min_area: Setting[Pixels] = 1
    "smaller connectivities lose their label unseen: slivers where SAM's masks meet are mostly"
    "mislabeled and can be half of what is learned from; the released code has a limit of 100,"
    "commented out; 1: all are judged"
    backbone: Setting[Literal[tuple(f"resnet{depth}" for depth in BLOCKS)]] = "resnet101"
    "the residual network"
    stem: Setting[Literal[tuple(STEMS)]] = "torchvision"
    "first layers of the backbone; torchvision's for ImageNet weights"
    backbone_weights: Annotated[str, "imagenet|none|FILE"] = "imagenet"
    "torchvision's ImageNet weights, none, or a file: a backbone or a segmentation checkpoint"
    patch_size: Setting[Annotated[tuple[int, int], Bounds(least=32), "H W"]] = (256, 512)
    "release: pixels of a connectivity's patch, even"
    scale: Setting[Positive] = 0.5
    "paper: size of the images that the features are taken of, over the label maps'"
    iterations: Setting[Count | None] = None
    "where the training stops, before it learns the noise; the authors: 5000 (GTA and the paper),"
    "10000 (SYNTHIA), 50000 (BDD100K). The learning rate decays over 20 epochs, whatever N is"
    "(default: 5000 from 2,975 images on, in proportion for fewer, 1000 at least)"
    batch_size: Setting[Count | None] = None
    "connectivities (release, default 64) or whole images (paper, default 4, ours) an iteration; 64"
    "take about 24 GB, or 12 GB where a GPU has less (slower, same result)"
    lr: Setting[Positive] = 0.01
    "learning rate of the classifier; the backbone's is a tenth"
    amp: Setting[Literal["none", "bf16"]] = "none"
    "bf16 is faster; none is exact fp32"
    exp: str | None = None
    "name of the result, so that two recipes or thresholds stand side by side (default:"
    "<experiment>_scc, with `--recipe paper` <experiment>_scc_paper)"
    stage: Literal["all", "train", "score", "correct"] = "all"
    "one stage of the three; the earlier ones must have run"
    workers: Count = 4
    "threads that read images ahead, 1 or more; results do not depend on it"
    vis: CountFrom0 = 8
    "images in the report"
    gt: List | None = None
    "list `<image path> <ground-truth path>`: adds purity, accuracy and AUROC to the report,"
    "changes nothing else"


def parse_args(argv: list[str] | None = None) -> Options:
    options = parse_options(Options, __doc__, argv)
    if options.batch_size is None:
        options.batch_size = RECIPES[options.recipe].batch_size
    if any(side % 2 for side in options.patch_size):
        height, width = options.patch_size
        raise UserError(f"--patch-size {height} {width}: give even numbers from 32 up")
    weights = options.backbone_weights
    if weights not in ("imagenet", "none") and not Path(weights).is_file():
        raise UserError(
            f"{weights}: no such file; --backbone-weights is imagenet, none or a .pth file"
        )
    return options


def settings_of_scores(options: Options) -> dict:
    """What scores depend on. Thresholds are not among it: they may change at will."""
    settings = settings_of(options)
    for name in RECIPES[options.recipe].not_used:
        del settings[name]
    weights = options.backbone_weights
    settings["backbone_weights"] = sha256(weights) if Path(weights).is_file() else weights
    return settings


def prepare(job: Job, out: Outputs) -> None:
    """All checks that open files; leaves settings, inputs and index.npz."""
    root, folder, options = job.root, job.out, job.options
    names = [name for row in job.rows for name in row]
    check_files(root, names, options.id_list_path)
    begun = any(any(folder.glob(name)) for name in ("*.pth", "scores/*.npz"))
    out.accept(settings_of_scores(options), {name: root / name for name in names}, begun)
    if not begun or not (folder / "index.npz").is_file():
        make_index(job)
    job.read_index()
    if not job.judged.any():
        raise UserError(
            f"{options.id_list_path}: its label maps have no connectivity of --min-area"
            f" {options.min_area} pixels; give fewer, or check --root-path and the list"
        )
    if job.truth:
        pairs = [(label, job.truth[image]) for image, label in job.rows]
        check_pairs(root, pairs, options.gt, job.classes.count, same_size=True)


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    job = Job(options, RECIPES[options.recipe].suffix)
    options.iterations = options.iterations or default_iterations(len(job.rows))
    device = select_device(options.device)
    if options.amp == "none":
        exact_mode()
    check_writable(job.list_path.parent)
    with Outputs(job.out) as out, process_group(torch.device("cpu")) as (rank, _):
        if rank == 0:
            prepare(job, out)
            write_classes(job.out, job.classes)
        wait_for_all()
        job.read_index()
        correct(job, device)


if __name__ == "__main__":
    sys.exit(run_main(main, "use --amp bf16, or a smaller --batch-size (other results)"))
