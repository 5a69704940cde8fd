"""What the scripts share while they run: user errors, seeds, devices, processes, progress,
manifests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

RENDEZVOUS_SECONDS = 120  # for the processes of a run to find each other
WORK_SECONDS = 24 * 3600  # that one process may take longer than another
SECONDS_BETWEEN_LINES = 30  # of progress, in a log file
STARTED = time.time()  # of this process

# Words in the errors of torch, CUDA's libraries and the C library when something has run out, and
# what to tell of it.
RUN_OUT = {
    "shared memory|/torch_": "the data-loading processes ran out of shared memory (/dev/shm); use"
    " --workers 0, or give the container more: docker run --shm-size=8g",
    "No space left|quota exceeded|PytorchStreamWriter|unexpected pos": "{file}: the disk is full;"
    " make room, then run the same command again",
    "out of memory|allocate memory|Unable to allocate|_ALLOC_FAILED|MemoryError": "memory has run"
    " out ({said}); {spare}. What is finished is kept",
}

# What requirements.txt names: versions that results may depend on.
PACKAGES = (
    "torch torchvision segment-anything numpy pillow scipy tensorboard matplotlib jinja2 tqdm"
    " scikit-learn opencv-python-headless pyclipper transformers"
).split()


class UserError(Exception):
    """A mistake of the user's, told in one line that names the file or option, the value and the
    mend.
    """


def run_main(main, spare: str = "use a machine with more") -> int:
    """Call `main()` for a script and return its exit code.

    A UserError, a full disk, too little memory and too little shared memory become one line on
    stderr and exit code 2, Ctrl-C exit code 130. A character that stdout's encoding lacks is
    printed as `?`; stderr has an escape for it by itself. spare: what to do where memory has run
    out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a stream that stands in for it
        sys.stdout.reconfigure(errors="replace")
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        # A worker process of a data loader hands its error on as a traceback, whose last line ends
        # in the message.
        message = str(error).rpartition("UserError: ")[2].strip()
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, MemoryError) as error:
        message = next((RUN_OUT[words] for words in RUN_OUT if re.search(words, repr(error))), None)
        if message is None:
            raise
        file = getattr(error, "filename", None) or "output"
        said = str(error).partition("\n")[0][:120] or type(error).__name__
        message = message.format(file=file, said=said, spare=spare)
    print(f"error: {message}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------ seeds, devices, exactness


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def select_device(name: str):
    """torch.device for --device: auto takes CUDA where there is one, else the CPU.

    With several processes, `cuda` is GPU LOCAL_RANK. A device that is not here is a UserError.
    """
    import torch

    count = torch.cuda.device_count()
    devices = {f"cuda:{i}": torch.device("cuda", i) for i in range(count)}
    if count:
        devices["cuda"] = devices[f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"]
    devices["cpu"] = torch.device("cpu")
    devices["auto"] = devices.get("cuda", devices["cpu"])
    if name not in devices:
        raise UserError(
            f"--device {name}: give auto, cpu, cuda or cuda:N; torch sees {count} CUDA devices here"
        )
    if devices[name].type == "cuda":
        torch.cuda.set_device(devices[name])
    return devices[name]


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


@contextlib.contextmanager
def process_group(device):
    """Join torchrun's process group for the block (nccl on CUDA, gloo elsewhere).

    Nothing under plain python. Processes that do not find each other give up after
    RENDEZVOUS_SECONDS; afterwards a slow one is waited for during WORK_SECONDS.
    """
    rank, world = process_rank()
    if world == 1:
        yield rank, world
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    work = timedelta(seconds=WORK_SECONDS)
    store = next(rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))[0]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("process_group", store),
        rank=rank,
        world_size=world,
        timeout=work,
    )
    store.set_timeout(work)  # in it NCCL's first collective waits for the others
    try:
        yield rank, world
    finally:
        # Gloo's threads may still hold tensors. To let go of them they need Python's lock, which
        # the next call keeps while it waits for them (torch 2.6).
        time.sleep(0.1)
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process of the run is here."""
    if process_rank()[1] == 1:
        return
    import torch.distributed as dist

    try:
        dist.barrier()
    except RuntimeError:
        raise UserError("another process of this run has stopped; its message says why") from None


def ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, count: int) -> Iterator:
    """function(item) of every item, in order, while `pool` works on the next `count` items."""
    items = iter(items)
    jobs = deque(pool.submit(function, item) for item in itertools.islice(items, count))
    while jobs:
        result = jobs.popleft().result()
        jobs.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        yield result


# ------------------------------------------------------------------------------------------ records


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def peak_memory_mb(device=None) -> dict[str, float]:
    """Peak resident memory of this process and, on CUDA, peak allocated device memory, in MB (10^6
    bytes).
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    with contextlib.suppress(OSError, TypeError):  # Linux: what is above has its parent's too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)[1])
    memory = {"host_mb": round(peak / 1e6, 1)}
    if device is not None and device.type == "cuda":
        import torch

        memory["device_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return memory


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # transformers is optional
        return None


def hardware() -> dict:
    """CPU model, cores and threads; GPUs and their CUDA."""
    import torch

    cpu = platform.processor()
    with contextlib.suppress(OSError, TypeError):  # no Linux, or a CPU without a name
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = re.search(r"^model name\s*: (.*)$", text, re.M)[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit of this code, with -dirty where files have changed since; None without git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.decode().strip()


def manifest(options: dict, device=None, earlier: float = 0) -> dict:
    """What a run was made by: command, options, versions, commit, hardware, the files that the
    options name with their SHA-256; and what it has cost so far. earlier: seconds of starts of the
    same run that were stopped.
    """
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in options.items()
            if name != "given"
        },
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "commit": commit(),
        "hardware": hardware(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(STARTED)),
        "cost": {"seconds": round(earlier + time.time() - STARTED, 1), **peak_memory_mb(device)},
        "inputs": {
            name: {"path": str(path), "sha256": sha256(path)}
            for name, path in options.items()
            if isinstance(path, Path) and path.is_file()
        },
    }


def tune_cpu() -> None:
    """Twice the speed on small machines; call it before the first computation and thread.

    Denormal numbers, which a softmax over a thousand tokens is full of, count as zero. And glibc
    keeps freed memory: to get it again from the kernel costs page faults.
    """
    import torch

    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # Never trim; pad, no mmap, one arena.
        for parameter, value in ((-1, -1), (-2, 2**28), (-4, 0), (-8, 1)):
            mallopt(parameter, value)


# ----------------------------------------------------------------------------------------- progress


class _Lines(tqdm):
    """A bar where nobody watches: `PSA: 12/300 img, 1.25img/s, 03:50 left`, now and then."""

    monitor_interval = 0

    def display(self, *_, **__) -> None:
        print(self, file=self.fp, flush=True)

    def close(self) -> None:
        pass


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    unit: str = "img",
    initial: int = 0,
):
    """Iterate over `iterable` and say on stderr how far it is; without one, a bar to `update()`.

    A tqdm bar on a terminal; elsewhere at most one plain line in SECONDS_BETWEEN_LINES. Of several
    processes the first alone says it. initial: items that an earlier run did.
    """
    how = {"desc": desc, "total": total, "unit": unit, "initial": initial}
    if (quiet := process_rank()[0] > 0) or sys.stderr.isatty():
        return tqdm(iterable, disable=quiet, leave=False, **how)
    return _Lines(
        iterable,
        delay=SECONDS_BETWEEN_LINES,
        mininterval=SECONDS_BETWEEN_LINES,
        miniters=1,
        smoothing=0,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}",
        position=0,
        **how,
    )
