"""Runs one stage of a pipeline once, and records what it took.

    python -m scripts.lib.stage runs/toy/stages psa -- python seco_sam.py --id-list-path …

If `<folder>/<name>.json` says that the same command has succeeded, nothing is run; torchrun's
number of processes, which results do not depend on, may be another. Else the command runs, and on
success the record is written: the command, wall seconds over all tries (an interrupted stage is not
made to look quick) and the peak memory of its largest process in MB. Exit code: the command's.
Standard library only, so that skipping is instant.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SECONDS_BETWEEN_SIGNS_OF_LIFE = 2


def write_record(path: Path, record: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def identity(command: list[str]) -> list[str]:
    """The command without torchrun's number of processes, which another machine, or a part of this
    one, sets otherwise.
    """
    return [word for before, word in zip(["", *command], command) if before != "--nproc_per_node"]


def main() -> int:
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    folder, name, command = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
    path = folder / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if identity(record.get("command", [])) != identity(command):
        record = {"command": command, "done": False, "seconds": 0.0}
    if record["done"]:
        print(f"== {name}: done before")
        return 0
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    earlier, start = record["seconds"], time.time()
    process = subprocess.Popen(command)
    code = None
    while code is None:
        try:
            code = process.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE)
        except subprocess.TimeoutExpired:
            pass
        except (
            KeyboardInterrupt
        ):  # the terminal has sent it to the command as well, which ends by itself
            code = process.wait()
        record["seconds"] = round(earlier + time.time() - start, 1)
        write_record(path, record)
    if code:
        print(
            f"error: stage {name} ended with exit code {code}; run the same command again to go on",
            file=sys.stderr,
        )
        return code if code > 0 else 128 - code
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        1024 if sys.platform == "darwin" else 1
    )
    write_record(path, record | {"done": True, "peak_memory_mb": round(kilobytes * 1.024 / 1000)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
