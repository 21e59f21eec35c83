"""The loops in scripts/logo: which runs they make of which words. ``echo`` in place of Python prints the runs."""

import pytest
from conftest import ROOT
from test_base2new import run as run_script

SEEDS = ["1", "2", "3"]


def runs(tmp_path, script, *words, **environment):
    """What train.py would be called with: a list of {flag or key: value} per call."""
    done = run_script(
        tmp_path, *words, script=ROOT / "scripts" / "logo" / f"{script}.sh",
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
