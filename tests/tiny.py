"""Small made-up things to test on: CLIP weights, an image tree, the arguments of a run."""

import json
import random
from pathlib import Path

import open_clip
import torch
from PIL import Image, ImageDraw

ARCHITECTURES = ("vit", "rn")
SIZE = 64  # input resolution of both, in pixels
WIDTH = 64  # of the text encoder and (ViT) the image encoder: one head each
EMBED = 24
VOCABULARY = 49408
CONTEXT = 77
NAMES = ["face", "leopard", "inline_skate", "electric guitar", "Saint_Bernard", "cup", "missile", "wind chime"]
VISION = {"vit": {"width": WIDTH, "patch_size": 16}, "rn": {"layers": (1, 1, 1, 1), "width": 8}}


def clip_state_dict(arch: str, seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """A random CLIP state dict in OpenAI's layout, float32, with weights so large that features differ."""
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 1, "layers": layers}
    model = open_clip.CLIP(EMBED, {"layers": layers, "image_size": SIZE, **VISION[arch]}, text)
    draw, state = torch.Generator().manual_seed(seed), model.state_dict()
    for name, value in state.items():
        normal = torch.randn(value.shape, generator=draw)
        if name == "logit_scale":
            value.fill_(100.0).log_()
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif name.endswith("running_var"):  # small: it amplifies
            value.copy_(0.3 + 0.2 * torch.rand(value.shape, generator=draw))
        elif name.endswith(("token_embedding.weight", "class_embedding")):
            value.copy_(0.3 * normal)
        elif name.endswith(("bias", "running_mean", "positional_embedding")):
            value.copy_(0.1 * normal)
        elif value.dim() == 1:  # weights of a normalisation
            value.copy_(1 + 0.1 * normal)
        else:
            n_in = len(value) if name.endswith(("proj", "projection")) else value[0].numel()
            value.copy_(n_in**-0.5 * normal)
    return state


def caltech_tree(root: Path, names=NAMES, train: int = 6, val: int = 2, test: int = 4, seed: int = 0) -> Path:
    """``caltech-101`` below ``root`` in CoOp's layout: noisy drawings, one colour and shape per class."""
    draw = random.Random(seed)
    folder = root / "caltech-101" / "101_ObjectCategories"
    split = {"train": [], "val": [], "test": []}
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(train + val + test):
            image = Image.new("RGB", (draw.randrange(60, 110), draw.randrange(60, 110)))
            image.putdata([tuple(draw.randrange(90) for _ in range(3)) for _ in range(image.width * image.height)])
            colour = tuple(int(255 * ((label + 1) * k % 8) / 7) for k in (1, 3, 5))
            box = [draw.randrange(20), draw.randrange(20), draw.randrange(40, 60), draw.randrange(40, 60)]
            getattr(ImageDraw.Draw(image), ("ellipse", "rectangle")[label % 2])(box, fill=colour)
            image.save(folder / name / f"image_{i:04d}.jpg")
            part = "train" if i < train else "val" if i < train + val else "test"
            split[part].append([f"{name}/image_{i:04d}.jpg", label, name])
    (root / "caltech-101" / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    return root


def arguments(trainer: str, root, backbone: str, output, *opts: str, flags=(), seed: int = 1) -> list[str]:
    """``train.py``'s arguments for a tiny run: 4 shots of the base classes, 2 epochs, no workers."""
    repository = Path(__file__).resolve().parents[1] / "configs"
    folder = "CoOp" if trainer in ("ZeroshotCLIP", "ZeroshotCLIP2", "LinearProbe") else trainer
    name = {"CoCoOp": "photo64_c4_ep10_batch1_ctxv1"}.get(trainer, "photo64_ep50_ctxv1")
    return [
        *("--root", str(root), "--trainer", trainer, "--backbone", str(backbone), "--seed", str(seed)),
        *("--dataset-config-file", str(repository / "datasets" / "caltech101.yaml")),
        *("--config-file", str(repository / "trainers" / folder / f"{name}.yaml")),
        *("--output-dir", str(output), *map(str, flags)),
        *("DATASET.NUM_SHOTS", "4", "DATASET.SUBSAMPLE_CLASSES", "base", "OPTIM.MAX_EPOCH", "2"),
        *("OPTIM.LR", "0.002"),
        *("DATALOADER.TRAIN_X.BATCH_SIZE", "8", "DATALOADER.NUM_WORKERS", "0", *map(str, opts)),
    ]
