"""The scripts: real base-to-new runs, and which runs they make of which words (``echo`` in place of Python)."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from trainers.prompting.results import harmonic_mean, read_results, write_results

SEEDS = ["1", "2", "3"]
SETTINGS = {"CFG": "", "SHOTS": "", "PYTHON": "echo", "OUTPUT": "out", "DATA": "."}


def runs(cwd, script, *words, **environment):
    """What train.py would be called with: {flag or key: value} for each call."""
    done = run_script(cwd, script, *words, **{**SETTINGS, **environment})
    assert done.returncode == 0, done.stderr
    calls = []
    for line in done.stdout.splitlines():
        if line.startswith("train.py"):
            words, call = line.split(" ")[1:], {}  # a value may be empty
            while words:
                key = words.pop(0)
                call[key] = True if key == "--eval-only" else words.pop(0)
            calls.append(call)
    return calls


def config(call):
    return call["--config-file"].removeprefix("configs/trainers/").removesuffix(".yaml")


# ------------------------------------------------------------------------------------------------- real runs


def test_base2new_prints_three_numbers(data_root, rn_file, tmp_path):
    places = {"DATA": os.path.relpath(data_root, tmp_path), "BACKBONE": os.path.relpath(rn_file, tmp_path)}
    places.update(OUTPUT="my output", TRAINER="LoGoPrompt")
    words = ("caltech101", "1", "OPTIM.MAX_EPOCH", "2", "DATALOADER.NUM_WORKERS", "0")
    done = run_script(tmp_path, "logo/base2new", *words, **places)
    assert done.returncode == 0, done.stderr
    base, new, h = (float(v) for v in re.findall(r"^ *(?:base|new|H) +(\d+\.\d\d)$", done.stdout, re.M)[-3:])
    parts = re.split(r"^run \d of 2.*\n", done.stdout, flags=re.M)[1:]
    assert len(parts) == 2 and all(len(part.splitlines()) <= 60 for part in parts)
    end = "caltech101/shots_2/LoGoPrompt/photo64_ep50_ctxv1/seed1"
    folders = [tmp_path / "my output" / "base2new" / kind / end for kind in ("train_base", "test_new")]
    measured = [read_results(str(folder))["metrics"]["accuracy"] for folder in folders]
    assert [base, new, h] == pytest.approx([*measured, harmonic_mean(*measured)], abs=0.005)
    assert read_results(str(folders[1]))["run"]["subsample_classes"] == "new"
    stamps = [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    # Again through a link, with CDPATH and OUTPUT below the home folder: the same runs, which are skipped.
    (tmp_path / "link.sh").symlink_to(ROOT / "scripts" / "logo" / "base2new.sh")
    elsewhere = {**places, "OUTPUT": "~/my output", "HOME": str(tmp_path), "CDPATH": "."}
    done = run_script(tmp_path, str(tmp_path / "link.sh"), *words, **elsewhere)
    assert done.returncode == 0 and done.stdout.count("finished before, skipped") == 2, done.stderr
    assert stamps == [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    # Other options must not be answered with these results.
    done = run_script(tmp_path, "logo/base2new", *words, "TRAINER.LOGOPROMPT.K", "2", **places)
    assert done.returncode == 2 and "belongs to another run" in done.stderr
    # A run without readable results is resumed.
    (folders[0] / "results.json").write_text('{"metrics": {"accu')
    done = run_script(tmp_path, "logo/base2new", *words, **places)
    assert done.returncode == 0 and "Resuming from" in done.stdout
    assert read_results(str(folders[0]))["metrics"]["accuracy"] == measured[0]


# A stand-in for Python whose train.py takes a second and "measures" the seed; everything else is Python.
SLOW = """#!/usr/bin/env bash
if [ "$1" != train.py ]; then exec "{python}" "$@"; fi
while [ $# -gt 0 ]; do
    case $1 in --output-dir) dir=$2 ;; --seed) seed=$2 ;; DATASET.SUBSAMPLE_CLASSES) subset=$2 ;; esac
    shift
done
echo "$dir" >> "{log}"
sleep 1
run='"trainer": "CoOp", "dataset": "Shapes", "shots": 16, "backbone": "tiny"'
run+=", \\"seed\\": $seed, \\"subsample_classes\\": \\"$subset\\""
echo "{{\\"metrics\\": {{\\"accuracy\\": 5$seed}}, \\"run\\": {{$run}}}}" > "$dir/results.json"
"""


@pytest.fixture
def slow(tmp_path):
    """Start base2new.sh for seeds 1, 2 and 3 with SLOW; returns the process and the log of all runs."""
    python, log = tmp_path / "slow", tmp_path / "runs.log"
    python.write_text(SLOW.format(python=sys.executable, log=log))
    python.chmod(0o755)

    def start(**more):
        environment = {**os.environ, **SETTINGS, "PYTHON": str(python), "TRAINER": "CoOp", **more}
        command = ["bash", str(ROOT / "scripts" / "logo" / "base2new.sh"), "shapes"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes), log

    return start


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_scripts_at_once_share_the_seeds(slow):
    (first, log), (second, _) = slow(), slow()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0
    made = log.read_text().splitlines()
    assert len(made) == len(set(made)) == 6  # every run once
    assert all(
        any(f"run {n} of 6" in text and folder in text for n in range(1, 7)) for text in outputs for folder in made
    )
    for text in outputs:  # both end with all results
        assert text.count("base  5") == 3
        rows = [line.split()[-6:] for line in text.splitlines()[-3:]]
        assert rows == [["51.00", "52.00", "53.00", "52.00", "±", "1.00"]] * 3
    assert any("minute" in text and " left: " in text for text in outputs)


def test_interrupted_script_says_how_to_continue(slow):
    process, log = slow()
    for line in process.stdout:
        if line.startswith("run 3 of 6"):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error == "Interrupted: 2 of 6 runs are finished. The same command continues.\n"


def test_another_run_in_the_folder_is_told_apart_by_key(slow, tmp_path):
    process, _ = slow()
    assert process.wait(60) == 0
    done = run_script(
        tmp_path,
        "logo/base2new",
        "shapes",
        "1",
        "OPTIM.LR",
        "0.5",
        **SETTINGS | {"PYTHON": sys.executable, "TRAINER": "CoOp"},
    )
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 2
        and "OPTIM.LR is not set there, 0.5 now" in line
        and f"OUTPUT={tmp_path}/out_lr_0.5" in line
    )


def test_table_tells_rows_apart(tmp_path):
    """Equal settings by the part of their folders that differs; a run that was not tested is left out."""
    for row, seed, accuracy in (("shipped", 1, 70.0), ("shipped", 2, 72.0), ("4a_none", 1, 60.5)):
        run = {"trainer": "LoGoPrompt", "dataset": "Shapes", "shots": 1, "seed": seed, "subsample_classes": "all"}
        write_results(str(tmp_path / row / f"seed{seed}"), {"metrics": {"accuracy": accuracy}, "run": run})
    write_results(str(tmp_path / "4a_none" / "seed2"), {"metrics": {}, "run": run})
    folders = [str(tmp_path / row / f"seed{seed}") for row in ("shipped", "4a_none") for seed in (1, 2)]
    command = [sys.executable, str(ROOT / "trainers" / "prompting" / "script_output.py"), "table", *folders]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["seed", "1", "seed", "2", "mean"],
        ["shipped:", "LoGoPrompt", "on", "Shapes,", "1", "shot", "70.00", "72.00", "71.00", "±", "1.41"],
        ["4a_none:", "LoGoPrompt", "on", "Shapes,", "1", "shot", "60.50", "60.50"],
    ]


# ------------------------------------------------------------------------------------------------- scripts/logo


def test_base2new_runs_every_seed_on_base_and_new_classes(tmp_path):
    calls = runs(tmp_path, "logo/base2new", "caltech101", "OPTIM.LR", "0.1")
    assert [call["--seed"] for call in calls] == ["1", "1", "2", "2", "3", "3"]
    assert [call["DATASET.SUBSAMPLE_CLASSES"] for call in calls] == ["base", "new"] * 3
    for base, new in zip(calls[::2], calls[1::2]):
        assert new["--eval-only"] and new["--model-dir"] == base["--output-dir"] and "--eval-only" not in base
        assert base["OPTIM.LR"] == new["OPTIM.LR"] == "0.1" and config(base) == "LoGoPrompt/vit_b16_ctxv1"
    assert {call["TEST.FEATURES"] for call in calls} == {str(tmp_path / "out" / "features.sqlite")}
    for dataset in ("shapes", "shapes_shifted"):  # the toy world has its own CLIP
        base, new = runs(tmp_path, "logo/base2new", dataset, "1")
        assert config(base) == config(new) == "LoGoPrompt/tiny96_ep10_ctxv1"
        assert new["--dataset-config-file"] == f"configs/datasets/{dataset}.yaml"
    for trainer, folder in (("ZeroshotCLIP2", "CoOp"), ("LinearProbe", "CoOp"), ("CoCoOp", "CoCoOp")):
        base, _ = runs(tmp_path, "logo/base2new", "shapes", "1", TRAINER=trainer)
        assert config(base).startswith(f"{folder}/tiny96_") and base["--trainer"] == trainer
        assert ("--eval-only" in base) == (trainer == "ZeroshotCLIP2")


def test_few_shot_epochs_depend_on_shots(tmp_path):
    epochs = {"1": "rn50_ep50", "2": "rn50_ep100", "4": "rn50_ep100", "8": "rn50", "16": "rn50"}
    calls = runs(tmp_path, "logo/few_shot", "caltech101")
    assert [(c["DATASET.NUM_SHOTS"], c["--seed"]) for c in calls] == [(n, s) for n in epochs for s in SEEDS]
    assert all(config(call) == f"LoGoPrompt/{epochs[call['DATASET.NUM_SHOTS']]}" for call in calls)
    assert {call["DATASET.SUBSAMPLE_CLASSES"] for call in calls} == {"all"}
    assert len({call["--output-dir"] for call in calls}) == 15
    (one,) = runs(tmp_path, "logo/few_shot", "shapes", "4", "2", "OPTIM.LR", "0.1", TRAINER="CoOp")
    assert (config(one), one["DATASET.NUM_SHOTS"], one["--seed"]) == ("CoOp/tiny96_ep10_ctxv1", "4", "2")
    assert one["OPTIM.LR"] == "0.1"
    assert {c["DATASET.NUM_SHOTS"] for c in runs(tmp_path, "logo/few_shot", "shapes", SHOTS="2 8")} == {"2", "8"}


def test_domain_generalization_trains_once_and_tests_every_target(tmp_path):
    targets = ("shapes_shifted", "caltech101")
    calls = runs(tmp_path, "logo/domain_generalization", SOURCE="shapes", TARGETS=" ".join(targets))
    assert [call["--seed"] for call in calls] == [s for s in SEEDS for _ in range(3)]
    for source, *tests in zip(calls[::3], calls[1::3], calls[2::3]):
        assert "shapes.yaml" in source["--dataset-config-file"] and "--eval-only" not in source
        for call, name in zip(tests, targets):
            assert call["--dataset-config-file"].endswith(f"/{name}.yaml")
            assert call["--eval-only"] and call["--model-dir"] == source["--output-dir"]
            assert config(call) == config(source) == "LoGoPrompt/tiny96_ep10_ctxv1"
    # The other kind uses the same training, and evaluates the source into its own folder.
    trained = Path(calls[0]["--output-dir"])
    (trained / "prompt_learner").mkdir()
    (trained / "prompt_learner" / "checkpoint").write_text("")
    again = runs(tmp_path, "logo/cross_dataset", "1", SOURCE="shapes", TARGETS="caltech101")
    assert [call.get("--eval-only") for call in again] == [None, True, True]
    assert again[0]["--output-dir"] == again[1]["--model-dir"] == again[2]["--model-dir"] == str(trained)
    assert "/cross_dataset/from_shapes/shapes/" in again[1]["--output-dir"]
    changed = runs(tmp_path, "logo/cross_dataset", "1", "OPTIM.LR", "9", SOURCE="shapes", TARGETS="caltech101")
    assert "/cross_dataset/" in changed[0]["--output-dir"] and len(changed) == 2
    places = {"SOURCE": "shapes", "TARGETS": "shapes_shifted", "TRAINER": "ZeroshotCLIP"}
    assert [call["--eval-only"] for call in runs(tmp_path, "logo/cross_dataset", "1", **places)] == [True, True]


def test_ablation_runs_every_row_of_table_4(tmp_path):
    calls, prefix = runs(tmp_path, "logo/ablation", "caltech101", "1"), "TRAINER.LOGOPROMPT."
    rows = [{k.removeprefix(prefix): v for k, v in call.items() if k.startswith(prefix)} for call in calls]
    for key, values in {
        "VISUAL_PROMPT": {"none", "text_augmentation", "paired"},
        "BLOCK_HEIGHT": {"0.0714285714", "0.2857142857"},
        "N_CTX": {"2", "8"},  # 16 is the config's
        "LOCATION": {"top", "bottom"},
    }.items():
        assert {row[key] for row in rows if key in row} == values
    assert rows.count({}) == 1  # the shipped setting is a row of all four parts, and runs once
    assert len({call["--output-dir"] for call in calls}) == len(calls) == 10
    assert {config(call) for call in calls} == {"LoGoPrompt/rn50"}
    assert len(runs(tmp_path, "logo/ablation", "shapes", "1")) == 11  # its config starts from four words
    done = run_script(tmp_path, "logo/ablation", "shapes", TRAINER="CoOp", CFG="")
    assert done.returncode == 2 and "ablations of LoGoPrompt" in done.stderr


def test_table_runs_every_row_with_the_settings_of_the_paper(tmp_path):
    calls = runs(tmp_path, "logo/table", "2", "caltech101", "1", "OPTIM.MAX_EPOCH", "3")
    assert all(call["OPTIM.MAX_EPOCH"] == "3" and call["DATASET.NUM_SHOTS"] == "16" for call in calls)
    rows = {call["--output-dir"].split("/table2/")[1].split("/")[0]: call for call in calls}
    assert len(rows) == len(calls) == 7
    assert rows["VP+TP"]["TRAINER.VP.TEXT_PROMPT"] == "learned"
    assert rows["LoGoPrompt+Adapter"]["TRAINER.LOGOPROMPT.ADAPTER"] == "True"
    assert "TRAINER.LOGOPROMPT.ADAPTER" not in rows["LoGoPrompt"]
    assert len({call["TEST.FEATURES"] for call in calls}) == 1
    for table, trainers, number in (("1", "CoOp ZeroshotCLIP", 4), ("3", "CoOp", 2), ("4", "LoGoPrompt", 11)):
        calls = runs(tmp_path, "logo/table", table, "shapes", "2", TRAINERS=trainers, TARGETS="shapes_shifted")
        assert len(calls) == number and {call["--seed"] for call in calls} == {"2"}
        assert {call["--trainer"] for call in calls} == set(trainers.split())
    for words, seeds in (((), SEEDS), (("2",), ("2",))):
        calls = runs(tmp_path, "logo/table", "figure3", "shapes", *words, TRAINERS="CoOp")
        assert [(call["DATASET.NUM_SHOTS"], call["--seed"]) for call in calls] == [
            (shots, seed) for shots in ("1", "2", "4", "8", "16") for seed in seeds
        ]


def test_table_goes_on_after_a_row_that_fails(tmp_path):
    """The row is named at the end, and the exit status is 1; a wrong name ends it at once."""
    settings = {**SETTINGS, "PYTHON": "false", "TRAINERS": "CoOp LoGoPrompt"}
    done = run_script(tmp_path, "logo/table", "1", "shapes", "1", **settings)
    assert done.returncode == 1 and done.stdout.count("== ") == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("failed")] == [
        "failed: CoOp: base2new.sh shapes",
        "failed: LoGoPrompt: base2new.sh shapes",
        "failed: the report",
    ]
    for words, trainers, fault in (
        (("5",), "CoOp", "choose 1, 2"),
        (("1", "shapes"), "CoOp Nothing", "TRAINER Nothing"),
    ):
        done = run_script(tmp_path, "logo/table", *words, **{**settings, "TRAINERS": trainers})
        assert done.returncode == 2 and fault in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------- CoOp's own scripts

SETTING = {"TRAINER.COOP.N_CTX": "4", "TRAINER.COOP.CSC": "True", "TRAINER.COOP.CLASS_TOKEN_POSITION": "middle"}


def test_coop_scripts_make_the_original_runs(tmp_path):
    """Words, configs and folders are those of the original; variables of scripts/logo change nothing."""
    words = ("caltech101", "rn50_ep50", "middle", "4", "2", "True", "OPTIM.LR", "0.1")
    calls = runs(tmp_path, "coop/main", *words, CFG="photo64_ep50_ctxv1", TRAINER="LoGoPrompt")
    assert [call["--seed"] for call in calls] == SEEDS
    for call in calls:
        assert call.items() >= SETTING.items() and call["OPTIM.LR"] == "0.1"
        assert (call["--trainer"], config(call), call["DATASET.NUM_SHOTS"]) == ("CoOp", "CoOp/rn50_ep50", "2")
        folder = f"out/caltech101/CoOp/rn50_ep50_2shots/nctx4_cscTrue_ctpmiddle/seed{call['--seed']}"
        assert call["--output-dir"] == str(tmp_path / folder) and call["DATASET.SUBSAMPLE_CLASSES"] == "all"

    calls = runs(tmp_path, "coop/eval", "caltech101", "vit_b16_ep50")
    assert [call["--seed"] for call in calls] == SEEDS
    for call in calls:
        folder = "CoOp/vit_b16_ep50_16shots/nctx16_cscFalse_ctpend"
        assert call["--model-dir"] == str(tmp_path / f"out/imagenet/{folder}/seed{call['--seed']}")
        assert call["--output-dir"] == str(tmp_path / f"out/evaluation/{folder}/caltech101/seed{call['--seed']}")
        assert call["--eval-only"] and call["--load-epoch"] == "50" and call["TRAINER.COOP.N_CTX"] == "16"
    trained = runs(tmp_path, "coop/main", "shapes", "tiny96_ep10_ctxv1", "end", "4", "8", "False")[-1]
    places = {"SOURCE": "shapes", "NCTX": "4", "SHOTS": "8", "LOADEP": ""}
    tested = runs(tmp_path, "coop/eval", "shapes_shifted", "tiny96_ep10_ctxv1", **places)[-1]
    assert tested["--model-dir"] == trained["--output-dir"] and "--load-epoch" not in tested

    (call,) = runs(tmp_path, "coop/zeroshot", "caltech101", "rn101", TRAINER="ZeroshotCLIP2")
    assert (call["--trainer"], config(call), call["--eval-only"]) == ("ZeroshotCLIP2", "CoOp/rn101", True)
    assert call["--output-dir"] == str(tmp_path / "out/ZeroshotCLIP2/rn101/caltech101")


@pytest.mark.parametrize("trainer, name", [("CoCoOp", "vit_b16_c4_ep10_batch1_ctxv1"), ("CoOp", "vit_b16_ctxv1")])
def test_cocoop_scripts_make_the_runs_of_scripts_logo(tmp_path, trainer, name):
    own = {} if trainer == "CoCoOp" else {"TRAINER": trainer}
    halves = [runs(tmp_path, f"cocoop/base2new_{half}", "caltech101", "2", **own)[0] for half in ("train", "test")]
    assert halves == runs(tmp_path, "logo/base2new", "caltech101", "2", TRAINER=trainer)
    assert {config(call) for call in halves} == {f"{trainer}/{name}"}
    folder = f"out/base2new/train_base/caltech101/shots_16/{trainer}/{name}/seed2"
    assert halves[0]["--output-dir"] == str(tmp_path / folder)

    places = {"SOURCE": "shapes", **own}
    (trained,) = runs(tmp_path, "cocoop/xd_train", "3", "OPTIM.LR", "0.1", **places)
    (tested,) = runs(tmp_path, "cocoop/xd_test", "caltech101", "3", "OPTIM.LR", "0.1", LOADEP="10", **places)
    folder = f"{trainer}/{config(trained).split('/')[1]}_16shots"
    assert trained["--output-dir"] == str(tmp_path / f"out/shapes/{folder}/seed3")
    assert tested["--output-dir"] == str(tmp_path / f"out/evaluation/{folder}/caltech101/seed3")
    assert tested["--model-dir"] == trained["--output-dir"] and tested["--load-epoch"] == "10"
    assert "--eval-only" not in trained and tested["--eval-only"] and config(tested) == config(trained)
    assert trained["OPTIM.LR"] == tested["OPTIM.LR"] == "0.1"
    assert trained["DATASET.SUBSAMPLE_CLASSES"] == tested["DATASET.SUBSAMPLE_CLASSES"] == "all"


# ------------------------------------------------------------------------------------------------- mistakes

WORDS = {
    "coop/main": ["caltech101", "rn50", "end", "16", "1", "False"],
    "coop/eval": ["caltech101", "rn50"],
    "coop/zeroshot": ["caltech101", "rn50"],
    "cocoop/base2new_train": ["caltech101", "1"],
    "cocoop/base2new_test": ["caltech101", "1"],
    "cocoop/xd_train": ["1"],
    "cocoop/xd_test": ["caltech101", "1"],
}
PLACES = {"PYTHON": "echo", "CFG": "", "SOURCE": "shapes", "TARGETS": "shapes_shifted", "OUTPUT": "out"}


@pytest.mark.parametrize("script", ["base2new", "few_shot", "domain_generalization", "cross_dataset", "ablation"])
def test_mistakes_end_with_status_2(tmp_path, script):
    def error(*words, **more):
        done = run_script(tmp_path, f"logo/{script}", *words, **{**PLACES, **more})
        assert done.returncode == 2 and not (tmp_path / "out").exists()
        return done.stderr

    dataset = () if script in ("domain_generalization", "cross_dataset") else ("shapes",)
    assert not dataset or "usage:" in error()
    assert "0: a whole number" in error(*dataset, "0")
    assert "LoGoPrompt/no_such_config.yaml: no such file" in error(*dataset, "1", CFG="no_such_config")


@pytest.mark.parametrize("script", WORDS)
def test_mistakes_in_the_words_of_coop_scripts_end_with_status_2(tmp_path, script):
    first, *others = WORDS[script]
    done = run_script(tmp_path, script, *[first, *others][:-1], **PLACES)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash ")
    done = run_script(tmp_path, script, "none", *others, **PLACES)  # no such data set, or no seed
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------- --help

SHELL = [path for path in sorted((ROOT / "scripts").rglob("*.sh")) if path.name != "common.sh"]
TOOLS = [path for folder in ("tools", "toy") for path in sorted((ROOT / folder).glob("*.py"))]
PROGRAMS = [ROOT / "train.py", *(path for path in TOOLS if "ArgumentParser" in path.read_text())]
QUICKLY = """
import os, runpy, sys
sys.argv = [{path!r}, "--help"]
sys.path[0] = os.path.dirname({path!r})
try:
    runpy.run_path({path!r}, run_name="__main__")
except SystemExit as end:
    slow = {{"torch", "pandas", "matplotlib"}} & set(sys.modules)
    sys.exit(end.code or ", ".join(slow) or 0)
"""


@pytest.mark.parametrize("path", [*SHELL, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_help_has_an_example_and_waits_for_nothing(path, tmp_path):
    command = ["bash", str(path), "--help"]
    if path.suffix == ".py":
        command = [sys.executable, "-c", QUICKLY.format(path=str(path))]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "example" in done.stdout and "no such file" not in done.stdout.lower()
    assert path.stem in done.stdout and not list(tmp_path.iterdir())
