"""The three task scripts: preflight on an empty machine, a rehearsal of every stage of one of them,
and of its other paths (`-m slow`: of the other two)."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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

    `df` is played by a script that reports the gigabytes in FREE_GB, so that the tests do not
    depend on this machine's disk.
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
    (tools / "df").chmod(0o755)
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
    )
    assert result.returncode == 2 and "2 things are missing" in result.stderr, result.stderr
    for wanted in ("leftImg8bit/train: 0 of 2975", "GPUS=two: not a number"):
        assert wanted in result.stderr
    result = run(
        "gta2bdd", folder, PATH=tools, FREE_GB=7, PROBABILITIES=tmp_path / "none", USE_SCC="0"
    )
    assert "60 GB of free disk here (7 are free)" in result.stderr
    assert (
        "no such folder of probability arrays" in result.stderr
        and "bdd_source_free" not in result.stderr
    )


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
    again = run(task, REHEARSE=1, OUT=out, PYTHON=sys.executable)
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
    arrays.mkdir()
    for image, _ in read_list(out / "splits/train.txt"):
        scores = np.full((19, 720, 1280), 0.01, np.float16)
        scores[0, :, :640] = scores[10, :, 640:] = 0.82
        np.save(arrays / Path(image).with_suffix(".npy").name, scores)
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
