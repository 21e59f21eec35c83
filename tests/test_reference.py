"""CoOp against values made with the original code: logits, three SGD steps (see the README beside the values).

``LOGO_REFERENCE`` names the folder.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from yacs.config import CfgNode as CN

from trainers import coop
from trainers.prompting.backbone import load_clip

RUNS = [
    (f"coop_{position}_{kind}", position, kind == "csc", "")
    for position in ("end", "middle", "front")
    for kind in ("generic", "csc")
] + [("coop_ctxinit", "end", False, "a photo of a")]


@pytest.fixture(scope="module")
def reference(golden):
    arrays = np.load(golden / "coop_reference.npz", allow_pickle=False)
    return SimpleNamespace(meta=json.loads((golden / "coop_reference.json").read_text()), arrays=arrays)


@pytest.fixture(scope="module", params=["vit", "rn"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def weights(reference, arch, tmp_path_factory):
    """The reference CLIP as a state dict file in float32."""
    arrays, prefix = reference.arrays, f"{arch}/"
    keys = [k[len(prefix) :] for k in arrays.files if k.startswith(prefix)]
    skipped = ("images", "labels", *(f"{run[0]}/" for run in RUNS), "cocoop/")
    state = {k: torch.from_numpy(arrays[prefix + k]) for k in keys if not k.startswith(skipped)}
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    table = torch.zeros(reference.meta["arch"][arch]["vocab_size"], reference.meta["arch"][arch]["transformer_width"])
    table[state.pop("token_embedding.rows").long()] = state.pop("token_embedding.values")
    state["token_embedding.weight"] = table
    path = tmp_path_factory.mktemp("reference") / f"{arch}.pt"
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("run, position, csc, ctx_init", RUNS)
def test_coop_equals_the_original(reference, arch, weights, run, position, csc, ctx_init):
    arrays = reference.arrays
    cfg = CN({"TRAINER": CN(), "TEST": CN()})
    coop.extend_cfg(cfg)
    cfg.TRAINER.COOP.merge_from_list(
        ["N_CTX", 4, "CSC", csc, "CTX_INIT", ctx_init, "CLASS_TOKEN_POSITION", position, "PREC", "fp32"]
    )
    model = coop.CustomCLIP(cfg, reference.meta["classnames"], load_clip(weights))
    learner = model.prompt_learner
    initial = torch.from_numpy(arrays[f"{arch}/{run}/init/ctx"]).float()
    if ctx_init:
        torch.testing.assert_close(learner.ctx.data, initial, atol=1e-6, rtol=0)
    learner.ctx.data.copy_(initial)

    images = torch.from_numpy(arrays[f"{arch}/images"]).float()
    labels = torch.from_numpy(arrays["labels"]).long()
    logits = model(images)
    np.testing.assert_allclose(logits.detach().numpy(), arrays[f"{arch}/{run}/logits"], atol=1e-4, rtol=1e-4)

    optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, arrays[f"{arch}/{run}/losses"], rtol=1e-3)
    final = arrays[f"{arch}/{run}/final/ctx"]
    moved = np.abs(final - initial.numpy()).max()
    assert moved > 0
    np.testing.assert_allclose(learner.ctx.detach().numpy(), final, rtol=1e-3, atol=1e-3 * moved)
