"""The scripts: which runs they make of which words. ``echo`` in place of Python prints the runs."""

import pytest
from conftest import ROOT
from test_base2new import run as run_script

SEEDS = ["1", "2", "3"]


def runs(tmp_path, script, *words, folder="logo", **environment):
    """What train.py would be called with: a list of {flag or key: value} per call."""
    done = run_script(
        tmp_path, *words, script=ROOT / "scripts" / folder / f"{script}.sh",
        **{"CFG": "", "SHOTS": "", "PYTHON": "echo", "OUTPUT": "out", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("train.py"):
            words, call = line.split(" ")[1:], {}  # a value may be empty
            while words:
                key = words.pop(0)
                call[key] = True if key == "--eval-only" else words.pop(0)
            found.append(call)
    return found


def config(call):
    return call["--config-file"].removeprefix("configs/trainers/").removesuffix(".yaml")


def test_base2new_loops_over_seeds(tmp_path):
    found = runs(tmp_path, "base2new", "caltech101", "OPTIM.LR", "0.1")
    assert [call["--seed"] for call in found] == ["1", "1", "2", "2", "3", "3"]
    assert [call["DATASET.SUBSAMPLE_CLASSES"] for call in found] == ["base", "new"] * 3
    for base, new in zip(found[::2], found[1::2]):
        assert new["--eval-only"] and new["--model-dir"] == base["--output-dir"] and "--eval-only" not in base
        assert base["OPTIM.LR"] == new["OPTIM.LR"] == "0.1"
    assert len(runs(tmp_path, "base2new", "caltech101", "2")) == 2


def test_few_shot_takes_the_epochs_that_belong_to_the_shots(tmp_path):
    found = runs(tmp_path, "few_shot", "caltech101")
    assert [(c["DATASET.NUM_SHOTS"], c["--seed"]) for c in found] == [
        (n, s) for n in ["1", "2", "4", "8", "16"] for s in SEEDS
    ]
    wanted = {"1": "rn50_ep50", "2": "rn50_ep100", "4": "rn50_ep100", "8": "rn50", "16": "rn50"}
    assert all(config(call) == f"LoGoPrompt/{wanted[call['DATASET.NUM_SHOTS']]}" for call in found)
    assert {call["DATASET.SUBSAMPLE_CLASSES"] for call in found} == {"all"}
    assert len({call["--output-dir"] for call in found}) == 15
    (one,) = runs(tmp_path, "few_shot", "shapes", "4", "2", "OPTIM.LR", "0.1", TRAINER="CoOp")
    assert (config(one), one["DATASET.NUM_SHOTS"], one["--seed"]) == ("CoOp/tiny96_ep10_ctxv1", "4", "2")
    assert one["OPTIM.LR"] == "0.1"
    assert {c["DATASET.NUM_SHOTS"] for c in runs(tmp_path, "few_shot", "shapes", SHOTS="2 8")} == {"2", "8"}


def test_domain_generalization_trains_once_and_tests_every_target(tmp_path):
    found = runs(tmp_path, "domain_generalization", SOURCE="shapes", TARGETS="shapes_shifted caltech101")
    assert [call["--seed"] for call in found] == [s for s in SEEDS for _ in range(3)]
    for source, *targets in zip(found[::3], found[1::3], found[2::3]):
        assert "shapes.yaml" in source["--dataset-config-file"] and "--eval-only" not in source
        for call, name in zip(targets, ("shapes_shifted", "caltech101")):
            assert call["--dataset-config-file"].endswith(f"/{name}.yaml")
            assert call["--eval-only"] and call["--model-dir"] == source["--output-dir"]
            assert config(call) == config(source) == "LoGoPrompt/tiny96_ep10_ctxv1"
    zero_shot = runs(tmp_path, "cross_dataset", "1", SOURCE="shapes", TARGETS="shapes_shifted", TRAINER="ZeroshotCLIP")
    assert [call["--eval-only"] for call in zero_shot] == [True, True]


def test_runs_of_another_source_or_config_are_not_mixed_up(tmp_path):
    """A finished run answers only for the command that made it; a target does not change the source's config."""
    fake = tmp_path / "python"
    loop = 'for word; do [ "$last" = --output-dir ] && echo {} > "$word/results.json"; last=$word; done'
    fake.write_text(f"#!/bin/sh\n{loop}\n")
    fake.chmod(0o755)
    words = {"OUTPUT": "out", "CFG": "", "PYTHON": "./python", "TARGETS": "shapes caltech101 shapes_shifted"}
    script = ROOT / "scripts" / "logo" / "cross_dataset.sh"
    for source, config_name in (("caltech101", "vit_b16_ep50_ctxv1"), ("shapes", "tiny96_ep10_ctxv1")):
        done = run_script(tmp_path, "1", script=script, SOURCE=source, **words)
        assert done.returncode == 0 and "skipped" not in done.stdout, done.stderr
        folders = sorted(p.parent for p in (tmp_path / "out/cross_dataset" / f"from_{source}").rglob("results.json"))
        assert len(folders) == 3 and all(config_name in str(folder) for folder in folders)
        done = run_script(tmp_path, "1", script=script, SOURCE=source, **words)
        assert done.returncode == 0 and done.stdout.count("finished before, skipped") == 3
    eleven = runs(tmp_path, "cross_dataset", "1", SOURCE="caltech101", TARGETS="caltech101 shapes")
    assert [call["--dataset-config-file"].split("/")[-1] for call in eleven] == ["caltech101.yaml", "shapes.yaml"]


def test_ablation_runs_every_row_of_table_4(tmp_path):
    found = runs(tmp_path, "ablation", "caltech101", "1")
    prefix = "TRAINER.LOGOPROMPT."
    rows = [
        tuple((key.removeprefix(prefix), value) for key, value in call.items() if key.startswith(prefix))
        for call in found
    ]
    for key, values in {
        "VISUAL_PROMPT": {"none", "text_augmentation", "paired"},
        "BLOCK_HEIGHT": {"0.0714285714", "0.2857142857"},
        "N_CTX": {"2", "8"},  # 16 is the config's
        "LOCATION": {"top", "bottom"},
    }.items():
        assert {value for row in rows for k, value in row if k == key} == values
    assert rows.count(()) == 1  # what is shipped is the last row of all four parts, and is run once
    assert len({call["--output-dir"] for call in found}) == len(found) == 10
    assert {config(call) for call in found} == {"LoGoPrompt/rn50"}
    assert len(runs(tmp_path, "ablation", "shapes", "1")) == 11  # whose config starts from four words
    done = run_script(tmp_path, "shapes", script=ROOT / "scripts/logo/ablation.sh", TRAINER="CoOp", CFG="")
    assert done.returncode == 2 and "ablations of LoGoPrompt" in done.stderr


@pytest.mark.parametrize("script", ["base2new", "few_shot", "domain_generalization", "cross_dataset", "ablation"])
def test_mistakes_end_with_status_2(tmp_path, script):
    path = ROOT / "scripts" / "logo" / f"{script}.sh"
    dataset = () if script in ("domain_generalization", "cross_dataset") else ("shapes",)
    environment = {"PYTHON": "echo", "CFG": "", "SOURCE": "shapes", "TARGETS": "shapes_shifted", "OUTPUT": "out"}
    if dataset:
        done = run_script(tmp_path, script=path, **environment)
        assert done.returncode == 2 and "usage:" in done.stderr
    for seed in ("0", "-1", "one"):
        done = run_script(tmp_path, *dataset, seed, script=path, **environment)
        assert done.returncode == 2 and f"{seed}: a whole number" in done.stderr
    done = run_script(tmp_path, *dataset, "1", script=path, **{**environment, "CFG": "no_such_config"})
    assert done.returncode == 2 and "configs/trainers/LoGoPrompt/no_such_config.yaml: no such file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_runs_of_a_sweep_share_the_features_of_test_images(tmp_path):
    stores = {call["TEST.FEATURES"] for call in runs(tmp_path, "base2new", "caltech101")}
    assert stores == {str(tmp_path / "out" / "features.sqlite")}
    assert {call["TEST.FEATURES"] for call in runs(tmp_path, "base2new", "caltech101", "1", FEATURES="")} == {""}
    mine = runs(tmp_path, "base2new", "caltech101", "1", "TEST.FEATURES", "mine", FEATURES="x")
    assert {call["TEST.FEATURES"] for call in mine} == {"mine"}


SETTING = {"TRAINER.COOP.N_CTX": "4", "TRAINER.COOP.CSC": "True", "TRAINER.COOP.CLASS_TOKEN_POSITION": "middle"}


def test_coop_s_own_scripts(tmp_path):
    """Words, config and folders are those of the original ones, with LoGoPrompt's variables around them."""
    words = ("caltech101", "rn50_ep50", "middle", "4", "2", "True", "OPTIM.LR", "0.1")
    found = runs(tmp_path, "main", *words, folder="coop", CFG="photo64_ep50_ctxv1", TRAINER="LoGoPrompt")
    assert [call["--seed"] for call in found] == SEEDS
    for call in found:
        assert call.items() >= SETTING.items() and call["OPTIM.LR"] == "0.1"
        assert (call["--trainer"], config(call), call["DATASET.NUM_SHOTS"]) == ("CoOp", "CoOp/rn50_ep50", "2")
        assert call["DATASET.SUBSAMPLE_CLASSES"] == "all"
        folder = f"out/caltech101/CoOp/rn50_ep50_2shots/nctx4_cscTrue_ctpmiddle/seed{call['--seed']}"
        assert call["--output-dir"] == str(tmp_path / folder)

    found = runs(tmp_path, "eval", "caltech101", "vit_b16_ep50", folder="coop")
    assert [call["--seed"] for call in found] == SEEDS
    for call in found:
        folder = "CoOp/vit_b16_ep50_16shots/nctx16_cscFalse_ctpend"
        assert call["--model-dir"] == str(tmp_path / f"out/imagenet/{folder}/seed{call['--seed']}")
        assert call["--output-dir"] == str(tmp_path / f"out/evaluation/{folder}/caltech101/seed{call['--seed']}")
        assert call["--eval-only"] and call["--load-epoch"] == "50" and call["TRAINER.COOP.N_CTX"] == "16"
    (_, _, of_main) = runs(tmp_path, "main", "shapes", "tiny96_ep10_ctxv1", "end", "4", "8", "False", folder="coop")
    (_, _, of_eval) = runs(
        *(tmp_path, "eval", "shapes_shifted", "tiny96_ep10_ctxv1"),
        **{"folder": "coop", "SOURCE": "shapes", "NCTX": "4", "SHOTS": "8", "LOADEP": ""},
    )
    assert of_eval["--model-dir"] == of_main["--output-dir"] and "--load-epoch" not in of_eval

    for trainer in ("ZeroshotCLIP", "ZeroshotCLIP2"):
        (call,) = runs(tmp_path, "zeroshot", "caltech101", "rn101", folder="coop", TRAINER=trainer)
        assert (call["--trainer"], config(call), call["--eval-only"]) == (trainer, "CoOp/rn101", True)
        assert call["--output-dir"] == str(tmp_path / f"out/{trainer}/rn101/caltech101")


@pytest.mark.parametrize("trainer", ["CoCoOp", "CoOp"])
def test_cocoop_s_own_scripts(tmp_path, trainer):
    """They make the same base-to-new runs as scripts/logo does."""
    own = {} if trainer == "CoCoOp" else {"TRAINER": trainer}
    wanted = {"CoCoOp": "CoCoOp/vit_b16_c4_ep10_batch1_ctxv1", "CoOp": "CoOp/vit_b16_ctxv1"}[trainer]
    pair = runs(tmp_path, "base2new", "caltech101", "2", TRAINER=trainer)
    halves = [
        call
        for half in ("train", "test")
        for call in runs(tmp_path, f"base2new_{half}", "caltech101", "2", folder="cocoop", **own)
    ]
    assert halves == pair and {config(call) for call in halves} == {wanted}
    assert halves[0]["--output-dir"] == str(tmp_path / f"out/base2new/train_base/caltech101/shots_16/{wanted}/seed2")

    places = {"folder": "cocoop", "SOURCE": "shapes", **own}
    (trained,) = runs(tmp_path, "xd_train", "3", "OPTIM.LR", "0.1", **places)
    (tested,) = runs(tmp_path, "xd_test", "caltech101", "3", "OPTIM.LR", "0.1", LOADEP="10", **places)
    name = config(trained).split("/")[1]
    assert trained["--output-dir"] == str(tmp_path / f"out/shapes/{trainer}/{name}_16shots/seed3")
    assert tested["--output-dir"] == str(tmp_path / f"out/evaluation/{trainer}/{name}_16shots/caltech101/seed3")
    assert tested["--model-dir"] == trained["--output-dir"] and tested["--load-epoch"] == "10"
    assert "--eval-only" not in trained and tested["--eval-only"] and config(tested) == config(trained)
    assert trained["OPTIM.LR"] == tested["OPTIM.LR"] == "0.1"
    assert trained["DATASET.SUBSAMPLE_CLASSES"] == tested["DATASET.SUBSAMPLE_CLASSES"] == "all"


@pytest.mark.parametrize(
    "script, words",
    [
        ("coop/main", ["caltech101", "rn50", "end", "16", "1", "False"]),
        ("coop/eval", ["caltech101", "rn50"]),
        ("coop/zeroshot", ["caltech101", "rn50"]),
        ("cocoop/base2new_train", ["caltech101", "1"]),
        ("cocoop/base2new_test", ["caltech101", "1"]),
        ("cocoop/xd_train", ["1"]),
        ("cocoop/xd_test", ["caltech101", "1"]),
    ],
)
def test_mistakes_in_coop_s_words_end_with_status_2(tmp_path, script, words):
    environment = {"script": ROOT / "scripts" / f"{script}.sh", "PYTHON": "echo", "CFG": "", "OUTPUT": "out"}
    environment |= {"SOURCE": "shapes"}
    done = run_script(tmp_path, *words[:-1], **environment)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash ")
    wrong = ["none", *words[1:]]  # no such data set, or no seed
    done = run_script(tmp_path, *wrong, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_relatives_in_logoprompt_s_loops(tmp_path):
    for trainer, folder in (("ZeroshotCLIP2", "CoOp"), ("LinearProbe", "CoOp"), ("CoCoOp", "CoCoOp")):
        base, _ = runs(tmp_path, "base2new", "shapes", "1", TRAINER=trainer)
        assert config(base).startswith(f"{folder}/tiny96_") and base["--trainer"] == trainer
        assert ("--eval-only" in base) == (trainer == "ZeroshotCLIP2")
