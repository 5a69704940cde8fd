"""Options that several scripts have: their definitions and their checks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from util.run import UserError, select_device


def add_list_options(parser: ArgumentParser, what: str) -> None:
    """--id-list-path, a list of images and `what`, and --root-path."""
    parser.add_argument(
        "--id-list-path", required=True, metavar="LIST", help=f"list of images and {what}"
    )
    add_root_option(parser)


def add_root_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--root-path",
        default="./data/",
        metavar="DIR",
        help="folder that the lists' paths start from (default: %(default)s)",
    )


def add_class_options(parser: ArgumentParser) -> None:
    """The three options that choose a class set (util.labels.class_set)."""
    parser.add_argument(
        "--class-num",
        type=int,
        default=19,
        metavar="K",
        help="number of classes; 19 (Cityscapes) and 16 (SYNTHIA) need nothing more (default: 19)",
    )
    for name in ("stuff", "things"):
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs="*",
            metavar="ID",
            help=f"train IDs of {name}, for other class sets",
        )


def add_run_options(parser: ArgumentParser, seed: bool = True) -> None:
    """--device and --seed."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    if seed:
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of all random numbers (default: 0)"
        )


def check_range(
    options: Namespace,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Every option of `names` (as attributes: `batch_size`) lies in the range; None passes.

    least, most: bounds that are allowed; above: a bound that is not. UserError names the option,
    the value and the range. Not-a-number is out of every range.
    """
    wanted = [
        text
        for text, bound in (
            (f"{least:g} or more" if least is not None else "", least),
            (f"a number above {above:g}" if above is not None else "", above),
            (f"at most {most:.10g}" if most is not None else "", most),
        )
        if bound is not None
    ]
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is None:
                continue
            fits = (
                (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and number == number
                and abs(number) != float("inf")
            )
            if not fits:
                raise UserError(f"--{name.replace('_', '-')} {number}: give {' and '.join(wanted)}")


def check_run_options(options: Namespace) -> None:
    """--seed and --device, for every script that has them: call it right after parsing."""
    if hasattr(options, "seed"):
        check_range(options, "seed", least=0, most=2**32 - 1)
    select_device(options.device)
