"""Options that are declared as classes (util/options.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from util.options import (
    Bounds,
    ClassOptions,
    Count,
    ListOptions,
    Positive,
    RunOptions,
    Setting,
    Share,
    one_of,
    parse_options,
    settings_of,
)
from util.run import UserError


@dataclass(kw_only=True)
class Options(ListOptions, ClassOptions, RunOptions):
    """what a test has"""

    share: Setting[Share] = 0.5
    "of all, 0 to 1;"
    "100 % is 1"
    lr: Positive = 0.1
    "learning rate"
    size: Setting[Annotated[tuple[int, int], Bounds(least=32), "H W"]] = (256, 512)
    "of a patch"
    recipe: Literal["release", "paper"] = "release"
    "what is done"
    batch: Count | None = None
    "samples"
    fast: bool | None = None
    "whether to hurry"
    left: bool = False
    "one side"
    right: bool = False
    "the other"


def parse(*words):
    return parse_options(Options, "what it does", ["--id-list-path", "l.txt", *words])


def test_defaults_and_types():
    options = parse()
    assert options.root_path == Path("data") and options.id_list_path == Path("l.txt")
    assert (options.share, options.size) == (0.5, (256, 512))
    assert options.batch is None and options.fast is None
    options = parse(*"--size 64 32 --stuff 0 1 --no-fast --left --batch 3".split())
    assert list(options.size) == [64, 32] and options.stuff == [0, 1] and options.fast is False
    assert options.left and not options.right and options.batch == 3


def test_settings_are_those_that_are_marked():
    settings = {"seed": 4, "class_num": 19, "share": 0.5, "size": (256, 512)}
    assert settings_of(parse("--seed", "4")) == settings


@pytest.mark.parametrize(
    "words, told",
    [
        ("--share 1.5", "--share 1.5: give 0 or more and at most 1"),
        ("--share nan", "--share nan"),
        ("--lr 0", "--lr 0.0: give a number above 0"),
        ("--lr inf", "--lr inf"),
        ("--size 31 64", "--size 31: give 32 or more"),
        ("--batch 0", "--batch 0: give 1 or more"),
        ("--seed -1", "--seed -1: give 0 or more and at most 4294967295"),
        ("--seed 4294967296", "--seed 4294967296"),
    ],
)
def test_values_out_of_bounds_are_told(words, told):
    with pytest.raises(UserError) as error:
        parse(*words.split())
    assert told in str(error.value)


@pytest.mark.parametrize("words", ["--recipe both", "--size 64", "--batch two", "--shares 1"])
def test_what_cannot_be_read_ends_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_has_every_option_with_its_words_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--share SHARE of all, 0 to 1; 100 % is 1 (default: 0.5)",
        "--size H W of a patch (default: 256 512)",
        "--recipe {release,paper} what is done (default: release)",
        "--fast, --no-fast whether to hurry",
        "--seed SEED seed of all random numbers (default: 0)",
    ):
        assert words in text


def test_options_that_exclude_each_other():
    assert one_of(parse("--left"), "left", "right") == "left"
    assert one_of(parse(), "left", "right", needed=False) is None
    for words, needed in (((), True), (("--left", "--right"), False)):
        with pytest.raises(UserError, match="--left or --right: give one of them"):
            one_of(parse(*words), "left", "right", needed=needed)
