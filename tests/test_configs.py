"""Configs are what their names say: backbone[size][_c<M>][_ep<epochs>][_batch<B>][_ctxv1], as in CoOp and CoCoOp.

Without epochs 200, without a batch size 32.
"""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from dassl.config import get_cfg_default

import train

FILES = sorted((ROOT / "configs" / "trainers").glob("*/*.yaml"))
BACKBONES = {
    "vit_b16": ("ViT-B/16", 224),
    "vit_b32": ("ViT-B/32", 224),
    "rn50": ("RN50", 224),
    "rn101": ("RN101", 224),
    "tiny96": ("tiny", 96),
    "photo64": ("photo_clip.pt", 64),
}


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.stem != "rn50_val"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_name_and_content_agree(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photo_clip.pt").touch()  # a file that some name
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


def names(trainer):
    return {path.stem for path in FILES if path.parent.name == trainer}


def test_what_there_is_for_logoprompt_is_there_for_coop():
    assert names("LoGoPrompt") and names("CoOp") >= names("LoGoPrompt")


def test_all_names_of_the_original_code_are_there():
    coop = {f"rn50{e}{w}" for e in ("", "_ep50") for w in ("", "_ctxv1")} | {"rn50_ep100", "rn50_val"}
    coop |= {f"vit_b16{e}{w}" for e in ("", "_ep50", "_ep100") for w in ("", "_ctxv1")}
    coop |= {f"{backbone}{e}" for backbone in ("rn101", "vit_b32") for e in ("", "_ep50")}
    assert len(coop) == 16 and names("CoOp") >= coop
    cocoop = {f"vit_b16_c{m}_ep10_batch1" for m in (4, 8, 16)} | {"vit_b16_c4_ep10_batch1_ctxv1"}
    assert names("CoCoOp") >= cocoop


def test_the_one_to_take_features_with():
    """It has a batch size and no schedule."""
    path = ROOT / "configs" / "trainers" / "CoOp" / "rn50_val.yaml"
    cfg = train.setup_cfg(train.parse_args(["--config-file", str(path), "--trainer", "CoOp", "DATASET.NAME", "Shapes"]))
    assert (cfg.MODEL.BACKBONE.NAME, tuple(cfg.INPUT.SIZE)) == ("RN50", (224, 224))
    assert cfg.DATALOADER.TRAIN_X.BATCH_SIZE == cfg.DATALOADER.TEST.BATCH_SIZE == 200
    assert cfg.OPTIM == get_cfg_default().OPTIM
