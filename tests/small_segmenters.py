"""Segmenters of every architecture with random weights and few channels, for the tests.

Images have 64 pixels on their longest side, models take SIDE.
"""

from __future__ import annotations

import warnings

import torch
import transformers as t
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

with warnings.catch_warnings():  # names that timm has already are registered again
    warnings.simplefilter("ignore")
    import mobile_sam
    from mobile_sam.modeling.tiny_vit_sam import TinyViT

SIDE, WIDTH = 96, 32  # pixels of the networks' input; channels
NORM = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
VIT = {  # of transformers' vision transformers
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 4,
    "global_attn_indexes": [1],
}


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size at which prompts matter, predicted IoUs near 0.5; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if "embed" not in name else 4
                parameter.normal_(0, 1.5 * fan_in**-0.5, generator=generator)
        for name, parameter in model.mask_decoder.named_parameters():  # logits on both sides of 0
            if "hypernetworks_mlps" in name and ("proj_out" in name or ".layers.2." in name):
                parameter.sub_(parameter.mean(dim=0))
        head = model.mask_decoder.iou_prediction_head
        last = head.proj_out if hasattr(head, "proj_out") else head.layers[-1]
        last.weight.mul_(0.3)
        last.bias.fill_(0.5)
    return model.eval()


# ------------------------------------------------------------------- segment_anything, mobile_sam


def small_sam() -> Sam:
    """segment_anything's `Sam` with an image encoder of two blocks."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=SIDE,
        patch_size=16,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        out_chans=WIDTH,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE,) * 2, 16)
    transformer, head = TwoWayTransformer(2, WIDTH, 2, 64), {"iou_head_hidden_dim": WIDTH}
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, **head)
    return stirred(Sam(encoder, prompts, decoder, **NORM))


def small_mobile_sam() -> Sam:
    """mobile_sam's `Sam` with its own parts: a narrow TinyViT. Its input of 1024 pixels, its last
    stage of 320 channels and its output of 256 cannot be changed.
    """
    torch.manual_seed(0)
    encoder = TinyViT(
        img_size=1024,
        num_classes=1,
        embed_dims=[8, 8, 16, 320],
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 5],
        mlp_ratio=1.0,
        window_sizes=[8, 8, 8, 8],
    )
    prompts = mobile_sam.modeling.PromptEncoder(256, (64, 64), (1024, 1024), 16)
    transformer, head = (
        mobile_sam.modeling.TwoWayTransformer(1, 256, 2, 64),
        {"iou_head_hidden_dim": WIDTH},
    )
    decoder = mobile_sam.modeling.MaskDecoder(transformer_dim=256, transformer=transformer, **head)
    return stirred(mobile_sam.modeling.Sam(encoder, prompts, decoder, **NORM))


# ----------------------------------------------------------------------------------- transformers


def prompts_and_decoder(prefix: str, **sizes) -> dict:
    """Configurations of the two parts that all families share."""
    prompt = getattr(t, f"{prefix}PromptEncoderConfig")
    decoder = getattr(t, f"{prefix}MaskDecoderConfig")
    how = {"mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": WIDTH}
    how |= {"vit_dim": WIDTH} if prefix == "SamHQ" else {}
    return {
        "prompt_encoder_config": prompt(hidden_size=WIDTH, **sizes),
        "mask_decoder_config": decoder(hidden_size=WIDTH, **how),
    }


def padded(prefix: str):
    """SAM or SAM-HQ of the sizes of `small_sam`."""
    sizes, widths = {"image_size": SIDE, "patch_size": 16}, {"output_channels": WIDTH}
    widths |= {"mlp_dim": 4 * WIDTH, "num_pos_feats": WIDTH // 2}
    vision = getattr(t, f"{prefix}VisionConfig")(**VIT, **sizes, **widths)
    parts = prompts_and_decoder(prefix, **sizes)
    config = getattr(t, f"{prefix}Config")(vision_config=vision, **parts)
    square = {"height": SIDE, "width": SIDE}
    processor = t.SamImageProcessor(size={"longest_edge": SIDE}, pad_size=square)
    return getattr(t, f"{prefix}Model")(config), processor


def sam2_vision(side: int = SIDE):
    backbone = t.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[side, side],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    return t.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[side // n] * 2 for n in (4, 8, 16)],
        fpn_hidden_size=WIDTH,
    )


def square_processor(kind: str, side: int = SIDE):
    return getattr(t, f"{kind}ImageProcessor")(size={"height": side, "width": side})


def sam2():
    parts = prompts_and_decoder("Sam2", image_size=SIDE)
    return t.Sam2Model(t.Sam2Config(vision_config=sam2_vision(), **parts)), square_processor("Sam2")


def sam3_vision(side: int):
    sizes = {"intermediate_size": 64, "image_size": side, "pretrain_image_size": 56}
    backbone = t.Sam3ViTConfig(**VIT, **sizes)
    return t.Sam3VisionConfig(
        backbone_config=backbone,
        fpn_hidden_size=WIDTH,
        backbone_feature_sizes=[[side * n // 14] * 2 for n in (4, 2, 1)],
    )


def sam3():
    side = 84
    parts = prompts_and_decoder("Sam3Tracker", image_size=side, patch_size=14)
    config = t.Sam3TrackerConfig(vision_config=sam3_vision(side), **parts)
    return t.Sam3TrackerModel(config), square_processor("Sam3", side)


def edgetam():
    backbone = t.TimmWrapperConfig(
        architecture="repvit_m1",
        model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    )
    vision = t.EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_feature_sizes=[[SIDE // n] * 2 for n in (4, 8, 16)],
        fpn_hidden_size=WIDTH,
    )
    parts = prompts_and_decoder("EdgeTam", image_size=SIDE)
    return t.EdgeTamModel(t.EdgeTamConfig(vision_config=vision, **parts)), square_processor("Sam2")


# {family: what makes a model and its image processor}
FAMILIES = {
    "sam": lambda: padded("Sam"),
    "sam_hq": lambda: padded("SamHQ"),
    "sam2": sam2,
    "sam3_tracker": sam3,
    "edgetam": edgetam,
}
# The package's processors, whose masks the tests compare with.
PROCESSORS = {
    "sam": t.SamProcessor,
    "sam_hq": t.SamHQProcessor,
    "sam2": t.Sam2Processor,
    "sam3_tracker": t.Sam3TrackerProcessor,
    "edgetam": t.Sam2Processor,
}
