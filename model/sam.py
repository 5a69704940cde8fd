"""Segmenters of every kind behind one door: `load_segmenter(sam_type, checkpoint, device)`.

`vit_h`, `vit_l`, `vit_b`: segment_anything's models with the official weights. `vit_t`: MobileSAM,
for which the package mobilesam-mirror must be installed. `tiny`, `tiny_photo`: the small SAM that
comes with this repository (model/sam_fast.py). Any other type is a model of the package
`transformers`: SAM, SAM-HQ, SAM 2 and 2.1, SAM 3's tracker or EdgeTAM, by its name on the Hugging
Face Hub or as a local folder. model/README.md has the table of models.

Masks of a model of transformers are those of the package's own processor, pixel by pixel. The grid
of points covers images that are not square, as in Meta's generator of SAM 2.
"""

from __future__ import annotations

import hashlib
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
from model.segmenter import ProposalSettings, Segmenter, Size
from util.run import UserError, sha256

WEIGHTS = {
    "vit_h": Path("pretrained/sam_vit_h_4b8939.pth"),
    "vit_l": Path("pretrained/sam_vit_l_0b3195.pth"),
    "vit_b": Path("pretrained/sam_vit_b_01ec64.pth"),
    "vit_t": Path("pretrained/mobile_sam.pt"),
    "tiny": TINY_CHECKPOINT,  # has seen drawn scenes
    "tiny_photo": TINY_CHECKPOINT.with_name("sam_tiny_photo.pth"),  # has seen photographs too
}
# Where the published weights are (README of segment-anything and of MobileSAM).
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE_URL = (
    "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/mobile_sam.pt"
)

# {model_type of config.json: settings of the family's own automatic mask generator}: of
# segment_anything 1.0, segment-anything-hq 0.3 and sam2 1.1.0, automatic_mask_generator.py. EdgeTAM
# and SAM 3's tracker have SAM 2's decoder and get its values; SAM 3 has no generator of its own.
LIKE_SAM2 = ("sam2", "sam2_video", "edgetam", "edgetam_video", "sam3_tracker", "sam3_video")
SETTINGS = {
    **dict.fromkeys(("sam", "sam_hq"), ProposalSettings()),
    **dict.fromkeys(LIKE_SAM2, ProposalSettings(predicted_iou=0.8)),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/model
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "p*processor_config.json")


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
    place. UserError where it cannot be had.
    """
    options = {"prompt_batch": prompt_batch, "amp": amp}
    if sam_type in WEIGHTS:
        path = Path(checkpoint or WEIGHTS[sam_type])
        sam = FastSam(build_sam(sam_type, path, device), **options)
        sam.files = [path]
        return sam
    return load_transformers(sam_type, checkpoint, torch.device(device), **options)


def output_name(sam_type: str) -> str:
    """What a type is called in the names of outputs: `vit_h`, `sam2.1-hiera-large`; of a model or a
    folder its last part, without characters that a list of paths could not hold.
    """
    return re.sub(r"[^\w.+-]", "_", Path(sam_type).name or Path(sam_type).resolve().name)


def files_digest(files: list[Path]) -> str:
    """One SHA-256 for the files of a segmenter: the file's, or that of the digests of several."""
    digests = [sha256(path) for path in files]
    several = hashlib.sha256("".join(digests).encode()).hexdigest()
    return several if len(digests) > 1 else digests[0]


# ---------------------------------------------------------------- segment_anything, MobileSAM, tiny


def sam_builder(sam_type: str) -> Callable[[], Sam]:
    """What makes a `Sam` with random weights. UserError where its package is absent."""
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
    """A SAM of WEIGHTS in eval mode on `device` with the weights of `checkpoint` (None: its own).
    UserError for an absent package, and weights that are missing, damaged or another type's.
    """
    path = Path(checkpoint or WEIGHTS[sam_type])
    builder = sam_builder(sam_type)
    if not path.is_file():
        place = WEIGHTS[sam_type]
        if sam_type.startswith("tiny"):
            remedy = f"restore model/{place.name}, or train with scripts/dev/sam_tiny.py"
        elif sam_type == "vit_t":
            remedy = f"download them from {MOBILE_URL} to {place}, or name another file of them"
        else:
            fetch = f"bash scripts/download.sh sam {sam_type}"
            remedy = f"`{fetch}` fetches them from {SAM_URL}{place.name}"
        raise UserError(f"{path}: no such file of the weights of --sam-type {sam_type}; {remedy}")
    sam = builder()
    try:
        sam.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler meets bytes of another kind with any kind of error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: cut short, or no weights of --sam-type {sam_type} ({reason}); fetch them"
            " again, or give the --sam-type that they are of"
        ) from None
    return sam.eval().to(device)


# ------------------------------------------------------------------------------------- transformers


class TransformersSam(Segmenter):
    """One model of transformers and the image it has encoded (see `Segmenter`).

    model: with `get_image_embeddings` and prompts in `forward`; image_processor: the package's.
    """

    def __init__(self, model: torch.nn.Module, image_processor: Callable, **options):
        super().__init__(model.device, **options)
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
        with self.autocast():
            embeddings = self.model.get_image_embeddings(pixels)
        self.embeddings = {"image_embeddings": embeddings}
        if isinstance(embeddings, tuple):  # SAM-HQ
            self.embeddings = dict(zip(("image_embeddings", "intermediate_embeddings"), embeddings))

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool, above: float = -np.inf
    ) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)

        def decoded(start: int, stop: int) -> tuple[Tensor, Tensor]:
            with self.autocast():
                result = self.model(
                    input_points=points[None, start:stop].float(),
                    input_labels=labels[None, start:stop],
                    input_boxes=None if boxes is None else boxes[None, start:stop],
                    multimask_output=several,
                    **self.embeddings,
                )
            iou = result.iou_scores[0].float()
            return result.pred_masks[0].float()[iou > above], iou[iou > above]

        return decoded

    def enlargement(self, height: int, width: int) -> list[tuple[Size, Size]]:
        """As the processors' `post_process_masks` do."""
        first = [(self.square, self.input_size)] if self.padded else []
        return [*first, (self.size, self.size)]


def model_folder(sam_type: str, checkpoint: str | Path | None) -> Path:
    """`checkpoint`, else `sam_type` where that is a folder, else what the Hub or an earlier
    download from it has. UserError where there is none.
    """
    folder = Path(checkpoint or sam_type)
    if folder.is_dir():
        return folder
    if checkpoint is not None:
        raise UserError(
            f"{checkpoint}: no such folder; give the folder of --sam-type {sam_type}"
            " (config.json, preprocessor_config.json, model.safetensors)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(sam_type, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of the network, the Hub or the disk
        raise UserError(
            f"--sam-type {sam_type}: no weights here, and the Hub gave none"
            f" ({str(error).strip().splitlines()[0][:100]}); if https://huggingface.co/{sam_type}"
            " asks for it, accept its licence and log in (hf auth login); or download it elsewhere"
            " and give the folder as --sam-checkpoint"
        ) from None


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
    transformers.utils.logging.set_verbosity_error()  # no notes about loading
    transformers.utils.logging.disable_progress_bar()
    there = {"local_files_only": True}
    try:
        family = transformers.AutoConfig.from_pretrained(folder, **there).model_type
        settings = SETTINGS[family]
        model, report = transformers.AutoModelForMaskGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **there
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **there)
    except Exception as error:  # a folder can be wrong in more ways than errors have names
        raise UserError(
            f"{folder}: {str(error).strip().splitlines()[0][:200]}; give the folder of a model"
            f" of {', '.join(SETTINGS)} as the Hub has it"
        ) from None
    lacking = sorted([*report["missing_keys"], *(row[0] for row in report["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"{folder}: its weights do not fit its config.json ({lacking[0]} and"
            f" {len(lacking) - 1} more are absent or of another shape); download it again"
        )
    sam = TransformersSam(model.eval().to(device), processor, settings=settings, **options)
    sam.files = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return sam
