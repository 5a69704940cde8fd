"""What a GPU should show, part by part, in one folder with one table.

    bash scripts/dev/gpu.sh                                 nine minutes on a card of 80 GB
    bash scripts/dev/gpu.sh --miniature                     the same code on tiny sizes
    bash scripts/dev/gpu.sh --device cpu --out runs/cpu     in miniature, two minutes on 2 cores

Outputs  in --out: gpu.md and gpu.json, written anew after every figure; of each part <part>.json,
         its figures, and <part>.log, what it printed

A part is a process of its own with a time limit: one that fails or hangs leaves the others, and
what it has measured until then. The same command goes on where it was stopped. Figures of another
card, commit, torch or size are measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/dev/NAME.py`

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import seco_scc
from dataset.toy import draw_scene
from eval import evaluate_checkpoint
from model.deeplabv3plus import DeepLabV3Plus
from model.sam import load_segmenter
from scripts.dev import bench
from seco_sam import aggregate
from util import run
from util.labels import CITYSCAPES_19, write_label
from util.options import add_run_options, check_range, check_run_options
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
COLLECTIVE, TRAINING = "a sum and averaged gradients", "train_unimatch.py, drawn scenes"


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
    how = ["psa", "--sam-type", size["sam"], "--size", *map(str, size["image"]), "--images", "1"]
    how += ["--points", str(size["points"]), "--amp", "bf16" if case == "bf16" else "none"]
    how += ["--device", str(device), *["--no-oracle"] * (case != ORACLE)]
    found = bench.measure_psa(bench.parse_args(how), device)
    if case != ORACLE:
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
    options = seco_scc.parse_args(how)
    torch.backends.cudnn.deterministic = case == "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case == "TF32"
    model = seco_scc.make_classifier(options, 19, device).train()
    optimizer = seco_scc.make_optimizer(model, options.lr)
    network = torch.compile(model) if case == COMPILED else model
    count, (height, width) = size["patches"], size["patch"]
    patches = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    masks = torch.randint(0, 2, (count, 1, height // 2, width // 2), dtype=torch.uint8)
    classes, seconds = torch.randint(0, 19, (count,)), []
    for _ in range(size["steps"] + 2):  # two to warm up
        start = bench.clock(device)
        logits = seco_scc.logits_of(network, patches, masks, device, amp == "bf16")
        smoothing = seco_scc.LABEL_SMOOTHING
        loss = cross_entropy(logits, classes.to(device), label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(bench.clock(device) - start)
    rate = 1 / statistics.median(seconds[2:])
    return {"iterations/s": rate, **in_gb(run.peak_memory_mb(device))}


def unimatch(case: str, size: dict, device: torch.device) -> dict:
    how = ["train", "--backbone", size["backbone"], "--crop-size", str(size["crop"])]
    how += ["--batch", "2", "--steps", str(size["steps"]), "--device", str(device)]
    options = bench.parse_args(how)
    found = bench.measure_train([VARIANTS[case]], options, device)[VARIANTS[case]]
    return {"iterations/s": 1 / found["seconds"], **in_gb(found)}


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


def torchrun(case: str, size: dict, device: torch.device) -> dict:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    where, data = ["--device", str(device)], size["out"] / "data"
    if case == COLLECTIVE:
        said = python(*launch, "-m", "scripts.dev.gpu", "--part", "collective", *where)
        return {"": re.findall(r"sums and averages over \w+", said)[-1]}
    python("-m", "dataset.toy", "--root-path", str(data), "--scenes", "4", "4", "2")
    lists, start = data / "toy/s0/lists", time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        how = ["--labeled-id-path", str(lists / "source_train.txt"), "--unlabeled-id-path"]
        how += [str(lists / "target_train.txt"), "--val-id-path", str(lists / "target_val.txt")]
        how += ["--root-path", str(data), "--save-path", f"{folder}/run", "--epochs", "1"]
        how += ["--backbone", "resnet10", "--crop-size", "65", "--global-batch", "2"]
        python(*launch, "train_unimatch.py", *how, "--workers", "1", *where)
    return {"exit code": 0, "s": time.perf_counter() - start}


def collective(device: torch.device) -> None:
    """Sum a tensor and average gradients over torchrun's processes, one on its own as well."""
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ones = torch.ones(1000, device=device)
    dist.all_reduce(ones)
    ids = [device.index] if device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1000, 1).to(device), ids)
    wrapped(ones).sum().backward()
    assert int(ones.sum()) == 1000 * dist.get_world_size()
    assert bool((wrapped.module.weight.grad == dist.get_world_size()).all())
    print(f"sums and averages over {dist.get_backend()}")
    dist.destroy_process_group()


def gpu_tests(case: str, size: dict, device: torch.device) -> dict:
    said = python("-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests/test_gpu.py")
    return {"": ", ".join(re.findall(r"\d+ (?:passed|skipped)", said))}


def python(*arguments: str) -> str:
    """What a Python command prints; RuntimeError with its last error if it fails."""
    how = dict(capture_output=True, encoding="utf-8", errors="replace")
    done = subprocess.run([sys.executable, *arguments], **how)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(last_error(done.stdout + done.stderr))
    return done.stdout


def last_error(text: str) -> str:
    """The last line of an output that tells an error, else its last line."""
    told = r"^(?:\[\w+\]: |E +)?(error: .+|[\w.]*(?:Error|Exception): .+)"
    lines = re.findall(told, text, re.M) or text.strip().splitlines() or ["no output"]
    return lines[-1].strip()[:200]


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
    "torchrun": Part(torchrun, "One process under torchrun", (COLLECTIVE, TRAINING), 60),
    "gpu_tests": Part(gpu_tests, "Tests that need a GPU", ("pytest -m gpu",), 40),
    "scc_compiled": Part(scc_training, SCC, (COMPILED,), 90),
    "unimatch_compiled": Part(unimatch, UNIMATCH, (COMPILED,), 150),
}


def identity(options: argparse.Namespace) -> dict:
    """What figures belong to: those of another one are not shown beside them."""
    made = run.manifest({})
    on_gpu, cpu = options.device.type == "cuda", made["hardware"]["cpu"]
    card = torch.cuda.get_device_name(options.device) if on_gpu else cpu
    commit = f"{made['git']['commit']}{' with changes' * bool(made['git']['changed'])}"
    found = {"card": card, "torch": str(torch.__version__), "commit": commit}
    return {**found, "miniature": options.miniature}


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


class Results:
    """The files of --out."""

    def __init__(self, options: argparse.Namespace):
        self.out, self.identity = options.out, identity(options)
        self.size = {**(MINIATURE if options.miniature else FULL), "out": options.out}

    def of(self, part: str) -> dict:
        """{case: figures} of a part that belong to this card and code."""
        path = self.out / f"{part}.json"
        record = run.read_json(path) if path.is_file() else {}
        return record["figures"] if record.get("identity") == self.identity else {}

    def lacking(self, part: str) -> list[str]:
        found = self.of(part)
        return [c for c in PARTS[part].cases if c not in found or "error" in found[c]]

    def add(self, part: str, case: str, figures: dict) -> None:
        found = {**self.of(part), case: figures}
        run.write_json(self.out / f"{part}.json", {"identity": self.identity, "figures": found})
        self.write_tables()

    def write_tables(self) -> None:
        figures = {part: self.of(part) for part in PARTS}
        run.write_json(self.out / "gpu.json", {**self.identity, "parts": figures})
        head = ", ".join(f"{name}: {value}" for name, value in self.identity.items())
        with run.atomic_path(self.out / "gpu.md") as temporary:
            temporary.write_text(f"{head}\n\n{table(figures, self.size)}", encoding="utf-8")


def work(options: argparse.Namespace) -> int:
    """The cases of --part that are not there yet, in this process; 1 if one failed."""
    results, part, failed = Results(options), PARTS[options.part], 0
    run.tune_cpu()
    if options.device.type == "cpu":  # whose code takes minutes to generate and says nothing here
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for case in results.lacking(options.part):
        gc.collect()
        run.exact_mode()
        run.seed_everything(0)
        bench.count_memory_anew(options.device)
        try:
            figures = part.run(case, results.size, options.device)
        except Exception as error:
            traceback.print_exc()
            figures, failed = {"error": last_error(f"{type(error).__name__}: {error}")}, 1
        results.add(options.part, case, figures)
    return failed


def end_with_the_parent() -> None:
    """Ends this process and what it has started when the one that runs the parts was killed: the
    pipe between them closes.
    """
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def run_part(name: str, options: argparse.Namespace, results: Results, limit: float) -> str:
    """Run a part as a process of its own; what to say of it."""
    command = [sys.executable, "-m", "scripts.dev.gpu", "--part", name, "--out", str(options.out)]
    command += ["--device", str(options.device), *["--miniature"] * options.miniature]
    log, start, environment = options.out / f"{name}.log", time.monotonic(), dict(os.environ)
    if options.device.type == "cpu":  # so small that threads would only wait for each other
        environment["OMP_NUM_THREADS"] = "1"
    how = dict(stdin=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, env=environment, **how)
        trouble = ""
        try:
            if process.wait(limit):
                trouble = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            trouble = f"stopped after {limit:.0f} s"
        finally:  # with what it has started itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    missing = [case for case in PARTS[name].cases if case not in results.of(name)]
    if trouble and missing:
        words = last_error(log.read_text(encoding="utf-8", errors="replace"))
        results.add(name, missing[0], {"error": f"{trouble}; {words}"})
    return f"{trouble or 'done'} in {time.monotonic() - start:.0f} s"


def parse_args(argv=None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, parts = parser.add_argument, list(PARTS)
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (%(default)s)")
    add("--miniature", action="store_true", help="tiny sizes; always on a CPU")
    add("--minutes", type=float, default=9, help="a part that does not fit is not run (default: 9)")
    add("--parts", nargs="+", choices=parts, default=parts, help="these alone")
    add("--part", choices=[*parts, "collective"], help=argparse.SUPPRESS)
    add_run_options(parser, seed=False)
    options = parser.parse_args(argv)
    check_run_options(options)
    check_range(options, "minutes", above=0)
    options.device = run.select_device(options.device)
    options.miniature |= options.device.type != "cuda"
    return options


def main(argv=None) -> int | None:
    options = parse_args(argv)
    if options.part == "collective":
        return collective(options.device)
    if options.part:
        threading.Thread(target=end_with_the_parent, daemon=True).start()
        return work(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part that is running too
    run.check_writable(options.out)
    end = time.monotonic() + 60 * options.minutes
    with run.folder_lock(options.out):
        results = Results(options)
        results.write_tables()
        for name in (part for part in PARTS if part in options.parts):
            left, needed = end - time.monotonic(), PARTS[name].seconds
            if not results.lacking(name):
                said = "done before"
            elif needed > left:
                said = f"not run: {needed} s do not fit into the {left:.0f} s that are left"
            else:
                print(f"{name}: {', '.join(results.lacking(name))}", flush=True)
                said = run_part(name, options, results, min(2 * needed, left))
            print(f"{name}: {said}", flush=True)
    print(f"{(options.out / 'gpu.md').read_text(encoding='utf-8')}\n{options.out / 'gpu.md'}")
    return int(any(results.lacking(name) for name in options.parts))


if __name__ == "__main__":
    sys.exit(run.run_main(main))
