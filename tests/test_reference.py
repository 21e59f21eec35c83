"""CoOp and CoCoOp against values made with the original code: logits, three SGD steps.

``LOGO_REFERENCE`` names the folder; the README in it says what its files ``coop_*.json`` and ``coop_*.npz`` hold. All
of them are tried.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from yacs.config import CfgNode as CN

from trainers import coop, extend_cfg
from trainers.cocoop import CustomCLIP as CoCoOpCLIP
from trainers.prompting.backbone import load_clip


def recorded():
    """(name of the file, architecture, run) of all runs in the folder."""
    found = []
    for path in sorted(GOLDEN.glob("coop_*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            keys = [name.rsplit("/", 1)[0].split("/", 1) for name in arrays.files if name.endswith("/logits")]
        found += [(path.stem, arch, run) for arch, run in keys]
    return found


RUNS = recorded()


@pytest.fixture(scope="module")
def reference(golden):
    """Reads a file: its class names and architectures, its arrays."""
    read = {}

    def read_once(stem):
        if stem not in read:
            with np.load(golden / f"{stem}.npz", allow_pickle=False) as arrays:
                arrays = {name: arrays[name] for name in arrays.files}
            read[stem] = SimpleNamespace(meta=json.loads((golden / f"{stem}.json").read_text()), arrays=arrays)
        return read[stem]

    return read_once


@pytest.fixture(scope="module")
def clip_model(reference, tmp_path_factory):
    """Builds the CLIP of a file, in float32."""

    def build(stem, arch):
        path = tmp_path_factory.mktemp("reference") / f"{arch}.pt"
        found, prefix = reference(stem), f"{arch}/"
        keys = [k[len(prefix) :] for k in found.arrays if k.startswith(prefix)]
        state = {k: torch.from_numpy(found.arrays[prefix + k]) for k in keys if "/" not in k and k != "images"}
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        sizes = found.meta["arch"][arch]
        table = torch.zeros(sizes["vocab_size"], sizes["transformer_width"])
        table[state.pop("token_embedding.rows").long()] = state.pop("token_embedding.values")
        state["token_embedding.weight"] = table
        torch.save(state, path)
        return load_clip(str(path))

    return build


def build_model(run, n_ctx, classnames, backbone):
    """The model of a trainer, with the options that the run's name says."""
    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
    extend_cfg(cfg)
    words = "a photo of a" if run in ("coop_ctxinit", "cocoop") else ""
    if run == "cocoop":
        cfg.TRAINER.COCOOP.merge_from_list(["N_CTX", n_ctx, "CTX_INIT", words, "PREC", "fp32"])
        return CoCoOpCLIP(cfg, classnames, backbone)
    options = ["N_CTX", n_ctx, "CTX_INIT", words, "PREC", "fp32"]
    if not words:
        position, kind = re.fullmatch(r"coop_(end|middle|front)_(generic|csc)", run).groups()
        options += ["CLASS_TOKEN_POSITION", position, "CSC", kind == "csc"]
    cfg.TRAINER.COOP.merge_from_list(options)
    return coop.CustomCLIP(cfg, classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_the_original_s_numbers(reference, clip_model, stem, arch, run):
    found = reference(stem)
    prefix = f"{arch}/{run}/"
    value = {k[len(prefix) :]: torch.from_numpy(v) for k, v in found.arrays.items() if k.startswith(prefix)}
    initial = {k.removeprefix("init/"): v.float() for k, v in value.items() if k.startswith("init/")}
    n_ctx = initial["ctx"].shape[-2]
    model = build_model(run, n_ctx, found.meta["classnames"], clip_model(stem, arch))
    learner = model.prompt_learner
    if run in ("coop_ctxinit", "cocoop"):
        torch.testing.assert_close(learner.ctx.data, initial["ctx"], atol=1e-6, rtol=0)
    learner.load_state_dict(initial)  # names and shapes are the original's

    images = torch.from_numpy(found.arrays[f"{arch}/images"]).float()
    labels = torch.from_numpy(found.arrays["labels"]).long()
    torch.testing.assert_close(model(images).detach(), value["logits"].float(), atol=1e-4, rtol=1e-4)

    optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, value["losses"], rtol=1e-3)
    final = {k.removeprefix("final/"): v.float() for k, v in value.items() if k.startswith("final/")}
    moved = {name: float((final[name] - initial[name]).abs().max()) for name in initial}
    assert moved["ctx"] > 0
    for name, parameter in learner.state_dict().items():  # a Meta-Net of one unit may be dead and stay where it is
        torch.testing.assert_close(parameter, final[name], rtol=1e-3, atol=1e-3 * moved[name])


def test_every_run_of_the_reference_is_among_them(golden):
    if not (golden / "coop_reference.npz").is_file():
        pytest.skip(f"no coop_reference.npz in {golden}")
    ours = {(arch, run) for stem, arch, run in RUNS if stem == "coop_reference"}
    coop_runs = {f"coop_{place}_{kind}" for place in ("end", "middle", "front") for kind in ("generic", "csc")}
    assert ours >= {(arch, run) for arch in ("vit", "rn") for run in {*coop_runs, "coop_ctxinit", "cocoop"}}
