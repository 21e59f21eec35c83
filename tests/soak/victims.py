"""Runs of ``train.py`` that die where they are told to. A program; ``Victims`` speaks with it.

It imports everything once and forks a child for every run, since importing torch takes longer than a tiny run. A run
counts events: lines printed, steps of the optimiser, files opened, half written, synced, renamed and removed. At the
n-th one it kills itself with SIGKILL (or another signal). No clock has a part in it.
"""

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Victims:
    """A process that makes runs, each in a child of its own."""

    def __init__(self, **environment):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def start(self, argv, log, die_at=0, number=signal.SIGKILL, file_size=None):
        """Start ``train.py`` with the arguments ``argv``; what it prints goes to the files ``log`` and ``log.err``.

        Args:
            die_at: number of the event, from 1 on, at which it sends itself the signal ``number``; 0: none. Or a pair:
                the event's name and its number among those of that name.
            file_size: bytes that no file may be larger than, as if the disk were full.
        """
        job = {
            "argv": list(map(str, argv)),
            "log": str(log),
            "die_at": die_at,
            "number": number,
            "file_size": file_size,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def end(self):
        """(exit status, negative for a signal; what the run said of itself: events, predictions) of the first run."""
        status, said = json.loads(self._process.stdout.readline())
        return status, said

    def run(self, *args, **kwargs):
        self.start(*args, **kwargs)
        return self.end()

    def close(self):
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0


class Events:
    """Counts, and strikes at the n-th."""

    def __init__(self, die_at, number):
        self.count, self.die_at, self.number, self.owner, self.names = 0, die_at, number, os.getpid(), []

    def __call__(self, name):
        if os.getpid() != self.owner:  # a worker of a loader
            return
        self.count += 1
        self.names.append(name)
        if self.die_at in (self.count, [name, self.names.count(name)]):
            os.kill(self.owner, self.number)

    def around(self, module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            self(f"before {name}")
            return original(*args, **kwargs)

        setattr(module, name, wrapped)
        self.after(module, name)

    def after(self, module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            self(f"after {name}")
            return result

        setattr(module, name, wrapped)


class HalfWritten:
    """A file that something happens to in the middle of its content."""

    def __init__(self, file, event):
        self._file, self._event = file, event

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        content = memoryview(content)
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._event("half written")
        return self._file.write(content[len(content) // 2 :])


def one_run(job):
    """In the child: a run, and what it says of itself."""
    import resource

    import torch

    import train
    from trainers.prompting import results

    for name, stream in ((job["log"], 1), (f"{job['log']}.err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.argv = ["train.py", *job["argv"]]
    sys.orig_argv = [sys.executable, *sys.argv]
    torch.set_num_threads(1)
    if job["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    train.collect_env_info = str  # takes a second
    built = []
    original = train.build_trainer
    train.build_trainer = lambda cfg: built.append(original(cfg)) or built[0]
    event = Events(job["die_at"], job["number"])
    for name in ("replace", "fsync", "unlink", "makedirs"):
        event.around(os, name)
    event.around(torch.optim.SGD, "step")
    event.after(builtins, "print")
    results.open = lambda *args, **kwargs: HalfWritten(open(*args, **kwargs), event)  # noqa: SIM115
    try:
        status = train.main(job["argv"])
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    said = {"events": event.count, "names": event.names}
    if built and hasattr(built[0], "predictions"):
        said["predictions"] = built[0].predictions
    Path(f"{job['log']}.json").write_text(json.dumps(said))
    os._exit(status)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch.utils.tensorboard  # noqa: F401 (what takes so long)

    import train  # noqa: F401
    from trainers.prompting.backbone import import_provider

    import_provider()
    for line in sys.stdin:
        job = json.loads(line)
        answer = Path(f"{job['log']}.json")  # no pipe: orphaned workers of loaders would keep it open for seconds
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                one_run(job)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(70)
        _, status = os.waitpid(child, 0)
        said = json.loads(answer.read_text()) if answer.exists() else {}
        print(json.dumps([os.waitstatus_to_exitcode(status), said]), flush=True)


if __name__ == "__main__":
    main()
