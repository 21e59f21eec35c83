"""The runs of a sweep, checked before any of them starts, and one of them in this process.

Folders, configs and overrides are those of ``scripts/logo/*.sh``: the runs of either count as finished for the other.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Optional

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
import torch

from trainers.prompting.errors import UserError, messages
from trainers.prompting.results import is_finished, write_text

ROOT = Path(train.__file__).resolve().parent
ERRORS = "stderr.txt"  # in a run's folder until it has ended well
ELEVEN = "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
VARIATIONS = "imagenetv2 imagenet_sketch imagenet_a imagenet_r"
ROWS = "ZeroshotCLIP CoOp CoCoOp VPT DPT LoGoPrompt"
ROWS_2 = "CoOp VP+TP LoGoPrompt CLIPAdapter TipAdapter TipAdapterF LoGoPrompt+Adapter"
# What the end of a row's name adds to the config.
VARIANTS = {"TP": ("TRAINER.VP.TEXT_PROMPT", "learned"), "Adapter": ("TRAINER.LOGOPROMPT.ADAPTER", "True")}


class Preset(NamedTuple):
    """A table of the paper: folder of its rows, and what it consists of unless told otherwise."""

    folder: str
    setting: str
    datasets: str
    trainers: str
    shots: str = "16"


PRESETS = {
    "table1": Preset("table1", "base2new", ELEVEN, ROWS),
    "table2": Preset("table2", "few_shot", ELEVEN, ROWS_2),
    "table3": Preset("table3", "domain", "imagenet", ROWS),
    "table4": Preset("table4", "ablation", "imagenet", "LoGoPrompt"),
    "figure3": Preset("tablefigure3", "few_shot", ELEVEN, "ZeroshotCLIP LinearProbe CoOp LoGoPrompt", "1 2 4 8 16"),
}


@dataclass(frozen=True)
class Job:
    """One run of ``train.py``."""

    folder: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]  # folders of runs that must be finished
    title: str
    asked: str  # asked.txt of the scripts: what the folder's name does not tell

    @property
    def kind(self) -> tuple[str, bool]:
        """Runs of a kind take about as long: trainer, and whether it only evaluates."""
        return self.argv[self.argv.index("--trainer") + 1], "--eval-only" in self.argv


@dataclass
class Row:
    """A method with a number of shots; ``spec`` holds what the flags of tools/sweep.py say."""

    spec: Namespace
    output: str
    trainer: str
    shots: int
    config: str  # empty: the paper's
    variant: Sequence[str]

    @property
    def zero_shot(self) -> bool:
        return self.trainer.startswith("ZeroshotCLIP")

    def config_of(self, dataset: str, default: str) -> str:
        default = "tiny96_ep10_ctxv1" if dataset.startswith("shapes") else default  # the toy world has its own CLIP
        for size in ("vit_b16", "tiny96") if self.trainer == "CoCoOp" else ():
            default = f"{size}_c4_ep10_batch1_ctxv1" if default.startswith(size) else default
        return self.config or default

    def job(self, path: str, dataset: str, subset: str, config: str, seed: int, opts=(), source="", about="") -> Job:
        """A run in ``path``, where ``{}`` is the end of all folders; ``source`` is the run that it evaluates."""
        folder = os.path.join(self.output, path.format(f"shots_{self.shots}/{self.trainer}/{config}/seed{seed}"))
        group = "CoOp" if self.zero_shot or self.trainer == "LinearProbe" else self.trainer  # they have no configs
        files = f"configs/datasets/{dataset}.yaml", f"configs/trainers/{group}/{config}.yaml"
        opts, backbone = [*opts, *self.spec.overrides, *self.variant], self.spec.backbone
        argv = [
            *("--root", self.spec.data, "--seed", str(seed), "--trainer", self.trainer),
            *(("--backbone", backbone) if backbone else ()),
            *("--dataset-config-file", files[0], "--config-file", files[1], "--output-dir", folder),
            *(("--eval-only",) if source or self.zero_shot else ()),
            *(("--model-dir", source) if source else ()),
            *("DATASET.NUM_SHOTS", str(self.shots), "DATASET.SUBSAMPLE_CLASSES", subset),
            *("TEST.FEATURES", self.spec.features, *opts),
        ]
        asked = f"BACKBONE={backbone} {' '.join(f'{f} ({checksum(f)})' for f in files)} {' '.join(opts)}"
        title = f"{self.trainer} on {dataset}{about}, {subset} classes, {self.shots} shots, seed {seed}"
        return Job(folder, tuple(argv), (source,) if source else (), title, asked)


def base2new(row: Row, dataset: str) -> Iterator[Job]:
    config = row.config_of(dataset, "vit_b16_ep50_ctxv1" if dataset == "imagenet" else "vit_b16_ctxv1")
    for seed in row.spec.seeds:
        first = "test_base" if row.zero_shot else "train_base"
        yield (base := row.job(f"base2new/{first}/{dataset}/{{}}", dataset, "base", config, seed))
        yield row.job(f"base2new/test_new/{dataset}/{{}}", dataset, "new", config, seed, source=base.folder)


def few_shot(row: Row, dataset: str) -> Iterator[Job]:
    epochs = "_ep50" if dataset == "imagenet" or row.shots == 1 else "_ep100" if row.shots in (2, 4) else ""
    config = row.config_of(dataset, f"rn50{epochs}")
    for seed in row.spec.seeds:
        yield row.job(f"few_shot/{dataset}/{{}}", dataset, "all", config, seed)


def transfer(kind: str, other: str, targets: str, row: Row, dataset: str) -> Iterator[Job]:
    """As in the scripts, a source that the ``other`` kind has trained is not trained again."""
    config, folder = row.config_of(dataset, "vit_b16_ep50_ctxv1"), f"{kind}/from_{dataset}"
    for seed in row.spec.seeds:
        run = partial(row.job, dataset=dataset, subset="all", config=config, seed=seed)
        own, source = (run(f"{name}/from_{dataset}/{dataset}/{{}}") for name in (kind, other))
        if trained(own) or not trained(source) or asked_before(source) != source.asked:
            source = own
        yield source
        if source != own:
            yield run(f"{folder}/{dataset}/{{}}", source=source.folder)
        for target in row.spec.targets or targets.split():
            if target != dataset:
                more = {"source": source.folder, "about": f" from {dataset}"}
                yield row.job(f"{folder}/{target}/{{}}", target, "all", config, seed, **more)


def ablation(row: Row, dataset: str) -> Iterator[Job]:
    if row.trainer != "LoGoPrompt":
        raise UserError(f"trainers {row.trainer}: these are ablations of LoGoPrompt")
    config, key = row.config_of(dataset, "rn50_ep50" if dataset == "imagenet" else "rn50"), "TRAINER.LOGOPROMPT."
    rows = {
        "shipped": (),
        **{f"4a_{use}": (f"{key}VISUAL_PROMPT", use) for use in ("none", "text_augmentation", "paired")},
        "4b_1_14": (f"{key}BLOCK_HEIGHT", "0.0714285714"),
        "4b_2_7": (f"{key}BLOCK_HEIGHT", "0.2857142857"),
        **{f"4c_{m}": (f"{key}CTX_INIT", "", f"{key}N_CTX", m) for m in ("2", "8", "16")},
        **{f"4d_{place}": (f"{key}LOCATION", place) for place in ("top", "bottom")},
    }
    if not config.endswith("ctxv1"):
        del rows["4c_16"]  # the shipped one
    for name, opts in rows.items():
        for seed in row.spec.seeds:
            yield row.job(f"ablation/{name}/{dataset}/{{}}", dataset, "all", config, seed, opts, about=f" ({name})")


SETTINGS = {
    "base2new": base2new,
    "few_shot": few_shot,
    "domain": partial(transfer, "domain_generalization", "cross_dataset", VARIATIONS),
    "crossdataset": partial(transfer, "cross_dataset", "domain_generalization", ELEVEN),
    "ablation": ablation,
}


@cache
def checksum(file: str) -> str:
    """What ``cksum`` prints for a file of the repository. Raises UserError."""
    if not os.path.isfile(ROOT / file):
        raise UserError(f"{ROOT / file}: no such file; check datasets, trainers and configs")
    with open(ROOT / file, "rb") as content:
        done = subprocess.run(["cksum"], stdin=content, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def make_jobs(spec: Namespace) -> list[Job]:
    """All runs, those that others need first. Raises UserError with a line for every mistake."""
    preset, jobs, errors = PRESETS.get(spec.setting), [], []
    for dataset in spec.datasets:
        if not dataset.startswith("shapes") and not os.path.isdir(spec.data):
            errors.append(f"--data {spec.data}: no such folder; set it, or DATA, to the folder of the data sets")
        for name in spec.trainers:
            trainer, *variants = name.split("+")
            if not set(variants) <= VARIANTS.keys():
                errors.append(f"trainers {name}: only +{' and +'.join(VARIANTS)} are known")
            variant = [word for key in variants for word in VARIANTS.get(key, ())]
            output = os.path.join(spec.output, preset.folder, name) if preset else spec.output
            for shots in spec.shots:
                for config in spec.configs or [""]:
                    row = Row(spec, output, trainer, shots, config, variant)
                    try:
                        jobs += SETTINGS[preset.setting if preset else spec.setting](row, dataset)
                    except UserError as error:
                        errors += error.args
    jobs, seen, by_folder = list(dict.fromkeys(jobs)), set(), {}
    for job in jobs:
        if by_folder.setdefault(job.folder, job) != job:
            errors.append(f"{job.folder}: two runs of this sweep differ in more than their folder tells")
        if fault := other_run(job):
            errors.append(fault)
        args = train.parse_args(job.argv)
        args.output_dir, args.seed, args.model_dir = "", 1, args.model_dir and "."  # what else differs is checked
        if repr(args) not in seen:
            seen.add(repr(args))
            try:
                train.setup_cfg(args)
            except UserError as error:
                errors += error.args
    if errors:
        raise UserError(*dict.fromkeys(errors))
    return jobs


def other_run(job: Job) -> Optional[str]:
    """A line if the folder of a run holds another one, as the scripts see it."""
    asked = asked_before(job)
    if asked == job.asked or not (os.path.isfile(os.path.join(job.folder, "results.json")) or trained(job)):
        return None
    return f"{job.folder} belongs to another run ({asked}, now {job.asked}): set --output or delete it"


def trained(job: Job) -> bool:
    """Whether the folder of a run has a checkpoint."""
    return os.path.isfile(os.path.join(job.folder, "prompt_learner", "checkpoint"))


def asked_before(job: Job) -> str:
    """``asked.txt`` in the folder of a run, empty without one."""
    with contextlib.suppress(FileNotFoundError):
        return Path(job.folder, "asked.txt").read_text(encoding="utf-8").rstrip("\n")
    return ""


def run_job(job: Job) -> int:
    """The run in this process, as in a new one. Returns ``train.py``'s exit status, and raises what that raises.

    What it prints is in its log alone; stderr goes to a file in its folder.
    """
    os.makedirs(job.folder, exist_ok=True)
    with open(errors := os.path.join(job.folder, ERRORS), "wb") as file:
        os.dup2(file.fileno(), 2)  # for libraries and dying processes, too
    os.chdir(ROOT)
    sys.argv = ["train.py", *job.argv]
    sys.orig_argv = [sys.executable, *sys.argv]  # what an interrupted run tells the user to call
    lock = FileLock(os.path.join(job.folder, ".asked.lock"), timeout=0)  # as the scripts
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), lock:
            if fault := other_run(job):
                raise UserError(fault)
            status = 0
            if not is_finished(job.folder):
                write_text(os.path.join(job.folder, "asked.txt"), f"{job.asked}\n")
                status = train.main(job.argv)
    except (UserError, OSError) as error:  # Timeout is an OSError
        locked = f"{job.folder}: another run is writing into this folder; wait for its end"
        lines = [locked] if isinstance(error, Timeout) else messages(error)
        print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
        status = 2
    if status == 0:
        os.unlink(errors)
    gc.collect()  # the model
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # TRAIN.COMPILE: a process compiles a limited number of models
    return status


def last_line(job: Job, otherwise: str) -> str:
    """The last line that a failed run wrote to stderr."""
    with contextlib.suppress(OSError):
        text = Path(job.folder, ERRORS).read_text(encoding="utf-8", errors="replace")
        return text.strip().splitlines()[-1] if text.strip() else otherwise
    return otherwise


def epoch(job: Job) -> str:
    """How far a run is, from the end of its log: "3/50", or nothing."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        log = max(Path(job.folder).glob("log.txt*"), key=os.path.getmtime)
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4096))
            return re.findall(rb"epoch \[(\d+/\d+)\]", file.read())[-1].decode()
    return ""
