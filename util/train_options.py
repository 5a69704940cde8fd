"""The options of train_unimatch.py and their checks. The defaults are the authors' Cityscapes
runs."""

from __future__ import annotations

import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path

from dataset.augment import SCALES
from dataset.copy_paste import RARE_CLASSES
from dataset.samples import AUTHORS_PROCESSES
from eval import MODES
from model.resnet import BLOCKS, STEMS
from util.losses import OHEM_MIN_KEPT, OHEM_THRESHOLD
from util.options import add_class_options, add_run_options, check_range, check_run_options
from util.run import UserError


def add_training_options(parser: ArgumentParser) -> None:
    """All options of train_unimatch.py."""
    add_data_options(parser)
    add_class_options(parser)
    add_network_options(parser.add_argument_group("network").add_argument)
    recipe = parser.add_argument_group("recipe (defaults: the authors' Cityscapes runs)")
    add_batch_options(recipe.add_argument)
    add_schedule_options(recipe.add_argument)
    add_loss_options(recipe.add_argument)
    running = parser.add_argument_group("running")
    add_evaluation_options(running.add_argument)
    add_machine_options(running.add_argument)
    add_run_options(parser)


def add_data_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--labeled-id-path",
        type=Path,
        required=True,
        metavar="LIST",
        help="images and labels to learn from",
    )
    add(
        "--unlabeled-id-path",
        type=Path,
        metavar="LIST",
        help="images without labels; needed unless --supervised",
    )
    add(
        "--val-id-path",
        type=Path,
        metavar="LIST",
        help="images and ground truth, evaluated after epochs (default: none)",
    )
    add(
        "--root-path",
        type=Path,
        default=Path("data"),
        help="folder the lists' paths start from (default: data)",
    )
    add(
        "--save-path",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="outputs; an unfinished run there goes on",
    )
    add("--supervised", action="store_true", help="train on the labeled list alone")
    add(
        "--photometric",
        action="store_true",
        help=(
            "with --supervised: colour jitter, grey and blur as in the strong views, for a source"
            " model less bound to its domain's colours"
        ),
    )


def add_network_options(add: Callable) -> None:
    add(
        "--backbone",
        default="resnet101",
        choices=[f"resnet{d}" for d in BLOCKS],
        help="(default: resnet101)",
    )
    add(
        "--stem",
        default="deep",
        choices=STEMS,
        help="deep: UniMatch's; torchvision: for its ImageNet weights (default: deep)",
    )
    add(
        "--backbone-weights",
        default="none",
        metavar="none|imagenet|FILE",
        help=(
            "start of the backbone; the authors' is UniMatch's pretrained/resnet101.pth (default:"
            " none, random)"
        ),
    )
    add(
        "--init-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from this whole network, e.g. the source model",
    )


def add_batch_options(add: Callable) -> None:
    add(
        "--crop-size",
        type=int,
        default=769,
        metavar="PIXELS",
        help="side of training crops and of windows, >= 33 (default: 769)",
    )
    add(
        "--global-batch",
        type=int,
        default=8,
        metavar="N",
        help="labeled samples an iteration, over all processes; as many unlabeled (default: 8)",
    )
    add(
        "--batch-per-process",
        type=int,
        metavar="N",
        help=(
            "samples per process at a time; fewer than its share accumulates gradients (default:"
            " its share)"
        ),
    )
    add(
        "--loss-groups",
        type=int,
        metavar="N",
        help=(
            "groups of samples of the global batch within which pixels are counted (OHEM, means);"
            " default: 4, the authors' GPUs, or the largest of 4, 2, 1 that divides --global-batch"
        ),
    )


def add_schedule_options(add: Callable) -> None:
    add(
        "--epochs",
        type=int,
        default=240,
        metavar="N",
        help="passes over the unlabeled list (default: 240)",
    )
    add(
        "--lr",
        type=float,
        default=0.005,
        help="starting learning rate of the backbone (default: 0.005)",
    )
    add(
        "--lr-multi",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="learning rate of the rest / --lr (default: 1.0)",
    )
    add(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="adamw learns faster from random weights; UniMatch's is sgd (default: sgd)",
    )
    add(
        "--scales",
        type=float,
        nargs=2,
        default=SCALES,
        metavar=("LEAST", "MOST"),
        help=(
            "range of the random resizing before cropping, as factors of the image's size (default:"
            " 0.5 2)"
        ),
    )


def add_loss_options(add: Callable) -> None:
    add(
        "--class-balance",
        type=float,
        default=0.0,
        metavar="POWER",
        help=(
            "the labels' loss is cross-entropy with class weights frequency^-POWER, instead of OHEM"
            " (default: 0, OHEM)"
        ),
    )
    add(
        "--ohem-threshold",
        type=float,
        default=OHEM_THRESHOLD,
        metavar="P",
        help="pixels less sure than this are hard, 0 to 1 (default: 0.7)",
    )
    add(
        "--min-kept",
        type=int,
        default=OHEM_MIN_KEPT,
        metavar="PIXELS",
        help=(
            "least hard pixels per loss group; with fewer labeled ones all count (default: 200000)"
        ),
    )
    add(
        "--conf-thresh",
        type=float,
        default=0.0,
        metavar="P",
        help="least confidence of a pseudo-label that counts, 0 to 1 (default: 0, all count)",
    )
    add(
        "--copy-paste",
        action="store_true",
        help="paste objects of rare classes of the labeled list into labeled crops",
    )
    add(
        "--copy-paste-classes",
        type=int,
        nargs="+",
        metavar="ID",
        help="train IDs of the rare classes (default: DT-ST's, known for 16 and 19 classes)",
    )


def add_evaluation_options(add: Callable) -> None:
    add(
        "--eval-mode",
        choices=MODES,
        default="original",
        help=(
            "the shipped GTA log has sliding_window, SYNTHIA's and BDD's original (default:"
            " original)"
        ),
    )
    add(
        "--eval-every",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="evaluate every so many epochs and at the end (default: 1)",
    )
    add(
        "--checkpoint-every",
        type=int,
        default=200,
        metavar="ITERATIONS",
        help="latest.pth within epochs as well; 0: only after epochs (default: 200)",
    )
    add(
        "--pictures-every",
        type=int,
        default=10,
        metavar="EPOCHS",
        help="views and predictions as a picture; 0: never (default: 10)",
    )


def add_machine_options(add: Callable) -> None:
    add(
        "--workers",
        type=int,
        default=4,
        metavar="N",
        help=(
            "data-loading processes per process; results do not depend on it (default: 4; 0: none)"
        ),
    )
    add(
        "--image-cache",
        type=Path,
        metavar="FOLDER",
        help=(
            "keep decoded images here (6 MB for 2048x1024, 19 GB for Cityscapes): data loads"
            " several times faster"
        ),
    )
    add(
        "--amp",
        choices=("none", "tf32", "bf16"),
        default="none",
        help="none is exact fp32 (default); bf16 is faster, on CPUs too",
    )
    add(
        "--channels-last",
        action=BooleanOptionalAction,
        default=None,
        help="memory layout that convolutions in bf16 prefer (default: with --amp bf16)",
    )
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--dry-run",
        action="store_true",
        help="two iterations and one evaluation image; reports memory and time, saves nothing",
    )


def check_training_options(args: Namespace) -> None:
    """One line for every value that no run can have; then the defaults that depend on others are
    filled in.
    """
    if args.supervised == bool(args.unlabeled_id_path):
        raise UserError(
            "--unlabeled-id-path: UniMatch needs it, --supervised excludes it; give one of the two"
        )
    if args.photometric and not args.supervised:
        raise UserError(
            "--photometric: only with --supervised; UniMatch's labeled images stay as they are"
        )
    check_run_options(args)
    check_range(args, "crop_size", least=33)
    check_range(args, "epochs", "eval_every", "min_kept", "global_batch", least=1)
    check_range(args, "batch_per_process", "loss_groups", least=1)
    check_range(args, "workers", "checkpoint_every", "pictures_every", "lr_multi", least=0)
    check_range(args, "lr", "scales", above=0)
    check_range(args, "ohem_threshold", "conf_thresh", "class_balance", least=0, most=1)
    check_range(args, "copy_paste_classes", least=0, most=args.class_num - 1)
    least, most = args.scales = list(args.scales)  # as settings.json gives it back
    if least > most:
        raise UserError(f"--scales {least:g} {most:g}: give the smaller factor first")
    if args.channels_last is None:
        args.channels_last = args.amp == "bf16"
    if args.loss_groups is None:
        args.loss_groups = math.gcd(AUTHORS_PROCESSES, args.global_batch)
    if args.copy_paste and not args.copy_paste_classes:
        if args.class_num not in RARE_CLASSES:
            raise UserError(
                "--copy-paste: rare classes are known for 16 and 19 classes; name yours with"
                " --copy-paste-classes"
            )
        args.copy_paste_classes = list(RARE_CLASSES[args.class_num])


def batch_per_process(args, world: int) -> int:
    """Samples per process and accumulation step, checked."""
    if args.global_batch % world:
        raise UserError(
            f"--global-batch {args.global_batch}: it must be a multiple of the number of processes,"
            f" {world}"
        )
    share = args.global_batch // world
    batch = args.batch_per_process or share
    if share % batch:
        raise UserError(
            f"--batch-per-process {batch}: {share} samples of the global batch fall to each of"
            f" {world} processes; give a divisor of {share}"
        )
    if args.global_batch % args.loss_groups:
        raise UserError(
            f"--loss-groups {args.loss_groups}: it must divide --global-batch {args.global_batch}"
        )
    if args.supervised and batch == 1:
        raise UserError(
            "--supervised with one sample per process and step: batch norm needs two or more; "
            "raise --global-batch or --batch-per-process"
        )
    return batch
