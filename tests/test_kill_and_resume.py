"""A run that dies at any moment and is started again ends as an unbroken one, to the bit.

The runs are real ones of ``train.py`` in processes that kill themselves at a chosen event (``soak/killable.py``).
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differences, linked_caltech
from killable import Killable
from tiny import arguments

METHOD = "TRAINER.LOGOPROMPT."
STAGES = ("LoGoPrompt", METHOD + "ADAPTER", True, METHOD + "STAGE2_LR", 0.01)
SETTINGS = {
    "stages": STAGES,
    "views": (*STAGES, METHOD + "VIEWS", 2, "TRAIN.CHECKPOINT_FREQ", 2),
    "workers": ("LoGoPrompt", METHOD + "TUNE_VISUAL", True, METHOD + "TEXT_PROMPT", "generic",
                "DATALOADER.NUM_WORKERS", 2),
    "coop": ("CoOp", "TRAINER.COOP.CSC", True, "TEST.FINAL_MODEL", "best_val", "TEST.FEATURES", "STORE",
             "INPUT.TRANSFORMS", ["random_crop", "random_flip", "randomgrayscale", "normalize"]),
}  # fmt: skip
EPOCHS = 5
KILLS = {"stages": 2, "views": 2, "workers": 1, "coop": 2}  # pairs of moments, workers are slow to start


@pytest.fixture(scope="module")
def make(data_root, rn_file, tmp_path_factory):
    """Makes a :class:`Place` for runs of one of the ``SETTINGS``."""
    return lambda setting, *opts: Place(data_root, rn_file, tmp_path_factory.mktemp(setting), setting, opts)


@pytest.fixture(scope="module")
def unbroken(make):
    """Outcome and events of an unbroken run."""
    return lru_cache(lambda *setting: make(*setting).finish())


class Place:
    """An output folder, a data root for few-shot samples, and the command that runs there."""

    def __init__(self, data_root, rn_file, folder, setting, opts=()):
        self.folder, self.out, self.log = folder, folder / "run", folder / "log"
        self.data = linked_caltech(folder / "data", data_root)
        trainer, *settings = SETTINGS[setting]
        settings = [str(folder / "store.sqlite") if word == "STORE" else word for word in settings]
        opts = ("OPTIM.MAX_EPOCH", EPOCHS, "TRAIN.CHECKPOINT_FREQ", 1, "TRAIN.PRINT_FREQ", 1, *settings, *opts)
        self.argv = arguments(trainer, self.data, rn_file, self.out, *opts)

    def start(self, *flags, **kwargs):
        return Killable([*flags, *self.argv], self.log, **kwargs)

    def run(self, *flags, **kwargs):
        return self.start(*flags, **kwargs).end()

    @property
    def samples(self):
        return self.data / "caltech-101" / "split_fewshot"

    @property
    def checkpoints(self):
        return self.out / "prompt_learner"

    @property
    def errors(self):
        return Path(f"{self.log}.err").read_text()

    def finish(self):
        """Run to the end. Returns the outcome and the events."""
        status, report = self.run()
        assert status == 0, self.errors
        return self.outcome(report), report["events"]

    def outcome(self, report):
        """Everything that a finished run leaves."""
        assert not [path for path in self.out.rglob("*") if path.name.endswith(".tmp")]
        assert (self.checkpoints / "checkpoint").read_text() == f"model.pth.tar-{EPOCHS}\n"
        results = (self.out / "results.json").read_text().replace(str(self.folder), "")
        results = re.sub(r'"seconds": [\d.]+', "", results)
        found = {"predictions": report["predictions"], "results": results}
        for path in [self.checkpoints / f"model.pth.tar-{EPOCHS}", *self.checkpoints.glob("model-best.pth.tar")]:
            found[path.name] = torch.load(path, weights_only=True)
            assert found[path.name].pop("config")  # names this folder
            (found[path.name].get("best") or {}).pop("config", None)
        return {**found, **{path.name: path.read_bytes() for path in self.samples.glob("*.json")}}


def check(place, expected, moments):
    """Kill a run at each of the moments, start it again, and compare how it ends."""
    for at in moments:
        status, report = place.run(at=at)
        if status == 0:  # resumed so late that it had fewer events
            assert differences(expected, place.outcome(report)) == []
            return
        assert status == -signal.SIGKILL, place.errors
    assert differences(expected, place.finish()[0]) == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_run_ends_as_an_unbroken_one(make, unbroken, setting):
    expected, events = unbroken(setting)
    draw = random.Random(f"moments of {setting}")
    writing = [i for i, name in enumerate(events, 1) if name in ("half written", "before replace", "after replace")]
    for _ in range(KILLS[setting]):
        check(make(setting), expected, [draw.randint(1, len(events)), draw.choice(writing)])


@pytest.mark.soak
@pytest.mark.parametrize("setting", SETTINGS)
def test_run_killed_at_every_event(make, unbroken, setting):
    """And at a hundred pairs of events."""
    expected, events = unbroken(setting)
    draw = random.Random(f"pairs of {setting}")
    pairs = [(draw.randint(1, len(events)), draw.randint(1, len(events))) for _ in range(100)]
    for moments in [*((i,) for i in range(1, len(events) + 1)), *pairs]:
        place = make(setting)
        check(place, expected, moments)
        shutil.rmtree(place.folder)


# ------------------------------------------------------------------------------------------------- signals


def in_epoch(n, steps=2):
    """The moment after the last step of the n-th epoch of a process."""
    return "after step", steps * n


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_the_last_complete_epoch(make, unbroken, number):
    """Also where no checkpoint was due."""
    setting = ("views", "TRAIN.CHECKPOINT_FREQ", 0)
    place = make(*setting)
    for epoch, checkpoints in ((1, []), (4, ["model.pth.tar-3"])):
        status, _ = place.run(at=in_epoch(epoch), number=number)
        (line,) = place.errors.splitlines()
        assert status == 128 + number and line.startswith(f"stopped by {number.name}: ") and "train.py" in line
        assert [path.name for path in place.checkpoints.glob("model*")] == checkpoints
        assert ("tar-3, after epoch 3" if checkpoints else "no epoch was finished") in line
    found, _ = place.finish()
    assert "Resuming from" in place.log.read_text() and differences(unbroken(*setting)[0], found) == []


# ------------------------------------------------------------------------------------------------- damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """Flip one bit of a parameter, which torch alone does not notice."""
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["state_dict"]["ctx"]
    content[bytes(content).index(state.numpy().tobytes()[:16])] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(make, unbroken):
    """A run that was killed in its fourth epoch, and the outcome of an unbroken one."""
    made = {}

    def call(setting):
        if setting not in made:
            place = make(setting)
            steps = 1 if setting == "coop" else 2  # its sampler draws fewer images
            assert place.run(at=in_epoch(4, steps))[0] == -signal.SIGKILL
            made[setting] = place, place.out.rename(place.folder / "stopped")
        place, copy = made[setting]
        shutil.rmtree(place.out, ignore_errors=True)
        shutil.copytree(copy, place.out)
        return unbroken(setting)[0], place

    return call


@pytest.mark.parametrize("damage, names, resumed", [
    (cut, "model.pth.tar-3", 2),
    (empty, "model.pth.tar-3", 2),
    (flip, "model.pth.tar-3", 2),
    (empty, "model*", None),
    (lambda path: path.write_text("../../../etc/passwd\n"), "checkpoint", 3),
])  # fmt: skip
def test_damaged_checkpoints_are_skipped(stopped, damage, names, resumed):
    expected, place = stopped("stages")
    for path in place.checkpoints.glob(names):
        damage(path)
    assert differences(expected, place.finish()[0]) == []
    log, fault = place.log.read_text(), "not a checkpoint that can be read"
    assert (f"WARNING: {place.checkpoints}/model.pth.tar-3: {fault}" in log) == (names != "checkpoint")
    found = f'Resuming from "{place.checkpoints}/model.pth.tar-{resumed}" after epoch {resumed}'
    assert (found if resumed else "No checkpoint found that can be read, train from scratch") in log


@pytest.mark.parametrize("damage, has_epoch", [(cut, True), (Path.unlink, False)])
def test_damaged_best_model_is_restored(stopped, damage, has_epoch):
    expected, place = stopped("coop")
    best = place.checkpoints / "model-best.pth.tar"
    epoch = torch.load(best, weights_only=True)["epoch"]
    damage(best)
    if not has_epoch:
        (place.checkpoints / f"model.pth.tar-{epoch}").unlink()
    assert epoch <= 3 and differences(expected, place.finish()[0]) == []


def test_run_resumed_from_another_folder_continues_from_its_own(stopped):
    expected, place = stopped("views")
    first = place.out.rename(place.folder / "first")
    assert place.run("--resume", first, at=in_epoch(3))[0] == -signal.SIGKILL  # the fifth of all
    (before,) = [path.name for path in place.checkpoints.glob("model*")]
    status, report = place.run("--resume", first)
    assert status == 0 and f'Resuming from "{place.checkpoints}/{before}"' in place.log.read_text()
    assert differences(expected, place.outcome(report)) == []
    shutil.rmtree(first)


def test_two_runs_draw_one_few_shot_sample(make, unbroken):
    """Both write it at the same time, after a run that was killed halfway."""
    expected, events = unbroken("stages")
    first, second = make("stages"), make("stages")
    second.argv[second.argv.index("--root") + 1] = str(first.data)
    writing = [at for at, event in enumerate(events, start=1) if event == "half written"]
    assert first.run(at=writing[1])[0] == -signal.SIGKILL  # the first is of environment.txt
    assert [path.suffix for path in first.samples.iterdir()] == [".tmp"]
    for place, process in [(place, place.start()) for place in (first, second)]:
        status, report = process.end()
        assert status == 0 and report["predictions"] == expected["predictions"], place.errors
    (sample,) = first.samples.glob("*.json")
    assert sample.read_bytes() == expected[sample.name]


# ------------------------------------------------------------------------------------------------- full disk


def mounting(folder):
    """Words before a command that let it mount; None where nobody may."""
    for words in (["unshare", "-rm"], []):
        script = f"mount -t tmpfs -o size=64k none {folder} && umount {folder}"
        if (
            shutil.which("unshare")
            and subprocess.run([*words, "sh", "-c", script], capture_output=True).returncode == 0
        ):
            return words
    return None


def test_full_disk_ends_in_one_line_and_loses_nothing(make, unbroken, tmp_path):
    """With more and more space; afterwards the same command completes the run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = mounting(folder)
    if words is None:
        pytest.skip("no file system can be mounted here (test_limit_on_file_sizes covers part of it)")
    (expected, _), place = unbroken("stages"), make("stages")
    place.argv[place.argv.index("--output-dir") + 1] = str(folder / "run")
    program, sizes = ROOT / "tests" / "soak" / "small_disk.py", ("0", "24", "160")
    command = [*words, sys.executable, program, folder, json.dumps(place.argv), *sizes]
    subprocess.run(list(map(str, command)), check=True)
    epochs = []
    for size in sizes:
        place.out, place.log = tmp_path / f"{size}-full", tmp_path / f"{size}-full.log"
        (line,) = place.errors.splitlines()
        assert line.startswith("error: ") and str(folder) in line and line.endswith(": No space left on device")
        assert not list(place.out.rglob("*.tmp")) and not (place.out / "results.json").exists()
        states = [torch.load(path, weights_only=True) for path in place.checkpoints.glob("model*")]
        epochs.append(sorted(state["epoch"] for state in states))
        assert json.loads((tmp_path / f"{size}-full.json").read_text())[0] == 2
        place.out = tmp_path / f"{size}-again"
        status, report = json.loads((tmp_path / f"{size}-again.json").read_text())
        found = place.outcome(report)
        assert status == 0 and set(differences(expected, found)) <= {"/results"}  # names another folder
    assert epochs[0] == [] != epochs[-1] and all(done == list(range(1, len(done) + 1)) for done in epochs)


def test_limit_on_file_sizes(make, unbroken):
    """No file may become as large as a checkpoint."""
    place = make("stages", "TRAIN.DECODED_GB", 0.0)  # shared memory counts as a file
    assert place.run(at=in_epoch(3))[0] == -signal.SIGKILL
    size = (place.checkpoints / "model.pth.tar-2").stat().st_size
    assert place.run(file_size=size - 100)[0] == 2
    assert place.errors == f"error: {place.checkpoints}/model.pth.tar-3: File too large\n"
    left = sorted(path.name for path in place.checkpoints.iterdir())
    assert left == ["checkpoint", "model.pth.tar-1", "model.pth.tar-2"]
    assert differences(unbroken("stages", "TRAIN.DECODED_GB", 0.0)[0], place.finish()[0]) == []
