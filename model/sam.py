"""Segmenters of every kind behind one door: `load_segmenter(sam_type, checkpoint, device)`.

A type is one of SAM_TYPES or a model of the `transformers` package.

`vit_h`, `vit_l`, `vit_b`: segment_anything's models with the official weights. `vit_t`: MobileSAM,
for which the package mobilesam-mirror must be installed. `tiny`: the small SAM that comes with this
repository (model/sam_tiny.py). Any other type is a model's name on the Hugging Face Hub, such as
facebook/sam2.1-hiera-large, or a local folder with such a model (model/sam_transformers.py).
model/README.md has the table of models.

Needs when copied away: model/{segmenter,sam_fast,sam_tiny,sam_transformers}.py,
util/{outputs,run}.py and, for `tiny`, model/sam_tiny.pth.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from model.sam_fast import FastSam
from model.sam_tiny import TINY_CHECKPOINT, build_sam_tiny
from model.segmenter import Segmenter
from util.run import UserError, sha256

SAM_TYPES = ("vit_h", "vit_l", "vit_b", "vit_t", "tiny")

# Addresses of the published weights (README of segment-anything and of MobileSAM). Six hexadecimal
# digits at the end of a name are the start of the file's MD5.
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE_URL = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/"
OFFICIAL_CHECKPOINTS = {
    "vit_h": "sam_vit_h_4b8939.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_t": "mobile_sam.pt",
}
PRETRAINED_FOLDER = Path("pretrained")


def output_name(sam_type: str) -> str:
    """What a type is called in the names of outputs: `vit_h`, `sam2.1-hiera-large`.

    Of a model on the Hub or a folder it is the last part, without characters that a list of paths
    could not hold.
    """
    return re.sub(r"[^\w.+-]", "_", Path(sam_type).name or Path(sam_type).resolve().name)


def address(sam_type: str) -> str:
    """Where the published weights of `vit_h`, `vit_l`, `vit_b` or `vit_t` are."""
    return (MOBILE_URL if sam_type == "vit_t" else OFFICIAL_URL) + OFFICIAL_CHECKPOINTS[sam_type]


def default_checkpoint(sam_type: str) -> Path | None:
    """Where the weights are looked for without --sam-checkpoint; None for a model of
    transformers, whose type says it.
    """
    if sam_type == "tiny":
        return TINY_CHECKPOINT
    name = OFFICIAL_CHECKPOINTS.get(sam_type)
    return PRETRAINED_FOLDER / name if name else None


def checkpoint_type(state: dict) -> str | None:
    """The SAM type whose weights `state` looks like, or None.

    Depth and width of the vision transformer tell the official types apart; the convolutional stem
    marks the tiny one, the first of TinyViT's layers MobileSAM.
    """
    if "image_encoder.stem.0.weight" in state:
        return "tiny"
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "vit_t"
    embedding = state.get("image_encoder.pos_embed")
    widths = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}
    return widths.get(embedding.shape[-1]) if isinstance(embedding, Tensor) else None


def check_whole(path: Path) -> None:
    """UserError where a file with an official name has another MD5 than that name says."""
    digest, wanted = hashlib.md5(), path.stem.rsplit("_", 1)[1]
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()[: len(wanted)]
    if found != wanted:
        raise UserError(
            f"{path}: its MD5 starts with {found}, the official file's with {wanted}: the download"
            f" is incomplete or changed; fetch {OFFICIAL_URL}{path.name} again"
        )


def read_checkpoint(path: Path, sam_type: str) -> dict:
    """State dict of `path` on the CPU, checked to be whole and of `sam_type`. UserError
    otherwise.
    """
    if not path.is_file():
        if sam_type == "tiny":
            raise UserError(
                f"{path}: no such file; the weights of --sam-type tiny come with the repository"
                f" (model/{TINY_CHECKPOINT.name}): restore them, or train with"
                " scripts/dev/sam_tiny.py"
            )
        raise UserError(
            f"{path}: no such file; download the official weights of --sam-type {sam_type} from"
            f" {address(sam_type)} to {default_checkpoint(sam_type)}, or name another file of them"
        )
    if path.name in OFFICIAL_CHECKPOINTS.values() and path.name != OFFICIAL_CHECKPOINTS["vit_t"]:
        check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (
            str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"{path}: cut short or no PyTorch weight file ({reason}); fetch or export it again"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UserError(
            f"{path}: holds no plain state dict of weights; "
            f"give a SAM weight file of --sam-type {sam_type}"
        )
    found = checkpoint_type(state)
    if found != sam_type:
        mend = f"give --sam-type {found}" if found else "give a SAM weight file"
        raise UserError(
            f"{path}: weights of {found or 'an unknown model'}, not of --sam-type {sam_type};"
            f" {mend}"
        )
    return state


def sam_builder(sam_type: str) -> Callable[[], Sam]:
    """What makes a `Sam` of one of SAM_TYPES with random weights. UserError where its package is
    absent.
    """
    if sam_type == "tiny":
        return build_sam_tiny
    if sam_type != "vit_t":
        return sam_model_registry[sam_type]
    try:
        with warnings.catch_warnings():  # timm's, about names that mobile_sam registers anew
            warnings.simplefilter("ignore")
            from mobile_sam import sam_model_registry as mobile_registry
    except ImportError as error:
        raise UserError(
            f"--sam-type vit_t needs a package that is absent ({error}):"
            " pip install mobilesam-mirror timm"
        ) from None
    return mobile_registry["vit_t"]


def build_sam(
    sam_type: str, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> Sam:
    """A SAM in eval mode on `device` with the weights of `checkpoint` (None: `default_checkpoint`).

    sam_type: one of SAM_TYPES. Raises UserError, in one line that tells the mend, for an unknown
    type, an absent package, and a checkpoint that is missing, damaged or another type's.
    """
    if sam_type not in SAM_TYPES:
        raise UserError(f"--sam-type {sam_type}: choose one of {', '.join(SAM_TYPES)}")
    path = Path(checkpoint or default_checkpoint(sam_type))
    builder = sam_builder(sam_type)
    state = read_checkpoint(path, sam_type)
    sam = builder()
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: does not fit --sam-type {sam_type}"
            f" ({str(error).splitlines()[1].strip()[:150]}); give the weight file of this version"
        ) from None
    return sam.eval().to(device)


def load_segmenter(
    sam_type: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    prompt_batch: int | None = None,
    amp: bool = False,
) -> Segmenter:
    """The segmenter of a type, in eval mode on `device`, with the settings of its own generator.

    sam_type: one of SAM_TYPES, or a model of transformers: its name on the Hub or a local folder.
    checkpoint: weight file, or for a model of transformers its local folder; None: the default
    place. Its attribute `files` lists what it was made from. UserError as in `build_sam`.
    """
    if sam_type in SAM_TYPES:
        path = Path(checkpoint or default_checkpoint(sam_type))
        sam = FastSam(build_sam(sam_type, path, device), prompt_batch=prompt_batch, amp=amp)
        sam.files = [path]
        return sam
    from model.sam_transformers import load_transformers  # optional package, seconds to import

    options = {"prompt_batch": prompt_batch, "amp": amp}
    return load_transformers(sam_type, checkpoint, torch.device(device), **options)


def files_digest(files: list[Path]) -> str:
    """One SHA-256 for the files of a segmenter: the file's, or that of the digests of several."""
    digests = [sha256(path) for path in files]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
