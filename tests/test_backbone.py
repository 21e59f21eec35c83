"""backbone.py: the same features whichever package builds the model, and one clear line for what cannot be loaded."""

import importlib
import importlib.util
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch
from helpers import one_line
from tiny import ARCHITECTURES, SIZE, clip_state_dict

from trainers.prompting import backbone as module
from trainers.prompting.backbone import import_provider, load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.text_encoder import encode_texts


def has_openai_clip():
    try:
        return import_provider("clip").__name__ == "clip"
    except UserError:
        return False


def features(backbone):
    image = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return backbone.encode_image(image), encode_texts(backbone, ["a photo of a cup.", "missile"])


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
@pytest.mark.skipif(not has_openai_clip(), reason="OpenAI's clip package is not installed")
def test_both_packages_give_the_same_features(clip_file):
    for ours, theirs in zip(features(load_clip(clip_file, "open_clip")), features(load_clip(clip_file, "clip"))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_of_file_gives_the_same_model(arch, tmp_path):
    from safetensors.torch import save_file

    state = clip_state_dict(arch)
    plain, wrapped, safe = (str(tmp_path / name) for name in ("a.pt", "b.pth", "c.safetensors"))
    torch.save(state, plain)
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, wrapped)
    save_file({**state, "input_resolution": torch.tensor(SIZE)}, safe)
    expected = features(load_clip(plain))
    for path in (wrapped, safe):
        assert all(torch.equal(a, b) for a, b in zip(features(load_clip(path)), expected)), path
    assert torch.equal(load_clip(plain).visual.conv1.weight, state["visual.conv1.weight"])  # not rounded to float16


def test_openai_layout_is_on_the_fast_path(clip_file):
    backbone = load_clip(clip_file)
    assert backbone.causal_text and (backbone.n_features, backbone.text_width) == (24, 64)
    state = clip_state_dict("vit")
    state["token_embedding.weight"] = torch.randn(50000, 64)  # of another tokenizer
    path = Path(clip_file).parent / "other.pt"
    torch.save(state, path)
    assert "its text encoder is not OpenAI's" in one_line(lambda: load_clip(str(path)))


def test_backbone_is_frozen_in_eval_mode(rn_file):
    backbone = load_clip(rn_file)
    backbone.train()
    assert not any(part.training for part in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k or "tracked" in k}
    backbone.encode_image(torch.randn(8, 3, SIZE, SIZE) * 5)
    assert before and all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.items())


def test_image_features_are_those_of_the_package_for_different_images(clip_file):
    backbone, image = load_clip(clip_file), torch.randn(2, 3, SIZE, SIZE)
    found = backbone.encode_image(image)
    assert torch.equal(found, backbone.visual(image)) and found.std(dim=0).max() > 1e-3
    assert (backbone.input_resolution, backbone.context_length, backbone.n_head) == (SIZE, 77, 1)
    assert backbone.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_logits_equal_loop_and_are_float32(rn_file):
    backbone = load_clip(rn_file)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 24), dim=-1) for n in (3, 5))
    logits = backbone.logits(image, text)
    for i in range(3):
        for c in range(5):
            cosine = sum(a * b for a, b in zip(image[i].tolist(), text[c].tolist()))
            assert logits[i, c].item() == pytest.approx(100 * cosine, abs=1e-3)
    assert backbone.logits(image.half(), text.half()).dtype == torch.float32
    per_image = torch.stack([text, text.flip(0), text * 2])  # CoCoOp: text features of every image
    found = backbone.logits(image.unsqueeze(1), per_image).squeeze(1)
    torch.testing.assert_close(found, torch.stack([logits[0], logits[1].flip(0), logits[2] * 2]))


def test_unreadable_weights_are_refused(tmp_path, clip_file):
    path, incomplete = tmp_path / "other.pt", clip_state_dict("vit")
    del incomplete["visual.ln_post.weight"]
    for content in (b"not weights", Path(clip_file).read_bytes()[:5000]):
        path.write_bytes(content)
        assert str(path) in one_line(lambda: load_clip(str(path)))
    for content in ({"fc.weight": torch.zeros(3, 3)}, incomplete, [1, 2]):
        torch.save(content, path)
        assert "OpenAI's layout" in one_line(lambda: load_clip(str(path)))


def test_text_towers_that_are_not_openai_s_run_as_they_are():
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    eos = {"pool_type": "eos", "eos_id": 49407}
    for change, causal in (({}, True), (eos, True), ({"no_causal_mask": True}, False), ({"pool_type": "last"}, False)):
        backbone = module.probed(CLIP(24, vision, {**text, **change}), SimpleTokenizer(), "other")
        assert backbone.causal_text is causal, change
    message = one_line(lambda: module.Backbone(CLIP(24, vision, {**text, "vocab_size": 32000}), SimpleTokenizer(), "x"))
    assert "MODEL.BACKBONE.NAME x: its text transformer has 32000 tokens" in message

    class Reversed(CLIP):
        """Its text features are not those of its parts."""

        def encode_text(self, text, normalize=False):
            return super().encode_text(text).flip(-1)

    model = Reversed(24, vision, text)
    backbone = module.probed(model, SimpleTokenizer(), "other")
    assert not backbone.causal_text
    ids = torch.tensor([backbone.tokenizer.padded("a cup", 77)])
    torch.testing.assert_close(
        encode_texts(backbone, ["a cup"])[0], model.encode_text(ids)[0] / model.encode_text(ids).norm()
    )


@pytest.mark.parametrize(
    "name, fault",
    [("", "MODEL.BACKBONE.NAME is empty"), ("none.pt", "no such file"), ("/", "no such file"), ("nonsense", "neither"),
     ("ViT-B/17", "RN50"), ("ViT-B-32/no_such_tag", "laion2b")],
)  # fmt: skip
def test_unknown_names_are_refused(name, fault):
    assert fault in one_line(lambda: load_clip(name))


def test_openai_weights_without_network_are_refused(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(module, "CACHE", str(tmp_path))
    message = one_line(lambda: load_clip("RN50"))
    assert "MODEL.BACKBONE.NAME RN50" in message and "no route to host" in message and str(tmp_path) in message


def test_without_any_package_the_error_names_one_to_install(monkeypatch, clip_file):
    for package in ("clip", "open_clip"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "pip install open_clip_torch" in one_line(lambda: load_clip(clip_file))


def test_a_package_that_is_not_clip_counts_as_absent(monkeypatch):
    for name in ("clip", "clip.simple_tokenizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "clip.model", raising=False)
    assert import_provider().__name__ == "open_clip"
    assert "pip install open_clip_torch" in one_line(lambda: import_provider("clip"))


class TwoPrompts(torch.nn.Module):
    """An encoder that returns features of two prompts for every input, as PLOT's."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.image_size = encoder, encoder.image_size

    def forward(self, x):
        return self.encoder(x).unsqueeze(1).expand(-1, 2, -1)


def foreign_builds():
    """Ways in which the ``clip`` of other code bases differs: what its build_model does with a plain one."""

    def two_prompts(model):
        model.visual = TwoPrompts(model.visual)
        model.load_state_dict = lambda state_dict: None
        return model

    def wants_a_prompt(model):
        model.encode_text = lambda text, prompt: None
        return model

    def other_parameters(model):
        model.register_parameter("deep_prompt", torch.nn.Parameter(torch.zeros(2)))
        return model

    return {"shape": two_prompts, "arguments": wants_a_prompt, "parameters": other_parameters, "signature": None}


@pytest.mark.parametrize("kind", foreign_builds())
def test_a_clip_that_builds_other_models_is_replaced_by_open_clip(monkeypatch, capsys, clip_file, kind):
    import open_clip.model
    import open_clip.tokenizer

    change, plain = foreign_builds()[kind], load_clip(clip_file, "open_clip")

    def build_model(state_dict):
        torch.rand(7)
        return change(open_clip.model.build_model_from_openai_state_dict(state_dict))

    monkeypatch.setitem(sys.modules, "clip", package := types.ModuleType("clip"))
    monkeypatch.setitem(sys.modules, "clip.model", types.ModuleType("clip.model"))
    monkeypatch.setitem(sys.modules, "clip.simple_tokenizer", open_clip.tokenizer)
    package.__file__ = "/code/clip/__init__.py"
    sys.modules["clip.model"].build_model = build_model if change else lambda state_dict, design_details: None
    torch.manual_seed(0)
    found = load_clip(clip_file)
    after = torch.rand(1)
    assert "/code/clip builds no plain CLIP" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(features(found), features(plain)))
    torch.manual_seed(0)
    load_clip(clip_file, "open_clip")
    assert torch.equal(torch.rand(1), after)  # the attempt leaves no trace in the random stream
    assert "/code/clip builds no plain CLIP" in one_line(lambda: load_clip(clip_file, "clip"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert one_line(lambda: load_clip(clip_file)).endswith("pip install open_clip_torch")
