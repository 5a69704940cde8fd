"""What a file needs when it is copied into another repository: the list in its head is what it and
all that it imports from this repository import, also within functions.

In a head: `Needs when copied away: model/sam.py, util/{labels,run}.py.`, to the end of the
paragraph. A folder (`util/`) stands for all files in it. Words in brackets are not read; files and
folders of data must exist.
"""

import ast
import re
import shutil
import subprocess
from functools import cache

import pytest
from conftest import ROOT
from processes import warm_python

from dataset.toy import SPLITS, make_toy

HEAD = re.compile(
    r"(?:Needs when copied away:|Copied away, this file needs)(.*?)(?:\n\s*\n|\Z)", re.S
)


def module_file(name: str) -> str | None:
    """`util.run` → `util/run.py`, `dataset.toy` → `dataset/toy/__init__.py`; None if not ours."""
    path = name.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / file).is_file():
            return file
    return None


@cache
def imports(file: str) -> frozenset[str]:
    """The files of this repository that a file imports itself. Empty __init__.py do not count."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {module_file(name) for name in names if name}
    found = {name for name in found if name and (ROOT / name).stat().st_size}
    return frozenset(found - {file})


def needed(file: str) -> set[str]:
    """All files of this repository that a file needs, directly or not."""
    found, todo = set(), [file]
    while todo:
        for name in imports(todo.pop()) - found:
            found.add(name)
            todo.append(name)
    return found - {file}


def listed(text: str) -> set[str]:
    """The files and folders that a head names, with `{a,b}` written out."""
    text = re.sub(r"\([^()]*\)", " ", text)
    found = set()
    for word in re.findall(r"[\w./]+(?:\{[^}]*\}[\w.]*)?", text):
        match = re.match(r"(.*)\{(.*)\}(.*)", word, re.S)
        parts = [p.strip() for p in match[2].split(",")] if match else [""]
        for part in parts:
            name = f"{match[1]}{part}{match[3]}" if match else word
            if "/" in name or name.rstrip(".").endswith(".py"):
                found.add(name.rstrip("."))
    return found


def covers(entry: str, file: str) -> bool:
    return file.startswith(entry) if entry.endswith("/") else file == entry


def any_code(entry: str) -> bool:
    return (ROOT / entry).is_dir() and any((ROOT / entry).glob("**/*.py"))


def heads() -> dict[str, str]:
    """{file: what its head says} of all files that say it."""
    found = {}
    folders = ("model", "dataset", "util", "scripts")
    below = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    for path in (*sorted(ROOT.glob("*.py")), *below):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if match := HEAD.search(docstring):
            found[path.relative_to(ROOT).as_posix()] = match[1]
    return found


def test_the_heads_are_found_and_read():
    scripts = {"seco_sam.py", "seco_scc.py", "train_unimatch.py", "eval.py"}
    scripts |= {"scripts/lib/rehearsal_data.py", "scripts/dev/sam_tiny.py"}
    assert scripts <= heads().keys()
    text = (
        " model/sam.py (UserError, x/y.py), util/{run,\nlabels}.py and, for `tiny`, a/b.pth. data/."
    )
    assert listed(text) == {"model/sam.py", "util/run.py", "util/labels.py", "a/b.pth", "data/"}
    assert "util/run.py" in needed("eval.py") and "eval.py" in needed("train_unimatch.py")


@pytest.mark.parametrize("file", heads())
def test_a_head_lists_what_the_file_needs(file):
    said, files = listed(heads()[file]), needed(file)
    missing = {name for name in files if not any(covers(entry, name) for entry in said)}
    data = {entry for entry in said if not entry.endswith(".py") and not any_code(entry)}
    too_many = {entry for entry in said - data if not any(covers(entry, name) for name in files)}
    absent = {entry for entry in data if not (ROOT / entry).exists()}
    assert not (missing or too_many or absent), (
        f"{file}: its head lacks {sorted(missing)}, lists for nothing {sorted(too_many)}, names"
        f" files that are not there {sorted(absent)}; it needs: {sorted(files)}"
    )


@pytest.mark.parametrize(
    "folder, below",
    [
        ("util", ("util/",)),
        ("dataset", ("util/", "dataset/")),
        ("model", ("util/", "dataset/", "model/")),
    ],
)
def test_a_folder_imports_nothing_that_stands_above_it(folder, below):
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
    above = {file: {name for name in imports(file) if not name.startswith(below)} for file in files}
    assert files and not {file: names for file, names in above.items() if names}


COMMANDS = {  # on drawn scenes, one after the other
    "scripts/prepare_data.py": "list --id-list-path toy/s0/lists/target_train_gt.txt --root-path .",
    "train_unimatch.py": "--supervised --labeled-id-path toy/s0/lists/source_train.txt"
    " --val-id-path toy/s0/lists/target_val.txt --root-path . --backbone resnet10"
    " --stem torchvision --crop-size 33 --global-batch 2 --epochs 1 --workers 0 --save-path run",
    "scripts/make_pseudo_labels.py": "--id-list-path toy/s0/lists/target_train.txt --root-path ."
    " --checkpoint run/latest.pth --exp pix --out-list splits/pix/all.txt",
    "seco_sam.py": "--id-list-path splits/pix/all.txt --root-path . --sam-type tiny --vis 1"
    " --only-prompting",
    "seco_scc.py": "--id-list-path splits/pix/all.txt --root-path . --backbone resnet10"
    " --backbone-weights none --patch-size 32 64 --iterations 1 --batch-size 4",
    "scripts/make_split.py": "--id-list-path splits/pix_scc/all.txt --root-path .",
    "eval.py": "--checkpoint run/latest.pth --id-list-path toy/s0/lists/target_val.txt"
    " --root-path . --out evaluation",
    "scripts/compare_logs.py": "run run --picture compare.png",
}


def test_a_script_runs_with_the_files_of_its_head_alone(tmp_path):
    data = tmp_path / "data"
    make_toy(data, 0, dict(zip(SPLITS, (2, 2, 1))))
    for file, command in COMMANDS.items():
        for name in {file, *listed(heads()[file])}:
            target = tmp_path / file / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, target)
        program = [warm_python(), str(tmp_path / file / file), *command.split()]
        run = subprocess.run(program, cwd=data, capture_output=True, text=True)
        assert run.returncode == 0, f"{file}: {run.stderr}"
