"""scripts/lib/page.py: the page is whole, and all that it needs lies on this disk."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from scripts.lib import page
from scripts.lib.run_folder import task_folders
from util.run import UserError


class Reader(HTMLParser):
    """The page's text, its links and pictures, and the tags that are open."""

    def __init__(self):
        super().__init__()
        self.text, self.targets, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.targets += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(path: Path, *words: str) -> Reader:
    """Every tag is closed, every link and picture leads to a file, the words are there, no rule of
    the style fetches anything. Returns what was read."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == [] and reader.targets
    for target in reader.targets:
        assert "://" not in target and (path.parent / unquote(target)).is_file(), target
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))
    text = "".join(reader.text)
    for word in words:
        assert word.lower() in text.lower(), word
    return reader


def manifest(path: Path, command: str, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "options": options, "cost": {"seconds": 2.0, "host_mb": 50.2}}
    path.write_text(json.dumps(content), encoding="utf-8")


def test_page_of_a_run(tmp_path):
    """Names with spaces, quotes and signs of HTML; label folders outside the run."""
    run, data = tmp_path / "a <run> & 100 %", tmp_path / "data"
    for file in (
        run / "pictures/sweep.png",
        run / "pictures/side_by_side.png",
        data / "exp_tiny/vis/aachen/0.png",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    for file in (data / "exp_tiny_scc/report/index.html", run / "adapt/train.log"):
        file.parent.mkdir(parents=True)
        file.touch()
    lists = {"id_list_path": "splits/exp/train.txt"}
    manifest(data / "exp/run.json", "make_pseudo_labels.py", id_list_path="splits/train.txt")
    manifest(data / "exp_tiny/run.json", "seco_sam.py <x>", **lists)
    manifest(data / "exp_tiny_scc/run.json", "seco_scc.py", id_list_path="l/exp_tiny/train.txt")
    training = {"labeled_id_path": "splits/exp_tiny_scc/labeled.txt", "root_path": str(data)}
    manifest(run / "adapt/manifest.json", "train", **training, versions="<2>")
    tables = [
        {"text": "Seeds: 0."},
        {"heading": "A & B", "head": ["a", "b"], "rows": [["x < 1", ""]]},
    ]
    page.write_results(run, tables, [{"heading": "more"}], task_folders(run))
    text = "Seeds: 0.\n\n### A & B\n\n| a | b |\n|---|---|\n| x < 1 |  |\n"
    assert (run / "results.md").read_text() == text
    words = ("a <run> & 100 %", "x < 1", "A & B", "seco_sam.py <x>", '"versions": "<2>"', "pixel")
    read = check_page(run / "index.html", *words)
    assert "exp_tiny: 0" in "".join(read.text)
    pictures = [unquote(t) for t in read.targets if t.endswith(".png")]
    assert pictures[::2] == [
        "pictures/side_by_side.png",
        "pictures/sweep.png",
        "../data/exp_tiny/vis/aachen/0.png",
    ]
    assert "../data/exp_tiny_scc/report/index.html" in read.targets
    assert read.text.count("x < 1") == 1


def test_a_task_gets_its_tables(tmp_path):
    for name, value in (("before", 10.0), ("after", None)):
        manifest(tmp_path / f"eval_{name}/run.json", "eval.py")
        metrics = {"miou": 33.333, "iou": {"road": value, "sky": 50.0}}
        (tmp_path / f"eval_{name}/metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "adapt").mkdir()
    (tmp_path / "adapt/train.log").touch()
    (tmp_path / "compare.txt").write_text("overall: pass <1>\n")
    page.main([str(tmp_path)])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| road | 10.00 | – |" in text and "| after | 2 | 50 |" in text
    assert "| adapt |" not in text  # it has no manifest
    check_page(tmp_path / "index.html", "33.33", "overall: pass <1>", "training log: adapt")


def test_an_unfinished_run_has_no_page(tmp_path):
    with pytest.raises(UserError, match="finish the run"):
        page.main([str(tmp_path)])
