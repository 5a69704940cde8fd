"""scripts/toy.sh at its smallest size: the whole line runs, a second call has nothing to do, a
killed run ends the same, nothing of changed inputs stays in the tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from processes import warm_python
from test_page import check_page

from scripts.lib.run_folder import manifest_of, seed_folders

# Of every stage, what is there a moment after it has begun.
BEGUN = {
    "source": "source/.lock",
    "pixel": "pix/.lock",
    "psa": "pix_tiny/.lock",
    "scc": "pix_tiny_scc/.lock",
    "split_seco": "splits/split_seco",
    "adapt_seco": "adapt_seco/.lock",
}


def environment(out: Path, python: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": python, "SMALLEST": "1", "OUT": str(out)}


def toy(out: Path, kit: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(kit / "scripts/toy.sh")],
        env=environment(out, warm_python()),
        capture_output=True,
        encoding="utf-8",
    )


def results(out: Path) -> dict[str, bytes]:
    """What must not depend on how the run went: labels, lists, figures."""
    seed = out / "seed0"
    files = [
        *sorted(seed.glob("pix*/**/*.png")),
        *sorted(seed.glob("splits/**/*.txt")),
        *sorted(seed.glob("*/connectivities.csv")),
    ]
    files = [f for f in files if "report" not in f.parts and "vis" not in f.parts]
    figures = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {str(f.relative_to(seed)): f.read_bytes() for f in files} | {
        "figures": json.dumps([figures["labels"], figures["models"]]).encode()
    }


def times(out: Path) -> dict[str, int]:
    """When each file was made."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    run = toy(out)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved", symlinks=True)
    return tmp_path / "moved"


def test_tables_and_pictures(finished):
    text = (finished / "results.md").read_text(encoding="utf-8")
    for row in (
        "pixel-level (no SAM)",
        "| PSA |",
        "PSA + SCC",
        "before (source model)",
        "SeCo (UniMatch on PSA + SCC)",
        "peak memory",
    ):
        assert row in text
    pictures = {p.name for p in (finished / "pictures").iterdir()}
    assert {"side_by_side.png", "miou_curve.png"} <= pictures
    words = (
        "PSA + SCC",
        "SCC's page: seed0/scc",
        "manifest",
        "psa",
        "pix_tiny_scc: loss_histogram",
    )
    check_page(finished / "index.html", *words)
    costs = json.loads((finished / "results.json").read_text(encoding="utf-8"))["stages"]
    assert BEGUN.keys() <= costs.keys()
    assert all(0 < cost["peak_memory_mb"] < 6000 for cost in costs.values())


def test_a_second_call_makes_nothing_again_and_shows_nothing_else(finished):
    fill = finished / "seed0/eval/fill/metrics.json"  # of a row that is not asked for
    fill.parent.mkdir()
    fill.write_text('{"miou": 50.0}')
    before, when = results(finished), times(finished)
    run = toy(finished)
    assert run.returncode == 0 and results(finished) == before
    assert times(finished) == when and len(when) > 20


def test_no_stage_but_evaluation_names_ground_truth_of_the_target(finished):
    folders = seed_folders(finished / "seed0")
    for stage in set(BEGUN) - {"source"}:
        options = manifest_of(folders[stage])["options"]
        paths = [str(value) for name, value in options.items() if name != "val_id_path"]
        assert not [path for path in paths if "target_train_gt" in path or "target_val" in path]


def test_a_label_that_was_changed_by_hand_is_refused(copied):
    label = next((copied / "seed0/pix").glob("s0/**/*.png"))
    image = Image.open(label)
    pixels = np.array(image)
    pixels[:9] = 255
    changed = Image.fromarray(pixels, "P")
    changed.putpalette(image.getpalette())
    changed.save(label)
    before = results(copied)
    run = toy(copied)
    assert run.returncode == 2 and results(copied) == before
    error = run.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "has changed since" in error and str(label) in error


@pytest.mark.slow
def test_a_changed_option_reaches_the_table(finished, copied, tmp_path):
    """Fewer starting labels in a copy of the finished run: each stage refuses until the folder that
    it names is removed, and then nothing old is in the tables.
    """
    kit = tmp_path / "kit"
    (kit / "scripts").mkdir(parents=True)
    for path in [*ROOT.iterdir(), *(ROOT / "scripts").iterdir()]:
        target = kit / path.relative_to(ROOT)
        if not target.exists() and not path.name.startswith(".") and path.name != "toy.sh":
            target.symlink_to(path)
    script = (ROOT / "scripts/toy.sh").read_text(encoding="utf-8")
    assert script.count("PIXEL=(--top-p 0.5)") == 1
    script = script.replace("PIXEL=(--top-p 0.5)", "PIXEL=(--top-p 0.1)")
    (kit / "scripts/toy.sh").write_text(script, encoding="utf-8")
    removed = []
    while (run := toy(copied, kit)).returncode:
        error = run.stderr.splitlines()[-1]
        assert run.returncode == 2 and error.startswith("error: "), run.stderr[-3000:]
        found = [
            name for name in ("adapt_seco", "pix_tiny_scc", "pix_tiny", "pix") if name in error
        ]
        assert found[0] not in removed, error
        removed.append(found[0])
        shutil.rmtree(copied / "seed0" / found[0])
    assert removed == ["pix", "pix_tiny", "pix_tiny_scc", "adapt_seco"]
    old, new = (json.loads((run / "results.json").read_text()) for run in (finished, copied))
    assert new["models"]["before"] == old["models"]["before"]
    assert abs(new["labels"]["pixel"]["coverage"][0] - 10) < 1
    for row in ("pixel", "psa", "scc"):
        assert new["labels"][row] != old["labels"][row]
    fresh = tmp_path / "fresh"
    assert toy(fresh, kit).returncode == 0
    assert results(fresh) == results(copied)


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_the_same(finished, tmp_path):
    """SIGKILL to everything the command has started, a moment after each stage has begun."""
    out = tmp_path / "run"
    for begun in BEGUN.values():
        process = subprocess.Popen(
            ["bash", str(ROOT / "scripts/toy.sh")],
            env=environment(out, sys.executable),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.time() + 600
        while not (out / "seed0" / begun).exists() and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert toy(out).returncode == 0
    mine, other = results(out), results(finished)
    assert mine.keys() == other.keys() and [k for k in mine if mine[k] != other[k]] == []
