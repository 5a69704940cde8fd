"""Runs one stage of a pipeline, unless it is done.

    python -m scripts.lib.stage runs/toy runs/toy/seed0/stages psa runs/toy/seed0/pix_tiny -- \\
        python seco_sam.py --id-list-path …

Arguments  the folder of the run; the folder of the records in it; the stage's name;
           OUTPUT…       what the command makes: folders that are its own, and files
           from INPUT…   optional: files and folders that it reads and does not name
           -- COMMAND…

A stage is done if `<folder>/<name>.json` says so, and the command, the content of its inputs and
its outputs are what they were. Inputs are the files that the command names and, of a list (.txt),
the files that its rows name from --root-path on. Not compared: code, the interpreter, and
torchrun's number of processes, which results do not depend on. A run's folder may be moved.

Else the command runs. Outputs that are missing are made again in the same place. If the command or
an input has changed, the stage's own folders are first set aside as `<folder>.1`, `.2` …, so that
nothing is mixed and nothing is lost; the same happens to a single file that has changed since.

The record holds the command, wall seconds over all tries (an interrupted stage is not made to look
quick), the peak memory of its largest process in MB, and SHA-256 of inputs and outputs. Those of
files whose size and times are as before are looked up in `<folder>/digests`. Exit code: the
command's; 2 if another run is at work in the folder. A stage that is done imports the standard
library only, so that skipping is instant.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python scripts/lib/NAME.py`

SECONDS_BETWEEN_SIGNS_OF_LIFE = 2
THERE = "there"  # of a file that a list among the outputs names: not compared, but it must exist


def write_json(path: Path, value) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# -------------------------------------------------------------------------- what a stage is made of


def place(word: str, run: Path) -> str:
    """A path as a record names it: `@/…` in the run's folder, relative below the working folder."""
    path = os.path.abspath(word)
    for folder, name in ((os.path.abspath(run), "@/"), (os.getcwd(), "")):
        if path == folder or path.startswith(folder + os.sep):
            return name + os.path.relpath(path, folder)
    return word


def located(name: str, run: Path) -> str:
    """The inverse of `place`."""
    return os.path.normpath(run / name[2:]) if name.startswith("@/") else name


def identity(command: list[str], run: Path) -> list[str]:
    """The command without the interpreter and torchrun, with paths as `place` writes them."""
    words = command[1:]
    if words[:2] == ["-m", "torch.distributed.run"]:
        words = words[words.index("--nproc_per_node") + 2 :]
    return [place(word, run) for word in words]


def files_in(folder: str) -> list[str]:
    """All files below a folder but hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, n) for n in sorted(names) if not n.startswith(".")]
    return found


def named_by(path: str, command: list[str]) -> list[str]:
    """The files that the rows of a list name; none for any other file."""
    if not path.endswith(".txt") or not os.path.isfile(path):
        return []
    roots = [after for word, after in zip(command, command[1:]) if word == "--root-path"]
    with open(path, encoding="utf-8", errors="replace") as file:
        return [os.path.join(*roots[-1:], name) for line in file for name in line.split()]


class Digests:
    """SHA-256 of files; those of files with the size and times of an earlier call are looked up."""

    def __init__(self, path: Path):
        self.path, self.known, self.new = path, read_json(path), False

    def __call__(self, paths: list[str]) -> dict[str, str]:
        """{path: digest} of the paths that are files."""
        found, todo = {}, []
        for path in dict.fromkeys(paths):
            with contextlib.suppress(OSError):
                if not stat.S_ISREG((status := os.stat(path)).st_mode):
                    continue
                key, found[path] = os.path.abspath(path), None
                stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
                if self.known.get(key, [])[:-1] == stamp:
                    found[path] = self.known[key][-1]
                else:
                    todo.append((path, key, stamp))
        with ThreadPoolExecutor() as pool:
            for (path, key, stamp), digest in zip(todo, pool.map(sha256, [t[0] for t in todo])):
                found[path], self.known[key], self.new = digest, [*stamp, digest], True
        return found

    def save(self) -> None:
        if self.new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.known)


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:  # the command tells why
        return "unreadable"
    return digest.hexdigest()


def inputs_of(command, outputs, more, run: Path, digests: Digests) -> dict[str, str]:
    """{input: one digest of it and all that it names}."""
    own = tuple(os.path.abspath(path) + os.sep for path in outputs)
    words = [w for w in command[1:] if os.path.isfile(w) and not w.endswith(".py")]
    words = [w for w in words if not (os.path.abspath(w) + os.sep).startswith(own)]
    return digests_of_inputs([*words, *more], command, run, digests)


def digests_of_inputs(words, command, run: Path, digests: Digests) -> dict[str, str]:
    """`inputs_of`, of these words of the command."""
    contents = {w: [w, *files_in(w), *named_by(w, command)] for w in words}
    known = digests([path for paths in contents.values() for path in paths])
    return {
        place(word, run): hashlib.sha256(
            "\n".join(f"{place(p, run)} {known.get(p)}" for p in paths).encode()
        ).hexdigest()
        for word, paths in contents.items()
    }


def outputs_of(command, outputs, run: Path, digests: Digests) -> dict[str, str]:
    """{file: digest, or THERE} of all that the stage has made."""
    named = [path for output in outputs for path in named_by(output, command)]
    found = dict.fromkeys((path for path in named if os.path.isfile(path)), THERE)
    found |= digests([path for output in outputs for path in (files_in(output) or [output])])
    return {place(path, run): digest for path, digest in found.items() if digest}


# ------------------------------------------------------------------------------- what is to be done


def set_aside(output: str, files: list[str] | None = None) -> str:
    """Rename an output, or only `files` in it, to the first free `<output>.<n>`; returns that."""
    number = 1
    while os.path.lexists(kept := f"{output.rstrip(os.sep)}.{number}"):
        number += 1
    for path in files or [output]:
        target = os.path.normpath(os.path.join(kept, os.path.relpath(path, output)))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(path, target)
    return kept


def state(record: dict, asked: list[str], given: dict, run: Path, digests: Digests):
    """(reason to run, or "" if done; whether all is new; the output files that have changed)."""
    if "given" not in record:
        return "not run yet", False, []
    if record["identity"] != asked:
        return "its command has changed", True, []
    for name in {**record["given"], **given}:
        if record["given"].get(name) != given.get(name):
            return f"{located(name, run)}, or a file that it names, has changed", True, []
    if not record["done"]:
        return "not finished yet", False, []
    made = {located(name, run): digest for name, digest in record["made"].items()}
    now = digests([path for path, digest in made.items() if digest != THERE])
    changed = [path for path, digest in now.items() if made[path] != digest]
    missing = [path for path in made if not os.path.isfile(path)]
    reason = (
        f"{missing[0]} is missing" if missing else f"{changed[0]} has changed" if changed else ""
    )
    return reason, False, changed


def outdated(run: Path, folder: Path) -> set[str]:
    """Names of the stages of a folder of records that are not of the inputs as they are now, and of
    those that were made from theirs. A run that leaves out a stage leaves it behind like this.
    """
    records = {path.stem: read_json(path) for path in folder.glob("*.json")}
    records = {name: record for name, record in records.items() if "given" in record}
    digests, found = Digests(folder / "digests"), set()
    for name, record in records.items():
        words = [located(word, run) for word in record["given"]]
        command = [located(word, run) for word in record["identity"]]
        if digests_of_inputs(words, command, run, digests) != record["given"]:
            found.add(name)
    count = -1
    while count < len(found):
        count = len(found)
        gone = {path for name in found for path in records[name].get("made", {})}
        found |= {name for name, record in records.items() if gone & record["given"].keys()}
    return found


def seeds_in(run: Path) -> list[Path]:
    """The folders `seed<number>` of a run, in order; not those set aside (`seed1.old`)."""
    found = [path for path in run.glob("seed*") if re.fullmatch("seed[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name[4:]))


def of_one_setting(folders: list[Path], name: str) -> bool:
    """Whether the folders of records of several seeds have one command of a stage, but for the
    seed.
    """
    records = [read_json(folder / f"{name}.json") for folder in folders]
    commands = {" ".join(record["identity"]) for record in records if "identity" in record}
    return len({re.sub(r"\bseed\d+|/s\d+/|--seed \d+", "", text) for text in commands}) <= 1


def make_room(outputs: list[str], all_new: bool, changed: list[str]) -> list[str]:
    """Set aside what must not be mixed with what the stage is about to make."""
    kept = []
    for output in outputs:
        own = os.path.abspath(output) + os.sep
        inside = [path for path in changed if (os.path.abspath(path) + os.sep).startswith(own)]
        if all_new and os.path.isdir(output):
            kept.append(set_aside(output))
        elif inside:
            kept.append(set_aside(output, inside))
    return kept


# --------------------------------------------------------------------------------------------- main


def execute(path: Path, record: dict, command: list[str]) -> int:
    """Run the command, and note its time while it runs. Returns its exit code."""
    earlier, start = record["seconds"], time.time()
    write_json(path, record)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    code = None
    while code is None:
        try:
            code = process.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:  # the command has got it from the terminal too, and ends
            code = process.wait()
        record["seconds"] = round(earlier + time.time() - start, 1)
        write_json(path, record)
    return code if code >= 0 else 128 - code


def peak_memory_mb() -> int:
    """Of the largest process so far that the command has started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6)


def parse_args(argv: list[str]) -> tuple[Path, Path, str, list[str], list[str], list[str]]:
    """(run, folder of records, name, outputs, inputs beside the command's, command)."""
    before, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    run, folder, name, *outputs = before
    more: list[str] = []
    if "from" in outputs:
        outputs, more = outputs[: outputs.index("from")], outputs[outputs.index("from") + 1 :]
    outputs = [os.path.normpath(output) for output in outputs]
    return Path(run), Path(folder), name, outputs, more, command


def main(argv: list[str] | None = None) -> int:
    run, folder, name, outputs, more, command = parse_args(sys.argv[1:] if argv is None else argv)
    path, digests = folder / f"{name}.json", Digests(folder / "digests")
    record, asked = read_json(path), identity(command, run)
    given = inputs_of(command, outputs, more, run, digests)
    reason, all_new, changed = state(record, asked, given, run, digests)
    if not reason:
        digests.save()
        print(f"== {name}: done before")
        return 0
    from util.outputs import folder_lock
    from util.run import run_main  # (numpy: not for a stage that is done)

    def again() -> int:
        with folder_lock(folder):
            print(f"\n== {name}: {' '.join(command)}", flush=True)
            kept = make_room(outputs, all_new, changed)
            if record.get("done") and "given" in record or kept:
                print(f"   again: {reason}" + "".join(f"; {k} keeps what was there" for k in kept))
            sys.stdout.flush()
            here = not all_new and any(os.path.exists(output) for output in outputs)
            seconds = record.get("seconds", 0.0) if here else 0.0
            new = {"command": command, "identity": asked, "given": given, "done": False}
            if code := execute(path, new := new | {"seconds": seconds}, command):
                print(
                    f"error: stage {name} ended with exit code {code}; run the same command again"
                    " to go on",
                    file=sys.stderr,
                )
                return code
            new |= {"done": True, "peak_memory_mb": peak_memory_mb()}
            write_json(path, new | {"made": outputs_of(command, outputs, run, digests)})
            digests.save()
        return 0

    return run_main(again)


if __name__ == "__main__":
    sys.exit(main())
