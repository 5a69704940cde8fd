"""The three task scripts: preflight on an empty machine, a rehearsal of every stage of one of them,
and of its other paths (`-m slow`: of the other two)."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from test_page import check_page

from util.labels import read_label, read_list

TASKS = {
    "gta2cs": ("cityscapes", 19, "DTST_gta", "", "seco_gta"),
    "synthia2cs": ("cityscapes", 16, "DTST_synthia", "_16", "seco_synthia"),
    "gta2bdd": ("bdd", 19, "DTST_bdd", "", "seco_bdd"),
}
STAGES = (
    "inputs",
    "data",
    "before_labels",
    "before",
    "pixel",
    "psa",
    "scc",
    "split",
    "adapt",
    "after",
)
OVERRIDES = (
    "DATA_ROOT",
    "CHECKPOINT",
    "PROBABILITIES",
    "SAM_CHECKPOINT",
    "SAM_TYPE",
    "BACKBONE_WEIGHTS",
    "SCC_WEIGHTS",
    "OUT",
    "GPUS",
    "RECIPE",
    "USE_SCC",
    "SEED",
    "SPLITS",
    "EXP",
    "DEVICE",
    "STEM",
    "REHEARSE",
    "PYTHON",
    "SEEDS",
    "CUDA_VISIBLE_DEVICES",
)


def environment(**values):
    clean = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    return {**clean, **{name: str(value) for name, value in values.items()}}


def run(task, folder=ROOT, timeout=60, **values):
    return subprocess.run(
        ["bash", f"scripts/{task}.sh"],
        cwd=folder,
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def empty_machine(tmp_path):
    """A copy of the scripts, without data, checkpoints or a GPU; PATH has the standard tools alone,
    no Python.

    `df` and `nvidia-smi` are played by scripts that report the gigabytes in FREE_GB and GPU_COUNT
    GPUs, so that the tests do not depend on this machine.
    """
    shutil.copytree(
        ROOT / "scripts", tmp_path / "kit/scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "find", "wc", "tr", "grep", "awk", "cat", "sed", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "df").write_text(
        "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\n"
        'echo disk 0 0 "${FREE_GB:-500}000000" 0% /\n'
    )
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\nn=0\nwhile [ $n -lt "${GPU_COUNT:-0}" ]; do\n'
        '  echo "GPU $n: a card (UUID: GPU-$n)"\n  n=$((n + 1))\ndone\n'
    )
    for tool in ("df", "nvidia-smi"):
        (tools / tool).chmod(0o755)
    return tmp_path / "kit", tools


@pytest.mark.parametrize("task", TASKS)
def test_preflight_names_everything_at_once_and_writes_nothing(empty_machine, task):
    folder, tools = empty_machine
    before = sorted(folder.rglob("*"))
    result = run(task, folder, PATH=tools)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) <= 24 and "8 things are missing; nothing was done" in lines[0]
    for wanted in (
        "/train: 0 of",
        "/val: 0 of",
        "login",
        "sam_vit_h_4b8939.pth",
        "download.sh sam vit_h",
        "Python 3.10",
        "pretrained/resnet101.pth",
        "an NVIDIA GPU",
        "the model that the starting labels come from",
    ):
        assert wanted in result.stderr, wanted
    assert "Traceback" not in result.stderr and "command not found" not in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_preflight_is_about_what_is_missing_only(empty_machine, tmp_path):
    folder, tools = empty_machine
    for name in ("model.pth", "sam.pth", "resnet.pth"):
        (tmp_path / name).touch()
    for number in range(500):
        for path in (
            f"data/leftImg8bit/val/a/{number}_leftImg8bit.png",
            f"data/gtFine/val/a/{number}_gtFine_labelIds.png",
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    result = run(
        "gta2cs",
        folder,
        PATH=f"{tools}:{os.environ['PATH']}",
        DATA_ROOT=tmp_path / "data",
        CHECKPOINT=tmp_path / "model.pth",
        SAM_CHECKPOINT=tmp_path / "sam.pth",
        BACKBONE_WEIGHTS=tmp_path / "resnet.pth",
        GPUS="two",
        GPU_COUNT=4,
    )
    assert result.returncode == 2 and "2 things are missing" in result.stderr, result.stderr
    for wanted in ("leftImg8bit/train: 0 of 2975", "GPUS=two: 4 GPUs are here"):
        assert wanted in result.stderr
    result = run(
        "gta2bdd", folder, PATH=tools, FREE_GB=7, PROBABILITIES=tmp_path / "none", USE_SCC="0"
    )
    assert "60 GB of free disk here (7 are free)" in result.stderr
    assert (
        "no such folder of probability arrays" in result.stderr
        and "bdd_source_free" not in result.stderr
    )


@pytest.mark.parametrize(
    "count, settings, processes, said",
    [
        (8, {}, 8, ""),
        (8, {"DEVICE": "cuda"}, 8, ""),
        (8, {"GPUS": ""}, 8, ""),
        (8, {"GPUS": 2}, 2, ""),
        (8, {"DEVICE": "cpu"}, 0, ""),
        (8, {"GLOBAL_BATCH": 4}, 4, "note: 4 of 8 GPUs are used"),
        (7, {}, 4, "note: 4 of 7 GPUs are used"),
        (10, {}, 8, "note: 8 of 10 GPUs are used"),
        (8, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2, ""),
        (8, {"CUDA_VISIBLE_DEVICES": "2, 3"}, 2, ""),
        (8, {"CUDA_VISIBLE_DEVICES": "GPU-5"}, 1, ""),
        (8, {"CUDA_VISIBLE_DEVICES": "1,0,-1,2,3"}, 2, ""),
        (8, {"CUDA_VISIBLE_DEVICES": "1,,2,3"}, 1, ""),
        (2, {"CUDA_VISIBLE_DEVICES": "1,0,2,3"}, 2, ""),
        (1, {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, 1, ""),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, None, "an NVIDIA GPU (nvidia-smi shows none, or CUDA_V"),
        (8, {"CUDA_VISIBLE_DEVICES": "-1"}, None, "an NVIDIA GPU"),
        (8, {"CUDA_VISIBLE_DEVICES": "2,3", "GPUS": 4}, None, "GPUS=4: 2 GPUs are here"),
        (0, {}, None, "an NVIDIA GPU"),
        (0, {"GPUS": 2}, None, "an NVIDIA GPU"),
        (8, {"GPUS": 0}, None, "GPUS=0: 8 GPUs are here"),
        (8, {"GPUS": "08"}, None, "GPUS=08: 8 GPUs are here"),
        *((8, {"GPUS": n}, None, "give one of 1, 2, 4, 8, or leave it out") for n in (3, 5, 6, 7)),
        (8, {"GPUS": 16}, None, "give one of 1, 2, 4, 8, or leave it out"),
        (6, {"GPUS": 6}, None, "give one of 1, 2, 4, or leave it out"),
        (8, {"DEVICE": "cuda:1"}, 1, ""),
        (8, {"DEVICE": "cuda:1", "GPUS": 1}, 1, ""),
        (8, {"DEVICE": "cuda:1", "GPUS": 2}, None, "GPUS=2 with DEVICE=cuda:1, which is one GPU"),
        (2, {"DEVICE": "cuda:2"}, None, "DEVICE=cuda:2: the GPUs here are cuda:0 to cuda:1"),
    ],
    ids=str,
)
def test_processes_fit_the_gpus_and_the_global_batch(
    empty_machine, count, settings, processes, said
):
    """need_gpus of task.sh; processes: None where something is missing."""
    folder, tools = empty_machine
    code = 'set -euo pipefail; source scripts/lib/task.sh; need_gpus; echo "missing ${#missing[@]}"'
    code += '; echo "${missing[*]-}"; echo "processes ${GPUS:-}"'
    variables = {"GLOBAL_BATCH": 8, "DEVICE": "auto", **settings}
    result = subprocess.run(
        ["bash", "-c", code],
        cwd=folder,
        env=environment(PATH=tools, GPU_COUNT=count, **variables),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    if processes is None:
        assert "missing 2\n" in result.stdout and said in result.stdout
    else:
        first = result.stdout.splitlines()[0]
        assert first.startswith(said) if said else first == "missing 0"
        assert result.stdout.endswith(f"processes {processes}\n")


@pytest.mark.parametrize("task, fits", [("gta2cs", "1, 2, 4, 8"), ("gta2bdd", "1, 2, 4")])
def test_preflight_refuses_gpus_that_do_not_share_the_batch(empty_machine, task, fits):
    folder, tools = empty_machine
    result = run(task, folder, PATH=tools, GPU_COUNT=8, GPUS=6)
    assert result.returncode == 2 and "GPUS=6: 8 GPUs are here" in result.stderr
    assert f"give one of {fits}, or leave it out" in result.stderr


def rehearse(task, out):
    """Run a rehearsal twice: everything, then nothing but the comparison. Checks what it leaves."""
    data, class_num, experiment, suffix, log = TASKS[task]
    result = run(task, timeout=480, REHEARSE=1, OUT=out, PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (
        f"reference: training_logs/{log}" in result.stdout and "rehearsal complete" in result.stdout
    )
    records = {name: json.loads((out / f"stages/{name}.json").read_text()) for name in STAGES}
    assert all(record["done"] for record in records.values())

    lists, root = out / "splits", out / "inputs/data"
    images = {image for image, _ in read_list(lists / f"train{suffix}.txt")}
    assert len(images) == 2 and len(read_list(lists / f"val{suffix}.txt")) == 1
    for exp in (experiment, f"{experiment}_tiny", f"{experiment}_tiny_scc"):
        rows = read_list(lists / exp / "train.txt")
        assert {image for image, _ in rows} == images
        labels = [read_label(root / label, class_num) for _, label in rows]
        assert all(
            label.shape == ((1024, 2048) if data == "cityscapes" else (720, 1280))
            for label in labels
        )
        # SCC, trained for four iterations, keeps little.
        least = 3 if exp.endswith("scc") else 5
        assert len(np.unique(np.concatenate([label.ravel() for label in labels]))) >= least, exp
    split = [
        read_list(lists / f"{experiment}_tiny_scc" / name, (1, 2))
        for name in ("labeled.txt", "unlabeled.txt")
    ]
    assert {row[0] for rows in split for row in rows} == images and all(split)
    for name in ("eval_before", "eval_after"):
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert 0 <= metrics["miou"] <= 100 and len(metrics["iou"]) == class_num
    assert (out / "adapt/latest.pth").is_file() and (out / "pictures/compare.png").is_file()
    check_page(
        out / "index.html", "validation IoU (%)", "mIoU", f"training_logs/{log}", "seco_scc.py"
    )

    start = time.time()
    again = run(task, REHEARSE=1, OUT=out, PYTHON=sys.executable, PYTHONIOENCODING="latin-1")
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES)
    assert time.time() - start < 30
    return result


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal") / "run"
    rehearse("gta2bdd", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gta2cs", "synthia2cs"])
def test_rehearsal(task, tmp_path):
    rehearse(task, tmp_path / "run")


def test_probabilities_of_another_model_without_scc(rehearsed, tmp_path):
    """Both paths in one run: it starts from the finished rehearsal, moved, with arrays that give
    every pixel of the left half road, and of the right half sky."""
    out, arrays = tmp_path / "run", tmp_path / "arrays"
    shutil.copytree(rehearsed, out, symlinks=True)
    for image, _ in read_list(out / "splits/train.txt"):
        scores = np.full((19, 720, 1280), 0.01, np.float16)
        scores[0, :, :640] = scores[10, :, 640:] = 0.82
        (arrays / image).parent.mkdir(parents=True, exist_ok=True)
        np.save(arrays / f"{image}.npy", scores)
    settings = dict(REHEARSE=1, OUT=out, PROBABILITIES=arrays, USE_SCC=0, PYTHON=sys.executable)
    result = run("gta2bdd", timeout=480, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "== inputs: done before" in result.stdout and "== data: done before" in result.stdout
    assert "== before: skipped" in result.stdout and "== scc" not in result.stdout
    for folder in (out / "adapt", out / "inputs/data/DTST_bdd", out / "inputs/data/DTST_bdd_tiny"):
        assert f"{folder}.1 keeps what was there" in result.stdout
    labels = [label for _, label in read_list(out / "splits/DTST_bdd/train.txt")]
    for label in labels:
        label = read_label(out / "inputs/data" / label, 19)
        assert set(np.unique(label[:, :640])) <= {0, 255} and (label[:, :640] == 0).any()
        assert set(np.unique(label[:, 640:])) <= {10, 255} and (label[:, 640:] == 10).any()
    rows = read_list(out / "splits/DTST_bdd_tiny/labeled.txt")
    assert rows and all(label.startswith("DTST_bdd_tiny/") for _, label in rows)
    assert "DTST_bdd_tiny/labeled.txt" in (out / "adapt/manifest.json").read_text()
    assert run("gta2bdd", **settings).stdout.count("done before") == 7
