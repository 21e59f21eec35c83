"""VPT: equal to the code of DPT's authors and to plain loops; trains, evaluates and resumes like every method."""

import pytest
import torch
from conftest import GOLDEN, differences, interrupt, save_clip, start
from helpers import method_config
from reference import Reference, check_parameters, runs_of
from tiny import NAMES, arguments

from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.image_batch import ImageBatch
from trainers.vpt import CustomCLIP

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2].startswith("vpt")]


def build(classnames, backbone, **options):
    torch.manual_seed(0)
    return CustomCLIP(method_config("VPT", **options), classnames, backbone)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    return save_clip("vit", tmp_path_factory)


@pytest.fixture
def vit_run(data_root, vit_file, tmp_path):
    """Run a trainer that needs a vision transformer, in ``tmp_path / out``."""

    def call(trainer, *opts, out="run", flags=(), status=0, prepare=lambda trainer: None, backbone=vit_file):
        argv = arguments(trainer, data_root, backbone, tmp_path / out, "OPTIM.LR", 0.02, *opts, flags=flags)
        argv = [word.replace("photo64_ep50", "tiny96_ep10") for word in argv]
        found = start([*argv, "INPUT.SIZE", "(64, 64)"], prepare)
        assert found.status == status, found.error
        return found

    return call


def norm(x, layer):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / ((centred**2).mean(dim=-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def naive_vit(visual, image, tokens, keep=False):
    """(E,) feature of one image; ``tokens(i, x)`` are appended to the input of block i. One query at a time."""
    size = visual.conv1.kernel_size[0]
    cells = [image[:, y : y + size, x : x + size] for y in range(0, 64, size) for x in range(0, 64, size)]
    patches = [torch.stack([(kernel * cell).sum() for kernel in visual.conv1.weight]) for cell in cells]
    x = norm(torch.stack([visual.class_embedding, *patches]) + visual.positional_embedding, visual.ln_pre)
    n_own = len(x)
    for i, block in enumerate(visual.transformer.resblocks):
        x = torch.cat([x, tokens(i, x)])
        q, k, v = (norm(x, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
        attended = torch.stack([torch.softmax(k @ query / len(query) ** 0.5, dim=0) @ v for query in q])
        x = x + attended @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        hidden = norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
        hidden = hidden / (1 + (-1.702 * hidden).exp())
        x = x + hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
        x = x if keep else x[:n_own]
    return norm(x[0], visual.ln_post) @ visual.proj


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original(tmp_path, stem, arch, run):
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone = found.clip(arch, tmp_path)
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    model = build(found.meta["classnames"], backbone, N_CTX=initial["ctx"].shape[1])
    model.learned.load_state_dict(initial)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    logits = model.score(images, model.text_features()).detach()
    torch.testing.assert_close(logits, found.tensor(f"{arch}/{run}/logits"), rtol=1e-5, atol=1e-4)
    optim = torch.optim.SGD(model.learned.parameters(), lr=found.meta["lr"][run])
    found.check_steps(model, images, f"{arch}/{run}/", optim)
    check_parameters(model.learned.state_dict(), initial, final, rtol=1e-4, share=1e-4)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_scores_and_gradients_match_loops(vit_file, depth):
    backbone = load_clip(vit_file).double()
    model = build(["cup", "wind_chime", "face"], backbone, N_CTX=2, DEPTH=depth).double()
    ctx = model.learned.ctx
    assert ctx.shape == (2 if depth == "deep" else 1, 2, 64)
    ctx.data *= 20
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    text, shapes = model.text_features(), []
    hook = backbone.visual.transformer.register_forward_hook(lambda *call: shapes.append(sorted(call[-1].shape[:2])))
    scores = model.score(ImageBatch(backbone, pixels), text)
    hook.remove()
    assert shapes == [[3, 17]]  # the tokens are gone: some towers average all they find
    rows = []
    for image in pixels:
        x = naive_vit(backbone.visual, image, lambda i, _: ctx[i] if i < len(ctx) else ctx[0, :0], depth == "shallow")
        rows.append(torch.stack([backbone.logit_scale.exp() * (x / x.norm()) @ t for t in text]))
    torch.testing.assert_close(scores, torch.stack(rows), rtol=1e-9, atol=1e-9)
    weights = torch.randn(3, 3).double()
    ours, loops = (torch.autograd.grad((s * weights).sum(), ctx)[0] for s in (scores, torch.stack(rows)))
    torch.testing.assert_close(ours, loops, rtol=1e-7, atol=1e-9)
    assert (ours.abs().amax(dim=2) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_both_packages_agree(vit_file, depth):
    """open_clip's blocks take (B, L, D), those of OpenAI's ``clip`` (L, B, D)."""
    pytest.importorskip("clip.model")
    pixels, scores = torch.randn(3, 3, 64, 64), []
    for provider in ("open_clip", "clip"):
        model = build(NAMES, load_clip(vit_file, provider), DEPTH=depth)
        scores.append(model.score(ImageBatch(model.backbone, pixels), model.text_features()))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_base_to_new(vit_run, tmp_path, depth):
    """The tokens serve new classes too; batches, and features stored by another method, make no difference."""
    own = "TRAINER.VPT.DEPTH", depth
    stored = "TEST.FEATURES", tmp_path / "features.sqlite"
    vit_run("CLIPAdapter", *stored, out="adapter")
    trained = vit_run("VPT", *own, *stored, out="base")
    flags = ["--eval-only", "--model-dir", trained.folder]
    others = "DATALOADER.TEST.BATCH_SIZE", 3, "DATALOADER.TEST.SAMPLER", "RandomSampler", "DATALOADER.NUM_WORKERS", 1
    base = vit_run("VPT", *own, *stored, *others, out="again", flags=flags)
    assert base.trainer.evaluation.predictions == trained.trainer.evaluation.predictions
    new = vit_run("VPT", *own, "DATASET.SUBSAMPLE_CLASSES", "new", out="new", flags=flags)
    assert new.results["classes"] == 4 and new.trainer.classnames == NAMES[4:]
    assert torch.equal(new.trainer.model.learned.ctx, trained.trainer.model.learned.ctx)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_interrupted_run_ends_as_an_unbroken_one(vit_run, depth):
    opts = "TRAINER.VPT.DEPTH", depth, "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1
    unbroken = vit_run("VPT", *opts, out="unbroken")
    with pytest.raises(KeyboardInterrupt):
        vit_run("VPT", *opts, prepare=interrupt(2))
    assert differences(unbroken.outcome, vit_run("VPT", *opts).outcome) == []


def test_mistakes_are_one_line(vit_run, rn_file):
    (line,) = vit_run("VPT", "TRAINER.VPT.DEPTH", "middle", status=2).error.splitlines()
    assert line == "error: TRAINER.VPT.DEPTH middle: choose one of deep, shallow"
    (line,) = vit_run("VPT", "TRAIN.COMPILE", True, status=2).error.splitlines()
    assert line.startswith("error: TRAIN.COMPILE True: must be False: ")
    with pytest.raises(UserError, match="VPT adds tokens to a vision transformer.* choose ViT-B/16"):
        build(NAMES, load_clip(rn_file))
    (line,) = vit_run("VPT", status=2, backbone=rn_file).error.splitlines()
    assert "VPT adds tokens to a vision transformer" in line
