"""Reading checkpoint files: ours, UniMatch's, torchvision's, DT-ST's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from util.run import UserError


def read_checkpoint(path: str | Path):
    """The content of a .pth file on the CPU. Only tensors and plain Python values are accepted:
    nothing in the file is run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # the unpickler meets bytes of another kind with any kind of error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of tensors ({reason}); fetch or save it again"
        ) from None


def state_dict_in(content, path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's content: under `model` (ours, UniMatch's) or `state_dict`, or
    the content itself; without the prefixes that DistributedDataParallel (`module.`) and
    torch.compile (`_orig_mod.`) put before names.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(torch.is_tensor(v) for v in content.values())
    ):
        raise UserError(f"{path}: holds no table of weights (a state_dict, alone or under 'model')")
    state = {}
    for name, value in content.items():
        for prefix in ("module.", "_orig_mod."):
            name = name.removeprefix(prefix)
        state[name] = value
    return state


def load_exactly(
    module: nn.Module, state: dict[str, torch.Tensor], path: str | Path, what: str
) -> None:
    """Copy `state` into `module`. A missing, additional or differently shaped weight is an error
    that names it.

    Batch norm's counter `num_batches_tracked` may be missing (older files lack it): no arithmetic
    here uses it.
    """
    own = module.state_dict()
    missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in state if name not in own]
    differing = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unknown or differing:
        parts = [
            f"{len(names)} {kind}, first {names[0]}"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        if differing:
            name = differing[0]
            parts.append(
                f"{len(differing)} of another shape, first {name}: {tuple(state[name].shape)} in"
                f" the file, {tuple(own[name].shape)} here"
            )
        raise UserError(
            f"{path}: its weights do not fit {what} ({'; '.join(parts)}); "
            "check --backbone, --stem and --class-num, or give another file"
        )
    module.load_state_dict(state, strict=False)
