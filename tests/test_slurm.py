"""tools/sweep.py on a real Slurm of one node, which these tests start: Debian's slurm-wlm and munge, as root."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import ROOT
from test_sweep import CONFIG, RUN, finished, log_of, start, wait_for  # noqa: F401 (start: a fixture)

from trainers.prompting.results import is_finished

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why there can be no Slurm here, or nothing."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if programs:
        return f"no {', '.join(programs)} (apt-get install slurm-wlm munge)"
    if not importlib.util.find_spec("submitit"):
        return "no submitit (requirements-cluster.txt)"
    return "only root can start Slurm's daemons" if os.geteuid() else ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Cluster:
    """Daemons with all their files in one folder."""

    def __init__(self, folder):
        self.folder, self.environment = folder, {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports))
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir()
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        for path in (folder / "munge", folder / "munge" / "key"):
            shutil.chown(path, "munge", "munge")

    def call(self, *words, check=True, **options):
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=check, timeout=60, **options
        ).stdout

    def start(self):
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder / 'munge' / name}" for option, name in files.items()]
        self.call("munged", *options, user="munge", group="munge", extra_groups=[])
        self.call("slurmctld")
        self.call("slurmd", "-N", "localhost")
        wait_for(lambda: "idle" in self.call("sinfo", "--noheader", check=False), "idle node", 30)

    def stop(self, pid_file):
        with suppress(FileNotFoundError, ProcessLookupError):
            number = int((self.folder / pid_file).read_text())
            os.kill(number, signal.SIGTERM)
            wait_for(lambda: not os.path.exists(f"/proc/{number}"), f"end of {pid_file}", 30)

    def end_jobs(self):
        self.call("scancel", "--user=root", check=False)
        wait_for(lambda: not self.call("squeue", "--noheader", check=False), "end of all jobs", 30)

    def jobs(self):
        """(job, index) by name, of running jobs."""
        rows = self.call("squeue", "--noheader", "--array", "--states=RUNNING", "--format", "%i %j %K").splitlines()
        return {(name, int(index) if index.isdigit() else 0): job for job, name, index in map(str.split, rows)}


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged has a user of its own
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        for name in ("munge/pid", "slurmctld.pid", "slurmd.pid"):
            stack.callback(cluster.stop, name)
        stack.callback(cluster.end_jobs)
        cluster.start()
        yield cluster


@pytest.fixture
def command(cluster, data_root, rn_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])

    def words(setting, *flags, opts=()):
        places = ("--data", str(data_root), "--backbone", rn_file, "--output", str(tmp_path / "out"))
        slurm = ("--executor", "slurm", "--slurm.cpus", "1", "--slurm.interval", "0.5", "--slurm.time", "10")
        flags = ("--datasets", "caltech101", "--configs", CONFIG, "--shots", "2", *places, *slurm, *flags)
        return [sys.executable, str(ROOT / "tools" / "sweep.py"), setting, *flags, *RUN, *map(str, opts)]

    return words


def worker_of(folder):
    """Process number of the job that runs in a folder."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path("/proc", process, "cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" in words and os.readlink(f"/proc/{process}/fd/2") == f"{folder}/stderr.txt":
                return int(process)
    return None


def test_sweep_survives_what_happens_on_a_cluster(cluster, command, start, tmp_path):  # noqa: F811
    """Twelve runs; one is cancelled, one is killed, Slurm's controller restarts, and so does the sweep."""
    opts = ("OPTIM.MAX_EPOCH", "60", "TRAIN.CHECKPOINT_FREQ", "0")
    words = command("base2new", "--trainers", "CoOp", "ProGrad", opts=opts)
    out, state = tmp_path / "out", tmp_path / "out" / ".sweep" / "slurm.json"
    process = start(words)

    def training(known=()):
        folders = (path.parent for path in out.glob("base2new/train_base/**/log.txt"))
        return next((f for f in folders if f not in known and "epoch [3/60]" in log_of(f) and worker_of(f)), None)

    cancelled = wait_for(training, "training")
    (name, folders), *_ = json.loads(state.read_text()).items()
    cluster.call("scancel", cluster.jobs()[name, folders.index(str(cancelled))])
    killed = wait_for(lambda: training([cancelled]), "second training")
    os.kill(worker_of(killed), signal.SIGKILL)
    wait_for(lambda: any(is_finished(path.parent) for path in out.glob("**/results.json")), "finished run")
    process.kill()
    cluster.stop("slurmctld.pid")
    process = start(words)
    time.sleep(3)  # squeue fails
    cluster.call("slurmctld")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "12 done (" in stdout and " 0 failed" in stdout, stdout + stderr

    assert "Resuming from" in log_of(cancelled)  # what SIGTERM made it save
    for folder in (path.parent for path in out.glob("base2new/**/results.json")):
        assert len(list(folder.glob("log.txt*"))) == 1 + (folder in (cancelled, killed)), folder  # none ran twice
        assert {"stderr.txt"}.isdisjoint(os.listdir(folder))
    submitted = sorted(os.listdir(state.with_suffix("")))
    again = finished(words)
    assert again.returncode == 0 and "12 runs: 0 waiting, 0 running, 12 done (12 before)" in again.stdout
    assert sorted(os.listdir(state.with_suffix(""))) == submitted and json.loads(state.read_text()) == {}


def test_requeued_run_resumes(cluster, command, start, tmp_path):  # noqa: F811
    """Slurm warns of preemption and of the time limit by SIGUSR2."""
    opts = ("OPTIM.MAX_EPOCH", "60", "TRAIN.CHECKPOINT_FREQ", "0")
    process = start(command("few_shot", "--trainers", "CoOp", "--seeds", "1", opts=opts))
    folder = tmp_path / f"out/few_shot/caltech101/shots_2/CoOp/{CONFIG}/seed1"
    wait_for(lambda: "epoch [3/60]" in log_of(folder), "third epoch")
    (job,) = cluster.jobs().values()
    cluster.call("scancel", "--signal=USR2", job)
    wait_for(lambda: "Reason=BeginTime" in cluster.call("scontrol", "show", "job", job), "requeued job", 30)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "again" not in stdout, stdout + stderr  # the same job, no new attempt
    assert re.search(r"Resuming from .*after epoch \d", log_of(folder))


def test_failures_are_told(command, tmp_path):
    """A mistake in a run is not retried, and sbatch's refusal is the reason of the failure."""
    words = command("few_shot", "--trainers", "CoOp", "--seeds", "1")
    words[words.index("--datasets") + 1] = "dtd"
    done = finished(words)
    assert done.returncode == 1 and "again (" not in done.stdout, done.stdout + done.stderr
    assert re.search(r"failed: .*/dtd/.*: error: .*dtd", done.stderr)
    done = finished([*words[:-4], "--slurm.partition", "none", *words[-4:]])
    assert done.returncode == 1 and done.stdout.count("again (") == 2
    assert "invalid partition specified: none" in done.stderr.splitlines()[-1]
