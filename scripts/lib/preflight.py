"""What a task (scripts/gta2cs.sh and the others) lacks here, all at once, before anything is done.

Prints the number of GPUs to use, 0 for the CPU; notes go to stderr. If something is missing: what,
and where to get it, on stderr, and exit code 2. Reads names only. Standard library only, since no
package is installed yet.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

from scripts.lib.layouts import missing_data

DISK_GB = 60  # labels, arrays and checkpoints of a task, beside its data
UNIMATCH_WEIGHTS = (
    "the link 'ResNet-101' in the README of github.com/LiheYoung/UniMatch; or STEM=torchvision"
    " BACKBONE_WEIGHTS=imagenet"
)
Missing = list[tuple[str, str]]  # (what, where to get it)


def missing_inputs(options) -> Missing:
    """Of the models that a task starts from. A model of the Hub has no file here: seco_sam.py says
    what it lacks.
    """
    missing, sam = [], options.sam_checkpoint
    if options.labels or options.probabilities:
        what, name = "no such folder of probability arrays", "PROBABILITIES"
        get = "write one K x H x W array per training image there, <image path>.npy"
        if options.labels:
            what, name = "no such folder of pixel labels", "LABELS"
            get = "put one PNG per training image there, named as the image"
        folder = options.labels or options.probabilities
        if not Path(folder).is_dir():
            missing.append((f"{folder}: {what} ({name})", get))
    elif not Path(options.checkpoint).is_file():
        what = f"{options.checkpoint}: the model that the starting labels come from"
        others = "another file: CHECKPOINT=…; another model's probabilities: PROBABILITIES=<folder>"
        missing.append((what, f"{options.checkpoint_from}; {others}"))
    if sam and not Path(sam).exists():
        get = f"bash scripts/download.sh sam {options.sam_type} (vit_t: model/README.md)"
        missing.append((f"{sam}: SAM's weights ({options.sam_type})", get))
    for weights, what, get in (
        (options.backbone_weights, "UniMatch's ImageNet ResNet-101 (deep stem)", UNIMATCH_WEIGHTS),
        (
            options.scc_weights,
            "ImageNet weights of SCC's ResNet-101",
            "SCC_WEIGHTS=imagenet (torchvision fetches them), or a .pth",
        ),
    ):
        if weights not in ("", "imagenet") and not Path(weights).is_file():
            missing.append((f"{weights}: {what}", get))
    return missing


def gpus_found() -> int:
    """GPUs that CUDA sees: nvidia-smi's, or those of CUDA_VISIBLE_DEVICES up to the first entry
    that is none of them.
    """
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8")
    except OSError:
        return 0
    everyone = sum(line.startswith("GPU") for line in run.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return everyone
    count = 0
    for entry in map(str.strip, visible.split(",")):
        named = entry.startswith(("GPU-", "MIG-"))
        if not named and not (entry.isdecimal() and int(entry) < everyone):
            break
        count += 1
    return min(count, everyone)


def gpus_to_use(device: str, asked: str, batch: int, found: int) -> tuple[int, Missing]:
    """(number of GPUs, what is wrong): one for `cuda:N`, none on the CPU, else as many as are asked
    for, by default as many as can share the global batch evenly.
    """
    if device == "cpu":
        return 0, []
    if not found:
        what = "an NVIDIA GPU (nvidia-smi shows none, or CUDA_VISIBLE_DEVICES hides them)"
        return 0, [(what, "the authors used four; on a CPU, try REHEARSE=1 with the same command")]
    if device.startswith("cuda:"):
        missing = []
        if int(device[5:]) >= found:
            what = f"DEVICE={device}: the GPUs here are cuda:0 to cuda:{found - 1}"
            missing.append((what, "give one of these, or leave it out"))
        if asked not in ("", "1"):
            what = f"GPUS={asked} with DEVICE={device}, which is one GPU"
            missing.append((what, "leave one of the two out"))
        return 1, missing
    fitting = [count for count in range(1, found + 1) if batch % count == 0]
    if asked:
        if asked in map(str, fitting):
            return int(asked), []
        what = f"GPUS={asked}: {found} GPUs are here, and the processes share a global batch of"
        give = ", ".join(map(str, fitting))
        return 0, [(f"{what} {batch} evenly", f"give one of {give}, or leave it out")]
    if fitting[-1] != found:
        note = f"{fitting[-1]} of {found} GPUs are used; they share a global batch of {batch}"
        print(f"note: {note} evenly", file=sys.stderr)
    return fitting[-1], []


def missing_disk() -> Missing:
    free = shutil.disk_usage(".").free // 10**9
    if free >= DISK_GB:
        return []
    what = f"{DISK_GB} GB of free disk here ({free} are free)"
    return [(what, "make room, or set OUT and DATA_ROOT elsewhere")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--title", required=True, help="of the task")
    parser.add_argument("--data", choices=("cityscapes", "bdd", "acdc"), required=True)
    parser.add_argument("--data-root", type=Path, required=True, help="where the data should be")
    for name in ("probabilities", "labels", "checkpoint", "checkpoint-from"):
        parser.add_argument(f"--{name}", default="", help=f"the task's {name}")
    for name in ("sam-type", "sam-checkpoint"):
        parser.add_argument(f"--{name}", default="", help=f"the task's {name}")
    for name in ("backbone-weights", "scc-weights"):
        parser.add_argument(f"--{name}", default="", help="a file, imagenet, or empty: not needed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--gpus", default="", help="number of processes that is asked for, if any")
    parser.add_argument("--global-batch", type=int, required=True, help="what they share")
    options = parser.parse_args(argv)

    batch = options.global_batch
    gpus, wrong = gpus_to_use(options.device, options.gpus, batch, gpus_found())
    missing = missing_data(options.data, options.data_root) + missing_inputs(options)
    missing += wrong + missing_disk()
    if missing:
        count = "1 thing is" if len(missing) == 1 else f"{len(missing)} things are"
        print(f"{options.title}: {count} missing; nothing was done.", file=sys.stderr)
        for what, get in missing:
            print(f"  - {what}\n      get it: {get}", file=sys.stderr)
        return 2
    print(gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
