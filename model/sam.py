"""Segmenters of every kind behind one door: `load_segmenter(sam_type, checkpoint, device)`.

`vit_h`, `vit_l`, `vit_b`: segment_anything's models with the official weights. `vit_t`: MobileSAM,
for which the package mobilesam-mirror must be installed. `tiny`, `tiny_photo`: the small SAM that
comes with this repository (model/sam_fast.py). Any other type is a model of the package
`transformers`: SAM, SAM-HQ, SAM 2 and 2.1, SAM 3's tracker or EdgeTAM, by its name on the Hugging
Face Hub, such as facebook/sam2.1-hiera-large, or as a local folder with config.json,
preprocessor_config.json and model.safetensors. model/README.md has the table of models.

Masks of a model of transformers are those of the package's own processor, pixel by pixel. One thing
differs on purpose: for models whose input is stretched to a square (SAM 2, SAM 3, EdgeTAM) the
package's own generator puts the grid of points of an image that is not square in the wrong places;
here it covers the image, as Meta's generator of SAM 2 does.

Needs when copied away: model/{segmenter,sam_fast}.py, util/{outputs,run}.py and, for `tiny`,
model/sam_tiny.pth.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from model.sam_fast import TINY_CHECKPOINT, FastSam, build_sam_tiny
from model.segmenter import SAM_SETTINGS, Decoded, ProposalSettings, Segmenter, Size
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

# {model_type of config.json: settings of the family's own automatic mask generator}.
# SAM: segment_anything 1.0. SAM-HQ: segment-anything-hq 0.3, the same values. SAM 2 and 2.1: sam2
# 1.1.0. EdgeTAM and SAM 3's tracker, whose decoders are SAM 2's, get SAM 2's values; SAM 3 has no
# generator of its own. All in automatic_mask_generator.py.
LIKE_SAM2 = ("sam2", "sam2_video", "edgetam", "edgetam_video", "sam3_tracker", "sam3_video")
SETTINGS = {
    **dict.fromkeys(("sam", "sam_hq"), SAM_SETTINGS),
    **dict.fromkeys(LIKE_SAM2, ProposalSettings(predicted_iou=0.8)),
}
HUB = "https://huggingface.co/"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/model
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "p*processor_config.json")
PICKLED = ("pytorch_model*.bin*", "config.json", "p*processor_config.json")  # of older folders


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
    return load_transformers(sam_type, checkpoint, torch.device(device), **options)


def output_name(sam_type: str) -> str:
    """What a type is called in the names of outputs: `vit_h`, `sam2.1-hiera-large`.

    Of a model on the Hub or a folder it is the last part, without characters that a list of paths
    could not hold.
    """
    return re.sub(r"[^\w.+-]", "_", Path(sam_type).name or Path(sam_type).resolve().name)


def files_digest(files: list[Path]) -> str:
    """One SHA-256 for the files of a segmenter: the file's, or that of the digests of several."""
    digests = [sha256(path) for path in files]
    several = hashlib.sha256("".join(digests).encode()).hexdigest()
    return several if len(digests) > 1 else digests[0]


# ---------------------------------------------------------------- segment_anything, MobileSAM, tiny


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


# ------------------------------------------------------------------------------------- transformers


class TransformersSam(Segmenter):
    """One model of transformers and the image it has encoded (see `Segmenter`).

    model: with `get_image_embeddings` and prompts in `forward`; image_processor: the package's,
    which makes pixel values of images; options: of `Segmenter`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        image_processor: Callable,
        settings: ProposalSettings = SAM_SETTINGS,
        **options,
    ):
        super().__init__(model.device, settings, **options)
        self.model, self.image_processor = model, image_processor

    def encode(self, image: np.ndarray) -> None:
        """SAM and SAM-HQ pad an image to a square, the others stretch it to one."""
        writable = image.copy()  # the processor warns of arrays that are read-only
        inputs = self.image_processor(
            images=writable, input_data_format="channels_last", return_tensors="pt"
        )
        pixels = inputs["pixel_values"].to(self.device)
        self.square = tuple(pixels.shape[-2:])
        reshaped = inputs.get("reshaped_input_sizes")
        self.padded = reshaped is not None
        self.input_size = tuple(reshaped[0].tolist()) if self.padded else self.square
        with self.watch("encode"), self.autocast():
            embeddings = self.model.get_image_embeddings(pixels)
        self.embeddings = {"image_embeddings": embeddings}
        if isinstance(embeddings, tuple):  # SAM-HQ
            self.embeddings = dict(zip(("image_embeddings", "intermediate_embeddings"), embeddings))

    def to_input(self, points: np.ndarray) -> np.ndarray:
        (height, width), (rows, columns) = self.size, self.input_size
        return points * np.array([columns / width, rows / height])

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool
    ) -> Callable[[int, int], Decoded]:
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)

        def decoded(start: int, stop: int) -> Decoded:
            with self.autocast():
                result = self.model(
                    input_points=points[None, start:stop].float(),
                    input_labels=labels[None, start:stop],
                    input_boxes=None if boxes is None else boxes[None, start:stop],
                    multimask_output=several,
                    **self.embeddings,
                )
            return Decoded(result.iou_scores[0].float(), result.pred_masks[0].float())

        return decoded

    def enlargement(self, height: int, width: int) -> list[tuple[Size, Size]]:
        """As the processors' `post_process_masks` do."""
        first = [(self.square, self.input_size)] if self.padded else []
        return [*first, (self.size, self.size)]


def model_folder(sam_type: str, checkpoint: str | Path | None) -> Path:
    """The folder of a model: `checkpoint`, else `sam_type` where that is a folder, else what the
    Hub or an earlier download from it has. UserError where there is none.
    """
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise UserError(
                f"{checkpoint}: no such folder; give the folder of --sam-type {sam_type}"
                " (config.json, preprocessor_config.json, model.safetensors)"
            )
        return Path(checkpoint)
    if Path(sam_type).is_dir():
        return Path(sam_type)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(sam_type, allow_patterns=list(PATTERNS)))
    except GatedRepoError:
        remedy = f"accept its licence at {HUB}{sam_type} and log in (hf auth login)"
    except Exception as error:  # of the network, the Hub or the disk: all mean that it is not here
        remedy = f"the Hub gave none ({str(error).strip().splitlines()[0][:100]})"
    raise UserError(
        f"--sam-type {sam_type}: no weights here: {remedy}; or download {HUB}{sam_type} elsewhere"
        " and give the folder as --sam-checkpoint"
    )


def load_transformers(
    sam_type: str, checkpoint: str | Path | None, device: torch.device, **options
) -> TransformersSam:
    """See `load_segmenter`. Weights are read as float32. options: of `Segmenter`."""
    if not (checkpoint or Path(sam_type).is_dir() or HUB_NAME.fullmatch(sam_type)):
        raise UserError(
            f"--sam-type {sam_type}: neither vit_h, vit_l, vit_b, vit_t or tiny, nor a model on the"
            " Hugging Face Hub such as facebook/sam2.1-hiera-large, nor a folder that is there"
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--sam-type {sam_type} needs a package that is absent ({error}):"
            ' pip install "transformers>=5"'
        ) from None
    folder = model_folder(sam_type, checkpoint)
    family = model_family(folder)
    transformers.utils.logging.set_verbosity_error()  # no notes about loading
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForMaskGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        image_processor = transformers.AutoImageProcessor
        processor = image_processor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a folder can be wrong in more ways than errors have names
        raise UserError(
            f"{folder}: {str(error).strip().splitlines()[0][:200]}; give the folder of a model"
            " as the Hub has it"
        ) from None
    lacking = sorted([*report["missing_keys"], *(row[0] for row in report["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"{folder}: its weights do not fit its config.json ({lacking[0]} and"
            f" {len(lacking) - 1} more are absent or of another shape); download it again"
        )
    sam = TransformersSam(model.eval().to(device), processor, SETTINGS[family], **options)
    patterns = PATTERNS if any(folder.glob(PATTERNS[0])) else PICKLED
    sam.files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return sam


def model_family(folder: Path) -> str:
    """The `model_type` of a folder's config.json. UserError if it is none of SETTINGS."""
    path = folder / "config.json"
    try:
        family = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); give the folder of a model as the Hub has it"
        ) from None
    if family not in SETTINGS:
        raise UserError(
            f"{path}: model_type {family} takes no boxes and points, or is unknown here; give a"
            f" model of {', '.join(SETTINGS)}"
        )
    return family
