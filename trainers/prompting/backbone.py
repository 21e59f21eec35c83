"""One door to CLIP weights.

``load_clip(name)`` accepts ``tiny`` and ``tiny-vit`` (the small CLIPs of ``toy/``), an OpenAI name (``RN50``,
``ViT-B/16``, …), a path to an OpenAI archive or to a state dict in OpenAI's layout (``.pt``, ``.pth``, ``.bin``,
``.safetensors``), and what open_clip knows: ``arch/pretrained-tag``, ``arch`` with a file of weights,
``hf-hub:org/model`` or ``local-dir:FOLDER``.
For OpenAI's layout the model classes come from the installed ``clip`` package (OpenAI's, or the one bundled with CoOp)
when it can be imported, otherwise from ``open_clip``; the features are the same.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .clip_model import Backbone
from .errors import UserError, on_one_line
from .open_clip_models import (
    CONFIG,
    FOLDER,
    SCHEMATA,
    check_model,
    config_of,
    create,
    name_error,
    normalisation_of,
    read_config,
)
from .text_encoder import encode_texts
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
# In pixels; the others' is 224.
RESOLUTIONS = {"tiny": 96, "tiny-vit": 96, "RN50x4": 288, "RN50x16": 384, "RN50x64": 448, "ViT-L/14@336px": 336}
CACHE = os.path.join("~", ".cache", "clip")  # OpenAI's files, for both packages
# The weights of the toy world; a drop-in does not copy them.
TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "toy")
TINY = os.path.join(TOY, "tiny_clip.pt")
TINY_VIT = os.path.join(TOY, "tiny_vit.pt")  # an image encoder for tiny's text encoder
TINIES = {"tiny": TINY, "tiny-vit": TINY_VIT}
PROBE = "a photo of a dog."
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's archives


def load_clip(name: str, provider: str = "auto", quick_gelu: bool = True, weights: str = "") -> Backbone:
    """Load CLIP weights in float32; ``name`` is ``MODEL.BACKBONE.NAME``, see the top of this file.

    The provider is ``"clip"``, ``"open_clip"`` or ``"auto"`` (``clip`` when importable, else ``open_clip``).
    ``quick_gelu`` is the activation of weights given by path, unless an ``open_clip_config.json`` next to them tells.
    ``weights`` is a file for an architecture of open_clip (``MODEL.BACKBONE.WEIGHTS``).
    """
    check_name(name, weights)
    asked = name, provider, quick_gelu, weights
    backbone, source = _load(*asked) if _reused is None else _reused.load(*asked)
    quick = any(type(module).__name__ == "QuickGELU" for module in backbone.modules())
    print(f"Activation: {'QuickGELU' if quick else 'GELU'} ({source})")
    return backbone


def _load(name: str, provider: str, quick_gelu: bool, weights: str) -> tuple[Backbone, str]:
    """The backbone, and what its activation was read from."""
    path = TINIES.get(name) or (_openai_file(name) if name in OPENAI_MODELS else os.path.expanduser(name))
    if not os.path.isfile(path):
        made, source = create(name, os.path.expanduser(weights)), f"open_clip's config of {name}"
        try:
            return probed(*made, name), source
        except (ValueError, RuntimeError, AssertionError, IndexError) as error:
            raise name_error(name, f"does not work as a CLIP ({on_one_line(error)}); choose another model") from error
    backbone, source = _from_state_dict(_read_state_dict(path, name), name, provider), "OpenAI's"
    if name not in (*OPENAI_MODELS, *TINIES):
        folder, source = os.path.dirname(path), "MODEL.BACKBONE.QUICK_GELU"
        if config := read_config(folder):
            quick_gelu, source = config["model_cfg"].get("quick_gelu", False), os.path.join(folder, CONFIG)
        _set_activation(backbone, quick_gelu)
        backbone.pixel_mean, backbone.pixel_std = normalisation_of(config)
    return backbone, source


class ReusedBackbone:
    """The backbone that a process loaded last, of which its further runs get a copy each.

    Building a model draws random numbers. A run that gets a copy continues with the random state that loading would
    have left, which is known where an earlier run started from the same state (the same seed); else it loads.
    """

    def __init__(self) -> None:
        self.asked: Any = None
        self.random_states: dict[bytes, torch.Tensor] = {}  # after loading, by the state before

    def load(self, *asked: Any) -> tuple[Backbone, str]:
        """As :func:`_load`."""
        files = filter(os.path.isfile, map(os.path.expanduser, (asked[0], asked[3])))
        stamps = [(found.st_size, found.st_mtime_ns) for found in map(os.stat, files)]
        before = torch.get_rng_state().numpy().tobytes()
        if self.asked != (asked, stamps):
            self.asked, self.random_states = None, {}
        if before in self.random_states:
            torch.set_rng_state(self.random_states[before])
        else:
            self.backbone, self.source = _load(*asked)
            self.asked, self.random_states[before] = (asked, stamps), torch.get_rng_state()
        # A tokenizer never changes, and takes as long to copy as the weights.
        return copy.deepcopy(self.backbone, {id(self.backbone.tokenizer): self.backbone.tokenizer}), self.source


_reused: Optional[ReusedBackbone] = None


def reuse_backbone() -> None:
    """Load the next run's backbone from memory if it is the last one's, in a process of several runs."""
    global _reused
    _reused = _reused or ReusedBackbone()


def check_name(name: str, weights: str = "") -> None:
    """Raise UserError for a name that denotes no weights, without loading any."""
    path, openai = os.path.expanduser(name), ", ".join(OPENAI_MODELS)
    if not name:
        raise UserError(f"MODEL.BACKBONE.NAME is empty: give one of {openai}, tiny, a path or arch/tag of open_clip")
    if weights and not os.path.isfile(os.path.expanduser(weights)):
        raise UserError(f"MODEL.BACKBONE.WEIGHTS {weights}: no such file")
    own = name in (*TINIES, *OPENAI_MODELS) or os.path.isfile(path)
    if weights and (own or name.startswith(SCHEMATA)):
        raise name_error(name, "has weights of its own; MODEL.BACKBONE.WEIGHTS needs an architecture of open_clip")
    if name in TINIES and not os.path.isfile(TINIES[name]):
        missing = f"toy/{os.path.basename(TINIES[name])}"
        raise name_error(name, f"its weights ({missing}) are not here; choose another backbone")
    if own:
        return
    if path.endswith((".pt", ".pth", ".bin", ".safetensors")) or os.path.isabs(path) or os.path.isdir(path):
        folder = f"; for a folder with {CONFIG} write {FOLDER}{name}" if os.path.isdir(path) else ""
        raise name_error(name, f"no such file{folder}")
    check_model(name, weights, f"tiny, one of {openai}, a file")


def preprocessing(name: str, weights: str = "") -> dict[str, tuple]:
    """The ``INPUT`` keys of a backbone's images, without loading weights: PIXEL_MEAN, PIXEL_STD and, if known, SIZE."""
    path, config, size = os.path.expanduser(name), {}, RESOLUTIONS.get(name, 224)
    if os.path.isfile(path):
        config, size = read_config(os.path.dirname(path)), None
    elif name not in (*OPENAI_MODELS, *TINIES):
        config = config_of(name, os.path.expanduser(weights))
        size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    found = dict(zip(("PIXEL_MEAN", "PIXEL_STD"), normalisation_of(config)))
    return {**found, "SIZE": (size, size) if isinstance(size, int) else tuple(size)} if size else found


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
                fault = f"the clip package cannot be used ({on_one_line(error)})"
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
            fault = f"the clip package in {folder} builds no plain CLIP ({on_one_line(error)})"
            if provider == "clip" or not importlib.util.find_spec("open_clip"):
                raise UserError(f"{fault}: pip install open_clip_torch") from error
        print(f"{fault}; open_clip builds it instead")
        torch.set_rng_state(random)  # both packages draw the same numbers, as CoOp's own runs do
    try:
        return _built("open_clip", "build_model_from_openai_state_dict", state_dict, name)
    except (KeyError, IndexError, AssertionError, ZeroDivisionError, RuntimeError, ValueError) as error:
        raise name_error(name, f"not a CLIP state dict in OpenAI's layout ({on_one_line(error)})") from error


def _built(package: str, build: str, state_dict: dict[str, torch.Tensor], name: str) -> Backbone:
    """Build with one package. Raises ValueError, and what that raises, unless it is the CLIP that we know."""
    # Both builders infer the architecture from the shapes and cast to float16; loading again restores all digits.
    model = getattr(importlib.import_module(f"{package}.model"), build)(dict(state_dict)).float()
    model.load_state_dict(state_dict)
    tokenizer = importlib.import_module({"clip": "clip.simple_tokenizer"}.get(package, f"{package}.tokenizer"))
    backbone = probed(model, tokenizer.SimpleTokenizer(), name)
    if not backbone.causal_text or len(backbone.token_embedding.weight) != backbone.tokenizer.eot + 1:
        raise ValueError("its text encoder is not OpenAI's")
    return backbone


@torch.no_grad()
def probed(model: nn.Module, tokenizer: Any, name: str) -> Backbone:
    """The backbone of a model. A blank image and a few words show that it computes what the model does.

    Where OpenAI's text encoder gives other text features than the model's own code, that code runs. Raises ValueError
    if that does not help either.
    """
    for causal in (True, False):
        backbone = Backbone(model, tokenizer, name, causal)
        ids = torch.tensor([backbone.tokenizer.padded(PROBE, backbone.context_length)])
        image = torch.zeros(1, 3, backbone.input_resolution, backbone.input_resolution)
        expected, found = F.normalize(model.encode_text(ids), dim=-1), encode_texts(backbone, [PROBE])
        shapes = [tuple(features.shape) for features in (backbone.encode_image(image), expected)]
        if shapes != [(1, backbone.n_features)] * 2:
            raise ValueError(f"an image and a text become {shapes[0]} and {shapes[1]}")
        if (found - expected).abs().max() < 1e-4:
            return backbone
    raise ValueError("prompts given as embeddings have other features than its own")


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
        raise name_error(name, f"cannot be read as CLIP weights ({on_one_line(error)})") from error
    state_dict = state_dict if isinstance(state_dict, dict) else {}
    if isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]  # training checkpoints wrap it
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items() if k.split(".")[-1] not in NOT_WEIGHTS}
    if path == TINY_VIT:
        state_dict |= {k: v for k, v in load_tensors(TINY).items() if not k.startswith("visual.")}
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise name_error(name, f"{key} in {path} is not finite; get the file again")
    needed = "visual.conv1.weight token_embedding.weight positional_embedding ln_final.weight text_projection"
    missing = ", ".join(key for key in needed.split() if key not in state_dict)
    if missing:
        raise name_error(name, f"not a CLIP state dict in OpenAI's layout (no {missing} in it)")
    return state_dict


def _set_activation(backbone: Backbone, quick_gelu: bool) -> None:
    """Replace QuickGELU, which both builders use, where the weights were trained with GELU."""
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
        remedy = f"put OpenAI's file into {folder}, or name another file: --backbone FILE, BACKBONE=FILE of a script"
        raise name_error(name, f"the weights cannot be downloaded ({on_one_line(error)}); {remedy}") from error
