"""Many runs with one command: a table of the paper, a setting, or what a small YAML file says.

    python tools/sweep.py table1                                     # every method, all data sets, three seeds
    python tools/sweep.py few_shot --datasets caltech101 dtd --trainers CoOp LoGoPrompt --shots 1 16 --jobs 2
    python tools/sweep.py mine.yaml --executor slurm --slurm.partition gpu --slurm.gpus 1 --slurm.time 240
    python tools/sweep.py base2new --datasets shapes --dry-run OPTIM.MAX_EPOCH 5

Runs, folders and settings are those of scripts/logo/*.sh. Finished runs are skipped, unfinished ones are resumed, one
that dies is tried again twice, and at the end there is a report. The keys of a YAML file are the names of the flags,
and ``overrides``, a mapping of config keys. Exit status: 0; 1 if a run failed; 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ["table1", "table2", "table3", "table4", "figure3"]
KNOWN += ["base2new", "few_shot", "domain", "crossdataset", "ablation"]
LISTS = {  # flags with several values
    "datasets": "data sets (files in configs/datasets); of domain and crossdataset, the sources",
    "trainers": "methods, also VP+TP and LoGoPrompt+Adapter",
    "configs": "files in configs/trainers/<trainer>; default: the paper's",
    "shots": "training images per class",
    "seeds": "seeds",
    "targets": "data sets that domain and crossdataset evaluate on",
}


def make_parser() -> argparse.ArgumentParser:
    """The flags; :func:`parse` splits off the KEY VALUE pairs that may follow them."""
    usage, style = "%(prog)s WHAT [flags] [KEY VALUE ...]", argparse.RawDescriptionHelpFormatter
    title, examples, rest = __doc__.split("\n\n", 2)
    texts = {"description": f"{title}\n\n{rest}", "epilog": f"examples:\n{examples}"}
    parser = argparse.ArgumentParser(**texts, usage=usage, formatter_class=style)
    add, environment = parser.add_argument, os.environ.get
    add("setting", nargs="?", default="", metavar="WHAT", help=f"{', '.join(KNOWN)}, or a YAML file")
    for name, text in LISTS.items():
        add(f"--{name}", nargs="+", help=text)
    add("--data", default=environment("DATA") or str(ROOT / "data"), help="folder of the data sets (DATA)")
    add("--output", default=environment("OUTPUT") or str(ROOT / "output"), help="folder of the runs (OUTPUT)")
    add("--features", default=environment("FEATURES"), help="feature store (FEATURES); default: in --output; '': none")
    add("--backbone", default=environment("BACKBONE") or "", help="CLIP weights (BACKBONE); default: the config's")
    add("--dry-run", action="store_true", help="print the commands")
    add("--executor", default="local", choices=["local", "slurm"])
    add("--jobs", type=int, default=0, help="runs at a time; default: one per GPU, else per core up to 8; slurm: 100")
    add("--slurm.partition", metavar="NAME")
    add("--slurm.time", type=int, default=24 * 60, metavar="MINUTES", help="limit of a job; its run goes on in another")
    add("--slurm.gpus", type=int, metavar="N", help="per run")
    add("--slurm.cpus", type=int, default=2, metavar="N", help="cores per run")
    add("--slurm.option", nargs="+", default=[], metavar="NAME=VALUE", help="other options of sbatch")
    add("--slurm.interval", type=float, default=10.0, metavar="SECONDS", help="between two calls of squeue")
    return parser


if __name__ == "__main__":
    make_parser().parse_known_args()  # --help and mistakes in the flags end here: the imports below take seconds

import report  # isort: skip
import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sweep_jobs import (
    ERRORS,
    PRESETS,
    Job,
    UserError,
    epoch,
    is_finished,
    last_line,
    make_jobs,
    run_job,
)
from trainers.prompting.backbone import reuse_backbone
from trainers.prompting.errors import messages
from trainers.prompting.run_folder import Stopped, stoppable

RETRIES = 2  # of a run that died
GRACE = 60.0  # seconds that a worker has to save a checkpoint
STATE = ".sweep"  # in the output folder
SHOWN = 12  # running runs, and failed ones, in the table
Ended = tuple[Job, Optional[int], str]  # a run, its exit status (None: it died), how in words


def work(connection: multiprocessing.connection.Connection) -> None:
    """A process that runs one job after another."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    reuse_backbone()
    with contextlib.suppress(EOFError):
        while True:
            connection.send(run_job(connection.recv()))


def stop_with_parent() -> None:
    """Let a run save its last epoch and end if the sweep is killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class Local:
    """Runs in ``count`` processes of this machine, each with one GPU if there are any.

    An executor tells how many more runs it takes (room), which runs of an earlier sweep it still has (adopt), and which
    have ended (poll, which waits for about a second); ``queued`` are the folders of those that have not begun.
    """

    queued: frozenset[str] = frozenset()

    def __init__(self, count: int) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        self.count = count or len(self.gpus) or min(8, os.cpu_count() or 1)
        if self.count > 1 and not self.gpus:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited
        self.workers: dict[int, tuple[Any, multiprocessing.connection.Connection]] = {}  # by place, from 0 to count - 1
        self.running: dict[int, Job] = {}

    def room(self) -> int:
        return self.count - len(self.running)

    def adopt(self, jobs: Sequence[Job]) -> list[Job]:
        return []

    def start(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            place = min(set(range(self.count)) - self.running.keys(), key=lambda place: place not in self.workers)
            if place not in self.workers:
                self.workers[place] = self._new_worker(place)
            self.running[place] = job
            with contextlib.suppress(OSError):  # it has died, which poll() reports
                self.workers[place][1].send(job)

    def _new_worker(self, place: int) -> tuple[Any, multiprocessing.connection.Connection]:
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal sends Ctrl-C to all processes
        process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()
        return process, ours

    def poll(self) -> list[Ended]:
        places, ended = {self.workers[place][1]: place for place in self.running}, []
        for connection in multiprocessing.connection.wait(places, timeout=1.0):
            place, status, how = places[connection], None, ""
            try:
                status = connection.recv()
            except (EOFError, OSError):
                process, _ = self.workers.pop(place)
                process.join()
                code = process.exitcode
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            ended.append((self.running.pop(place), status, how))
        return ended

    def stop(self) -> str:
        """End, also before the time; returns what became of the runs."""
        for place, (process, connection) in self.workers.items():
            connection.close()  # an idle worker ends
            if place in self.running:
                process.terminate()
        end = time.monotonic() + GRACE
        for process, _ in self.workers.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
        return "what was trained is saved up to the last epoch"


@dataclass
class Sweep:
    """The state of all runs, by folder."""

    jobs: dict[str, Job]
    executor: Any
    running: dict[str, float] = field(default_factory=dict)  # since when
    failed: dict[str, str] = field(default_factory=dict)  # why
    attempts: dict[str, int] = field(default_factory=dict)
    seconds: dict[tuple[str, bool], list[float]] = field(default_factory=dict)  # of finished runs by kind
    news: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = {folder for folder in self.jobs if is_finished(folder)}
        self.before = len(self.done)
        self.waiting = {folder: job for folder, job in self.jobs.items() if folder not in self.done}
        self._moved(self.executor.adopt(list(self.waiting.values())))

    def _moved(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            del self.waiting[job.folder]
            self.running[job.folder] = time.monotonic()

    def step(self) -> bool:
        """Start what can start, and wait a little. Returns whether something is left."""
        for job in list(self.waiting.values()):
            if lost := [need for need in job.needs if need in self.failed]:
                self._fail(job, f"skipped: needs {lost[0]}")
        ready = [job for job in self.waiting.values() if self.done.issuperset(job.needs)]
        if ready := ready[: max(0, self.executor.room())]:
            self._moved(ready)
            for job in ready:
                Path(job.folder, ERRORS).unlink(missing_ok=True)  # of an earlier attempt
            self.executor.start(ready)
        for ended in self.executor.poll() if self.running else ():
            self._ended(*ended)
        self.running.update((folder, time.monotonic()) for folder in self.executor.queued if folder in self.running)
        return bool(self.waiting or self.running)

    def _ended(self, job: Job, status: Optional[int], how: str) -> None:
        took = time.monotonic() - self.running.pop(job.folder)
        if is_finished(job.folder):
            self.done.add(job.folder)
            self.seconds.setdefault(job.kind, []).append(took)
            self.news.append(f"done: {job.title} ({took:.1f} s)")
            return
        attempt = self.attempts[job.folder] = self.attempts.get(job.folder, 0) + 1
        if status is None and attempt <= RETRIES:
            self.waiting = {job.folder: job, **self.waiting}
            self.news.append(f"again ({attempt} of {RETRIES}): {job.title}: {how}")
        else:
            self._fail(job, last_line(job, how or f"exit status {status} without results"))

    def _fail(self, job: Job, why: str) -> None:
        self.waiting.pop(job.folder, None)
        self.failed[job.folder] = why
        self.news.append(f"failed: {job.title}: {why}")

    def time_left(self) -> str:
        """From the mean duration of finished runs of the same kind, else of all."""
        if not self.seconds:
            return "unknown"
        means, now = {kind: statistics.mean(group) for kind, group in self.seconds.items()}, time.monotonic()
        mean = statistics.mean(second for group in self.seconds.values() for second in group)
        left = [means.get(job.kind, mean) for job in self.waiting.values()]
        left += [max(0.0, means.get(self.jobs[f].kind, mean) - (now - start)) for f, start in self.running.items()]
        return str(timedelta(seconds=round(sum(left) / max(1, len(self.running) - len(self.executor.queued)))))

    def counts(self) -> str:
        queued = len(self.executor.queued)
        left = f"; time left: {self.time_left()}" if self.waiting or self.running else ""
        return (
            f"{len(self.jobs)} runs: {len(self.waiting) + queued} waiting, {len(self.running) - queued} running, "
            f"{len(self.done)} done ({self.before} before), {len(self.failed)} failed{left}"
        )

    def __rich__(self) -> Table:
        table, now = Table("run", "state", title=self.counts(), expand=True), time.monotonic()
        for folder, start in [item for item in self.running.items() if item[0] not in self.executor.queued][:SHOWN]:
            took, job = timedelta(seconds=round(now - start)), self.jobs[folder]
            table.add_row(job.title, f"running, {took}, epoch {epoch(job) or '–'}")
        for folder, why in list(self.failed.items())[-SHOWN:]:
            table.add_row(self.jobs[folder].title, f"failed: {why}", style="red")
        return table

    def run(self) -> None:
        """All runs, with a live table on a terminal and lines elsewhere. Raises Stopped."""
        console = Console()
        print(self.counts(), flush=True)
        with Live(self, console=console, refresh_per_second=2) if console.is_terminal else contextlib.nullcontext():
            left = True
            while left:
                left = self.step()
                if self.news and not console.is_terminal:
                    print(*self.news, self.counts(), sep="\n", flush=True)
                self.news.clear()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, with lists filled in and absolute paths. Raises UserError with all mistakes."""
    parser, argv = make_parser(), list(argv)
    keys = (i for i, word in enumerate(argv) if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", word))
    cut = next(keys, len(argv))
    argv, overrides = argv[:cut], argv[cut:]
    args = parser.parse_args(argv)
    if args.setting.endswith((".yaml", ".yml")):
        found, more = read_yaml(args.setting, [action.dest for action in parser._actions])
        argv.remove(args.setting)
        args, overrides = parser.parse_args([*found, *argv]), [*more, *overrides]
    if args.setting not in KNOWN:
        raise UserError(f"{args.setting or 'no setting'}: choose one of {', '.join(KNOWN)}, or a YAML file")
    preset = PRESETS.get(args.setting)
    kind = preset.setting if preset else args.setting
    transfer = kind in ("domain", "crossdataset")
    defaults = {
        "datasets": preset.datasets if preset else "imagenet" if transfer else "",
        "trainers": preset.trainers if preset else "LoGoPrompt",
        "shots": preset.shots if preset else "1 2 4 8 16" if kind == "few_shot" else "16",
        "seeds": "1 2 3",
    }
    for name in LISTS:
        setattr(args, name, getattr(args, name) or defaults.get(name, "").split())
    errors = [f"{w}: flags must come before the KEY VALUE pairs" for w in overrides if w.startswith("--")]
    errors += ["datasets: add --datasets"] * (not args.datasets)
    errors += [f"targets: {args.setting} has none"] * (bool(args.targets) and not transfer)
    numbers = [(name, word) for name in ("shots", "seeds") for word in getattr(args, name)]
    for name, word in [*numbers, *[("--jobs", str(args.jobs))] * (args.jobs != 0)]:
        if not re.fullmatch(r"[1-9]\d*", word):
            errors.append(f"{name} {word}: a whole number of at least 1 is required")
    if errors:
        raise UserError(*errors)
    args.shots, args.seeds, args.overrides = list(map(int, args.shots)), list(map(int, args.seeds)), overrides
    args.data, args.output = absolute(args.data), absolute(args.output)
    args.features = os.path.join(args.output, "features.sqlite") if args.features is None else args.features
    args.features = args.features and absolute(args.features)
    scheme, _, folder = args.backbone.rpartition("local-dir:")
    if scheme == "" and folder != args.backbone:
        args.backbone = f"local-dir:{absolute(folder)}"
    elif os.path.isfile(args.backbone) or args.backbone.startswith("~/"):
        args.backbone = absolute(args.backbone)
    return args


def read_yaml(path: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a file says as words of the command line: flags, and KEY VALUE pairs. Raises UserError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        overrides = content.pop("overrides", {}).items()
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        reason = "not a mapping of names to values" if isinstance(error, AttributeError) else str(error)
        raise UserError(f"{path}: {' '.join(reason.split())}") from error
    if unknown := [name for name in content if name not in names or name in ("help", "dry_run")]:
        known = ", ".join([*names[1:], "overrides"])
        raise UserError(*(f"{path}: unknown name {name}: choose one of {known}" for name in unknown))
    flags = [str(content.pop("setting", ""))]
    for name, value in ((name, value) for name, value in content.items() if value is not None):
        values = value if isinstance(value, list) else str(value).split() if name in LISTS else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags, [str(word) for pair in overrides for word in pair]


def absolute(path: str) -> str:
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def make_report(args: argparse.Namespace) -> int:
    """Tables of the finished runs; returns an exit status."""
    folders = {"domain": "domain_generalization", "crossdataset": "cross_dataset"}
    preset = PRESETS.get(args.setting)
    runs = os.path.join(args.output, preset.folder if preset else folders.get(args.setting, args.setting))
    out = os.path.join(runs if preset else args.output, "report")
    seeds = map(str, args.seeds)
    return report.main([runs, "--seeds", *seeds, "--partial", "--predictions", "0", "--out", out])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status; a signal raises SystemExit (130, 143)."""
    argv, here, became = sys.argv[1:] if argv is None else list(argv), os.getcwd(), "nothing was started"
    try:
        args = parse(argv)
        os.chdir(ROOT)  # the names of configs are relative to it, as in the scripts
        jobs = make_jobs(args)
        if args.dry_run:
            print(f"cd {shlex.quote(str(ROOT))}")
            print(*(shlex.join([sys.executable, "train.py", *job.argv]) for job in jobs), sep="\n")
            return 0
        os.makedirs(state := os.path.join(args.output, STATE), exist_ok=True)
        with FileLock(os.path.join(state, "lock"), timeout=0), stoppable():
            if args.executor == "slurm":
                from sweep_slurm import Slurm  # submitit is optional

                executor = Slurm(state, args)
            else:
                executor = Local(args.jobs)
            try:
                sweep = Sweep({job.folder: job for job in jobs}, executor)
                sweep.run()
            finally:  # without it, the end of this process would wait for its workers
                became = executor.stop()
            reported = make_report(args) if sweep.done else 0
            print(sweep.counts())
            for folder, why in sweep.failed.items():
                print(f"failed: {folder}: {why}", file=sys.stderr)
            return 1 if sweep.failed or reported else 0
    except Stopped as stop:
        command = shlex.join([sys.executable, os.path.abspath(__file__), *argv])
        print(f"{stop.reason}: {became}; to continue, in {here}: {command}", file=sys.stderr)
        raise
    except Timeout:
        print(
            f"error: {args.output}: another sweep is running there; wait for its end or set --output", file=sys.stderr
        )
    except (UserError, OSError) as error:
        print(*(f"error: {line}" for line in messages(error)), sep="\n", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
