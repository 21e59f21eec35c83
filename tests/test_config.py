"""Configs: every mistake is reported, all at once and before anything is loaded; files are what their names say."""

import math
import re
from pathlib import Path

import pytest
from conftest import ROOT, start
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from tiny import arguments

import train
from trainers.prompting.config import DASSL_RULES, SHARED_KEYS, lost_overrides, violation
from trainers.prompting.errors import UserError
from trainers.prompting.names import command_settings, flat_config
from trainers.prompting.trainer import PromptTrainer

KINDS = {name: TRAINER_REGISTRY.get(name) for name in TRAINER_REGISTRY.registered_names()}
TRAINERS = sorted(name for name, kind in KINDS.items() if issubclass(kind, PromptTrainer))
NAN, INF = math.nan, math.inf
NUMBER, COUNT = [-1.0, NAN, INF], [0, -1]
NONSENSE = {float: [NAN, INF], int: [-3], str: [" ", "/", "nothing"]}  # of texts at least one is refused
ANY_VALUE = {"TRAINER.LOGOPROMPT.VISUAL_SEED", "DATASET.SPLIT_SEED", "DATASET.TITLE"}

# For every rule of Dassl's own keys, values that break it.
DASSL = {
    **dict.fromkeys(("SEED", "OPTIM.WARMUP_EPOCH", "TRAIN.CHECKPOINT_FREQ"), [-2]),
    **dict.fromkeys(("DATALOADER.TRAIN_X.BATCH_SIZE", "DATALOADER.TEST.BATCH_SIZE"), COUNT),
    **dict.fromkeys(("OPTIM.MAX_EPOCH", "TRAIN.PRINT_FREQ"), COUNT),
    **dict.fromkeys(("OPTIM.LR", "OPTIM.WEIGHT_DECAY", "OPTIM.WARMUP_CONS_LR", "OPTIM.WARMUP_MIN_LR"), NUMBER),
    **dict.fromkeys(("INPUT.NO_TRANSFORM", "OPTIM.STAGED_LR"), [True]),
    **dict.fromkeys(("DATASET.SUBSAMPLE_CLASSES", "TEST.SPLIT", "TEST.FINAL_MODEL"), ["best", ""]),
    "INPUT.SIZE": [(64,), (64, 64, 3), (0, 64), (64.5, 64), ("a", "b")],
    "INPUT.PIXEL_MEAN": [(0.5,), (0.5, 0.5, NAN), (0.5, 0.5, "x")],
    "INPUT.PIXEL_STD": [(0.5,), (0.5, 0.5, 0.0), (0.5, 0.5, -1)],
    "INPUT.RRCROP_SCALE": [(0.5,), (0.0, 1.0), (0.8, 0.5), (0.5, 1.5), ("a", "b")],
    "DATASET.NUM_SHOTS": [0, -2],
    "DATALOADER.NUM_WORKERS": [-1],
    "DATALOADER.K_TRANSFORMS": [0, 2],
    "DATALOADER.TEST.SAMPLER": ["RandomClassSampler", ""],
    "MODEL.INIT_WEIGHTS": ["/nowhere/x.pt"],
    "OPTIM.GAMMA": [0.0, *NUMBER],
}
LOGO = {
    **{"N_CTX": [0, 61], "CTX_INIT": ["a " * 61], "K": COUNT, "MLP_REDUCTION": COUNT, "MIN_CONTRAST": [0.9, 11.0]},
    **{"BLOCK_HEIGHT": [0.0, 1.5], "BLOCK_WIDTH": [0.0, 1.5], "FONT": ["/nowhere/font.ttf", __file__]},
    **{"STAGE1_EPOCHS": [51], "ADAPTER_SEARCH": [True], "ADAPTER_EPOCHS": [0]},
}


def config(trainer, **values):
    """A valid config, except for some values."""
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


def errors(trainer, **values):
    return KINDS[trainer].config_errors(config(trainer, **values))


# ------------------------------------------------------------------------------------------------- values


def check_refused(trainer, key, values):
    for value in values:
        (line,) = errors(trainer, **{key: value})
        assert line.startswith(f"{key} ") and ": " in line and len(line.splitlines()) == 1


def test_every_rule_of_dassl_s_keys_refuses():
    assert DASSL.keys() == DASSL_RULES.keys()
    for key, values in DASSL.items():
        check_refused("CoOp", key, values)
    for key, values in LOGO.items():
        check_refused("LoGoPrompt", f"TRAINER.LOGOPROMPT.{key}", values)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_key_of_a_method_refuses_nonsense(trainer):
    """Whoever adds a key decides about its values: only switches and seeds need no rule."""
    method = KINDS[trainer].method_class
    own = {f"TRAINER.{method.config_name}.{name}": key for name, key in method.keys.items()}
    assert errors(trainer) == []
    for name, key in {**SHARED_KEYS, **own}.items():
        if isinstance(key.default, bool) or name in ANY_VALUE:
            continue
        values = NONSENSE[type(key.default)]
        if isinstance(key.default, str):
            values = [value for value in values if errors(trainer, **{name: value})]
            assert values, f"{name} accepts any text"
        check_refused(trainer, name, values)


def test_all_of_our_keys_are_in_a_table():
    ours = flat_config(config("CoOp")).keys() - flat_config(get_cfg_default()).keys()
    methods = [KINDS[name].method_class for name in TRAINERS]
    tables = {f"TRAINER.{method.config_name}.{key}" for method in methods for key in method.keys}
    assert ours <= tables | SHARED_KEYS.keys() | DASSL_RULES.keys() | ANY_VALUE


@pytest.mark.parametrize("trainer, values, key", [
    ("LoGoPrompt", {"TRAINER.LOGOPROMPT.ADAPTER": True, "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS": 51}, "ADAPTER_EPOCHS 51"),
    ("LoGoPrompt", {"TRAINER.LOGOPROMPT.ADAPTER": True, "TRAINER.LOGOPROMPT.STAGE1_EPOCHS": 41}, "STAGE1_EPOCHS 41"),
    ("LoGoPrompt", {"TRAINER.LOGOPROMPT.TUNE_VISUAL": True, "TRAINER.LOGOPROMPT.VISUAL_PROMPT": "none"}, "TUNE_VISUAL"),
    ("LoGoPrompt", {"TRAINER.LOGOPROMPT.TUNE_VISUAL": True, "TRAINER.LOGOPROMPT.VIEWS": 2}, "VIEWS 2"),
    ("CoOp", {"OPTIM.NAME": "sgd", "OPTIM.SGD_NESTEROV": True, "OPTIM.MOMENTUM": 0.0}, "OPTIM.NAME sgd: Nesterov"),
    ("CoOp", {"MODEL.BACKBONE.NAME": ""}, "MODEL.BACKBONE.NAME"),
    ("ZeroshotCLIP", {"MODEL.BACKBONE.NAME": "RN51"}, "MODEL.BACKBONE.NAME RN51"),
    ("ZeroshotCLIP", {"MODEL.BACKBONE.NAME": "ViT-B-16/none"}, "MODEL.BACKBONE.NAME ViT-B-16/none"),
])  # fmt: skip
def test_values_that_exclude_each_other(trainer, values, key):
    (line,) = errors(trainer, **values)
    assert key in line


@pytest.mark.parametrize("trainer", TRAINERS)
def test_dassl_s_hook_reports_all_mistakes_too(trainer):
    """In a CoOp code base there is no train.py of ours: Dassl asks the trainer before it loads anything."""
    kind = KINDS[trainer]
    kind.check_cfg(kind.__new__(kind), config(trainer))
    wrong = {"OPTIM.LR": -1.0, "DATALOADER.TEST.BATCH_SIZE": 0, "TEST.SPLIT": "x", "SEED": -5}
    with pytest.raises(UserError) as caught:
        kind.check_cfg(kind.__new__(kind), config(trainer, **wrong))
    assert sorted(line.split()[0] for line in str(caught.value).splitlines()) == sorted(wrong)


# ------------------------------------------------------------------------------------------------- files, command line


@pytest.fixture
def fails(data_root, rn_file, tmp_path, monkeypatch):
    """Lines that ``train.py`` ends with, without having loaded anything."""
    for name in ("loading.load_clip", "trainer.DataManager"):
        monkeypatch.setattr(f"trainers.prompting.{name}", None)

    def call(*opts, **files):
        argv = arguments("LoGoPrompt", data_root, rn_file, tmp_path / "out", *opts)
        for flag, path in files.items():
            argv[argv.index("--" + flag.replace("_", "-")) + 1] = str(path)
        done = start(argv)
        assert done.status == 2 and not (tmp_path / "out").exists()
        return [line.removeprefix("error: ") for line in done.error.splitlines()]

    return call


def test_all_mistakes_are_reported_at_once(fails, tmp_path):
    """In two files, flags and the command line: unknown keys, wrong types, impossible values."""
    data, method = tmp_path / "data.yaml", tmp_path / "method.yaml"
    data.write_text("DATASET: {NAME: Caltech102, NUM_SHOT: 4}\nINPUTS: 3\n")
    method.write_text("OPTIM:\n  LR: fast\n  MAX_EPOCH: 1.5\n  7: x\nTRAIN: 4\nTRAINER: {LOGOPROMPT: {K: 0}}\n")
    more = ("TRAINER.LOGOPROMPT.LOCATION", "left", "OPTIM.LRR", 1, "TEST.NO_TEST", 1, "INPUT.SIZE", 64, "OPTIM", 3)
    lines = fails(*more, "DATALOADER.NUM_WORKERS", dataset_config_file=data, config_file=method)
    expected = (
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
    )
    for part in expected:
        assert sum(line.startswith(part) for line in lines) == 1, (part, lines)
    assert len(lines) == len(expected)


def test_every_key_refuses_another_type():
    cfg = config("CoOp")
    for key, old in flat_config(cfg).items():
        for value in (True, 3, 2.5, "some words", (1, 2), None, {"a": 1}):
            fits = type(value) is type(old) or (isinstance(old, (tuple, list)) and isinstance(value, tuple))
            wrong = train.merge_pairs(cfg.clone(), [key, value])
            if fits or (isinstance(old, float) and type(value) is int):
                assert wrong == []
            else:
                assert len(wrong) == 1 and wrong[0].startswith(f"command line: {key} ") and "must be" in wrong[0]


def test_whole_numbers_are_numbers(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("OPTIM: {LR: 2, WEIGHT_DECAY: 5e-4}\n")  # 5e-4 is a text in YAML
    cfg = config("CoOp")
    assert train.merge_file(cfg, str(path), "--config-file") == []
    assert (cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY) == (2.0, 5e-4) and type(cfg.OPTIM.LR) is float
    assert train.merge_pairs(cfg, ["OPTIM.LR", "3"]) == [] and type(cfg.OPTIM.LR) is float
    assert train.merge_pairs(cfg, ["OPTIM.MAX_EPOCH", "2.0"]) != []
    assert train.merge_pairs(cfg, ["OPTIM.LR", "1" + 400 * "0"]) != []  # too large for a float


def test_files_are_merged_as_yacs_merges_them(tmp_path):
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        ours, theirs = config("CoOp"), config("CoOp")
        assert train.merge_file(ours, str(path), "--config-file") == []
        theirs.merge_from_file(str(path))
        assert ours == theirs
    pairs = ["OPTIM.LR", "1e-5", "INPUT.TRANSFORMS", "('normalize',)", "DATASET.ROOT", "/data", "OPTIM.NAME", "sgd"]
    assert train.merge_pairs(ours, pairs) == []
    theirs.merge_from_list(pairs)
    (tmp_path / "whole.yaml").write_text(theirs.dump())  # config.yaml of a run
    again = config("CoOp")
    assert train.merge_file(again, str(tmp_path / "whole.yaml"), "--config-file") == [] and again == ours == theirs


def test_small_files_cannot_become_large_configs(fails, tmp_path):
    """References to references, to themselves, endless nesting; and messages stay short."""
    path = tmp_path / "my.yaml"
    laughs = "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu"))
    for text in (f"a: &a [x, x]\n{laughs}OPTIM: {{LR: *u}}\n", "a: &a [*a]\n", "[" * 100_000):
        path.write_text(text)
        (line,) = fails(config_file=path)
        assert line.startswith(f"{path}: ") and ("more than 10000 values" in line) == ("*u" in text)
    for value in ("x" * 10_000, ["x"] * 10_000, [[[[["x"] * 100] * 100] * 100]] * 100):
        assert len(violation("OPTIM.NAME", value, "choose one of sgd")) < 300
        assert all(len(line) < 300 for line in train.merge_pairs(config("CoOp"), ["OPTIM.LR", value]))


# ------------------------------------------------------------------------------------------------- configs/

FILES = sorted((ROOT / "configs" / "trainers").glob("*/*.yaml"))
BACKBONES = {
    **{"vit_b16": ("ViT-B/16", 224), "vit_b32": ("ViT-B/32", 224), "rn50": ("RN50", 224), "rn101": ("RN101", 224)},
    **{"tiny96": ("tiny", 96), "photo64": ("photo_clip.pt", 64)},
}
NAME = r"(?P<backbone>[a-z0-9_]+?)(_c(?P<n_ctx>\d+))?(_ep(?P<epochs>\d+))?(_batch(?P<batch>\d+))?(?P<words>_ctxv1)?"


def read_config(path):
    flags = ["--config-file", str(path), "--trainer", path.parent.name, "--output-dir", "x"]
    flags += ["DATASET.NAME", "Shapes"]
    return train.setup_cfg(train.parse_args(flags))


def test_names_of_config_files_and_their_content_agree(tmp_path, monkeypatch):
    """<backbone>[_c<M>][_ep<epochs>][_batch<B>][_ctxv1], by default 200 epochs and batches of 32.

    The scripts look for these names. A method with a schedule of its own says so at the beginning of its files.
    """
    monkeypatch.chdir(tmp_path)
    Path("photo_clip.pt").touch()  # weights that some configs name
    for path in (path for path in FILES if path.stem != "rn50_val"):
        name, cfg = re.fullmatch(NAME, path.stem), read_config(path)
        backbone, size = BACKBONES[name["backbone"]]
        assert cfg.MODEL.BACKBONE.NAME.removesuffix("-vit").endswith(backbone) and tuple(cfg.INPUT.SIZE) == (
            size,
            size,
        ), path
        if not path.read_text().startswith("# Schedule: "):
            assert int(name["epochs"] or 200) == cfg.OPTIM.MAX_EPOCH, path
            assert int(name["batch"] or 32) == cfg.DATALOADER.TRAIN_X.BATCH_SIZE, path
        method = KINDS[path.parent.name].method_class
        if "CTX_INIT" in method.keys:
            options = cfg.TRAINER[method.config_name]
            words = name["words"] or "also without _ctxv1" in path.read_text()
            assert ("a photo of a" if words else "") == options.CTX_INIT, path
            assert words or int(name["n_ctx"] or 16) == options.N_CTX, path
            assert (cfg.OPTIM.NAME, cfg.OPTIM.LR_SCHEDULER) == ("sgd", "cosine"), path


def test_numbers_of_the_command_that_a_code_base_changes_are_named():
    """PLOT's train.py sets the epochs from the shots, whatever the command says."""
    cfg = get_cfg_default()
    cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR, cfg.TEST.NO_TEST = 50, 0.002, True
    words = ["train.py", "--seed", "1", "OPTIM.LR", "2e-3", "OPTIM.MAX_EPOCH", "2", "TEST.NO_TEST", "True"]
    expected = "OPTIM.MAX_EPOCH 2: this train.py changes it to 50; leave it out of the command"
    assert list(lost_overrides(words, cfg)) == [expected]
    assert list(lost_overrides([*words, "OPTIM.MAX_EPOCH", "50"], cfg)) == []  # the last counts
    assert list(lost_overrides([*words[:-4], "OUTPUT_DIR", "7", "OPTIM.NAME", "adam"], cfg)) == []


def test_overrides_are_the_pairs_that_differ_from_the_config_file(tmp_path):
    cfg = get_cfg_default()
    cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH, cfg.INPUT.SIZE, cfg.SEED = 0.002, 5, (96, 96), 3
    (file := tmp_path / "x.yaml").write_text("INPUT:\n  SIZE: (96, 96)\nOPTIM:\n  LR: 2e-3\n  MAX_EPOCH: 10\n")
    pairs = ["INPUT.SIZE", "(96, 96)", "OPTIM.LR", "0.002", "OPTIM.MAX_EPOCH", "5", "SEED", "3"]
    expected = {"config_file": str(file), "overrides": {"OPTIM.MAX_EPOCH": 5, "SEED": 3}}
    assert command_settings(["train.py", "--config-file", str(file), *pairs], cfg) == expected
    assert command_settings([f"--config-file={file}", *pairs], cfg) == expected
    assert command_settings(["--eval-only"], cfg) == {"config_file": "", "overrides": {}}
