"""Segmenters of every kind behind one door: `load_segmenter(sam_type, checkpoint, device)`.

A type is one of WEIGHTS or a model of the `transformers` package.

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

# {type: where its weights are looked for without --sam-checkpoint}. Six hexadecimal digits at the
# end of an official name are the start of the file's MD5.
WEIGHTS = {
    "vit_h": Path("pretrained/sam_vit_h_4b8939.pth"),
    "vit_l": Path("pretrained/sam_vit_l_0b3195.pth"),
    "vit_b": Path("pretrained/sam_vit_b_01ec64.pth"),
    "vit_t": Path("pretrained/mobile_sam.pt"),
    "tiny": TINY_CHECKPOINT,  # has seen drawn scenes
    "tiny_photo": TINY_CHECKPOINT.with_name("sam_tiny_photo.pth"),  # has seen photographs too
}
# Where the published weights are (README of segment-anything and of MobileSAM).
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE_URL = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/"


def output_name(sam_type: str) -> str:
    """What a type is called in the names of outputs: `vit_h`, `sam2.1-hiera-large`.

    Of a model on the Hub or a folder it is the last part, without characters that a list of paths
    could not hold.
    """
    return re.sub(r"[^\w.+-]", "_", Path(sam_type).name or Path(sam_type).resolve().name)


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
    digest, wanted = hashlib.md5(), path.stem.rpartition("_")[2]
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
        place = WEIGHTS[sam_type]
        address = (MOBILE_URL if sam_type == "vit_t" else OFFICIAL_URL) + place.name
        remedy = f"download them from {address} to {place}, or name another file of them"
        if sam_type in ("vit_h", "vit_l", "vit_b"):
            remedy = f"`bash scripts/download.sh sam {sam_type}` fetches them from {address}"
        if sam_type in ("tiny", "tiny_photo"):
            remedy = f"restore model/{place.name}, or train with scripts/dev/sam_tiny.py"
        raise UserError(f"{path}: no such file of the weights of --sam-type {sam_type}; {remedy}")
    if path.name in [WEIGHTS[name].name for name in ("vit_h", "vit_l", "vit_b")]:
        check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise UserError(
            f"{path}: cut short or no PyTorch weight file ({reason}); fetch or export it again"
        ) from None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(
            f"{path}: holds no plain state dict of weights; "
            f"give a SAM weight file of --sam-type {sam_type}"
        )
    found = checkpoint_type(state)
    if found != sam_type.removesuffix("_photo"):
        remedy = f"give --sam-type {found}" if found else "give a SAM weight file"
        raise UserError(
            f"{path}: weights of {found or 'an unknown model'}, not of --sam-type {sam_type};"
            f" {remedy}"
        )
    return state


def sam_builder(sam_type: str) -> Callable[[], Sam]:
    """What makes a `Sam` of one of WEIGHTS with random weights. UserError where its package is
    absent.
    """
    if sam_type in ("tiny", "tiny_photo"):
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
    """A SAM in eval mode on `device` with the weights of `checkpoint` (None: those of WEIGHTS).

    sam_type: one of WEIGHTS. Raises UserError, in one line that tells the remedy, for an unknown
    type, an absent package, and a checkpoint that is missing, damaged or another type's.
    """
    if sam_type not in WEIGHTS:
        raise UserError(f"--sam-type {sam_type}: choose one of {', '.join(WEIGHTS)}")
    path = Path(checkpoint or WEIGHTS[sam_type])
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

    sam_type: one of WEIGHTS, or a model of transformers: its name on the Hub or a local folder.
    checkpoint: weight file, or for a model of transformers its local folder; None: the default
    place. Its attribute `files` lists what it was made from. UserError as in `build_sam`.
    """
    options = {"prompt_batch": prompt_batch, "amp": amp}
    if sam_type in WEIGHTS:
        path = Path(checkpoint or WEIGHTS[sam_type])
        sam = FastSam(build_sam(sam_type, path, device), **options)
        sam.files = [path]
        return sam
    from model.sam_transformers import load_transformers  # optional package, seconds to import

    return load_transformers(sam_type, checkpoint, torch.device(device), **options)


def files_digest(files: list[Path]) -> str:
    """One SHA-256 for the files of a segmenter: the file's, or that of the digests of several."""
    digests = [sha256(path) for path in files]
    several = hashlib.sha256("".join(digests).encode()).hexdigest()
    return several if len(digests) > 1 else digests[0]
