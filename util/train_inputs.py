"""What a training run reads, checked before any work, and the folder that it writes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from util.labels import check_files, check_pairs, read_list
from util.outputs import check_settings, digest_of_all, remove_leftovers
from util.run import UserError, sha256

RESULTS = ("latest.pth", "best.pth", "summary.json")  # a folder with one of them holds a run

# What a run is: changing one of these in a folder that holds a run is an error. Others (workers,
# pictures, processes) may change.
SETTINGS = (
    "supervised",
    "class_num",
    "backbone",
    "stem",
    "crop_size",
    "global_batch",
    "loss_groups",
    "epochs",
    "lr",
    "lr_multi",
    "ohem_threshold",
    "min_kept",
    "conf_thresh",
    "amp",
    "seed",
    "copy_paste",
    "copy_paste_classes",
    "eval_mode",
    "eval_every",
    "optimizer",
    "class_balance",
    "scales",
    "photometric",
)


def read_lists(args, class_num: int) -> tuple[list, list, list, np.ndarray]:
    """Rows of the labeled, the unlabeled (image paths) and the validation list, with all that they
    name checked, and the pixels of each class in each label to learn from, int64 labeled x
    class_num. Evaluation needs ground truth in its image's size; a training label may be smaller or
    larger.
    """
    labeled = read_list(args.labeled_id_path)
    unlabeled, validation = [], []
    if args.unlabeled_id_path:
        unlabeled = [row[0] for row in read_list(args.unlabeled_id_path, (1, 2))]
    both = {image for image, _ in labeled}.intersection(unlabeled)
    if both:
        raise UserError(
            f"{min(both)}: in {args.labeled_id_path} and in {args.unlabeled_id_path}; each image"
            " is in one of the two, make both with scripts/make_split.py"
        )
    if args.val_id_path:
        validation = read_list(args.val_id_path)
    check_files(args.root_path, unlabeled, args.unlabeled_id_path)
    if validation:
        check_pairs(args.root_path, validation, args.val_id_path, class_num, same_size=True)
    pixels = check_pairs(args.root_path, labeled, args.labeled_id_path, class_num)
    if not pixels.any():
        raise UserError(
            f"{args.labeled_id_path}: no label map of it has a labeled pixel; nothing can be"
            " learned"
        )
    return labeled, unlabeled, validation, pixels


def input_files(args) -> dict[str, Path]:
    """{name: file} of what the options name, for the manifest and the settings."""
    weights = args.backbone_weights
    files = {
        "labeled": args.labeled_id_path,
        "unlabeled": args.unlabeled_id_path,
        "val": args.val_id_path,
        "init_checkpoint": args.init_checkpoint,
        "backbone_weights": None if weights in ("none", "imagenet") else Path(weights),
    }
    return {name: path for name, path in files.items() if path}


def run_settings(args, listed: list[str], inputs: dict[str, Path]) -> dict:
    """What settings.json holds: SETTINGS, and digests of the inputs and of the images and label
    maps that their lists name (`listed`, below --root-path).
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["listed_files_sha256"] = digest_of_all(args.root_path / name for name in listed)
    for name, path in inputs.items():
        settings[f"{name}_sha256"] = sha256(path)
    return settings


def open_folder(args, settings: dict) -> None:
    """Make --save-path ready: a run of other settings there is an error, a failed start is not."""
    check_settings(
        args.save_path / "settings.json",
        settings,
        "a run with",
        "choose another --save-path, or remove that folder",
        begun=any((args.save_path / name).is_file() for name in RESULTS),
    )
    remove_leftovers(args.save_path)
