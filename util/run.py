"""Run-time plumbing that the scripts share: user errors, atomic files, seeds, devices, processes,
manifests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

RENDEZVOUS_SECONDS = 120  # for the processes of a run to find each other
WORK_SECONDS = 24 * 3600  # that one process may take longer than another

# In messages of torch, CUDA's libraries and the C library about memory that has run out.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "Unable to allocate", "_ALLOC_FAILED")

# What requirements.txt names: versions that results may depend on.
PACKAGES = (
    "torch",
    "torchvision",
    "segment-anything",
    "numpy",
    "pillow",
    "scipy",
    "tensorboard",
    "matplotlib",
    "jinja2",
    "tqdm",
    "scikit-learn",
    "opencv-python-headless",
    "pyclipper",
    "transformers",
)


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
        message = _machine_trouble(error, spare)
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    return 2


def _machine_trouble(error: Exception, spare: str) -> str | None:
    """What to tell of an error that the machine's limits cause, or None."""
    text = str(error)
    if "shared memory" in text or "/torch_" in text:
        return (
            "the data-loading processes ran out of shared memory (/dev/shm); use --workers 0, or"
            " give the container more: docker run --shm-size=8g"
        )
    of_torch_save = ("PytorchStreamWriter", "file write failed", "unexpected pos")
    if disk_is_full(error) or any(words in text for words in of_torch_save):
        return full_disk(getattr(error, "filename", None) or "output")
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        said = text.partition("\n")[0][:120] or type(error).__name__
        return f"memory has run out ({said}); {spare}. What is finished is kept"
    return None


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)


def full_disk(path: str | Path) -> str:
    """What to tell of a file that found no room."""
    return f"{path}: the disk is full; make room, then run the same command again"


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
        if disk_is_full(error):
            raise UserError(full_disk(path)) from None
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
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
    begun: bool = True,
) -> None:
    """Note the settings of a new output folder in `path`; in one that has some they must be equal.

    So results of different settings, or of unknown ones, are never mixed. begun: whether the folder
    holds any result yet; if not, settings that a failed run left there are replaced. Call this
    after every other check. what, mend: words of the error.
    """
    path = Path(path)
    if begun and not path.exists():
        raise UserError(
            f"{path.parent}: is not empty, but has no {path.name} that says what made its content;"
            " move it away, or choose another name"
        )
    if not begun:
        write_json(path, settings)
        return
    before = read_json(path)
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path.parent}: holds {what} {name} = {before.get(name)}, now it is"
                f" {settings.get(name)}; {mend}"
            )


@contextlib.contextmanager
def folder_lock(folder: str | Path):
    """Hold `folder` (which is created) for one run; a second one gets a UserError.

    The lock is the kernel's, on <folder>/.lock: a killed run does not leave it behind, nor do its
    forked processes, which end later. Of several processes of one run only the first takes it.
    """
    if process_rank()[0] > 0:
        yield
        return
    folder = Path(folder)
    check_writable(folder)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is writing there now; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.register_at_fork(after_in_child=file.close)
        yield


def digests(paths: Iterable[str | Path]) -> dict[str, str]:
    """{path: SHA-256} of files, read by several threads; each path once."""
    names = list(dict.fromkeys(str(path) for path in paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sha256, names)))


def digest_of_all(paths: Iterable[str | Path]) -> str:
    """One SHA-256 of the contents of files, in their order."""
    paths, whole = list(paths), hashlib.sha256()
    if process_rank()[0] == 0:
        print(f"checksums of {len(paths)} files", file=sys.stderr)
    found = digests(paths)
    for path in paths:
        whole.update(found[str(path)].encode())
    return whole.hexdigest()


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
    """torch.device for --device: auto takes CUDA where there is one, else the CPU.

    With several processes, `cuda` is GPU LOCAL_RANK. A name that torch does not know, or whose
    device it does not have here, is a UserError.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not number.isdigit()):
        raise UserError(f"--device {name}: no such device; give auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if not number:
            number = str(int(os.environ.get("LOCAL_RANK", 0)) % count)
        if int(number) >= count:
            raise UserError(f"--device {name}: torch sees {count} CUDA devices, 0 to {count - 1}")
        name = f"cuda:{number}"
        torch.cuda.set_device(torch.device(name))
    return torch.device(name)


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
def process_group(device):
    """Join torchrun's process group for the block (nccl on CUDA, gloo elsewhere).

    Nothing under plain python. Processes that do not find each other give up after
    RENDEZVOUS_SECONDS; afterwards a slow one is waited for during WORK_SECONDS.
    """
    rank, world = process_rank()
    if world == 1:
        yield rank, world
        return
    from datetime import timedelta

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


def package_versions() -> dict[str, str | None]:
    """{package: version} of PACKAGES; None: not installed (transformers is optional)."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def hardware() -> dict:
    """CPU model and the flags that matter for speed, cores, threads, RAM, GPUs and their driver."""
    import torch

    model, flags = platform.processor() or None, []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(iter(re.findall(r"^model name\s*: (.*)$", text, re.M)), model)
        has = set(next(iter(re.findall(r"^flags\s*: (.*)$", text, re.M)), "").split())
        flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in has]
    driver = None
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "machine": platform.machine(),
        "cpu": model,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "driver": driver and driver.splitlines()[0],
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.decode(errors="replace").strip()


def manifest(options: dict, inputs: dict[str, str | Path] | None = None) -> dict:
    """What a run was made from: command, options, versions, git state, hardware, input files.

    inputs: {name: file}; the manifest has their SHA-256.
    """
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {k: path_from_here(v) if isinstance(v, Path) else v for k, v in options.items()},
        "versions": {"python": platform.python_version(), **package_versions()},
        "git": {
            "commit": _output(*git, "rev-parse", "HEAD"),
            "changed": None if changed is None else bool(changed),
        },
        "hardware": hardware(),
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
