"""However a script is started, and whatever its terminal can show: by file or by module, from any
folder, in a locale without Unicode."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts import compare_logs
from util.run import run_main

FILES = [
    path
    for pattern in ("*.py", "dataset/**/*.py", "scripts/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    and path.name != "preflight.py"  # which has no options
]
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# Starts each command in a fork of a process that has the large packages, and leaves it without
# tidying up: a fraction of a second and not eight each.
STARTER = """
import json, os, runpy, sys, traceback
import cv2, numpy, scipy.ndimage, segment_anything, sklearn.mixture, torch, torchvision

codes = {}
for argv in json.loads(sys.argv[1]):
    if not os.fork():
        sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code or 0)
        except Exception:
            traceback.print_exc()
        os._exit(1)
    codes[argv[0]] = os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps(codes))
"""


def test_every_script_starts_as_a_file(tmp_path):
    """`python <file> --help` from another folder, in an ASCII locale."""
    assert len(FILES) >= 16
    commands = [[str(path), "--help"] for path in FILES]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", STARTER, json.dumps(commands)],
        cwd=tmp_path,
        env={**clean, **ASCII_LOCALE},
        capture_output=True,
        encoding="ascii",
    )
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {command[0]: 0 for command in commands}, result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_are_printed_on_any_terminal(tmp_path, monkeypatch, encoding):
    log = str(ROOT / "training_logs/seco_gta")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    arguments = [log, log, "--picture", str(tmp_path / "x.png")]
    assert run_main(lambda: compare_logs.main(arguments)) == 0
    terminal.flush()
    shown = terminal.buffer.getvalue().decode(encoding)
    assert f" {'?' if encoding == 'ascii' else '±'}10.15 pass" in shown


def test_a_stream_in_the_place_of_stdout_may_be_of_any_kind():
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run_main(lambda: print("→")) == 0
    assert text.getvalue() == "→\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    """As `… | head -1`."""
    code = "from util.run import run_main; raise SystemExit(run_main(lambda: print(9**7 * 'x\\n')))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"x\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
