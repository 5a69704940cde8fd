"""What DeepLabV3+ is trained with: starting weights, optimizer and its schedule, feature
perturbation; several processes. args: options of train_unimatch.py."""

from __future__ import annotations

import inspect

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.deeplabv3plus import DeepLabV3Plus
from model.resnet import load_backbone, load_exactly, read_checkpoint, state_dict_in
from util.run import exact_mode, process_rank, seed_everything

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # SGD without Nesterov; batch norm and biases decay too
POLY_POWER = 0.9
FEATURE_DROPOUT = 0.5  # share of channels that are dropped (UniMatch, section 3.2)
FACTORS = 4  # stream of random numbers, after those of dataset/samples.py


def set_precision(args) -> None:
    """Exact fp32, unless --amp and --compile ask for what is faster."""
    exact_mode()
    if args.amp != "none" or args.compile:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    if args.amp == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def build_model(args, class_num: int) -> DeepLabV3Plus:
    """DeepLabV3+ with the starting weights that the options name, the rest drawn from --seed."""
    seed_everything(args.seed)
    depth = int(args.backbone.removeprefix("resnet"))
    model = DeepLabV3Plus(depth, class_num, args.stem)
    if args.init_checkpoint:
        state = state_dict_in(read_checkpoint(args.init_checkpoint), args.init_checkpoint)
        wanted = f"{args.backbone}, {args.stem} stem, {class_num} classes"
        load_exactly(model, state, args.init_checkpoint, wanted)
    else:
        load_backbone(model.backbone, args.backbone_weights)
    return model


def optimizer_of(model: DeepLabV3Plus, args) -> torch.optim.Optimizer:
    """UniMatch's SGD, or AdamW: group 0 the backbone, group 1 the rest. Trainer.iteration sets
    their learning rates.
    """
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": list(model.backbone.parameters())}, {"params": rest}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def learning_rate(iteration: int, total: int, base: float) -> float:
    """Learning rate of training step `iteration` (from 0) of `total`: poly, one step late, as in
    the shipped logs. UniMatch sets it *after* a step, so that steps 0 and 1 both use `base`.
    """
    return base * (1 - max(iteration - 1, 0) / total) ** POLY_POWER


def perturbation_factors(seed: int, iteration: int, global_batch: int, channels: tuple[int, int]):
    """Channel factors, 0 or 2, of an iteration's feature perturbation (Dropout2d), whatever the
    distribution of the batch: a pair (c1, c4) of 2 x G x C x 1 x 1, [labeled, unlabeled].
    """
    state = np.random.SeedSequence((seed, FACTORS, iteration)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) >> 1)
    drawn = (torch.rand(2, global_batch, c, 1, 1, generator=generator) for c in channels)
    return tuple((values >= FEATURE_DROPOUT) / (1 - FEATURE_DROPOUT) for values in drawn)


def distributed(model: nn.Module, device) -> nn.Module:
    """The model, whose gradients are averaged over processes if there are several. Buffers are not
    broadcast: their means over processes and synchronised batch norm keep them equal.
    """
    if process_rank()[1] == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # newer versions of torch name that option otherwise
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters
    return ddp(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        **{"forward_sync_buffers" if new else "broadcast_buffers": False},
    )


def average_over_processes(tensors: list[torch.Tensor]) -> None:
    """Each tensor becomes its mean over all processes."""
    world = process_rank()[1]
    if world == 1:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= world
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))
