"""The code is as the formatter writes it and the linter accepts it (settings: pyproject.toml); text
files have an encoding."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def without_encoding(code: str) -> list[int]:
    """Lines that open a text file in the encoding of the locale, or read a command's output in it
    (the linter's rule for this does not see that `args.run / "x.md"` is a path).
    """
    found = []
    for call in ast.walk(ast.parse(code)):
        words = {word.arg for word in getattr(call, "keywords", ())}
        if not isinstance(call, ast.Call) or "encoding" in words:
            continue
        callee, modes = ast.unparse(call.func), map(ast.unparse, call.args[1:2])
        text_file = callee == "open" and not any("b" in mode for mode in modes)
        if text_file or callee.endswith((".read_text", ".write_text")) or "text" in words:
            found.append(call.lineno)
    return found


def test_text_files_do_not_depend_on_the_locale():
    code = 'open(x)\nopen(x, "rb")\n(a / b).write_text(x)\nImage.open(x)\nrun(x, text=True)\n'
    assert without_encoding(code) == [1, 3, 5]
    folders = ("dataset", "model", "scripts", "util")
    files = [
        *ROOT.glob("*.py"),
        *(path for name in folders for path in (ROOT / name).rglob("*.py")),
    ]
    codes = {str(path): path.read_text(encoding="utf-8") for path in files}
    setup = (ROOT / "scripts/lib/setup.sh").read_text(encoding="utf-8")
    codes["setup.sh"] = setup.split("<<'CHECK' 2>/dev/null\n")[1].split("\nCHECK\n")[0]
    assert {str(ROOT / name) for name in ("eval.py", "scripts/lib/report.py")} <= codes.keys()
    found = {name: lines for name, code in codes.items() if (lines := without_encoding(code))}
    assert not found
