"""Every family of open_clip's models: accepted, the same features as open_clip's own, trained by every method."""

import copy
import functools
import math

import families
import open_clip
import pytest
import torch
import torch.nn.functional as F
from backbones import NEEDS_TRANSFORMERS, built, stand_in
from conftest import ROOT, interrupt, start
from families import FAMILIES, SIZE, save_small
from helpers import one_line

from datasets import shapes
from trainers.predictor import Predictor
from trainers.prompting import trainer as trainer_module
from trainers.prompting.backbone import load_clip, preprocessing
from trainers.prompting.clip_model import Backbone
from trainers.prompting.prompts import PromptLearner
from trainers.prompting.text_encoder import TextEncoder, encode_texts

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


every_family = pytest.mark.parametrize("family", FAMILIES)
PLAIN = [family for family, (_, causal, _, _) in FAMILIES.items() if not causal]


def test_every_architecture_is_accepted_on_the_meta_device():
    accepted, causal, refused = 0, 0, set()
    for arch in open_clip.list_models():
        if (model := built(arch)) is None:
            refused.add(arch)
            continue
        backbone = Backbone(model, stand_in(arch), arch)
        config = open_clip.get_model_config(arch)
        text, size = config["text_cfg"], config["vision_cfg"]["image_size"]
        accepted, causal = accepted + 1, causal + backbone.causal_text
        assert (backbone.n_features, backbone.text_width) == (config["embed_dim"], text["width"]), arch
        assert (backbone.context_length, backbone.input_resolution) == (text.get("context_length", 77), size), arch
        plain = text.get("no_causal_mask") or text.get("embed_cls")
        assert backbone.causal_text != bool(plain), arch
    texts = {arch: open_clip.get_model_config(arch)["text_cfg"] for arch in open_clip.list_models()}
    assert refused <= {arch for arch, text in texts.items() if "hf_model_name" in text}
    if open_clip.__version__.startswith("3.3.") and not NEEDS_TRANSFORMERS:
        assert (accepted, causal, len(refused)) == (134, 92, 10)


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
    found, expected = encode_texts(backbone, texts), F.normalize(model.encode_text(tokenize(texts)), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
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
    monkeypatch.setattr(trainer_module, "load_clip", lambda *args, **kwargs: backbone)

    def argv(trainer, out, flags=()):
        config = TRAINERS.get(trainer, TRAINERS["CoOp"])
        return [
            *("--root", str(data), "--seed", "1", "--trainer", trainer, "--output-dir", str(tmp_path / out)),
            *("--dataset-config-file", str(ROOT / "configs/datasets/shapes.yaml"), "--backbone", name),
            *("--config-file", str(ROOT / f"configs/trainers/{trainer if trainer in TRAINERS else 'CoOp'}/{config}.yaml")),
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
