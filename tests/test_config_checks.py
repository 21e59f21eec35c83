"""Every mistake of a config is said, all of them at once, before any data or weights are loaded."""

import contextlib
import inspect
import io

import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.optim import build_lr_scheduler, build_optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, SIZE, arguments, clip_state_dict

import train
import trainers
from trainers.prompting import checks
from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.names import flat_config

TRAINERS = ["CoOp", "CoCoOp", "LoGoPrompt", "LinearProbe", "ZeroshotCLIP", "ZeroshotCLIP2"]
NAN, INF = float("nan"), float("inf")
NUMBER = [-1.0, NAN, INF]  # not at least 0
SHARE = [-0.1, 1.5, NAN]
COUNT = [0, -1]  # not at least 1
TEXT = ["left", ""]

# For every key that has a rule values that break it.
SHARED = {
    "SEED": [-2],
    "INPUT.SIZE": [(64,), (64, 64, 3), (0, 64), (64.5, 64), ("a", "b")],
    "INPUT.INTERPOLATION": TEXT,
    "INPUT.TRANSFORMS": [("normalize", "foo"), (1,), ("",)],
    "INPUT.NO_TRANSFORM": [True],
    "INPUT.PIXEL_MEAN": [(0.5,), (0.5, 0.5, NAN), (0.5, 0.5, "x")],
    "INPUT.PIXEL_STD": [(0.5,), (0.5, 0.5, 0.0), (0.5, 0.5, -1)],
    "INPUT.CROP_PADDING": [-1],
    "INPUT.RRCROP_SCALE": [(0.5,), (0.0, 1.0), (0.8, 0.5), (0.5, 1.5), ("a", "b")],
    "INPUT.CUTOUT_N": [-1],
    "INPUT.CUTOUT_LEN": COUNT,
    "INPUT.GN_STD": NUMBER,
    **{f"INPUT.COLORJITTER_{which}": NUMBER for which in "BCS"},
    "INPUT.COLORJITTER_H": [-0.1, 0.6],
    "INPUT.RGS_P": SHARE,
    "INPUT.GB_P": SHARE,
    "INPUT.GB_K": [0, -1, 4],
    "DATASET.NUM_SHOTS": [-2],
    "DATASET.SUBSAMPLE_CLASSES": ["old", ""],
    "DATALOADER.NUM_WORKERS": [-1],
    "DATALOADER.K_TRANSFORMS": [0, 2],
    "DATALOADER.TRAIN_X.SAMPLER": TEXT,
    "DATALOADER.TRAIN_X.BATCH_SIZE": COUNT,
    "DATALOADER.TRAIN_X.N_DOMAIN": [-2],
    "DATALOADER.TRAIN_X.N_INS": COUNT,
    "DATALOADER.TEST.SAMPLER": ["RandomClassSampler", ""],
    "DATALOADER.TEST.BATCH_SIZE": COUNT,
    "MODEL.INIT_WEIGHTS": ["/nowhere/x.pt"],
    "OPTIM.NAME": ["sdg", ""],
    "OPTIM.LR": NUMBER,
    "OPTIM.WEIGHT_DECAY": NUMBER,
    "OPTIM.MOMENTUM": SHARE,
    "OPTIM.SGD_DAMPNING": [-1, 2],
    "OPTIM.STAGED_LR": [True],
    "OPTIM.RMSPROP_ALPHA": SHARE,
    "OPTIM.ADAM_BETA1": [*SHARE, 1.0],
    "OPTIM.ADAM_BETA2": [*SHARE, 1.0],
    "OPTIM.LR_SCHEDULER": ["cosin", ""],
    "OPTIM.STEPSIZE": [(), (0,), (1.5,), ("a",)],
    "OPTIM.GAMMA": [0.0, *NUMBER],
    "OPTIM.MAX_EPOCH": COUNT,
    "OPTIM.WARMUP_EPOCH": [-2],
    "OPTIM.WARMUP_TYPE": TEXT,
    "OPTIM.WARMUP_CONS_LR": NUMBER,
    "OPTIM.WARMUP_MIN_LR": NUMBER,
    "TRAIN.CHECKPOINT_FREQ": [-2],
    "TRAIN.PRINT_FREQ": COUNT,
    "TRAIN.DECODED_GB": NUMBER,
    "TRAIN.TEXT_CHUNK": [-1],
    "TEST.EVALUATOR": TEXT,
    "TEST.SPLIT": ["train", ""],
    "TEST.FINAL_MODEL": ["best", ""],
    "TEST.FEATURES": ["/"],
    "TEST.FEATURES_GB": NUMBER,
}
CONTEXT = {"N_CTX": [0, -1, 61], "CTX_INIT": [" ", "a " * 61], "PREC": ["fp8", ""]}
OWN = {
    "CoOp": {**CONTEXT, "CLASS_TOKEN_POSITION": TEXT},
    "CoCoOp": {**CONTEXT, "CHUNK": COUNT},
    "LinearProbe": {"PREC": ["fp8", ""], "C": NUMBER},
    "LoGoPrompt": {
        **CONTEXT,
        "TEXT_PROMPT": TEXT,
        "STAGE1_EPOCHS": [-2, 51],
        "STAGE2_LR": NUMBER,
        "MLP_REDUCTION": COUNT,
        "VISUAL_PROMPT": TEXT,
        "VISUAL_LR": NUMBER,
        "K": COUNT,
        "LOSS": TEXT,
        "BLOCK_HEIGHT": [0.0, *SHARE],
        "BLOCK_WIDTH": [0.0, *SHARE],
        "LOCATION": TEXT,
        "VIEWS": [-1],
        "MIN_CONTRAST": [0.9, 11.0, NAN],
        "FONT": ["/nowhere/font.ttf", __file__],
        "ADAPTER_LR": NUMBER,
        "ADAPTER_ALPHA": NUMBER,
        "ADAPTER_BETA": NUMBER,
        "ADAPTER_SEARCH": [True],
    },
}
CROSSED = {"STAGE1_EPOCHS", "FONT", "ADAPTER_SEARCH"}  # rules of LoGoPrompt beside its table


def bad_values(trainer):
    own = {f"TRAINER.{trainer.upper()}.{key}": values for key, values in OWN.get(trainer, {}).items()}
    return {**SHARED, **own}


def config(trainer, **values):
    """A config that is right, but for some values."""
    cfg = get_cfg_default()
    train.extend_cfg(cfg)
    cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME, cfg.OPTIM.MAX_EPOCH = trainer, "tiny", 50
    for key, value in values.items():
        *path, leaf = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[leaf] = value
    return cfg


def complaints(cfg):
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME).complaints(cfg)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "rn.pt"
    torch.save(clip_state_dict("rn", layers=1), path)
    return load_clip(str(path))


def test_there_is_a_bad_value_for_every_rule():
    assert SHARED.keys() == checks.SHARED.keys()
    for trainer in TRAINERS:
        rules = TRAINER_REGISTRY.get(trainer).rules
        assert OWN.get(trainer, {}).keys() == rules.keys() | (CROSSED if trainer == "LoGoPrompt" else set())


def test_every_key_of_ours_has_a_rule_or_needs_none():
    """Whoever adds a key has to think of its values: only these may be anything of their type."""
    ours = flat_config(config("CoOp")).keys() - flat_config(get_cfg_default()).keys()
    free = {"TRAINER.COOP.CSC", "DATASET.SPLIT_SEED", "TRAIN.COMPILE"}
    free |= {f"TRAINER.LOGOPROMPT.{key}" for key in ("TUNE_VISUAL", "ADAPTER", "ADAPTER_EPOCHS", "VISUAL_SEED")}
    ruled = set().union(*(bad_values(trainer) for trainer in TRAINERS))
    assert ours - ruled == free


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_bad_value_is_refused_by_its_key(trainer):
    assert complaints(config(trainer)) == []
    for key, values in bad_values(trainer).items():
        for value in values:
            found = complaints(config(trainer, **{key: value}))
            assert len(found) == 1 and found[0].startswith(f"{key} "), (key, value, found)
            assert len(found[0].splitlines()) == 1 and ": " in found[0]


@pytest.mark.parametrize(
    "trainer, values, key",
    [
        ("LoGoPrompt", {"TRAINER.LOGOPROMPT.ADAPTER": True, "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS": 51}, "ADAPTER_EPOCHS"),
        ("LoGoPrompt", {"TRAINER.LOGOPROMPT.ADAPTER": True, "TRAINER.LOGOPROMPT.STAGE1_EPOCHS": 41}, "STAGE1_EPOCHS"),
        ("LoGoPrompt", {"TRAINER.LOGOPROMPT.TUNE_VISUAL": True, "TRAINER.LOGOPROMPT.VISUAL_PROMPT": "none"}, "TUNE"),
        ("LoGoPrompt", {"TRAINER.LOGOPROMPT.TUNE_VISUAL": True, "TRAINER.LOGOPROMPT.VIEWS": 2}, "VIEWS"),
        ("CoOp", {"OPTIM.NAME": "sgd", "OPTIM.SGD_NESTEROV": True, "OPTIM.MOMENTUM": 0.0}, "OPTIM.NAME sgd: Nesterov"),
        ("CoOp", {"INPUT.TRANSFORMS": ("random_crop", "gaussian_blur"), "INPUT.GB_K": 2}, "INPUT.GB_K"),
        ("CoOp", {"MODEL.BACKBONE.NAME": ""}, "MODEL.BACKBONE.NAME"),
        ("ZeroshotCLIP", {"MODEL.BACKBONE.NAME": "RN51"}, "MODEL.BACKBONE.NAME RN51"),
        ("ZeroshotCLIP", {"MODEL.BACKBONE.NAME": "ViT-B-16/none"}, "MODEL.BACKBONE.NAME ViT-B-16/none"),
    ],
)
def test_values_that_do_not_go_together(trainer, values, key):
    (line,) = complaints(config(trainer, **values))
    assert key in line


def test_dassl_s_hook_refuses_too():
    """In a CoOp code base there is no train.py of ours: Dassl asks a trainer before it loads anything."""
    for trainer in TRAINERS:
        kind = TRAINER_REGISTRY.get(trainer)
        kind.check_cfg(kind.__new__(kind), config(trainer))
        with pytest.raises(UserError) as caught:
            kind.check_cfg(kind.__new__(kind), config(trainer, **{"OPTIM.LR": -1.0, "OPTIM.MAX_EPOCH": 0}))
        assert [line.split()[0] for line in str(caught.value).splitlines()] == ["OPTIM.LR", "OPTIM.MAX_EPOCH"]


# ------------------------------------------------------------------------------------------------- files, command line


@pytest.fixture
def ends(data_root, rn_file, tmp_path, capsys, monkeypatch):
    """Lines that ``train.py`` ends with, having loaded nothing."""

    def nothing(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("trainers.prompting.trainer.load_clip", nothing)
    monkeypatch.setattr("trainers.prompting.trainer.DataManager", nothing)

    def call(*opts, trainer="LoGoPrompt", **files):
        argv = arguments(trainer, data_root, rn_file, tmp_path / "out", *opts)
        for flag, path in files.items():
            argv[argv.index("--" + flag.replace("_", "-")) + 1] = str(path)
        assert train.main(argv) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert all(line.startswith("error: ") for line in error.splitlines()), error
        return [line[len("error: ") :] for line in error.splitlines()]

    return call


def test_all_mistakes_are_said_at_once(ends, tmp_path):
    """Two files, the flags' names and the command line; unknown keys, wrong types, impossible values."""
    data, method = tmp_path / "data.yaml", tmp_path / "method.yaml"
    data.write_text("DATASET: {NAME: Caltech102, NUM_SHOT: 4}\nINPUTS: 3\n")
    method.write_text("OPTIM:\n  LR: fast\n  MAX_EPOCH: 1.5\n  7: x\nTRAIN: 4\nTRAINER: {LOGOPROMPT: {K: 0}}\n")
    more = ("TRAINER.LOGOPROMPT.LOCATION", "left", "OPTIM.LRR", 1, "TEST.NO_TEST", 1, "INPUT.SIZE", 64, "OPTIM", 3)
    lines = ends(*more, "DATALOADER.NUM_WORKERS", dataset_config_file=data, config_file=method)
    for part in (
        f"{data}: unknown key DATASET.NUM_SHOT, perhaps DATASET.NUM_SHOTS",
        f"{data}: unknown key INPUTS",
        f"{method}: OPTIM.LR 'fast': must be a number, not a string",
        f"{method}: OPTIM.MAX_EPOCH 1.5: must be a whole number, not a number",
        f"{method}: unknown key OPTIM.7",
        f"{method}: TRAIN: a group of keys, not a key",
        "command line: unknown key OPTIM.LRR, perhaps OPTIM.LR",
        "command line: TEST.NO_TEST 1: must be True or False, not a whole number",
        "command line: INPUT.SIZE 64: must be a list, not a whole number",
        "command line: OPTIM: a group of keys, not a key",
        "command line: DATALOADER.NUM_WORKERS: a value is missing",
        "TRAINER.LOGOPROMPT.K 0: must be at least 1",
        "TRAINER.LOGOPROMPT.LOCATION left: choose one of random, top, bottom",
        'unknown data set (DATASET.NAME, --dataset-config-file) "Caltech102", perhaps Caltech101',
    ):
        assert sum(line.startswith(part) for line in lines) == 1, (part, lines)
    assert len(lines) == 14


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_says_them_all(ends, trainer):
    lines = ends("OPTIM.LR", -1, "DATALOADER.TEST.BATCH_SIZE", 0, "TEST.SPLIT", "x", "SEED", -5, trainer=trainer)
    assert [line.split()[0] for line in lines] == ["SEED", "DATALOADER.TEST.BATCH_SIZE", "OPTIM.LR", "TEST.SPLIT"]


def test_every_key_refuses_another_type():
    """Merged by what it was before, whoever defined it (Dassl or we)."""
    cfg = config("CoOp")
    for key, old in flat_config(cfg).items():
        for value in (True, 3, 2.5, "some words", (1, 2), None, {"a": 1}):
            fits = type(value) is type(old) or (isinstance(old, (tuple, list)) and isinstance(value, tuple))
            wrong = train.merge_pairs(cfg.clone(), [key, value])
            if fits or (isinstance(old, float) and type(value) is int):
                assert wrong == []
            else:
                assert len(wrong) == 1 and wrong[0].startswith(f"command line: {key} ") and "must be" in wrong[0]


def test_a_whole_number_is_a_number(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("OPTIM: {LR: 2, WEIGHT_DECAY: 5e-4}\n")  # 5e-4 is a text in YAML
    cfg = config("CoOp")
    assert train.merge_file(cfg, str(path), "--config-file") == []
    assert (cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY) == (2.0, 5e-4) and type(cfg.OPTIM.LR) is float
    assert train.merge_pairs(cfg, ["OPTIM.LR", "3", "INPUT.SIZE", "[32, 32]", "OPTIM.NAME", "'sgd'"]) == []
    assert type(cfg.OPTIM.LR) is float and cfg.OPTIM.LR == 3.0
    assert cfg.INPUT.SIZE == (32, 32) and cfg.OPTIM.NAME == "sgd"
    assert train.merge_pairs(cfg, ["OPTIM.MAX_EPOCH", "2.0"]) != []
    assert train.merge_pairs(cfg, ["OPTIM.LR", "1" + 400 * "0"]) != []  # too large for one


def test_files_are_merged_as_yacs_merges_them(tmp_path):
    """Files and pairs give what yacs itself makes of them."""
    from conftest import ROOT

    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        ours, theirs = config("CoOp"), config("CoOp")
        assert train.merge_file(ours, str(path), "--config-file") == []
        theirs.merge_from_file(str(path))
        assert ours == theirs
    pairs = ["OPTIM.LR", "1e-5", "INPUT.TRANSFORMS", "('normalize',)", "DATASET.ROOT", "/data", "OPTIM.NAME", "sgd"]
    assert train.merge_pairs(ours, pairs) == []
    theirs.merge_from_list(pairs)
    assert ours == theirs
    (tmp_path / "whole.yaml").write_text(theirs.dump())  # config.yaml of a run
    again = config("CoOp")
    assert train.merge_file(again, str(tmp_path / "whole.yaml"), "--config-file") == [] and again == theirs


# ------------------------------------------------------------------------------------------------- by chance


def shares():
    return st.floats(0.01, 1.0)


@st.composite
def valid(draw, trainer):
    """Values of any keys that go together."""
    epochs = draw(st.integers(1, 6))
    values = {
        "OPTIM.MAX_EPOCH": st.just(epochs),
        "OPTIM.NAME": st.sampled_from(checks.AVAI_OPTIMS),
        "OPTIM.LR": st.one_of(st.integers(0, 2), st.floats(0, 10)),
        "OPTIM.WEIGHT_DECAY": st.floats(0, 1),
        "OPTIM.MOMENTUM": st.floats(0, 0.99),
        "OPTIM.LR_SCHEDULER": st.sampled_from(checks.AVAI_SCHEDS),
        "OPTIM.STEPSIZE": st.lists(st.integers(1, 9), min_size=1, max_size=3).map(lambda x: tuple(sorted(x))),
        "OPTIM.WARMUP_EPOCH": st.integers(-1, 3),
        "OPTIM.WARMUP_TYPE": st.sampled_from(["constant", "linear"]),
        "INPUT.TRANSFORMS": st.lists(
            st.sampled_from(["random_resized_crop", "random_flip", "normalize", "colorjitter", "gaussian_blur"])
        ).map(tuple),
        "INPUT.INTERPOLATION": st.sampled_from(list(checks.INTERPOLATION_MODES)),
        "DATASET.NUM_SHOTS": st.integers(-1, 16),
        "DATASET.SUBSAMPLE_CLASSES": st.sampled_from(["all", "base", "new"]),
        "DATALOADER.TRAIN_X.BATCH_SIZE": st.integers(1, 64),
        "DATALOADER.NUM_WORKERS": st.integers(0, 8),
        "TRAIN.CHECKPOINT_FREQ": st.integers(0, 5),
        "TEST.FINAL_MODEL": st.sampled_from(["last_step", "best_val"]),
        "SEED": st.integers(-1, 99),
    }
    context = {
        "N_CTX": st.integers(1, 60),
        "CTX_INIT": st.sampled_from(["", "a photo of a", "word " * 10]),
        "PREC": st.sampled_from(checks.PRECISIONS),
    }
    own = {
        "CoOp": {**context, "CSC": st.booleans(), "CLASS_TOKEN_POSITION": st.sampled_from(["end", "middle", "front"])},
        "CoCoOp": {**context, "CHUNK": st.integers(1, 99)},
        "LoGoPrompt": {
            **context,
            "TEXT_PROMPT": st.sampled_from(["two_stage", "generic"]),
            "STAGE1_EPOCHS": st.integers(-1, epochs - max(1, epochs // 5)),
            "STAGE2_LR": st.floats(0, 1),
            "MLP_REDUCTION": st.integers(1, 100),
            "VISUAL_PROMPT": st.sampled_from(["selection", "paired", "text_augmentation"]),
            "K": st.integers(1, 20),
            "LOSS": st.sampled_from(["paper", "infonce"]),
            "BLOCK_HEIGHT": shares(),
            "BLOCK_WIDTH": shares(),
            "LOCATION": st.sampled_from(["random", "top", "bottom"]),
            "MIN_CONTRAST": st.floats(1, 10),
            "VISUAL_SEED": st.integers(),
            "TUNE_VISUAL": st.booleans(),
            "ADAPTER": st.booleans(),
        },
    }
    values.update({f"TRAINER.{trainer.upper()}.{key}": value for key, value in own[trainer].items()})
    return draw(st.fixed_dictionaries({"OPTIM.MAX_EPOCH": values.pop("OPTIM.MAX_EPOCH")}, optional=values))


def merged(trainer, values):
    cfg = config(trainer, **{"INPUT.SIZE": (SIZE, SIZE)})
    assert train.merge_pairs(cfg, [word for key, value in values.items() for word in (key, value)]) == []
    return cfg


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp", "LoGoPrompt"])
def test_any_valid_config_passes_and_builds(trainer, backbone):
    @settings(max_examples=25)
    @given(values=valid(trainer))
    def check(values):
        cfg = merged(trainer, values)
        assert complaints(cfg) == []
        with contextlib.redirect_stdout(io.StringIO()):
            assert build_transform(cfg, is_train=True) and build_transform(cfg, is_train=False)
            kind = TRAINER_REGISTRY.get(trainer)
            network = kind.network(cfg, NAMES, backbone)
        optimizer = build_optimizer(network.prompt_learner, cfg.OPTIM)
        assert build_lr_scheduler(optimizer, cfg.OPTIM)
        if trainer == "LoGoPrompt":
            built = kind.__new__(kind)
            built.cfg, built.prompt_learner, built.model = cfg, network.prompt_learner, network
            epochs = [stage.MAX_EPOCH for stage in built.stages()]
            assert sum(epochs) == cfg.OPTIM.MAX_EPOCH and min(epochs) >= 0

    check()


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp", "LoGoPrompt"])
def test_any_corrupted_config_is_refused_by_its_keys(trainer):
    bad = [(key, value) for key, values in bad_values(trainer).items() for value in values]

    @given(
        values=valid(trainer), wrong=st.lists(st.sampled_from(bad), min_size=1, max_size=4, unique_by=lambda x: x[0])
    )
    def check(values, wrong):
        cfg = merged(trainer, {"TRAINER.LOGOPROMPT.TEXT_PROMPT": "two_stage", **values})
        for key, value in wrong:
            *path, leaf = key.split(".")
            node = cfg
            for part in path:
                node = node[part]
            node[leaf] = value
        if cfg.TRAINER.LOGOPROMPT.ADAPTER or cfg.TRAINER.LOGOPROMPT.TEXT_PROMPT != "two_stage":
            wrong = [w for w in wrong if w[0].split(".")[-1] not in ("ADAPTER_SEARCH", "STAGE1_EPOCHS")]
        found = {line.split()[0] for line in complaints(cfg)}
        assert {key for key, _ in wrong} <= found

    check()


def test_a_file_cannot_make_much_of_a_little(ends, tmp_path):
    """References that refer to references: a value of 3^8 parts is refused, and not repeated in the message."""
    path = tmp_path / "my.yaml"
    laughs = "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu"))
    path.write_text(f"a: &a [x, x]\n{laughs}OPTIM: {{LR: *u}}\n")
    (line,) = ends(config_file=path)
    assert line.startswith(f"{path}: more than 10000 values")
    path.write_text("a: &a [*a]\n")  # itself
    assert [line.startswith(f"{path}: ") for line in ends(config_file=path)] == [True]
    path.write_text("[" * 100_000)
    assert [line.startswith(f"{path}: ") for line in ends(config_file=path)] == [True]
    for value in ("x" * 10_000, ["x"] * 10_000, [[[[["x"] * 100] * 100] * 100]] * 100):
        assert len(checks.complaint("OPTIM.NAME", value, "choose one of sgd")) < 300
        assert all(len(line) < 300 for line in train.merge_pairs(config("CoOp"), ["OPTIM.LR", value]))


def test_the_methods_all_have_complaints():
    for method in (*trainers.METHODS, trainers.zsclip):
        for _, kind in inspect.getmembers(method, inspect.isclass):
            if kind.__module__ == method.__name__ and kind.__name__ in TRAINER_REGISTRY.registered_names():
                assert kind.__name__ in TRAINERS
