"""The README's commands: every script that it names is there and takes the options that it gives;
every link leads to a file."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(script, its options) of every command in code blocks and inline code, in order, each
    once.
    """
    code = re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    found = []
    for line in "\n".join(code).splitlines():
        if match := re.search(
            r"(?:python|bash|torchrun\b.*?)\s+([\w./]+\.(?:py|sh))(.*)", line.split(" #")[0]
        ):
            found.append((match[1], tuple(re.findall(r"(?<!\S)--[a-z][a-z-]*", match[2]))))
    return list(dict.fromkeys(found))


@cache
def help_text(script: str) -> str:
    run = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_commands_are_found():
    text = (
        "Do `python a.py --one 1`.\n```bash\nOMP_NUM_THREADS=1 python b/c.py x --two --three-four 2"
        "   # --five\nbash d.sh\n```\n`--six`"
    )
    assert commands(text) == [
        ("b/c.py", ("--two", "--three-four")),
        ("d.sh", ()),
        ("a.py", ("--one",)),
    ]
    assert {
        "scripts/toy.sh",
        "scripts/test.sh",
        "seco_sam.py",
        "seco_scc.py",
        "train_unimatch.py",
        "eval.py",
    } <= {script for script, _ in commands(README)}


@pytest.mark.parametrize(
    "script, options", commands(README), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_of_the_readme_can_be_given(script, options):
    assert (ROOT / script).is_file(), script
    if script.endswith(".py"):
        known = set(re.findall(r"--[a-z][a-z-]*", help_text(script)))
        assert set(options) <= known, script
    else:
        assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0 and options == ()


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links if not link.startswith("http"))
