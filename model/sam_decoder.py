"""SAM's mask decoder with less work: the same numbers from the same parameters.

Projections of the many image tokens are moved to the side of the few prompt tokens, and transposed
convolutions of kernel and stride 2 become linear layers per token. Axis letters: B images, K
prompts, T prompt tokens, N image tokens, C channels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend_to_image(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tokens q [B, K, T, C] to the image's k, v [B, K or 1, N, C], with SAM's
    `Attention` parameters.

    The key projection is applied to the queries and the value projection to the result; the key
    bias shifts all scores of a query alike and cancels in the softmax.
    """
    b, n_prompts, t, c = q.shape
    heads, width = attention.num_heads, attention.internal_dim // attention.num_heads
    q = attention.q_proj(q).unflatten(-1, (heads, width)).transpose(2, 3)  # [B, K, heads, T, width]
    q = q @ attention.k_proj.weight.view(heads, width, c) / math.sqrt(width)  # [B, K, heads, T, C]
    q = q.reshape(b, k.shape[1], -1, c)  # one image side for all prompts: one product
    attn = torch.softmax(q @ k.transpose(2, 3), dim=-1)
    out = (attn @ v).view(b, n_prompts, heads, t, c)
    out = out @ attention.v_proj.weight.view(heads, width, c).transpose(
        1, 2
    )  # [B, K, heads, T, width]
    return attention.out_proj(out.transpose(2, 3).flatten(3) + attention.v_proj.bias)


def attend_to_tokens(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, residual: Tensor
) -> Tensor:
    """residual + attention of the image's q [B, K or 1, N, C] to the tokens k, v [B, K, T, C]: [B,
    K, N, C].

    Softmax weights of a head add up to one, so the output bias is spread over the values.
    """
    b, n_prompts, t, c = k.shape
    heads, width = attention.num_heads, attention.internal_dim // attention.num_heads
    k = attention.k_proj(k).unflatten(-1, (heads, width)).transpose(2, 3) / math.sqrt(width)
    bias = (k * attention.q_proj.bias.view(heads, 1, width)).sum(dim=-1)  # [B, K, heads, T]
    k = k @ attention.q_proj.weight.view(heads, width, c)  # [B, K, heads, T, C]
    scores = k.reshape(b, q.shape[1], -1, c) @ q.transpose(
        2, 3
    )  # one image side for all prompts: one product
    scores = scores.view(b, n_prompts, heads, t, -1) + bias[..., None]
    attn = torch.softmax(scores, dim=3).flatten(0, 1).flatten(1, 2)  # [B*K, heads*T, N]
    v = attention.v_proj(v).unflatten(-1, (heads, width)).transpose(2, 3)
    v = (
        v @ attention.out_proj.weight.view(c, heads, width).permute(1, 2, 0)
        + attention.out_proj.bias / heads
    )
    v, residual = (
        v.flatten(0, 1).flatten(1, 2),
        residual.expand(-1, n_prompts, -1, -1).flatten(0, 1),
    )
    return torch.baddbmm(residual.to(v.dtype), attn.transpose(1, 2).to(v.dtype), v).unflatten(
        0, (b, n_prompts)
    )


def conv_transpose_per_token(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 as a linear layer: [..., C_in] to [..., 4,
    C_out], the four pixels of the 2x2 cell in row-major order.
    """
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4 * C_out, C_in]
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (4, conv.out_channels))


@lru_cache(maxsize=16)
def pixel_order(h: int, w: int, device: torch.device) -> Tensor:
    """For every pixel of 4h x 4w, in raster order, its place in token order, int64 (see
    `tokens_to_pixels`).
    """
    with torch.inference_mode(False):  # training may want it too
        places = torch.arange(h * w * 16, device=device).view(h, w, 2, 2, 2, 2)
        return places.permute(0, 2, 4, 1, 3, 5).flatten()


def tokens_to_pixels(x: Tensor, h: int, w: int) -> Tensor:
    """[..., h*w*16] in token order (token row, token column, half row, half column, quarter row,
    quarter column) to [..., 4h, 4w].
    """
    # Several times faster than a permuted copy, whose innermost runs are two numbers long.
    return x.gather(-1, pixel_order(h, w, x.device).expand(x.shape)).unflatten(-1, (4 * h, 4 * w))


def pixels_to_tokens(x: Tensor) -> Tensor:
    """[..., 4h, 4w] to [..., h*w*16]: the inverse of `tokens_to_pixels`."""
    lead, (height, width) = x.shape[:-2], x.shape[-2:]
    x = x.reshape(-1, height // 4, 2, 2, width // 4, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(*lead, height * width)
