"""What DeepLabV3+ is trained with: precision, starting weights, optimizer and its schedule, feature
perturbation; where a run stands; and several processes that train one network."""

from __future__ import annotations

import inspect
import time

import numpy as np
import torch
from torch import nn

from model.checkpoint import load_exactly, read_checkpoint, state_dict_in
from model.deeplabv3plus import DILATIONS, DeepLabV3Plus, channel_dropout
from model.resnet import load_backbone
from util.run import STARTED, exact_mode, process_rank, seed_everything

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # SGD without Nesterov; batch norm and biases decay too
POLY_POWER = 0.9
FACTORS = 4  # stream of random numbers, after those of dataset/samples.py


class State:
    """Where a run stands: the next iteration, best mIoU, sums of the running epoch's losses; the
    metrics of every evaluation and the mean loss, by epoch; seconds of the starts before this one.
    """

    def __init__(self):
        self.iteration, self.best, self.best_epoch, self.sums = 0, 0.0, -1, {}
        self.evaluations, self.losses, self.seconds = {}, {}, 0.0

    def saved(self) -> dict:
        return vars(self) | {"seconds": self.seconds + time.time() - STARTED}

    def restore(self, saved: dict) -> None:
        vars(self).update(saved)


def set_precision(args) -> None:
    """Exact fp32, unless train_unimatch.py's --amp and --compile ask for what is faster."""
    exact_mode()
    if args.amp != "none" or args.compile:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    if args.amp == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def build_model(args, class_num: int) -> DeepLabV3Plus:
    """DeepLabV3+ with the starting weights that train_unimatch.py's options name, the rest drawn
    from --seed.
    """
    seed_everything(args.seed)
    depth = int(args.backbone.removeprefix("resnet"))
    model = DeepLabV3Plus(depth, class_num, args.stem, DILATIONS)
    if args.init_checkpoint:
        state = state_dict_in(read_checkpoint(args.init_checkpoint), args.init_checkpoint)
        wanted = f"DeepLabV3+ with {args.backbone} ({args.stem} stem), {class_num} classes"
        load_exactly(model, state, args.init_checkpoint, wanted)
    else:
        load_backbone(model.backbone, args.backbone_weights)
    return model


def optimizer_of(
    model: DeepLabV3Plus, kind: str, lr: float, lr_multi: float
) -> torch.optim.Optimizer:
    """UniMatch's SGD, or AdamW (kind "sgd", "adamw"): group 0 the backbone at `lr`, group 1 the
    rest at `lr_multi` times that.
    """
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"params": list(model.backbone.parameters()), "lr": lr},
        {"params": rest, "lr": lr * lr_multi},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def learning_rate(iteration: int, total: int, base: float) -> float:
    """Learning rate of training step `iteration` (from 0) of `total`: poly, one step late, as in
    the shipped logs.

    UniMatch sets lr0 (1 - it / total)^0.9 *after* step `it`, so that steps 0 and 1 both use lr0.
    """
    return base * (1 - max(iteration - 1, 0) / total) ** POLY_POWER


def perturbation_factors(seed: int, iteration: int, global_batch: int, channels: tuple[int, int]):
    """Channel factors of an iteration's feature perturbation, drawn for the whole global batch, so
    that they do not depend on its distribution: a pair (c1, c4) of tensors 2 x G x C x 1 x 1,
    [labeled, unlabeled].
    """
    state = np.random.SeedSequence((seed, FACTORS, iteration)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) >> 1)
    return tuple(
        channel_dropout(generator, 2 * global_batch, c).view(2, global_batch, c, 1, 1)
        for c in channels
    )


# -------------------------------------------------------------------------------- several processes


def to_device(model: nn.Module, device, channels_last: bool) -> nn.Module:
    """The model on its device; on several GPUs batch norm sees the samples of all of them."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    model = model.to(device, memory_format=layout)
    if process_rank()[1] > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def distributed(model: nn.Module, device) -> nn.Module:
    """The model, whose gradients are averaged over processes if there are several.

    Buffers are not broadcast: `average_running_statistics` and synchronised batch norm keep them
    equal. Newer versions of torch name that option otherwise.
    """
    if process_rank()[1] == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters
    return ddp(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        **{"forward_sync_buffers" if new else "broadcast_buffers": False},
    )


def average_running_statistics(model: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics of batch norm, which only
    GPUs synchronise by themselves: what process 0 saves and what each evaluates or pastes with are
    then the same.
    """
    if process_rank()[1] == 1:
        return
    import torch.distributed as dist

    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    together = torch.cat([buffer.flatten() for buffer in running])
    dist.all_reduce(together)
    together /= process_rank()[1]
    for buffer, values in zip(running, together.split([buffer.numel() for buffer in running])):
        buffer.copy_(values.view_as(buffer))


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    stacked = torch.stack(list(values.values())).float()
    if process_rank()[1] > 1:
        import torch.distributed as dist

        dist.all_reduce(stacked)
        stacked /= process_rank()[1]
    return dict(zip(values, stacked.tolist()))
