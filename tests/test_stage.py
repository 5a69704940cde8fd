"""scripts/lib/stage.py: when a stage is done, what runs again, and that nothing is mixed or lost.

Two small commands stand for PSA and SCC: each writes a label for every row of its list, keeps what
is there, and refuses a folder that holds labels of other settings.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.lib import stage

WORK = """
import sys
from pathlib import Path
lists, root, out, new_list, setting, *more = sys.argv[1::2]
root, folder = Path(root), Path(root, out)
folder.mkdir(exist_ok=True)
settings = folder / "settings"
if settings.exists() and settings.read_text() != setting:
    sys.exit(f"{folder}: holds labels of other settings; remove it")
settings.write_text(setting)
rows = []
for line in Path(lists).read_text().splitlines():
    image, label = line.split()
    mine = f"{out}/{Path(label).name}"
    if not (root / mine).exists():
        parts = [root / image, root / label]
        parts += [path for folder in more for path in sorted(Path(folder).rglob("*.t"))]
        (root / mine).write_text(setting + "".join(path.read_text() for path in parts))
    rows.append(f"{image} {mine}")
    if setting == "killed":
        sys.exit(3)
Path(new_list).parent.mkdir(parents=True, exist_ok=True)
Path(new_list).write_text("\\n".join(rows) + "\\n")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with two images, their labels, a list, and arrays that the first stage reads."""
    folder = tmp_path / "run"
    for name in (
        "images/0.t",
        "images/1.t",
        "pixel/0.t",
        "pixel/1.t",
        "arrays/a.t",
        "arrays/b/c.t",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<{name}>")
    (folder / "pixel.txt").write_text("images/0.t pixel/0.t\nimages/1.t pixel/1.t\n")
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    return folder


def command(folder: Path, given: str, out: str, setting: str, *more: str) -> list[str]:
    words = ["-l", f"{folder}/{given}", "--root-path", f"{folder}", "-o", out]
    words += ["-n", f"{folder}/lists/{out}.txt", "-s", setting]
    words += [word for path in more for word in ("-m", path)]
    return [sys.executable, "work.py", *words[1:]]


def line(folder: Path, psa: str = "s", scc: str = "t") -> int:
    """Both stages, as the pipeline runs them; stops at the first error."""
    for name, given, out, setting, more in (
        ("psa", "pixel.txt", "psa", psa, [f"{folder}/arrays"]),
        ("scc", "lists/psa.txt", "scc", scc, []),
    ):
        words = command(folder, given, out, setting, *more)
        made = [f"{folder}/{out}", f"{folder}/lists/{out}.txt"]
        if code := stage.main(
            [f"{folder}", f"{folder}/stages", name, *made, "from", *more, "--", *words]
        ):
            return code
    return 0


def ran(capfd) -> list[str]:
    out = capfd.readouterr().out
    return [name for name in ("psa", "scc") if f"\n== {name}: {sys.executable}" in out]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "stages" not in path.parts
    }


def afresh(folder: Path, psa: str = "s", scc: str = "t") -> dict[str, bytes]:
    """What both stages make of the inputs as they are, where nothing was made before."""
    other = folder.parent / "afresh"
    for name in ("images", "pixel", "arrays"):
        shutil.copytree(folder / name, other / name)
    shutil.copy(folder / "pixel.txt", other)
    assert line(other, psa, scc) == 0
    return contents(other)


def current(folder: Path) -> dict[str, bytes]:
    """All but what was set aside."""
    return {n: c for n, c in contents(folder).items() if ".1/" not in n and not n.endswith(".1")}


@pytest.fixture
def finished(run, capfd):
    assert line(run) == 0 and ran(capfd) == ["psa", "scc"]
    return run


def test_done_is_done(finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert line(finished) == 0 and ran(capfd) == []
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_an_option_is_changed(finished, capfd):
    old = contents(finished)
    assert line(finished, psa="u") == 0
    assert "again: its command has changed; " in (out := capfd.readouterr().out)
    assert f"{finished}/psa.1 keeps what was there" in out and "lists/psa.txt, or a file" in out
    assert current(finished) == afresh(finished, psa="u")
    assert all(
        contents(finished)[n.replace("psa/", "psa.1/")] == old[n] for n in old if "psa/" in n
    )
    assert line(finished, psa="v") == 0 and (finished / "scc.2/0.t").is_file()


@pytest.mark.parametrize("name", ["arrays/b/c.t", "images/1.t", "pixel/0.t"])
def test_the_content_of_an_input_is_changed(finished, capfd, name):
    status = (finished / name).stat()
    (finished / name).write_text("#" * status.st_size)  # of the same size
    os.utime(finished / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # and time
    assert line(finished) == 0 and ran(capfd) == ["psa", "scc"]
    assert current(finished) == afresh(finished)


def test_another_file_is_behind_the_path_of_a_checkpoint(run, capfd):
    """A file that the command names, not in a list and not after `from`."""
    weights = run / "weights.t"
    words = [sys.executable, "-c", "print('made')", str(weights)]
    weights.write_text("weights of one")
    words = [str(run), f"{run}/stages", "pixel", f"{run}/made", "--", *words]
    said = []
    for _ in range(2):
        assert stage.main(words) == 0
        said.append(capfd.readouterr().out)
    (run / "other.t").write_text("weights of two")
    (run / "other.t").replace(weights)
    assert stage.main(words) == 0
    said.append(capfd.readouterr().out)
    assert [text.endswith("\nmade\n") for text in said] == [True, False, True]
    assert said[1] == "== pixel: done before\n" and f"again: {weights}, or a file" in said[2]


def test_seeds_of_other_options_are_told_apart(tmp_path):
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        more = [f"@/seed{seed}/x", f"data/toy/s{seed}/lists/a.txt", "--seed", str(seed)]
        for name, top_p in (("pixel", "0.5"), ("psa", "0.5" if seed else "0.1")):
            identity = ["a.py", "--top-p", top_p, *more]
            stage.write_json(folder / f"{name}.json", {"identity": identity})
    assert stage.of_one_setting(folders, "pixel") and not stage.of_one_setting(folders, "psa")
    assert stage.of_one_setting(folders[1:], "psa")
    (folders[0] / "psa.json").unlink()
    assert stage.of_one_setting(folders, "psa")


def test_what_a_run_has_left_behind_is_known(finished, capfd):
    """After a change, stages that a later run leaves out: a second SCC, and an evaluation of it."""
    folder, scc = finished / "stages", command(finished, "lists/psa.txt", "scc2", "t")
    made = [f"{finished}/scc2", f"{finished}/lists/scc2.txt"]
    check = [sys.executable, "-c", "open('m', 'w')", f"{finished}/lists/scc2.txt"]
    for name, outputs, words in (("scc2", made, scc), ("eval", ["m"], check)):
        assert stage.main([f"{finished}", f"{folder}", name, *outputs, "--", *words]) == 0
    assert stage.outdated(finished, folder) == set()
    moved = finished.parent / "moved"
    shutil.copytree(finished, moved)
    assert stage.outdated(moved, moved / "stages") == set()
    assert line(finished, psa="u") == 0
    assert stage.outdated(finished, folder) == {"scc2", "eval"}
    assert line(finished) == 0
    assert stage.outdated(finished, folder) == set()


def test_an_input_is_added_to_a_folder(finished, capfd):
    (finished / "arrays/d.t").write_text("d")
    assert line(finished) == 0 and ran(capfd) == ["psa", "scc"]
    assert current(finished) == afresh(finished)


def test_the_folder_is_removed_and_an_option_changed(finished, capfd):
    """The case in which the later stages' "done before" would show an old table."""
    shutil.rmtree(finished / "psa")
    assert line(finished, psa="u") == 0 and ran(capfd) == ["psa", "scc"]
    assert current(finished) == afresh(finished, psa="u")


@pytest.mark.parametrize("gone", ["psa", "psa/1.t", "lists/psa.txt", "scc/settings"])
def test_deleted_outputs_are_made_again_and_nothing_else(finished, capfd, gone):
    before = current(finished)
    path = finished / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert line(finished) == 0 and ran(capfd) == [gone.split("/")[0].replace("lists", "psa")]
    assert contents(finished) == before
    assert line(finished) == 0 and ran(capfd) == []


@pytest.mark.parametrize("name", ["psa/1.t", "lists/psa.txt"])
def test_an_edited_output_is_kept_apart_and_made_again(finished, capfd, name):
    before = current(finished)
    (finished / name).write_text("edited")
    assert line(finished) == 0 and ran(capfd) == ["psa"]
    assert current(finished) == before
    kept = "psa.1/1.t" if name.startswith("psa") else "lists/psa.txt.1"
    assert (finished / kept).read_text() == "edited"


def test_new_times_alone_change_nothing(finished, capfd):
    for path in finished.rglob("*.t"):
        os.utime(path, (1, 1))
    assert line(finished) == 0 and ran(capfd) == []


def test_files_that_others_add_change_nothing(finished, capfd):
    (finished / "psa/picture.png").write_text("a picture")
    (finished / "arrays/.lock").write_text("")
    assert line(finished) == 0 and ran(capfd) == []


def test_a_stopped_stage_goes_on_unless_its_inputs_have_changed(run, capfd):
    assert line(run, psa="killed") == 3
    assert "error: stage psa ended with exit code 3" in capfd.readouterr().err
    (run / "psa/0.t").write_text("half of the work")
    assert line(run, psa="killed") == 3 and (run / "psa/0.t").read_text() == "half of the work"
    (run / "images/1.t").write_text("another")
    assert line(run, psa="killed") == 3 and (run / "psa/0.t").read_text() != "half of the work"
    assert (run / "psa.1/0.t").read_text() == "half of the work"
    assert line(run) == 0 and current(run).keys() == afresh(run).keys() | {
        "psa.2/0.t",
        "psa.2/settings",
    }


def test_labels_without_a_record_are_left_to_the_command(finished, capfd):
    shutil.rmtree(finished / "stages")
    before = contents(finished)
    assert line(finished) == 0 and ran(capfd) == ["psa", "scc"] and contents(finished) == before
    shutil.rmtree(finished / "stages")
    assert (
        line(finished, psa="u") == 1 and "holds labels of other settings" in capfd.readouterr().err
    )
    assert contents(finished) == before


def test_a_run_may_be_moved_and_named_otherwise(finished, capfd):
    assert line(Path("run")) == 0 and ran(capfd) == []
    finished.rename(finished.parent / "moved")
    assert line(finished.parent / "moved") == 0 and ran(capfd) == []


def test_the_number_of_processes_does_not_count(run):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    words = ["seco_sam.py", "--seed", "1"]
    alone = stage.identity(["python", *words], run)
    assert alone == stage.identity(["/bin/python3", *torchrun, "4", *words], run) == words
    assert alone != stage.identity(["python", *words[:2], "2"], run)


def test_a_second_run_in_the_folder_stops(run, capfd):
    (run / "stages").mkdir()
    with open(run / "stages/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert line(run) == 2
    assert capfd.readouterr().err.startswith(f"error: {run}/stages: another run is writing there")
    assert not (run / "psa").exists()
    assert line(run) == 0


def test_time_of_all_tries_and_memory_are_noted(run):
    assert line(run, psa="killed") == 3
    record = stage.read_json(run / "stages/psa.json")
    assert not record["done"]
    stage.write_json(run / "stages/psa.json", record | {"seconds": 100.0})
    (run.parent / "work.py").write_text(WORK.replace("sys.exit(3)", "pass"))
    made, more = [f"{run}/psa", f"{run}/lists/psa.txt"], [f"{run}/arrays"]
    words = command(run, "pixel.txt", "psa", "killed", *more)
    words = [str(run), f"{run}/stages", "psa", *made, "from", *more, "--", *words]
    # (in a process of its own, since this one has had larger children)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "scripts.lib.stage", *words], env=environment, check=True)
    record = stage.read_json(run / "stages/psa.json")
    assert record["done"] and record["seconds"] >= 100 and 1 < record["peak_memory_mb"] < 1000
