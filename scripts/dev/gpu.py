"""What a GPU should show, in one folder with one table. `bash scripts/dev/gpu.sh` calls this for
every part in turn, each with a time limit:

    python -m scripts.dev.gpu psa_speed --device cuda

Outputs  in --out: gpu.md and gpu.json, written anew after every figure

The same command goes on where it was stopped, and runs what failed again. On a CPU all sizes are
tiny. Another card, commit or torch needs another folder.
"""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
import torch

import seco_scc
from dataset.toy import draw_scene
from model.sam import load_segmenter
from model.scc import LABEL_SMOOTHING, gradients, make_classifier, make_optimizer
from scripts.dev import bench
from scripts.lib.page import markdown
from seco_sam import aggregate
from util import run
from util.labels import CITYSCAPES_19
from util.options import Argument, DeviceOptions, Folder, parse_options
from util.outputs import Outputs, read_json, write_json, write_text

SIZES = {  # on a card of 80 GB, in miniature
    "sam": ("vit_h", "tiny"),
    "image": ((1024, 2048), (96, 192)),
    "scenes": (8, 1),
    "scene": ((192, 384), (96, 192)),
    "points": (32, 6),  # a side of the grid that prompts SAM
    "backbone": ("resnet101", "resnet10"),
    "patch": ((256, 512), (32, 64)),
    "patches": (64, 4),
    "crop": (769, 65),
    "steps": (10, 2),
}
FULL, MINIATURE = ({name: both[i] for name, both in SIZES.items()} for i in (0, 1))
ORACLE = "fp32, segment_anything called as the released code does"


# ---------------------------------------------- measuring: (case, sizes, device) → {unit: value}


def psa_equal(case: str, size: dict, device: torch.device) -> dict:
    """PSA's labels of drawn scenes by the tiny SAM, beside those of fp32 on the CPU."""
    labels = []
    for where, amp in ((torch.device("cpu"), False), (device, case == "bf16")):
        sam = load_segmenter("tiny", device=where, amp=amp)
        sam.settings = replace(sam.settings, points_per_side=size["points"])
        for seed in range(size["scenes"]):
            scene = draw_scene(seed, "target", *size["scene"])
            label = bench.pixel_labels(scene.label, seed)
            labels.append(aggregate(scene.image, label, sam, CITYSCAPES_19).label)
    expected, found = np.split(np.stack(labels), 2)
    return {"% of pixels equal": 100 * float((found == expected).mean())}


def psa_speed(case: str, size: dict, device: torch.device) -> dict:
    how = {"sam_type": size["sam"], "size": size["image"], "images": 1, "points": size["points"]}
    how |= {"amp": "bf16" if case == "bf16" else "none", "no_oracle": case != ORACLE}
    found = bench.measure_psa(bench.Options(part="psa", **how), device)
    if case != ORACLE:
        return {"s an image": found["psa"]["seconds"], **in_gb(found["psa"]["memory"])}
    # It makes its prompts pixel by pixel, which is no call of segment_anything.
    plain = found["oracle"]["seconds"] - found["oracle"]["make prompts"]
    figures = {"s an image": plain, "% of pixels equal": found["agreement"]}
    return {**figures, **in_gb(found["oracle"]["memory"])}


def scc_training(case: str, size: dict, device: torch.device) -> dict:
    """Of random patches in memory: the network's part of seco_scc.train."""
    amp = "bf16" if case.startswith("bf16") else "none"
    how = ["--id-list-path", "-", "--backbone", size["backbone"], "--amp", amp]
    torch.backends.cudnn.deterministic = case == "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case == "tf32"
    model = make_classifier(seco_scc.parse_args(how), 19, device).train()
    optimizer = make_optimizer(model, 0.01)
    network = torch.compile(model) if "compile" in case else model
    count, (height, width) = size["patches"], size["patch"]
    patches = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    masks = torch.randint(0, 2, (count, 1, height // 2, width // 2), dtype=torch.uint8)
    batch = patches, masks, torch.randint(0, 19, (count,))

    def step(_) -> None:
        optimizer.zero_grad()
        gradients(network, batch, device, amp == "bf16", LABEL_SMOOTHING)
        optimizer.step()

    rate = 1 / bench.median_seconds(step, size["steps"], device)
    return {"iterations/s": rate, **in_gb(run.peak_memory_mb(device))}


def unimatch(case: str, size: dict, device: torch.device) -> dict:
    how = {"backbone": size["backbone"], "crop_size": size["crop"], "steps": size["steps"]}
    found = bench.measure_train([case], bench.Options(part="train", **how), device)[case]
    return {"iterations/s": 1 / found["seconds"], **in_gb(found)}


def in_gb(memory: dict) -> dict:
    """Peak memory (util.run.peak_memory_mb): the device's, on a CPU the process's."""
    return {"GB": memory.get("device_mb", memory["host_mb"]) / 1000}


# ----------------------------------------------------------------------------------- parts, table


SCC = "SCC training, {backbone}, {patches} patches of {patch[0]}x{patch[1]}"
UNIMATCH = "UniMatch training, {backbone}, crop {crop}, batch 2 + 2"
# {part: (what measures it, its name in the table, with names of sizes in braces, its cases)}, those
# that matter most first; compiling takes minutes.
PARTS = {
    "psa_equal": (psa_equal, "PSA's labels, tiny SAM, against the CPU's", ("fp32", "bf16")),
    "psa_speed": (psa_speed, "PSA, {sam}, {image[1]}x{image[0]}", ("fp32", "bf16", ORACLE)),
    "scc": (scc_training, SCC, ("fp32", "tf32", "bf16")),
    "unimatch": (unimatch, UNIMATCH, ("fp32", "tf32", "bf16 channels-last")),
    "scc_compiled": (scc_training, SCC, ("bf16 compile",)),
    "unimatch_compiled": (unimatch, UNIMATCH, ("bf16 channels-last compile",)),
}


def table(figures: dict[str, dict], size: dict) -> str:
    """Markdown of all cells. figures: of each part {case: figures, or {"error": its line}}."""
    rows = []
    for part, (_, what, cases) in PARTS.items():
        for case in cases:
            found = dict(figures.get(part, {}).get(case, {"error": "not run"}))
            memory = f"{found.pop('GB'):.1f}" if "GB" in found else ""
            shown = found.get("error") or ", ".join(f"{x:.5g} {unit}" for unit, x in found.items())
            rows.append([what.format_map(size), case, shown, memory])
    return markdown([{"head": ["what", "case", "figure", "peak memory, GB"], "rows": rows}])


def settings_of(device: torch.device) -> dict:
    """What figures belong to."""
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else run.hardware()["cpu"]
    return {"card": card, "torch": torch.__version__, "commit": run.commit()}


def measured(function, case: str, size: dict, device: torch.device) -> dict:
    """The figures of a case, or {"error": its line}."""
    gc.collect()
    run.exact_mode()
    run.seed_everything(0)
    bench.count_memory_anew(device)
    try:
        return function(case, size, device)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """measurements"""

    part: Argument[Literal[tuple(PARTS)]]
    "what is measured"
    out: Folder = Path("runs/gpu")
    "folder of the results"


def main(argv=None) -> int:
    options = parse_options(Options, __doc__, argv)
    device, out = run.select_device(options.device), options.out
    function, _, cases = PARTS[options.part]
    size = MINIATURE if device.type == "cpu" else FULL
    run.tune_cpu()
    if device.type == "cpu":  # whose code takes minutes to generate and says nothing here
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with Outputs(out) as outputs:
        settings, record = settings_of(device), out / "gpu.json"
        figures = read_json(record)["parts"] if record.is_file() else {}
        outputs.accept(settings, begun=bool(figures))
        found = figures.setdefault(options.part, {})
        for case in cases:
            if "error" not in found.get(case, {"error": "not run"}):
                continue
            found[case] = measured(function, case, size, device)
            print(f"{options.part}, {case}: {found[case]}", flush=True)
            write_json(record, {**settings, "parts": figures})
            head = ", ".join(f"{name}: {value}" for name, value in settings.items())
            write_text(out / "gpu.md", f"{head}\n\n{table(figures, size)}")
    return int(any("error" in found[case] for case in cases))


if __name__ == "__main__":
    sys.exit(run.run_main(main))
