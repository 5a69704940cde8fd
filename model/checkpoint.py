"""Reading checkpoint files safely, and what all kinds of them share: tables of weights, prefixes.

What a file is for is told from its content by `model.network.load_network`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from util.run import UserError

PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
# Where a table of weights lies in a checkpoint: ProDA's `ResNet101` holds a `model_state`.
TABLES = ("ResNet101", "model_state", "model", "state_dict")


def numpy_scalars() -> list:
    """For torch's `safe_globals`: UniMatch, ProDA and SHADE save their best score as a number of
    numpy's. Its maker has one name in files of numpy 1 and another in those of numpy 2.
    """
    scalar = np.float64(0).__reduce__()[0]
    makers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*makers, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")]


def read_checkpoint(path: str | Path):
    """The content of a .pth file, zip or older, on the CPU. Only tensors, plain Python values and
    numpy's numbers are accepted: nothing in the file is run.
    """
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # the unpickler meets bytes of another kind with any kind of error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of tensors ({reason}); fetch or save it again"
        ) from None


def without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The table with every name freed from its leading `module.` and `_orig_mod.`, however many."""
    result = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        result[name] = value
    return result


def state_dict_in(content, path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's content, without prefixes: under `model` (ours, UniMatch's),
    `state_dict` (SHADE's, mmsegmentation's) or `ResNet101`, `model_state` (ProDA's), or the content
    itself.
    """
    for key in TABLES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    is_table = isinstance(content, dict) and all(torch.is_tensor(v) for v in content.values())
    if not is_table or not content:
        raise UserError(f"{path}: holds no table of weights (a state_dict, alone or under 'model')")
    return without_prefixes(content)


def load_exactly(
    module: nn.Module, state: dict[str, torch.Tensor], path: str | Path, what: str
) -> None:
    """Copy `state` into `module`. A missing, additional or differently shaped weight is an error
    that names it; but for batch norm's counter `num_batches_tracked`, which no arithmetic here uses
    (older files lack it, a frozen batch norm does not have it).
    """
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # its second line names the first weight of another shape
        problems = [str(error).splitlines()[1].strip()]
    else:
        problems = [
            f"{kind} weight {name}"
            for kind, names in (("missing", found.missing_keys), ("unknown", found.unexpected_keys))
            for name in names
            if not name.endswith("num_batches_tracked")
        ]
    if problems:
        raise UserError(
            f"{path}: its weights do not fit {what} ({len(problems)} differ, first: {problems[0]});"
            " check --backbone, --stem and --class-num, or give another file"
        )
