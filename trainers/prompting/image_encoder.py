"""Vision transformers with further tokens in the input of their blocks (VPT, DPT); the encoder runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Optional

import torch
import torch.nn as nn

from .backbone import Backbone
from .errors import UserError

Tokens = Callable[[int, torch.Tensor], Optional[torch.Tensor]]


def vision_blocks(backbone: Backbone, trainer: str) -> nn.ModuleList:
    """The blocks of CLIP's vision transformer. Raises UserError for towers without such blocks (ResNets, timm's)."""
    blocks = getattr(getattr(backbone.visual, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(backbone.visual, "class_embedding"):
        fault = f"{trainer} adds tokens to a vision transformer of CLIP's kind, and {backbone.name} has none"
        raise UserError(f"{fault}; choose ViT-B/16, ViT-B/32 or ViT-L/14 (MODEL.BACKBONE.NAME)")
    return blocks


def vision_width(backbone: Backbone) -> int:
    """D, the size of the tokens of a vision transformer."""
    return backbone.visual.class_embedding.shape[-1]


def encode_with_tokens(backbone: Backbone, pixels: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(B, 3, H, H) -> (B, E) features as the encoder returns them, with a graph.

    ``tokens(i, x)`` receives the input of block i, (B, 1 + N, D) [CLS] and patches, and returns (n, D) or (B, n, D)
    tokens to append, which are dropped behind the block, or None.
    """
    transformer = backbone.visual.transformer
    length = 1 if getattr(transformer, "batch_first", False) else 0  # dimension of the tokens; OpenAI's: the first

    def swap(x: torch.Tensor) -> torch.Tensor:
        return x if length == 1 else x.transpose(0, 1)

    with ExitStack() as stack:
        for i, block in enumerate(transformer.resblocks):
            kept: list[int] = []  # number of tokens to keep behind this block

            def append(_, inputs, i=i, kept=kept):  # noqa: ANN001, ANN202 (torch's hook)
                x = swap(inputs[0])
                if (more := tokens(i, x)) is None:
                    return None
                kept[:] = [x.shape[1]]
                more = more.to(x.dtype).expand(len(x), -1, -1)
                return (swap(torch.cat([x, more], dim=1)), *inputs[1:])

            def drop(_, inputs, output, kept=kept):  # noqa: ANN001, ANN202
                return output.narrow(length, 0, kept.pop()) if kept else output

            stack.callback(block.register_forward_pre_hook(append).remove)
            stack.callback(block.register_forward_hook(drop).remove)
        return backbone.encode_image(pixels)
