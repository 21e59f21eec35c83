"""With the same seed and without workers, a run is that of the original CoOp or CoCoOp: random stream and losses."""

import json

import pytest
import torch
from conftest import ROOT, start
from reference import Reference
from tiny import arguments

RECORDED = json.loads((ROOT / "tests" / "golden" / "same_run.json").read_text())


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: f"{r['arch']}-{r['trainer']}-{len(r['options'])}")
def test_random_stream_and_losses_are_those_of_the_original(data_root, tmp_path, recorded):
    arch, trainer = recorded["arch"], recorded["trainer"]
    found = Reference(ROOT / "tests" / "golden" / "coop_reference.npz")
    found.clip(arch, tmp_path)
    options = [
        word for key, value in recorded["options"].items() for word in (f"TRAINER.{trainer.upper()}.{key}", value)
    ]
    size = found.meta["arch"][arch]["image_resolution"]
    options += ["INPUT.SIZE", f"({size}, {size})", "DATALOADER.TRAIN_X.BATCH_SIZE", 4, "OPTIM.MAX_EPOCH", 50]
    seen = {"losses": []}

    def prepare(built):
        state, step = torch.get_rng_state(), built.forward_backward
        seen["rand"] = torch.rand(3).tolist()
        torch.set_rng_state(state)

        def forward_backward(batch):
            seen["losses"].append(step(batch)["loss"])
            if len(seen["losses"]) == len(recorded["losses"]):
                raise KeyboardInterrupt
            return {"loss": 0.0}

        built.forward_backward = forward_backward

    with pytest.raises(KeyboardInterrupt):
        start(arguments(trainer, data_root, tmp_path / f"{arch}.pt", tmp_path / "run", *options), prepare)
    assert seen["rand"] == recorded["rand"]
    assert seen["losses"] == pytest.approx(recorded["losses"], rel=1e-4)
