"""Pre-train the embedded CLIP (``MODEL.BACKBONE.NAME: "tiny"``) on drawings with captions and on rendered words.

    python toy/pretrain.py --out toy/tiny_clip.pt
    python toy/pretrain.py --vit --out toy/tiny_vit.pt     # the image encoder of "tiny-vit", half an hour on a core
    python toy/pretrain.py --agreeing 500 --out agreeing.pt    # "tiny", fine-tuned on words that agree with a drawing

Contrastive, as in CLIP, in OpenAI's state-dict layout. The model sees the kinds of ``drawing.py``, never in the styles
of the data sets, and words, alone and on drawings. The same seed gives the same weights on one machine. The vision
transformer learns to see from drawings alone, with tiny's encoders as teachers; it does not read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Optional

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.random import RandomState
from open_clip.model import CLIP
from open_clip.tokenizer import tokenize
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from toy.drawing import KINDS, STYLES, draw, named_colour
from trainers.prompting.backbone import TINY, load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.paste import block_size, paste, places_of
from trainers.prompting.render import contrast, render_blocks
from trainers.prompting.text_encoder import encode_texts

SIZE = 96  # input resolution; a strip of 1/7 has 14 pixels
VISION = {"layers": (2, 2, 2, 2), "width": 16, "head_width": 64, "image_size": SIZE}
VIT = {"layers": 4, "width": 128, "head_width": 64, "patch_size": 12, "image_size": SIZE}
VIT_STEPS, VIT_BATCH, VIT_DRAWINGS, VIT_LR = 4000, 96, 8000, 1e-3
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
EMBED_DIM = 128
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
PRETRAINING_STYLES = ("flat", "outlined", "sketch", "striped", "shaded")
FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = ("", *(f"DejaVuSans{v}.ttf" for v in ("", "-Bold", "-Oblique", "Mono", "Mono-Bold")), "DejaVuSerif.ttf",
         "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmss10.ttf", "cmtt10.ttf")  # fmt: skip
UNSEEN_FONT = "DejaVuSerif-Italic.ttf"  # only ever read in the report
SETTINGS = {"seed": 1, "steps": 3800, "second-steps": 1000, "batch-size": 256, "drawings": 40000, "lr": 1.5e-3,
            "second-lr": 5e-4, "warmup": 200, "weight-decay": 0.1, "workers": 2}  # fmt: skip

OBJECT, WORD, NAMED_OBJECT, LABELLED_OBJECT = range(4)  # what a sample shows
CLASS_NAME_SHARE = 0.4  # of the words written
# Shares of objects, words, objects with their name and objects with any word; the probability that the caption mentions
# a word that is not the object's name. First the model learns to see and to read. Then it sees more objects with words
# that the captions mostly do not mention: otherwise a word outweighs an object that is hard to see.
MIXTURES = (((0.34, 0.30, 0.12, 0.24), 0.75), ((0.28, 0.22, 0.10, 0.40), 0.3))
AGREEING = (0.28, 0.20, 0.40, 0.12), 0.3  # of --agreeing: a word on a drawing is mostly its name

# What captions say. A word is also captioned by the thing it stands for, as on the web.
DRAWING_CAPTIONS = ("a photo of {kind}.", "a photo of {kind}.", "a photo of {coloured}.", "a drawing of {kind}.",
                    "a picture of {kind}.", "{coloured}.", "{detailed}.", "{kind}.")  # fmt: skip
LABELLED_CAPTIONS = ("{kind} with the word {word}.", "{kind} and the word {word}.", "the word {word} on {kind}.",
                     "a photo of {kind} with the word {word}.")  # fmt: skip
WORD_CAPTIONS = ("the word {word}.", "a sign that says {word}.", "{word}.", "the word {word} in {colour} letters.",
                 "a photo of {thing}.", "a photo of {thing}.", "a picture of {thing}.")  # fmt: skip


def words() -> list[str]:
    """Return the words to be read that are not kinds of things of ``drawing.py``."""
    return sorted(set(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()) - set(KINDS))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_FOLDER / name), size) if name else ImageFont.load_default(size)


def _pick(options: Sequence[str], random: RandomState) -> str:
    return str(options[random.randint(len(options))])


def _caption(templates: Sequence[str], random: RandomState, word: str = "", colour: str = "", **nouns: str) -> str:
    """Return a filled-in template; ``nouns`` get an article."""
    nouns = {key: f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for key, noun in nouns.items()}
    return _pick(templates, random).format(word=word, colour=colour, **nouns)


def write(image: Image.Image, word: str, random: RandomState) -> str:
    """Write a word into an image, on a box or straight onto the image. Returns the name of its colour."""
    name, ink = named_colour(random)
    box = random.rand() < 0.8
    while box:
        _, paper = named_colour(random)
        if contrast(ink / 255, paper / 255) >= 2.5:
            break
    text = word if random.rand() < 0.75 else word.upper() if random.rand() < 0.5 else word.title()
    height = int(round(np.exp(random.uniform(np.log(11), np.log(40)))))
    width = SIZE if random.rand() < 0.7 else random.randint(SIZE // 2, SIZE + 1)
    font = _pick(FONTS, random) if random.rand() < 0.7 else ""
    for size in range(round(height * random.uniform(0.95, 1.3)), 5, -1):
        left, top, right, bottom = _font(font, size).getbbox(text)
        if right - left <= width - 2 and bottom - top <= height - 2:
            break
    pen = ImageDraw.Draw(image)
    x, y = random.randint(0, SIZE - width + 1), random.randint(0, SIZE - height + 1)
    if box:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(int(v) for v in paper))
    x += (width - (right - left)) / 2 if random.rand() < 0.8 else random.uniform(1, max(1, width - (right - left)))
    y += (height - (bottom - top)) / 2
    pen.text((round(x - left), round(y - top)), text, fill=tuple(int(v) for v in ink), font=_font(font, size))
    return name


def drawings(n: int, seed: int) -> tuple[np.ndarray, list[tuple[str, str, str, str]]]:
    """Draw in the styles of pre-training. Returns (n, SIZE, SIZE, 3) uint8, and facts for captions."""
    images, facts = np.empty((n, SIZE, SIZE, 3), dtype=np.uint8), []
    for i, style in zip(tqdm(range(n), "drawings", mininterval=5), cycle(PRETRAINING_STYLES)):
        random = RandomState([seed, i])
        drawn = draw(_pick(tuple(KINDS), random), STYLES[style], random, SIZE)
        images[i] = drawn.image
        facts.append((drawn.kind, drawn.colour, drawn.fill, drawn.size))
    return images, facts


class Samples(Dataset):
    """Sample i: (image (3, SIZE, SIZE) uint8, caption). The first ``n_first`` are drawn from the first mixture."""

    def __init__(
        self, images: np.ndarray, facts: Sequence[tuple], seed: int, n: int, n_first: int, mixtures: tuple = MIXTURES
    ) -> None:
        self.images, self.facts, self.seed, self.n, self.n_first = images, facts, seed, n, n_first
        self.mixtures = mixtures
        self.kinds, self.words = tuple(KINDS), tuple(words())

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        random = RandomState([self.seed, i, 1])
        shares, mentioned = self.mixtures[i >= self.n_first]
        show = int(np.searchsorted(np.cumsum(shares), random.rand()))
        image, caption = self._word(random) if show == WORD else self._object(show, mentioned, random)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), caption

    def _object(self, show: int, mentioned: float, random: RandomState) -> tuple[Image.Image, str]:
        """Return a drawing, flipped and cropped since it is seen many times, perhaps with a word on it."""
        i = random.randint(len(self.images))
        image, (kind, colour, fill, size) = Image.fromarray(self.images[i]), self.facts[i]
        if random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = SIZE * random.uniform(0.75, 1)
        left, top = random.uniform(0, SIZE - side, 2)
        image = image.resize((SIZE, SIZE), Image.BILINEAR, box=(left, top, left + side, top + side))
        adjective = {"stripes": "striped", "gradient": "shaded", "outlined": "outlined"}.get(fill, "")
        detailed = " ".join(filter(None, (size, colour, adjective, kind)))
        caption = _caption(DRAWING_CAPTIONS, random, kind=kind, coloured=f"{colour} {kind}", detailed=detailed)
        if show in (NAMED_OBJECT, LABELLED_OBJECT):
            word = kind if show == NAMED_OBJECT else self._any_word(random)
            write(image, word, random)
            if word != kind and random.rand() < mentioned:
                caption = _caption(LABELLED_CAPTIONS, random, word, kind=kind)
        return image, caption

    def _word(self, random: RandomState) -> tuple[Image.Image, str]:
        """Return a word on an empty background."""
        word, first, second = self._any_word(random), named_colour(random)[1], named_colour(random)[1]
        shade = (first if random.rand() < 0.5 else second) - first
        cells = random.randint(0, 256, (random.randint(2, 8), 2, 1)) / 255 * shade + first
        image = Image.fromarray(cells.astype(np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
        colour = write(image, word, random)
        return image, _caption(WORD_CAPTIONS, random, word, colour, thing=word)

    def _any_word(self, random: RandomState) -> str:
        return _pick(self.kinds if random.rand() < CLASS_NAME_SHARE else self.words, random)


def encode_text(model: CLIP, captions: Sequence[str], device: torch.device) -> torch.Tensor:
    """Return (N, E) features of N captions, encoded up to the last [EOT] (attention is causal)."""
    ids = tokenize(captions).to(device)
    ends = ids.argmax(dim=1)  # [EOT] has the largest id
    n = int(ends.max()) + 1
    x = model.token_embedding(ids[:, :n]) + model.positional_embedding[:n]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
    return x[torch.arange(len(x), device=device), ends] @ model.text_projection


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss of (B, E) unit vectors, scale 1/tau. Pairs with the same key (B,) are positives."""
    target = F.normalize((key[:, None] == key).float(), p=1)
    logits = scale * image @ text.t()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the rate: for each of the two mixtures a linear warm-up, then a cosine down to zero."""
    steps, peak = args.steps, args.lr
    if step >= steps:
        step, steps, peak = step - steps, args.second_steps, args.second_lr
    if step < (warmup := min(args.warmup, steps // 10)):
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def pretrain(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train, or fine-tune ``tiny``. Returns the state dict in half precision, without BatchNorm's counters."""
    device, mixtures = torch.device(args.device), MIXTURES
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = CLIP(EMBED_DIM, VISION, TEXT, quick_gelu=True).to(device, memory_format=torch.channels_last).train()
    if args.agreeing:
        model.load_state_dict(torch.load(TINY, weights_only=True), strict=False)  # without BatchNorm's counters
        mixtures, args.steps, args.second_steps = (AGREEING, AGREEING), 0, args.agreeing
    groups = [{"params": [], "weight_decay": rate} for rate in (0.0, args.weight_decay)]
    for name, p in model.named_parameters():
        groups[p.ndim >= 2 and "embedding" not in name]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    n_first, n_second = (steps * args.batch_size for steps in (args.steps, args.second_steps))
    samples = Samples(*drawings(args.drawings, args.seed), args.seed, n_first + n_second, n_first, mixtures)
    mean, std = MEAN.to(device), STD.to(device)
    bar = tqdm(DataLoader(samples, args.batch_size, num_workers=args.workers), "steps", mininterval=5)
    for step, (images, captions) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        images = ((images.to(device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}  # equal captions are encoded once
        key = torch.tensor([number[caption] for caption in captions], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            image, text = model.encode_image(images), encode_text(model, list(number), device)[key]
        image, text = (F.normalize(features.float(), dim=-1) for features in (image, text))
        loss = contrastive_loss(image, text, model.logit_scale.exp(), key)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix_str(f"loss {loss.item():.3f}, 1/tau {model.logit_scale.exp().item():.1f}", refresh=False)
    return {k: v.cpu().contiguous().half() for k, v in model.state_dict().items() if v.is_floating_point()}


def fixed_start(visual: torch.nn.Module) -> None:
    """Start a vision transformer from cosines as patch filters and from sines of the positions, to learn sooner."""
    size, width = VIT["patch_size"], VIT["width"]
    cosines = torch.cos(math.pi / size * (torch.arange(size) + 0.5) * torch.arange(size)[:, None]) * (2 / size) ** 0.5
    cosines[0] /= 2**0.5
    frequencies = sorted((a + b, a, b) for a in range(size) for b in range(size))
    cells = torch.arange(SIZE // size).float()
    waves = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    row, column = (
        torch.cat([torch.sin(place.flatten()[:, None] * waves), torch.cos(place.flatten()[:, None] * waves)], dim=1)
        for place in torch.meshgrid(cells, cells, indexing="ij")
    )
    with torch.no_grad():
        visual.conv1.weight.zero_()
        for n in range(width):
            _, a, b = frequencies[n // 3]
            visual.conv1.weight[n, n % 3] = 0.5 * torch.outer(cosines[a], cosines[b])
        positions = torch.cat([row, column], dim=1)
        visual.positional_embedding.copy_(0.5 * torch.cat([torch.zeros(1, width), positions]))


def pretrain_vit(seed: int, steps: int = VIT_STEPS) -> dict[str, torch.Tensor]:
    """Train an image encoder for tiny's text encoder: by the kinds' prompts, and by tiny's image features.

    Returns its state dict in half precision.
    """
    torch.manual_seed(seed)
    images, facts = drawings(VIT_DRAWINGS, seed)
    images, kinds = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), list(KINDS)
    label, teacher = torch.tensor([kinds.index(kind) for kind, *_ in facts]), load_clip("tiny")
    with torch.no_grad():
        taught = [teacher.encode_image((part.float() / 255 - MEAN) / STD) for part in images.split(256)]
        taught = F.normalize(torch.cat(taught), dim=-1)
        texts = encode_texts(teacher, [f"a photo of a {kind}." for kind in kinds])
    visual = CLIP(EMBED_DIM, VIT, TEXT, quick_gelu=True).float().train().visual
    fixed_start(visual)
    groups = [{"params": [], "weight_decay": rate} for rate in (0.0, 0.05)]
    for name, p in visual.named_parameters():
        groups[p.ndim >= 2 and "embedding" not in name]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=VIT_LR, betas=(0.9, 0.99))
    bar = tqdm(range(steps), "steps", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = VIT_LR * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(images), (VIT_BATCH,))
        batch = (images[rows].float() / 255 - MEAN) / STD
        if torch.rand(()) < 0.5:
            batch = batch.flip(3)
        side = int(torch.randint(SIZE * 3 // 4, SIZE + 1, ()))
        top, left = torch.randint(0, SIZE + 1 - side, (2,)).tolist()
        crop = batch[:, :, top : top + side, left : left + side]
        features = visual(F.interpolate(crop, size=SIZE, mode="bilinear", align_corners=False))
        features = F.normalize(features, dim=-1)
        loss = F.cross_entropy(20 * features @ texts.t(), label[rows]) + 1 - (features * taught[rows]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return {f"visual.{name}": value.half() for name, value in visual.state_dict().items()}


@torch.no_grad()
def report(path: str, seed: int, n: int = 2000) -> dict[str, float]:
    """Return accuracies in percent of a checkpoint on ``n`` drawings and renderings not used in pre-training."""
    backbone, block = load_clip(path), block_size(SIZE, 1 / 7, 1.0)
    kinds, vocabulary = list(KINDS), list(KINDS) + words()
    photo = encode_texts(backbone, [f"a photo of a {kind}." for kind in kinds])
    written = encode_texts(backbone, [f"the word {word}." for word in vocabulary])
    generator = torch.Generator().manual_seed(seed)

    def accuracy(images: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor) -> float:
        features = (backbone.encode_image((x - MEAN) / STD) for x in images.split(256))
        predicted = torch.cat([backbone.logits(x, texts).argmax(1) for x in features])
        return 100 * (predicted == labels).float().mean().item()

    def render(names: Sequence[str], font: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Return random labels and their blocks, in colours that pre-training did not draw."""
        labels = torch.randint(len(names), (n,), generator=generator)
        blocks = [render_blocks([names[c]], *block, seed=7919 + i, font=font) for i, c in enumerate(labels.tolist())]
        return labels, torch.cat(blocks)

    images, facts = drawings(n, seed + 1_000_003)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    kind_of = torch.tensor([kinds.index(kind) for kind, *_ in facts])
    results = {"zero-shot, pre-training styles": accuracy(images, kind_of, photo)}
    plain = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, SIZE, SIZE)
    torch.manual_seed(seed)
    places = places_of(torch.rand(n, 2, dtype=torch.float64), SIZE, block, "random")
    fonts = {"": "", ", unseen font": str(FONT_FOLDER / UNSEEN_FONT)}
    texts = {"the class name on the default block, among class names": (kinds, photo)}
    texts["any word on the default block, among all words"] = (vocabulary, written)
    for (title, (names, text)), (suffix, font) in product(texts.items(), fonts.items()):
        labels, blocks = render(names, font)
        results[f"read {title}{suffix}"] = accuracy(paste(plain, blocks, places), labels, text)
    labels, blocks = render(kinds)
    for result, expected in (("the drawing is recognised", kind_of), ("the block is read", labels)):
        results[f"drawing with any class's block: {result}"] = accuracy(paste(images, blocks, places), expected, photo)
    return results


def sheet(path: str, seed: int, columns: int = 12) -> None:
    """Plot what pre-training sees, a row for each style and one for words, above the two styles it never sees."""
    random = RandomState([seed, 7])
    kinds = random.permutation(list(KINDS))[:columns].tolist()
    samples = Samples(*drawings(4 * columns, seed), seed, 40 * columns, 0)
    with_words = (image for image, caption in samples if "word" in caption)
    rows = {f"pre-training\n{style}": style for style in PRETRAINING_STYLES}
    rows |= {"pre-training\nwords": "", "Shapes": "scene", "ShapesShifted": "chalk"}
    figure = Figure(figsize=(columns, len(rows) * 1.03), layout="constrained")
    for axes, (title, style) in zip(figure.subplots(len(rows), columns), rows.items()):
        axes[0].set_ylabel(title, fontsize=7)
        for axis, kind in zip(axes, kinds):
            image = draw(kind, STYLES[style], random, SIZE).image if style else next(with_words).permute(1, 2, 0)
            axis.imshow(np.asarray(image))
            axis.set(xticks=[], yticks=[], frame_on=False)
    figure.savefig(path, dpi=110)


def arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="tiny_clip.pt", help="state dict to write (default: %(default)s)")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--vit", action="store_true", help="train the vision transformer of tiny-vit instead")
    parser.add_argument("--agreeing", type=int, metavar="STEPS", help="fine-tune tiny on words that name drawings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report-only", action="store_true", help="evaluate the file --out")
    parser.add_argument("--sheet", help="plot samples into this file and do nothing else")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = arguments(argv)
    try:
        if args.sheet:
            sheet(args.sheet, args.seed)
            return 0
        if not args.report_only:
            if not (folder := Path(args.out).absolute().parent).is_dir():
                raise UserError(f"{folder}: no such folder; correct --out")
            torch.save(pretrain_vit(args.seed) if args.vit else pretrain(args), args.out)
        results = report("tiny-vit" if args.vit else args.out, args.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({key: round(value, 2) for key, value in results.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
