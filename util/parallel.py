"""Training in several processes: one network in all of them, equal statistics, means over them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from util.run import process_rank


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
