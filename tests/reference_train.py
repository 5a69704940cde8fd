"""UniMatch's step written as its released code words it: perturbed features of all images decoded,
classified and upsampled; pseudo-labels of all images to paste from; targets copied pixel by pixel
through masks; OHEM by sorting.

Slow and obvious; tests compare train_unimatch.py's losses and gradients with it,
scripts/dev/bench.py measures against it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dataset.augment import cutmix_box
from model.resnet import normalised
from util.labels import IGNORE


def ohem_by_sorting(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float, min_kept: int
) -> torch.Tensor:
    """OHEM as the released code words it: sort the true classes' probabilities, take the
    min_kept-th as least threshold.
    """
    labels = labels.long()
    valid = labels != IGNORE
    losses = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if valid.sum() == 0:
        return (logits * 0).sum()
    if valid.sum() < min_kept:
        return losses[valid].mean()
    of_true_class = logits.softmax(dim=1).gather(1, labels.masked_fill(~valid, 0)[:, None])[:, 0]
    of_true_class = of_true_class.masked_fill(~valid, 1.0)
    ranked = of_true_class.flatten().sort().values
    limit = max(threshold, ranked[min(ranked.numel(), min_kept) - 1].item())
    return losses[valid & (of_true_class <= limit)].mean()


def plain_losses(model, batch: dict, factors, args, group: int) -> dict[str, torch.Tensor]:
    """All losses of one iteration in the most literal way; images of `batch` as
    train_unimatch.Trainer gets them.
    """
    device = next(model.parameters()).device
    x, w, w_mix, s1, s2 = (
        normalised(batch[name].to(device)).contiguous() for name in ("x", "w", "w_mix", "s1", "s2")
    )
    mask_x, box1, box2, ignore, ignore_mix = (
        batch[name].to(device) for name in ("mask_x", "box1", "box2", "ignore", "ignore_mix")
    )
    model.eval()
    with torch.no_grad():
        conf_mix, label_mix = model(w_mix).softmax(dim=1).max(dim=1)
    model.train()
    clean, perturbed = model(torch.cat([x, w]), tuple(f.to(device) for f in factors), fp_from=0)
    pred_x, pred_w = clean.chunk(2)
    pred_fp = perturbed.chunk(2)[1]
    pred_s1, pred_s2 = model(torch.cat([s1, s2])).chunk(2)
    conf_w, label_w = pred_w.detach().softmax(dim=1).max(dim=1)

    def consistency(pred, box):
        label, conf, ignored = label_w.clone(), conf_w.clone(), ignore.clone()
        if box is not None:
            label[box], conf[box], ignored[box] = label_mix[box], conf_mix[box], ignore_mix[box]
        means = []
        for start in range(0, len(pred), group):
            part = slice(start, start + group)
            losses = cross_entropy(pred[part], label[part], reduction="none")
            kept = (conf[part] >= args.conf_thresh) & ~ignored[part]
            means.append((losses * kept).sum() / (~ignored[part]).sum())
        return sum(means) / len(means)

    ohem = [
        ohem_by_sorting(p, m, args.ohem_threshold, args.min_kept)
        for p, m in zip(pred_x.split(group), mask_x.split(group))
    ]
    loss_x, loss_s1, loss_s2, loss_fp = (
        sum(ohem) / len(ohem),
        consistency(pred_s1, box1),
        consistency(pred_s2, box2),
        consistency(pred_fp, None),
    )
    return {
        "loss_all": (loss_x + loss_s1 * 0.25 + loss_s2 * 0.25 + loss_fp * 0.5) / 2,
        "loss_x": loss_x,
        "loss_s": (loss_s1 + loss_s2) / 2,
        "loss_w_fp": loss_fp,
    }


def random_batch(batch: int, size: int, class_num: int, seed: int) -> dict[str, torch.Tensor]:
    """What dataset.samples makes, of noise: a tenth of the labels missing, padding at the right of
    some crops.
    """
    random = np.random.default_rng(seed)
    views = {
        name: random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        for name in ("x", "w", "w_mix", "s1", "s2")
    }
    labels = random.integers(0, class_num, (batch, size, size), dtype=np.uint8)
    labels[random.random(labels.shape) < 0.1] = IGNORE
    ignore = np.zeros((2, batch, size, size), dtype=bool)
    ignore[:, ::2, :, size - size // 4 :] = True
    boxes = {f"box{n}": np.stack([cutmix_box(random, size) for _ in range(batch)]) for n in (1, 2)}
    arrays = {**views, "mask_x": labels, "ignore": ignore[0], "ignore_mix": ignore[1], **boxes}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}
