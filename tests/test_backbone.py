"""prompting/backbone.py: the same features whichever package builds the model, one clear line for what cannot be."""

import hashlib
import importlib
import importlib.util
import sys
import types
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, SIZE, clip_state_dict

from trainers.prompting import backbone as door
from trainers.prompting.backbone import import_provider, load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.text import encode_texts


def has_openai_clip():
    try:
        return import_provider("clip").__name__ == "clip"
    except UserError:
        return False


def features(clip_model):
    image = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return clip_model.encode_image(image), encode_texts(clip_model, ["a photo of a cup.", "missile"])


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
@pytest.mark.skipif(not has_openai_clip(), reason="OpenAI's clip package is not installed")
def test_both_packages_give_the_same_features(clip_file):
    for ours, theirs in zip(features(load_clip(clip_file, "open_clip")), features(load_clip(clip_file, "clip"))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_image_features_equal_the_package_s_own(clip_file):
    clip_model = load_clip(clip_file)
    image = torch.randn(2, 3, SIZE, SIZE)
    raw = clip_model.visual(image)
    torch.testing.assert_close(clip_model.encode_image(image), raw / raw.norm(dim=-1, keepdim=True))
    assert raw.std(dim=0).max() > 1e-3  # different images, different features


def test_weights_keep_all_their_digits(clip_file):
    state = torch.load(clip_file, weights_only=True)
    loaded = load_clip(clip_file)
    assert torch.equal(loaded.positional_embedding, state["positional_embedding"])  # not rounded to float16
    assert torch.equal(loaded.visual.conv1.weight, state["visual.conv1.weight"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_of_file_gives_the_same_model(arch, tmp_path):
    from safetensors.torch import save_file

    state = clip_state_dict(arch)
    plain, wrapped, safe = (str(tmp_path / name) for name in ("a.pt", "b.pth", "c.safetensors"))
    torch.save(state, plain)
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, wrapped)
    save_file(state, safe)
    jit = str(tmp_path / "jit.pt")
    holder = _module_tree({**state, "input_resolution": torch.tensor(SIZE), "context_length": torch.tensor(77)})
    torch.jit.script(holder).save(jit)
    expected = features(load_clip(plain))
    for path in (wrapped, safe, jit):
        for a, b in zip(features(load_clip(path)), expected):
            assert torch.equal(a, b), path


def _module_tree(state):
    """Modules nested so that their state dict has the given keys: what an OpenAI archive holds, without its code."""
    root = torch.nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.register_buffer(leaf, value)
    return root


def test_it_is_frozen_and_stays_in_eval_mode(rn_file):
    clip_model = load_clip(rn_file)
    clip_model.train()
    assert not any(module.training for module in clip_model.modules())
    assert not any(parameter.requires_grad for parameter in clip_model.parameters())
    before = {k: v.clone() for k, v in clip_model.state_dict().items() if "running" in k or "tracked" in k}
    clip_model.encode_image(torch.randn(8, 3, SIZE, SIZE) * 5)
    assert before and all(torch.equal(v, clip_model.state_dict()[k]) for k, v in before.items())


def test_sizes_are_read_off_the_weights(clip_file):
    clip_model = load_clip(clip_file)
    assert (clip_model.input_resolution, clip_model.context_length, clip_model.n_head) == (SIZE, 77, 1)
    assert clip_model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_layer_norms_compute_in_float32_and_return_what_they_got(clip_file):
    for module in load_clip(clip_file).half_weights().modules():
        if isinstance(module, torch.nn.LayerNorm):
            x = torch.randn(3, module.normalized_shape[0]) * 50
            centred = x.half().float() - x.half().float().mean(-1, keepdim=True)
            expected = centred / (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
            out = module(x.half())
            assert out.dtype == torch.float16
            torch.testing.assert_close(out.float(), expected * module.weight + module.bias, atol=5e-3, rtol=5e-3)


def test_half_precision_casts_what_openai_casts(clip_file):
    full, half = load_clip(clip_file), load_clip(clip_file).half_weights()
    assert half.dtype == torch.float16 and half.text_projection.dtype == torch.float16
    assert half.ln_final.weight.dtype == torch.float32 and half.token_embedding.weight.dtype == torch.float32
    for a, b in zip(features(half), features(full)):
        torch.testing.assert_close(a.float(), b, atol=0.03, rtol=0)


def test_logits_are_cosines_over_the_temperature_in_float32(rn_file):
    clip_model = load_clip(rn_file)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 24), dim=-1) for n in (3, 5))
    logits = clip_model.logits(image, text)
    for i in range(3):
        for c in range(5):
            cosine = sum(a * b for a, b in zip(image[i].tolist(), text[c].tolist()))
            assert logits[i, c].item() == pytest.approx(100 * cosine, abs=1e-3)
    assert clip_model.logits(image.half(), text.half()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- mistakes


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_unreadable_files(tmp_path, clip_file):
    assert "no such file" in one_line(lambda: load_clip(str(tmp_path / "none.pt")))
    assert "no such file" in one_line(lambda: load_clip(str(tmp_path)))
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    assert str(text) in one_line(lambda: load_clip(str(text)))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(clip_file).read_bytes()[:5000])
    assert str(cut) in one_line(lambda: load_clip(str(cut)))
    assert "MODEL.BACKBONE.NAME is empty" in one_line(lambda: load_clip(""))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "evil.pt"
    torch.save({"visual.conv1.weight": Evil()}, path)
    assert str(path) in one_line(lambda: load_clip(str(path)))
    assert not (tmp_path / "owned").exists()


def test_other_architectures(tmp_path):
    path = str(tmp_path / "other.pt")
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    assert "OpenAI's layout" in one_line(lambda: load_clip(path))
    state = clip_state_dict("vit")
    del state["visual.ln_post.weight"]
    torch.save(state, path)
    assert "OpenAI's layout" in one_line(lambda: load_clip(path))
    torch.save([1, 2], path)
    assert "OpenAI's layout" in one_line(lambda: load_clip(path))


def test_text_towers_of_another_kind():
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    door.Backbone(CLIP(24, vision, text), SimpleTokenizer(), "plain")
    for change in ({"no_causal_mask": True}, {"pool_type": "last"}, {"vocab_size": 32000}):
        message = one_line(lambda c=change: door.Backbone(CLIP(24, vision, {**text, **c}), SimpleTokenizer(), "other"))
        assert "other" in message and "text transformer" in message


def test_unknown_names_and_tags():
    assert "RN50" in one_line(lambda: load_clip("ViT-B/17"))
    assert "laion2b" in one_line(lambda: load_clip("ViT-B-32/no_such_tag"))
    assert "neither" in one_line(lambda: load_clip("nonsense"))


def test_an_architecture_and_tag_of_open_clip_is_what_open_clip_builds(monkeypatch, clip_file):
    """No weights are at hand, so the package is given our small ones, after it was asked for the right ones."""
    import open_clip
    from open_clip.model import build_model_from_openai_state_dict as build

    asked = []

    def create_model(*args, **kwargs):
        asked.append((args, kwargs))
        state = torch.load(clip_file, weights_only=True)
        model = build(dict(state)).float()
        model.load_state_dict(state)  # with all digits
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    loaded = load_clip("ViT-B-32/laion2b_s34b_b79k")
    assert asked == [(("ViT-B-32",), {"pretrained": "laion2b_s34b_b79k", "precision": "fp32", "device": "cpu"})]
    assert loaded.name == "ViT-B-32/laion2b_s34b_b79k" and not loaded.logit_scale.requires_grad
    for ours, theirs in zip(features(loaded), features(load_clip(clip_file, "open_clip"))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_weights_that_open_clip_cannot_get_are_an_error(monkeypatch):
    import open_clip

    def create_model(*args, **kwargs):
        raise OSError("the hub does not answer\nafter three tries")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    message = one_line(lambda: load_clip("ViT-B-32/laion2b_s34b_b79k"))
    assert "MODEL.BACKBONE.NAME ViT-B-32/laion2b_s34b_b79k" in message and "the hub does not answer after" in message


def test_without_any_package_the_error_says_what_to_install(monkeypatch, clip_file):
    for package in ("clip", "open_clip"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "pip install open_clip_torch" in one_line(lambda: load_clip(clip_file))
    assert "ViT-B-32/openai" in one_line(lambda: load_clip("ViT-B-32/openai"))


def test_no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(door, "CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    message = one_line(lambda: load_clip("RN50"))
    assert "RN50" in message and "no route to host" in message and str(tmp_path) in message


@pytest.fixture
def published(monkeypatch, tmp_path, rn_file):
    """OpenAI's RN50 as if it were our small file: an address with its checksum, a cache, and no network."""
    content = Path(rn_file).read_bytes()
    url = f"https://openaipublic.azureedge.net/clip/models/{hashlib.sha256(content).hexdigest()}/RN50.pt"
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_url", lambda *args: url)
    if has_openai_clip():
        monkeypatch.setitem(importlib.import_module("clip.clip")._MODELS, "RN50", url)
    monkeypatch.setattr(door, "CACHE", str(tmp_path))
    return SimpleNamespace(content=content, path=tmp_path / "RN50.pt", asked=asked)


def test_a_cached_openai_file_is_used_without_network(published):
    published.path.write_bytes(published.content)
    assert load_clip("RN50").input_resolution == SIZE
    assert published.asked == []


@pytest.mark.filterwarnings("ignore:.*checksum does not match:UserWarning")
def test_a_file_cut_short_in_the_cache_is_not_taken_for_whole(published):
    published.path.write_bytes(published.content[:5000])
    assert "no route to host" in one_line(lambda: load_clip("RN50"))
    assert len(published.asked) == 1


def test_a_broken_or_unrelated_clip_package_falls_back_to_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))  # unrelated: no clip.model in it
    monkeypatch.delitem(sys.modules, "clip.model", raising=False)
    assert import_provider().__name__ == "open_clip"
    assert "open_clip" in one_line(lambda: import_provider("clip"))


def test_a_clip_package_that_builds_other_models_falls_back_to_open_clip(monkeypatch):
    for name in ("clip", "clip.model", "clip.simple_tokenizer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["clip.model"].build_model = lambda state_dict: None
    assert import_provider().__name__ == "clip"
    sys.modules["clip.model"].build_model = lambda state_dict, design_details: None
    assert import_provider().__name__ == "open_clip"
    assert "design_details" in one_line(lambda: import_provider("clip"))
