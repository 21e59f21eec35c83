"""Small made-up things to test on: CLIP weights, an image tree, a config."""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ARCHITECTURES = ("vit", "rn")
SIZE = 64  # input resolution of both, in pixels
WIDTH = 64  # of the text encoder and (ViT) the image encoder: one head each
EMBED = 24
VOCABULARY = 49408
CONTEXT = 77
NAMES = ["face", "leopard", "inline_skate", "electric guitar", "Saint_Bernard", "cup", "missile", "wind chime"]


def clip_state_dict(arch: str, seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """A random CLIP state dict in OpenAI's layout, float32, large enough weights for features that differ."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * std

    state = {
        "logit_scale": torch.tensor(100.0).log(),
        "token_embedding.weight": normal(VOCABULARY, WIDTH, std=0.3),
        "positional_embedding": normal(CONTEXT, WIDTH, std=0.1),
        "text_projection": normal(WIDTH, EMBED, std=WIDTH**-0.5),
    }

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + normal(width, std=0.1)
        state[f"{name}.bias"] = normal(width, std=0.1)

    def linear(name: str, n_in: int, n_out: int) -> None:
        state[f"{name}.weight"] = normal(n_out, n_in, std=n_in**-0.5)
        state[f"{name}.bias"] = normal(n_out, std=0.1)

    def transformer(prefix: str) -> None:
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            norm(f"{block}.ln_1", WIDTH)
            norm(f"{block}.ln_2", WIDTH)
            state[f"{block}.attn.in_proj_weight"] = normal(3 * WIDTH, WIDTH, std=WIDTH**-0.5)
            state[f"{block}.attn.in_proj_bias"] = normal(3 * WIDTH, std=0.1)
            linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            linear(f"{block}.mlp.c_fc", WIDTH, 4 * WIDTH)
            linear(f"{block}.mlp.c_proj", 4 * WIDTH, WIDTH)

    def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
        state[f"{name}.weight"] = normal(n_out, n_in, kernel, kernel, std=(n_in * kernel**2) ** -0.5)

    def batch_norm(name: str, width: int) -> None:
        norm(name, width)
        state[f"{name}.running_mean"] = normal(width, std=0.1)
        state[f"{name}.running_var"] = 0.3 + 0.2 * torch.rand(width, generator=draw)  # amplifies, so images differ
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    transformer("")
    norm("ln_final", WIDTH)
    if arch == "vit":
        patch = 16
        state["visual.class_embedding"] = normal(WIDTH, std=0.3)
        state["visual.positional_embedding"] = normal((SIZE // patch) ** 2 + 1, WIDTH, std=0.1)
        state["visual.proj"] = normal(WIDTH, EMBED, std=WIDTH**-0.5)
        conv("visual.conv1", 3, WIDTH, patch)
        norm("visual.ln_pre", WIDTH)
        norm("visual.ln_post", WIDTH)
        transformer("visual.")
        return state

    width = 8
    for i, (n_in, n_out) in enumerate(((3, width // 2), (width // 2, width // 2), (width // 2, width)), 1):
        conv(f"visual.conv{i}", n_in, n_out, 3)
        batch_norm(f"visual.bn{i}", n_out)
    n_in = width
    for i in range(4):
        planes, block = width * 2**i, f"visual.layer{i + 1}.0"
        for j, (a, b, kernel) in enumerate(((n_in, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)), 1):
            conv(f"{block}.conv{j}", a, b, kernel)
            batch_norm(f"{block}.bn{j}", b)
        conv(f"{block}.downsample.0", n_in, 4 * planes, 1)
        batch_norm(f"{block}.downsample.1", 4 * planes)
        n_in = 4 * planes
    state["visual.attnpool.positional_embedding"] = normal((SIZE // 32) ** 2 + 1, n_in, std=0.1)
    for name, n_out in (("q_proj", n_in), ("k_proj", n_in), ("v_proj", n_in), ("c_proj", EMBED)):
        linear(f"visual.attnpool.{name}", n_in, n_out)
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
