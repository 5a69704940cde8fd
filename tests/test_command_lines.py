"""Command lines that users have written down go on meaning what they mean: every option of every
script, with its name, its default and the value that it is read as (tests/data/command_lines.json).
"""

import importlib
import json
import os
import shlex

import pytest
from conftest import ROOT

LINES = json.loads((ROOT / "tests/data/command_lines.json").read_text(encoding="utf-8"))


def plain(value):
    """As the file has it: paths in their shortest form, tuples as lists."""
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    number = value is None or isinstance(value, (int, float))
    return value if number else os.path.normpath(str(value))


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['script']} {line['command']}"[:60])
def test_a_command_line_means_what_it_meant(line):
    module = importlib.import_module(line["script"])
    parse = getattr(module, "parse_args", None) or module.parse_options
    options = parse(shlex.split(line["command"]))
    assert {name: plain(getattr(options, name)) for name in line["options"]} == line["options"]
