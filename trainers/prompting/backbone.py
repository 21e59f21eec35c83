"""One door to CLIP weights.

``load_clip(name)`` takes ``tiny`` (the small CLIP that comes with the code), an OpenAI name (``RN50``, ``ViT-B/16``,
…), a path to an OpenAI JIT archive, a path to a state dict in OpenAI's layout (``.pt``, ``.pth``, ``.bin``,
``.safetensors``; read as trained with QuickGELU, like OpenAI's) or ``arch/pretrained-tag`` of open_clip, and returns a
:class:`Backbone`. The model classes come from the installed ``clip`` package (OpenAI's, or the one bundled with CoOp)
when it can be imported, otherwise from ``open_clip``; the features are the same.
"""

from __future__ import annotations

import importlib
import inspect
import os
from types import ModuleType
from typing import Optional, Protocol

import torch
import torch.nn as nn

from .errors import UserError
from .inert import is_jit_archive, load_plain, load_script

# OpenAI's names and what open_clip calls the same architectures.
OPENAI_NAMES = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
CACHE = os.path.join("~", ".cache", "clip")  # where both packages keep OpenAI's files
TINY = os.path.join(os.path.abspath(__file__).rsplit(os.sep, 3)[0], "toy", "tiny_clip.pt")  # written by toy/pretrain.py
BOOKKEEPING = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's archives, not weights


class Tokenizer(Protocol):
    """What we need of a byte-pair tokenizer: both packages' ``SimpleTokenizer`` have it."""

    encoder: dict

    def encode(self, text: str) -> list[int]: ...


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 at least, returned in the precision of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Backbone(nn.Module):
    """A frozen CLIP: image encoder f, text encoder g and the temperature, whichever package built it.

    All parameters have ``requires_grad=False`` and the module stays in eval mode for good: ``train()`` does not touch
    it, so BatchNorm statistics never move.

    Attributes:
        visual: image encoder, (B, 3, H, H) normalised images -> (B, D) features, not yet of unit length.
        token_embedding, positional_embedding, blocks, ln_final, text_projection: the text encoder, taken apart so that
            ``text.py`` can run it on embeddings and on fewer than ``context_length`` positions.
        logit_scale: log(1/tau), a scalar parameter.
        input_resolution: H, in pixels.
        context_length: longest prompt in tokens, [SOS] and [EOT] included (77 for CLIP).
        n_head: attention heads of the text encoder.
        tokenizer: see :class:`Tokenizer`; sot_token, eot_token: ids of [SOS] and [EOT].
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, name: str) -> None:
        super().__init__()
        parts = [
            getattr(model, part, None)
            for part in (
                "visual",
                "transformer",
                "token_embedding",
                "positional_embedding",
                "ln_final",
                "text_projection",
            )
        ]
        plain = (
            all(part is not None for part in parts)
            and all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in _blocks(model))
            and getattr(model, "attn_mask", ...) is not None  # open_clip: None where attention is not causal
            and getattr(model, "text_pool_type", "argmax") == "argmax"
            and model.token_embedding.num_embeddings == len(tokenizer.encoder)
        )
        if not plain:
            raise UserError(
                f"MODEL.BACKBONE.NAME {name}: not a CLIP with OpenAI's text transformer; "
                "choose an OpenAI name or an open_clip architecture of that kind (ViT-B-16, RN50, …)"
            )
        self.name = name
        self.visual = model.visual
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.blocks = _blocks(model)
        self.ln_final = model.ln_final
        projection = model.text_projection
        self.text_projection = nn.Parameter(projection.weight.t()) if isinstance(projection, nn.Linear) else projection
        self.logit_scale = model.logit_scale
        self.tokenizer = tokenizer
        # The two packages spell the special tokens differently; in both they close the vocabulary.
        self.sot_token, self.eot_token = len(tokenizer.encoder) - 2, len(tokenizer.encoder) - 1
        resolution = getattr(self.visual, "input_resolution", None) or self.visual.image_size
        self.input_resolution = int(resolution[0] if isinstance(resolution, (tuple, list)) else resolution)
        self.context_length = int(self.positional_embedding.shape[0])
        self.n_head = self.blocks[0].attn.num_heads
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = LayerNorm  # the packages' own differ in what they cast, and refuse float64
        self.visual.to(memory_format=torch.channels_last)  # a quarter less time on a CPU (tiny, float32)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: the encoders are frozen, their BatchNorm statistics too."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the encoders' weights: float32, or float16 after :meth:`half_weights`."""
        return self.blocks[0].mlp.c_fc.weight.dtype

    def half_weights(self) -> Backbone:
        """Cast what OpenAI casts: convolutions, linear layers, attention and projections; norms stay float32."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.half()
        for owner, attribute in ((self, "text_projection"), (self.visual, "proj")):
            parameter = getattr(owner, attribute, None)
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.half()
        return self

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) normalised images -> (B, D) image features of unit length."""
        return nn.functional.normalize(self.visual(image.to(self.dtype)), dim=-1)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """cos(f(x), g(p_c)) / tau: features (…, E) and (C, E) of unit length -> (…, C), in float32 at least.

        With text features of each image's own, (B, C, E), the image features are (B, 1, E) and the result (B, 1, C).
        """
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        with torch.autocast(image_features.device.type, enabled=False):
            return self.logit_scale.to(dtype).exp() * image_features.to(dtype) @ text_features.to(dtype).mT


def load_clip(name: str, provider: str = "auto") -> Backbone:
    """Load CLIP weights in float32.

    Args:
        name: ``MODEL.BACKBONE.NAME``, see the top of this file.
        provider: ``"clip"``, ``"open_clip"`` or ``"auto"`` (``clip`` when importable, else ``open_clip``).

    Raises:
        UserError: unknown name, missing or unreadable file, another architecture, no network, no package.
    """
    check_name(name)
    path = TINY if name == "tiny" else os.path.expanduser(name)
    if name in OPENAI_NAMES:
        return _from_state_dict(_read_state_dict(_openai_file(name), name), name, provider)
    if os.path.isfile(path):
        return _from_state_dict(_read_state_dict(path, name), name, provider)
    return _from_open_clip(name)


def check_name(name: str) -> None:
    """Refuse a name that stands for no weights, without loading any. Raises UserError."""
    if not name:
        raise UserError(
            f"MODEL.BACKBONE.NAME is empty: give one of {', '.join(OPENAI_NAMES)}, tiny, a path or arch/tag"
        )
    path = TINY if name == "tiny" else os.path.expanduser(name)
    if name in OPENAI_NAMES or os.path.isfile(path):
        return
    if name == "tiny":
        raise UserError(f"MODEL.BACKBONE.NAME tiny: no such file, {path}; copy it from LoGoPrompt's toy/")
    if path.endswith((".pt", ".pth", ".bin", ".safetensors")) or os.path.isabs(path) or os.path.isdir(path):
        raise UserError(f"MODEL.BACKBONE.NAME {name}: no such file")
    arch, _, tag = name.partition("/")
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError(f"MODEL.BACKBONE.NAME {name}: not an OpenAI name, and open_clip is not installed") from error
    known = open_clip.list_pretrained_tags_by_model(arch) if arch in open_clip.list_models() else None
    if known is None:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: neither tiny, nor one of {', '.join(OPENAI_NAMES)}, nor a file, "
            "nor arch/pretrained-tag of open_clip"
        )
    if tag not in known:
        raise UserError(f"MODEL.BACKBONE.NAME {name}: open_clip's tags for {arch} are {', '.join(known) or '(none)'}")


def _blocks(model: nn.Module) -> nn.ModuleList:
    return (
        getattr(model.transformer, "resblocks", nn.ModuleList()) if hasattr(model, "transformer") else nn.ModuleList()
    )


def import_provider(provider: str = "auto") -> ModuleType:
    """The package that builds the model: ``clip`` (with ``clip.model.build_model``) or ``open_clip``.

    Broken installations count as absent: the copies of ``clip`` on PyPI do not import on today's setuptools, an
    unrelated package carries the same name, and code bases built on CoOp bundle copies that build other models.
    """
    if provider in ("auto", "clip"):
        try:
            package = importlib.import_module("clip")
            build = importlib.import_module("clip.model").build_model  # an unrelated `clip` fails here
            inspect.signature(build).bind({})  # one that another method changed (MaPLe's wants its design) fails here
            importlib.import_module("clip.simple_tokenizer")
            return package
        except Exception as error:  # noqa: BLE001 (whatever a foreign package raises while it is imported)
            if provider == "clip":
                raise UserError(
                    f"the clip package cannot be used ({_line(error)}): pip install open_clip_torch"
                ) from error
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError("neither clip nor open_clip can be imported: pip install open_clip_torch") from error


def _tokenizer(package: ModuleType) -> Tokenizer:
    module = importlib.import_module("clip.simple_tokenizer" if package.__name__ == "clip" else "open_clip.tokenizer")
    return module.SimpleTokenizer()


def _from_state_dict(state_dict: dict[str, torch.Tensor], name: str, provider: str) -> Backbone:
    package = import_provider(provider)
    state_dict = {key: value.float() for key, value in state_dict.items() if key.split(".")[-1] not in BOOKKEEPING}
    if package.__name__ == "clip":
        build = importlib.import_module("clip.model").build_model
    else:
        build = importlib.import_module("open_clip.model").build_model_from_openai_state_dict
    try:
        # Both builders read the architecture off the shapes, then cast to float16; load once more to keep all digits.
        model = build(dict(state_dict)).float()
        model.load_state_dict(state_dict)
    except (KeyError, IndexError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: not a CLIP state dict in OpenAI's layout ({_line(error)})"
        ) from error
    return Backbone(model, _tokenizer(package), name)


def _read_state_dict(path: str, name: str) -> dict[str, torch.Tensor]:
    """Read a JIT archive, a torch file (never executing anything in it) or safetensors."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state_dict = load_file(path)
        elif is_jit_archive(path):
            state_dict = load_script(path)
        else:
            state_dict = load_plain(path)
    except Exception as error:  # noqa: BLE001 (zip, pickle, safetensors and torch each have errors of their own)
        raise UserError(f"MODEL.BACKBONE.NAME {name}: cannot be read as CLIP weights ({_line(error)})") from error
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]  # training checkpoints wrap it
    if isinstance(state_dict, dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    needed = (
        "visual.conv1.weight",
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "text_projection",
    )
    missing = [key for key in needed if not isinstance(state_dict, dict) or key not in state_dict]
    if missing:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: not a CLIP state dict in OpenAI's layout (no {', '.join(missing)} in it)"
        )
    return state_dict


def _openai_file(name: str) -> str:
    """Path of OpenAI's file for ``name``; downloaded unless the cache has it whole, by its checksum."""
    folder = os.path.expanduser(CACHE)
    package = import_provider()
    urls = getattr(importlib.import_module("clip.clip"), "_MODELS", {}) if package.__name__ == "clip" else {}
    try:
        if name in urls:
            return package.clip._download(urls[name], folder)
        from open_clip.pretrained import download_pretrained_from_url, get_pretrained_url

        return download_pretrained_from_url(get_pretrained_url(OPENAI_NAMES[name], "openai"), cache_dir=folder)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: the weights cannot be downloaded ({_line(error)}); "
            f"put OpenAI's file into {folder} or give the path of a file"
        ) from error


def _from_open_clip(name: str) -> Backbone:
    open_clip = importlib.import_module("open_clip")
    arch, _, tag = name.partition("/")
    try:
        model = open_clip.create_model(arch, pretrained=tag, precision="fp32", device="cpu")
    except Exception as error:  # noqa: BLE001 (hub, network and file errors of several libraries)
        raise UserError(f"MODEL.BACKBONE.NAME {name}: open_clip cannot load it ({_line(error)})") from error
    return Backbone(model, open_clip.tokenizer.SimpleTokenizer(), name)


def _line(error: Optional[BaseException]) -> str:
    """The gist of a foreign exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
