"""The scripts' variables are an interface: a mistake in one is one line and exit code 2."""

import os
import re
import subprocess
import sys
from itertools import takewhile

import pytest
from conftest import ROOT

from model.sam import output_name

SCRIPTS = ("toy", "camvid", "ablation", "gta2cs", "synthia2cs", "gta2bdd", "download", "test")
KNOWN = re.search(r"KIT_VARIABLES=\((.*?)\)", (ROOT / "scripts/lib/variables.sh").read_text(), re.S)
KNOWN = set(KNOWN[1].split())


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """With a python that fails, so that nothing is ever set up or run."""
    clean = {name: value for name, value in os.environ.items() if name not in KNOWN}
    return subprocess.run(
        ["bash", str(ROOT / f"scripts/{script}.sh"), *arguments],
        env={**clean, "PYTHON": "false", **variables},
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize(
    "script, name, value, words",
    [
        ("toy", "RECIPE", "cake", "give one of release, paper, both"),
        ("toy", "SEEDS", "x", "give whole numbers from 0 to 99"),
        ("toy", "SEEDS", "0 100", "give whole numbers from 0 to 99"),
        ("toy", "SEEDS", "99999999999999999999", "give whole numbers from 0 to 99"),
        ("toy", "CONTROLS", "yes", "give one of 0, 1"),
        ("toy", "SMALLEST", "2", "give one of 0, 1"),
        ("toy", "CONTROL", "1", "is CONTROLS meant"),
        ("toy", "RECPIE", "paper", "is RECIPE meant"),
        ("toy", "SEED", "1", "scripts/toy.sh has no such variable, but PYTHON SEEDS RECIPE"),
        ("toy", "USE_SCC", "0", "has no such variable"),
        ("camvid", "SAM_TYPE", "huge", "give one of tiny, vit_t, vit_b, vit_l, vit_h"),
        ("camvid", "RECIPES", "paper", "is RECIPE meant"),
        ("gta2cs", "RECIPE", "both", "give one of release, paper"),
        ("gta2cs", "SEED", "-1", "give whole numbers from 0 to 4294967295"),
        ("gta2cs", "DEVICE", "banana", "give auto, cpu, cuda or cuda:N"),
        ("gta2bdd", "DEVICE", "cuda:x", "give auto, cpu, cuda or cuda:N"),
        ("gta2bdd", "DEVICE", "mps", "give auto, cpu, cuda or cuda:N"),
        ("gta2cs", "SEEDS", "1", "scripts/gta2cs.sh has no such variable"),
        ("synthia2cs", "REHEARSAL", "1", "SILENT"),
        ("synthia2cs", "REHERSE", "1", "is REHEARSE meant"),
        ("gta2bdd", "USE_SCC", "no", "give one of 0, 1"),
        ("gta2bdd", "PROBABILITES", "x", "is PROBABILITIES meant"),
        ("gta2bdd", "STEM", "shallow", "give one of deep, torchvision"),
        ("download", "SAM_DIRS", "x", "is SAM_DIR meant"),
        ("test", "OUT", "x", "scripts/test.sh has no such variable"),
    ],
)
def test_a_wrong_variable_is_one_line(script, name, value, words):
    result = run(script, **{name: value})
    if words == "SILENT":  # not near enough to any: the preflight comes next
        assert result.returncode == 2 and "things are missing" in result.stderr
        return
    assert result.returncode == 2 and result.stdout == "", result.stdout
    assert result.stderr.startswith(f"error: {name}={value}: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, variables, words",
    [
        (["toy"], {"SEEDS": "q"}, "error: SEEDS=q: give whole numbers"),
        (["toy"], {"RECIPE": "paper"}, "error: RECIPE=paper: scripts/ablation.sh has no such"),
        (["camvid"], {"CAMVID_ROT": "x"}, "error: CAMVID_ROT=x: is CAMVID_ROOT meant"),
        ([], {}, "error: bash scripts/ablation.sh toy|camvid"),
        (["tiny"], {}, "error: bash scripts/ablation.sh toy|camvid"),
        (["toy", "paper"], {}, "error: paper: scripts/ablation.sh takes no such argument"),
    ],
)
def test_ablation_checks_as_well(arguments, variables, words):
    result = run("ablation", *arguments, **variables)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(words) and result.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["toy", "camvid", "gta2cs", "synthia2cs", "gta2bdd"])
def test_an_argument_is_an_error(script):
    result = run(script, "--seed", "1")
    assert result.returncode == 2 and result.stdout == ""
    name = f"scripts/{script}.sh"
    assert result.stderr == f"error: --seed: {name} takes no such argument; bash {name} --help\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_the_head_of_the_script(script, argument):
    result = run(script, argument)
    assert result.returncode == 0 and result.stderr == ""
    text = (ROOT / f"scripts/{script}.sh").read_text()
    head = takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    head = [line[1:].removeprefix(" ") for line in head]
    assert result.stdout.startswith("\n".join(head) + "\n\nEnvironment variables: PYTHON")


def test_every_variable_of_the_scripts_is_in_the_list():
    """`NAME="${NAME:-…"` takes NAME from the environment."""
    found = set()
    for path in [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts/lib").glob("*.sh")]:
        found |= set(re.findall(r"\b([A-Z_]+)=\"?\$\{\1:-", path.read_text()))
    assert {"OUT", "RECIPE", "DATA_ROOT", "SAM_URL", "PROBABILITIES"} <= found
    assert found <= KNOWN


def test_two_near_words(tmp_path):
    script = 'source scripts/lib/variables.sh; near "$1" "$2"'
    for a, b, expected in (
        ("CONTROL", "CONTROLS", 0),
        ("SEEDS", "SEDES", 0),
        ("OUT", "OUR", 0),
        ("XOUT", "OUT", 0),
        ("SEEDS", "SEE", 1),
        ("RECIPE", "REPICE", 1),
        ("PATH", "PYTHON", 1),
        ("HOME", "OUT", 1),
    ):
        command = ["bash", "-c", script, "near", a, b]
        assert subprocess.run(command, cwd=ROOT).returncode == expected, (a, b)


def test_no_carriage_returns_where_there_is_no_terminal(tmp_path):
    """curl's and pip's bars are for terminals alone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "curl").write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    (tools / "curl").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = run("download", "camvid", PATH=path, CAMVID_ROOT=str(tmp_path / "camvid"))
    assert result.returncode == 2 and "--silent" in result.stdout
    assert "progress" not in result.stdout and "could not be fetched" in result.stderr


def test_camvid_root_is_the_folder_in_both_scripts(tmp_path):
    (tmp_path / "train").mkdir()
    there = run("download", "camvid", CAMVID_ROOT=str(tmp_path))
    assert there.returncode == 0 and there.stdout == f"{tmp_path}: there already\n"
    missing = run("camvid", CAMVID_ROOT=str(tmp_path), PYTHON=sys.executable)
    assert missing.returncode == 2 and f"error: {tmp_path}/trainannot: no such" in missing.stderr


@pytest.mark.parametrize(
    "sam_type", ["vit_h", "facebook/sam2.1-hiera-large", "models/my sam/", "./sam3"]
)
def test_outputs_are_named_after_the_segmenter_as_seco_sam_does(sam_type):
    command = ["bash", "-c", 'source scripts/lib/variables.sh; sam_name "$1"', "x", sam_type]
    name = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert name.strip() == output_name(sam_type)
