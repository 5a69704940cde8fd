"""What a GPU should show, part by part, in one folder with one table.

    bash scripts/dev/gpu.sh                                 nine minutes on a card of 80 GB
    bash scripts/dev/gpu.sh --miniature                     the same code on tiny sizes
    bash scripts/dev/gpu.sh --device cpu --out runs/cpu     in miniature, two minutes on 2 cores

Outputs  in --out: gpu.md and gpu.json, written anew after every figure; of each part <part>.log,
         what it printed

A part is a process of its own with a time limit: one that fails or hangs leaves the others, and
what it has measured until then. The same command goes on where it was stopped. Another card,
commit, torch or size needs another folder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
import torch

import seco_scc
from dataset.toy import draw_scene
from eval import evaluate_checkpoint
from model.deeplabv3plus import DeepLabV3Plus
from model.sam import load_segmenter
from model.scc import LABEL_SMOOTHING, gradients, make_classifier, make_optimizer
from scripts.dev import bench
from seco_sam import aggregate
from util import run
from util.labels import CITYSCAPES_19, write_label
from util.options import DeviceOptions, Folder, Positive, parse_options
from util.outputs import Outputs, atomic_path, read_json, write_json
from util.pictures import save_picture

SIZES = {  # on a card of 80 GB, in miniature
    "sam": ("vit_h", "tiny"),
    "image": ((1024, 2048), (96, 192)),
    "images": (10, 2),
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
VARIANTS = {  # of the training's benchmark
    "fp32": "fp32",
    "TF32": "tf32",
    "bf16": "bf16 channels-last",
    "bf16 compiled": "bf16 channels-last compile",
}
*PRECISIONS, COMPILED = VARIANTS
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
    amp, plainly = "bf16" if case == "bf16" else "none", case == ORACLE
    how = {"sam_type": size["sam"], "size": size["image"], "images": 1, "points": size["points"]}
    found = bench.measure_psa(bench.PsaOptions(**how, amp=amp, no_oracle=not plainly), device)
    if not plainly:
        return {"s an image": found["psa"]["seconds"], **in_gb(found["psa"]["memory"])}
    # the oracle makes its prompts pixel by pixel, which is no call of segment_anything
    plain, ours = (
        found[name]["seconds"] - found[name]["stages"].get("make prompts", 0)
        for name in ("oracle", "psa")
    )
    figures = {"s an image": plain, "times as long as PSA": plain / ours}
    memory = in_gb(found["oracle"]["memory"])
    return {**figures, "% of pixels equal": found["agreement"], **memory}


def scc_training(case: str, size: dict, device: torch.device) -> dict:
    """Of random patches in memory: the network's part of seco_scc.train."""
    amp = "bf16" if case.startswith("bf16") else "none"
    how = ["--id-list-path", "-", "--backbone", size["backbone"], "--amp", amp]
    torch.backends.cudnn.deterministic = case == "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case == "TF32"
    model = make_classifier(seco_scc.parse_args(how), 19, device).train()
    optimizer = make_optimizer(model, 0.01)
    network = torch.compile(model) if case == COMPILED else model
    count, (height, width) = size["patches"], size["patch"]
    patches = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    masks = torch.randint(0, 2, (count, 1, height // 2, width // 2), dtype=torch.uint8)
    batch, seconds = (patches, masks, torch.randint(0, 19, (count,))), []
    for _ in range(size["steps"] + 2):  # two to warm up
        start = bench.clock(device)
        optimizer.zero_grad()
        gradients(network, batch, device, amp == "bf16", LABEL_SMOOTHING)
        optimizer.step()
        seconds.append(bench.clock(device) - start)
    rate = 1 / statistics.median(seconds[2:])
    return {"iterations/s": rate, **in_gb(run.peak_memory_mb(device))}


def unimatch(case: str, size: dict, device: torch.device) -> dict:
    how = {"backbone": size["backbone"], "crop_size": size["crop"], "steps": size["steps"]}
    found = bench.measure_train([VARIANTS[case]], bench.TrainOptions(**how), device)
    return {"iterations/s": 1 / found[VARIANTS[case]]["seconds"], **in_gb(found[VARIANTS[case]])}


def evaluation(case: str, size: dict, device: torch.device) -> dict:
    depth = int(size["backbone"].removeprefix("resnet"))
    model = DeepLabV3Plus(depth, 19).eval().to(device)
    scene = draw_scene(0, "target", *size["image"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_picture(root / "image.png", scene.image)
        write_label(root / "truth.png", scene.label, CITYSCAPES_19.palette)
        how = (root, 19, case, size["crop"], device)
        for images in (1, size["images"]):  # one to warm up
            start = bench.clock(device)
            evaluate_checkpoint(model, [("image.png", "truth.png")] * images, *how)
            rate = images / (bench.clock(device) - start)
    return {"images/s": rate, **in_gb(run.peak_memory_mb(device))}


def gpu_tests(case: str, size: dict, device: torch.device) -> dict:
    command = "-m pytest -q -p no:xdist -m gpu tests/test_gpu.py".split()
    how = dict(stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    done = subprocess.run([sys.executable, *command], **how)
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{case}: exit code {done.returncode}, see the log")
    return {"": ", ".join(re.findall(r"\d+ (?:passed|skipped)", done.stdout))}


def in_gb(memory: dict) -> dict:
    """Peak memory (util.run.peak_memory_mb): the device's, on a CPU the process's."""
    return {"GB": memory.get("device_mb", memory["host_mb"]) / 1000}


# ------------------------------------------------------------------------------- running the parts


@dataclass(frozen=True)
class Part:
    """run: measures one of `cases`. what: in the table, with names of sizes in braces. seconds: at
    most what it should take on a GPU; twice that is its time limit.
    """

    run: Callable[[str, dict, torch.device], dict]
    what: str
    cases: tuple[str, ...]
    seconds: int


SCC = "SCC training, {backbone}, {patches} patches of {patch[0]}x{patch[1]}"
UNIMATCH = "UniMatch training, {backbone}, crop {crop}, batch 2 + 2"
EVALUATION = "Evaluation, {backbone}, {image[1]}x{image[0]}, windows of {crop}"
# Those that matter most first; compiling takes minutes.
PARTS = {
    "psa_equal": Part(psa_equal, "PSA's labels, tiny SAM, against the CPU's", ("fp32", "bf16"), 40),
    "psa_speed": Part(
        psa_speed, "PSA, {sam}, {image[1]}x{image[0]}", ("fp32", "bf16", ORACLE), 120
    ),
    "scc": Part(scc_training, SCC, tuple(PRECISIONS), 60),
    "unimatch": Part(unimatch, UNIMATCH, tuple(PRECISIONS), 60),
    "eval": Part(evaluation, EVALUATION, ("original", "sliding_window"), 40),
    "gpu_tests": Part(gpu_tests, "Tests that need a GPU", ("pytest -m gpu",), 100),
    "scc_compiled": Part(scc_training, SCC, (COMPILED,), 90),
    "unimatch_compiled": Part(unimatch, UNIMATCH, (COMPILED,), 150),
}


def table(figures: dict[str, dict], size: dict) -> str:
    """Markdown of all cells. figures: of each part {case: figures, or {"error": its line}}."""
    lines = ["| what | case | figure | peak memory, GB |", "|---|---|---|---|"]
    for name, part in PARTS.items():
        for case in part.cases:
            found = dict(figures.get(name, {}).get(case, {}))
            memory = found.pop("GB", None)
            shown = ", ".join(
                f"{value:.5g} {unit}" if unit and unit != "error" else f"{unit} {value}".strip()
                for unit, value in found.items()
            )
            memory = "" if memory is None else f"{memory:.1f}"
            what = part.what.format_map(size)
            lines.append(f"| {what} | {case} | {shown or 'not run'} | {memory} |")
    return "\n".join(lines) + "\n"


def identity(device: torch.device, miniature: bool) -> dict:
    """What figures belong to."""
    made = run.manifest({})
    card = made["hardware"]["cpu"]
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    found = {"card": card, "torch": str(torch.__version__), "commit": made["git"]["commit"]}
    return {**found, "uncommitted": made["git"]["changed"], "miniature": miniature}


class Results:
    """The files of `out`; size: of what is measured."""

    def __init__(self, out: Path, identity: dict):
        self.out, self.identity = out, identity
        self.size = MINIATURE if identity["miniature"] else FULL

    def figures(self) -> dict[str, dict]:
        """{part: {case: its figures, or {"error": its line}}}."""
        path = self.out / "gpu.json"
        return read_json(path)["parts"] if path.is_file() else {}

    def lacking(self, part: str) -> list[str]:
        """The cases that are not there, or failed."""
        found = self.figures().get(part, {})
        return [case for case in PARTS[part].cases if case not in found or "error" in found[case]]

    def write(self, figures: dict[str, dict]) -> None:
        write_json(self.out / "gpu.json", {**self.identity, "parts": figures})
        head = ", ".join(f"{name}: {value}" for name, value in self.identity.items())
        with atomic_path(self.out / "gpu.md") as temporary:
            temporary.write_text(f"{head}\n\n{table(figures, self.size)}", encoding="utf-8")

    def add(self, part: str, case: str, found: dict) -> None:
        figures = self.figures()
        self.write({**figures, part: {**figures.get(part, {}), case: found}})


def work(part: str, results: Results, device: torch.device) -> int:
    """The cases of a part that are not there yet, in this process; 1 if one failed."""
    run.tune_cpu()
    if device.type == "cpu":  # whose code takes minutes to generate and says nothing here
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for case in results.lacking(part):
        gc.collect()
        run.exact_mode()
        run.seed_everything(0)
        bench.count_memory_anew(device)
        try:
            figures = PARTS[part].run(case, results.size, device)
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        results.add(part, case, figures)
    return int(any(results.lacking(part)))


def process(part: str, results: Results, device: torch.device) -> None:
    """`work` as a process, the first of its group, which prints into its log."""
    os.setsid()
    with open(results.out / f"{part}.log", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(work(part, results, device))


def run_part(part: str, results: Results, device: torch.device, limit: float) -> str:
    """Run a part as a process of its own, at most `limit` seconds; what to say of it."""
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    child = context.Process(target=process, args=(part, results, device))
    child.start()
    try:
        child.join(limit)
        code = child.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started itself
        child.kill()
        child.join()
    trouble = f"stopped after {limit:.0f} s" if code is None else f"exit code {code}" * bool(code)
    missing = [c for c in PARTS[part].cases if c not in results.figures().get(part, {})]
    if trouble and missing:
        results.add(part, missing[0], {"error": f"{trouble}, see {part}.log"})
    return f"{trouble or 'done'} in {time.monotonic() - start:.0f} s"


@dataclass(kw_only=True)
class Options(DeviceOptions):
    """measurements"""

    out: Folder = Path("runs/gpu")
    "folder of the results"
    miniature: bool = False
    "tiny sizes; always on a CPU"
    minutes: Positive = 9
    "a part that does not fit is not run"
    parts: list[str] | None = None
    "these alone"


def main(argv=None) -> int:
    options = parse_options(Options, __doc__, argv)
    device, parts = run.select_device(options.device), options.parts or list(PARTS)
    if unknown := set(parts) - PARTS.keys():
        raise run.UserError(f"--parts {' '.join(unknown)}: choose among {', '.join(PARTS)}")
    if device.type == "cpu":  # so small that threads would only wait for each other
        os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part that is running too
    end = time.monotonic() + 60 * options.minutes
    with Outputs(options.out, "choose another folder") as outputs:
        results = Results(options.out, identity(device, options.miniature or device.type == "cpu"))
        outputs.accept(results.identity, begun=bool(results.figures()))
        results.write(results.figures())
        for part in (part for part in PARTS if part in parts):
            left, needed = end - time.monotonic(), PARTS[part].seconds
            if not results.lacking(part):
                said = "done before"
            elif needed > left:
                said = f"not run: {needed} s do not fit into the {left:.0f} s that are left"
            else:
                print(f"{part}: {', '.join(results.lacking(part))}", flush=True)
                said = run_part(part, results, device, min(2 * needed, left))
            print(f"{part}: {said}", flush=True)
    print(f"{(options.out / 'gpu.md').read_text(encoding='utf-8')}\n{options.out / 'gpu.md'}")
    return int(any(results.lacking(part) for part in parts))


if __name__ == "__main__":
    sys.exit(run.run_main(main))
