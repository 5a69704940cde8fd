"""The losses of UniMatch's released code, and a class-balanced one."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from util.labels import IGNORE

# UniMatch's configuration: probability of the true class; pixels of two crops of 801 x 801.
OHEM_THRESHOLD, OHEM_MIN_KEPT = 0.7, 200_000


def ohem_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float, min_kept: int
) -> torch.Tensor:
    """Mean cross-entropy over the hard pixels (online hard example mining).

    logits: B x K x H x W; labels: B x H x W integers, IGNORE for no label. With fewer than
    `min_kept` labeled pixels all of them count. Otherwise those count whose probability p of the
    true class is at most t: t is `threshold`, or, where that would keep fewer than `min_kept`, the
    `min_kept`-th smallest p (ties are kept). Without any label 0 (the released code: NaN).
    """
    labels = labels.long()
    losses = cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    labeled = labels != IGNORE
    count = int(labeled.sum())
    if count == 0:
        return (logits * 0).sum()
    if count < min_kept:
        return losses.sum() / count
    probability = torch.where(labeled, torch.exp(-losses.detach()), 1.0)
    limit = threshold
    if int((labeled & (probability <= threshold)).sum()) < min_kept:
        limit = probability.flatten().kthvalue(min_kept).values
    kept = labeled & (probability <= limit)
    return (losses * kept).sum() / kept.sum()


def class_weights(pixel_counts, power: float) -> torch.Tensor:
    """Weights of K classes, float32, of their K numbers of labeled pixels: frequency^-power, 0 for
    a class without a pixel, scaled so that the labels' mean weight is 1 (ENet's and others').
    """
    frequency = torch.as_tensor(pixel_counts, dtype=torch.float64)
    frequency = frequency / frequency.sum()
    weights = torch.where(frequency > 0, frequency.clamp(min=1e-12) ** -power, 0.0)
    return (weights / (weights * frequency).sum()).float()


def balanced_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of all labeled pixels, weighted by their class, over the sum of the weights; 0
    without any. Not UniMatch's: for training from few images.

    logits: B x K x H x W; labels: B x H x W integers, IGNORE for no label; weights: K.
    """
    if not bool((labels != IGNORE).any()):
        return (logits * 0).sum()
    return cross_entropy(logits.float(), labels.long(), weight=weights, ignore_index=IGNORE)


def pseudo_label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    confidence: torch.Tensor,
    ignored: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Cross-entropy with pseudo-labels, summed over confident valid pixels, divided by the number
    of *valid* pixels.

    logits: B x K x H x W; labels, confidence: B x H x W, of the model itself; ignored: bool B x H x
    W, true on padding.
    """
    losses = cross_entropy(logits.float(), labels.long(), reduction="none")
    kept = (confidence >= threshold) & ~ignored
    return (losses * kept).sum() / (~ignored).sum().clamp(min=1)


def total_loss(loss_x, loss_s1, loss_s2, loss_fp):
    """UniMatch's weights: (x + 0.5 s + 0.5 w_fp) / 2 with s = (s1 + s2) / 2, as all rows of the
    shipped logs are.
    """
    return (loss_x + 0.25 * loss_s1 + 0.25 * loss_s2 + 0.5 * loss_fp) / 2


def mean_over_groups(loss, group: int, *tensors: torch.Tensor) -> torch.Tensor:
    """The mean of loss(part of each tensor) over parts of `group` samples."""
    parts = zip(*(tensor.split(group) for tensor in tensors))
    return torch.stack([loss(*part) for part in parts]).mean()


def with_confidence(logits: torch.Tensor) -> dict:
    """Pseudo-labels of logits (B x K x S x S), detached: label and confidence, B x S x S."""
    confidence, label = logits.detach().float().softmax(dim=1).max(dim=1)
    return {"label": label, "confidence": confidence}
