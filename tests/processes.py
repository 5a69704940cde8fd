"""Processes that tests start: a python that starts at once, and the second process of a run whose
first is the test itself."""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT


@functools.cache
def warm_python() -> str:
    """An executable that does what sys.executable does, but starts at once (warm_python.py)."""
    program, folder = f"{ROOT}/tests/warm_python.py", tempfile.TemporaryDirectory()
    listener, address = socket.socket(socket.AF_UNIX), f"{folder.name}/socket"
    listener.bind(address)
    listener.listen()
    warm_python.server = (
        folder,
        subprocess.Popen(  # ends when this process does
            [sys.executable, program, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        ),
    )
    script = Path(folder.name, "python")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {program} {address} "$@"\n')
    script.chmod(0o755)
    return str(script)


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import {script}
{first}
calls = {calls}
def wrapped(*arguments, original={script}.{name}, **options):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
{script}.{name} = wrapped
{script}.main(sys.argv[1:])
"""


def killed(script: str, name: str, calls: int, argv: list[str], first: str = "") -> None:
    """Run a script's main in a process that is killed (SIGKILL) when it calls the function `name`
    of its module once more than `calls` times. first: a line of Python that is run before.
    """
    code = KILLED.format(script=script, name=name, calls=calls, first=first)
    command = [warm_python(), "-c", code, *argv]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def beside_a_second(monkeypatch, first: Callable[[], object], *second: str) -> str:
    """Call `first()` here as process 0 of 2 while `python <second>` runs as process 1, with the
    variables that torchrun sets. The second must succeed; returns what it printed on stdout.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.Popen(
        [warm_python(), *second],
        cwd=ROOT,
        env={**os.environ, **shared, "RANK": "1", "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with monkeypatch.context() as patch:
            for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
                patch.setenv(name, value)
            first()
        out, error = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out
