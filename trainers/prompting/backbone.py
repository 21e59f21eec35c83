"""One door to CLIP weights.

``load_clip(name)`` accepts ``tiny`` (the small CLIP of ``toy/``), an OpenAI name (``RN50``, ``ViT-B/16``, …), a path to
an OpenAI archive or to a state dict in OpenAI's layout (``.pt``, ``.pth``, ``.bin``, ``.safetensors``), or
``arch/pretrained-tag`` of open_clip. The model classes come from the installed ``clip`` package (OpenAI's, or the one
bundled with CoOp) when it can be imported, otherwise from ``open_clip``; the features are the same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn

from .errors import UserError
from .weights import is_torchscript, load_tensors

# OpenAI's names, open_clip's for the same architectures, and the checksum (SHA-256) of OpenAI's file.
OPENAI_MODELS = {
    "RN50": ("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
# Normalisation of OpenAI's weights, and of others in their layout.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CACHE = os.path.join("~", ".cache", "clip")  # OpenAI's files, for both packages
# The weights of the toy world; a drop-in does not copy them.
TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "toy", "tiny_clip.pt")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's archives


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 at least, returned in the precision of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Backbone(nn.Module):
    """A frozen CLIP: image encoder f, text encoder g and the temperature, from either package.

    Attributes:
        visual: image encoder, (B, 3, H, H) normalised images -> (B, E) features.
        token_embedding, positional_embedding, blocks, ln_final, text_projection, n_head: the text encoder, which
            ``text_encoder.py`` runs on embeddings and on fewer than ``context_length`` positions.
        n_features: E, size of the features; text_width: D, size of the text encoder's embeddings.
        logit_scale: log(1/tau), a scalar parameter.
        input_resolution: H, in pixels.
        pixel_mean, pixel_std: of RGB in [0, 1], as in its pre-training.
        context_length: maximum tokens of a prompt, [SOS] and [EOT] included (77 for CLIP).
        tokenizer: the package's ``SimpleTokenizer``; sot_token, eot_token: ids of [SOS] and [EOT].
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        super().__init__()
        parts = ("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
        blocks = getattr(getattr(model, "transformer", None), "resblocks", nn.ModuleList())
        plain = (
            all(getattr(model, part, None) is not None for part in parts)
            and all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
            and getattr(model, "attn_mask", ...) is not None  # open_clip: None where attention is not causal
            and getattr(model, "text_pool_type", "argmax") == "argmax"
            and model.token_embedding.num_embeddings == len(tokenizer.encoder)
        )
        if not plain:
            remedy = "choose an OpenAI name or an open_clip architecture with one (ViT-B-16, RN50, …)"
            raise _error(name, f"not a CLIP with OpenAI's text transformer; {remedy}")
        self.name, self.tokenizer, self.blocks = name, tokenizer, blocks
        for part in ("visual", "token_embedding", "positional_embedding", "ln_final", "logit_scale"):
            setattr(self, part, getattr(model, part))
        projection = model.text_projection
        self.text_projection = nn.Parameter(projection.weight.t()) if isinstance(projection, nn.Linear) else projection
        # The packages spell the special tokens differently; in both they are the last two of the vocabulary.
        self.sot_token, self.eot_token = len(tokenizer.encoder) - 2, len(tokenizer.encoder) - 1
        resolution = getattr(self.visual, "input_resolution", None) or self.visual.image_size
        self.input_resolution = int(resolution[0] if isinstance(resolution, (tuple, list)) else resolution)
        self.pixel_mean = tuple(getattr(self.visual, "image_mean", None) or PIXEL_MEAN)
        self.pixel_std = tuple(getattr(self.visual, "image_std", None) or PIXEL_STD)
        self.context_length = int(self.positional_embedding.shape[0])
        self.n_head = blocks[0].attn.num_heads
        self.text_width, self.n_features = self.text_projection.shape
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = LayerNorm  # the packages' own cast differently, and refuse float64
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
        return self.blocks[0].mlp.c_fc.weight.dtype

    def cast_weights(self, dtype: torch.dtype) -> Backbone:
        """Cast the same weights as OpenAI: convolutions, linear layers, attention, projections; norms stay float32.

        With bfloat16, which has few digits, the text encoder stays as it is: gradients go through it.
        """
        kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
        modules = self.visual.modules() if dtype == torch.bfloat16 else self.modules()
        cast = [p for module in modules if isinstance(module, kinds) for p in module.parameters(recurse=False)]
        projection = self.text_projection if dtype != torch.bfloat16 else None
        for parameter in (*cast, projection, getattr(self.visual, "proj", None)):
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.to(dtype)
        return self

    def _digest(self) -> str:
        """A short digest of the weights, from the first values of every tensor, in half precision."""
        hashed = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.state_dict().items()):
            hashed.update(f"{name} {tuple(value.shape)}".encode())
            hashed.update(value.flatten()[:16].detach().cpu().half().numpy().tobytes())
        return hashed.hexdigest()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) normalised images -> (B, E) image features, not of unit length (as CLIP's own method)."""
        first = next(m for m in self.visual.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        features = self.visual(image.to(first.weight.dtype))
        return features.float() if features.dtype == torch.bfloat16 else features

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """cos(f(x), g(p_c)) / tau: features (…, E) and (C, E) of unit length -> (…, C), in float32 at least.

        With text features per image, (B, C, E), the image features are (B, 1, E) and the result (B, 1, C).
        """
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        with torch.autocast(image_features.device.type, enabled=False):
            return self.logit_scale.to(dtype).exp() * image_features.to(dtype) @ text_features.to(dtype).mT


def load_clip(name: str, provider: str = "auto", quick_gelu: bool = True) -> Backbone:
    """Load CLIP weights in float32; ``name`` is ``MODEL.BACKBONE.NAME``, see the top of this file.

    The provider is ``"clip"``, ``"open_clip"`` or ``"auto"`` (``clip`` when importable, else ``open_clip``).
    ``quick_gelu`` is the activation of weights given by path, unless an ``open_clip_config.json`` next to them tells.
    """
    check_name(name)
    path = TINY if name == "tiny" else _openai_file(name) if name in OPENAI_MODELS else os.path.expanduser(name)
    if not os.path.isfile(path):
        return _from_open_clip(name)
    backbone = _from_state_dict(_read_state_dict(path, name), name, provider)
    if name not in (*OPENAI_MODELS, "tiny"):
        _set_activation(backbone, path, quick_gelu)
    return backbone


def check_name(name: str) -> None:
    """Raise UserError for a name that denotes no weights, without loading any."""
    openai, path = ", ".join(OPENAI_MODELS), os.path.expanduser(name)
    if not name:
        raise UserError(f"MODEL.BACKBONE.NAME is empty: give one of {openai}, tiny, a path or arch/tag")
    if name == "tiny" and not os.path.isfile(TINY):
        raise _error(name, "its weights (toy/tiny_clip.pt) are not here; choose another backbone")
    if name == "tiny" or name in OPENAI_MODELS or os.path.isfile(path):
        return
    if path.endswith((".pt", ".pth", ".bin", ".safetensors")) or os.path.isabs(path) or os.path.isdir(path):
        raise _error(name, "no such file")
    arch, _, tag = name.partition("/")
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise _error(name, "not an OpenAI name, and open_clip is not installed") from error
    if arch not in open_clip.list_models():
        raise _error(name, f"neither tiny, nor one of {openai}, nor a file, nor arch/pretrained-tag of open_clip")
    if tag not in (known := open_clip.list_pretrained_tags_by_model(arch)):
        raise _error(name, f"open_clip's tags for {arch} are {', '.join(known) or '(none)'}")


def import_provider(provider: str = "auto") -> ModuleType:
    """The package that builds the model: ``clip`` or ``open_clip``.

    A ``clip`` that cannot be imported counts as absent: copies on PyPI fail on today's setuptools, and an unrelated
    package has the same name.
    """
    if provider in ("auto", "clip"):
        try:
            package = importlib.import_module("clip")
            importlib.import_module("clip.model")  # an unrelated `clip` fails here
            importlib.import_module("clip.simple_tokenizer")
            return package
        except Exception as error:  # noqa: BLE001 (anything, from another package)
            if provider == "clip":
                fault = f"the clip package cannot be used ({_line(error)})"
                raise UserError(f"{fault}: pip install open_clip_torch") from error
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError("neither clip nor open_clip can be imported: pip install open_clip_torch") from error


def _from_state_dict(state_dict: dict[str, torch.Tensor], name: str, provider: str) -> Backbone:
    state_dict, package = {key: value.float() for key, value in state_dict.items()}, import_provider(provider)
    if package.__name__ == "clip":
        random = torch.get_rng_state()
        try:
            return _built("clip", "build_model", state_dict, name)
        except Exception as error:  # noqa: BLE001 (code bases derived from CoOp bundle copies that build other models)
            folder = os.path.dirname(str(package.__file__))
            fault = f"the clip package in {folder} builds no plain CLIP ({_line(error)})"
            if provider == "clip" or not importlib.util.find_spec("open_clip"):
                raise UserError(f"{fault}: pip install open_clip_torch") from error
        print(f"{fault}; open_clip builds it instead")
        torch.set_rng_state(random)  # both packages draw the same numbers, as CoOp's own runs do
    try:
        return _built("open_clip", "build_model_from_openai_state_dict", state_dict, name)
    except (KeyError, IndexError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise _error(name, f"not a CLIP state dict in OpenAI's layout ({_line(error)})") from error


def _built(package: str, build: str, state_dict: dict[str, torch.Tensor], name: str) -> Backbone:
    """Build with one package; encode a blank image and a word to see that it is the CLIP that we know."""
    # Both builders infer the architecture from the shapes and cast to float16; loading again restores all digits.
    model = getattr(importlib.import_module(f"{package}.model"), build)(dict(state_dict)).float()
    model.load_state_dict(state_dict)
    tokenizer = importlib.import_module({"clip": "clip.simple_tokenizer"}.get(package, f"{package}.tokenizer"))
    backbone = Backbone(model, tokenizer.SimpleTokenizer(), name)
    word = torch.zeros(1, backbone.context_length, dtype=torch.long)
    word[0, :2] = torch.tensor([backbone.sot_token, backbone.eot_token])
    with torch.no_grad():
        image = torch.zeros(1, 3, backbone.input_resolution, backbone.input_resolution)
        found = [tuple(encode.shape) for encode in (backbone.encode_image(image), model.encode_text(word))]
    if found != [(1, backbone.n_features)] * 2:
        raise ValueError(f"an image and a text become {found[0]} and {found[1]}")
    return backbone


def _read_state_dict(path: str, name: str) -> dict[str, torch.Tensor]:
    """Read safetensors, a torch file of tensors, or one of OpenAI's TorchScript archives."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state_dict = load_file(path)
        elif is_torchscript(path):
            state_dict = _open_published_archive(path)
        else:
            state_dict = load_tensors(path)
    except Exception as error:  # noqa: BLE001 (zip, pickle, safetensors and torch each raise their own errors)
        raise _error(name, f"cannot be read as CLIP weights ({_line(error)})") from error
    state_dict = state_dict if isinstance(state_dict, dict) else {}
    if isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]  # training checkpoints wrap it
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items() if k.split(".")[-1] not in NOT_WEIGHTS}
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise _error(name, f"{key} in {path} is not finite; get the file again")
    needed = "visual.conv1.weight token_embedding.weight positional_embedding ln_final.weight text_projection"
    missing = ", ".join(key for key in needed.split() if key not in state_dict)
    if missing:
        raise _error(name, f"not a CLIP state dict in OpenAI's layout (no {missing} in it)")
    return state_dict


def _set_activation(backbone: Backbone, path: str, quick_gelu: bool) -> None:
    """Replace QuickGELU, which both builders use, where the weights were trained with GELU; report which it is."""
    source, config = "MODEL.BACKBONE.QUICK_GELU", os.path.join(os.path.dirname(path), "open_clip_config.json")
    if os.path.isfile(config):
        try:
            with open(config, encoding="utf-8") as file:
                quick_gelu, source = bool(json.load(file)["model_cfg"].get("quick_gelu", False)), config
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{config}: not a config of open_clip ({_line(error)}); correct or remove it") from error
    print(f"Activation: {'QuickGELU' if quick_gelu else 'GELU'} ({source})")
    for module in [] if quick_gelu else list(backbone.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "QuickGELU":
                setattr(module, name, nn.GELU())


def _open_published_archive(path: str) -> dict[str, torch.Tensor]:
    """Weights of an OpenAI archive. It is a program that torch runs, so its checksum must be a published one."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            hashed.update(chunk)
    if hashed.hexdigest() not in {checksum for _, checksum in OPENAI_MODELS.values()}:
        remedy = "save its state_dict with torch.save instead"
        raise ValueError(f"a TorchScript program whose checksum is none of OpenAI's; {remedy}")
    return torch.jit.load(path, map_location="cpu").state_dict()


def _openai_file(name: str) -> str:
    """Path of OpenAI's file for ``name``; downloaded unless it is cached with the right checksum."""
    folder, package = os.path.expanduser(CACHE), import_provider()
    urls = getattr(importlib.import_module("clip.clip"), "_MODELS", {}) if package.__name__ == "clip" else {}
    try:
        if name in urls:
            return package.clip._download(urls[name], folder)
        from open_clip.pretrained import download_pretrained_from_url, get_pretrained_url

        return download_pretrained_from_url(get_pretrained_url(OPENAI_MODELS[name][0], "openai"), cache_dir=folder)
    except (OSError, RuntimeError, ImportError) as error:
        remedy = f"put OpenAI's file into {folder} or give the path of a file"
        raise _error(name, f"the weights cannot be downloaded ({_line(error)}); {remedy}") from error


def _from_open_clip(name: str) -> Backbone:
    open_clip = importlib.import_module("open_clip")
    arch, _, tag = name.partition("/")
    try:
        model = open_clip.create_model(arch, pretrained=tag, precision="fp32", device="cpu")
    except Exception as error:  # noqa: BLE001 (hub, network and file errors of several libraries)
        raise _error(name, f"open_clip cannot load it ({_line(error)})") from error
    return Backbone(model, open_clip.tokenizer.SimpleTokenizer(), name)


def _error(name: str, fault: str) -> UserError:
    return UserError(f"MODEL.BACKBONE.NAME {name}: {fault}")


def _line(error: BaseException) -> str:
    """An exception of another library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
