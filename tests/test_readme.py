"""The README's commands: every script that it names is there, takes the options and knows the
variables that it gives; every link leads to a file. The lists of packages."""

import contextlib
import importlib
import io
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.toy import draw_scene
from model.deeplabv3plus import DeepLabV3Plus
from util.labels import class_set, read_label, write_label

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(
    r"((?:[A-Z_]+=\S*\s+)*)(?:python|bash|torchrun\b.*?)\s+"
    r"(?:-m\s+([a-z]\w*(?:\.\w+)*)|([\w./]+\.(?:py|sh)))(?=\s|$)(.*)"
)


def commands(text: str) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(script, its options, variables before it) of every command in code blocks and inline code,
    in order, each once. Commands of modules of others (python -m venv) are left out.
    """
    code = re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    found = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        line = re.sub(r'"[^"]*"', "x", line.split(" #")[0])
        if match := COMMAND.search(line):
            variables, module, script, rest = match.groups()
            if module:
                script = module.replace(".", "/")
                script += "/__main__.py" if (ROOT / script).is_dir() else ".py"
                if not (ROOT / script.split("/")[0]).is_dir():
                    continue
            options = tuple(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
            found.append((script, options, tuple(re.findall(r"([A-Z_]+)=", variables))))
    return list(dict.fromkeys(found))


@cache
def help_text(script: str) -> str:
    """What --help prints: of a Python file in this process, of a shell script by bash."""
    if script.endswith(".sh"):
        run = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        return run.stdout
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    return text.getvalue()


def test_the_python_calls_run(tmp_path, monkeypatch):
    """With the tiny SAM in ViT-H's place and a small random network, on the CPU."""
    block, predicting = re.findall(r"```python\n(.*?)```", README, re.S)
    assert block.count('"vit_h", device="cuda"') == 1
    scene = draw_scene(3, "target", 96, 192)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene.image).save(tmp_path / "street.png")
    write_label(tmp_path / "street_pixel_label.png", scene.label, class_set(19).palette)
    few_points = '"tiny", device="cpu")\nsam.settings = type(sam.settings)(8)'
    exec(block.replace('"vit_h", device="cuda")', few_points), {})
    label = read_label(tmp_path / "street_psa.png", 19)
    assert label.shape == (96, 192) and (label != 255).any()
    model = DeepLabV3Plus(10, 19)
    (tmp_path / "runs/seco").mkdir(parents=True)
    torch.save({"model": model.state_dict(), "config": model.config}, "runs/seco/latest.pth")
    exec(predicting.replace('"cuda"', '"cpu"'), {})
    label = read_label(tmp_path / "street_label.png", 19)
    assert label.shape == (96, 192) and (label != 255).all()


def test_the_commands_are_found():
    text = (
        "Do `python a.py --one 1`.\n```bash\nOMP_NUM_THREADS=1 python b/c.py x --two --three-four 2"
        '   # --five\nSEEDS="0 1" OUT=x bash d.sh\npython -m util.e --six \\\n  --seven\n'
        "torchrun --nproc_per_node 4 f.py --eight\npython -m venv --nine\n```\n`--ten`"
    )
    assert commands(text) == [
        ("b/c.py", ("--two", "--three-four"), ("OMP_NUM_THREADS",)),
        ("d.sh", (), ("SEEDS", "OUT")),
        ("util/e.py", ("--six", "--seven"), ()),
        ("f.py", ("--eight",), ()),
        ("a.py", ("--one",), ()),
    ]
    assert {
        "scripts/toy.sh",
        "scripts/test.sh",
        "seco_sam.py",
        "seco_scc.py",
        "train_unimatch.py",
        "eval.py",
    } <= {script for script, _, _ in commands(README)}


@pytest.mark.parametrize("script, options, variables", commands(README), ids=str)
def test_a_command_of_the_readme_can_be_given(script, options, variables):
    assert (ROOT / script).is_file(), script
    if script.endswith(".py"):
        known = set(re.findall(r"--[a-z][a-z-]*", help_text(script)))
        assert set(options) <= known, script
    else:
        assert set(options) <= {"--help"}
        known = re.findall("^  ([A-Z_]+)=", help_text(script), re.M)
        assert set(variables) <= {*known, "OMP_NUM_THREADS"}, script


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links if not link.startswith("http"))


def test_figures_are_put_where_the_markers_are(tmp_path):
    figures = importlib.import_module("scripts.dev.figures")
    document, new = tmp_path / "README.md", tmp_path / "new.md"
    document.write_text("a\n<!-- b:begin -->\nold\n<!-- b:end -->\nc\n")
    new.write_text("<!-- d:begin --><!-- d:end --> e\n")
    figures.put(document, "b", "| new |\n")
    figures.put(new, "d", "x")
    assert document.read_text() == "a\n<!-- b:begin -->\n| new |\n<!-- b:end -->\nc\n"
    assert new.read_text() == "<!-- d:begin -->\nx\n<!-- d:end --> e\n"
    with pytest.raises(figures.UserError, match="<!-- f:begin --> … end in one place"):
        figures.put(document, "f", "x")


def versions(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(re.split(">=|==", line) for line in lines if line)


def test_the_locked_versions_are_those_that_made_the_tables():
    """They satisfy requirements.txt, and are those of the runs' manifests, which name all but the
    packages that only draw.
    """
    locked = versions("requirements-lock.txt")

    def number(version):
        return [int(part) for part in version.split(".")[:3]]

    for package, least in versions("requirements.txt").items():
        assert number(locked[package]) >= number(least), package
    files = list((ROOT / "training_logs/ours").glob("*/seed*_manifests.json"))
    assert files
    for file in files:
        for made in re.findall(r'"versions": (\{.*?\})', file.read_text(), re.S):
            made = json.loads(made)
            for package in versions("requirements.txt").keys() - {"matplotlib", "jinja2"}:
                assert locked[package] == made[package].split("+")[0], (file, package)
