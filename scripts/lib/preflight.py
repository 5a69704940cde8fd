"""What a task (scripts/gta2cs.sh and the others) lacks here, all at once, before anything is done.

Its values are in the environment. Prints the number of GPUs to use, 0 for the CPU; notes go to
stderr. If something is missing: what, and where to get it, on stderr, and exit code 2. Reads names
only. Standard library only, since no package is installed yet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from scripts.lib.layouts import missing_data

DISK_GB = 60  # labels, arrays and checkpoints of a task, beside its data
UNIMATCH_WEIGHTS = (
    "the link 'ResNet-101' in the README of github.com/LiheYoung/UniMatch; or STEM=torchvision"
    " BACKBONE_WEIGHTS=imagenet"
)
Missing = list[tuple[str, str]]  # (what, where to get it)


def missing_inputs(given: Mapping[str, str]) -> Missing:
    """Of the models that a task starts from. A model of the Hub has no file here: seco_sam.py says
    what it lacks.
    """
    labels, arrays = given.get("LABELS"), given.get("PROBABILITIES")
    others = "or CHECKPOINT=…, or another model's probabilities: PROBABILITIES=<folder>"
    if labels:
        get = "put one PNG per training image there, named as the image"
        needed = [(labels, "no such folder (LABELS)", get)]
    elif arrays:
        get = "put one K x H x W array per training image there, <image path>.npy"
        needed = [(arrays, "no such folder (PROBABILITIES)", get)]
    else:
        get = f"{given['CHECKPOINT_FROM']}; {others}"
        what = "the model that the starting labels come from"
        needed = [(given["CHECKPOINT"], what, get)]
    if given["SAM_CHECKPOINT"]:
        get = f"bash scripts/download.sh sam {given['SAM_TYPE']} (vit_t: model/README.md)"
        needed.append((given["SAM_CHECKPOINT"], f"SAM's weights ({given['SAM_TYPE']})", get))
    what = "UniMatch's ImageNet ResNet-101 (deep stem)"
    needed.append((given["BACKBONE_WEIGHTS"], what, UNIMATCH_WEIGHTS))
    if given["USE_SCC"] == "1":
        get = "SCC_WEIGHTS=imagenet (torchvision fetches them), or a .pth"
        needed.append((given["SCC_WEIGHTS"], "ImageNet weights of SCC's ResNet-101", get))
    lacking = [part for part in needed if part[0] != "imagenet" and not Path(part[0]).exists()]
    return [(f"{path}: {what}", get) for path, what, get in lacking]


def gpus_found() -> int:
    """GPUs that CUDA sees: nvidia-smi's, or those of CUDA_VISIBLE_DEVICES up to the first entry
    that is none.
    """
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8")
    except OSError:
        return 0
    everyone = sum(line.startswith("GPU") for line in run.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return everyone
    entries = map(str.strip, visible.split(","))
    there = lambda x: x.startswith(("GPU-", "MIG-")) or x.isdecimal() and int(x) < everyone
    return min(everyone, len(list(takewhile(there, entries))))


def gpus_to_use(device: str, asked: str, batch: int, found: int) -> tuple[int, Missing]:
    """(number of GPUs, what is wrong): one for `cuda:N`, none on the CPU, else as many as are asked
    for, by default as many as can share the global batch evenly.
    """
    if device == "cpu":
        return 0, []
    if not found:
        what = "an NVIDIA GPU (nvidia-smi shows none, or CUDA_VISIBLE_DEVICES hides them)"
        return 0, [(what, "the authors used four; on a CPU, try REHEARSE=1 with the same command")]
    fitting = [count for count in range(1, found + 1) if batch % count == 0]
    allowed = fitting
    if device.startswith("cuda:"):
        allowed = [1] if int(device[5:]) < found else []
    elif not asked and fitting[-1] != found:
        note = f"{fitting[-1]} of {found} GPUs are used; they share a global batch of {batch}"
        print(f"note: {note} evenly", file=sys.stderr)
    if allowed and asked in ("", *map(str, allowed)):
        return int(asked or allowed[-1]), []
    what = f"DEVICE={device} GPUS={asked}: the GPUs here are cuda:0 to cuda:{found - 1}, and the"
    what += f" processes share a global batch of {batch} evenly"
    give = ", ".join(map(str, fitting))
    return 0, [(what, f"give no DEVICE, and for GPUS one of {give}, or leave it out")]


def main(given: Mapping[str, str] = os.environ) -> int:
    gpus, wrong = gpus_to_use(
        given["DEVICE"], given["GPUS"], int(given["GLOBAL_BATCH"]), gpus_found()
    )
    missing = missing_data(given["DATA"], Path(given["DATA_ROOT"])) + missing_inputs(given)
    missing += wrong
    if (free := shutil.disk_usage(".").free // 10**9) < DISK_GB:
        get = "make room, or set OUT and DATA_ROOT elsewhere"
        missing.append((f"{DISK_GB} GB of free disk here ({free} are free)", get))
    if not missing:
        print(gpus)
        return 0
    count = "1 thing is" if len(missing) == 1 else f"{len(missing)} things are"
    print(f"{given['TITLE']}: {count} missing; nothing was done.", file=sys.stderr)
    for what, get in missing:
        print(f"  - {what}\n      get it: {get}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
