"""scripts/toy.sh at its smallest size: the whole line runs, a second call has nothing to do, a
killed run ends the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_page import check_page

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("source", "pixel", "psa", "scc", "split_seco", "adapt_seco")


def environment(out: Path) -> dict[str, str]:
    """For toy.sh with this interpreter's packages."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SMALLEST": "1", "OUT": str(out)}


def toy(out: Path, kit: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(kit / "scripts/toy.sh")],
        env=environment(out),
        capture_output=True,
        text=True,
    )


def results(out: Path) -> dict[str, bytes]:
    """What must not depend on how the run went: labels, lists, weights' file sizes aside,
    figures.
    """
    seed = out / "seed0"
    files = [
        *sorted(seed.glob("pix*/**/*.png")),
        *sorted(seed.glob("splits/**/*.txt")),
        *sorted(seed.glob("*/connectivities.csv")),
    ]
    files = [f for f in files if "report" not in f.parts and "vis" not in f.parts]
    files = [f for f in files if "." not in f.relative_to(seed).parts[0]]  # set aside
    figures = json.loads((out / "results.json").read_text())
    return {str(f.relative_to(seed)): f.read_bytes() for f in files} | {
        "figures": json.dumps([figures["labels"], figures["models"]]).encode()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    run = toy(out)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


def test_tables_and_pictures(finished):
    text = (finished / "results.md").read_text()
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
    assert {"side_by_side.png", "miou_curve.png"} <= pictures and any(
        p.startswith("scc_") for p in pictures
    )
    check_page(finished / "index.html", "PSA + SCC", "SCC's page: seed0/scc", "manifest", "psa")
    costs = json.loads((finished / "results.json").read_text())["stages"]
    assert set(STAGES) <= set(costs) and all(
        cost["peak_memory_mb"] < 6000 for cost in costs.values()
    )


def test_a_second_call_does_nothing_again(finished):
    before = results(finished)
    run = toy(finished)
    assert run.returncode == 0 and run.stdout.count("done before") >= len(STAGES)
    assert results(finished) == before


def test_no_stage_but_evaluation_names_ground_truth_of_the_target(finished):
    for name in STAGES[1:]:
        command = json.loads((finished / f"seed0/stages/{name}.json").read_text())["command"]
        without_validation = [
            word for i, word in enumerate(command) if command[i - 1] != "--val-id-path"
        ]
        assert not any(
            "target_train_gt" in word or "target_val" in word for word in without_validation
        )


@pytest.mark.slow
def test_a_changed_option_reaches_the_table(finished, tmp_path):
    """Fewer starting labels in a copy of the finished run, after the folder that the stage itself
    would refuse was removed: all later stages run again, and nothing old is in the tables.
    """
    kit, out = tmp_path / "kit", tmp_path / "moved"
    (kit / "scripts").mkdir(parents=True)
    for path in [*ROOT.iterdir(), *(ROOT / "scripts").iterdir()]:
        target = kit / path.relative_to(ROOT)
        if not target.exists() and not path.name.startswith(".") and path.name != "toy.sh":
            target.symlink_to(path)
    script = (ROOT / "scripts/toy.sh").read_text()
    assert script.count("PIXEL=(--top-p 0.5)") == 1
    script = script.replace("PIXEL=(--top-p 0.5)", "PIXEL=(--top-p 0.1)")
    (kit / "scripts/toy.sh").write_text(script)
    shutil.copytree(finished, out, symlinks=True)
    shutil.rmtree(out / "seed0/pix")
    run = toy(out, kit)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert re.findall("== (.*): done before", run.stdout) == ["source", "eval_before"]
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (finished, out))
    assert new["models"]["before"] == old["models"]["before"]
    assert abs(new["labels"]["pixel"]["coverage"][0] - 10) < 1
    for row in ("pixel", "psa", "scc"):
        assert new["labels"][row] != old["labels"][row]
    fresh = tmp_path / "fresh"
    assert toy(fresh, kit).returncode == 0
    assert results(fresh) == results(out)


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_the_same(finished, tmp_path):
    """SIGKILL to everything the command has started, two or three seconds after each stage has
    begun.
    """
    out = tmp_path / "run"
    for stage in STAGES:
        process = subprocess.Popen(
            ["bash", str(ROOT / "scripts/toy.sh")],
            env=environment(out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        record, deadline = out / f"seed0/stages/{stage}.json", time.time() + 600
        while not record.is_file() and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert toy(out).returncode == 0
    mine, other = results(out), results(finished)
    assert mine.keys() == other.keys() and [k for k in mine if mine[k] != other[k]] == []
