"""A run that is killed anywhere and started again ends as one that was not: parameters, metrics, predictions, samples.

The runs are real ones of ``train.py``, in children of one process that has imported everything (``soak/victims.py``).
They kill themselves at an event whose number was drawn beforehand, so nothing here waits or hopes.
"""

import random
import shutil
import signal
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import arguments

sys.path.insert(0, str(ROOT / "tests" / "soak"))
from victims import Victims  # noqa: E402

METHOD = "TRAINER.LOGOPROMPT."
STAGES = (METHOD + "ADAPTER", True, METHOD + "STAGE2_LR", 0.01)
SETTINGS = {
    "stages": ("LoGoPrompt", *STAGES),
    "bank": ("LoGoPrompt", *STAGES, METHOD + "VIEWS", 2, "TRAIN.CHECKPOINT_FREQ", 2),
    "workers": ("LoGoPrompt", METHOD + "TUNE_VISUAL", True, METHOD + "TEXT_PROMPT", "generic",
                "TEST.FINAL_MODEL", "best_val", "DATALOADER.NUM_WORKERS", 2),
    "coop": ("CoOp", "TRAINER.COOP.CSC", True, "TEST.FINAL_MODEL", "best_val", "TEST.FEATURES", "kept.sqlite",
             "INPUT.TRANSFORMS", ["random_crop", "random_flip", "randomgrayscale", "normalize"]),
}  # fmt: skip
EPOCHS = 5
KILLS = {"stages": 6, "bank": 6, "workers": 2, "coop": 6}  # workers take their time to start


@pytest.fixture(scope="module")
def victims():
    process = Victims()
    yield process
    process.close()


@pytest.fixture(scope="module")
def make(victims, data_root, rn_file, tmp_path_factory):
    """A function that makes a place for runs of one of the ``SETTINGS``."""
    return lambda setting, *opts: Place(victims, data_root, rn_file, tmp_path_factory.mktemp(setting), setting, opts)


@pytest.fixture(scope="module")
def whole(make):
    """What an unbroken run ends as, and its events."""
    return lru_cache(lambda *setting: make(*setting).finish())


class Place:
    """An output folder, a data root that keeps few-shot samples, and the one command that runs there."""

    def __init__(self, victims, data_root, rn_file, folder, setting, opts=()):
        self.victims, self.folder, self.out, self.log = victims, folder, folder / "run", folder / "log"
        data = folder / "data" / "caltech-101"
        data.mkdir(parents=True)
        for name in ("101_ObjectCategories", "split_zhou_Caltech101.json"):
            (data / name).symlink_to(data_root / "caltech-101" / name)
        trainer, *settings = SETTINGS[setting]
        settings = [str(folder / word) if word == "kept.sqlite" else word for word in settings]
        opts = ("OPTIM.MAX_EPOCH", EPOCHS, "TRAIN.CHECKPOINT_FREQ", 1, "TRAIN.PRINT_FREQ", 1, *settings, *opts)
        self.argv = arguments(trainer, folder / "data", rn_file, self.out, *opts)

    def run(self, *flags, **kwargs):
        return self.victims.run([*flags, *self.argv], self.log, **kwargs)

    def start(self, **kwargs):
        self.victims.start(self.argv, self.log, **kwargs)

    def forget(self):
        """Be as before the first run."""
        for folder in (self.out, self.folder / "data" / "caltech-101" / "split_fewshot"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "kept.sqlite").unlink(missing_ok=True)

    @property
    def checkpoints(self):
        return self.out / "prompt_learner"

    @property
    def errors(self):
        return Path(f"{self.log}.err").read_text()

    def finish(self):
        """Run to the end. Returns all that a run may be asked about, and its events."""
        status, said = self.run()
        assert status == 0, self.errors
        return self.outcome(said), said["names"]

    def outcome(self, said):
        """What a finished run has left."""
        folder = self.checkpoints
        assert not [path for path in self.out.rglob("*") if path.name.endswith(".tmp")]
        assert (folder / "checkpoint").read_text() == f"model.pth.tar-{EPOCHS}\n"
        results = (self.out / "results.json").read_text().replace(str(self.out), "")
        found = {"predictions": said["predictions"], "results": results}
        for path in [folder / f"model.pth.tar-{EPOCHS}", *folder.glob("model-best.pth.tar")]:
            found[path.name] = torch.load(path, weights_only=True)
            assert found[path.name].pop("config")  # names this folder
        samples = self.folder / "data" / "caltech-101" / "split_fewshot"
        for path in samples.glob("*.json"):  # a kill may leave a temporary file
            found[path.name] = path.read_bytes()
        return found


def differences(a, b, where=""):
    """Where two nested structures are not the same to the bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        keys = list(a) if a.keys() == b.keys() else []
        return [d for k in keys for d in differences(a[k], b[k], f"{where}/{k}")] if keys or not a else [where]
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b))
        return [where] if len(a) != len(b) else [d for i, pair in pairs for d in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [where]


def check(place, unbroken, moments):
    """Kill a run at the moments given, one after the other (what has finished begins anew), and look how it ends."""
    moments = list(moments)
    while moments:
        status, said = place.run(die_at=moments[0])
        if status == 0:  # it went on from so late that it had fewer events
            assert differences(unbroken, place.outcome(said)) == []
            place.forget()
        else:
            assert status == -signal.SIGKILL, place.errors
            moments.pop(0)
    assert differences(unbroken, place.finish()[0]) == []


def test_differences_are_seen():
    state = {"a": [torch.ones(2), (1, 2.0)], "b": {"c": b"x"}}
    assert differences(state, {"a": [torch.ones(2), (1, 2.0)], "b": {"c": b"x"}}) == []
    assert differences(state, {"a": [torch.ones(2), (1, 2.5)], "b": {"c": b"y"}}) == ["/a/1/1", "/b/c"]
    assert differences(state, {"a": [torch.ones(2).double(), (1, 2.0)], "b": {}}) == ["/a/0", "/b"]
    assert differences([1], [1, 2]) == [""] and differences({"x": 1}, {"y": 1}) == [""]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_ends_as_an_unbroken_one(make, whole, setting):
    unbroken, names = whole(setting)
    draw = random.Random(f"moments of {setting}")
    writing = [i for i, name in enumerate(names, 1) if name in ("half written", "before replace", "after replace")]
    moments = [draw.choice(writing) if i % 2 else draw.randint(1, len(names)) for i in range(KILLS[setting])]
    check(make(setting), unbroken, moments)


@pytest.mark.soak
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_moment(make, whole, setting):
    """The same for every event there is, and then for every pair of some."""
    unbroken, names = whole(setting)
    draw = random.Random(f"pairs of {setting}")
    pairs = [(draw.randint(1, len(names)), draw.randint(1, len(names))) for _ in range(100)]
    for moments in [*((i,) for i in range(1, len(names) + 1)), *pairs]:
        place = make(setting)
        check(place, unbroken, moments)
        shutil.rmtree(place.folder)


def in_epoch(n):
    """The moment after the last step of the n-th epoch of a process."""
    return "after step", 2 * n


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_last_whole_epoch(make, whole, number):
    """Also where no checkpoint was due. What is lost is the part of the epoch that was at work."""
    setting = ("bank", "TRAIN.CHECKPOINT_FREQ", 0)
    unbroken, _ = whole(*setting)
    place = make(*setting)
    for epoch in (1, 4):
        status, _ = place.run(die_at=in_epoch(epoch), number=number)
        assert status == 128 + number
        (line,) = place.errors.splitlines()
        assert line.startswith(f"stopped by {number.name}: ") and "train.py" in line
        kept = [path.name for path in place.checkpoints.glob("model*")] if place.checkpoints.exists() else []
        assert kept == ([] if epoch == 1 else ["model.pth.tar-3"])
        assert (
            "no epoch was finished" if epoch == 1 else f"{place.checkpoints}/model.pth.tar-3, after epoch 3"
        ) in line
    found, _ = place.finish()
    assert "Resuming from" in place.log.read_text() and differences(unbroken, found) == []


def test_a_signal_in_the_middle_of_writing_leaves_what_was(make, whole):
    unbroken, names = whole("workers")
    place = make("workers")
    half = [i for i, name in enumerate(names, 1) if name == "half written"]
    status, _ = place.run(die_at=half[len(half) // 2], number=signal.SIGTERM)
    assert status == 143 and len(place.errors.splitlines()) == 1
    assert not [path for path in place.out.rglob("*") if path.name.endswith(".tmp")]
    assert differences(unbroken, place.finish()[0]) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """One bit of a parameter, which torch alone does not notice."""
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["state_dict"]["ctx"]
    content[bytes(content).index(state.numpy().tobytes()[:16])] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(make, whole):
    """A run of each kind that was stopped in its fourth epoch, and what it would have ended as."""
    made = {}

    def call(setting):
        if setting not in made:
            unbroken, _ = whole(setting)
            place = make(setting)
            assert place.run(die_at=in_epoch(4))[0] == -signal.SIGKILL
            made[setting] = unbroken, place, place.out.rename(place.folder / "stopped")
        unbroken, place, copy = made[setting]
        shutil.rmtree(place.out, ignore_errors=True)
        shutil.copytree(copy, place.out)
        return unbroken, place

    return call


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_the_checkpoint_before_a_damaged_one_is_used(stopped, damage):
    unbroken, place = stopped("stages")
    damage(place.checkpoints / "model.pth.tar-3")
    assert differences(unbroken, place.finish()[0]) == []
    log = place.log.read_text()
    (line,) = [line for line in log.splitlines() if "can be read" in line]
    assert (
        line.startswith("WARNING: ")
        and f"{place.checkpoints}/model.pth.tar-3: not a checkpoint that can be read" in line
    )
    assert f'Resuming from "{place.checkpoints}/model.pth.tar-2" after epoch 2' in log


@pytest.mark.parametrize("note", [None, "", "model.pth.tar-9\n", "../../../etc/passwd\n", "\0\0\0"])
def test_the_note_of_the_newest_checkpoint_may_be_lost(stopped, note):
    unbroken, place = stopped("stages")
    (place.checkpoints / "checkpoint").unlink() if note is None else (place.checkpoints / "checkpoint").write_text(note)
    assert differences(unbroken, place.finish()[0]) == []
    assert "model.pth.tar-3" in place.log.read_text()


def test_without_a_whole_checkpoint_training_starts_anew_and_says_so(stopped):
    unbroken, place = stopped("stages")
    for path in place.checkpoints.glob("model*"):
        empty(path)
    assert differences(unbroken, place.finish()[0]) == []
    log = place.log.read_text()
    assert (
        log.count("not a checkpoint that can be read") == 3
        and "No checkpoint found that can be read, train from scratch" in log
    )


@pytest.mark.parametrize("damage, epoch_is_there", [(cut, True), (Path.unlink, False)])
def test_a_damaged_best_model_is_made_again(stopped, damage, epoch_is_there):
    unbroken, place = stopped("workers")
    best = place.checkpoints / "model-best.pth.tar"
    epoch = torch.load(best, weights_only=True)["epoch"]
    assert epoch <= 3
    damage(best)
    if not epoch_is_there:
        (place.checkpoints / f"model.pth.tar-{epoch}").unlink()
    found = place.finish()[0]
    # Made again of the epoch's checkpoint it is the same but for the random numbers, drawn by then for validation.
    assert set(differences(unbroken, found)) <= {"/model-best.pth.tar/random/torch"}
    assert f"{best}: not a checkpoint" in place.log.read_text()


def test_evaluation_uses_the_newest_model_where_the_best_is_damaged(make):
    place = make("workers")
    place.finish()
    empty(place.checkpoints / "model-best.pth.tar")
    argv = ["--eval-only", "--model-dir", place.out, *place.argv]
    argv[argv.index("--output-dir") + 1] = place.folder / "evaluated"
    status, _ = place.victims.run(argv, place.log)
    log = place.log.read_text()
    assert status == 0 and f"WARNING: {place.checkpoints}/model-best.pth.tar: not a checkpoint" in log
    assert f'from "{place.checkpoints}/model.pth.tar-5" (epoch = 5)' in log


def test_a_checkpoint_of_an_older_version_is_gone_on_from(stopped):
    """It holds torch's random state alone, and nothing of the method's."""
    unbroken, place = stopped("stages")
    path = place.checkpoints / "model.pth.tar-3"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["random"] = checkpoint["random"]["torch"]
    for key in ("method", "best_epoch", "best_result"):
        del checkpoint[key]
    torch.save(checkpoint, path)
    assert set(differences(unbroken, place.finish()[0])) <= {
        f"/model.pth.tar-5/random/{kind}" for kind in ("python/numbers", "numpy/keys", "numpy/position")
    }


def test_a_run_resumed_from_another_folder_goes_on_from_its_own(stopped):
    unbroken, place = stopped("bank")
    first, argv = place.out.rename(place.folder / "first"), ["--resume", place.folder / "first", *place.argv]
    status, _ = place.victims.run(argv, place.log, die_at=in_epoch(3))  # the fifth of all
    assert status == -signal.SIGKILL
    (before,) = [path.name for path in place.checkpoints.glob("model*")]
    status, said = place.victims.run(argv, place.log)
    assert status == 0, place.errors
    assert f'Resuming from "{place.checkpoints}/{before}"' in place.log.read_text()
    shutil.rmtree(first)
    assert differences(unbroken, place.outcome(said)) == []


def test_augmentation_does_not_hang_on_the_number_of_workers(make, whole):
    assert differences(whole("workers")[0], make("workers", "DATALOADER.NUM_WORKERS", 1).finish()[0]) == []
