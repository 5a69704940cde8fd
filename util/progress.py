"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # in a log file


class _Lines:
    """Stands in for a tqdm bar where nobody watches: `desc: 12/300 img, 0.8 s each, 4 min left`."""

    def __init__(self, iterable, desc: str, total: int | None, unit: str, initial: int):
        self.iterable, self.desc, self.total, self.unit = iterable, desc, total, unit
        self.n = self.initial = initial
        self.start = self.said = time.monotonic()
        self.note = ""

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        each = (now - self.start) / max(self.n - self.initial, 1)
        left = f", {each * (self.total - self.n) / 60:.0f} min left" if self.total else ""
        of = f"/{self.total}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.desc}: {self.n}{of} {self.unit}, {each:.2f} s each{left}{note}",
            file=sys.stderr,
            flush=True,
        )

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.note = text

    def close(self) -> None:
        pass


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    unit: str = "img",
    quiet: bool = False,
    initial: int = 0,
):
    """Iterate over `iterable` and say on stderr how far it is; without one, a bar to `update()`.

    A tqdm bar on a terminal; elsewhere at most one plain line in SECONDS_BETWEEN_LINES. quiet: say
    nothing (other processes than the first). initial: items that an earlier run did.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if quiet or sys.stderr.isatty():
        return tqdm(
            iterable, desc=desc, total=total, unit=unit, disable=quiet, initial=initial, leave=False
        )
    return _Lines(iterable, desc, total, unit, initial)
