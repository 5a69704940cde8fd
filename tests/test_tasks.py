"""The shell scripts: values that they refuse, what the tasks' preflight says, a rehearsal of one
task (`-m slow`: of the other two)."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from processes import warm_python
from test_page import check_page

from model.sam import output_name
from scripts.lib import preflight
from util.labels import read_label, read_list

TASKS = {
    "gta2cs": ("cityscapes", 19, "DTST_gta", "", "seco_gta"),
    "synthia2cs": ("cityscapes", 16, "DTST_synthia", "_16", "seco_synthia"),
    "gta2bdd": ("bdd", 19, "DTST_bdd", "", "seco_bdd"),
}
SCRIPTS_OF_TASKS = [*TASKS, "cs2acdc"]
VALUE = re.compile(r'^([A-Z_]+)="\$\{\1:-', re.M)  # what a script takes from the environment
SCRIPTS = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/lib/*.sh")]
VALUES = {name for path in SCRIPTS for name in VALUE.findall(path.read_text(encoding="utf-8"))}


def run(script, *arguments, folder=ROOT, timeout=60, shell="bash", **values):
    """A script, with these variables and no other one of the kit's; by default with a python that
    fails, so that nothing is ever set up or run.
    """
    clean = {name: value for name, value in os.environ.items() if name not in VALUES}
    clean.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.run(
        [shell, f"scripts/{script}.sh", *arguments],
        cwd=folder,
        env={**clean, "PYTHON": "false", **{name: str(value) for name, value in values.items()}},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


SEEDS = "give whole numbers from 0 to 99"


@pytest.mark.parametrize(
    "script, name, value, words",
    [
        ("toy", "RECIPE", "cake", "give one of release, paper, both"),
        *(("toy", "SEEDS", value, SEEDS) for value in ("x", "0 100", "99999999999999999999")),
        ("toy", "SMALLEST", "2", "give one of 0, 1"),
        ("camvid", "SAM_TYPE", "huge", "give one of tiny, tiny_photo, vit_t, vit_b, vit_l, vit_h"),
        ("ablation toy", "SEEDS", "q", SEEDS),
        ("gta2cs", "RECIPE", "both", "give one of release, paper"),
        ("gta2cs", "SEED", "-1", "give whole numbers from 0 to 4294967295"),
        *(("gta2cs", "DEVICE", x, "give auto, cpu, cuda or cuda:N") for x in ("mps", "cuda:x")),
        *(("gta2bdd", x, "no", "give one of 0, 1") for x in ("USE_SCC", "REHEARSE")),
        ("gta2bdd", "STEM", "shallow", "give one of deep, torchvision"),
    ],
)
def test_a_wrong_value_is_one_line(script, name, value, words):
    result = run(*script.split(), **{name: value})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {name}={value}: {words}\n"


@pytest.mark.parametrize("script", ["toy", "camvid", "ablation toy", *SCRIPTS_OF_TASKS])
def test_an_argument_is_an_error(script):
    result = run(*script.split(), "--seed", "1")
    assert result.returncode == 2 and result.stdout == ""
    name = f"scripts/{script.split()[-1]}.sh"
    assert result.stderr == f"error: --seed: {name} takes no such argument; bash {name} --help\n"
    assert run("ablation", "tiny").stderr == "error: bash scripts/ablation.sh toy|camvid\n"


@pytest.mark.parametrize("script", [path.stem for path in ROOT.glob("scripts/*.sh")])
@pytest.mark.parametrize("shell, argument", [("bash", "--help"), ("sh", "-h")])
def test_help_is_the_head_of_the_script_and_its_values(script, shell, argument):
    """`sh` hands the script on to bash."""
    result = run(script, argument, shell=shell)
    assert result.returncode == 0 and result.stderr == ""
    text = (ROOT / f"scripts/{script}.sh").read_text(encoding="utf-8")
    head = takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    head = [line[1:].removeprefix(" ") for line in head]
    assert result.stdout.startswith("\n".join(head) + "\n\nEnvironment variables")
    for shared in re.findall(r"^source (scripts/lib/(?:task|rows)\.sh)", text, re.M):
        text += (ROOT / shared).read_text(encoding="utf-8")
    shown = result.stdout.rpartition("Environment variables")[2]
    assert re.findall("^  ([A-Z_]+)=", shown, re.M) == VALUE.findall(text)


@pytest.mark.parametrize(
    "sam_type, expected",
    [
        ("vit_h", "vit_h"),
        ("facebook/sam2.1-hiera-large", "sam2.1-hiera-large"),
        ("pretrained/sam2.1-hiera-large/", "sam2.1-hiera-large"),
        ("/data/my models/EdgeTAM hf", "EdgeTAM_hf"),
        ("./sam3", "sam3"),
    ],
)
def test_outputs_are_named_after_the_segmenter_as_seco_sam_does(sam_type, expected):
    command = ["bash", "-c", 'source scripts/lib/common.sh; sam_name "$1"', "x", sam_type]
    name = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert name.stdout.strip() == output_name(sam_type) == expected


def test_camvid_root_is_the_folder_in_both_scripts(tmp_path):
    (tmp_path / "train").mkdir()
    there = run("download", "camvid", CAMVID_ROOT=tmp_path)
    assert there.returncode == 0 and there.stdout == f"{tmp_path}: there already\n"
    missing = run("camvid", CAMVID_ROOT=tmp_path, PYTHON=sys.executable)
    assert missing.returncode == 2 and f"error: {tmp_path}/trainannot: no such" in missing.stderr


# ---------------------------------------------------------------------------------------- preflight


@pytest.fixture
def empty_machine(tmp_path):
    """A copy of the scripts alone, and a folder with the standard tools and no Python; `bare` is a
    Python that has the standard library only.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "scripts", tmp_path / "kit/scripts", ignore=ignored)
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -B -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    return tmp_path / "kit", tmp_path / "bin", bare


@pytest.mark.parametrize("task", SCRIPTS_OF_TASKS)
def test_preflight_names_everything_at_once_and_writes_nothing(empty_machine, task):
    folder, tools, bare = empty_machine
    before = sorted(folder.rglob("*"))
    result = run(task, folder=folder, PATH=tools, PYTHON=bare)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) <= 24 and "things are missing; nothing was done" in lines[0]
    for wanted in (
        "/train: 0 of",
        "/val: 0 of",
        "login",
        "sam_vit_h_4b8939.pth",
        "download.sh sam vit_h",
        "pretrained/resnet101.pth",
        "an NVIDIA GPU",
        "the model that the starting labels come from",
    ):
        assert wanted in result.stderr, wanted
    result = run(task, folder=folder, PATH=tools)
    assert result.returncode == 2 and result.stderr.startswith("error: Python 3.10 or newer is")
    assert result.stderr.count("\n") == 1 and sorted(folder.rglob("*")) == before


def asked(capsys, tmp_path, **more):
    """What preflight says of a task all of whose files are there: (exit code, stdout, stderr)."""
    file = tmp_path / "weights.pth"
    file.touch()
    names = ("CHECKPOINT", "SAM_CHECKPOINT", "BACKBONE_WEIGHTS", "SCC_WEIGHTS")
    given = {"TITLE": "T", "DATA": "bdd", "DATA_ROOT": tmp_path, "DEVICE": "cpu", "GPUS": ""}
    given |= {"GLOBAL_BATCH": 8, "USE_SCC": 1, "SAM_TYPE": "vit_h", "CHECKPOINT_FROM": "x"}
    given |= dict.fromkeys(names, file) | more
    code = preflight.main({name: str(value) for name, value in given.items()})
    return code, *capsys.readouterr()


def test_preflight_is_about_what_is_missing_only(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(preflight, "missing_data", lambda *_: [])
    monkeypatch.setattr(preflight, "DISK_GB", 0)
    none = tmp_path / "none"
    assert asked(capsys, tmp_path) == (0, "0\n", "")
    assert asked(capsys, tmp_path, USE_SCC=0, SCC_WEIGHTS=none)[0] == 0
    for name, words in (
        ("CHECKPOINT", f"{none}: the model that the starting labels come from"),
        ("PROBABILITIES", f"{none}: no such folder (PROBABILITIES)"),
        ("LABELS", f"{none}: no such folder (LABELS)"),
        ("SAM_CHECKPOINT", f"{none}: SAM's weights"),
        ("BACKBONE_WEIGHTS", f"{none}: UniMatch's ImageNet ResNet-101"),
        ("SCC_WEIGHTS", f"{none}: ImageNet weights of SCC's ResNet-101"),
    ):
        code, out, error = asked(capsys, tmp_path, **{name: none})
        assert (code, out) == (2, "") and "T: 1 thing is missing" in error and words in error
    monkeypatch.setattr(preflight, "DISK_GB", 60)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7_900_000_000))
    given = {"PROBABILITIES": tmp_path, "CHECKPOINT": none}  # arrays in the checkpoint's place
    code, _, error = asked(capsys, tmp_path, **given)
    assert code == 2 and "1 thing is" in error and "60 GB of free disk here (7 are free)" in error


@pytest.mark.parametrize(
    "count, visible, expected",
    [
        *((8, None, 8), (8, "2, 3", 2), (8, "GPU-5", 1), (8, "1,0,-1,2,3", 2), (8, "1,,2,3", 1)),
        *((2, "1,0,2,3", 2), (2, "2", 0), (1, "MIG-a,MIG-b", 1), (8, "", 0), (None, None, 0)),
    ],
    ids=str,
)
def test_gpus_that_cuda_sees(monkeypatch, tmp_path, count, visible, expected):
    """count: GPUs that nvidia-smi lists; None: there is no nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if count is not None:
        lines = "".join(f"echo 'GPU {n}: a card (UUID: GPU-{n})'\n" for n in range(count))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}", encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert preflight.gpus_found() == expected


EVENLY = "for GPUS one of 1, 2, 4, or leave it out"


@pytest.mark.parametrize(
    "found, settings, processes, said",
    [
        (8, {}, 8, ""),
        (8, {"device": "cuda"}, 8, ""),
        (8, {"asked": "2"}, 2, ""),
        (8, {"device": "cpu"}, 0, ""),
        (7, {}, 4, "note: 4 of 7 GPUs are used"),
        (8, {"batch": 4}, 4, "note: 4 of 8 GPUs are used"),
        (0, {}, None, "an NVIDIA GPU (nvidia-smi shows none, or CUDA_V"),
        (2, {"asked": "4"}, None, "GPUS=4: the GPUs here are cuda:0 to cuda:1"),
        *((8, {"asked": x}, None, f"GPUS={x}: the GPUs here") for x in ("0", "08", "two", "16")),
        *((6, {"asked": x}, None, EVENLY) for x in ("6", "3")),
        (8, {"device": "cuda:1"}, 1, ""),
        (8, {"device": "cuda:1", "asked": "1"}, 1, ""),
        (8, {"device": "cuda:1", "asked": "2"}, None, "DEVICE=cuda:1 GPUS=2: the GPUs here are"),
        (2, {"device": "cuda:2"}, None, "DEVICE=cuda:2 GPUS=: the GPUs here are cuda:0 to cuda:1"),
    ],
    ids=str,
)
def test_processes_fit_the_gpus_and_the_global_batch(capsys, found, settings, processes, said):
    """processes: None where something is missing."""
    given = {"device": "auto", "asked": "", "batch": 8, **settings, "found": found}
    count, missing = preflight.gpus_to_use(**given)
    if processes is None:
        assert len(missing) == 1 and said in " ".join(missing[0])
    else:
        assert (count, missing) == (processes, [])
        assert (note := capsys.readouterr().err).startswith(said) and bool(note) == bool(said)


STUB = """#!/bin/sh
case "$1" in
    -) ;;
    -c | *preflight.py) exec {python} "$@" ;;
    *) echo "ran: $*" ;;
esac
"""


def test_gpus_share_the_work_which_may_start_from_arrays_and_leave_scc_out(empty_machine, tmp_path):
    """All files and four GPUs are there: the long commands are started by torchrun. A python that
    prints what it is to run stands for it.
    """
    folder, tools, stub = empty_machine
    stub.write_text(STUB.format(python=sys.executable), encoding="utf-8")
    (tools / "nvidia-smi").write_text("#!/bin/sh\n" + 4 * "echo GPU\n", encoding="utf-8")
    (tools / "nvidia-smi").chmod(0o755)
    (tools / "tee").symlink_to(shutil.which("tee"))
    path = folder / "scripts/lib/preflight.py"
    path.write_text(path.read_text(encoding="utf-8").replace("DISK_GB = 60", "DISK_GB = 0"))
    for name in ("leftImg8bit/train/a_left", "leftImg8bit/val/a_left", "gtFine/val/a_gt"):
        ending = "Fine_labelIds.png" if name.endswith("gt") else "Img8bit.png"
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / (name + ending)).touch()
    weights = ("CHECKPOINT", "SAM_CHECKPOINT", "BACKBONE_WEIGHTS")
    values = {name: stub for name in weights} | {"DATA_ROOT": tmp_path, "OUT": tmp_path}
    result = run("gta2cs", folder=folder, PATH=tools, PYTHON=stub, **values)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    ran = [line for line in result.stdout.splitlines() if line.startswith("ran: ")]
    shared = [re.search(r"nproc_per_node 4 (?:-m )?(\S+)", line) for line in ran]
    shared = [match and match[1] for match in shared]
    assert shared == [
        *(None, None, None, "scripts.make_pseudo_labels", "seco_sam.py", "seco_scc.py", None),
        *("train_unimatch.py", "eval.py", None, None),
    ]
    values |= {"PROBABILITIES": tmp_path, "USE_SCC": 0}
    ran = run("gta2cs", folder=folder, PATH=tools, PYTHON=stub, **values).stdout
    assert "before: skipped" in ran and "seco_scc.py" not in ran
    assert f"--probabilities {tmp_path} --exp DTST_gta --preset dtst" in ran
    assert "--labeled-id-path splits/cityscapes/DTST_gta_vit_h/labeled.txt" in ran


# --------------------------------------------------------------------------------------- rehearsals


def rehearsed_task(task, out, timeout=480, **values):
    return run(task, timeout=timeout, REHEARSE=1, OUT=out, PYTHON=warm_python(), **values)


def times(out: Path) -> dict[str, int]:
    """When what takes long was made."""
    patterns = ("**/*.pth", "**/metrics.json", "inputs/data/DTST_*/**/*.png")
    files = [path for pattern in patterns for path in out.glob(pattern)]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


def rehearse(task, out):
    """Run a rehearsal twice: everything, then nothing but the comparison. Checks what it leaves."""
    data, class_num, experiment, suffix, log = TASKS[task]
    result = rehearsed_task(task, out)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert f"reference: training_logs/{log}" in result.stdout
    assert "rehearsal complete" in result.stdout and f"OUT={out}" in result.stdout

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

    before = times(out)
    again = rehearsed_task(task, out, PYTHONIOENCODING="latin-1")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert times(out) == before and len(before) > 10


@pytest.mark.parametrize(
    "task",
    ["gta2bdd", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gta2cs", "synthia2cs"))],
)
def test_rehearsal(task, tmp_path):
    rehearse(task, tmp_path / "run")
