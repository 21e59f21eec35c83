"""Pre-train the embedded CLIP (``MODEL.BACKBONE.NAME: "tiny"``) on drawings with captions and on rendered words.

    python tools/pretrain_tiny_clip.py --out trainers/prompting/tiny_clip.pt

Contrastive pre-training as in CLIP, in OpenAI's architecture and state-dict layout: a small ResNet with attention
pooling and a text transformer. It sees the kinds of ``datasets/drawing.py`` in the styles of STYLES below (never the
styles of the data set "Shapes"), and words, alone and written on drawings, in several fonts, colours, places and sizes,
so that like the real CLIP it recognises objects and reads. Sample i is a function of (seed, i): runs of one seed give
the same weights on one machine and can be interrupted and continued (``<out>.state``).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.drawing import KINDS, STYLES, draw, named_colour
from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.synthetic import block_size, contrast, paste, random_places, render_blocks

SIZE = 96  # input resolution; a strip of 1/7 has 14 pixels
VISION = {"layers": (2, 2, 2, 2), "width": 16, "head_width": 64, "image_size": SIZE}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
EMBED_DIM = 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PRETRAINING_STYLES = ("flat", "outlined", "sketch", "striped", "shaded")
WORDS = Path(__file__).with_name("words.txt")

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = ("", *(f"DejaVuSans{v}.ttf" for v in ("", "-Bold", "-Oblique", "Mono", "Mono-Bold")), "DejaVuSerif.ttf",
         "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmss10.ttf", "cmtt10.ttf")  # fmt: skip
UNSEEN_FONT = "DejaVuSerif-Italic.ttf"  # only ever read in the report

# The weights depend on these.
SETTINGS = ("seed", "steps", "second_steps", "batch_size", "drawings", "lr", "second_lr", "warmup", "weight_decay")

OBJECT, WORD, NAMED_OBJECT, LABELLED_OBJECT = range(4)  # what a sample shows
CLASS_NAME_SHARE = 0.4  # of the words written


class Mixture(NamedTuple):
    """How often a sample shows what."""

    shares: tuple[float, float, float, float]  # of objects, words, objects with their name, objects with any word
    mentioned: float  # probability that the caption mentions a word that is not the object's name


# First the model learns to see and to read. Then it sees more things with words on them, most of them not worth a word
# in the caption: otherwise a word weighs more than a thing that is hard to see.
MIXTURES = (Mixture((0.34, 0.30, 0.12, 0.24), mentioned=0.75), Mixture((0.28, 0.22, 0.10, 0.40), mentioned=0.3))


def words() -> list[str]:
    """The words to be read that are no kind of thing of ``drawing.py``."""
    return sorted(set(WORDS.read_text(encoding="utf-8").split()) - set(KINDS))


# ------------------------------------------------------------------------------------------------- samples


@lru_cache(maxsize=2048)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_FOLDER / name), size) if name else ImageFont.load_default(size)


def write(image: Image.Image, word: str, random: RandomState) -> str:
    """Write a word into an image, on a box of its own or straight onto it. Returns the name of its colour."""
    name, ink = named_colour(random)
    box = random.rand() < 0.8
    while box:
        _, paper = named_colour(random)
        if contrast(ink / 255, paper / 255) >= 2.5:
            break
    shown = word if random.rand() < 0.75 else word.upper() if random.rand() < 0.5 else word.title()
    height = int(round(np.exp(random.uniform(np.log(11), np.log(40)))))
    width = SIZE if random.rand() < 0.7 else random.randint(SIZE // 2, SIZE + 1)
    font = str(FONTS[random.randint(len(FONTS))]) if random.rand() < 0.7 else ""
    for size in range(round(height * random.uniform(0.95, 1.3)), 5, -1):
        left, top, right, bottom = _font(font, size).getbbox(shown)
        if right - left <= width - 2 and bottom - top <= height - 2:
            break
    pen = ImageDraw.Draw(image)
    x, y = random.randint(0, SIZE - width + 1), random.randint(0, SIZE - height + 1)
    if box:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(int(v) for v in paper))
    x += (width - (right - left)) / 2 if random.rand() < 0.8 else random.uniform(1, max(1, width - (right - left)))
    y += (height - (bottom - top)) / 2
    pen.text((round(x - left), round(y - top)), shown, fill=tuple(int(v) for v in ink), font=_font(font, size))
    return name


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(options: Sequence[str], random: RandomState) -> str:
    return str(options[random.randint(len(options))])


def describe(kind: str, colour: str, fill: str, size: str, random: RandomState) -> str:
    """A caption of a drawing."""
    adjectives = {"stripes": "striped", "gradient": "shaded", "outlined": "outlined"}
    detailed = " ".join(filter(None, (size, colour, adjectives.get(fill, ""), kind)))
    return _pick(
        (
            f"a photo of {_a(kind)}.",
            f"a photo of {_a(kind)}.",
            f"a photo of {_a(f'{colour} {kind}')}.",
            f"a drawing of {_a(kind)}.",
            f"a picture of {_a(kind)}.",
            f"{_a(f'{colour} {kind}')}.",
            f"{_a(detailed)}.",
            f"{_a(kind)}.",
        ),
        random,
    )


class Pool:
    """Drawings in the styles of pre-training, made once: (N, SIZE, SIZE, 3) uint8 and what they show."""

    def __init__(self, n: int, seed: int, workers: int, styles: Sequence[str] = PRETRAINING_STYLES) -> None:
        jobs = [(seed, i, styles[i % len(styles)]) for i in range(n)]
        progress = {"total": n, "desc": "drawings", "mininterval": 5}
        if workers:
            with multiprocessing.get_context("fork").Pool(workers) as pool:
                drawn = list(tqdm(pool.imap(_draw_one, jobs, chunksize=64), **progress))
        else:
            drawn = [_draw_one(job) for job in tqdm(jobs, **progress)]
        self.images = np.stack([image for image, _ in drawn])
        self.facts = [facts for _, facts in drawn]


def _draw_one(job: tuple[int, int, str]) -> tuple[np.ndarray, tuple[str, str, str, str]]:
    seed, i, style = job
    random = RandomState([seed, i])
    made = draw(_pick(tuple(KINDS), random), STYLES[style], random, SIZE)
    return np.asarray(made.image), (made.kind, made.colour, made.fill, made.size)


class Samples(Dataset):
    """Sample i: (image (3, SIZE, SIZE) uint8, caption), a function of (seed, i). The first ``n_first`` of them are
    drawn from the first mixture, the others from the second."""

    def __init__(self, pool: Pool, seed: int, start: int, end: int, n_first: int) -> None:
        self.pool, self.seed, self.start, self.end, self.n_first = pool, seed, start, end, n_first
        self.kinds, self.words = tuple(KINDS), tuple(words())

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        random = RandomState([self.seed, self.start + index, 1])
        mixture = MIXTURES[self.start + index >= self.n_first]
        show = int(np.searchsorted(np.cumsum(mixture.shares), random.rand()))
        if show == WORD:
            image, caption = self._word(random)
        else:
            i = random.randint(len(self.pool.images))
            image, facts = Image.fromarray(self.pool.images[i]), self.pool.facts[i]
            image = self._vary(image, random)
            caption = describe(*facts, random)
            kind = facts[0]
            if show == NAMED_OBJECT:
                write(image, kind, random)
            elif show == LABELLED_OBJECT:
                word = self._any_word(random)
                write(image, word, random)
                if word != kind and random.rand() < mixture.mentioned:
                    caption = _pick(
                        (
                            f"{_a(kind)} with the word {word}.",
                            f"{_a(kind)} and the word {word}.",
                            f"the word {word} on {_a(kind)}.",
                            f"a photo of {_a(kind)} with the word {word}.",
                        ),
                        random,
                    )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), caption

    def _any_word(self, random: RandomState) -> str:
        return _pick(self.kinds if random.rand() < CLASS_NAME_SHARE else self.words, random)

    def _vary(self, image: Image.Image, random: RandomState) -> Image.Image:
        """Flip and crop: a drawing is seen many times."""
        if random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = SIZE * random.uniform(0.75, 1)
        left, top = random.uniform(0, SIZE - side, 2)
        return image.resize((SIZE, SIZE), Image.BILINEAR, box=(left, top, left + side, top + side))

    def _word(self, random: RandomState) -> tuple[Image.Image, str]:
        """A word with nothing else; captioned as such, or by the thing it stands for, as on the web."""
        word = self._any_word(random)
        shades = np.stack([named_colour(random)[1], named_colour(random)[1]])
        if random.rand() < 0.5:
            shades[1] = shades[0]
        cells = random.randint(0, 256, (random.randint(2, 8), 2, 1)) / 255 * (shades[1] - shades[0]) + shades[0]
        image = Image.fromarray(cells.astype(np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
        colour = write(image, word, random)
        caption = _pick(
            (
                f"the word {word}.",
                f"a sign that says {word}.",
                f"{word}.",
                f"the word {word} in {colour} letters.",
                f"a photo of {_a(word)}.",
                f"a photo of {_a(word)}.",
                f"a picture of {_a(word)}.",
            ),
            random,
        )
        return image, caption


def collate(batch: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([image for image, _ in batch]), [caption for _, caption in batch]


# ------------------------------------------------------------------------------------------------- training


def build_model() -> CLIP:
    """The architecture, with CLIP's initialisation."""
    return CLIP(EMBED_DIM, VISION, TEXT, quick_gelu=True)


@cache
def _ids(caption: str) -> tuple[int, ...]:
    tokenizer = _tokenizer()
    return (49406, *tokenizer.encode(caption), 49407)


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def encode_text(model: CLIP, captions: Sequence[str], device: torch.device) -> torch.Tensor:
    """(B, E) text features; equal captions are encoded once, all at the longest one's length (attention is causal)."""
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    length = torch.tensor([len(_ids(caption)) for caption in distinct])
    ids = torch.zeros(len(distinct), int(length.max()), dtype=torch.long)
    for row, caption in zip(ids, distinct):
        row[: len(_ids(caption))] = torch.tensor(_ids(caption))
    n = ids.shape[1]
    x = model.token_embedding(ids.to(device)) + model.positional_embedding[:n]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
    x = x[torch.arange(len(x), device=device), (length - 1).to(device)] @ model.text_projection
    return x[torch.tensor([distinct[caption] for caption in captions], device=device)]


def normalise(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 -> CLIP's input."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.to(device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """CLIP's symmetric loss; pairs with the same caption are positives of each other, not negatives.

    Args:
        image, text: (B, E) of unit length.
        scale: 1/tau.
        captions: B texts.
    """
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    key = torch.tensor([number[caption] for caption in captions], device=image.device)
    target = (key[:, None] == key).float()
    target = target / target.sum(dim=1, keepdim=True)
    logits = scale * image @ text.t()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """For each of the two mixtures a linear warm-up, then a cosine down to zero."""
    steps, peak = args.steps, args.lr
    if step >= steps:
        step, steps, peak = step - steps, args.second_steps, args.second_lr
    warmup = min(args.warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def pretrain(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train, or go on with a run that was interrupted. Returns the state dict in half precision."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = build_model().to(device, memory_format=torch.channels_last)
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.weight_decay}],
        lr=args.lr, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    start, state_path = 0, Path(f"{args.out}.state")
    settings = {k: v for k, v in vars(args).items() if k in SETTINGS}
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["settings"] != settings:
            raise UserError(f"{state_path} belongs to a run with other settings; delete it or give another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"going on after step {start}")

    pool = Pool(args.drawings, args.seed, args.workers)
    total, n_first = args.steps + args.second_steps, args.steps * args.batch_size
    samples = Samples(pool, args.seed, start * args.batch_size, total * args.batch_size, n_first)
    loader = DataLoader(samples, args.batch_size, num_workers=args.workers, collate_fn=collate, drop_last=True)
    model.train()
    mean_loss, bar = 0.0, tqdm(total=total, initial=start, desc="steps", mininterval=5)
    for step, (images, captions) in enumerate(loader, start=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            image = model.encode_image(normalise(images, device))
            text = encode_text(model, captions, device)
        image, text = (F.normalize(features.float(), dim=-1) for features in (image, text))
        loss = contrastive_loss(image, text, model.logit_scale.exp(), captions)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        mean_loss = loss.item() if step == start else 0.98 * mean_loss + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {mean_loss:.3f}, 1/tau {model.logit_scale.exp().item():.1f}", refresh=False)
        bar.update()
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "settings": settings,
                },
                state_path,
            )
    bar.close()
    state = {
        k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items() if k != "attn_mask"}


def save(value: Any, path: Path) -> None:
    """Write to a temporary file, then rename."""
    temporary = path.with_name(f".{path.name}.part")
    torch.save(value, temporary)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def report(path: str, seed: int, n: int = 2000, workers: int = 2) -> dict[str, float]:
    """Accuracies in percent of a checkpoint, on drawings and renderings that pre-training never saw."""
    from trainers.prompting.text import encode_texts

    backbone = load_clip(path)
    kinds, every_word = list(KINDS), list(KINDS) + words()
    photo = encode_texts(backbone, [f"a photo of a {kind}." for kind in kinds])
    written = encode_texts(backbone, [f"the word {word}." for word in every_word])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def accuracy(images: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor) -> float:
        """Images (N, 3, H, W) in [0, 1]."""
        predicted = torch.cat(
            [backbone.logits(backbone.encode_image((x - mean) / std), texts).argmax(1) for x in images.split(256)]
        )
        return 100 * (predicted == labels).float().mean().item()

    pool = Pool(n, seed + 1_000_003, workers)
    drawings = torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255
    kind_of = torch.tensor([kinds.index(facts[0]) for facts in pool.facts])
    generator = torch.Generator().manual_seed(seed)
    results = {"zero-shot, pre-training styles": accuracy(drawings, kind_of, photo)}

    block = block_size(SIZE, 1 / 7, 1.0)
    plain = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, SIZE, SIZE)
    torch.manual_seed(seed)
    places = random_places(n, SIZE, block, "random")
    for title, names, texts in (
        ("read the class name on the default block, among class names", kinds, photo),
        ("read any word on the default block, among all words", every_word, written),
    ):
        chosen = torch.randint(len(names), (n,), generator=generator)
        for font_title, font in (("", ""), (", unseen font", str(FONT_FOLDER / UNSEEN_FONT))):
            # Colours no run of pre-training drew: every rendering has its own seed.
            blocks = torch.cat(
                [render_blocks([names[c]], *block, seed=7919 + i, font=font) for i, c in enumerate(chosen.tolist())]
            )
            results[f"{title}{font_title}"] = accuracy(paste(plain, blocks, places), chosen, texts)
    chosen = torch.randint(len(kinds), (n,), generator=generator)
    blocks = torch.cat([render_blocks([kinds[c]], *block, seed=7919 + i) for i, c in enumerate(chosen.tolist())])
    labelled = paste(drawings, blocks, places)
    results["drawing with any class's block: the drawing is recognised"] = accuracy(labelled, kind_of, photo)
    results["drawing with any class's block: the block is read"] = accuracy(labelled, chosen, photo)
    return results


def sheet(path: str, seed: int, columns: int = 12) -> None:
    """Draw what pre-training sees, a row per style and one of words, and below it the styles that it never sees."""
    random = RandomState([seed, 7])
    kinds = [str(kind) for kind in random.permutation(list(KINDS))[:columns]]
    pool = Pool(4 * columns, seed, workers=0)
    captioned = Samples(pool, seed, 0, 40 * columns, 0)
    written = [captioned[i][0] for i in range(40 * columns) if "word" in captioned[i][1]][:columns]
    rows = [(f"pre-training: {style}", style) for style in PRETRAINING_STYLES]
    rows += [("pre-training: words", ""), ("Shapes", "scene"), ("ShapesShifted", "chalk")]
    figure, grid = plt.subplots(len(rows), columns, figsize=(columns, len(rows) * 1.03), layout="constrained")
    for axes, (title, style) in zip(grid, rows):
        for i, axis in enumerate(axes):
            axis.imshow(
                draw(kinds[i], STYLES[style], random, SIZE).image if style else written[i].permute(1, 2, 0).numpy()
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(title.replace(": ", "\n"), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="tiny_clip.pt", help="state dict to write; <out>.state: to be continued")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3800, help="with the first mixture of samples")
    parser.add_argument("--second-steps", type=int, default=1000, help="with the second mixture")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--drawings", type=int, default=40000, help="drawings made once, then varied")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--second-lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2, help="processes that make samples; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--report-only", action="store_true", help="evaluate the file --out")
    parser.add_argument("--sheet", help="draw a picture of the samples into this file, and do nothing else")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = arguments(argv)
    try:
        if args.sheet:
            sheet(args.sheet, args.seed)
            return 0
        if not args.report_only:
            if not Path(args.out).absolute().parent.is_dir():
                raise UserError(f"{Path(args.out).absolute().parent}: no such folder, see --out")
            save(pretrain(args), Path(args.out))
        results = report(args.out, args.seed, workers=args.workers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({key: round(value, 2) for key, value in results.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
