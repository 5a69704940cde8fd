"""Two processes of one run, of which the test itself is the first: half the start-up time."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable

from conftest import ROOT


def beside_a_second(monkeypatch, first: Callable[[], object], *second: str) -> str:
    """Call `first()` here as process 0 of 2 while `python <second>` runs as process 1, with the
    variables that torchrun sets. The second must succeed; returns what it printed on stdout.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, *second],
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
