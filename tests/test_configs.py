"""Configs are what their names say: backbone[size][_c<M>][_ep<epochs>][_batch<B>][_ctxv1], as in CoOp and CoCoOp.

Without epochs 200, without a batch size 32.
"""

import re

import pytest
from conftest import ROOT

import train

FILES = sorted((ROOT / "configs" / "trainers").glob("*/*.yaml"))
BACKBONES = {
    "vit_b16": ("ViT-B/16", 224),
    "rn50": ("RN50", 224),
    "tiny96": ("tiny", 96),
    "photo64": ("photo_clip.pt", 64),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_name_and_content_agree(path):
    name = re.fullmatch(
        r"(?P<backbone>[a-z0-9_]+?)(_c(?P<n_ctx>\d+))?(_ep(?P<epochs>\d+))?(_batch(?P<batch>\d+))?(?P<words>_ctxv1)?",
        path.stem,
    )
    trainer = path.parent.name
    cfg = train.setup_cfg(
        train.parse_args(["--config-file", str(path), "--trainer", trainer, "DATASET.NAME", "Shapes"])
    )
    backbone, size = BACKBONES[name["backbone"]]
    assert cfg.MODEL.BACKBONE.NAME.endswith(backbone) and tuple(cfg.INPUT.SIZE) == (size, size)
    assert int(name["epochs"] or 200) == cfg.OPTIM.MAX_EPOCH
    method = cfg.TRAINER[trainer.upper()]
    if name["words"]:
        assert method.CTX_INIT == "a photo of a"  # M = 4
    else:
        assert method.CTX_INIT == "" and int(name["n_ctx"] or 16) == method.N_CTX
    assert int(name["batch"] or 32) == cfg.DATALOADER.TRAIN_X.BATCH_SIZE
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR_SCHEDULER) == ("sgd", "cosine")


def test_every_method_has_the_same_settings_to_choose_from():
    names = {
        trainer: {path.stem for path in FILES if path.parent.name == trainer} for trainer in ("CoOp", "LoGoPrompt")
    }
    assert names["CoOp"] == names["LoGoPrompt"]
