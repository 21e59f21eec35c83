"""Small random models of every family of open_clip's architectures: their own configs, shrunk."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from timm.models import _registry
from timm.models.vitamin import VitCfg, VitConvCfg

SIZE = 64  # of their images
TEXT = {"width": 64, "heads": 2, "layers": 2, "vocab_size": 49408, "hf_tokenizer_name": None}
VIT = {"image_size": SIZE, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
IMAGE = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
VITAMIN = VitCfg(
    (16, 32, 64), (1, 1, 1), 16, conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), head_type="1d"
)
# Family: architecture; whether its text tower is on the fast path; what shrinks its image tower (timm: arguments of the
# model, None: it is one of open_clip's), and what its text config needs to go with a tokenizer that is here.
FAMILIES = {
    "ViT": ("ViT-B-16", True, None, {}),
    "quickgelu": ("ViT-B-32-quickgelu", True, None, {}),
    "ResNet": ("RN50", True, None, {}),
    "ConvNeXt": ("convnext_base", True, {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, {}),
    "EVA02": ("EVA02-B-16", True, {**IMAGE, "img_size": SIZE}, {}),
    "MobileCLIP": ("MobileCLIP-B", True, {"depth": 1, "img_size": SIZE}, {}),
    "MobileCLIP2": ("MobileCLIP2-S0", False, {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}, {}),
    "PE-Core": ("PE-Core-T-16-384", True, {**IMAGE, "img_size": SIZE}, {}),
    "ViTamin": ("ViTamin-S", True, {"embed_dim": 64, "num_heads": 2, "embed_cfg": VITAMIN, "img_size": SIZE}, {}),
    "CoCa": ("coca_ViT-B-32", False, None, {}),
    "SigLIP": ("ViT-B-16-SigLIP", False, {**IMAGE, "img_size": SIZE}, {}),
    "SigLIP-i18n": ("ViT-SO400M-16-SigLIP-i18n-256", False, {**IMAGE, "img_size": SIZE}, {}),
    "SigLIP2": ("ViT-B-32-SigLIP2-256", False, {**IMAGE, "img_size": SIZE}, {}),
    "CLIPA": ("ViT-L-14-CLIPA", False, None, {"tokenizer_kwargs": {}}),
    "MetaCLIP worldwide": ("ViT-L-14-worldwide", True, None, {"eos_id": 49407}),
}  # fmt: skip


def small_config(family):
    """The model config of a family, shrunk."""
    arch, _, image, text = FAMILIES[family]
    config = open_clip.get_model_config(arch)
    config["text_cfg"].update({**TEXT, **text})
    config["embed_dim"] = 64
    vision = config["vision_cfg"]
    vision["image_size"] = SIZE
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update({"width": 64, "heads": 2, "layers": 1, "attn_pooler_heads": 2})
        vision["attn_pooler_heads"] = 2
    if image is not None:
        whole = vision["timm_model_name"]
        vision["timm_model_name"] = f"small_{whole}"
        _registry._model_entrypoints[f"small_{whole}"] = lambda **given: timm.create_model(whole, **{**image, **given})
    elif isinstance(vision["layers"], list):
        vision.update(layers=[1, 1, 1, 1], width=16)
    else:
        vision.update(VIT)
    return config


def save_small(family, folder):
    """Save a random model of a family for ``local-dir:`` with weights so large that features differ; returns it."""
    from safetensors.torch import save_model

    config = small_config(family)
    mean = 0.5 if family.startswith("SigLIP") else 0.4
    preprocess = {"mean": [mean] * 3, "std": [0.25] * 3}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "token_embedding" in name or "positional" in name:
                value.normal_()
            elif value.dim() > 1:
                value.normal_(std=1.5 * value[0].numel() ** -0.5)
    save_model(model, str(Path(folder, "open_clip_model.safetensors")))
    return model
