"""A segmenter of the `transformers` package: SAM, SAM-HQ, SAM 2 and 2.1, SAM 3's tracker, EdgeTAM.

    python seco_sam.py … --sam-type facebook/sam2.1-hiera-large
    python seco_sam.py … --sam-type facebook/sam2.1-hiera-large --sam-checkpoint pretrained/sam2.1
    python seco_sam.py … --sam-type pretrained/sam2.1-hiera-large

The first takes the model from the Hugging Face Hub (or from where an earlier download lies), the
others from a local folder with config.json, preprocessor_config.json and model.safetensors. Masks
are those of the package's own processor, pixel by pixel. One thing differs on purpose: for models
whose input is stretched to a square (SAM 2, SAM 3, EdgeTAM) the package's own generator puts the
grid of points of an image that is not square in the wrong places; here it covers the image, as
Meta's generator of SAM 2 does.

Needs when copied away: model/segmenter.py, util/{outputs,run}.py.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.segmenter import SAM_SETTINGS, Decoded, ProposalSettings, Segmenter
from util.run import UserError

# {model_type of config.json: settings of the family's own automatic mask generator}.
# SAM: segment_anything 1.0. SAM-HQ: segment-anything-hq 0.3, the same values. SAM 2 and 2.1: sam2
# 1.1.0. EdgeTAM and SAM 3's tracker, whose decoders are SAM 2's, get SAM 2's values; SAM 3 has no
# generator of its own. All in automatic_mask_generator.py.
SAM2_SETTINGS = ProposalSettings(predicted_iou=0.8)
SETTINGS = {
    "sam": SAM_SETTINGS,
    "sam_hq": SAM_SETTINGS,
    "sam2": SAM2_SETTINGS,
    "sam2_video": SAM2_SETTINGS,
    "edgetam": SAM2_SETTINGS,
    "edgetam_video": SAM2_SETTINGS,
    "sam3_tracker": SAM2_SETTINGS,
    "sam3_video": SAM2_SETTINGS,
}
HUB = "https://huggingface.co/"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/model
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "p*processor_config.json")
PICKLED = ("pytorch_model*.bin*", "config.json", "p*processor_config.json")  # of older folders


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
        """See `Segmenter.encode`. SAM and SAM-HQ pad an image to a square, the others stretch it to
        one.
        """
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
        """See `Segmenter.to_input`."""
        (height, width), (rows, columns) = self.size, self.input_size
        return points * np.array([columns / width, rows / height])

    def decode(
        self, points: Tensor, boxes: Tensor | None, several: bool
    ) -> Callable[[int, int], Decoded]:
        """See `Segmenter.decode`."""
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

    def enlargement(self, height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """See `Segmenter.enlargement`; as the processors' `post_process_masks` do."""
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
    sam_type: str,
    checkpoint: str | Path | None,
    device: torch.device,
    **options,
) -> TransformersSam:
    """See `model.sam.load_segmenter`. Weights are read as float32. options: of `Segmenter`."""
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
    with quiet(transformers.utils.logging):
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


@contextlib.contextmanager
def quiet(logging):
    """transformers' `logging` without notes and bars about loading; errors are raised anyway."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
