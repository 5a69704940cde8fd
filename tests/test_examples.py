"""The commands in the heads of the scripts and in the folders' READMEs: each can be given as it
stands, and Cityscapes lies where download.sh and prepare_data.py put it."""

import ast
import re

import pytest
from conftest import ROOT
from test_readme import COMMAND, help_text

FILES = [
    *ROOT.glob("*.py"),
    *ROOT.glob("scripts/**/*.py"),
    *ROOT.glob("dataset/**/*.py"),
    *(path for path in ROOT.glob("[!.]*/**/README.md") if "runs" not in path.parts),
]


def commands(text: str) -> list[str]:
    """The commands of a head or a README, each in one line, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = (line.strip().split("   #")[0] for line in lines)
    return [line for line in found if re.match(r"([A-Z_]+=\S* )*(python|torchrun) ", line)]


def examples() -> list[tuple[str, str, str]]:
    """(file, command, script) of all; not those that have no options of their own."""
    found = []
    for path in sorted(FILES):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        for command in commands(text):
            match = COMMAND.search(command)
            if match and "save_probabilities.py" not in command and " -- " not in command:
                script = match[3] or match[2].replace(".", "/")
                script += "" if match[3] else "/__main__.py" * (ROOT / script).is_dir() or ".py"
                found.append((path.relative_to(ROOT).as_posix(), command, script))
    return found


def test_the_examples_are_found():
    files = {file for file, _, _ in examples()}
    for script in ("seco_sam", "seco_scc", "train_unimatch", "eval", "scripts/make_split"):
        assert f"{script}.py" in files
    assert {"model/README.md", "splits/README.md", "scripts/README.md"} <= files


@pytest.mark.parametrize("file, command, script", examples(), ids=str)
def test_an_example_can_be_given(file, command, script):
    assert (ROOT / script).is_file(), script
    options = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", COMMAND.search(command)[4]))
    assert options <= set(re.findall(r"--[a-z][a-z-]*", help_text(script)))
    if "splits/cityscapes/" in command:
        assert "--root-path data/cityscapes" in command
