"""SCC's two connectivity classifiers, of patches (released code) and of pooled features (paper),
how they are trained, and the two rules that tell noisy labels by the losses: thresholds by rank
(released code) and a mixture of two Gaussians (paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn import functional as F

from model.resnet import ResNet, normalised
from util.labels import IGNORE

# Released code.
ITERATIONS, AUTHORS_IMAGES = 5000, 2975  # on Cityscapes
EPOCHS = 20  # T of the learning rate's decay
DECAY, POWER = 10, 0.75  # learning rate x (1 + DECAY t / T) ^ -POWER
BACKBONE_FACTOR = 0.1  # the backbone's learning rate over the classifier's
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 1e-3, 0.1
# Ours, where paper and released code are silent.
LEAST_ITERATIONS = 1000
MIN_CONNECTIVITIES = 50  # fewer losses than this are no basis for a mixture
MIN_SEPARATION = 1.0  # least distance of the mixture's means, in root mean square deviations


class Classifier(nn.Module):
    """A ResNet and a K-way linear layer, which starts from Xavier's normal weights and torch's
    default bias (released code).
    """

    dilate_last = False

    def __init__(self, depth: int, stem: str, class_num: int):
        super().__init__()
        self.backbone = ResNet(depth, stem, dilate_last=self.dilate_last)
        self.classifier = nn.Linear(self.backbone.channels[-1], class_num)
        nn.init.xavier_normal_(self.classifier.weight)


class PatchClassifier(Classifier):
    """release: sees one connectivity in a patch (stride 32). The mask multiplies the activations
    after the first convolution, batch norm and ReLU; the pooling at the end is over the whole
    patch.
    """

    def forward(self, patches: Tensor, masks: Tensor) -> Tensor:
        """Normalised patches B x 3 x h x w, masks B x 1 x h/2 x w/2 of 0 and 1 → logits B x K."""
        stem = self.backbone.forward_stem(patches)
        features = self.backbone.forward_from_stem(stem * masks.to(stem.dtype))[-1]
        return self.classifier(features.mean(dim=(2, 3)).to(self.classifier.weight.dtype))


class PooledClassifier(Classifier):
    """paper: the features F(x) of whole images (stride 16), averaged over each connectivity's
    mask.
    """

    dilate_last = True

    def forward(self, images: Tensor, shares: list[Tensor]) -> Tensor:
        """Normalised images B x 3 x H x W → logits N x K of all their connectivities, image by
        image. shares: of each image, what dataset.scc.mask_shares gives.

        Features are averaged by a matrix product: gathered cells would be summed in a changing
        order when that is differentiated, with several threads or on a GPU.
        """
        features = self.backbone(images)[-1].float()  # F(x), B x C x H/16 x W/16
        features = features.flatten(2).transpose(1, 2)
        pooled = [share.to(f.device) @ f for f, share in zip(features, shares)]
        return self.classifier(torch.cat(pooled))


# ------------------------------------------------------------------------- how they are trained


def make_classifier(options, class_num: int, device: torch.device) -> nn.Module:
    """The classifier of a recipe on its device. options: those of seco_scc.py."""
    kind = PatchClassifier if options.recipe == "release" else PooledClassifier
    model = kind(int(options.backbone.removeprefix("resnet")), options.stem, class_num)
    if options.amp == "bf16":
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def logits_of(model, images: torch.Tensor, masks, device: torch.device, amp: bool) -> torch.Tensor:
    """The classifier on uint8 images or patches B x h x w x 3.

    masks: of patches, uint8 B x 1 x h/2 x w/2; of whole images, a list of what `mask_shares` gives.
    """
    masks = masks.to(device) if torch.is_tensor(masks) else masks
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return model(normalised(images.to(device)), masks).float()


def default_iterations(images: int) -> int:
    """The authors' 5000 for as many images as they had, in proportion for fewer. LEAST_ITERATIONS:
    a classifier that starts from random weights needs them whatever the set's size is (12
    photographs: labels of 79.8 % became 51.0 with 60).
    """
    return min(ITERATIONS, max(LEAST_ITERATIONS, round(ITERATIONS * images / AUTHORS_IMAGES)))


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


def gradients(model, batch, device: torch.device, amp: bool, smoothing: float) -> float:
    """The loss of a training batch, whose gradients are added to the model's.

    batch: images, masks or shares, and classes (int64 N, IGNORE: not learned from).
    """
    images, masks, classes = batch
    logits = logits_of(model, images, masks, device, amp)
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


# ---------------------------------------------------------------------- release: the thresholds


def filter_connectivities(
    loss: np.ndarray, score: np.ndarray, predicted: np.ndarray, rule: str, quantile: float
) -> tuple[np.ndarray, dict]:
    """Which connectivities are kept (bool N), and the thresholds (released code).

    loss, score: float64 N; predicted: int N. A predicted class's threshold is the quantile q of its
    connectivities' losses, or 1 - q of their scores, that is sorted[min(int(n q), n - 1)]. The
    global threshold is the mean of these over all connectivities. A connectivity is dropped by rule
    - "both_loss": if its loss exceeds both thresholds;
    - "loss" (the release's local_loss): if its loss exceeds its class's;
    - "score" (local_score): if its score is below its class's.
    Ours: one whose loss or score is not finite is dropped and has no part in the thresholds.
    """
    values, share = (score, 1 - quantile) if rule == "score" else (loss, quantile)
    finite = np.isfinite(loss) & np.isfinite(score)
    if not finite.any():
        return finite, {"per_class": {}, "global": None}
    per_class, local = {}, np.full(len(loss), np.nan)
    for c in np.unique(predicted[finite]):
        ranked = np.sort(values[finite & (predicted == c)])
        per_class[int(c)] = float(ranked[min(int(len(ranked) * share), len(ranked) - 1)])
        local[predicted == c] = per_class[int(c)]
    overall = float(local[finite].mean())
    kept = {
        "both_loss": (loss <= local) | (loss <= overall),
        "loss": loss <= local,
        "score": score >= local,
    }[rule]
    return kept & finite, {"per_class": per_class, "global": overall}


# ---------------------------------------------------------------------- paper: the noise model


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
    values, eta = loss[finite], np.where(finite, 0.0, 1.0)
    if len(values) < MIN_CONNECTIVITIES or np.ptp(values) < 1e-9:
        few = f"{len(values)} finite losses are fewer than {MIN_CONNECTIVITIES}, or all are equal"
        return NoiseModel(eta, fallback=f"{few}: no mixture is fitted, the labels are kept")
    low, high = float(values.min()), float(values.max())
    x = ((values - low) / (high - low))[:, None]
    single, mixture = (
        GaussianMixture(k, tol=1e-4, max_iter=200, reg_covar=5e-4, random_state=seed).fit(x)
        for k in (1, 2)
    )
    order = mixture.means_[:, 0].argsort()
    means, variances = mixture.means_[order, 0], mixture.covariances_[order, 0, 0]
    at_clean_mean = float(mixture.predict_proba(means[:1, None])[0, order[1]])
    distance, why = np.diff(means)[0] / np.sqrt(variances.mean()), None
    if single.bic(x) <= mixture.bic(x) or distance < MIN_SEPARATION or at_clean_mean >= 0.5:
        why = (
            f"the mixture's components do not separate (means {means[0]:.3f} and {means[1]:.3f},"
            f" {distance:.2f} deviations apart): the labels are kept"
        )
    else:
        posterior = mixture.predict_proba(x)[:, order[1]]
        # Below the clean mean a wide noisy component would take over again.
        below = x[:, 0] < means[0]
        eta[finite] = np.where(below, np.minimum(posterior, at_clean_mean), posterior)
    found = (means, np.sqrt(variances), mixture.weights_[order])
    return NoiseModel(eta, low, high, *(tuple(pair.tolist()) for pair in found), why)


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
