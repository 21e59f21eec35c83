"""CoOp and CoCoOp against values made with the original code: logits before training, then three SGD steps.

All files ``coop_*.npz`` of the reference folder are tested; its README describes them.
"""

import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from reference import Reference, runs_of
from yacs.config import CfgNode as CN

from trainers import coop, extend_cfg
from trainers.cocoop import CustomCLIP as CoCoOpCLIP
from trainers.prompting.image_batch import ImageBatch

RUNS = runs_of(GOLDEN, "coop_*.npz")
WORDS = {"coop_ctxinit": "a photo of a", "cocoop": "a photo of a"}


@pytest.fixture(scope="module")
def reference():
    """Reads a reference file, once."""
    read = {}
    return lambda stem: read.get(stem) or read.setdefault(stem, Reference(GOLDEN / f"{stem}.npz"))


def build_model(run, n_ctx, classnames, backbone):
    """The method with the options that the run's name tells."""
    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
    extend_cfg(cfg)
    options = ["N_CTX", n_ctx, "CTX_INIT", WORDS.get(run, ""), "PREC", "fp32"]
    if run == "cocoop":
        cfg.TRAINER.COCOOP.merge_from_list(options)
        return CoCoOpCLIP(cfg, classnames, backbone)
    if run not in WORDS:
        position, kind = re.fullmatch(r"coop_(end|middle|front)_(generic|csc)", run).groups()
        options += ["CLASS_TOKEN_POSITION", position, "CSC", kind == "csc"]
    cfg.TRAINER.COOP.merge_from_list(options)
    return coop.CustomCLIP(cfg, classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original_coop(reference, tmp_path, stem, arch, run):
    found = reference(stem)
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    backbone = found.clip(arch, tmp_path)
    model = build_model(run, initial["ctx"].shape[-2], found.meta["classnames"], backbone)
    learner = model.learned
    if run in WORDS:
        torch.testing.assert_close(learner.ctx.data, initial["ctx"], atol=1e-6, rtol=0)
    learner.load_state_dict(initial)  # names and shapes are the original's

    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    labels = found.tensor("labels").long()
    optim, losses = torch.optim.SGD(learner.parameters(), lr=0.1), []
    for step in range(3):
        outcome = model.loss(images, labels)
        if step == 0:
            expected = found.tensor(f"{arch}/{run}/logits")
            torch.testing.assert_close(outcome.logits.detach(), expected, atol=1e-4, rtol=1e-4)
        optim.zero_grad()
        model.backward(outcome, lambda loss: loss)
        optim.step()
        losses.append(outcome.total.item())
    np.testing.assert_allclose(losses, found.tensor(f"{arch}/{run}/losses"), rtol=1e-5)
    moved = {name: float((final[name] - initial[name]).abs().max()) for name in initial}
    assert moved["ctx"] > 0
    for name, parameter in learner.state_dict().items():  # a Meta-Net of one unit may be dead and not move
        torch.testing.assert_close(parameter, final[name], rtol=1e-3, atol=1e-3 * moved[name])
