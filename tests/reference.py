"""Reads reference values: JSON and NPZ files that ``golden/README.md`` describes."""

import json

import numpy as np
import torch

from trainers.prompting.backbone import load_clip


class Reference:
    """An NPZ file with its JSON file (``meta``)."""

    def __init__(self, path):
        self.meta = json.loads(path.with_suffix(".json").read_text())
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def tensor(self, name):
        """An array as a tensor, float32 if it is of any float type."""
        value = torch.from_numpy(self.arrays[name])
        return value.float() if value.is_floating_point() else value

    def tensors(self, prefix):
        """{name: tensor} of the arrays below a prefix; those further below are left out."""
        names = [key[len(prefix) :] for key in self.arrays if key.startswith(prefix)]
        return {name: self.tensor(prefix + name) for name in names if "/" not in name}

    def check_steps(self, model, images, prefix, optim, of=lambda step: step.total.item(), rtol=1e-5):
        """Train on the reference images; losses are those below the prefix."""
        labels, expected, found = self.tensor("labels").long(), self.tensor(f"{prefix}losses"), []
        for _ in expected:
            step = model.loss(images, labels)
            optim.zero_grad()
            model.backward(step, lambda loss: loss)
            optim.step()
            found.append(of(step))
        np.testing.assert_allclose(found, expected, rtol=rtol)

    def clip(self, arch, folder):
        """The CLIP of an architecture; its weights are written to a folder and loaded from there."""
        state, sizes = self.tensors(f"{arch}/"), self.meta["arch"][arch]
        table = torch.zeros(sizes["vocab_size"], sizes["transformer_width"])
        table[state.pop("token_embedding.rows").long()] = state.pop("token_embedding.values")
        others = {"images", "labels", "cache_images", "cache_labels"}
        state = {key: value for key, value in state.items() if key not in others}
        torch.save({**state, "token_embedding.weight": table}, folder / f"{arch}.pt")
        return load_clip(str(folder / f"{arch}.pt"))


def check_parameters(state, initial, final, rtol=1e-3, share=1e-3):
    """Every parameter moved, and ended within a share of that from where it should."""
    for name, parameter in state.items():
        moved = float((final[name] - initial[name]).abs().max())
        assert moved > 0
        torch.testing.assert_close(parameter.detach(), final[name], rtol=rtol, atol=share * moved)


def runs_of(folder, pattern):
    """(file name without .npz, architecture, run) of every run with logits in a folder's files."""
    found = []
    for path in sorted(folder.glob(pattern)):
        with np.load(path, allow_pickle=False) as arrays:
            keys = [name.split("/")[:2] for name in arrays.files if name.endswith("/logits")]
        found += [(path.stem, arch, run) for arch, run in keys]
    return found
