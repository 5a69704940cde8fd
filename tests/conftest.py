"""Keeps every process of the tests to one thread.

Sums depend on the number of threads in their last bits, and many tests compare what this process
and others have made byte by byte.
"""

import os
from pathlib import Path

# Before torch is imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_the_module():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """A test that has set another number does not touch the next one."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest files first, so that the processes that share the tests end together. Without
    a CUDA device those marked gpu are skipped.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    first = ("unimatch", "unimatch_conformance", "tasks", "psa", "scc", "model", "end_to_end")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in first)
