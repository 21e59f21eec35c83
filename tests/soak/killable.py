"""Runs of ``train.py`` in child processes that kill themselves at a chosen moment.

Importing torch takes longer than a tiny run, so runs are forked from a process that has imported everything. A run
counts events: lines printed, steps of the optimizer, files opened, half written, synced, renamed and removed. No clock
is involved.
"""

import builtins
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401 (slow to import)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from trainers.prompting import results  # noqa: E402
from trainers.prompting.backbone import import_provider  # noqa: E402

import_provider()


class Killable:
    """A run of ``train.py`` in a process of its own; its output goes to the files ``log`` and ``log.err``.

    Args:
        at: number of the event, from 1 on, at which the run sends itself ``number``; or an event's name and its
            number among the events of that name. None: it runs to its end.
        file_size: limit of every file in bytes, as if the disk were full.
    """

    def __init__(self, argv, log, at=None, number=signal.SIGKILL, file_size=None):
        self.report_path = Path(f"{log}.json")
        self.report_path.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["killable"])
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # read by the fork server when it starts
        job = (list(map(str, argv)), str(log), at, number, file_size)
        self.process = context.Process(target=run_and_report, args=job)
        self.process.start()

    def end(self):
        """(exit status, negative for a signal; predictions and events, where the run got that far)."""
        self.process.join()
        report = json.loads(self.report_path.read_text()) if self.report_path.exists() else {}
        return self.process.exitcode, report


class Events:
    """Counts events, and sends the signal at the chosen one."""

    def __init__(self, at, number):
        self.at, self.number, self.owner, self.names = at, number, os.getpid(), []

    def __call__(self, name):
        if os.getpid() == self.owner:  # not in a loader's worker
            self.names.append(name)
            if self.at in (len(self.names), (name, self.names.count(name))):
                os.kill(self.owner, self.number)

    def watch(self, module, name, before=True):
        """Count calls of a function: before it (unless told otherwise) and after it."""
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            if before:
                self(f"before {name}")
            result = original(*args, **kwargs)
            self(f"after {name}")
            return result

        setattr(module, name, wrapped)


class HalfWritten(io.FileIO):
    """A file with an event in the middle of what is written to it."""

    event = None

    def write(self, content):
        content = memoryview(content).cast("B")
        for part_number, part in enumerate((content[: len(content) // 2], content[len(content) // 2 :])):
            while part:  # a nearly full disk takes a part of it
                part = part[super().write(part) :]
            if part_number == 0:
                self.event("half written")
        return len(content)


def run_and_report(argv, log, at, number, file_size):
    """In the child process: the run, and its report."""
    for name, stream in ((log, 1), (f"{log}.err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = sys.orig_argv = ["train.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as in a process of its own
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    train.collect_env_info = str  # takes a second
    built, build_trainer = [], train.build_trainer
    train.build_trainer = lambda cfg: built.append(build_trainer(cfg)) or built[0]
    event = Events(at, number)
    for name in ("replace", "fsync", "unlink", "makedirs"):
        event.watch(os, name)
    event.watch(torch.optim.SGD, "step")
    event.watch(builtins, "print", before=False)
    HalfWritten.event = event
    results.open = lambda path, mode="r", **kwargs: (HalfWritten if mode == "xb" else open)(path, mode, **kwargs)
    status = None
    try:
        status = train.main(argv)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stdout.flush()
        evaluation = built[0].evaluation if built else None
        report = {"events": event.names, "predictions": evaluation and evaluation.predictions}
        Path(f"{log}.json").write_text(json.dumps(report))
        if status is not None:  # else multiprocessing prints the exception
            os._exit(status)
