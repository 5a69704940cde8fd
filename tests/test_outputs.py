"""What is promised of every folder of results, tested once (util/outputs.py): one run at a time,
one set of settings and inputs, files that are whole or absent, nothing of others overwritten. Each
script has a test that it keeps its results in this way.
"""

import json
import multiprocessing
import os
import time

import pytest

from util.outputs import (
    Outputs,
    atomic_path,
    made_before,
    made_from,
    read_json,
    write_json,
)
from util.run import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def hold(folder, ready):
    with Outputs(folder):
        if os.fork() == 0:
            time.sleep(2)  # outlives its parent
            os._exit(0)
        ready.set()
        time.sleep(30)


def test_a_second_run_in_a_folder_stops_and_a_killed_one_leaves_nothing(tmp_path):
    """Neither its lock, also in the processes that it has forked, as those that load data, nor
    half-written files.
    """
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=hold, args=(tmp_path, ready))
    first.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another run is writing there"), Outputs(tmp_path):
        pass
    first.kill()
    first.join()
    half = [write(tmp_path / "a" / f".x.{i}.2.tmp.png", "half") for i in range(2)]
    os.utime(half[0], (1, 1))
    with Outputs(tmp_path):
        assert os.listdir(tmp_path / "a") == [half[1].name]  # of another process of this run


def test_of_several_processes_only_the_first_takes_the_lock(tmp_path, monkeypatch):
    with Outputs(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with Outputs(tmp_path):
            pass


def test_settings_of_a_run_that_made_nothing_do_not_bind(tmp_path):
    with Outputs(tmp_path) as out:
        with pytest.raises(UserError, match="has no settings.json that says what made its content"):
            out.accept({"seed": 1}, begun=True)
        out.accept({"seed": 1})
        out.accept({"seed": 2, "scales": (1, 2)})
        out.accept({"seed": 2, "scales": (1, 2)}, begun=True)
        with pytest.raises(UserError, match="holds results of seed = 2, now it is 3; remove"):
            out.accept({"seed": 3, "scales": (1, 2)}, begun=True)
        write(tmp_path / "a/x.PNG", "")  # a result by itself
        with pytest.raises(UserError, match="scales"):  # one that is no longer given
            out.accept({"seed": 2})
    assert read_json(tmp_path / "settings.json") == {"seed": 2, "scales": [1, 2]}


def test_inputs_may_change_until_there_are_results(tmp_path):
    files = {name: write(tmp_path / name, name) for name in "abc"}
    two = {name: files[name] for name in "ab"}
    with Outputs(tmp_path / "out") as out:

        def refused(inputs, words):
            with pytest.raises(UserError, match=f"{words}.*; remove that"):
                out.accept({}, inputs, begun=True)

        out.accept({}, two)
        out.accept({}, two, begun=True)
        refused(files, f"lack 1 of the inputs, first {files['c']}")
        refused({"a": files["a"]}, "1 inputs of its results are none now, first b")
        refused(dict(reversed(two.items())), "in another order")
        write(files["b"], "other")
        refused(two, f"{files['b']}: has changed since the results in {tmp_path}/out")
        out.accept({}, two)
        out.accept({}, two, begun=True)


def test_a_command_knows_what_it_made_before(tmp_path):
    record, inputs = tmp_path / "run.json", {"list": write(tmp_path / "list", "x")}
    assert not made_before(record, made_from({"k": (1,)}, inputs))
    write(record, "not JSON")
    assert not made_before(record, made_from({"k": (1,)}, inputs))
    write_json(record, {"made_from": made_from({"k": (1,)}, inputs)})
    assert made_before(record, made_from({"k": (1,)}, inputs))
    assert not made_before(record, made_from({"k": (2,)}, inputs))
    write(tmp_path / "list", "y")
    assert not made_before(record, made_from({"k": (1,)}, inputs))


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(28, "no room")])
def test_a_file_is_whole_or_as_it_was(tmp_path, error):
    path, kinds = write(tmp_path / "a" / "x.json", "old"), (ZeroDivisionError, UserError)
    told = r"a bug|x\.json: cannot be written \(no room\); make room or"
    with pytest.raises(kinds, match=told), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.json"]
    write_json(path, {"a": [1]})
    assert json.loads(path.read_text()) == read_json(path) == {"a": [1]}
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
