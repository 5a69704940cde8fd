"""A Python whose commands start at once, since it forks a process that has the large packages.

`warm_python.py ADDRESS ARGUMENT…` does what `python ARGUMENT…` does, with its own folder,
environment, streams and exit code. `warm_python.py LISTENER` is the process that it asks, until
stdin ends; the listening socket is file descriptor LISTENER.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import socket
import sys
import traceback

LARGE = (
    *("cv2", "matplotlib.pyplot", "scipy.ndimage", "segment_anything", "sklearn.mixture"),
    *("torch._dynamo", "torch.utils.tensorboard", "torchvision"),
)


def ask(address: str, arguments: list[str]) -> int:
    """Have a command run in a fork of the other process; its exit code."""
    asked = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(asked)
        code = int(server.makefile().read())
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def forked(listener: socket.socket) -> list[str]:
    """Fork for each command that is asked for; its arguments, in the fork."""
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            sys.exit()
        client = listener.accept()[0]
        if not os.fork():
            break
        client.close()
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    asked = client.makefile("rb").read(int.from_bytes(head, "big"))
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.sendall(str(code).encode())
        os._exit(0)
    arguments, folder, environment = json.loads(asked)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for file in (listener, client, *map(os.fdopen, streams)):
        file.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    how = {"encoding": environment.get("PYTHONIOENCODING", "utf-8"), "closefd": False}
    sys.stdin, sys.stdout = open(0, **how), open(1, "w", 1, **how)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", **how)
    return arguments


def python(how: str, *arguments: str) -> None:
    """What `python how arguments…` runs."""
    if how == "-m":
        sys.argv, sys.path[0] = list(arguments), os.getcwd()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif how in ("-c", "-"):
        code, *more = arguments if how == "-c" else (sys.stdin.read(), *arguments)
        sys.argv, sys.path[0] = [how, *more], ""
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [how, *arguments], os.path.dirname(os.path.abspath(how))
        runpy.run_path(how, run_name="__main__")


def serve(listener: socket.socket) -> None:
    """Run, in a fork, what is asked for."""
    for package in LARGE:
        importlib.import_module(package)
    gc.freeze()  # so that the forks share its memory
    arguments, code = forked(listener), 0
    try:
        python(*arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # without taking the packages down, which takes half a second


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(socket.socket(fileno=int(sys.argv[1])))
