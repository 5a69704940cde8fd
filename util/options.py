"""Options of a script: a class whose attributes are typed and explained where they are declared.

    @dataclass(kw_only=True)
    class Options(ListOptions, ClassOptions, RunOptions):
        quantile: Setting[Share] = 0.5
        "release: of the losses or scores of a class, its threshold"

    options = parse_options(Options, __doc__, argv)    # --quantile 0.6 → options.quantile

The string below an attribute is its help (several in a row are one). An attribute without default
is required. `Setting` marks what results depend on: `settings_of`; `Argument`, what is given in its
place, without a name; `Annotated[File, "--x"]` gives a second name. Types: int, float, str, Path,
Literal (choices), `X | None`, list[X] (any number), tuple[X, X] (two), bool (a switch), and those
below, which have bounds.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from util.run import UserError

T = TypeVar("T")
SETTING, ARGUMENT = "setting", "argument"


@dataclass(frozen=True)
class Bounds:
    """least, most: bounds that are allowed; above: one that is not."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def check(self, name: str, number: float) -> None:
        """UserError unless the number lies within."""
        if self.above < number < math.inf and self.least <= number <= self.most:
            return
        bounds = {
            f"{self.least:g} or more": self.least,
            f"a number above {self.above:g}": self.above,
            f"at most {self.most:.10g}": self.most,
        }
        words = " and ".join(text for text, bound in bounds.items() if math.isfinite(bound))
        raise UserError(f"--{name.replace('_', '-')} {number}: give {words}")


Setting = Annotated[T, SETTING]
Argument = Annotated[T, ARGUMENT]
Count = Annotated[int, Bounds(least=1), "N"]
CountFrom0 = Annotated[int, Bounds(least=0), "N"]
Pixels = Annotated[int, Bounds(least=1), "PIXELS"]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
ShareAbove0 = Annotated[float, Bounds(above=0, most=1)]
File = Annotated[Path, "FILE"]
Folder = Annotated[Path, "FOLDER"]
List = Annotated[Path, "LIST"]


@dataclass(kw_only=True)
class ListOptions:
    """what is read"""

    id_list_path: List
    "list of the images, and of what this script wants beside each"
    root_path: Folder = Path("data")
    "folder that the lists' paths start from"


@dataclass(kw_only=True)
class ClassOptions:
    """classes"""

    classes: File | None = None
    "the classes: a line for each with its name, stuff or thing, and colour, as `sky stuff"
    "70,130,180` (default: classes.txt beside what is read, else --class-num)"
    class_num: Setting[Annotated[int, Bounds(least=1, most=255), "K"]] = 19
    "instead: number of classes; 19 (Cityscapes) and 16 (SYNTHIA) need nothing more"
    stuff: Annotated[list[int], "ID"] | None = None
    "train IDs of stuff, for other class sets"
    things: Annotated[list[int], "ID"] | None = None
    "train IDs of things, for other class sets"


@dataclass(kw_only=True)
class DeviceOptions:
    """device"""

    device: str = "auto"
    "auto, cpu, cuda or cuda:N"


@dataclass(kw_only=True)
class RunOptions(DeviceOptions):
    """random numbers"""

    seed: Setting[Annotated[int, Bounds(least=0, most=2**32 - 1)]] = 0
    "seed of all random numbers"


def parse_options(kind: type[T], description: str, argv: list[str] | None = None) -> T:
    """An instance of a class of options from the command line. Its attribute `given` has the names
    of those that were given.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(kind)}
    for part in reversed(kind.__mro__[:-1]):
        if texts := help_texts(part):
            group = parser.add_argument_group((part.__doc__ or "").rstrip("."))
            for name, text in texts.items():
                add_option(group, name, hints[name], defaults[name], text)
    given = vars(parser.parse_args(argv))
    options = kind(**given)
    options.given = frozenset(given)
    return options


def help_texts(kind: type) -> dict[str, str]:
    """{attribute: its help} of those that a class declares itself."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    texts: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            name, texts[node.target.id] = node.target.id, ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and texts:
            texts[name] = f"{texts[name]} {node.value.value}".strip()
    return texts


def taken_apart(hint) -> tuple[type, list]:
    """(plain type, marks) of a type with marks, which may be inside `X | None`, list and tuple."""
    if get_origin(hint) is Annotated:
        plain, marks = taken_apart(hint.__origin__)
        return plain, marks + list(hint.__metadata__)
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) in (Union, UnionType) and len(parts) == 1:
        plain, marks = taken_apart(parts[0])
        return (bool | None if plain is bool else plain), marks
    if get_origin(hint) in (list, tuple):
        return hint, taken_apart(parts[0])[1]
    return hint, []


def add_option(group, name: str, hint, default, text: str) -> None:
    """Declare an attribute to argparse."""
    (plain, marks), how = taken_apart(hint), {}
    if plain is bool:
        how["action"] = "store_true"
    elif plain == bool | None:
        how["action"] = BooleanOptionalAction
    elif get_origin(plain) is Literal:
        how |= {"choices": get_args(plain), "type": type(get_args(plain)[0])}
    else:
        words = [m for m in marks if isinstance(m, str) and m not in (SETTING, ARGUMENT)]
        metavar = next(iter(words), None)
        if get_origin(plain) is not None:
            how["nargs"] = "*" if get_origin(plain) is list else len(get_args(plain))
            plain = taken_apart(get_args(plain)[0])[0]
            metavar = tuple(metavar.split()) if metavar and " " in metavar else metavar

        def read(word: str):
            value = plain(word)
            for bounds in (mark for mark in marks if isinstance(mark, Bounds)):
                bounds.check(name, value)
            return value

        read.__name__ = plain.__name__  # for argparse's messages
        how |= {"type": read, "metavar": metavar or name.rpartition("_")[2].upper()}
    if default is not MISSING:
        how["default"] = SUPPRESS
    elif ARGUMENT not in marks:
        how["required"] = True
    if default not in (MISSING, None) and plain is not bool:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    others = [mark for mark in marks if isinstance(mark, str) and mark.startswith("--")]
    flags = [name] if ARGUMENT in marks else [f"--{name.replace('_', '-')}", *others]
    group.add_argument(*flags, help=text.replace("%", "%%"), **how)


def settings_of(options) -> dict:
    """{name: value} of the options that are marked `Setting`, in the order of their declaration."""
    hints = get_type_hints(type(options), include_extras=True)
    return {n: getattr(options, n) for n, hint in hints.items() if SETTING in taken_apart(hint)[1]}


def one_of(options, *names: str, needed: bool = True) -> str | None:
    """The name of the option that is given, of several that exclude each other."""
    given = [name for name in names if getattr(options, name) not in (None, False)]
    if len(given) > 1 or needed and not given:
        words = " or ".join(f"--{name.replace('_', '-')}" for name in given or names)
        raise UserError(f"{words}: give one of them")
    return given[0] if given else None
