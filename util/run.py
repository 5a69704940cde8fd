"""Run-time plumbing that the scripts share: user errors, atomic files, seeds, devices, processes,
manifests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np


class UserError(Exception):
    """A mistake of the user's, told in one line that names the file or option, the value and the
    mend.
    """


def run_main(main) -> int:
    """Call `main()` for a script: a UserError becomes one line on stderr and exit code 2, Ctrl-C
    exit code 130.
    """
    try:
        return main() or 0
    except UserError as error:
        # A worker process of a data loader hands its error on as a traceback, whose last line ends
        # in the message.
        print(f"error: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130


# -------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if
    not.

    Readers see the old file or the whole new one, never half of it, whenever the process is killed.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: str | Path) -> None:
    """Delete what `atomic_path` left in `folder` when its process was killed. No other process may
    be writing there.
    """
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Fail early if files cannot be made in `folder` (which is created)."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror or error}); choose another folder"
        ) from None


def write_json(path: str | Path, value) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def check_settings(
    path: str | Path,
    settings: dict,
    what: str = "results of",
    mend: str = "remove the folder or rename the experiment",
) -> None:
    """Note the settings of a new output folder in `path`; in one that has some, they must be the
    same, so that results of different settings are never mixed. what, mend: words of the error.
    """
    path = Path(path)
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path.parent}: holds {what} {name} = {before.get(name)}, now it is"
                f" {settings.get(name)}; {mend}"
            )


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------ seeds, devices, exactness


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def select_device(name: str):
    """torch.device for --device: auto takes CUDA where there is one; with several processes, GPU
    LOCAL_RANK.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if name == "cuda":
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(torch.device(name))
    return torch.device(name)


def add_run_options(parser, seed: bool = True) -> None:
    """--device and --seed, the same in every script."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    if seed:
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of all random numbers (default: 0)"
        )


def exact_mode() -> None:
    """fp32 without TF32 and with deterministic convolutions, so that results do not depend on the
    GPU's mood.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


# ---------------------------------------------------------------------------------------- processes


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) under torchrun; (0, 1) under plain python."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for(paths: list[Path], what: str) -> None:
    """Wait until all files are there, which other processes make; says once for `what`."""
    told = False
    while not all(path.is_file() for path in paths):
        if not told:
            print(f"waiting for {what}")
        told = True
        time.sleep(0.5)


@contextlib.contextmanager
def process_group(device, timeout_seconds: int = 120):
    """Join torchrun's process group for the block (nccl on CUDA, gloo elsewhere); nothing under
    plain python.
    """
    rank, world = process_rank()
    if world == 1:
        yield rank, world
        return
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ records


def peak_memory_mb(device=None) -> dict[str, float]:
    """Peak resident memory of this process and, on CUDA, peak allocated device memory, in MB (10^6
    bytes).
    """
    scale = 1 if sys.platform == "darwin" else 1024
    memory = {"host_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6, 1)}
    if device is not None and device.type == "cuda":
        import torch

        memory["device_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return memory


def path_from_here(path: str | Path) -> str:
    """The path as a record names it: relative where it lies in the working folder or in this
    repository.
    """
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if Path(path).is_absolute() and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
    return str(path)


def manifest(options: dict, inputs: dict[str, str | Path] | None = None) -> dict:
    """What a run was made from: command, options, versions, git state, hardware, SHA-256 of the
    files in `inputs`.
    """
    import torch
    import torchvision

    here = Path(__file__).resolve().parent

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(here), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {k: path_from_here(v) if isinstance(v, Path) else v for k, v in options.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "git": {
            "commit": git("rev-parse", "HEAD"),
            "changed": None if changed is None else bool(changed),
        },
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "inputs": {
            name: {"path": path_from_here(path), "sha256": sha256(path)}
            for name, path in (inputs or {}).items()
        },
    }


class Stopwatch:
    """Seconds spent per named stage: `with watch("encode"): …`; `watch.seconds` is the table."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, stage: str, threads: int = 1):
        """threads: how many do this stage side by side; each of them counts that part of its
        time.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = (
                    self.seconds.get(stage, 0.0) + (time.perf_counter() - start) / threads
                )


def tune_cpu() -> None:
    """Settle two things that cost small machines half of the time. Call it before the first
    computation.

    Denormal numbers count as zero: a softmax over a thousand tokens is full of them, and a CPU
    takes many times longer over each. Threads inherit this from the one that starts them. And glibc
    keeps freed memory for the next step instead of returning it to the kernel, whose page faults
    are slow on virtual machines.
    """
    import torch

    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (-1, -1),
            (-2, 2**28),
            (-4, 0),
            (-8, 1),
        ):  # never trim; pad, no mmap, one arena
            mallopt(parameter, value)
