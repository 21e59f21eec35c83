"""tools/sweep.py: the scripts' runs, several of them in one process, and what happens when they end early."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differences, run_script
from tiny import clip_state_dict

import sweep
from sweep_jobs import make_jobs
from trainers.prompting.backbone import ReusedBackbone, load_clip
from trainers.prompting.results import read_results

COMMAND = [sys.executable, str(ROOT / "tools" / "sweep.py")]
CONFIG = "photo64_ep50_ctxv1"
RUN = ("DATALOADER.NUM_WORKERS", "0", "DATALOADER.TRAIN_X.BATCH_SIZE", "8")


@pytest.fixture
def command(data_root, rn_file, tmp_path):
    """A sweep of the miniature Caltech101 as words of the command line."""

    def words(setting, *flags, opts=()):
        places = ("--data", str(data_root), "--backbone", rn_file, "--output", str(tmp_path / "out"))
        flags = ("--datasets", "caltech101", "--configs", CONFIG, "--shots", "2", *places, *flags)
        return [*COMMAND, setting, *flags, *RUN, *map(str, opts)]

    return words


def finished(command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------- which runs


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The runs of a sweep with the environment that the scripts get."""
    for name, value in {"OUTPUT": "out", "DATA": ".", "BACKBONE": ""}.items():
        monkeypatch.setenv(name, value)

    def call(*words):
        monkeypatch.chdir(tmp_path)
        args = sweep.parse(words)
        monkeypatch.chdir(ROOT)
        return make_jobs(args)

    return call


@pytest.fixture
def scripted(tmp_path):
    """What train.py is called with by a script, and the asked.txt of these runs."""
    record, calls = tmp_path / "record", tmp_path / "calls"
    code = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[3:]) + chr(10))"
    line = shlex.join([sys.executable, "-S", "-c", code, str(calls)])
    record.write_text(f'#!/bin/sh\n[ "$1" != train.py ] || exec {line} "$@"\n')
    record.chmod(0o755)

    def call(script, *words, **environment):
        settings = {"PYTHON": str(record), "CFG": "", "SHOTS": "", "OUTPUT": "out", "DATA": ".", "BACKBONE": ""}
        done = run_script(tmp_path, f"logo/{script}", *words, **{**settings, **environment})
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in calls.read_text().splitlines()]
        folders = [argv[argv.index("--output-dir") + 1] for argv in found]
        return found, [Path(folder, "asked.txt").read_text() for folder in folders]

    return call


@pytest.mark.parametrize(
    "words, script, environment",
    [
        ("base2new --datasets caltech101", "base2new caltech101", {}),
        ("base2new --datasets imagenet --trainers CoCoOp --seeds 2", "base2new imagenet 2", {"TRAINER": "CoCoOp"}),
        ("base2new --datasets shapes --trainers CoCoOp --seeds 2", "base2new shapes 2", {"TRAINER": "CoCoOp"}),
        ("base2new --datasets dtd --trainers ZeroshotCLIP", "base2new dtd", {"TRAINER": "ZeroshotCLIP"}),
        ("base2new --datasets dtd --configs vit_b16 --trainers CoOp --seeds 1 --shots 4 --backbone RN101 OPTIM.LR 1",
         "base2new dtd 1 OPTIM.LR 1", {"TRAINER": "CoOp", "CFG": "vit_b16", "SHOTS": "4", "BACKBONE": "RN101"}),
        ("few_shot --datasets food101", "few_shot food101", {}),
        ("few_shot --datasets imagenet --trainers LinearProbe", "few_shot imagenet", {"TRAINER": "LinearProbe"}),
        ("domain --seeds 1", "domain_generalization 1", {}),
        ("domain --datasets shapes --targets shapes_shifted --features store", "domain_generalization",
         {"SOURCE": "shapes", "TARGETS": "shapes_shifted", "FEATURES": "store"}),
        ("crossdataset --seeds 1 --trainers CoOp", "cross_dataset 1", {"TRAINER": "CoOp"}),
        ("ablation --datasets imagenet --seeds 1", "ablation imagenet 1", {}),
        ("ablation --datasets shapes TRAINER.LOGOPROMPT.K 3", "ablation shapes TRAINER.LOGOPROMPT.K 3", {}),
        ("table1 --datasets caltech101 dtd --seeds 1", "table 1 'caltech101 dtd' 1", {}),
        ("table2 --datasets dtd ucf101 --seeds 1 OPTIM.LR 0.1", "table 2 'dtd ucf101' 1 OPTIM.LR 0.1", {}),
        ("table2 --trainers CoOp --seeds 1", "table 2 all 1", {"TRAINERS": "CoOp"}),
        ("table3 --seeds 2", "table 3 all 2", {}),
        ("table4 --seeds 2", "table 4 all 2", {}),
        ("figure3 --datasets eurosat", "table figure3 eurosat", {}),
    ],
)  # fmt: skip
def test_runs_are_those_of_the_scripts(jobs, scripted, words, script, environment):
    script, *rest = shlex.split(script)
    calls, asked = scripted(script, *rest, **environment)
    mine = jobs(*words.split())
    assert [list(job.argv) for job in mine] == calls
    assert [f"{job.asked}\n" for job in mine] == asked
    assert [job.needs for job in mine] == [tuple(after(argv, "--model-dir")) for argv in calls]
    place = {job.folder: i for i, job in enumerate(mine)}
    assert all(place[need] < i for i, job in enumerate(mine) for need in job.needs)


def test_a_source_is_trained_once_for_both_transfers(jobs, scripted):
    calls, _ = scripted("cross_dataset", "1")
    trained = Path(*after(calls[0], "--output-dir"), "prompt_learner", "checkpoint")
    trained.parent.mkdir()
    trained.touch()
    calls = scripted("domain_generalization", "1")[0][len(calls) :]
    mine = jobs("domain", "--seeds", "1")
    assert [list(job.argv) for job in mine] == calls
    assert all(job.needs in ((), (str(trained.parents[1]),)) for job in mine)
    assert [job.argv for job in jobs("crossdataset", "--seeds", "1")][0] == mine[0].argv


def after(words, flag):
    """The value of a flag, if it is among the words."""
    return words[words.index(flag) + 1 :][:1] if flag in words else []


def test_yaml_file_says_what_flags_say(jobs, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "setting: few_shot\ndatasets: [dtd, food101]\ntrainers: CoOp VP+TP\nshots: [1, 16]\nseeds: 2\n"
        "overrides:\n  OPTIM.MAX_EPOCH: 3\n"
    )
    words = "few_shot --datasets dtd food101 --trainers CoOp VP+TP --shots 1 16 --seeds 2 OPTIM.MAX_EPOCH 3"
    assert jobs("mine.yaml") == jobs(*words.split())
    more = jobs("mine.yaml", "--seeds", "1", "OPTIM.LR", "0.1")  # the command line counts
    assert {job.argv[3] for job in more} == {"1"} and {job.argv[-1] for job in more} == {"0.1", "learned"}


@pytest.mark.parametrize(
    "words, faults",
    [
        ("", ["no setting: choose one of table1"]),
        ("base2new --shots 0 --seeds x", ["datasets: ", "shots 0: a whole", "seeds x: a whole"]),
        ("few_shot --datasets dtd --targets dtd", ["targets: few_shot has none"]),
        ("table4 --trainers CoOp", ["trainers CoOp: these are ablations"]),
        ("few_shot --datasets none dtd --configs rn7 --trainers CoOp Cop", [
            "none.yaml: no such file", "CoOp/rn7.yaml: no such file", "Cop/rn7.yaml: no such file"]),
        ("few_shot --datasets dtd --trainers VP VP+TP LoGoPrompt+TIP", [
            "two runs of this sweep", "LoGoPrompt+TIP: only +TP and"]),
        ("few_shot --datasets dtd --data none", ["none: no such folder"]),
        ("few_shot --datasets dtd OPTIM.LRR 1 OPTIM.LR -1 TEST.SPLIT", [
            "unknown key OPTIM.LRR", "TEST.SPLIT: a value is missing", "OPTIM.LR -1: must be at least 0"]),
        ("mine.yaml", ["mine.yaml: unknown name seed: choose", "mine.yaml: unknown name trainer: choose"]),
        ("few_shot --datasets dtd OPTIM.LR 1 --seeds 1", ["--seeds: flags must come before"]),
    ],
)  # fmt: skip
def test_mistakes_are_reported_before_anything_runs(jobs, tmp_path, monkeypatch, capsys, words, faults):
    (tmp_path / "mine.yaml").write_text("setting: few_shot\nseed: 1\ntrainer: CoOp\n")
    monkeypatch.chdir(tmp_path)
    assert sweep.main(words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines) and len(lines) == len(set(lines))
    assert all(any(fault in line for line in lines) for fault in faults), lines
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- one process


def test_kept_backbone_is_as_if_loaded(rn_file):
    """Whatever a run did to its copy, and with the random numbers that loading draws."""
    kept = ReusedBackbone()

    def load(seed, call):
        torch.manual_seed(seed)
        backbone = call()
        return backbone, [torch.rand(3), dict(backbone.state_dict()), backbone.fingerprint, str(backbone)]

    for seed in (1, 2, 1, 1, 2):
        _, expected = load(seed, lambda: load_clip(rn_file))
        backbone, found = load(seed, lambda: kept.load(rn_file, "auto", True, "")[0])
        assert differences(found, expected) == []
        assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
        backbone.cast_weights(torch.bfloat16).requires_grad_(True)
        backbone.logit_scale.data.fill_(3)
        backbone.visual.add_module("more", torch.nn.Linear(1, 1))


def test_kept_backbone_notices_another_file(tmp_path):
    path, kept = tmp_path / "clip.pt", ReusedBackbone()
    for seed in (0, 1, 1):
        torch.save(clip_state_dict("rn", seed), path)
        torch.manual_seed(0)
        assert kept.load(str(path), "auto", True, "")[0].fingerprint == load_clip(str(path)).fingerprint


def test_sweep_has_the_scripts_results(command, data_root, rn_file, tmp_path):
    """To the bit, in a process that has made other runs before; what one has finished, the other skips."""
    opts = ("OPTIM.MAX_EPOCH", "2", "OPTIM.LR", "0.02")
    words = command("base2new", "--trainers", "LoGoPrompt", "CoOp", "--seeds", "1", "2", "--jobs", "1", opts=opts)
    done = finished(words)
    assert done.returncode == 0, done.stderr
    assert "8 runs: 0 waiting, 0 running, 8 done (0 before), 0 failed" in done.stdout
    assert "| Caltech101" in done.stdout and (tmp_path / "out" / "report" / "report.html").exists()

    places = {"DATA": str(data_root), "BACKBONE": rn_file, "CFG": CONFIG, "SHOTS": "2", "TRAINER": "CoOp"}
    script = ("logo/base2new", "caltech101", "2", *RUN, *opts)
    fresh = run_script(tmp_path, *script, **places, OUTPUT="fresh")
    assert fresh.returncode == 0, fresh.stderr
    for kind in ("train_base", "test_new"):
        end = f"base2new/{kind}/caltech101/shots_2/CoOp/{CONFIG}/seed2"
        a, b = tmp_path / "out" / end, tmp_path / "fresh" / end
        assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
        results = [read_results(str(folder)) for folder in (a, b)]
        for found in results:
            found["run"]["model_dir"] = found["run"]["model_dir"].rpartition("base2new")[2]
            del found["run"]["seconds"], found["run"]["overrides"]["TEST.FEATURES"]  # a clock, and another folder
        assert results[0] == results[1]
        checkpoints = [p.relative_to(a) for p in a.glob("prompt_learner/*tar*")]
        assert len(checkpoints) == (kind == "train_base")
        for path in checkpoints:
            states = [torch.load(folder / path, weights_only=True) for folder in (a, b)]
            for state in states:
                del state["config"]  # has the folder
            assert differences(*states) == []

    again = finished([*words[:-4], *words[-4:]])
    assert again.returncode == 0 and "8 done (8 before)" in again.stdout
    skipped = run_script(tmp_path, *script, **places, OUTPUT="out")
    assert skipped.returncode == 0 and skipped.stdout.count("finished before, skipped") == 2, skipped.stderr
    other = finished(command("base2new", "--trainers", "CoOp", "--seeds", "2", opts=("OPTIM.LR", "0.1")))
    assert other.returncode == 2 and other.stderr.count("belongs to another run") == 2


def test_failure_of_a_run_skips_those_that_need_it(command, tmp_path):
    """And others go on."""
    words = command("base2new", "--trainers", "CoOp", "--seeds", "1", "--jobs", "2", opts=("OPTIM.MAX_EPOCH", "1"))
    words[words.index("--datasets") + 1 : words.index("--configs")] = ["dtd", "caltech101"]
    done = finished(words)
    assert done.returncode == 1 and "2 done (0 before), 2 failed" in done.stdout
    first, second = done.stderr.splitlines()[-2:]
    folders = [tmp_path / f"out/base2new/{kind}/dtd/shots_2/CoOp/{CONFIG}/seed1" for kind in ("train_base", "test_new")]
    assert first.startswith(f"failed: {folders[0]}: error: ") and "dtd" in first
    assert second == f"failed: {folders[1]}: skipped: needs {folders[0]}"
    assert "again (" not in done.stdout  # a mistake is not retried


# ------------------------------------------------------------------------------------------------- early ends


@pytest.fixture
def start():
    """Start a sweep in the background; killed at the end of the test."""
    processes = []

    def call(words):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(words, start_new_session=True, **pipes))
        return processes[-1]

    yield call
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.05)
    return found


def log_of(folder):
    return "".join(path.read_text() for path in folder.glob("log.txt*"))


def workers(process):
    """Process numbers of a sweep's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


LONG = ("OPTIM.MAX_EPOCH", "40", "TRAIN.CHECKPOINT_FREQ", "1")


def folder_of(tmp_path, trainer="CoOp"):
    return tmp_path / f"out/few_shot/caltech101/shots_2/{trainer}/{CONFIG}/seed1"


def test_run_of_a_killed_worker_is_resumed(command, start, tmp_path):
    process = start(command("few_shot", "--trainers", "CoOp", "--seeds", "1", "--jobs", "1", opts=LONG))
    folder = folder_of(tmp_path)
    wait_for(lambda: "epoch [5/40]" in log_of(folder), "fifth epoch")
    (worker,) = workers(process)
    os.kill(worker, signal.SIGKILL)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "again (1 of 2): CoOp on caltech101, all classes, 2 shots, seed 1: killed by SIGKILL" in stdout
    assert re.search(r"Resuming from .*after epoch \d", log_of(folder)) and (folder / "results.json").exists()


def test_run_that_dies_three_times_fails(command, start):
    process, killed = start(command("few_shot", "--trainers", "CoOp", "--seeds", "1", "--jobs", "1")), set()
    for _ in range(3):
        (worker,) = wait_for(lambda: set(workers(process)) - killed, "worker")
        os.kill(worker, signal.SIGKILL)
        killed.add(worker)
    stdout, stderr = process.communicate()
    assert process.returncode == 1 and stdout.count("again (") == 2 and "0 done (0 before), 1 failed" in stdout
    assert stderr.splitlines()[-1].endswith("seed1: killed by SIGKILL")


@pytest.mark.parametrize("number, left", [(signal.SIGINT, False), (signal.SIGKILL, True)])
def test_stopped_sweep_leaves_whole_runs(command, start, tmp_path, number, left):
    """The last epoch is saved, even if the sweep itself was killed; no process stays."""
    opts = ("OPTIM.MAX_EPOCH", "40", "TRAIN.CHECKPOINT_FREQ", "0")
    words = command("few_shot", "--trainers", "CoOp", "ProGrad", "--seeds", "1", "--jobs", "2", opts=opts)
    process, folders = start(words), [folder_of(tmp_path, trainer) for trainer in ("CoOp", "ProGrad")]
    wait_for(lambda: all("epoch [3/40]" in log_of(folder) for folder in folders), "third epoch")
    numbers = workers(process)
    assert len(numbers) == 2
    if left:
        os.kill(process.pid, number)
    else:
        os.killpg(process.pid, number)  # as a terminal does
    _, stderr = process.communicate()
    wait_for(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in numbers), "end of the workers", 20)
    assert process.returncode == (-number if left else 128 + number)
    if not left:
        (line,) = stderr.splitlines()
        assert line.startswith(f"stopped by {number.name}: what was trained is saved") and line.endswith(
            " ".join(words)
        )
    for folder in folders:
        (checkpoint,) = folder.glob("prompt_learner/model.pth.tar-*")
        assert not (folder / "results.json").exists() and not list(folder.glob("**/*.tmp"))
        assert f"Checkpoint saved to {checkpoint}" in log_of(folder)
    if left:
        done = finished(words)
        assert done.returncode == 0 and "2 done (0 before)" in done.stdout, done.stderr
        assert all("Resuming from" in log_of(folder) for folder in folders)
