"""Runs of a sweep as jobs of Slurm, through submitit.

Every submission is a job array with a name of its own, which the state file holds before sbatch is called. All that
Slurm is asked is which of these names squeue lists, so a killed sweep, or a controller that is down, neither loses nor
doubles a run. How a run ended is in its folder and in a file that its job writes.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shlex
import signal
import subprocess
import time
import uuid
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from sweep_jobs import Job, UserError, is_finished, run_job, write_text

try:
    import submitit
    from submitit.core.utils import FailedJobError
except ImportError as error:
    raise UserError("--executor slurm: submitit is missing: pip install -r requirements-cluster.txt") from error

GONE = 2  # answers of squeue in a row that lack a job: it has ended
Place = tuple[str, int]  # name of a job array, and index in it


class Task:
    """A run in a job. When Slurm warns of preemption or of the time limit, the run is saved and the job requeued."""

    def __init__(self, job: Job, status: str) -> None:
        self.job, self.status = job, status

    def __call__(self) -> None:
        requeue, idle, warned = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM), []

        def warn(number: int, frame: Optional[FrameType]) -> None:
            if signal.getsignal(signal.SIGTERM) is idle:  # submitit's: there is no training to save
                requeue(number, frame)
            warned.append(number)
            os.kill(os.getpid(), signal.SIGTERM)  # training saves its last epoch and raises SystemExit

        signal.signal(signal.SIGUSR2, warn)
        try:
            write_text(self.status, str(run_job(self.job)))
        except SystemExit:
            if warned:
                requeue(*warned, None)
            raise

    def checkpoint(self) -> Any:
        """submitit's hook: what a requeued job calls. The run resumes from its folder."""
        return submitit.helpers.DelayedSubmission(self)


class Slurm:
    """Runs as jobs of Slurm, see :class:`sweep.Local`; ``state`` is a folder that all nodes see."""

    def __init__(self, state: str, args: Namespace) -> None:
        options = {name[6:]: value for name, value in vars(args).items() if name.startswith("slurm.")}
        self.interval, more = options.pop("interval"), options.pop("option")
        if wrong := [word for word in more if "=" not in word]:
            raise UserError(f"--slurm.option {wrong[0]}: NAME=VALUE is required")
        names = {"gpus": "gpus_per_node", "cpus": "cpus_per_task"}
        self.options = {names.get(name, name): value for name, value in options.items() if value}
        self.options["additional_parameters"] = {"requeue": True, **dict(word.split("=", 1) for word in more)}
        self.count, self.folder, self.file = args.jobs or 100, os.path.join(state, "slurm"), Path(state, "slurm.json")
        self.submitted: dict[str, list[str]] = {}  # folders of the runs of every array; empty once a job has ended
        self.running: dict[Place, Job] = {}
        self.absent: dict[Place, int] = {}  # answers in a row
        self.refused: dict[str, str] = {}  # what sbatch said
        self.queued: frozenset[str] = frozenset()

    def room(self) -> int:
        return self.count - len(self.running)

    def adopt(self, jobs: Sequence[Job]) -> list[Job]:
        by_folder = {job.folder: job for job in jobs}
        with contextlib.suppress(FileNotFoundError):
            self.submitted = json.loads(self.file.read_text(encoding="utf-8"))
        for name, folders in self.submitted.items():
            for place in ((name, i) for i, folder in enumerate(folders) if folder):
                folder = folders[place[1]]
                if self._status(place).exists() or is_finished(folder):
                    folders[place[1]] = ""
                elif folder in by_folder:  # else of another sweep
                    self.running[place] = by_folder[folder]
        self._write()
        return list(self.running.values())

    def start(self, jobs: Sequence[Job]) -> None:
        name = f"sweep-{uuid.uuid4().hex[:12]}"
        tasks = {(name, i): job for i, job in enumerate(jobs)}
        self.submitted[name] = [job.folder for job in jobs]
        self.running.update(tasks)
        self._write()
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=1000)
        threads = "OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
        setup = [f"export PYTHONPATH={shlex.quote(path)} {threads}"]
        executor.update_parameters(job_name=name, array_parallelism=self.count, setup=setup, **self.options)
        try:
            with executor.batch():
                for place, job in tasks.items():
                    executor.submit(Task(job, str(self._status(place))))
        except (FailedJobError, OSError) as error:  # also where the answer alone was lost: poll() will see
            self.refused[name] = " ".join(str(error).split())

    def poll(self) -> list[tuple[Job, Optional[int], str]]:
        time.sleep(self.interval)
        if (listed := self._listed()) is None:
            return []
        self.queued = frozenset(job.folder for place, job in self.running.items() if listed.get(place) == "PENDING")
        ended = []
        for place, job in list(self.running.items()):
            self.absent[place] = 0 if place in listed else self.absent.get(place, 0) + 1
            if self.absent[place] == GONE:
                del self.running[place]
                status = self._status(place)
                code = int(status.read_text()) if status.exists() else None
                ended.append((job, code, self.refused.get(place[0], "its Slurm job ended early")))
                self.submitted[place[0]][place[1]] = ""  # a new attempt is in another array
        if ended:
            self._write()
        return ended

    def _listed(self) -> Optional[dict[Place, str]]:
        """The states of this user's jobs; None while the controller does not answer."""
        command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%j %K %T"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [line.rsplit(maxsplit=2) for line in answer.stdout.splitlines()]
        found = {(name, int(index) if index.isdigit() else 0): state for name, index, state in rows}
        return None if answer.returncode else found

    def _status(self, place: Place) -> Path:
        """File that holds the run's exit status once it has ended by itself."""
        return Path(self.folder, f"{place[0]}-{place[1]}.status")

    def _write(self) -> None:
        self.submitted = {name: folders for name, folders in self.submitted.items() if any(folders)}
        write_text(str(self.file), json.dumps(self.submitted))

    def stop(self) -> str:
        names = ",".join(dict.fromkeys(name for name, _ in self.running))
        return f"its jobs go on in Slurm (scancel --name={names} ends them)" if names else "no job is running"
