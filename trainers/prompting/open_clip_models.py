"""Models of open_clip, by architecture and tag, from the hub or from a folder: configs, weights and tokenizers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from difflib import get_close_matches
from glob import escape, glob
from typing import Any, Optional

import torch
import torch.nn as nn

from .clip_model import PIXEL_MEAN, PIXEL_STD
from .errors import UserError, on_one_line
from .weights import refuse_programs

HUB, FOLDER = SCHEMATA = ("hf-hub:", "local-dir:")  # open_clip's
CONFIG = "open_clip_config.json"  # next to weights: architecture, activation and normalisation


def name_error(name: str, fault: str) -> UserError:
    return UserError(f"MODEL.BACKBONE.NAME {name}: {fault}")


def read_config(folder: str) -> dict[str, Any]:
    """``model_cfg`` and ``preprocess_cfg`` of the ``open_clip_config.json`` in a folder; empty if there is none."""
    path = os.path.join(os.path.expanduser(folder), CONFIG)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        return {"preprocess_cfg": dict(config.get("preprocess_cfg", {})), "model_cfg": dict(config["model_cfg"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a config of open_clip ({on_one_line(error)}); correct or remove it") from error


def config_of(name: str, weights: str = "") -> dict[str, Any]:
    """``model_cfg`` and ``preprocess_cfg`` of a model, without loading weights. Raises UserError."""
    open_clip = importlib.import_module("open_clip")
    if name.startswith(FOLDER):
        if config := read_config(name[len(FOLDER) :]):
            return config
        raise name_error(name, f"no {CONFIG} in this folder; put the model's there, next to its weights")
    if name.startswith(HUB):
        try:
            return read_config(os.path.dirname(_download(name, CONFIG)))
        except (OSError, RuntimeError) as error:
            remedy = f"put its {CONFIG} and weights into a folder and give {FOLDER}FOLDER"
            raise name_error(name, f"cannot be downloaded ({on_one_line(error)}); {remedy}") from error
    if weights and (config := read_config(os.path.dirname(weights))):
        return config
    arch, _, tag = name.partition("/")
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(arch)
    published, model = [open_clip.get_pretrained_cfg(arch, tag) for tag in tags], open_clip.get_model_config(arch)
    # Weights of one's own have the normalisation of the published ones, if these agree.
    agree = len({(p.get("mean"), p.get("std")) for p in published}) == 1
    if tag and published[0].get("quick_gelu"):
        model["quick_gelu"] = True  # open_clip itself only warns
    return {"model_cfg": model, "preprocess_cfg": published[0] if agree else {}}


def check_model(name: str, weights: str, others: str) -> None:
    """Raise UserError for what open_clip cannot load here, without loading any weights; ``others`` are other names."""
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise name_error(name, "not an OpenAI name, and open_clip is not installed") from error
    if not hasattr(open_clip.factory, "parse_model_name"):
        raise name_error(name, "needs open_clip 3: pip install 'open_clip_torch>=3.0'")
    arch, _, tag = name.partition("/")
    if not name.startswith(SCHEMATA):
        if arch not in open_clip.list_models():
            raise name_error(name, f"neither {others}, arch/tag of open_clip, {HUB}org/model nor {FOLDER}FOLDER")
        known = ", ".join(tags := open_clip.list_pretrained_tags_by_model(arch)) or "(none)"
        if weights and tag:
            raise name_error(name, f"with MODEL.BACKBONE.WEIGHTS give {arch} without a tag")
        if not weights and tag not in tags:
            raise name_error(name, f"open_clip's tags for {arch} are {known}; or give a file, MODEL.BACKBONE.WEIGHTS")
    model = config_of(name, weights)["model_cfg"]
    text = model.get("text_cfg", {})
    from_hub = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if from_hub and not importlib.util.find_spec("transformers"):
        part = "text tower" if text.get("hf_model_name") else "tokenizer"
        remedy = f"pip install transformers sentencepiece; {nearest(arch, model['vision_cfg'])} works without"
        raise name_error(name, f"its {part} ({from_hub}) needs transformers: {remedy}")


def nearest(name: str, vision: dict[str, Any]) -> str:
    """A published architecture with the same image tower, or a similar name, that needs no further package."""
    open_clip = importlib.import_module("open_clip")
    configs = {a: open_clip.get_model_config(a) for a in open_clip.list_models()}
    own = [a for a, c in configs.items() if not {"hf_model_name", "hf_tokenizer_name"} & c["text_cfg"].keys()]
    own = [a for a in own if open_clip.list_pretrained_tags_by_model(a)]
    return get_close_matches(name, [a for a in own if configs[a]["vision_cfg"] == vision] or own, 1, 0)[0]


def normalisation_of(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1]; OpenAI's unless a config tells."""
    given = config.get("preprocess_cfg", {})
    return tuple(given.get("mean") or PIXEL_MEAN), tuple(given.get("std") or PIXEL_STD)


def create(name: str, weights: str = "") -> tuple[nn.Module, Any]:
    """A model with its weights in float32, and its tokenizer. Raises UserError."""
    open_clip, config = importlib.import_module("open_clip"), config_of(name, weights)
    arch, tag = (name, "") if name.startswith(SCHEMATA) else name.partition("/")[::2]
    if name.startswith(FOLDER):
        arch = FOLDER + os.path.expanduser(name[len(FOLDER) :])
    quick = bool(config["model_cfg"].get("quick_gelu"))
    try:
        for path in _files(arch, weights):
            refuse_programs(path)
        model = open_clip.create_model(
            arch,
            pretrained=tag or weights or None,
            require_pretrained=True,
            force_preprocess_cfg=dict(zip(("mean", "std"), normalisation_of(config))),
            force_quick_gelu=quick,
            quick_gelu=quick,
        )
    except Exception as error:  # noqa: BLE001 (hub, network and file errors of several libraries)
        raise name_error(name, f"open_clip cannot load it ({on_one_line(error)})") from error
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise name_error(name, f"{key} is not finite; get its weights again")
    try:
        return model, open_clip.get_tokenizer(arch)
    except Exception as error:  # noqa: BLE001 (as above)
        source = config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        remedy = f"put those of huggingface.co/{source}, {CONFIG} and the weights into a folder: {FOLDER}FOLDER"
        raise name_error(name, f"cannot load the files of its tokenizer ({on_one_line(error)}); {remedy}") from error


def _files(arch: str, weights: str) -> list[str]:
    """Files that open_clip may unpickle."""
    if arch.startswith(HUB):
        return [_download(arch)]
    if not arch.startswith(FOLDER):
        return [weights] if weights else []
    folder = escape(arch[len(FOLDER) :])
    safe, *pickles = (glob(os.path.join(folder, f"*.{kind}")) for kind in ("safetensors", "bin", "pth"))
    return [] if safe else sum(pickles, [])


def _download(name: str, filename: Optional[str] = None) -> str:
    """Path of a file of ``hf-hub:org/model`` in the cache; default: its weights."""
    pretrained = importlib.import_module("open_clip.pretrained")
    return pretrained.download_pretrained_from_hf(name[len(HUB) :], filename=filename)
