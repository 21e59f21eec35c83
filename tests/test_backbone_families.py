"""Every family of open_clip's models: accepted, the same features as open_clip's own, trained by every method."""

import copy
import functools
import importlib.util
import json
import math
import shutil
from pathlib import PurePath

import families
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, interrupt, start
from dassl.config import get_cfg_default
from families import FAMILIES, SIZE, save_small
from helpers import one_line
from safetensors.torch import load_file, save_file

import backbones
import trainers
from datasets import shapes
from trainers.predictor import Predictor
from trainers.prompting import loading
from trainers.prompting.backbone import load_clip, preprocessing
from trainers.prompting.clip_model import PIXEL_MEAN, PIXEL_STD, Backbone
from trainers.prompting.prompts import PromptLearner
from trainers.prompting.text_encoder import TextEncoder, embed_tokens, encode_texts, encode_tokens

WORDS, NAMES = "a photo of a", ["cat", "fire truck", "2012 Tesla Model S", "moth"]
TRAINERS = {"CoOp": "tiny96_ep10_ctxv1", "CoCoOp": "tiny96_c4_ep10_batch1_ctxv1", "LoGoPrompt": "tiny96_ep10_ctxv1"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A family's folder, its model as open_clip has it, its tokenizer and our backbone; do not change them."""

    @functools.cache
    def load(family):
        folder = tmp_path_factory.mktemp("family")
        model = save_small(family, folder)
        name = f"local-dir:{folder}"
        return name, model, open_clip.get_tokenizer(name), load_clip(name)

    return load


class OtherTokenizer:
    """In place of those that need transformers: words, [EOT] and padding."""

    def __init__(self, context_length):
        self.context_length = context_length

    def __call__(self, texts, context_length):
        ids = [[2 + len(word) for word in text.split()] for text in texts]
        return torch.tensor([(row + [1] + context_length * [0])[:context_length] for row in ids])


every_family = pytest.mark.parametrize("family", FAMILIES)
PLAIN = [family for family, (_, causal, _, _) in FAMILIES.items() if not causal]


def test_every_architecture_is_accepted_on_the_meta_device():
    accepted, causal, refused, simple = [], [], [], open_clip.SimpleTokenizer()
    for arch in open_clip.list_models():
        config = open_clip.get_model_config(arch)
        text, size = config["text_cfg"], config["vision_cfg"]["image_size"]
        length = text.get("context_length", 77)
        try:
            model = backbones.built(arch)
        except RuntimeError as error:
            assert "hf_model_name" in text and "pip install transformers" in str(error)
            refused.append(arch)
            continue
        backbone = Backbone(model, OtherTokenizer(length) if "hf_tokenizer_name" in text else simple, arch)
        accepted.append(arch)
        assert (backbone.n_features, backbone.text_width) == (config["embed_dim"], text["width"]), arch
        assert (backbone.context_length, backbone.input_resolution) == (length, size), arch
        assert backbone.causal_text != bool(text.get("no_causal_mask") or text.get("embed_cls")), arch
        causal += [arch] * backbone.causal_text
    if open_clip.__version__.startswith("3.3."):
        assert (len(accepted), len(causal), len(refused)) == (134, 92, 10)


@every_family
@torch.no_grad()
def test_features_equal_open_clip(loaded, family):
    name, model, tokenize, backbone = loaded(family)
    assert backbone.causal_text == FAMILIES[family][1]
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images[1] = 2 * images[1].cumsum(dim=-1)
    found, expected = (F.normalize(m.encode_image(images), dim=-1) for m in (backbone, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3
    texts = [f"{WORDS} {name}." for name in NAMES] + ["moth", "the hard to see inside of a very long name"]
    raw = model.encode_text(tokenize(texts), normalize=False)
    found, prompts = encode_texts(backbone, texts), embed_tokens(backbone, encode_tokens(backbone, texts))
    torch.testing.assert_close(found, F.normalize(raw, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(TextEncoder(backbone, unit_length=False)(*prompts), raw, atol=1e-4, rtol=1e-5)
    assert (found @ found.T).fill_diagonal_(0).max() < 1 - 1e-4


@every_family
@torch.no_grad()
def test_context_of_words_equals_hand_made_prompts(loaded, family):
    """Of CoOp before training: at every position, shared or class-specific, in chunks."""
    _, model, tokenize, backbone = loaded(family)
    sentences = {"end": "a photo of a {}.", "middle": "a photo {} of a.", "front": "{} a photo of a."}
    for position, sentence in sentences.items():
        texts = [sentence.format(name) for name in NAMES]
        expected = F.normalize(model.encode_text(tokenize(texts)), dim=-1)
        for csc in (False, True):
            learner = PromptLearner(backbone, NAMES, 16, WORDS, csc, position)
            for inputs in (learner(), learner.encoder_inputs()):
                found = TextEncoder(backbone, chunk=3 * csc)(*inputs)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", PLAIN)
def test_gradients_and_prefixes_of_towers_that_are_not_causal(loaded, family):
    """One prefix per image, in chunks: values as one by one, gradients as finite differences."""
    backbone = copy.deepcopy(loaded(family)[3]).double()
    learner = PromptLearner(backbone, NAMES, ctx_init=WORDS)
    contexts = (learner.ctx.detach() + 0.3 * torch.randn(2, *learner.ctx.shape)).requires_grad_()
    weights = torch.randn(2, len(NAMES), backbone.n_features, dtype=torch.float64)
    names, eot, _ = learner.encoder_inputs()

    def outcome(chunk=0):
        return (TextEncoder(backbone, chunk)(names, eot, learner.prefix(contexts)) * weights).sum()

    for i, context in enumerate(contexts):
        expected = TextEncoder(backbone)(*learner.assemble(context.expand(len(NAMES), -1, -1)))
        found = TextEncoder(backbone)(names, eot, learner.prefix(contexts))[i]
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    (gradient,) = torch.autograd.grad(outcome(), contexts)
    (chunked,) = torch.autograd.grad(outcome(chunk=3), contexts)
    torch.testing.assert_close(chunked, gradient, atol=1e-12, rtol=1e-9)
    direction = torch.randn_like(contexts)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            contexts += step * direction
            ends.append(outcome())
    assert (ends[0] - ends[1]).item() / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy data set with few images."""
    root = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 2, "val": 1, "test": 1})
        yield root


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("quickgelu", "SigLIP-i18n")])
def test_methods_train_evaluate_resume_and_predict(loaded, data, family, tmp_path, monkeypatch):
    name, _, _, backbone = loaded(family)
    monkeypatch.setattr(loading, "load_clip", lambda *args, **kwargs: backbone)

    def argv(trainer, out, flags=()):
        config = TRAINERS.get(trainer, TRAINERS["CoOp"])
        return [
            *("--root", str(data), "--seed", "1", "--trainer", trainer, "--output-dir", str(tmp_path / out)),
            *("--dataset-config-file", str(ROOT / "configs/datasets/shapes.yaml"), "--backbone", name),
            *(
                "--config-file",
                str(ROOT / f"configs/trainers/{trainer if trainer in TRAINERS else 'CoOp'}/{config}.yaml"),
            ),
            *(*flags, "INPUT.SIZE", f"({SIZE}, {SIZE})", "INPUT.PIXEL_MEAN", str(list(backbone.pixel_mean))),
            *("INPUT.PIXEL_STD", str(list(backbone.pixel_std)), "DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "2"),
            *("DATASET.SUBSAMPLE_CLASSES", "base", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"),
            *("DATALOADER.NUM_WORKERS", "0", "TRAIN.CHECKPOINT_FREQ", "1"),
        ]

    for trainer in TRAINERS:
        with pytest.raises(KeyboardInterrupt):
            start(argv(trainer, trainer), interrupt(1))
        run = start(argv(trainer, trainer))
        assert run.status == 0 and run.trainer.start_epoch == 1, run.error
        first, learned = run.checkpoint(1)["state_dict"], run.trainer.model.learned.state_dict()
        assert any(not torch.equal(value, first[key]) for key, value in learned.items())
        predictions = run.trainer.evaluation.predictions
        again = start(argv(trainer, f"{trainer}-eval", ["--eval-only", "--model-dir", str(run.folder)]))
        assert again.trainer.evaluation.predictions == predictions
        predictor = Predictor(run.folder)
        found = list(predictor([data / path for path in list(predictions)[:2]], top=1))
        assert [predictor.classnames.index(p.classes[0]) for p in found] == list(predictions.values())[:2]
    zero_shot = start(argv("ZeroshotCLIP", "zero", ["--eval-only"]))
    assert zero_shot.status == 0 and math.isfinite(zero_shot.results["metrics"]["accuracy"])


# ------------------------------------------------------------------------------------------------- names and files


@pytest.fixture
def folder(loaded, tmp_path):
    """A copy of a small SigLIP's folder."""
    copied = tmp_path / "siglip"
    shutil.copytree(loaded("SigLIP")[0].removeprefix("local-dir:"), copied)
    return copied


def edit_config(folder, **changes):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config["model_cfg"]["text_cfg"][key] = value
    path.write_text(json.dumps(config))


def test_architecture_with_weights_of_one_s_own(loaded, monkeypatch, tmp_path, capsys):
    """Its file as safetensors or as a pickle; normalisation as in the config next to it, else as published."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", families.small_config("quickgelu"))
    name, model, _, expected = loaded("quickgelu")
    pickled = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, pickled)
    for weights in (str(pickled), f"{name.removeprefix('local-dir:')}/open_clip_model.safetensors"):
        backbone = load_clip("small", weights=weights)
        assert torch.equal(encode_texts(backbone, ["moth"]), encode_texts(expected, ["moth"]))
        assert "Activation: QuickGELU (open_clip's config of small)" in capsys.readouterr().out
    assert backbone.pixel_mean == expected.pixel_mean == (0.4, 0.4, 0.4)
    assert preprocessing("ViT-B-16-SigLIP", str(pickled))["PIXEL_MEAN"] == (0.5, 0.5, 0.5)
    assert preprocessing("RN50x4") == {"SIZE": (288, 288), "PIXEL_MEAN": PIXEL_MEAN, "PIXEL_STD": PIXEL_STD}
    assert "small without a tag" in one_line(lambda: load_clip("small/laion", weights=str(pickled)))
    assert "weights of its own" in one_line(lambda: load_clip("ViT-B/16", weights=str(pickled)))
    assert "MODEL.BACKBONE.WEIGHTS none.pt: no such file" in one_line(lambda: load_clip("small", weights="none.pt"))
    assert "cannot load it" in one_line(lambda: load_clip("ViT-M-32", weights=str(pickled)))
    assert "or give a file, MODEL.BACKBONE.WEIGHTS" in one_line(lambda: load_clip("small"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*")
def test_folders_that_are_not_models_are_refused(folder, tmp_path):
    def fault():
        return one_line(lambda: load_clip(f"local-dir:{folder}"))

    assert "no open_clip_config.json in this folder" in one_line(lambda: load_clip(f"local-dir:{tmp_path}"))
    assert f"write local-dir:{folder}" in one_line(lambda: load_clip(str(folder)))
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    save_file({**state, "logit_scale": torch.tensor(math.nan)}, weights)
    assert "logit_scale is not finite" in fault()
    weights.unlink()
    assert "cannot load it" in fault()
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "model.bin"))
    assert "a TorchScript or tar archive" in fault()
    torch.save({**state, "more": PurePath("x")}, folder / "model.bin")
    assert "cannot load it" in fault()
    (folder / "open_clip_config.json").write_text("{}")
    assert "not a config of open_clip" in fault()


def test_what_needs_transformers_or_the_hub_says_so(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    edit_config(folder, hf_tokenizer_name="timm/ViT-B-16-SigLIP")
    for name, part, near in (
        (f"local-dir:{folder}", "tokenizer (timm/ViT-B-16-SigLIP)", ""),
        ("ViT-B-16-SigLIP/webli", "tokenizer (timm/ViT-B-16-SigLIP)", "; ViT-B-16"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "text tower (roberta-base)", "; ViT-B-32 works without"),
    ):
        message = one_line(lambda n=name: load_clip(n))
        assert f"its {part} needs transformers: pip install transformers" in message and near in message
    monkeypatch.undo()

    def offline(*args, **kwargs):
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", offline)
    message = one_line(lambda: load_clip("hf-hub:timm/ViT-B-16-SigLIP"))
    assert "no route to host" in message and "give local-dir:FOLDER" in message
    edit_config(folder, hf_tokenizer_name="")
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    assert "files of its tokenizer" in one_line(lambda: load_clip(f"local-dir:{folder}"))


def test_preprocessing_is_the_backbone_s(loaded):
    """Dassl's defaults give way; other values that differ are an error with both."""
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.MODEL.BACKBONE.NAME = loaded("SigLIP")[0]
    cfg.freeze()
    loading.adopt_preprocessing(cfg)
    assert cfg.is_frozen() and tuple(cfg.INPUT.SIZE) == (SIZE, SIZE)
    assert tuple(cfg.INPUT.PIXEL_MEAN) == (0.5, 0.5, 0.5) and tuple(cfg.INPUT.PIXEL_STD) == (0.25, 0.25, 0.25)
    cfg.defrost()
    cfg.INPUT.TRANSFORMS = ("normalize",)
    loading.load_backbone(cfg, "fp32", torch.device("cpu"))
    for key, value in (("SIZE", (96, 96)), ("PIXEL_MEAN", list(PIXEL_MEAN)), ("PIXEL_STD", list(PIXEL_STD))):
        changed = cfg.clone()
        changed.INPUT[key] = value
        loading.adopt_preprocessing(changed)
        message = one_line(lambda c=changed: loading.load_backbone(c, "fp32", torch.device("cpu")))
        assert f"INPUT.{key} {tuple(value)}" in message and str(tuple(cfg.INPUT[key])) in message


@pytest.mark.parametrize("family", ["CoCa", "ConvNeXt", "SigLIP", "ViTamin", "EVA02"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_differs_by_rounding_only(loaded, family, dtype):
    full, images = loaded(family)[3], torch.randn(2, 3, SIZE, SIZE)
    half = copy.deepcopy(full).cast_weights(dtype)
    for cast, exact in zip((half.encode_image(images), encode_texts(half, NAMES)),
                           (full.encode_image(images), encode_texts(full, NAMES))):  # fmt: skip
        assert F.cosine_similarity(cast.float(), exact).min() > 0.995


def test_tool_lists_architectures_and_scores(loaded, data, monkeypatch, capsys):
    monkeypatch.setattr(open_clip, "list_models", lambda: ["RN50", "ViT-B-16-SigLIP", "coca_roberta-ViT-B-32"])
    name = loaded("SigLIP")[0]
    assert backbones.main([name, "--root", str(data)]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows}
    assert found["tiny"][:3] == ["96", "causal, [EOT]", "fast"] and float(found["tiny"][5]) > 80
    assert found[name][:3] == [str(SIZE), "bidirectional, last token", "plain"] and 0 <= float(found[name][5]) <= 100
    assert found["RN50"] == ["224", "causal, [EOT]", "fast", "102", "included", ""]
    assert found["ViT-B-16-SigLIP"][1:5] == ["bidirectional, last token", "plain", "203", "transformers"]
    if not importlib.util.find_spec("transformers"):
        assert "pip install transformers" in rows[-1][0] and rows[-1][0].endswith("nearest that works: RN50")
    assert backbones.main(["nonsense"]) == 2 and "neither" in capsys.readouterr().err
