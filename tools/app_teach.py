"""What ``tools/app.py`` trains: classes of images as a data set, arguments of ``train.py``, and a run that can stop."""

from __future__ import annotations

import atexit
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

from numpy.random import RandomState

import train
from toy.drawing import STYLES, draw
from trainers.predictor import Source
from trainers.prompting.backbone import TINIES, check_name, load_clip, preprocessing
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name

ROOT = Path(train.__file__).resolve().parent
EXAMPLES = ("bell", "fish", "star", "house", "key", "apple")  # classes of the embedded world
LINES = 20  # of a run's output that are searched for an error


def sources(files: Any) -> list[Source]:
    """Uploaded files under their own names, which decide where blocks are pasted, as in ``tools/predict.py``."""
    return [Source(f.path, os.path.basename(f.orig_name or f.path)) for f in (files.root if files else ())]


def names_of(text: Optional[str]) -> list[str]:
    """Class names, one a line or separated by commas, without repetitions."""
    names = (" ".join(name.split()) for name in re.split(r"[\n,;]", text or ""))
    return list({clean_name(name): name for name in names if name}.values())


def read_classes(
    boxes: Sequence[tuple[Optional[str], Optional[Sequence[Source]]]],
) -> tuple[dict[str, list], list[str]]:
    """Readable images by class name, and a line for each of the others. Raises UserError."""
    found, faults = {}, []
    for text, sources in boxes:
        name, good = clean_name(" ".join((text or "").split())), []
        for source in sources or ():
            try:
                read_image(source.path)
                good.append(source)
            except OSError as error:
                faults.append(f"Left out: {error}")
        if not name and sources:
            raise UserError("A box has images but no class name.")
        if name and not good:
            raise UserError(*faults, f'The class "{name}" has no image that can be read: add one, or remove the name.')
        if name in found:
            raise UserError(f'The class "{name}" occurs twice.')
        if name:
            found[name] = good
    if len(found) < 2:
        raise UserError(*faults, "Name at least two classes, and give each of them an image or more.")
    return found, faults


def arguments(trainer: str, model: str, **options: Any) -> list[str]:
    """Arguments of ``train.py`` for any backbone; ``options`` are values of config keys. Raises UserError."""
    check_name(model)
    inputs = preprocessing(model)
    if "SIZE" not in inputs:  # only the weights know
        inputs["SIZE"] = (load_clip(model).input_resolution,) * 2
    config = f"trainers/{trainer}/{'tiny96_ep10_ctxv1' if model in TINIES else 'vit_b16_ep50_ctxv1'}"
    files = {"config-file": config, "dataset-config-file": "datasets/folder"}
    flags = [f"--{flag}={ROOT}/configs/{name}.yaml" for flag, name in files.items()]
    pairs = {**{f"INPUT.{key}": value for key, value in inputs.items()}, **options}
    return [f"--trainer={trainer}", f"--backbone={model}", *flags, *(str(w) for pair in pairs.items() for w in pair)]


def prepare(folder: Path, classes: dict[str, list[Source]], method: str, model: str, epochs: int) -> list[str]:
    """A data set of these classes below ``folder``, and the arguments that train on all of it into ``folder/run``."""
    options = {"OPTIM.MAX_EPOCH": epochs, "TRAIN.DROP_LAST": False, "DATALOADER.NUM_WORKERS": 0}
    options |= {"TEST.NO_TEST": True, "TRAINER.TIPADAPTER.SEARCH": False}  # there are no other images
    options["TRAIN.PRINT_FREQ"] = 100  # a command that sets it prints the ends of all epochs, which Training reads
    words = arguments(method, model, **options)
    for i, sources in enumerate(classes.values()):
        for part in ("train", "test"):  # the layout has both
            (target := folder / "images" / part / f"{i:02d}").mkdir(parents=True)
            for n, source in enumerate(sources):
                read_image(source.path).save(target / f"{n:03d}.png")
    lines = (f"{i:02d} {name}\n" for i, name in enumerate(classes))
    (folder / "images" / "classnames.txt").write_text("".join(lines), encoding="utf-8")
    return [f"--root={folder}/images", f"--output-dir={folder}/run", "--seed=1", *words]


def train_here(words: Sequence[str]) -> None:
    """Train in this process, without epochs to wait for. Raises UserError."""
    train.build_trainer(train.setup_cfg(train.parse_args(words))).train()


class Training:
    """A run of ``train.py`` in a process of its own, so that it can be stopped, and a crash ends nothing else."""

    def __init__(self, words: Sequence[str]) -> None:
        command = [sys.executable, "-u", str(ROOT / "train.py"), *words]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, text=True, errors="replace", **streams)
        atexit.register(self.close)  # before its folder is removed

    def epochs(self) -> Iterator[tuple[int, int]]:
        """(done, total) after every epoch, until the run ends."""
        self.lines: list[str] = []
        try:
            for line in self.process.stdout:
                self.lines = [*self.lines, line.strip()][-LINES:]
                if found := re.match(r"epoch \[(\d+)/(\d+)\] took", line):
                    yield int(found[1]), int(found[2])
            self.process.wait()
        finally:
            self.stop()

    def stop(self) -> None:
        """End it; it saves the last complete epoch."""
        if self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """End it, and wait until it has written what it saves."""
        self.stop()
        self.process.wait()

    def finished(self) -> bool:
        """Whether it came to its end; False where it was stopped. Raises UserError with what it reported."""
        status, errors = self.process.returncode, [line for line in self.lines if line.startswith("error: ")]
        if status and status not in (128 + signal.SIGTERM, -signal.SIGTERM):
            last = f"Training ended with status {status}: {(self.lines or ['no output'])[-1]}"
            raise UserError(*([line.removeprefix("error: ") for line in errors] or [last]))
        return status == 0


def silently() -> redirect_stdout:
    """A context without the output of models that are built."""
    return redirect_stdout(io.StringIO())


def examples(count: int) -> dict[str, list[str]]:
    """Files with drawings of the embedded world, by class."""
    folder, found = tempfile.mkdtemp(), {}
    for i, kind in enumerate(EXAMPLES):
        found[kind] = [f"{folder}/{kind} {n + 1}.png" for n in range(count)]
        for n, path in enumerate(found[kind]):
            draw(kind, STYLES["scene"], RandomState([0, i, n]), 128).image.save(path)
    return found
