"""A frozen CLIP as the methods see it, whichever package built it and whatever its towers are."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
import torch.nn as nn

from .errors import UserError
from .tokens import Tokenizer

# Normalisation of OpenAI's weights, and of others in their layout.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 at least, returned in the precision of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Backbone(nn.Module):
    """A frozen CLIP: image encoder f, text encoder g and the temperature.

    Attributes:
        visual: image encoder, (B, 3, H, H) normalised images -> (B, E) features.
        causal_text: whether the text tower is OpenAI's: causal and read at [EOT]. ``text_encoder.py`` then runs its
            parts (positional_embedding, blocks, ln_final, text_projection, n_head) on fewer than ``context_length``
            positions. Otherwise it runs ``text``, the model without its image encoder, as it is.
        token_embedding: ids -> (…, D) embeddings.
        n_features, text_width: E and D.
        logit_scale: log(1/tau), a scalar parameter. SigLIP's logit_bias is the same for all classes: it changes
            neither softmax nor argmax and is left out.
        input_resolution: H, in pixels.
        pixel_mean, pixel_std: of RGB in [0, 1], as in its pre-training.
        context_length: maximum tokens of a prompt, [SOS] and [EOT] included (77 for CLIP).
        tokenizer: :class:`Tokenizer`.

    Args:
        causal: False: run the text tower as it is, whatever it is.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, causal: bool = True) -> None:
        super().__init__()
        self.name, self.tokenizer = name, Tokenizer(tokenizer)
        tower = getattr(model, "text", model)  # CustomTextCLIP and CoCa have it in `text`
        self.visual, self.token_embedding, self.logit_scale = model.visual, _token_embedding(tower), model.logit_scale
        n_tokens, self.text_width = self.token_embedding.weight.shape
        if n_tokens <= self.tokenizer.eot:
            fault = f"its text transformer has {n_tokens} tokens, its tokenizer at least {self.tokenizer.eot + 1}"
            raise UserError(f"MODEL.BACKBONE.NAME {name}: {fault}; choose a model with a config of open_clip")
        projection = getattr(tower, "text_projection", None)
        projection = nn.Parameter(projection.weight.t()) if isinstance(projection, nn.Linear) else projection
        self.n_features = getattr(tower, "output_dim", self.text_width) if projection is None else projection.shape[1]
        self.causal_text = causal and is_causal(tower)
        if self.causal_text:
            self.blocks, self.text_projection = tower.transformer.resblocks, projection
            self.positional_embedding, self.ln_final = tower.positional_embedding, tower.ln_final
            self.context_length, self.n_head = len(tower.positional_embedding), self.blocks[0].attn.num_heads
        else:
            self.text = _without(model, "visual", "text_decoder")
            lengths = getattr(tower, "context_length", 0), self.tokenizer.context_length
            self.context_length = min(filter(None, lengths))  # T5's positions have no limit: 0
        resolution = getattr(self.visual, "input_resolution", None) or self.visual.image_size
        self.input_resolution = int(resolution[0] if isinstance(resolution, (tuple, list)) else resolution)
        self.pixel_mean = tuple(getattr(self.visual, "image_mean", None) or PIXEL_MEAN)
        self.pixel_std = tuple(getattr(self.visual, "image_std", None) or PIXEL_STD)
        for module in self.modules():
            # The packages' own cast differently, and refuse float64; timm has subclasses for images.
            if isinstance(module, nn.LayerNorm) and type(module).__module__.split(".")[0] in PLAIN_NORMS:
                module.__class__ = LayerNorm
        self.visual.to(memory_format=torch.channels_last)  # a quarter less time on a CPU (tiny, float32)
        self.requires_grad_(False)
        self.fingerprint = self._digest()  # of the weights as loaded, whatever precision they are cast to
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: the encoders are frozen, their BatchNorm statistics too."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the text encoder's weights: float32 unless :meth:`cast_weights` changed it."""
        return self.blocks[0].mlp.c_fc.weight.dtype if self.causal_text else self.token_embedding.weight.dtype

    def cast_weights(self, dtype: torch.dtype) -> Backbone:
        """Cast the same weights as OpenAI: convolutions, linear layers, attention, projections; norms stay float32.

        Image encoders of timm, and CoCa's with its attention pool, are cast as a whole, as in open_clip. The text
        encoder stays as it is where its code is not ours, and with bfloat16, which has few digits: gradients go
        through it.
        """
        kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
        text_too = self.causal_text and dtype != torch.bfloat16
        modules = self.modules() if text_too else self.visual.modules()
        cast = [p for module in modules if isinstance(module, kinds) for p in module.parameters(recurse=False)]
        cast += [self.text_projection] if text_too else []
        if hasattr(self.visual, "trunk") or getattr(self.visual, "attn_pool", None) is not None:
            self.visual.to(dtype)
        for parameter in (*cast, getattr(self.visual, "proj", None)):
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.to(dtype)
        return self

    def _digest(self) -> str:
        """A short digest of the weights, from the first values of every tensor, in half precision."""
        hashed = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.state_dict().items()):
            hashed.update(f"{name} {tuple(value.shape)}".encode())
            if not value.is_meta:
                hashed.update(value.flatten()[:16].detach().cpu().half().numpy().tobytes())
        return hashed.hexdigest()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) normalised images -> (B, E) image features, not of unit length (as CLIP's own method)."""
        first = next(m for m in self.visual.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        features = self.visual(image.to(first.weight.dtype))
        features = features[0] if isinstance(features, tuple) else features  # CoCa returns tokens for its decoder too
        return features.float() if features.dtype == torch.bfloat16 else features

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """cos(f(x), g(p_c)) / tau: features (…, E) and (C, E) of unit length -> (…, C), in float32 at least.

        With text features per image, (B, C, E), the image features are (B, 1, E) and the result (B, 1, C).
        """
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        with torch.autocast(image_features.device.type, enabled=False):
            return self.logit_scale.to(dtype).exp() * image_features.to(dtype) @ text_features.to(dtype).mT


PLAIN_NORMS = ("torch", "clip", "open_clip")  # packages whose layer norms are those of :class:`LayerNorm`


def is_causal(tower: nn.Module) -> bool:
    """Whether a text tower is built as OpenAI's: causal, read at [EOT], then projected."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
    projection = getattr(tower, "text_projection", None)
    return (
        len(blocks) > 0
        and all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
        and all(getattr(tower, part, None) is not None for part in ("positional_embedding", "ln_final"))
        and projection is not None
        and getattr(projection, "bias", None) is None
        and getattr(tower, "attn_mask", ...) is not None  # open_clip: None where attention is not causal
        and getattr(tower, "cls_emb", None) is None
        and getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax")) in ("argmax", "eos")
    )


def _token_embedding(tower: nn.Module) -> nn.Module:
    if hasattr(tower, "token_embedding"):
        return tower.token_embedding
    return tower.transformer.get_input_embeddings()  # of Hugging Face


def _without(model: nn.Module, *parts: str) -> nn.Module:
    """The same module without some of its children; the original keeps them."""
    rest = copy.copy(model)
    rest._modules = type(model._modules)((name, m) for name, m in model._modules.items() if name not in parts)
    return rest
