"""Paths, fixtures and runs of ``train.py`` that all tests share."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "soak")]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads would wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # only on a CPU do runs repeat to the bit, and fp32 is the default

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tiny import ARCHITECTURES, arguments, caltech_tree, clip_state_dict  # noqa: E402

import fallback  # noqa: E402, F401 (before any test imports dassl)
import train  # noqa: E402

# The same few examples every time: fast, and no failures by chance.
settings.register_profile("fixed", derandomize=True, max_examples=40, deadline=None, database=None)
settings.load_profile("fixed")

GOLDEN = Path(os.environ.get("LOGO_REFERENCE", ROOT / "tests" / "golden"))
REAL_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config):
    import dassl

    # Processes started in the background of a shell ignore Ctrl-C, and pass that on to their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    if Path(dassl.__file__).is_relative_to(ROOT):  # the fallback: its warnings are ours
        config.addinivalue_line("filterwarnings", "error:::dassl")
    else:  # Dassl.pytorch's logger closes the stream it replaced, here pytest's, when it is garbage-collected
        from dassl.utils.logger import Logger

        Logger.__del__ = lambda self: None


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # so that collecting the garbage of runs is quick


def pytest_report_header(config):
    import dassl

    return f"dassl: {dassl.__file__} (version {getattr(dassl, '__version__', '?')})"


@pytest.fixture(autouse=True)
def restore_stdout(monkeypatch):
    """``setup_logger`` replaces sys.stdout by a logger; restore it after each test."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)


# ------------------------------------------------------------------------------------------------- data and weights


@pytest.fixture(scope="session")
def golden():
    """Folder of the reference values."""
    return GOLDEN


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A data root with links to the real Caltech101 and a small real backbone; new files stay in it."""
    if not (REAL_DATA / "caltech-101").is_dir():
        pytest.skip(f"no real Caltech101 at {REAL_DATA}")
    return linked_caltech(tmp_path_factory.mktemp("real"), REAL_DATA)


def linked_caltech(root, source):
    """A data root with links to another one's Caltech101, but with few-shot samples of its own."""
    (root / "caltech-101").mkdir(parents=True)
    for name in ("photo_clip.pt", "caltech-101/101_ObjectCategories", "caltech-101/split_zhou_Caltech101.json"):
        if (source / name).exists():
            (root / name).symlink_to(source / name)
    return root


def save_clip(arch, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / f"{arch}.pt"
    torch.save(clip_state_dict(arch), path)
    return str(path)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def clip_file(request, tmp_path_factory):
    """Path of a small random CLIP in OpenAI's layout, as a ViT and as a ResNet."""
    return save_clip(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def rn_file(tmp_path_factory):
    """Path of the small random ResNet CLIP (it has BatchNorm)."""
    return save_clip("rn", tmp_path_factory)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data root with a miniature Caltech101: 8 classes in CoOp's layout."""
    return caltech_tree(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A run of ``train.py`` in this process: exit status, output folder, trainer (None: not built), stderr."""

    status: int
    folder: Path
    trainer: Any
    error: str

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text())

    @property
    def timeless(self):
        """``results`` without their duration."""
        return {**self.results, "run": {key: x for key, x in self.results["run"].items() if key != "seconds"}}

    @property
    def log(self):
        """Of the last run; a further run in the folder starts a new file."""
        return max(self.folder.glob("log.txt*"), key=lambda path: path.stat().st_mtime_ns).read_text()

    @property
    def checkpoints(self):
        return self.folder / "prompt_learner"

    def checkpoint(self, name):
        """Content of a checkpoint: of an epoch, or with a file name."""
        name = name if isinstance(name, str) else f"model.pth.tar-{name}"
        return torch.load(self.checkpoints / name, weights_only=True)

    @property
    def outcome(self):
        """What was learned and measured, for :func:`differences`."""
        learned = self.trainer.model.learned
        state = {} if learned is None else {key: value.clone() for key, value in learned.state_dict().items()}
        return {"state": state, **{key: getattr(self.trainer.evaluation, key) for key in ("metrics", "predictions")}}


def start(argv, prepare=lambda trainer: None):
    """Call ``train.main``; ``prepare(trainer)`` comes before training. Returns the :class:`Run`."""
    built, build_trainer, error = [], train.build_trainer, io.StringIO()

    def build(cfg):
        built.append(build_trainer(cfg))
        prepare(built[0])
        return built[0]

    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error)
    with pytest.MonkeyPatch.context() as patch, streams[0], streams[1]:
        patch.setattr(train, "build_trainer", build)
        patch.setattr(train, "collect_env_info", str)  # takes a second
        try:
            status = train.main(argv)
        finally:
            sys.stdout.flush()  # log.txt
    gc.collect()  # models of earlier runs
    trainer = built[0] if built else None
    for loader in (trainer.train_loader_x, trainer.test_loader) if trainer else ():
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # before those of another run start: they would wait for each other
            loader._iterator = None
    return Run(status, Path(argv[argv.index("--output-dir") + 1]), trainer, error.getvalue())


def interrupt(epoch):
    """Prepare a trainer that is interrupted in an epoch, counted from 0."""

    def prepare(trainer):
        def after_step():
            if trainer.epoch == epoch:
                raise KeyboardInterrupt

        trainer.model.after_step = after_step

    return prepare


@pytest.fixture
def run(data_root, rn_file, tmp_path):
    """Run a trainer on the miniature data set, in ``tmp_path / out``."""

    def call(trainer, *opts, out="run", flags=(), seed=1, status=0, prepare=lambda trainer: None, root=data_root):
        found = start(arguments(trainer, root, rn_file, tmp_path / out, *opts, flags=flags, seed=seed), prepare)
        assert found.status == status, found.error
        return found

    return call


def check_shared_context(run, tmp_path, trainer, *options):
    """New classes are served, predictions depend on neither batches nor the feature store, a broken run resumes."""
    training = (*options, "OPTIM.MAX_EPOCH", 4, "OPTIM.LR", 0.02, "TRAIN.CHECKPOINT_FREQ", 1)
    trained = run(trainer, *training, out="base")
    with pytest.raises(KeyboardInterrupt):
        run(trainer, *training, out="broken", prepare=interrupt(2))
    resumed = run(trainer, *training, out="broken")
    assert resumed.trainer.start_epoch == 2 and differences(trained.outcome, resumed.outcome) == []
    flags = ["--eval-only", "--model-dir", tmp_path / "base"]
    small = ("DATALOADER.TEST.BATCH_SIZE", 3, "TEST.FEATURES", tmp_path / "store.sqlite")
    for out, opts in {"first": (), "encoded": small, "stored": small}.items():
        found = run(trainer, *options, *opts, out=out, flags=flags)
        assert found.outcome["predictions"] == trained.outcome["predictions"]
    new = run(trainer, *options, "DATASET.SUBSAMPLE_CLASSES", "new", out="new", flags=flags)
    assert torch.equal(new.outcome["state"]["ctx"], trained.outcome["state"]["ctx"]) and new.results["classes"] == 4


@pytest.fixture(scope="session")
def trained(data_root, rn_file, tmp_path_factory):
    """One run of each trainer with default settings, shared by all tests; do not change its folder or trainer."""
    runs = {}

    def call(trainer):
        if trainer not in runs:
            flags = ["--eval-only"] if trainer.startswith("ZeroshotCLIP") else []
            out = tmp_path_factory.mktemp(trainer) / "run"
            runs[trainer] = start(arguments(trainer, data_root, rn_file, out, flags=flags))
        assert runs[trainer].status == 0, runs[trainer].error
        return runs[trainer]

    return call


def run_script(cwd, script, *words, **environment):
    """Run ``scripts/<script>.sh`` as a user does. ``PYTHON="echo"`` prints the runs that it would make."""
    environment = {**os.environ, "PYTHON": sys.executable, "CFG": "photo64_ep50_ctxv1", "SHOTS": "2", **environment}
    command = ["bash", str(script if os.path.isabs(script) else ROOT / "scripts" / f"{script}.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def differences(a, b, where=""):
    """Places where two nested structures are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b)) for place in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [where]
