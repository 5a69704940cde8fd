"""How results are kept: whole files, a folder for one run at a time, of one set of settings and
inputs.

    with Outputs(folder) as out:
        out.accept(settings, inputs)    # refuses what would mix, replaces what failed early
        …                               # atomic_path, write_json: a file is whole or absent

Beside the results are settings.json, what they depend on, and inputs.json, the SHA-256 of every
file that they were made from. So a command that is given again goes on, with anything else it ends
in one line, and nothing is mixed or overwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from util.run import STARTED, UserError, process_rank, sha256

REMEDY = "remove that folder, or choose another"


class Outputs:
    """A folder of results (which is created), held by one run: `with` locks it.

    The lock is the kernel's, on <folder>/.lock: a killed run does not leave it behind, nor do its
    forked processes, which end later; half-written files that it did leave are removed. Of several
    processes of one run only the first does this.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __enter__(self) -> Outputs:
        self.lock = None
        if process_rank()[0] > 0:
            return self
        check_writable(self.folder)
        self.lock = open(self.folder / ".lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise UserError(
                f"{self.folder}: another run is writing there now; wait for it, or choose another"
                " folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.register_at_fork(after_in_child=self.lock.close)
        for path in self.folder.rglob(".*.tmp*"):  # of `atomic_path`
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < STARTED:  # not of another process of this run
                    path.unlink()
        return self

    def __exit__(self, *_) -> None:
        if self.lock:
            self.lock.close()

    def accept(
        self, settings: dict, inputs: Mapping[str, Path] | None = None, begun: bool = False
    ) -> None:
        """Note settings and inputs of a new folder; in one that holds results they must be equal.
        What a run without results has noted is replaced. Call this after every other check.

        settings: {name: value, as JSON has it}. inputs: {name: file}, in an order that counts.
        begun: whether the folder holds a result other than pictures and label maps.
        """
        begun = begun or holds_pictures(self.folder)
        path, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        if not begun:
            write_json(path, settings)
        elif not path.exists():
            raise UserError(
                f"{self.folder}: is not empty, but has no settings.json that says what made its"
                " content; move it away, or choose another name"
            )
        before = read_json(path)
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise UserError(
                    f"{self.folder}: holds results of {name} = {before.get(name)}, now it is"
                    f" {settings.get(name)}; {REMEDY}"
                )
        if inputs is None:
            return
        path, now = self.folder / "inputs.json", digests(inputs)
        if not begun:
            write_json(path, now)
        before = read_json(path) if path.exists() else {}
        if list(before.items()) != list(now.items()):
            raise UserError(f"{difference(self.folder, before, now, inputs)}; {REMEDY}")


def holds_pictures(folder: Path) -> bool:
    """Whether an image or a label map lies below a folder; hidden files do not count."""
    return any(
        path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff")
        and not path.name.startswith(".")
        for path in folder.rglob("*")
    )


def difference(folder: Path, before: dict, now: dict, inputs: Mapping[str, Path]) -> str:
    """What differs between the inputs of a folder's results and those of now, in words."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    more, fewer = [n for n in now if n not in before], [n for n in before if n not in now]
    if more:
        return f"{folder}: its results lack {len(more)} of the inputs, first {inputs[more[0]]}"
    if fewer:
        return f"{folder}: {len(fewer)} inputs of its results are none now, first {fewer[0]}"
    if changed:
        return f"{inputs[changed[0]]}: has changed since the results in {folder} were made from it"
    return f"{folder}: its inputs are the same, but in another order"


def made_from(settings: dict, inputs: Mapping[str, Path]) -> dict:
    """What results depend on: the settings and the SHA-256 of the input files. A command that makes
    again what has changed notes it in the record that it writes last, under "made_from".
    """
    return json.loads(json.dumps({"settings": settings, "inputs": digests(inputs)}))


def made_before(record: Path, source: dict) -> bool:
    """Whether a JSON file notes `source`, from `made_from`."""
    try:
        return read_json(record)["made_from"] == source
    except (UserError, KeyError, TypeError):
        return False


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
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another"
            " place, then run the command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: str | Path) -> None:
    """Fail early if files cannot be made in `folder` (which is created)."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror or error}); choose another folder"
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is equal is left alone."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: str | Path, what: str = "file", errors: str = "strict") -> str:
    """A text file's content; what: its kind, for UserErrors; errors: of its encoding, UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors=errors)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({error})") from None


def read_json(path: str | Path):
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def digests(files: Mapping[str, str | Path]) -> dict[str, str]:
    """{name: SHA-256} of {name: file}, read by several threads."""
    if len(files) > 100 and process_rank()[0] == 0:
        print(f"checksums of {len(files)} files", file=sys.stderr)
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files.values())))
